"""gmps.py: its mathematics against closed forms, plain loops and finite differences, its experts and bookkeeping."""

import copy
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

import gmps as module

CPU = torch.device("cpu")


class Sign(gym.Env):
    """A task is +1 or -1, a step's reward the task times the action. Episodes have three to five steps."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,), np.float64), gym.spaces.Box(-1, 1, (1,), np.float64)
    expert, scale = staticmethod(lambda obs, task: task), 1.0

    def sample_tasks(self, n):
        return np.resize([1.0, -1.0], (n, 1))

    def set_task(self, task):
        self.task = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.steps = self.np_random.integers(3, 6), 0
        return np.ones(2), {}

    def step(self, action):
        self.steps += 1
        return np.ones(2), float(self.scale * self.task * action[0]), self.steps == self.length, False, {}

    def expert_action(self, obs, task):
        assert obs.shape == (2,) and (obs == 1).all() and task.shape == (1,)  # never a padded row
        return self.expert(obs, task)


gym.register("ExpertSign-v0", Sign, max_episode_steps=5)


@pytest.fixture
def double():
    """Double precision and fixed draws."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def of_task(batch, i):
    return {name: x[i] for name, x in batch.items()}


def ragged_mask(n, e, t):
    """Episodes of 1 to t steps, the first of every task the longest."""
    lengths = 1 + torch.arange(n * e).view(n, e) % t
    lengths[:, 0] = t
    return (torch.arange(t) < lengths[..., None]).double()


def make_problem(adapted=None, clip=0.0, n=3, e=3, t=4, moved=0.3):
    """A small policy, its meta-parameters moved away from those that collected a batch, and labelled states."""
    policy = module.Policy(2, 2, 6, 3, 0.8)
    old = {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in policy.named_parameters()}
    theta = {name: p + moved * torch.randn_like(p) for name, p in old.items()}
    lr = {name: 0.5 + 0.2 * torch.rand_like(p) for name, p in theta.items() if adapted is None or name in adapted}
    mask = ragged_mask(n, e, t)
    obs = torch.randn(n, e, t, 2) * mask[..., None]
    mean, log_std = functional_call(policy, old, (obs,)).chunk(2, -1)
    actions = (mean + log_std.exp() * torch.randn_like(mean)) * mask[..., None]
    normal = torch.distributions.Normal(mean, log_std.exp())
    batch = {"obs": obs, "actions": actions, "mask": mask, "advantages": torch.randn(n, e, t) * mask}
    batch["logprobs"] = normal.log_prob(actions).sum(-1)
    batch = {name: x.detach() for name, x in batch.items()}
    labels = torch.rand(n, 5, 2) * 2 - 1
    settings = {"policy": policy, "importance_clip": clip}
    return SimpleNamespace(**locals(), expert_obs=torch.randn(n, 5, 2))


def plain_log_density(policy, params, batch):
    mean, log_std = functional_call(policy, params, (batch["obs"],)).chunk(2, -1)
    return torch.distributions.Normal(mean, log_std.exp()).log_prob(batch["actions"]).sum(-1)


def plain_weights(p, theta, i):
    """π / π_old of every step of task i, clipped."""
    ratio = (plain_log_density(p.policy, theta, of_task(p.batch, i)) - p.batch["logprobs"][i]).exp()
    return ratio.clamp(1 / p.clip, p.clip) if p.clip else ratio


def plain_adapt(p, theta, lr, i, weights=None):
    """φ of task i, in a loop over its steps; weights: constants in the place of its own."""
    theta = {name: x if x.requires_grad else x.detach().requires_grad_() for name, x in theta.items()}
    weights = plain_weights(p, theta, i).detach() if weights is None else weights
    logprobs, mask = plain_log_density(p.policy, theta, of_task(p.batch, i)), p.batch["mask"][i]
    total = 0
    for j, k in np.ndindex(*mask.shape):
        if mask[j, k]:
            total = total - weights[j, k] * logprobs[j, k] * p.batch["advantages"][i, j, k]
    gradient = torch.autograd.grad(total / mask.sum(), [theta[name] for name in lr], create_graph=True)
    return theta | {name: theta[name] - lr[name] * g for name, g in zip(lr, gradient, strict=True)}


def plain_loss(p, theta, lr, weights):
    losses = []
    for i in range(p.n):
        phi = plain_adapt(p, theta, lr, i, weights[i])
        mean = functional_call(p.policy, phi, (p.expert_obs[i],)).chunk(2, -1)[0]
        losses.append(sum((mean[b] - p.labels[i, b]).square().sum() for b in range(5)) / 10)
    return sum(losses) / p.n


def unpack(vector, like):
    pieces = vector.split([x.numel() for x in like.values()])
    return {name: piece.view_as(x) for (name, x), piece in zip(like.items(), pieces, strict=True)}


# ------------------------------------------------------------------------------------------------------- the inner step


@pytest.mark.parametrize("adapted", [None, ["bias"]])
@pytest.mark.parametrize("clip", [0, 1.2])
def test_inner_step(double, clip, adapted):
    """φ of each task, against a loop over its valid steps; only the adapted parameters move. The largest weight."""
    p, largest = make_problem(adapted, clip), 0
    for i in range(p.n):
        phi, weight = module.inner_step(p.theta, p.lr, of_task(p.batch, i), **p.settings)
        expected = plain_adapt(p, p.theta, p.lr, i)
        for name, x in phi.items():
            torch.testing.assert_close(x, expected[name].detach())
            assert torch.equal(x, p.theta[name]) == (name not in p.lr)
        unclipped = SimpleNamespace(**{**vars(p), "clip": 0})
        assert weight.item() == pytest.approx(plain_weights(unclipped, p.theta, i)[p.batch["mask"][i] > 0].max().item())
        largest = max(largest, weight)
    assert largest > 1.2  # some weight is clipped


def test_importance_weights(double):
    """1 for the policy that collected; for another one their mean is 1, and so a weighted mean is an expectation."""
    p = make_problem(moved=0)
    _, weight = module.inner_step(p.theta, p.lr, of_task(p.batch, 0), **p.settings)
    assert weight == pytest.approx(1, abs=1e-12)
    assert (p.batch["logprobs"][0] - plain_log_density(p.policy, p.theta, of_task(p.batch, 0))).abs().max() < 1e-12

    p = make_problem(n=1, e=20_000, t=1, moved=0.1)
    batch = of_task(p.batch, 0)
    ratio = (plain_log_density(p.policy, p.theta, batch) - batch["logprobs"]).exp()
    assert ratio.std() > 0.1 and (ratio.mean() - 1).abs() < 4 * ratio.std() / math.sqrt(20_000)
    # off-policy with weights, the step is the one on-policy; without them (clip 1) it is not
    mean, log_std = functional_call(p.policy, p.theta, (batch["obs"],)).chunk(2, -1)
    actions = mean + log_std.exp() * torch.randn_like(mean)
    fresh = batch | {"actions": actions, "logprobs": module.log_density(torch.cat([mean, log_std], -1), actions)}
    for data in (batch, fresh):
        data["advantages"] = data["actions"].tanh().sum(-1) + 1
    on_policy, off_policy, without = (
        parameters_to_vector(module.inner_step(p.theta, p.lr, data, p.policy, clip)[0].values())
        for data, clip in ((fresh, 0), (batch, 0), (batch, 1))
    )
    assert (off_policy - on_policy).norm() < 0.3 * (without - on_policy).norm()


# ---------------------------------------------------------------------------------------------------- the meta-gradient


def meta_gradient(p, detach=False):
    """Of θ and α, and the loss."""
    meta = [x.requires_grad_() for x in (*p.theta.values(), *p.lr.values())]
    if detach:
        phi = [plain_adapt(p, p.theta, p.lr, i) for i in range(p.n)]
        phi = [{name: x.detach() - p.theta[name].detach() + p.theta[name] for name, x in one.items()} for one in phi]
        means = torch.stack([functional_call(p.policy, phi[i], (p.expert_obs[i],))[..., :2] for i in range(p.n)])
        loss = (means - p.labels).square().mean()
    else:
        loss, _ = module.imitation_loss(p.theta, p.lr, p.batch, p.expert_obs, p.labels, **p.settings)
    gradient = torch.autograd.grad(loss, meta, allow_unused=True)
    return loss, torch.cat(
        [(torch.zeros_like(x) if g is None else g).flatten() for g, x in zip(gradient, meta, strict=True)]
    )


@pytest.mark.parametrize("adapted, clip", [(None, 0), (None, 1.3), (["bias"], 0)])
def test_meta_gradient(double, adapted, clip):
    """Against central differences, through the inner step, with its weights held constant; not the first-order one."""
    p = make_problem(adapted, clip)
    weights = [plain_weights(p, p.theta, i).detach() for i in range(p.n)]
    like = p.theta | {f"lr.{name}": x for name, x in p.lr.items()}

    def f(vector):
        meta = unpack(vector, like)
        return plain_loss(
            p, {name: meta[name] for name in p.theta}, {name: meta[f"lr.{name}"] for name in p.lr}, weights
        )

    at = parameters_to_vector(like.values()).detach()
    expected = torch.stack([(f(at + d) - f(at - d)).detach() / 2e-6 for d in 1e-6 * torch.eye(len(at))])
    loss, gradient = meta_gradient(p)
    assert loss.item() == pytest.approx(f(at).item(), rel=1e-12)
    assert (gradient - expected).norm() < 1e-7 * expected.norm()
    first_order = meta_gradient(p, detach=True)[1]
    if adapted is None:
        assert (gradient - first_order).norm() > 0.1 * gradient.norm()
        # were the weights no constants, the gradient would be another
        moving = lambda v: plain_loss(p, *parts(v), [plain_weights(p, parts(v)[0], i) for i in range(p.n)])  # noqa: E731

        def parts(vector):
            meta = unpack(vector, like)
            return {name: meta[name] for name in p.theta}, {name: meta[f"lr.{name}"] for name in p.lr}

        other = torch.stack([(moving(at + d) - moving(at - d)).detach() / 2e-6 for d in 1e-6 * torch.eye(len(at))])
        assert (gradient - other).norm() > 0.05 * gradient.norm()


def test_without_adaptation_it_is_behaviour_cloning(double):
    """Loss and gradient are those of one network on all tasks' data; the batch of episodes is without influence."""
    p = make_problem(adapted=[])
    loss, gradient = meta_gradient(p)
    means = functional_call(p.policy, p.theta, (p.expert_obs,))[..., :2]
    cloning = (means - p.labels).square().mean()
    expected = torch.autograd.grad(cloning, [*p.theta.values()], allow_unused=True)
    expected = torch.cat(
        [(torch.zeros_like(x) if g is None else g).flatten() for g, x in zip(expected, p.theta.values(), strict=True)]
    )
    torch.testing.assert_close(loss, cloning)
    torch.testing.assert_close(gradient, expected)
    zero = make_problem()
    zero.lr = {name: torch.zeros_like(x) for name, x in zero.lr.items()}
    adapted, _ = module.imitation_loss(zero.theta, zero.lr, zero.batch, zero.expert_obs, zero.labels, **zero.settings)
    plain, _ = module.imitation_loss(zero.theta, {}, zero.batch, zero.expert_obs, zero.labels, **zero.settings)
    assert torch.equal(adapted, plain)


def test_tasks_are_apart(double):
    """Another task's episodes and labels change nothing; swapped labels or episodes do. Chunks make no difference."""
    p = make_problem()
    arguments = p.theta, p.lr, p.batch, p.expert_obs, p.labels
    whole, weights = module.imitation_loss(*arguments, **p.settings)
    alone = [module.imitation_loss(p.theta, p.lr, *({name: x[[i]] for name, x in p.batch.items()}, p.expert_obs[[i]],
                                                    p.labels[[i]]), **p.settings) for i in range(3)]  # fmt: skip
    torch.testing.assert_close(whole, sum(loss for loss, _ in alone) / 3)
    torch.testing.assert_close(weights, torch.cat([weight for _, weight in alone]))
    swapped, _ = module.imitation_loss(*arguments[:4], p.labels.roll(1, 0), **p.settings)
    other, _ = module.imitation_loss(
        *arguments[:2], {k: x.roll(1, 0) for k, x in p.batch.items()}, *arguments[3:], **p.settings
    )
    assert abs(swapped - whole) > 1e-3 and abs(other - whole) > 1e-6
    long = make_problem(e=3, t=1500)  # 4500 steps a task: one at a time
    for i in range(3):
        phi, _ = module.inner_step(long.theta, long.lr, of_task(long.batch, i), **long.settings)
        mean = functional_call(long.policy, phi, (long.expert_obs[i],))[..., :2]
        long.labels[i] = mean.detach()
    assert (
        module.imitation_loss(long.theta, long.lr, long.batch, long.expert_obs, long.labels, **long.settings)[0] < 1e-20
    )


def test_padding_is_without_influence(double):
    p = make_problem()
    before, weights = module.imitation_loss(p.theta, p.lr, p.batch, p.expert_obs, p.labels, **p.settings)
    padded = p.batch["mask"] == 0
    assert padded.any()
    p.batch["obs"][padded], p.batch["advantages"][padded], p.batch["logprobs"][padded] = 1e3, 1e3, -1e6
    after, again = module.imitation_loss(p.theta, p.lr, p.batch, p.expert_obs, p.labels, **p.settings)
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(weights, again)


# --------------------------------------------------------------------------------------------------------- the experts


def expert(tasks, **changes):
    torch.manual_seed(0)
    args = module.Args(hidden_size=8, expert_reward_scale=5, expert_gamma=0.9, tau=0.1, **changes)
    return module.Expert(tasks, obs_size=2, action_size=2, capacity=50, args=args)


def test_a_gradient_step_of_the_expert_in_plain_terms(double):
    """Twin critics towards the soft target at temperature 1/5, the actor against the new ones, then the targets."""
    tasks, batch = torch.randn(3, 1), [torch.randn(3, 6, size) for size in (2, 2, 1, 2, 1)]
    batch[4], noise = (batch[4] > 0).double(), torch.randn(2, 3, 6, 2)
    agent, copy = expert(tasks), expert(tasks)
    with torch.no_grad():
        for p, q in zip(agent.targets.parameters(), copy.targets.parameters(), strict=True):
            q.copy_(p.add_(0.1 * torch.randn_like(p)))  # the targets are behind
    agent.step(batch, tasks.unsqueeze(1).expand(3, 6, 1), noise)
    obs, actions, rewards, next_obs, terminated = (x.flatten(0, 1) for x in batch)
    task = ((tasks - tasks.mean()) / tasks.std(correction=0)).repeat_interleave(6, 0)

    def act(obs, noise):
        mean, log_std = copy.actor(torch.cat([obs, task], -1)).chunk(2, -1)
        raw = mean + log_std.exp() * noise.flatten(0, 1)
        density = torch.distributions.Normal(mean, log_std.exp()).log_prob(raw)
        return raw.tanh(), (density - (1 - raw.tanh() ** 2).log()).sum(-1)

    def values(critics, obs, actions):
        x = torch.cat([obs, task, actions], -1)
        return critics(x.expand(2, *x.shape)).squeeze(-1)

    with torch.no_grad():
        next_actions, logprobs = act(next_obs, noise[0])
        value = values(copy.targets, next_obs, next_actions).amin(0) - 0.2 * logprobs
        y = rewards[:, 0] + 0.9 * (1 - terminated[:, 0]) * value
    old = [p.detach().clone() for p in copy.targets.parameters()]
    for name, networks in (("critics", copy.critics), ("actor", copy.actor)):
        if name == "critics":
            q = values(copy.critics, obs, actions)
            loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
        else:
            own_actions, logprobs = act(obs, noise[1])
            loss = (0.2 * logprobs - values(copy.critics, obs, own_actions).amin(0)).mean()
        copy.optimizers[name].zero_grad()
        for p, g in zip(networks.parameters(), torch.autograd.grad(loss, [*networks.parameters()]), strict=True):
            p.grad = g
        copy.optimizers[name].step()
    for name in ("critics", "actor"):
        for p, q in zip(getattr(agent, name).parameters(), getattr(copy, name).parameters(), strict=True):
            torch.testing.assert_close(p, q)
    for p, before, q in zip(agent.targets.parameters(), old, copy.critics.parameters(), strict=True):
        torch.testing.assert_close(p, 0.9 * before + 0.1 * q)


def test_the_expert_sees_the_task():
    """Standardised; a column that is the same in all training tasks is left in its unit."""
    tasks = torch.tensor([[10.0, 5.0], [30.0, 5.0]])
    agent, obs = expert(tasks), torch.zeros(2, 2)
    torch.testing.assert_close((tasks - agent.mean) / agent.scale, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.normal_()
    assert not torch.allclose(*agent.mean_action(obs, tasks))
    noisy = agent.act(obs, tasks, torch.randn(2, 2))[0]
    assert (noisy.abs() <= 1).all() and not torch.allclose(noisy, agent.mean_action(obs, tasks))


def test_the_units_of_observations(double):
    """The policy reads them less their mean and over their spread, within 10; a constant one keeps its unit."""
    policy, obs = module.Policy(3, 2, 6, 3, 0.8), torch.randn(50, 3) * 5 + 2
    obs[:, 2] = 4
    plain = copy.deepcopy(policy)  # its units are 1
    policy.measure(obs)
    scaled = (obs - obs.mean(0)) / torch.tensor([*obs[:, :2].std(0, correction=0), 1])
    torch.testing.assert_close(policy(obs), plain(scaled))
    far = torch.full((1, 3), 1e6)
    torch.testing.assert_close(policy(far), plain(torch.full((1, 3), 10.0)))


def test_scripted_experts():
    """Straight to the goal on the point families; a user's expert_action is called for valid states only."""
    for env_id in ("PointRobot-v0", "SparsePointRobot-v0", "Navigation2D-v0"):
        envs = module.make_envs(env_id, 50)
        tasks, act = envs.sample_tasks(50, np.random.default_rng(0)), module.scripted_expert(envs)
        goal = torch.as_tensor(tasks).float()
        batch = module.rollout(envs, lambda obs, t: act(obs, goal), tasks, 40, np.random.default_rng(1), CPU)  # noqa: B023
        last = batch["obs"][torch.arange(50), batch["mask"].sum(1).long() - 1]
        assert (last - goal).abs().max() < 0.11
    envs = module.make_envs("ExpertSign-v0", 4)
    tasks, act = envs.sample_tasks(4, np.random.default_rng(0)), module.scripted_expert(envs)
    batch = module.episodes(lambda obs, noise: noise, tasks, np.random.default_rng(0), envs, 5, CPU)
    assert 0 < batch["mask"].mean() < 1
    labels = module.label(batch, torch.as_tensor(tasks).float(), act)
    expected = torch.as_tensor(tasks).float()[:, None, None] * batch["mask"].unsqueeze(-1)
    torch.testing.assert_close(labels, expected)
    for env_id in ("user_tasks:Matrix-v0", "HalfCheetahDir-v0", "MultimodalNavigation2-v0"):
        with pytest.raises(SystemExit, match=r"has no method expert_action\(obs, task\)"):
            module.scripted_expert(module.make_envs(env_id, 1, 1))


@pytest.mark.parametrize("answer", [[1.0, 2.0], [np.nan], [], None])
def test_a_scripted_expert_with_a_fault(monkeypatch, answer):
    monkeypatch.setattr(Sign, "expert", staticmethod(lambda obs, task: np.array(answer)))
    with pytest.raises(SystemExit, match="must return 1 finite numbers"):
        module.scripted_expert(module.make_envs("ExpertSign-v0", 1))(torch.ones(3, 2), torch.ones(3, 1))


def test_labels_are_clipped_and_of_each_tasks_own_expert():
    envs = module.make_envs("SparsePointRobot-v0", 6)
    tasks = envs.sample_tasks(3, np.random.default_rng(0))
    batch = module.episodes(lambda obs, noise: noise, tasks, np.random.default_rng(0), envs, 20, CPU)
    labels = module.label(batch, torch.as_tensor(tasks).float(), module.scripted_expert(envs))
    goal = torch.as_tensor(tasks).float()[:, None, None]
    torch.testing.assert_close(labels, (10 * (goal - batch["obs"])).clamp(-1, 1))
    assert (labels.abs() == 1).any() and (labels.abs() < 1).any()


# ---------------------------------------------------------------------------------------------demonstrations in a file


ARRAYS = "observations", "actions", "tasks"  # of two columns each


def demos_file(path, **changes):
    rng = np.random.default_rng(0)
    index = np.array([2, 0, 1, 3, 0, 0, 1])
    arrays = {"observations": rng.normal(size=(7, 2)), "actions": rng.uniform(-1, 1, (7, 2)), "task_index": index}
    arrays |= {"tasks": rng.uniform(-1, 1, (4, 2)), **changes}
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return arrays


def test_demonstrations_from_a_file(train, tmp_path):
    """Rows go to their tasks, whose number and values are those of the file; a resumed run does without the file."""
    arrays = demos_file(tmp_path / "demos.npz")
    tasks, rows, mask = module.load_demos(tmp_path / "demos.npz", 2, 2, (2,))
    assert mask.sum(1).tolist() == [3, 2, 1, 1] and np.array_equal(tasks, arrays["tasks"])
    for i in range(4):
        mine = arrays["task_index"] == i
        expected = np.hstack([arrays["observations"][mine], arrays["actions"][mine]])
        np.testing.assert_array_equal(rows[i][mask[i]], expected)
    folder, metrics = train(module, expert="demos", demos="demos.npz", total_timesteps=160)
    state = load(folder)
    assert state["global_step"] == 160 and state["iteration"] == 2  # of 80 each: nobody to ask, so no DAgger
    assert state["data"]["count"].tolist() == [3, 2, 1, 1] and "sac" not in state
    np.testing.assert_array_equal(state["tasks"], arrays["tasks"])
    units = np.stack([state["units"]["obs_mean"], state["units"]["obs_std"]])
    obs = arrays["observations"]
    np.testing.assert_allclose(units, [obs.mean(0), obs.std(0)], rtol=1e-5)
    assert "charts/episodic_return" not in metrics and "charts/pre_adaptation_return" in metrics
    (tmp_path / "demos.npz").unlink()
    train(module, resume=folder, total_timesteps=161)
    assert load(folder)["global_step"] == 240


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"actions": None}, "no .npz file with the arrays observations, actions, task_index, tasks"),
        ({"observations": np.zeros((7, 3))}, "observations is float64 (7, 3), not numbers of shape (7, 2)"),
        ({"actions": np.zeros((7, 1))}, "actions is"),
        ({"actions": np.zeros((6, 2))}, "actions is"),
        ({"actions": np.full((7, 2), 1.1)}, "actions reach 1.1"),
        ({"actions": np.full((7, 2), -1.1)}, "actions reach 1.1"),
        ({"observations": np.array([[0, 0]] * 6 + [[0, np.nan]])}, "observations is not finite in row 6"),
        ({"actions": np.full((7, 2), np.inf)}, "actions is not finite in row 0"),
        ({"observations": np.array([["a", "b"]] * 7)}, "observations is <U1"),
        ({"task_index": np.zeros((7, 1), int)}, "task_index is"),
        ({"task_index": np.array([0, 1, 2, 4, 0, 0, 0])}, "task_index must name"),
        ({"task_index": np.array([0, 1, 2, 2, 0, 0, 0])}, "task_index must name"),
        ({"task_index": np.array([0, 1, 2, 3, -1, 0, 0])}, "task_index must name"),
        ({"task_index": np.array([0, 1, 2, 3, 0.5, 0, 0])}, "task_index must name"),
        ({"tasks": np.zeros((4, 3))}, "tasks is"),
        ({"tasks": np.zeros((3, 2)), "task_index": np.arange(7) % 3}, "--num-train-tasks 4: demos.npz has demonst"),
        ({name: np.zeros((0, 2)) for name in ("observations", "actions")} | {"task_index": np.zeros(0)}, "must name"),
        ({"observations": np.zeros(()), "tasks": np.zeros(())}, "is float64 ()"),
        (
            {name: np.zeros((0, 2)) for name in ARRAYS} | {"task_index": np.zeros(0)},
            "--num-train-tasks 4: demos.npz has demonstrations of 0 tasks",
        ),
    ],
)
def test_faults_of_a_file(train, tmp_path, changes, part):
    demos_file(tmp_path / "demos.npz", **changes)
    with pytest.raises(SystemExit) as end:
        train(module, expert="demos", demos="demos.npz")
    assert str(end.value.code).startswith("error: ") and part in end.value.code and "\n" not in end.value.code
    assert not (tmp_path / "runs").exists()


def test_files_that_are_none(train, tmp_path):
    (tmp_path / "text").write_text("observations")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "empty.npz")
    os.mkfifo(tmp_path / "fifo")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for somebody to write to the FIFO"))
    signal.alarm(20)
    for path in ("text", "array.npy", "empty.npz", "fifo", "none.npz", "."):
        with pytest.raises(SystemExit, match=r"^error: --demos .*no .npz file with the arrays"):
            train(module, expert="demos", demos=path)
    signal.alarm(0)


@pytest.mark.parametrize(
    "flags, part",
    [
        ({"num_train_tasks": 3}, "--num-train-tasks 3: less than --meta-batch-size 4"),
        ({"num_train_tasks": 0}, "--num-train-tasks 0"),
        ({"env_id": "user_tasks:Discrete-v0"}, "Discrete actions"),
        ({"importance_clip": 0.5}, "--importance-clip 0.5: must be"),
        ({"expert": "demos"}, "--expert demos and --demos FILE go together"),
        ({"demos": "demos.npz"}, "--expert demos and --demos FILE go together"),
        ({"env_id": "HalfCheetahDir-v0", "expert": "scripted"}, "has no method expert_action"),
        ({"dataset_size": 19}, "--dataset-size 19: less than the 20 states"),
        ({"total_timesteps": 239}, "can use them up, give 240 or more"),
        ({"total_timesteps": 239, "env_id": "user_tasks:Uneven-v0"}, "can use them up, give 240 or more"),
        ({"total_timesteps": 80, "expert": "scripted"}, "can use them up, give 81 or more"),
    ],
)
def test_bad_input(train, tmp_path, flags, part):
    with pytest.raises(SystemExit) as end:
        train(module, **flags)
    assert str(end.value.code).startswith("error: ") and part in end.value.code and "\n" not in end.value.code
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- rounds and counters


def test_steps_and_data_of_a_run(train, monkeypatch):
    """Every step is counted once, those of meta-tests never; D_i grows by DAgger's states, those of φ_i, labelled."""
    collected, collect = [], module.collect

    def recorded(params, tasks, rng, envs, *args, **kwargs):
        batch = collect(params, tasks, rng, envs, *args, **kwargs)
        collected.append((params, tasks, batch, envs))
        return batch

    monkeypatch.setattr(module, "collect", recorded)
    flags = {
        "expert": "scripted",
        "num_train_tasks": 6,
        "meta_batch_size": 3,
        "total_timesteps": 400,
        "eval_every": 100,
    }
    folder, metrics = train(module, **flags)
    state = load(folder)
    # demonstrations 6 x 2 x 10; three rounds of 3 x 2 x 10 and as many for DAgger
    assert state["global_step"] == 120 + 3 * 120 and state["iteration"] == 4
    assert state["data"]["count"].sum() == 120 + 3 * 60
    assert state["data"]["count"].view(3, 2).sort().values.tolist() == 3 * [[20 + 20, 20 + 40]]  # two tasks in turn
    adapted = collected[1::2][:3]
    for (theta, tasks, before, _), (phi, same, visited, _) in zip(collected[:6:2], collected[1:6:2], strict=True):
        assert np.array_equal(tasks, same) and not torch.equal(before["obs"], visited["obs"])
        assert all((p == p[:1]).all() for p in theta.values())
        assert all((p != theta[name]).any() for name, p in phi.items())
    rows = state["data"]["rows"].split(state["data"]["count"].tolist())
    known = state["tasks"].float()
    for i in range(6):
        obs, label = rows[i].split(2, -1)
        torch.testing.assert_close(label, (10 * (known[i] - obs)).clamp(-1, 1))
    last = adapted[-1]
    where = [state["tasks"].tolist().index(task.tolist()) for task in last[1]]
    for j, i in enumerate(where):
        torch.testing.assert_close(rows[i][-20:, :2], last[2]["obs"][j].flatten(0, 1))
    assert metrics["charts/episodic_return"] == pytest.approx(last[2]["rewards"].sum(-1).mean().item())


def test_the_steps_of_the_sac_expert(train):
    """Four tasks x 2 episodes x 10 steps an iteration until the budget is used, then the demonstrations, then rounds.
    All labels are those of the expert that this leads to.
    """
    step_sizes = {"learning_rate": 0.02, "learning_rate_decay": 0.5, "expert_learning_rate": 0.003}
    flags = {"expert_timesteps": 200, "total_timesteps": 1000, "eval_every": 100}
    folder, _ = train(module, **flags, **step_sizes)
    state = load(folder)
    assert state["sac"]["replay"]["count"].tolist() == [0] * 4  # no longer needed, nor saved
    # 3 x 80 is the first multiple beyond 200
    assert state["iteration"] == 3 + 5 and state["global_step"] == 3 * 80 + 80 + 5 * 160
    assert state["data"]["count"].tolist() == [20 + 5 * 20] * 4
    optimizers = [state["optimizer"], *state["sac"]["optimizers"].values()]
    assert [optimizer["param_groups"][0]["lr"] for optimizer in optimizers] == [0.02 / 2**5, 0.003, 0.003]
    assert [optimizer["state"][0]["step"] for optimizer in optimizers] == [5 * 2] + 2 * [3 * 2]
    tasks = state["tasks"].float()
    agent = module.Expert(tasks, 2, 2, 60, module.Args(**state["args"]))
    agent.load(state["sac"])
    obs, labels = state["data"]["rows"].split(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(labels, agent.mean_action(obs, tasks.repeat_interleave(20 + 5 * 20, 0)))


def test_a_run_stopped_while_its_expert_learns_goes_on(train, monkeypatch):
    """As the uninterrupted one does: the expert, its replay and its optimizers are saved."""
    flags = {"expert_timesteps": 400, "total_timesteps": 800}
    whole, _ = train(module, **flags)
    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "stopping", lambda run: run.bar.n >= 160)  # as after a signal
        part, _ = train(module, **flags)
    assert load(part)["global_step"] == 160 and load(part)["sac"]["replay"]["count"].tolist() == [40] * 4
    train(module, resume=part)
    expected, state = load(whole), load(part)
    assert state["global_step"] == expected["global_step"]
    for name in ("meta", "units"):
        assert all(torch.equal(x, expected[name][key]) for key, x in state[name].items())
    assert all(torch.equal(x, expected["sac"]["networks"][key]) for key, x in state["sac"]["networks"].items())


def test_a_diverging_expert_is_named_and_spares_the_checkpoint(train, monkeypatch):
    """The last one that was good is kept, and no environment is blamed for the actions of a network that is not."""
    learn, calls = module.Expert.learn, []

    def diverge(agent, *args):
        calls.append(args)
        for optimizer in agent.optimizers.values():
            optimizer.param_groups[0]["lr"] *= 1e30 if len(calls) == 2 else 1
        return learn(agent, *args)

    monkeypatch.setattr(module.Expert, "learn", diverge)
    with pytest.raises(SystemExit, match=r"^error: the expert's loss is not finite: try a smaller --expert-l"):
        train(module, exp_name="sac", expert_timesteps=240, checkpoint_every=1, total_timesteps=800)
    (path,) = Path("runs").glob("*__sac__*")
    state = load(path)
    assert state["iteration"] == 1 and all(x.isfinite().all() for x in state["sac"]["networks"].values())


def test_a_diverging_imitation_is_named_and_spares_the_checkpoint(train):
    with pytest.raises(SystemExit, match=r"^error: the imitation loss is not finite: try a smaller --inner-lr or"):
        train(module, exp_name="imitation", learning_rate=1e30, gradient_steps=10, checkpoint_every=1)
    (path,) = Path("runs").glob("*__imitation__*")
    state = load(path)
    assert state["iteration"] == 1 and all(x.isfinite().all() for x in state["meta"].values())


def test_an_experts_reward_that_is_too_large_is_named(train, monkeypatch):
    """Its square is infinite in single precision."""
    monkeypatch.setattr(Sign, "scale", 1e25)
    with pytest.raises(SystemExit, match=r"^error: the expert's loss is not finite: .* or reward$"):
        train(module, env_id="ExpertSign-v0")


@pytest.fixture
def rounds(train, monkeypatch):
    """rounds(num_rounds, **flags): the tasks of each round of a run without DAgger."""

    def play(num_rounds, num_train_tasks, **flags):
        played, collect = [], module.collect

        def recorded(params, tasks, *args, **kwargs):
            played.append(tasks)
            return collect(params, tasks, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, "collect", recorded)
            short = {"horizon": 2, "episodes_per_task": 1, "expert_episodes": 1, "expert_timesteps": 1, "dagger": False}
            short |= {"num_train_tasks": num_train_tasks, "eval_every": 100, "num_eval_steps": 0} | flags
            steps = 2 * (2 * num_train_tasks + num_rounds * short["meta_batch_size"])
            train(module, **short, total_timesteps=steps, num_test_tasks=1)
        return played[:num_rounds]

    return play


@pytest.mark.parametrize("env_id", ["MultimodalNavigation2-v0", "HalfCheetahDir-v0"])
def test_a_round_holds_both_modes_of_a_family_that_deals_them_in_turn(rounds, env_id):
    """Otherwise rounds would alternate between the modes, and each would undo the other's."""
    played = rounds(6, 20, meta_batch_size=10, env_id=env_id)
    assert len(played) == 6 and all(len(np.unique(tasks[:, -1])) == 2 for tasks in played)


def test_tasks_come_up_equally_often_and_meet_different_ones(rounds):
    """Each of twelve comes up once in four rounds of three, and rounds differ from those of the pass before."""
    played = rounds(14, 12, meta_batch_size=3)[2:]  # the first two end a pass: the expert took its other iterations
    tasks = np.stack(played)[..., 0]  # one coordinate of the goal tells them apart
    assert all(len(np.unique(one)) == 12 for one in tasks.reshape(3, 4 * 3))
    assert len(np.unique(np.sort(tasks, axis=1), axis=0)) > 4


def test_what_trains_is_the_dense_reward_of_the_expert_and_train_reward_of_the_rest(train, monkeypatch):
    seen, collected = [], []
    step, advantages = module.Expert.step, module.standardised_advantages
    monkeypatch.setattr(
        module.Expert, "step", lambda self, batch, *args: (seen.append(batch[2]), step(self, batch, *args))[1]
    )
    monkeypatch.setattr(module, "standardised_advantages", lambda batch, *args: (
        collected.append(batch["rewards"]), advantages(batch, *args))[1])  # fmt: skip
    train(module, env_id="SparsePointRobot-v0", train_reward="sparse", test_reward="dense", eval_every=100)
    assert all((x < 0).all() for x in seen)
    assert len(collected) > 2 and all((x >= 0).all() for x in collected[:2]) and (collected[-1] < 0).all()


def test_draws_are_those_of_one_process(monkeypatch):
    """Rows of each task's own, all of them; two ranks draw the halves of what one draws."""
    store = module.Replay(4, 10, 1, CPU)
    ids, mask = torch.arange(4), torch.arange(6).expand(4, 6) < torch.tensor([[1], [3], [6], [6]])
    store.add(ids, (10 * ids[:, None] + torch.arange(6)).unsqueeze(-1).float(), mask.float())
    rows = store.sample(ids, 200, torch.Generator().manual_seed(0))
    for i, size in enumerate((1, 3, 6, 6)):
        assert rows[i].unique().tolist() == [10 * i + k for k in range(size)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        own = ids[2 * rank : 2 * rank + 2]
        assert torch.equal(store.sample(own, 200, torch.Generator().manual_seed(0)), rows[own])


# ----------------------------------------------------------------------------------------------- what the learner knows

PROBE = {"env_id": "ExpertSign-v0", "horizon": 5, "expert": "scripted", "num_train_tasks": 4, "episodes_per_task": 10}
PROBE |= {"gradient_steps": 60, "hidden_size": 8, "learning_rate": 0.01, "total_timesteps": 1200, "eval_every": 100}
PROBE |= {"batch_size": 10, "num_test_tasks": 8}


def test_probe_is_learned(train):
    """Of 4 on average and 5 at most, from the reward alone; with the rewards of another task, its opposite."""
    folder, metrics = train(module, **PROBE)
    assert metrics["eval/return_after_10_episodes"] > 3 and abs(metrics["eval/return_after_0_episodes"]) < 1.5
    collect = module.collect

    def swapped(params, tasks, *args, **kwargs):
        """The advantages are those of the other task: ±1 alternate."""
        batch = collect(params, tasks, *args, **kwargs)
        return batch | {"advantages": batch["advantages"].roll(1, 0)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "collect", swapped)
        _, other = train(module, evaluate=folder)
    assert other["eval/return_after_10_episodes"] < metrics["eval/return_after_10_episodes"] - 2


@pytest.mark.parametrize("flags", [{"adapt": "none"}, {"adapt": "bias"}], ids=str)
def test_probe_without_and_with_little_adaptation(train, flags):
    """Behaviour cloning is blind. The parameters of the bias alone can tell the tasks apart."""
    _, metrics = train(module, **PROBE, **flags)
    after = metrics["eval/return_after_10_episodes"]
    if flags["adapt"] == "none":
        assert abs(after) < 1 and after == pytest.approx(metrics["eval/return_after_0_episodes"], abs=1e-6)
    else:
        assert after > 2


def test_probe_with_a_sac_expert(train):
    sac = {"expert": "sac", "expert_timesteps": 400, "expert_gradient_steps": 100, "expert_reward_scale": 20.0}
    sac |= {"expert_learning_rate": 0.01}
    _, metrics = train(module, **PROBE | {"total_timesteps": 1700} | sac)
    assert metrics["eval/return_after_10_episodes"] > 3

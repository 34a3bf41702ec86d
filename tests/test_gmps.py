"""gmps.py: its mathematics against closed forms, plain loops and finite differences, its experts and
bookkeeping.
"""

import copy
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from plain import (
    central_differences,
    double_precision,
    in_units,
    log_density,
    make_batch,
    of_task,
    unpack,
)
from torch.distributions import Normal
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

import gmps as module

CPU = torch.device("cpu")


class Sign(gym.Env):
    """A task is +1 or -1, a step's reward the task times the action. Episodes have 3 to 5 steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float64)
    expert = staticmethod(lambda obs, task: task)
    scale = 1.0

    def sample_tasks(self, n):
        return np.resize([1.0, -1.0], (n, 1))

    def set_task(self, task):
        self.task = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = self.np_random.integers(3, 6)
        self.steps = 0
        return np.ones(2), {}

    def step(self, action):
        self.steps += 1
        reward = float(self.scale * self.task * action[0])
        return np.ones(2), reward, self.steps == self.length, False, {}

    def expert_action(self, obs, task):
        assert obs.shape == (2,) and (obs == 1).all() and task.shape == (1,)  # never a padded row
        return self.expert(obs, task)


gym.register("ExpertSign-v0", Sign, max_episode_steps=5)


double = pytest.fixture(double_precision)


def make_problem(adapted=None, clip=0.0, n=3, e=3, t=4, moved=0.3):
    """A small policy, its meta-parameters moved away from those that collected a batch, and
    labelled states.
    """
    p = SimpleNamespace(n=n, clip=clip)
    p.args = module.Args(hidden_size=6, bias_size=3, init_std=0.8, importance_clip=clip or 1e9)
    p.policy = in_units(module.Policy(2, 2, p.args))
    theta, _ = p.policy.split()
    old = {name: (x + 0.3 * torch.randn_like(x)).detach() for name, x in theta.items()}
    p.theta = {name: x + moved * torch.randn_like(x) for name, x in old.items()}
    p.step_sizes = {name: 0.5 + 0.2 * torch.rand_like(x) for name, x in p.theta.items()}
    if adapted is not None:
        p.step_sizes = {name: p.step_sizes[name] for name in adapted}
    p.batch = make_batch(lambda i, obs: functional_call(p.policy, old, (obs,)), n, e, t)
    p.labels = torch.rand(n, 5, 2) * 2 - 1
    p.expert_obs = torch.randn(n, 5, 2)
    return p


def adapt(p, batch):
    """inner_step of one task from θ."""
    return module.inner_step(p.theta, batch, p.step_sizes, p.policy, p.args)


def imitation_loss(p, **changes):
    """That of gmps.py, with some parts of the problem replaced."""
    q = SimpleNamespace(**(vars(p) | changes))
    demonstrated = (q.expert_obs, q.labels)
    return module.imitation_loss(q.theta, q.step_sizes, q.batch, *demonstrated, q.policy, q.args)


def plain_log_density(policy, params, batch):
    return log_density(functional_call(policy, params, (batch["obs"],)), batch["actions"])


def plain_weights(p, theta, i, clip):
    """π / π_old of every step of task i, clipped."""
    logprobs = plain_log_density(p.policy, theta, of_task(p.batch, i))
    ratio = (logprobs - p.batch["logprobs"][i]).exp()
    return ratio.clamp(1 / clip, clip) if clip else ratio


def plain_adapt(p, theta, step_sizes, i, weights=None):
    """φ of task i, in a loop over its steps; weights: constants in the place of its own."""
    theta = {
        name: x if x.requires_grad else x.detach().requires_grad_() for name, x in theta.items()
    }
    if weights is None:
        weights = plain_weights(p, theta, i, p.clip).detach()
    logprobs = plain_log_density(p.policy, theta, of_task(p.batch, i))
    mask = p.batch["mask"][i]
    total = 0
    for j, k in np.ndindex(*mask.shape):
        if mask[j, k]:
            total = total - weights[j, k] * logprobs[j, k] * p.batch["advantages"][i, j, k]
    varied = [theta[name] for name in step_sizes]
    gradient = torch.autograd.grad(total / mask.sum(), varied, create_graph=True)
    pairs = zip(step_sizes.items(), gradient, strict=True)
    return theta | {name: theta[name] - alpha * g for (name, alpha), g in pairs}


def plain_loss(p, theta, step_sizes, weights):
    losses = []
    for i in range(p.n):
        phi = plain_adapt(p, theta, step_sizes, i, weights[i])
        mean = functional_call(p.policy, phi, (p.expert_obs[i],)).chunk(2, -1)[0]
        losses.append(sum((mean[b] - p.labels[i, b]).square().sum() for b in range(5)) / 10)
    return sum(losses) / p.n


def vectorised(p):
    """Meta-parameters as one vector, and how to make θ and α of such a vector."""
    like = p.theta | {f"lr.{name}": x for name, x in p.step_sizes.items()}

    def parts(vector):
        meta = unpack(vector, like)
        step_sizes = {name: meta[f"lr.{name}"] for name in p.step_sizes}
        return {name: meta[name] for name in p.theta}, step_sizes

    return parameters_to_vector(like.values()).detach(), parts


def flat(gradients, like):
    """As one vector, with zeros in place of gradients that there are not."""
    pairs = zip(gradients, like, strict=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for g, x in pairs])


# --------------------------------------------------------------------------------- the inner step


@pytest.mark.parametrize("adapt", ["all", "bias", "none"])
def test_meta_parameters(adapt):
    """θ are the weights; α, of the shapes of those that the inner step changes, begin at inner_lr."""
    args = module.Args(hidden_size=6, bias_size=3, adapt=adapt, inner_lr=0.7)
    policy = in_units(module.Policy(2, 1, args))
    theta, step_sizes = policy.split()
    weights = [f"net.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert [*theta] == ["bias", "log_std", *weights]
    assert [*step_sizes] == {"all": [*theta], "bias": ["bias"], "none": []}[adapt]
    assert all(torch.equal(x, torch.full_like(theta[name], 0.7)) for name, x in step_sizes.items())
    learned = {id(p) for p in policy.parameters()}
    assert learned == {id(p) for p in [*theta.values(), *step_sizes.values()]}


@pytest.mark.parametrize("adapted", [None, ["bias"]])
@pytest.mark.parametrize("clip", [0, 1.2])
def test_inner_step(double, clip, adapted):
    """φ of each task, against a loop over its valid steps; only the adapted parameters move."""
    p = make_problem(adapted, clip)
    largest = 0
    for i in range(p.n):
        phi = adapt(p, of_task(p.batch, i))
        expected = plain_adapt(p, p.theta, p.step_sizes, i)
        for name, x in phi.items():
            torch.testing.assert_close(x, expected[name].detach())
            assert torch.equal(x, p.theta[name]) == (name not in p.step_sizes)
        largest = max(largest, plain_weights(p, p.theta, i, 0)[p.batch["mask"][i] > 0].max())
    assert largest > 1.2  # some weight is clipped


def test_importance_weights(double):
    """1 for the policy that collected; for another one their mean is 1, and so a weighted mean is
    an expectation.
    """
    p = make_problem(moved=0)
    batch = of_task(p.batch, 0)
    assert (batch["logprobs"] - plain_log_density(p.policy, p.theta, batch)).abs().max() < 1e-12

    p = make_problem(n=1, e=20_000, t=1, moved=0.1)
    batch = of_task(p.batch, 0)
    ratio = (plain_log_density(p.policy, p.theta, batch) - batch["logprobs"]).exp()
    assert ratio.std() > 0.1 and (ratio.mean() - 1).abs() < 4 * ratio.std() / math.sqrt(20_000)
    # off-policy with weights, the step is the one on-policy; without them (clip 1) it is not
    dist_params = functional_call(p.policy, p.theta, (batch["obs"],)).detach()
    mean, log_std = dist_params.chunk(2, -1)
    actions = mean + log_std.exp() * torch.randn_like(mean)
    logprobs = module.distribution(dist_params).log_prob(actions)
    fresh = batch | {"actions": actions, "logprobs": logprobs}

    def step(batch, clip):
        batch = batch | {"advantages": batch["actions"].tanh().sum(-1) + 1}
        args = replace(p.args, importance_clip=clip)
        phi = module.inner_step(p.theta, batch, p.step_sizes, p.policy, args)
        return parameters_to_vector(phi.values())

    on_policy, off_policy, without = step(fresh, 1e9), step(batch, 1e9), step(batch, 1)
    assert (off_policy - on_policy).norm() < 0.3 * (without - on_policy).norm()


# ------------------------------------------------------------------------------ the meta-gradient


def meta_gradient(p, detach=False):
    """Of θ and α, and the loss; detach: with φ - θ as a constant."""
    meta = [x.requires_grad_() for x in (*p.theta.values(), *p.step_sizes.values())]
    if detach:
        means = []
        for i in range(p.n):
            phi = plain_adapt(p, p.theta, p.step_sizes, i)
            moves = {name: (x - p.theta[name]).detach() for name, x in phi.items()}
            phi = {name: x + moves[name] for name, x in p.theta.items()}
            means.append(functional_call(p.policy, phi, (p.expert_obs[i],))[..., :2])
        loss = (torch.stack(means) - p.labels).square().mean()
    else:
        loss = imitation_loss(p)
    return loss, flat(torch.autograd.grad(loss, meta, allow_unused=True), meta)


@pytest.mark.parametrize("adapted, clip", [(None, 0), (None, 1.3), (["bias"], 0)])
def test_meta_gradient(double, adapted, clip):
    """Against central differences, through the inner step, with its weights held constant; it is
    not the first-order one.
    """
    p = make_problem(adapted, clip)
    weights = [plain_weights(p, p.theta, i, clip).detach() for i in range(p.n)]
    at, parts = vectorised(p)

    def constant_weights(vector):
        theta, step_sizes = parts(vector)
        return plain_loss(p, theta, step_sizes, weights)

    some = torch.randn(20, len(at))
    loss, gradient = meta_gradient(p)
    assert loss.item() == pytest.approx(constant_weights(at).item(), rel=1e-12)
    expected = central_differences(constant_weights, at, directions=some)
    assert (some @ gradient - expected).norm() < 1e-7 * expected.norm()
    if adapted is None:
        _, first_order = meta_gradient(p, detach=True)
        assert (gradient - first_order).norm() > 0.1 * gradient.norm()

        # were the weights no constants, the gradient would be another
        def moving_weights(vector):
            theta, step_sizes = parts(vector)
            moving = [plain_weights(p, theta, i, clip) for i in range(p.n)]
            return plain_loss(p, theta, step_sizes, moving)

        other = central_differences(moving_weights, at, directions=some)
        assert (some @ gradient - other).norm() > 0.05 * (some @ gradient).norm()


def test_without_adaptation_it_is_behaviour_cloning(double):
    """Loss and gradient are those of one network on all tasks' data; the batch of episodes is
    without influence.
    """
    p = make_problem(adapted=[])
    loss, gradient = meta_gradient(p)
    means = functional_call(p.policy, p.theta, (p.expert_obs,))[..., :2]
    cloning = (means - p.labels).square().mean()
    theta = [*p.theta.values()]
    expected = flat(torch.autograd.grad(cloning, theta, allow_unused=True), theta)
    torch.testing.assert_close(loss, cloning)
    torch.testing.assert_close(gradient, expected)
    zero = make_problem()
    zero.step_sizes = {name: torch.zeros_like(x) for name, x in zero.step_sizes.items()}
    adapted = imitation_loss(zero)
    plain = imitation_loss(zero, step_sizes={})
    torch.testing.assert_close(adapted, plain, rtol=1e-12, atol=0)


def test_theta_itself_imitates_too(double):
    """With a weight of its own, the same labels in the same states."""
    p = make_problem()
    adapted = imitation_loss(p)
    unadapted = imitation_loss(p, step_sizes={})
    both = imitation_loss(p, args=replace(p.args, theta_weight=0.3))
    torch.testing.assert_close(both, adapted + 0.3 * unadapted)


def test_tasks_are_apart(double):
    """Another task's episodes and labels change nothing; swapped labels or episodes do. Chunks make
    no difference.
    """
    p = make_problem()
    whole = imitation_loss(p)
    losses = []
    for i in range(3):
        batch = {name: x[[i]] for name, x in p.batch.items()}
        expert = {"expert_obs": p.expert_obs[[i]], "labels": p.labels[[i]]}
        losses.append(imitation_loss(p, batch=batch, **expert))
    torch.testing.assert_close(whole, sum(losses) / 3)
    swapped = imitation_loss(p, labels=p.labels.roll(1, 0))
    other = imitation_loss(p, batch={name: x.roll(1, 0) for name, x in p.batch.items()})
    assert abs(swapped - whole) > 1e-3 and abs(other - whole) > 1e-6
    long = make_problem(e=3, t=1500)  # 4500 steps a task: one at a time
    assert module.tasks_at_once(long.batch["obs"]) == 1
    for i in range(3):
        phi = adapt(long, of_task(long.batch, i))
        mean = functional_call(long.policy, phi, (long.expert_obs[i],))[..., :2]
        long.labels[i] = mean.detach()
    assert imitation_loss(long) < 1e-20


def test_padding_is_without_influence(double):
    p = make_problem()
    before = imitation_loss(p)
    padded = p.batch["mask"] == 0
    assert padded.any()
    for name, value in {"obs": 1e3, "advantages": 1e3, "logprobs": -1e6}.items():
        p.batch[name][padded] = value
    torch.testing.assert_close(before, imitation_loss(p))


def test_a_step_is_one_of_adam_on_states_that_it_draws(double):
    """Of the tasks that it is given, in their order."""
    p = make_problem()
    twin, ids = copy.deepcopy(p.policy), torch.tensor([4, 0, 2])
    tasks = np.zeros((5, 2))
    data = module.Demonstrations(tasks, torch.zeros(5, 2), None, (2, 2), p.args)
    data.replay.add(torch.arange(5), torch.randn(5, 20, 4), torch.ones(5, 20))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(p.policy.parameters(), lr=0.01)
    given = (ids, p.batch, optimizer, data, p.policy, generator, p.args)
    loss = module.imitation_step(*given)

    drawn = data.sample(ids, p.args.batch_size, generator.manual_seed(0))
    theta, step_sizes = twin.split()
    expected = module.imitation_loss(theta, step_sizes, p.batch, *drawn, twin, p.args)
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    gradient = torch.autograd.grad(expected, [*twin.parameters()])
    for found, before, g in zip(p.policy.parameters(), twin.parameters(), gradient, strict=True):
        moved = before - 0.01 * g / (g.abs() + 1e-8)  # Adam's first step
        torch.testing.assert_close(found, moved)


# ------------------------------------------------------------------------------------ the experts


def sac_expert(tasks):
    torch.manual_seed(0)
    args = module.Args(hidden_size=8, horizon=10, expert_batch_size=6, tau=0.1)
    args = replace(args, expert_reward_scale=5, expert_gamma=0.9)
    return module.SacExpert(tasks, 2, 2, args), args


def test_a_gradient_step_of_the_expert_in_plain_terms(double):
    """Twin critics towards the soft target at temperature 1/5, of rewards in their unit, the actor
    against the new ones, then the targets.
    """
    tasks = torch.randn(3, 1)
    agent, args = sac_expert(tasks)
    twin, _ = sac_expert(tasks)
    agent.networks.reward_unit.fill_(4)
    transitions = [torch.randn(3, 20, size) for size in (2, 2, 1, 2, 1)]
    transitions[4] = (transitions[4] > 0).double()
    agent.replay.add(torch.arange(3), torch.cat(transitions, -1), torch.ones(3, 20))
    with torch.no_grad():
        targets = zip(agent.networks.targets.parameters(), twin.networks.targets.parameters(),
                      strict=True)  # fmt: skip
        for p, q in targets:
            q.copy_(p.add_(0.1 * torch.randn_like(p)))  # the targets are behind
    agent.step(tasks, torch.Generator().manual_seed(0), args)

    generator = torch.Generator().manual_seed(0)
    rows = agent.replay.sample(torch.arange(3), 6, generator)
    obs, actions, rewards, next_obs, terminated = rows.flatten(0, 1).split([2, 2, 1, 2, 1], -1)
    noise = torch.randn(2, 3, 6, 2, generator=generator)
    task = ((tasks - tasks.mean()) / tasks.std(correction=0)).repeat_interleave(6, 0)
    assert 0 < terminated.sum() < 18

    def act(obs, noise):
        mean, log_std = twin.networks.actor(torch.cat([obs, task], -1)).chunk(2, -1)
        raw = mean + log_std.exp() * noise.flatten(0, 1)
        density = Normal(mean, log_std.exp()).log_prob(raw)
        return raw.tanh(), (density - (1 - raw.tanh() ** 2).log()).sum(-1)

    def values(critics, obs, actions):
        x = torch.cat([obs, task, actions], -1)
        return critics(x.expand(2, *x.shape)).squeeze(-1)

    with torch.no_grad():
        next_actions, logprobs = act(next_obs, noise[0])
        value = values(twin.networks.targets, next_obs, next_actions).amin(0) - 0.2 * logprobs
        y = rewards[:, 0] / 4 + 0.9 * (1 - terminated[:, 0]) * value
    old = [p.detach().clone() for p in twin.networks.targets.parameters()]
    critics, actor = twin.networks.critics, twin.networks.actor
    q = values(critics, obs, actions)
    loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    descend(twin.optimizers["critics"], critics, loss)
    own_actions, logprobs = act(obs, noise[1])
    loss = (0.2 * logprobs - values(critics, obs, own_actions).amin(0)).mean()
    descend(twin.optimizers["actor"], actor, loss)

    for name, part in (("critics", critics), ("actor", actor)):
        found = getattr(agent.networks, name)
        for p, q in zip(found.parameters(), part.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    triples = zip(agent.networks.targets.parameters(), old, critics.parameters(), strict=True)
    for p, before, q in triples:
        torch.testing.assert_close(p, 0.9 * before + 0.1 * q)


def descend(optimizer, network, loss):
    """One step along the gradient in the network's parameters."""
    parameters = [*network.parameters()]
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = g
    optimizer.step()


def test_the_expert_sees_the_task():
    """Standardised; a column that is the same in all training tasks is left in its unit."""
    tasks = torch.tensor([[10.0, 5.0], [30.0, 5.0]])
    agent, _ = sac_expert(tasks)
    torch.testing.assert_close(agent.units(tasks), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    with torch.no_grad():
        for p in agent.networks.actor.parameters():
            p.normal_()
        mean = agent.mean_actions(torch.zeros(2, 2), tasks)
        noisy = agent.act(tasks, torch.zeros(2, 3, 2), torch.randn(2, 3, 2))
        still = agent.act(tasks, torch.zeros(2, 3, 2), torch.zeros(2, 3, 2))
    assert not torch.allclose(mean[0], mean[1])
    assert (noisy.abs() <= 1).all() and not torch.allclose(noisy[:, 0], mean)
    torch.testing.assert_close(still, mean[:, None].expand(2, 3, 2))


def test_the_units_of_observations(double):
    """The policy reads them less their mean and over their spread, within 10; a constant one keeps
    its unit.
    """
    policy = module.Policy(3, 2, module.Args(hidden_size=6, bias_size=3))
    obs = torch.randn(50, 3) * 5 + 2
    obs[:, 2] = 4
    plain = in_units(copy.deepcopy(policy))
    policy.units.measure(obs)
    scaled = (obs - obs.mean(0)) / torch.tensor([*obs[:, :2].std(0, correction=0), 1])
    torch.testing.assert_close(policy(obs), plain(scaled))
    far = torch.full((1, 3), 1e6)
    torch.testing.assert_close(policy(far), plain(torch.full((1, 3), 10.0)))


def demonstrations(env_id, n, expert_noise, horizon):
    """D_i of n tasks of a family with a scripted expert, empty; and the arguments."""
    args = module.Args(env_id=env_id, expert_noise=expert_noise, horizon=horizon)
    envs = module.make_envs(env_id)
    tasks = envs.sample_tasks(n, np.random.default_rng(0))
    sizes = (envs.single_observation_space.shape[0], envs.single_action_space.shape[0])
    told = torch.as_tensor(tasks).float()
    data = module.Demonstrations(tasks, told, module.scripted_expert(envs), sizes, args)
    return data, args


def wander(data, episodes, args):
    """Episodes of nothing but noise."""
    key = ("train", 0)
    return module.rollout(lambda _, obs, noise: noise, None, data.tasks, episodes, key, args)


@pytest.mark.parametrize("env_id", ["PointRobot-v0", "SparsePointRobot-v0", "Navigation2D-v0"])
def test_scripted_experts_of_points(env_id):
    """Straight to the goal; demonstrations have the noise, times its standard deviation."""
    data, args = demonstrations(env_id, 50, 0.0, 40)
    batch = module.rollout(data.noisy_act, data.tasks_on_device, data.tasks, 2, ("train", 1), args)
    steps = batch["mask"].sum(-1).long() - 1
    last = batch["obs"].gather(2, steps[..., None, None].expand(50, 2, 1, 2)).squeeze(2)
    assert (last - data.tasks_on_device[:, None]).abs().max() < 0.11
    obs, noise = torch.rand(50, 3, 2), torch.randn(50, 3, 2)
    data.noise = 0.2
    expected = 10 * (data.tasks_on_device[:, None] - obs) + 0.2 * noise
    torch.testing.assert_close(data.noisy_act(data.tasks_on_device, obs, noise), expected)


def test_a_users_expert_is_called_for_valid_states_only():
    data, args = demonstrations("ExpertSign-v0", 4, 0.3, 5)
    batch = wander(data, 1, args)
    assert 0 < batch["mask"].mean() < 1
    data.add(data.ids, batch)
    count = batch["mask"].sum((1, 2)).long()
    assert torch.equal(data.replay.count, count)
    rows = data.replay.rows[data.replay.filled()]
    torch.testing.assert_close(rows[:, :2], torch.ones(count.sum(), 2))
    torch.testing.assert_close(rows[:, 2:], data.tasks_on_device.repeat_interleave(count, 0))


@pytest.mark.parametrize(
    "env_id", ["user_tasks:Matrix-v0", "HalfCheetahDir-v0", "MultimodalNavigation2-v0"]
)
def test_families_without_an_expert(env_id):
    with pytest.raises(SystemExit, match=r"has no method expert_action\(obs, task\)"):
        module.scripted_expert(module.make_envs(env_id, 1))


@pytest.mark.parametrize("answer", [[1.0, 2.0], [np.nan], [], None])
def test_a_scripted_expert_with_a_fault(monkeypatch, answer):
    monkeypatch.setattr(Sign, "expert", staticmethod(lambda obs, task: np.array(answer)))
    act = module.scripted_expert(module.make_envs("ExpertSign-v0", 1))
    with pytest.raises(SystemExit, match="must return 1 finite numbers"):
        act(torch.ones(3, 2), torch.ones(3, 1))


def test_labels_are_clipped_and_of_each_tasks_own_expert():
    data, args = demonstrations("SparsePointRobot-v0", 3, 0.3, 20)
    batch = wander(data, 2, args)
    data.add(data.ids, batch)
    rows = data.replay.rows[data.replay.filled()].view(3, 2, 20, 4)
    labels = (10 * (data.tasks_on_device[:, None, None] - batch["obs"])).clamp(-1, 1)
    torch.testing.assert_close(rows, torch.cat([batch["obs"], labels], -1))
    assert (labels.abs() == 1).any() and (labels.abs() < 1).any()
    obs, drawn = data.sample(torch.tensor([2, 0]), 30, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        drawn, (10 * (data.tasks_on_device[[2, 0]][:, None] - obs)).clamp(-1, 1)
    )


# ----------------------------------------------------------------------- demonstrations in a file


ARRAYS = ("observations", "actions", "tasks")  # of two columns each


def demos_file(path, **changes):
    rng = np.random.default_rng(0)
    index = np.array([2, 0, 1, 3, 0, 0, 1])
    arrays = {"observations": rng.normal(size=(7, 2)), "actions": rng.uniform(-1, 1, (7, 2))}
    arrays |= {"task_index": index, "tasks": rng.uniform(-1, 1, (4, 2)), **changes}
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return arrays


def test_demonstrations_from_a_file(train, tmp_path):
    """Rows go to their tasks, whose number and values are those of the file; a resumed run does
    without the file.
    """
    arrays = demos_file(tmp_path / "demos.npz")
    args = module.Args(demos=str(tmp_path / "demos.npz"), num_train_tasks=4)
    tasks, rows, mask = module.load_demos(2, 2, (2,), args)
    assert mask.sum(1).tolist() == [3, 2, 1, 1] and np.array_equal(tasks, arrays["tasks"])
    for i in range(4):
        mine = arrays["task_index"] == i
        expected = np.hstack([arrays["observations"][mine], arrays["actions"][mine]])
        np.testing.assert_array_equal(rows[i][mask[i]], expected)
    flags = {"expert": "demos", "demos": "demos.npz", "dataset_size": 3, "total_timesteps": 160}
    folder, metrics = train(module, **flags)
    state = load(folder)
    # of 80 each: nobody to ask, so no DAgger
    assert state["global_step"] == 160 and state["iteration"] == 2
    assert state["own"]["data"]["count"].tolist() == [3, 2, 1, 1]
    np.testing.assert_array_equal(state["own"]["data"]["rows"], rows[mask].astype(np.float32))
    assert "sac" not in state and "sac" not in state["own"]
    np.testing.assert_array_equal(state["tasks"], arrays["tasks"])
    units = np.stack([state["policy"]["units.mean"], state["policy"]["units.std"]])
    obs = arrays["observations"]
    np.testing.assert_allclose(units, [obs.mean(0), obs.std(0)], rtol=1e-5)
    assert "charts/episodic_return" not in metrics and "charts/pre_adaptation_return" in metrics
    (tmp_path / "demos.npz").unlink()
    train(module, resume=folder, total_timesteps=161)
    assert load(folder)["global_step"] == 240


NONE = {"task_index": np.zeros(0)}  # no steps
BAD_ARRAYS = [
    ({"actions": None}, "no .npz file with the arrays observations, actions, task_index, tasks"),
    (
        {"observations": np.zeros((7, 3))},
        "observations is float64 (7, 3), not numbers of shape (7, 2)",
    ),
    ({"actions": np.zeros((7, 1))}, "actions is"),
    ({"actions": np.zeros((6, 2))}, "actions is"),
    ({"actions": np.full((7, 2), 1.1)}, "actions reach 1.1"),
    ({"actions": np.full((7, 2), -1.1)}, "actions reach 1.1"),
    (
        {"observations": np.array([[0, 0]] * 6 + [[0, np.nan]])},
        "observations is not finite in row 6",
    ),
    ({"actions": np.full((7, 2), np.inf)}, "actions is not finite in row 0"),
    ({"observations": np.array([["a", "b"]] * 7)}, "observations is <U1"),
    ({"task_index": np.zeros((7, 1), int)}, "task_index is"),
    ({"task_index": np.array([0, 1, 2, 4, 0, 0, 0])}, "task_index must name"),
    ({"task_index": np.array([0, 1, 2, 2, 0, 0, 0])}, "task_index must name"),
    ({"task_index": np.array([0, 1, 2, 3, -1, 0, 0])}, "task_index must name"),
    ({"task_index": np.array([0, 1, 2, 3, 0.5, 0, 0])}, "task_index must name"),
    ({"tasks": np.zeros((4, 3))}, "tasks is"),
    (
        {"tasks": np.zeros((3, 2)), "task_index": np.arange(7) % 3},
        "--num-train-tasks 4: demos.npz has demonstrations of 3 tasks",
    ),
    ({name: np.zeros((0, 2)) for name in ("observations", "actions")} | NONE, "must name"),
    ({"observations": np.zeros(()), "tasks": np.zeros(())}, "is float64 ()"),
    (
        {name: np.zeros((0, 2)) for name in ARRAYS} | NONE,
        "--num-train-tasks 4: demos.npz has demonstrations of 0 tasks",
    ),
]


def assert_one_line(end, part):
    message = str(end.value.code)
    assert message.startswith("error: ") and part in message and "\n" not in message


@pytest.mark.parametrize("changes, part", BAD_ARRAYS)
def test_faults_of_a_file(train, tmp_path, changes, part):
    demos_file(tmp_path / "demos.npz", **changes)
    with pytest.raises(SystemExit) as end:
        train(module, expert="demos", demos="demos.npz")
    assert_one_line(end, part)
    assert not (tmp_path / "runs").exists()


def test_a_file_of_more_states_than_are_kept(train, tmp_path):
    demos_file(tmp_path / "demos.npz")
    with pytest.raises(SystemExit) as end:
        train(module, expert="demos", demos="demos.npz", dataset_size=2)
    assert_one_line(end, "--dataset-size 2: demos.npz has a task of 3 states")
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


UNEVEN = {"env_id": "user_tasks:Uneven-v0"}
BAD_FLAGS = [
    ({"num_train_tasks": 3}, "--num-train-tasks 3: less than --meta-batch-size 4"),
    ({"num_train_tasks": 0}, "--num-train-tasks 0"),
    ({"env_id": "user_tasks:Discrete-v0"}, "Discrete actions"),
    ({"importance_clip": 0.5}, "--importance-clip 0.5: must be"),
    ({"expert": "demos"}, "--expert demos and --demos FILE go together"),
    ({"demos": "demos.npz"}, "--expert demos and --demos FILE go together"),
    ({"env_id": "HalfCheetahDir-v0", "expert": "scripted"}, "has no method expert_action"),
    ({"dataset_size": 19}, "--dataset-size 19: less than the 20 states"),
    ({"total_timesteps": 239}, "can use them up, give 240 or more"),
    ({"total_timesteps": 239} | UNEVEN, "can use them up, give 240 or more"),
]


@pytest.mark.parametrize("flags, part", BAD_FLAGS)
def test_bad_input(train, tmp_path, flags, part):
    with pytest.raises(SystemExit) as end:
        train(module, **flags)
    assert_one_line(end, part)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share, kept", [(0.6, 3), (0, 1), (1, 5)])
def test_a_round_ends_with_the_mean_of_its_last_steps(train, monkeypatch, share, kept):
    visited = []
    step = module.imitation_step

    def spy(ids, batch, optimizer, data, policy, *more):
        result = step(ids, batch, optimizer, data, policy, *more)
        visited.append(copy.deepcopy(dict(policy.named_parameters())))
        return result

    monkeypatch.setattr(module, "imitation_step", spy)
    folder, _ = train(module, total_timesteps=240, gradient_steps=5, averaged_share=share)
    assert len(visited) == 5
    saved = load(folder)["policy"]
    for name, last in visited[-1].items():
        mean = sum(parameters[name] for parameters in visited[-kept:]) / kept
        torch.testing.assert_close(saved[name], mean.detach())
        assert kept > 1 or torch.equal(saved[name], last)
    assert (kept == 1) == all(torch.equal(saved[name], last) for name, last in visited[-1].items())


def test_the_importance_weight_of_a_round(train, monkeypatch):
    """The largest of each task's at the end of the round, before clipping; their mean."""
    collect, log = module.collect, module.Run.log
    batches, logged = {}, []

    def recorded(params, tasks, key, *rest, **more):
        batches[key[0], key[-1]] = collect(params, tasks, key, *rest, **more)
        return batches[key[0], key[-1]]

    monkeypatch.setattr(module, "collect", recorded)
    monkeypatch.setattr(module.Run, "log", lambda *given: [logged.append(given[1]), log(*given)])
    flags = {"expert": "scripted", "total_timesteps": 81, "learning_rate": 0.1}
    folder, _ = train(module, **flags)  # one round
    saved = load(folder)
    policy = module.Policy(2, 2, module.Args(**saved["args"]))
    policy.load_state_dict(saved["policy"])
    batch = batches["train", 2]
    theta, _ = policy.split()
    logprobs = plain_log_density(policy, theta, batch)
    ratio = (logprobs - batch["logprobs"]).exp() * batch["mask"]
    weight = ratio.flatten(1).amax(1).mean().item()
    assert weight > 0 and logged[-1]["losses/importance_weight"] == pytest.approx(weight)


def test_no_steps_are_left_for_a_round(train):
    """Which shows when the expert has played: its episodes may be shorter than the time limit."""
    with pytest.raises(SystemExit) as end:
        train(module, expert="scripted", total_timesteps=80)
    assert_one_line(end, "--total-timesteps 80: the expert has used up 80, give more")
    train(module, expert="scripted", total_timesteps=81)


# ---------------------------------------------------------------------------- rounds and counters


def test_steps_and_data_of_a_run(train, monkeypatch):
    """Every step is counted once, those of meta-tests never; D_i grows by DAgger's states, those of
    φ_i, labelled.
    """
    collected = []
    collect = module.collect

    def recorded(params, tasks, key, policy, args, **options):
        batch = collect(params, tasks, key, policy, args, **options)
        collected.append((params, tasks, batch))
        return batch

    monkeypatch.setattr(module, "collect", recorded)
    flags = {"expert": "scripted", "num_train_tasks": 6, "meta_batch_size": 3}
    folder, metrics = train(module, **flags, total_timesteps=400, eval_every=100)
    state = load(folder)
    data = state["own"]["data"]
    # demonstrations 6 x 2 x 10; three rounds of 3 x 2 x 10 and as many for DAgger
    assert state["global_step"] == 120 + 3 * 120 and state["iteration"] == 4
    assert data["count"].sum() == 120 + 3 * 60
    # two neighbouring tasks in turn
    assert data["count"].view(3, 2).sort().values.tolist() == 3 * [[20 + 20, 20 + 40]]
    for i, (round_, dagger) in enumerate(zip(collected[:6:2], collected[1:6:2], strict=True)):
        theta, tasks, before = round_
        phi, same, visited = dagger
        run = SimpleNamespace(iteration=2 + i, rank=0)
        picked = module.pick_tasks(3, 6, run, module.Args(**state["args"]))
        assert np.array_equal(tasks, same) and np.array_equal(tasks, state["tasks"].numpy()[picked])
        assert not torch.equal(before["obs"], visited["obs"])
        assert all((p == p[:1]).all() for p in theta.values())
        assert all((p != theta[name]).any() for name, p in phi.items())
    rows = data["rows"].split(data["count"].tolist())
    known = state["tasks"].float()
    for i in range(6):
        obs, label = rows[i].split(2, -1)
        torch.testing.assert_close(label, (10 * (known[i] - obs)).clamp(-1, 1))
    for j, i in enumerate(picked):  # of the last round
        torch.testing.assert_close(rows[i][-20:, :2], visited["obs"][j].flatten(0, 1))
    expected = visited["rewards"].sum(-1).mean().item()
    assert metrics["charts/episodic_return"] == pytest.approx(expected)
    assert metrics["charts/episodic_length"] == 10


def test_the_steps_of_the_sac_expert(train):
    """Four tasks x 2 episodes x 10 steps an iteration until the budget is used, then the
    demonstrations, then rounds. All labels are those of the expert that this leads to.
    """
    step_sizes = {"learning_rate": 0.02, "learning_rate_decay": 0.5, "expert_learning_rate": 0.003}
    flags = {"expert_timesteps": 200, "total_timesteps": 1000, "eval_every": 100}
    folder, _ = train(module, **flags, **step_sizes)
    state = load(folder)
    assert state["own"]["sac"]["count"].tolist() == [0] * 4  # no longer needed, nor saved
    assert len(state["own"]["sac"]["rows"]) == 0
    # 3 x 80 is the first multiple beyond 200
    assert state["iteration"] == 3 + 5 and state["global_step"] == 3 * 80 + 80 + 5 * 160
    assert state["own"]["data"]["count"].tolist() == [20 + 5 * 20] * 4
    optimizers = [state["optimizer"], *state["sac"]["optimizers"].values()]
    rates = [optimizer["param_groups"][0]["lr"] for optimizer in optimizers]
    assert rates == pytest.approx([0.02 / 2**5, 0.003, 0.003])
    assert [optimizer["state"][0]["step"] for optimizer in optimizers] == [5 * 2] + 2 * [3 * 2]
    tasks = state["tasks"].float()
    agent = module.SacExpert(tasks, 2, 2, module.Args(**state["args"]), state["sac"])
    obs, labels = state["own"]["data"]["rows"].split(2, -1)
    with torch.no_grad():
        expected = agent.mean_actions(obs, tasks.repeat_interleave(20 + 5 * 20, 0))
    torch.testing.assert_close(labels, expected)


@pytest.fixture
def stopped(train, monkeypatch):
    """stopped(step, **flags): the folder of a run that a signal has stopped at that step."""

    def run(step, **flags):
        log = module.Run.log

        def log_and_interrupt(run, metrics):
            log(run, metrics)
            if run.global_step >= step:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(module.Run, "log", log_and_interrupt)
            folder, _ = train(module, **flags)
        assert load(folder)["global_step"] == step
        return folder

    return run


def test_a_run_stopped_while_its_expert_learns_goes_on(train, stopped):
    """As the uninterrupted one does: the expert, its replay and its optimizers are saved."""
    flags = {"expert_timesteps": 400, "total_timesteps": 800}
    whole, _ = train(module, **flags)
    part = stopped(160, **flags)
    assert load(part)["own"]["sac"]["count"].tolist() == [40] * 4
    with pytest.raises(SystemExit) as end:  # it could end without a policy
        train(module, resume=part, total_timesteps=400)
    assert_one_line(end, "can use them up, give 560 or more")
    train(module, resume=part)
    expected, state = load(whole), load(part)
    assert state["global_step"] == expected["global_step"]
    assert all(torch.equal(x, expected["policy"][key]) for key, x in state["policy"].items())
    networks = expected["sac"]["networks"]
    assert all(torch.equal(x, networks[key]) for key, x in state["sac"]["networks"].items())


def test_a_diverging_expert_is_named_and_spares_the_checkpoint(train, monkeypatch):
    """The last one that was good is kept, and no environment is blamed for the actions of a network
    that is not.
    """
    learn = module.SacExpert.learn
    calls = []

    def diverge(agent, *args):
        calls.append(args)
        for optimizer in agent.optimizers.values():
            optimizer.param_groups[0]["lr"] *= 1e30 if len(calls) == 2 else 1
        return learn(agent, *args)

    monkeypatch.setattr(module.SacExpert, "learn", diverge)
    flags = {"expert_timesteps": 240, "checkpoint_every": 1, "total_timesteps": 800}
    line = r"^error: the expert's loss is not finite: try a smaller --expert-l"
    with pytest.raises(SystemExit, match=line):
        train(module, exp_name="sac", **flags)
    (path,) = Path("runs").glob("*__sac__*")
    state = load(path)
    assert state["iteration"] == 1
    assert all(x.isfinite().all() for x in state["sac"]["networks"].values())


def test_a_diverging_imitation_is_named_and_spares_the_checkpoint(train):
    line = r"^error: the imitation loss is not finite: try a smaller --inner-lr or"
    flags = {"learning_rate": 1e30, "gradient_steps": 10, "checkpoint_every": 1}
    with pytest.raises(SystemExit, match=line):
        train(module, exp_name="imitation", **flags)
    (path,) = Path("runs").glob("*__imitation__*")
    state = load(path)
    assert state["iteration"] == 1 and all(x.isfinite().all() for x in state["policy"].values())


def test_an_experts_reward_that_becomes_too_large_is_named(train, monkeypatch):
    """Its square is infinite in single precision, in the unit of the first iteration."""
    learn = module.SacExpert.learn

    def learn_and_grow(*args):
        Sign.scale = 1e25
        return learn(*args)

    monkeypatch.setattr(Sign, "scale", 1.0)
    monkeypatch.setattr(module.SacExpert, "learn", learn_and_grow)
    line = r"^error: the expert's loss is not finite: .* or reward$"
    with pytest.raises(SystemExit, match=line):
        train(module, env_id="ExpertSign-v0", expert_timesteps=160, total_timesteps=400)


class Paid(module.PointEnvs):
    """PointRobot-v0, its rewards in another unit."""

    def __init__(self, pay, num_envs):
        self.pay = pay
        super().__init__("PointRobot-v0", num_envs)

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, self.pay * rewards, *rest


@pytest.mark.parametrize("pay", [1e4, 1e-4])
def test_learning_does_not_depend_on_the_unit_of_rewards(train, double, pay):
    """Rewards times a constant: the same expert, and so the same policy but for the 1e-8 beside the
    standard deviation of advantages.
    """
    runs = []
    for unit in (1, pay):
        env_id = f"PaidExpert_{unit:g}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, vector_entry_point=Paid, kwargs={"pay": unit})
        flags = {"expert_timesteps": 240, "expert_gradient_steps": 20, "gradient_steps": 20}
        folder, metrics = train(module, env_id=env_id, total_timesteps=800, **flags)
        state = load(folder)
        networks = state["sac"]["networks"]
        networks["reward_unit"] /= unit
        score = metrics["eval/return_after_2_episodes"] / unit
        runs.append((networks, state["policy"], score))
    assert runs[0][0]["reward_unit"] != 1
    torch.testing.assert_close(runs[1][0], runs[0][0], atol=0, rtol=1e-6)
    torch.testing.assert_close(runs[1][1:], runs[0][1:], atol=1e-3, rtol=1e-3)


def rounds(num_rounds, n, num_tasks, first=1, rank=0, **flags):
    """The tasks of each round, (num_rounds, n)."""
    args = module.Args(**flags)
    runs = [SimpleNamespace(iteration=first + i, rank=rank) for i in range(num_rounds)]
    return np.stack([module.pick_tasks(n, num_tasks, run, args) for run in runs])


@pytest.mark.parametrize("env_id", ["MultimodalNavigation2-v0", "HalfCheetahDir-v0"])
def test_a_round_holds_both_modes_of_a_family_that_deals_them_in_turn(env_id):
    """Otherwise rounds would alternate between the modes, and each would undo the other's."""
    tasks = module.make_envs(env_id).sample_tasks(20, np.random.default_rng([0, 0]))
    for picked in rounds(6, 10, 20):
        assert len(np.unique(tasks[picked][:, -1])) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_tasks_come_up_equally_often_and_meet_different_ones(rank):
    """Each of twelve comes up once in four rounds of three, and rounds differ from those of the pass
    before. A rank's draws are its own.
    """
    picked = rounds(12, 3, 12, first=4, rank=rank)
    assert all(len(np.unique(one)) == 12 for one in picked.reshape(3, 4 * 3))
    assert len(np.unique(np.sort(picked, axis=1), axis=0)) > 4
    assert not np.array_equal(picked, rounds(12, 3, 12, first=4, rank=1 - rank))
    assert not np.array_equal(picked, rounds(12, 3, 12, first=4, rank=rank, seed=2))


def test_what_trains_is_the_dense_reward_of_the_expert_and_train_reward_of_the_rest(train, stopped):
    """Dense rewards are below 0, sparse ones are not."""
    flags = {"env_id": "SparsePointRobot-v0", "train_reward": "sparse", "test_reward": "dense"}
    folder = stopped(80, expert_timesteps=160, total_timesteps=400, **flags)
    state = load(folder)
    assert (state["own"]["sac"]["rows"][:, 4] < 0).all()  # obs, actions, reward, ...
    _, metrics = train(module, resume=folder)
    for when in ("pre_adaptation", "episodic"):
        assert metrics[f"charts/{when}_return"] >= 0
    assert metrics["eval/return_after_0_episodes"] < 0

    args = module.Args(**state["args"])
    policy = in_units(module.Policy(2, 2, args))
    theta, _ = policy.split()
    params = {name: p.detach().expand(3, *p.shape) for name, p in theta.items()}
    tasks = state["tasks"].numpy()[:3]
    for test in (False, True):
        batch = module.collect(params, tasks, ("train", 2), policy, args, test=test)
        name = "dense_rewards" if test else "sparse_rewards"
        assert torch.equal(batch["rewards"], batch[name])
        expected = module.standardised_advantages(batch | {"rewards": batch[name]}, args)
        assert torch.equal(batch["advantages"], expected)


def test_draws_are_of_each_tasks_own_rows():
    """All of them, and no others."""
    store = module.Replay(4, 10, 1, CPU, "--dataset-size")
    ids = torch.arange(4)
    mask = torch.arange(6).expand(4, 6) < torch.tensor([[1], [3], [6], [6]])
    rows = 10 * ids[:, None] + torch.arange(6)
    store.add(ids, rows.unsqueeze(-1).float(), mask.float())
    drawn = store.sample(ids, 200, torch.Generator().manual_seed(0))
    for i, size in enumerate((1, 3, 6, 6)):
        assert drawn[i].unique().tolist() == [10 * i + k for k in range(size)]


def test_more_at_once_than_there_is_room_for():
    """More than the time limit made expect: a line, as rows would be written over each other."""
    store = module.Replay(2, 10, 1, CPU, "--dataset-size")
    with pytest.raises(SystemExit, match=r"^error: --dataset-size 10: less than the 11 steps of a"):
        store.add(torch.arange(2), torch.zeros(2, 11, 1), torch.ones(2, 11))


def test_a_rank_has_the_demonstrations_of_its_own_tasks(monkeypatch):
    """From the expert or from a file; its SAC expert knows the units of all tasks."""
    tasks = np.arange(12.0).reshape(6, 2)
    rows = np.arange(6.0)[:, None, None] + np.zeros((6, 3, 4))
    mask = np.arange(3) < np.array([1, 2, 3, 1, 2, 3])[:, None]
    args = module.Args(env_id="SparsePointRobot-v0", horizon=5, num_train_tasks=6)
    envs = module.make_envs(args.env_id)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        sac, data = module.make_expert(envs, tasks, args)
        own = slice(3 * rank, 3 * rank + 3)
        assert np.array_equal(data.tasks, tasks[own]) and len(sac.replay.count) == 3
        assert torch.equal(data.tasks_on_device, torch.as_tensor(tasks[own]).float())
        torch.testing.assert_close(sac.mean, torch.as_tensor(tasks.mean(0)).float())
        data.fill(rows, mask)
        assert data.replay.count.tolist() == [1, 2, 3]
        np.testing.assert_array_equal(data.states()[:, 0], rows[own][mask[own]][:, 0])


# ------------------------------------------------------------------------- what the learner knows

PROBE = {
    "env_id": "ExpertSign-v0",
    "horizon": 5,
    "expert": "scripted",
    "num_train_tasks": 4,
    "episodes_per_task": 10,
    "gradient_steps": 60,
    "hidden_size": 8,
    "learning_rate": 0.01,
    "total_timesteps": 1200,
    "eval_every": 100,
    "batch_size": 10,
    "num_test_tasks": 8,
}


def test_probe_is_learned(train):
    """Of 4 on average and 5 at most, from the reward alone; with the rewards of another task, its
    opposite.
    """
    folder, metrics = train(module, **PROBE)
    learned = metrics["eval/return_after_10_episodes"]
    assert learned > 3 and abs(metrics["eval/return_after_0_episodes"]) < 1.5
    collect = module.collect

    def swapped(params, tasks, *args, **kwargs):
        """The advantages are those of the other task: ±1 alternate."""
        batch = collect(params, tasks, *args, **kwargs)
        return batch | {"advantages": batch["advantages"].roll(1, 0)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "collect", swapped)
        _, other = train(module, evaluate=folder)
    assert other["eval/return_after_10_episodes"] < learned - 2


@pytest.mark.parametrize("adapted", ["none", "bias"])
def test_probe_without_and_with_little_adaptation(train, adapted):
    """Behaviour cloning is blind. The parameters of the bias alone can tell the tasks apart."""
    _, metrics = train(module, **PROBE, adapt=adapted)
    after = metrics["eval/return_after_10_episodes"]
    if adapted == "none":
        assert abs(after) < 1
        assert after == pytest.approx(metrics["eval/return_after_0_episodes"], abs=1e-6)
    else:
        assert after > 2


def test_probe_with_a_sac_expert(train):
    sac = {"expert": "sac", "expert_timesteps": 400, "expert_gradient_steps": 100}
    sac |= {"expert_reward_scale": 20.0, "expert_learning_rate": 0.01, "total_timesteps": 1700}
    _, metrics = train(module, **PROBE | sac)
    assert metrics["eval/return_after_10_episodes"] > 3

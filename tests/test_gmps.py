"""gmps.py: its mathematics against closed forms, plain loops and finite differences, its experts and bookkeeping."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

import gmps as module

CPU = torch.device("cpu")


class Sign(gym.Env):
    """A task is +1 or -1, a step's reward the task times the action. Episodes have three to five steps."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,), np.float64), gym.spaces.Box(-1, 1, (1,), np.float64)
    expert = staticmethod(lambda obs, task: task)

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
        return np.ones(2), float(self.task * action[0]), self.steps == self.length, False, {}

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
    policy = module.Policy(2, 2, 4, 3, 0.8)
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
        phi, weight = module.adapt(p.theta, p.lr, of_task(p.batch, i), **p.settings)
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
    _, weight = module.adapt(p.theta, p.lr, of_task(p.batch, 0), **p.settings)
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
        parameters_to_vector(module.adapt(p.theta, p.lr, data, p.policy, clip)[0].values())
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
        phi, _ = module.adapt(long.theta, long.lr, of_task(long.batch, i), **long.settings)
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

"""pearl.py: its mathematics against closed forms and loops, its bookkeeping, and what reaches whom."""

import ast
import copy
import inspect
import math
import multiprocessing
import os
import re
import shlex
import socket
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load, skip_beside_a_gpu
from plain import double_precision
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torch.nn.functional import softplus

import pearl as module

CPU = torch.device("cpu")
N, B, C, Z = 4, 8, 6, 5
TASK_SEED = 5


def settings(**changes):
    """Args as main has them: nothing is unset."""
    sizes = {"meta_batch_size": N, "batch_size": B, "latent_size": Z, "num_train_tasks": 5}
    sizes |= {"hidden_size": 16, "encoder_size": 16, "context_segment": 1, "context_size": 8}
    rest = {"gamma": 0.9, "reward_scale": 5.0, "temperature": 1.0, "kl_weight": 0.1}
    rest |= {"regularization": 1e-3, "env_id": "PointRobot-v0", "horizon": 20, "eval_episodes": 1}
    rest |= {"learning_rate": 3e-4, "replay_size": 4000}
    return module.with_defaults(module.Args(**(sizes | rest | changes)))


def make_agent(obs_size=2, action_size=2, **changes):
    """An agent with a reward scale of 5 and contexts of raw rewards."""
    agent = module.Agent(obs_size, action_size, settings(**changes))
    agent.units.fill_(1)
    return agent


@pytest.fixture
def agent():
    torch.manual_seed(0)
    return make_agent()


@pytest.fixture
def lively():
    """An agent whose belief depends much on the context, and whose actions on z."""
    torch.manual_seed(0)
    agent = make_agent()
    with torch.no_grad():
        for p in [*agent.encoder.parameters(), *agent.sac.actor.parameters()]:
            p.normal_(0, 0.7)
    return agent


@pytest.fixture
def train(train):
    """That of conftest; a longer run would have other step sizes from the start."""

    def run(script, **flags):
        if not {"resume", "evaluate"} & flags.keys():
            flags.setdefault("anneal", False)
        return train(script, **flags)

    return run


def sample_tasks(n, env_id="PointRobot-v0", seed=TASK_SEED):
    return module.make_envs(env_id).sample_tasks(n, np.random.default_rng(seed))


def optimizers(agent, lr=3e-4):
    read_z = [*agent.sac.critics.parameters(), *agent.encoder.parameters()]
    adam = partial(torch.optim.Adam, lr=lr)
    return {"critics": adam(read_z), "actor": adam(agent.sac.actor.parameters())}


def draws(agent, seed=1, n=N):
    """What draw_batch returns, made up; transitions by name."""
    torch.manual_seed(seed)
    batch = {name: torch.randn(n, B, size) for name, size in agent.columns.items()}
    batch["terminated"] = (batch["terminated"] > 1).float()
    mask = (torch.arange(C) < torch.arange(n).unsqueeze(1) + 2).float()
    noise = [torch.randn(n, Z), torch.randn(n, B, 2), torch.randn(n, B, 2)]
    return batch, torch.randn(n, C, sum(agent.columns.values())), mask, noise


def step(agent, optimizers, drawn, args):
    """gradient_step on these draws."""
    batch, *rest = drawn
    rows = torch.cat([*batch.values()], -1)
    given = SimpleNamespace(draw_batch=lambda generator, args: (rows, *rest))
    return module.gradient_step(agent, optimizers, given, None, args)


def in_double(batch, context, mask, noise):
    batch = {name: x.double() for name, x in batch.items()}
    return batch, context.double(), mask.double(), [x.double() for x in noise]


# -------------------------------------------------------------------------------------- the belief


def test_the_belief_is_a_product_of_gaussians():
    torch.manual_seed(0)
    factors = torch.randn(N, C, 2 * Z).double()
    mask = (torch.rand(N, C) < 0.7).double()
    mask[1], mask[2] = 0, 1
    means, variances = module.belief(factors, mask)
    for i in range(N):
        x = torch.linspace(-8, 8, 4001).double()
        for d in range(Z):
            each = Normal(factors[i, :, d, None], softplus(factors[i, :, Z + d, None]).sqrt())
            log_product = (mask[i, :, None] * each.log_prob(x)).sum(0)
            density = torch.softmax(log_product, 0)
            if mask[i].any():
                mean = (density * x).sum()
                variance = (density * (x - mean) ** 2).sum()
                torch.testing.assert_close(means[i, d], mean, atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(variances[i, d], variance, atol=1e-6, rtol=1e-5)
    assert (means[1] == 0).all() and (variances[1] == 1).all()  # nothing seen: the prior
    order = torch.randperm(C)
    again = module.belief(factors[:, order], mask[:, order])
    for a, b in zip(again, (means, variances), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [1, 7, 100])
def test_equal_factors_narrow_the_belief(n):
    factor = torch.randn(1, 1, 2 * Z)
    mean, variance = module.belief(factor.expand(1, n, -1), torch.ones(1, n))
    torch.testing.assert_close(mean, factor[:, 0, :Z])
    # softplus gives a variance, not its root
    torch.testing.assert_close(variance, softplus(factor[:, 0, Z:]) / n)
    mean, variance = module.belief(torch.full((1, n, 2 * Z), -100.0), torch.ones(1, n))
    torch.testing.assert_close(variance, torch.full((1, Z), 1e-7 / n))  # the floor


@pytest.mark.parametrize(
    "n, variance, kl", [(1, 0.693, 0.030), (64, 0.01083, 1.768), (1024, 0.00068, 3.149)]
)
def test_the_first_belief(agent, n, variance, kl):
    """Of an untrained encoder, against the values of the authors' initialisation."""
    with torch.no_grad():
        mean, var = agent.infer(torch.randn(N, n, 9), torch.ones(N, n))
    assert var.mean().item() == pytest.approx(variance, rel=0.05)
    assert (module.kl_to_prior(mean, var).mean() / Z).item() == pytest.approx(kl, rel=0.05)


def test_kl_to_the_prior():
    torch.manual_seed(0)
    mean, variance = torch.randn(N, Z), torch.rand(N, Z) + 0.1
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(module.kl_to_prior(mean, variance), expected)


def test_the_weight_of_the_kl(agent):
    """kl_weight times the sum over the tasks: twice the tasks, twice the gradient."""
    agent = agent.double()

    def gradient(times, kl_weight):
        """In the encoder, of a step on a batch that has every task so many times."""
        batch, context, mask, noise = in_double(*draws(agent))
        batch = {name: x.repeat(times, 1, 1) for name, x in batch.items()}
        noise = [x.repeat(times, *[1] * (x.ndim - 1)) for x in noise]
        context, mask = context.repeat(times, 1, 1), mask.repeat(times, 1)
        twin = copy.deepcopy(agent)
        args = settings(meta_batch_size=times * N, kl_weight=kl_weight)
        step(twin, optimizers(twin), (batch, context, mask, noise), args)
        return [p.grad for p in twin.encoder.parameters()]

    _, context, mask, _ = in_double(*draws(agent))
    mean, variance = agent.infer(context, mask)
    kl = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum()
    expected = torch.autograd.grad(0.1 * kl, agent.encoder.parameters())
    for times in (1, 2):
        found = zip(gradient(times, 0.1), gradient(times, 0.0), strict=True)
        for (with_kl, without), g in zip(found, expected, strict=True):
            torch.testing.assert_close(with_kl - without, times * g, rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------------------- actor and critics


def reached(loss, agent):
    """The networks whose parameters the loss has a gradient in."""
    parts = {name: getattr(agent.sac, name) for name in ("actor", "critics", "targets")}
    parts["encoder"] = agent.encoder
    loss.backward()
    found = set()
    for name, part in parts.items():
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters()):
            found.add(name)
    agent.zero_grad(set_to_none=True)
    return found


def test_what_each_loss_reaches(agent):
    batch, context, mask, noise = draws(agent)

    def draw_z():
        mean, variance = agent.infer(context, mask)
        return (mean + variance.sqrt() * noise[0]).unsqueeze(1).expand(-1, B, -1)

    qf_loss, _ = agent.sac.critic_loss(batch, draw_z(), noise[1], 0.9, 5.0, 1.0)
    assert reached(qf_loss, agent) == {"encoder", "critics"}
    assert reached(module.kl_to_prior(*agent.infer(context, mask)).mean(), agent) == {"encoder"}
    actor_loss, _ = agent.sac.actor_loss(batch, draw_z().detach(), noise[2], 1e-3, 1.0)
    assert reached(actor_loss, agent) == {"actor", "critics"}  # only the actor's is applied:
    before = copy.deepcopy(agent.state_dict())
    actor_loss, _ = agent.sac.actor_loss(batch, draw_z().detach(), noise[2], 1e-3, 1.0)
    module.apply_gradient(optimizers(agent)["actor"], actor_loss)
    state = agent.state_dict()
    changed = {name.split(".")[1] for name in state if not torch.equal(state[name], before[name])}
    assert changed == {"actor"}


def test_the_encoder_does_not_learn_from_the_actors_loss(agent):
    """A step changes it as the critics' loss and the KL do, whatever the actor's loss is."""
    states = []
    for regularization in (1e-3, 10.0):
        twin, args = copy.deepcopy(agent), settings(regularization=regularization)
        step(twin, optimizers(twin), draws(agent), args)
        states.append(twin.state_dict())
    for name, x in states[0].items():
        assert torch.equal(x, states[1][name]) == (".actor." not in name), name


def test_the_target_is_a_constant_of_z(agent):
    """The critics' gradient in z is that with the target held fixed."""
    batch, _, _, noise = draws(agent)
    sac = agent.sac
    z = torch.randn(N, B, Z, requires_grad=True)
    qf_loss, _ = sac.critic_loss(batch, z, noise[1], 0.9, 5.0, 1.0)
    (gradient,) = torch.autograd.grad(qf_loss, z)
    with torch.no_grad():
        action, logprob, *_ = sac.act(batch["next_obs"], z, noise[1])
        value = sac.values(sac.targets, batch["next_obs"], z, action).min(0).values - logprob
        goes_on = 1 - batch["terminated"][..., 0]
        y = 5.0 * batch["dense_rewards"][..., 0] + 0.9 * goes_on * value
    one, two = sac.values(sac.critics, batch["obs"], z, batch["actions"])
    (expected,) = torch.autograd.grad(((one - y) ** 2).mean() + ((two - y) ** 2).mean(), z)
    torch.testing.assert_close(gradient, expected)


def test_a_whole_step_in_plain_terms(agent):
    """gradient_step against the losses written out, each network with an Adam of its own."""
    batch, context, mask, noise = draws(agent)
    twin = copy.deepcopy(agent)
    args = settings()
    found = step(agent, optimizers(agent), (batch, context, mask, noise), args)
    networks = {"encoder": twin.encoder, "critics": twin.sac.critics, "actor": twin.sac.actor}
    adam = {name: torch.optim.Adam(net.parameters(), lr=3e-4) for name, net in networks.items()}
    mean, variance = module.belief(twin.encoder(context[..., :5]), mask)
    z = [torch.stack([mean[i] + variance[i].sqrt() * noise[0][i]] * B) for i in range(N)]
    z = torch.stack(z)
    qf_loss, qf_values = twin.sac.critic_loss(batch, z, noise[1], 0.9, 5.0, 1.0)
    kl = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum()
    (qf_loss + 0.1 * kl).backward()
    adam["critics"].step()
    adam["encoder"].step()
    z = z.detach()
    mean_action, log_std = twin.sac.actor(torch.cat([batch["obs"], z], -1)).chunk(2, -1)
    raw = mean_action + log_std.exp() * noise[2]
    logprob = Normal(mean_action, log_std.exp()).log_prob(raw) - torch.log(1 - raw.tanh() ** 2)
    q = twin.sac.values(twin.sac.critics, batch["obs"], z, raw.tanh()).min(0).values
    penalty = 1e-3 * ((mean_action**2).mean() + (log_std**2).mean())
    actor_loss = (logprob.sum(-1) - q).mean() + penalty
    adam["actor"].zero_grad()
    actor_loss.backward()
    adam["actor"].step()
    with torch.no_grad():
        pairs = zip(twin.sac.targets.parameters(), twin.sac.critics.parameters(), strict=True)
        for target, p in pairs:
            target.copy_(0.995 * target + 0.005 * p)
    for name, x in agent.state_dict().items():
        torch.testing.assert_close(x, twin.state_dict()[name], atol=1e-6, rtol=1e-5, msg=name)
    std = variance.sqrt().mean()
    expected = [qf_loss, qf_values, kl / N, std, actor_loss, -logprob.sum(-1).mean()]
    torch.testing.assert_close(found, torch.stack(expected).detach())
    assert len(module.LOSSES) == len(found)
    assert all(p.grad is None for p in agent.sac.targets.parameters())


def test_tanh_gaussian():
    torch.manual_seed(1)
    dist_params, noise = 0.5 * torch.randn(N, B, 6).double(), torch.randn(N, B, 3).double()
    action, logprob, mean, log_std = module.tanh_gaussian(dist_params, noise)
    assert action.abs().max() < 0.9999  # where torch's own inverse of tanh is still exact
    base = Independent(Normal(dist_params[..., :3], dist_params[..., 3:].clamp(max=2).exp()), 1)
    expected = TransformedDistribution(base, TanhTransform()).log_prob(action)
    torch.testing.assert_close(logprob, expected)
    assert torch.equal(mean, dist_params[..., :3]) and torch.equal(log_std, dist_params[..., 3:])
    assert torch.equal(module.tanh_gaussian(dist_params, 0 * noise)[0], mean.tanh())
    far = module.tanh_gaussian(torch.tensor([30.0, 5.0]), torch.tensor([4.0]))
    assert far[3] == 2 and all(x.isfinite().all() for x in far)  # log std is at most 2; no log of 0


def test_reward_scale_and_temperature(agent):
    """Rewards times c at temperature 1: c² times the critics' loss at temperature 1/c."""
    batch, _, _, noise = draws(agent)
    z, c = torch.randn(N, B, Z), 5.0
    large, small = agent.sac, copy.deepcopy(agent.sac)
    with torch.no_grad():
        for critics in (small.critics, small.targets):
            critics.weights[-1].div_(c)
            critics.biases[-1].div_(c)
    one, _ = large.critic_loss(batch, z, noise[1], 0.9, c, 1.0)
    two, _ = small.critic_loss(batch, z, noise[1], 0.9, 1.0, temperature=1 / c)
    torch.testing.assert_close(one, c**2 * two)
    one, _ = large.actor_loss(batch, z, noise[2], 0.0, 1.0)
    two, _ = small.actor_loss(batch, z, noise[2], 0.0, temperature=1 / c)
    torch.testing.assert_close(one, c * two)


def test_the_twin_critics_differ(agent):
    sac = agent.sac

    def gap():
        return min((p[0] - p[1]).abs().max().item() for p in sac.critics.weights)

    assert gap() > 1e-3
    adam, before = optimizers(agent, 1e-3), copy.deepcopy(sac.targets)
    for seed in range(100):
        step(agent, adam, draws(agent, seed), settings())
    assert gap() > 1e-3
    one, two = sac.values(sac.critics, *(torch.ones(3, size) for size in (2, Z, 2)))
    assert not torch.equal(one, two)
    for a, b in zip(before.parameters(), sac.targets.parameters(), strict=True):
        assert not torch.equal(a, b)


def test_regularisers_move_the_actor(lively):
    batch, _, _, noise = draws(lively)
    sac, z = lively.sac, torch.zeros(N, B, Z)
    parameters = [*sac.actor.parameters()]
    _, _, mean, log_std = sac.act(batch["obs"], z, noise[2])
    penalty = torch.autograd.grad(1e3 * ((mean**2).mean() + (log_std**2).mean()), parameters)
    without, with_it = (
        torch.autograd.grad(sac.actor_loss(batch, z, noise[2], weight, 1.0)[0], parameters)
        for weight in (0.0, 1e3)
    )
    for zero, one, g in zip(without, with_it, penalty, strict=True):
        torch.testing.assert_close(one, zero + g, rtol=1e-3, atol=1e-2)
        assert g.abs().max() > 1


def test_a_stack_of_networks_is_each_of_them():
    torch.manual_seed(0)
    stack, x = module.MLP(3, 8, 2, stack=2), torch.randn(2, N, B, 3)
    for i, y in enumerate(stack(x)):
        expected = x[i]
        for k, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
            expected = expected @ weight[i] + bias[i]
            expected = expected.relu() if k < 3 else expected
        torch.testing.assert_close(y, expected)


# ------------------------------------------------------------------------------ replay and context


def fill(replay, lengths):
    """Rows that say (task, number within the task) at the end of each task's replay."""
    for i, n in enumerate(lengths):
        rows = torch.stack([torch.full((n,), i), torch.arange(n)], 1).float().unsqueeze(0)
        replay.add(torch.tensor([i]), rows, torch.ones(1, n))


def test_replay():
    replay, generator = module.Replay(3, 10, 2, CPU, "--size"), torch.Generator().manual_seed(0)
    fill(replay, [4, 7, 10])
    ids = torch.tensor([2, 0])
    for _ in range(3):
        draw = replay.sample(ids, 400, generator)
        assert (draw[0, :, 0] == 2).all() and (draw[1, :, 0] == 0).all()
        assert set(draw[0, :, 1].tolist()) == set(range(10))
        assert set(draw[1, :, 1].tolist()) == set(range(4))
    rows = torch.arange(24).view(2, 6, 2).float()
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]).float()
    replay.add(ids, rows, mask)  # only where the mask is 1; task 2 is full, and forgets its oldest
    assert replay.count.tolist() == [5, 7, 13]
    first = replay.gather(torch.tensor([0]), torch.arange(5)[None])
    assert first[0, :, 1].tolist() == [0, 1, 2, 3, 23]
    kept = replay.gather(torch.tensor([2]), torch.arange(3, 13)[None])[0, :, 1].tolist()
    assert kept == [3, 4, 5, 6, 7, 8, 9, 1, 5, 7]
    assert set(replay.sample(ids[:1], 400, generator)[0, :, 1].tolist()) == set(kept)
    again = module.Replay(3, 10, 2, CPU, "--size")
    again.load(replay.state())
    assert torch.equal(again.rows, replay.rows) and torch.equal(again.count, replay.count)
    assert len(replay.state()["rows"]) == 5 + 7 + 10


def test_rows_and_columns():
    """Episodes become rows, with the numbers of a step side by side; from_rows is the inverse."""
    shapes = {"obs": (2, 3, 4, 2), "dense_rewards": (2, 3, 4), "actions": (2, 3, 4, 1)}
    batch = {name: torch.randn(shape) for name, shape in shapes.items()}
    batch["mask"] = torch.randint(2, (2, 3, 4)).float()
    columns = {"dense_rewards": 1, "obs": 2}
    rows, mask = module.to_rows(batch, columns)
    assert rows.shape == (2, 12, 3)
    for task in range(2):
        for e in range(3):
            for t in range(4):
                expected = [batch["dense_rewards"][task, e, t], *batch["obs"][task, e, t]]
                assert rows[task, 4 * e + t].tolist() == expected
                assert mask[task, 4 * e + t] == batch["mask"][task, e, t]
    parts = module.from_rows(rows, columns)
    assert torch.equal(parts["obs"].unflatten(1, (3, 4)), batch["obs"])
    assert torch.equal(parts["dense_rewards"][..., 0].unflatten(1, (3, 4)), batch["dense_rewards"])


def filled_experience(lengths, window, longest):
    """An Experience whose rows say (task, number within the task)."""
    torch.manual_seed(0)
    args = settings(num_train_tasks=len(lengths))
    experience = module.Experience(np.zeros((len(lengths), 2)), module.Agent(2, 2, args), args)
    experience.replay = module.Replay(len(lengths), 40, 2, CPU, "--size")
    fill(experience.replay, lengths)
    experience.window = torch.tensor(window)
    experience.longest = longest
    return experience


def test_contexts_are_different_transitions_of_the_window():
    experience = filled_experience([30, 30, 30], [[0, 30], [10, 5], [7, 0]], longest=30)
    generator, args = torch.Generator().manual_seed(0), settings(context_size=12)
    seen = [set(), set()]
    for _ in range(60):
        context, mask = experience.draw_context(torch.tensor([1, 0, 2]), generator, args)
        assert context.shape == (3, 12, 2) and mask.sum(1).tolist() == [5, 12, 0]
        for i, task in enumerate((1, 0)):
            drawn = context[i][mask[i] > 0]
            numbers = drawn[:, 1].tolist()
            assert (drawn[:, 0] == task).all() and len(set(numbers)) == len(numbers)
            seen[i] |= set(numbers)
    assert seen == [set(range(10, 15)), set(range(30))]


def test_contexts_of_segments():
    """Runs of consecutive transitions, none twice; what lies beyond the window is masked."""
    experience = filled_experience([30, 30], [[3, 20], [10, 7]], longest=20)
    generator = torch.Generator().manual_seed(0)
    args = settings(context_size=11, context_segment=5)
    seen = set()
    for _ in range(40):
        context, mask = experience.draw_context(torch.tensor([0, 1]), generator, args)
        first, second = context[0, :, 1].reshape(2, 5), context[1][mask[1] > 0][:, 1]
        assert context.shape == (2, 10, 2)
        assert torch.equal(first, first[:, :1] + torch.arange(5))
        assert first[0, 0] != first[1, 0] and sorted(second.tolist()) == list(range(10, 17))
        seen |= set(first[:, 0].tolist())
    assert seen == {3, 8, 13, 18}


def test_only_the_first_numbers_of_a_row_reach_the_encoder(lively):
    """Observation, action and reward; with context_next_obs the next observation, never more."""
    rows, mask = torch.randn(N, C, 9), torch.ones(N, C)
    for agent, width in ((lively, 5), (make_agent(context_next_obs=True), 7)):
        first = ["obs", "actions", "context_rewards", "next_obs"]
        assert [*agent.columns] == [*first, "dense_rewards", "terminated"]
        mean, _ = agent.infer(rows, mask)
        for i in range(9):
            other = rows.clone()
            other[..., i] += 1
            assert torch.equal(agent.infer(other, mask)[0], mean) == (i >= width)


def play_phases(monkeypatch, phases, agent=None, n=3, times=1, window=0, **flags):
    """explore in the first n of 5 tasks, with steps by phase.

    Returns the experience, the last exploration's rounds, and the beliefs that they acted on.
    """
    torch.manual_seed(0)
    steps = dict.fromkeys(["prior_steps", "posterior_steps", "extra_steps"], 0)
    args = settings(**(steps | {f"{name}_steps": x for name, x in phases.items()} | flags))
    envs = module.make_envs(args.env_id)
    obs_size, action_size = (
        space.shape[0] for space in (envs.single_observation_space, envs.single_action_space)
    )
    agent = agent or make_agent(obs_size, action_size)
    experience = module.Experience(sample_tasks(5, args.env_id, seed=0), agent, args)
    experience.longest = 4000
    collect, beliefs = module.collect, []

    def recorded(q, *rest):
        beliefs.append(q)
        return collect(q, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "collect", recorded)
        for k in range(times):
            beliefs.clear()
            key = ("x", k)
            ids = torch.arange(n)
            rounds = module.explore(phases, ids, experience, window, key, agent, args)
    return experience, rounds, beliefs


def test_context_window_reaches_back_over_collections(monkeypatch):
    """The latest steps of all phases; while a task is explored, its belief still starts anew."""
    phases = {"prior": 20, "extra": 40}
    play = partial(play_phases, monkeypatch, phases)
    experience, *_ = play(times=3, window=100)
    assert experience.replay.count[:3].tolist() == [180] * 3
    assert experience.window[:3].tolist() == [[80, 100]] * 3
    *_, (mean, variance) = play(times=3)[2]
    *_, (again, _) = play(times=3, window=100)[2]
    assert torch.equal(mean, again) and not torch.equal(variance, torch.ones_like(variance))
    assert play(window=100)[0].window[:3].tolist() == [[0, 60]] * 3  # no more than there is


def test_phases(monkeypatch):
    phases = {"prior": 60, "posterior": 60, "extra": 50}
    experience, rounds, beliefs = play_phases(monkeypatch, phases, times=2)
    replay, window = experience.replay, experience.window
    assert len(rounds) == 3 + 3 + 3  # whole episodes
    assert replay.count.tolist() == [2 * 180] * 3 + [0] * 2
    # anew, and without the extra phase
    assert window.tolist() == [[180, 120]] * 3 + [[0, 0]] * 2
    from_prior = [bool((mean == 0).all() and (var == 1).all()) for mean, var in beliefs]
    # each phase starts from the prior
    assert from_prior == [True] * 4 + [False] * 2 + [True] + [False] * 2
    rows = replay.gather(torch.arange(3), torch.arange(180, 360).expand(3, -1))
    expected = [module.to_rows(batch, experience.columns)[0] for batch in rounds]
    assert torch.equal(rows, torch.cat(expected, 1))
    experience, rounds, _ = play_phases(monkeypatch, phases, episodes_per_task=2)
    assert len(rounds) == 2 + 2 + 2 and experience.window[0].tolist() == [0, 160]
    assert experience.replay.count[0] == 240


def test_a_phase_goes_on_until_tasks_have_their_steps_on_average(monkeypatch):
    """Where episodes end early; a belief is of what its own task has seen."""
    flags = {"env_id": "user_tasks:Asymmetric-v0", "horizon": 12}
    experience, rounds, _ = play_phases(monkeypatch, {"prior": 30}, **flags)
    steps = [int(batch["mask"].sum()) for batch in rounds]
    assert sum(steps[:-1]) < 3 * 30 <= sum(steps) == experience.replay.count.sum()
    lengths = torch.as_tensor(experience.tasks[:3, 0]).long()
    assert torch.equal(experience.window[:3, 1], len(rounds) * lengths)


def test_main_collects_what_the_flags_say(train):
    flags = {"num_train_tasks": 6, "picked_tasks": 3, "initial_steps": 40, "prior_steps": 20}
    flags |= {"posterior_steps": 20, "extra_steps": 20}
    flags |= {"total_timesteps": 2 * 3 * 40 + 2 * 3 * 60}
    folder, _ = train(module, **flags)
    state = load(folder)
    count, window = state["own"]["replay"]["count"], state["own"]["window"]
    assert state["iteration"] == 4 and state["global_step"] == 600 == count.sum()
    picks = (count - 40) / 60
    assert picks.sum() == 6 and picks.max() <= 2  # different tasks: at most once in an iteration
    # context_window
    assert window[:, 1].tolist() == [60 if picked else 40 for picked in count > 40]
    for other in ({"context_window": 0}, {"warmup_iterations": 3}):
        folder, _ = train(module, **(flags | other))
        assert load(folder)["own"]["window"][:, 1].tolist() == [40] * 6


def test_the_first_iterations_play_all_tasks_in_turn(train):
    """Three picked of four: the second iteration plays the fourth task, and goes on with the first."""
    folder, _ = train(module, picked_tasks=3, checkpoint_every=1, total_timesteps=161)
    state = load(folder)
    assert state["iteration"] == 2
    assert state["own"]["replay"]["count"].tolist() == [80, 80, 40, 40]


def of_asymmetric(env_id):
    """Rows and mask of an episode of each of four tasks of test_tasks, and how long the tasks are."""
    args = settings(env_id=env_id, horizon=12)
    agent = module.Agent(3, 2, args)
    tasks = sample_tasks(4, "user_tasks:Asymmetric-v0", seed=0)
    if env_id.endswith("Truncated-v0"):
        tasks[:, 0] = 9
    batch = module.collect(agent.prior(4), tasks, ("train", 1), agent, args)
    rows, mask = module.to_rows(batch, agent.columns)
    return rows, mask, tasks[:, 0].astype(int)


def test_rows_hold_terminated_but_not_truncated():
    """Asymmetric ends episodes, each at its own step; Truncated's run into their time limit alone."""
    rows, mask, lengths = of_asymmetric("user_tasks:Asymmetric-v0")
    for i, length in enumerate(lengths):
        assert mask[i].sum() == length
        assert rows[i, :length, -1].tolist() == [0] * (length - 1) + [1]
    rows, mask, _ = of_asymmetric("user_tasks:Truncated-v0")
    # at the limit of 4 the critics bootstrap
    assert mask.sum(1).tolist() == [4] * 4 and (rows[..., -1] == 0).all()


def test_next_observations_are_of_the_same_episode(monkeypatch):
    experience, *_ = play_phases(monkeypatch, {"prior": 40})
    rows = experience.replay.gather(torch.arange(3), torch.arange(40).expand(3, -1))
    of = module.from_rows(rows, experience.columns)
    obs, next_obs = of["obs"], of["next_obs"]
    # at the last step too: not the start of the next episode
    torch.testing.assert_close(next_obs, obs + 0.1 * of["actions"])
    torch.testing.assert_close(next_obs[:, :19], obs[:, 1:20])
    assert not torch.allclose(next_obs[:, 19], obs[:, 20]) and (of["dense_rewards"] < 0).all()


def test_sparse_rewards_are_for_the_context_only(monkeypatch):
    flags = {"env_id": "SparsePointRobot-v0", "context_size": 16}
    experience, rounds, _ = play_phases(monkeypatch, {"prior": 2000}, n=5, **flags)
    rows = experience.replay.gather(torch.arange(5), torch.arange(2000).expand(5, -1))
    of = module.from_rows(rows, experience.columns)
    goals = torch.as_tensor(experience.tasks).float().unsqueeze(1)
    distance = (of["next_obs"] - goals).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(of["dense_rewards"], -distance)
    sparse = torch.where(distance <= 0.2, 1 - distance, 0.0)
    torch.testing.assert_close(of["context_rewards"], sparse)
    assert all(torch.equal(batch["rewards"], batch["sparse_rewards"]) for batch in rounds)
    generator = torch.Generator().manual_seed(0)
    rows, context, _, _ = experience.draw_batch(generator, settings(**flags))
    batch = module.from_rows(rows, experience.columns)
    assert (batch["dense_rewards"] < 0).all() and (context[..., 4] >= 0).all()


def test_rewards_of_context_and_score_can_differ(train):
    """Trained on dense rewards, tested on sparse ones: the encoder sees dense, the score is sparse."""
    train = partial(train, module, env_id="SparsePointRobot-v0")
    _, metrics = train(train_reward="dense", test_reward="sparse")
    assert metrics["eval/return_after_0_episodes"] >= 0 > metrics["charts/episodic_return"]
    _, metrics = train(train_reward="sparse", test_reward="dense")
    assert metrics["eval/return_after_0_episodes"] < 0 <= metrics["charts/episodic_return"]


# --------------------------------------------------------------------------------------- meta-test


def meta_test(tasks, agent, num_eval_steps=3, exploration_episodes=1, **flags):
    flags |= {"num_eval_steps": num_eval_steps, "exploration_episodes": exploration_episodes}
    scores, _ = module.evaluate(tasks, agent, settings(**flags))
    return torch.as_tensor(scores["return"])


def test_a_task_is_tested_as_if_it_were_alone(lively):
    a, b, other = sample_tasks(3)
    alone = meta_test(np.stack([b]), lively)
    meta_test(np.stack([a]), lively)
    # nothing is left of a
    torch.testing.assert_close(meta_test(np.stack([b]), lively), alone, rtol=0, atol=0)
    after_a, after_other = (meta_test(np.stack([first, b]), lively)[:, 1] for first in (a, other))
    torch.testing.assert_close(after_a, after_other, rtol=0, atol=0)


def test_the_belief_is_of_all_steps_seen(lively, monkeypatch):
    """After k episodes, of k sampled episodes of this task; before `exploration`, the prior."""
    tasks = sample_tasks(4)
    seen, rounds = [], []
    belief, collect = module.belief, module.collect

    def recorded_belief(factors, mask):
        seen.append(factors)
        return belief(factors, mask)

    def recorded_collect(*args, **settings):
        rounds.append(collect(*args, **settings))
        return rounds[-1]

    monkeypatch.setattr(module, "belief", recorded_belief)
    monkeypatch.setattr(module, "collect", recorded_collect)
    meta_test(tasks, lively, num_eval_steps=4, exploration_episodes=2)
    assert [x.shape[1] for x in seen] == [40, 60, 80]
    sampled = rounds[:8:2]  # each followed by one with the mean action, which is only scored
    parts = [
        torch.cat([batch["obs"], batch["actions"], batch["dense_rewards"][..., None]], -1)
        for batch in sampled
    ]
    context = torch.cat(parts, 2)
    torch.testing.assert_close(seen[-1], lively.encoder(context[:, 0]))


def test_what_is_scored_does_not_change_the_context(train, monkeypatch):
    """Training has contexts of sampled actions; a point at rest gives equal factors, evidence."""
    folder, _ = train(module)
    belief, contexts, scores = module.belief, {}, {}
    for deterministic in (True, False):
        seen = contexts[deterministic] = []
        monkeypatch.setattr(module, "belief", lambda *c, seen=seen: seen.append(c) or belief(*c))
        flags = {"num_eval_steps": 3, "deterministic_eval": deterministic}
        _, scores[deterministic] = train(module, evaluate=folder, **flags)
    assert len(contexts[True]) == 3
    for one, two in zip(contexts[True], contexts[False], strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    for tag, value in scores[False].items():  # both are logged, under names of their own
        sampled = tag.replace("eval/", "eval/sampled_")
        assert scores[True][sampled] == value != scores[True][tag]


def test_the_mean_action_is_scored_in_episodes_of_the_same_draws(lively):
    """z and start are those of the sampled episodes, only the actions have no noise."""
    tasks = sample_tasks(3)
    for deterministic in (True, False):
        batch = module.collect(
            lively.prior(3),
            tasks,
            ("eval", 0),
            lively,
            settings(),
            test=True,
            deterministic=deterministic,
        )
        expected = module.episode_scores(batch)["return"]
        found = meta_test(tasks, lively, deterministic_eval=deterministic)[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("exploration, first", [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_exploration_is_counted_in_episodes(lively, monkeypatch, exploration, first):
    """With three episodes between updates, the belief is used once that many are over."""
    seen, belief = [], module.belief
    monkeypatch.setattr(
        module, "belief", lambda factors, mask: seen.append(mask) or belief(factors, mask)
    )
    meta_test(sample_tasks(2), lively, exploration_episodes=exploration, eval_episodes=3)
    assert [mask.shape[1] for mask in seen] == [3 * 20 * k for k in range(first, 4)]


def test_a_meta_test_that_never_uses_the_belief_is_refused(train, tmp_path):
    """Unless that is what was asked for: no context, or no update."""
    folder, _ = train(module)
    evaluate = partial(train, module, evaluate=folder, eval_episodes=3, exploration_episodes=7)
    line = r"^error: --exploration-episodes 7: .* 2 x 3 episodes before .*$"
    with pytest.raises(SystemExit, match=line):
        evaluate(num_eval_steps=2)
    evaluate(num_eval_steps=2, eval_context="none")
    evaluate(num_eval_steps=0)
    evaluate(num_eval_steps=3)


def test_comparisons_at_meta_test(lively):
    tasks = sample_tasks(6)
    contexts = ("own", "none", "shuffled")
    own, none, shuffled = (meta_test(tasks, lively, eval_context=context) for context in contexts)
    # the first episode has no context
    assert torch.equal(own[0], none[0]) and torch.equal(own[0], shuffled[0])
    assert not torch.allclose(own[1:], none[1:]) and not torch.allclose(own[1:], shuffled[1:])
    assert torch.equal(none, meta_test(tasks, lively, exploration_episodes=100))
    alone = meta_test(tasks[:1], lively, eval_context="shuffled")
    assert torch.equal(meta_test(tasks[:1], lively), alone)  # there is no other task


def test_deterministic_evaluation(lively):
    tasks = sample_tasks(3, seed=0)
    play = partial(module.collect, lively.prior(3), tasks, ("eval", 7), lively, settings())
    one, two = (play(deterministic=True) for _ in range(2))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    z = one["actions"][:, 0, 0].atanh()  # of the first step: the mean action of one z per episode
    assert not torch.allclose(z[0], z[1])
    noisy = play()
    assert torch.equal(noisy["obs"][:, :, 0], one["obs"][:, :, 0])
    assert not torch.equal(noisy["obs"], one["obs"])


def test_every_episode_has_a_z_of_its_own(lively):
    """mean + std x noise, the noise of a key of its own."""
    args = settings(episodes_per_task=3)
    mean, variance = torch.randn(2, Z), torch.rand(2, Z)
    play = partial(module.collect, tasks=sample_tasks(2), key=("train", 1), agent=lively, args=args)
    batch = play((mean, variance), deterministic=True)
    generator = module.keyed_generator(args, "latents of train", 1)
    noise = torch.randn(2, 3, Z, generator=generator)
    z = mean.unsqueeze(1) + variance.sqrt().unsqueeze(1) * noise
    expected, *_ = lively.sac.act(batch["obs"][:, :, 0], z, torch.zeros(2, 3, 2))
    torch.testing.assert_close(batch["actions"][:, :, 0], expected)


# --------------------------------------------------------------------------------- units of rewards


def replay_of(rewards, columns=None, obs=None):
    """A replay of one task with these dense rewards and observations, and its columns."""
    columns = columns or {"obs": 2, "dense_rewards": 1}
    n = len(rewards)
    given = {"obs": obs, "dense_rewards": rewards.unsqueeze(-1)}
    parts = [given.get(name) for name in columns]
    sizes = columns.values()
    rows = [torch.randn(n, w) if x is None else x for x, w in zip(parts, sizes, strict=True)]
    replay = module.Replay(1, 2 * n, sum(sizes), CPU, "--size")
    replay.add(torch.tensor([0]), torch.cat(rows, -1).unsqueeze(0), torch.ones(1, n))
    return replay, columns


def test_the_unit_of_rewards():
    """Their standard deviation, of steps that there are; what hardly varies, or is 0, blows nothing up."""
    rewards = torch.randn(500) + 2
    std = rewards.std(correction=0).double()
    for scale in (1, 3, -3, 1e-25, 1e25):
        unit = module.reward_unit(*replay_of(scale * rewards))
        torch.testing.assert_close(unit, abs(scale) * std, rtol=1e-5, atol=0)
    assert module.reward_unit(*replay_of(0.01 * rewards - 1)).item() == pytest.approx(
        0.098, rel=1e-2
    )
    for constant, unit in ((-5.0, 0.5), (0.1, 0.01), (0.0, 1.0)):
        found = module.reward_unit(*replay_of(torch.full((500,), constant)))
        assert found.item() == pytest.approx(unit)


def test_the_unit_of_rewards_is_that_of_all_ranks(tmp_path):
    rewards = torch.randn(500)

    def body(rank):
        torch.distributed.init_process_group("gloo")
        own = rewards[:100] if rank else rewards[100:]
        torch.save(module.reward_unit(*replay_of(own)), tmp_path / f"{rank}.pt")

    assert in_two_ranks(body) == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, module.reward_unit(*replay_of(rewards)))


@pytest.mark.parametrize(
    "env_id, usual, scale",
    [("SparsePointRobot-v0", 0.2, 0.2), ("PointRobot-v0", 0.5, 0.5), ("AntDir-v0", 1, 5)],
)
def test_what_a_unit_sets(lively, env_id, usual, scale):
    """The critics' scale, unless it is given, and the rewards of contexts: as they are where
    the unit is the usual one.
    """
    rows, mask = torch.randn(N, C, 9), torch.ones(N, C)
    expected, other = lively.infer(rows, mask), rows.clone()
    other[..., 4] *= 3
    for given, found in ((None, scale / (3 * usual)), (7.0, 7.0)):
        args = settings(env_id=env_id, reward_scale=given)
        agent = module.Agent(2, 2, args)
        agent.encoder = lively.encoder
        before = agent.infer(rows, mask)
        # the reward is not told before its unit is known
        torch.testing.assert_close(before, agent.infer(other, mask), rtol=0, atol=0)
        rewards = 3 * usual * torch.tensor([-1.0, 1.0])
        module.set_units(agent, replay_of(rewards, agent.columns)[0], args)
        assert agent.reward_scale.item() == pytest.approx(found)
        torch.testing.assert_close(agent.infer(other, mask), expected)


def test_the_unit_is_that_of_the_initial_collection(train):
    """Not of what comes later; a run that is resumed keeps it, and a scale that is given stays."""
    flags = {"checkpoint_every": 1, "total_timesteps": 320, "picked_tasks": 2, "initial_steps": 20}
    folder, _ = train(module, **flags)
    state = load(folder)
    rows = state["own"]["replay"]["rows"].split(state["own"]["replay"]["count"].tolist())
    assert all(len(own) > 20 for own in rows)
    rewards = torch.cat([own[:20] for own in rows])[:, 7]  # obs, actions, context reward, next_obs
    std = rewards.std(correction=0)
    torch.testing.assert_close(state["agent"]["units"][4], std / 0.5)
    torch.testing.assert_close(state["agent"]["reward_scale"], 0.5 / std)
    train(module, resume=folder, total_timesteps=640)
    for name in ("reward_scale", "units"):
        assert torch.equal(load(folder)["agent"][name], state["agent"][name])
    folder, _ = train(module, reward_scale=7.0, **flags)
    agent = load(folder)["agent"]
    assert agent["reward_scale"] == 7
    assert torch.equal(agent["units"], state["agent"]["units"])
    assert not agent["means"].any() and (agent["units"] != 1).sum() == 1  # observations as they are


class Paid(module.PointEnvs):
    """PointRobot-v0 with rewards in another unit, and sparse ones that are not sparse."""

    def __init__(self, pay, num_envs):
        self.pay = pay
        super().__init__("PointRobot-v0", num_envs)

    def step(self, actions):
        obs, rewards, *rest, _ = super().step(actions)
        return obs, self.pay * rewards, *rest, {"sparse_reward": 2 * self.pay * rewards}


@pytest.fixture
def double():
    yield from double_precision()


@pytest.mark.parametrize("train_reward", ["dense", "sparse"])
@pytest.mark.parametrize("pay", [1e4, 1e-4])
def test_learning_does_not_depend_on_the_unit_of_rewards(train, double, pay, train_reward):
    """Rewards times a constant: the same parameters, and so the same play, from the first meta-test on."""
    runs = []
    for unit in (1, pay):
        env_id = f"Paid_{unit:g}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, vector_entry_point=Paid, kwargs={"pay": unit})
        flags = {"env_id": env_id, "train_reward": train_reward, "gradient_steps": 20}
        folder, metrics = train(module, total_timesteps=5 * 160, **flags)
        agent = load(folder)["agent"]
        measured = agent.pop("reward_scale") * unit, agent.pop("units")[4] / unit
        runs.append((agent, measured, metrics["eval/return"] / unit))
    torch.testing.assert_close(runs[1], runs[0], atol=0, rtol=1e-6)


def test_observations_in_units():
    """Mean 0 and standard deviation 1, but for what hardly moves: a tenth of the largest is its unit."""
    for spreads, units in (
        ([3.0, 1.0, 0.01, 0.0], [3, 1, 0.3, 0.3]),
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1]),
    ):
        agent = module.Agent(4, 2, settings(normalize_obs=True))
        obs = torch.randn(500, 4)
        obs = (obs - obs.mean(0)) / obs.std(0, correction=0) * torch.tensor(spreads) + 5
        replay, columns = replay_of(torch.randn(500), agent.columns, obs)
        module.set_units(agent, replay, settings(normalize_obs=True))
        rows = replay.rows[replay.filled()]
        given = module.from_rows(agent.in_units(rows), columns)
        stored = module.from_rows(rows, columns)
        torch.testing.assert_close(given["obs"], (obs - 5) / torch.tensor(units), atol=1e-5, rtol=0)
        next_obs = ((stored["next_obs"] - 5) / torch.tensor(units)).clamp(-10, 10)
        torch.testing.assert_close(given["next_obs"], next_obs, atol=1e-5, rtol=1e-5)
        for name in ("actions", "dense_rewards", "terminated"):
            assert torch.equal(given[name], stored[name])
        # what flies off is clipped, and rewards are not
        far = module.from_rows(agent.in_units(rows + 1e4), columns)
        assert (far["obs"] == 10).all() and (far["next_obs"] == 10).all()
        assert (far["dense_rewards"] > 9e3).all()
        # what acts and what infers are given the same
        torch.testing.assert_close(agent.in_units(rows[:, :4]), given["obs"])
        torch.testing.assert_close(agent.in_units(rows[:, :7])[:, :4], given["obs"])


class Moved(module.PointEnvs):
    """PointRobot-v0, its observations in other units and from another origin."""

    def __init__(self, scale, origin, num_envs):
        self.scale = torch.tensor(scale)
        self.origin = origin
        super().__init__("PointRobot-v0", num_envs)

    def _obs(self):
        return super()._obs() * self.scale + self.origin


@pytest.mark.parametrize("normalize_obs", [True, False])
def test_learning_does_not_depend_on_the_units_of_observations(train, double, normalize_obs):
    """With --normalize-obs: the same parameters, and so the same play, after the initial collection."""
    runs = []
    for scale, origin in (([1.0, 1.0], 0), ([30.0, 10.0], -7)):
        env_id = f"Moved_{scale[0]:g}-v0"
        if env_id not in gym.registry:
            given = {"scale": scale, "origin": origin}
            gym.register(env_id, vector_entry_point=Moved, kwargs=given)
        flags = {"env_id": env_id, "gradient_steps": 20, "normalize_obs": normalize_obs}
        flags |= {"context_next_obs": True, "initial_steps": 20, "picked_tasks": 8}
        folder, metrics = train(module, total_timesteps=5 * 160, num_train_tasks=8, **flags)
        agent = load(folder)["agent"]
        del agent["means"], agent["units"]
        assert (agent["bounds"] == 10).sum() == 4 * normalize_obs
        runs.append((agent, metrics["eval/return"]))
    if normalize_obs:
        torch.testing.assert_close(runs[1], runs[0], atol=0, rtol=1e-6)
    else:
        assert runs[0][1] != pytest.approx(runs[1][1], rel=1e-3)


# ------------------------------------------------------------------------------------------- flags


def test_help_texts_have_the_defaults_by_kind():
    """Of what is unset: the numbers of BY_KIND, in its order."""
    source = inspect.getsource(module.Args)
    texts = dict(re.findall(r"^    (\w+): .* = None +# .*\(unset: (.*)\)$", source, re.MULTILINE))
    for name, values in module.BY_KIND.items():
        assert ast.literal_eval(texts.pop(name)) == values, name
    scales = ", ".join(f"{scale:.1f}" for _, scale in module.USUAL_REWARDS)
    assert texts.pop("reward_scale") == f"measured, about {scales}"
    rest = {"num_eval_steps", "eval_episodes", "train_reward", "test_reward", "context_next_obs"}
    assert texts.keys() == rest


@pytest.mark.parametrize(
    "env_id, kind",
    [
        ("SparsePointRobot-v0", 0),
        ("PointRobot-v0", 1),
        ("Navigation2D-v0", 1),
        ("MultimodalNavigation4-v0", 1),
        ("HalfCheetahVel-v0", 2),
        ("SparseAntGoal-v0", 2),
        ("Walker2dRandParams-v0", 2),
        ("my_tasks:Reach-v0", 2),
    ],
)
def test_defaults_by_kind(env_id, kind):
    args = module.with_defaults(module.Args(env_id=env_id))
    unset = {name for name, value in vars(args).items() if value is None}
    assert unset == {"eval_episodes", "reward_scale"}
    assert module.kind_of_tasks(args) == kind
    assert all(getattr(args, name) == of[kind] for name, of in module.BY_KIND.items())
    sparse = env_id.startswith("Sparse")
    assert args.train_reward == args.test_reward == ("sparse" if sparse else "dense")
    assert args.num_eval_steps == (19 if sparse else 2)
    assert args.context_next_obs == ("RandParams" in env_id)
    envs = module.make_envs("PointRobot-v0")
    args.horizon, args.eval_episodes = 20, 1
    module.check_flags(envs, args)  # they go together
    assert module.with_defaults(module.Args(env_id=env_id, gamma=0.5)).gamma == 0.5


def recipes():
    """Args of the commands in benchmarks/pearl.txt, by label."""
    found = {}
    for line in (ROOT / "benchmarks" / "pearl.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            label, _, command = (part.strip() for part in line.split("|"))
            script, *argv = shlex.split(command)
            assert script == "pearl.py"
            found[label] = module.with_defaults(module.parse(module.Args, argv))
    return found


def test_the_commands_of_the_page_are_recipes():
    """Those with flags of training, apart from what does not change its result."""
    pages = [ROOT / "docs" / "pearl.md", ROOT / "docs" / "notes" / "pearl.md"]
    page = "".join(page.read_text() for page in pages).replace("\\\n", " ")
    commands = re.findall(r"python pearl\.py (.*--gradient-steps.*)", page)
    free = {"cuda": False, "num_threads": 0, "eval_every": 25}
    free["checkpoint_every"] = 10
    known = [replace(args, **free) for args in recipes().values()]
    assert len(commands) == 2
    for command in commands:
        args = module.with_defaults(module.parse(module.Args, shlex.split(command)))
        assert replace(args, **free) in known, command


def test_step_counts_of_the_paper():
    """Steps of the initial collection and of an iteration in the authors' code."""
    counts = {"SparsePointRobot_paper": (16_000, 10_000), "HalfCheetahVel_paper": (200_000, 5_000)}
    for label, (initial, iteration) in counts.items():
        args = recipes()[label]
        args.horizon = 20 if "Point" in label else 200
        at_first, *phases = module.whole_rounds(args)
        assert [at_first, *phases] == [
            args.initial_steps,
            args.prior_steps,
            args.posterior_steps,
            args.extra_steps,
        ]
        assert args.num_train_tasks * at_first == initial
        assert args.picked_tasks * sum(phases) == iteration
        assert (args.total_timesteps - initial) / iteration == 500


def test_recipes_go_together():
    for label, args in recipes().items():
        args.horizon = 20 if "Point" in label else 200
        args.eval_episodes = args.episodes_per_task
        module.check_flags(module.make_envs("PointRobot-v0"), args)
        if label.endswith("_paper"):
            assert (args.hidden_size, args.encoder_size, args.learning_rate) == (300, 200, 3e-4)
            assert args.latent_size == 5 and not args.anneal and not args.warmup_iterations


@pytest.mark.parametrize(
    "flags, part",
    [
        ({"meta_batch_size": 5}, "--meta-batch-size 5: more than --num-train-tasks 4"),
        ({"picked_tasks": 5}, "--picked-tasks 5: more than --num-train-tasks 4"),
        ({"context_size": 61}, "--context-size 61: more than the 60 steps that contexts are drawn"),
        ({"context_segment": 17}, "--context-segment 17: more than --context-size 16"),
        ({"env_id": "user_tasks:Discrete-v0"}, "Discrete actions"),
        ({"num_train_tasks": 0}, "--num-train-tasks 0"),
        ({"replay_size": 39}, "--replay-size 39: less than the 40 steps"),
        (
            {"total_timesteps": 160},
            "--total-timesteps 160: must be above the 160 steps of the init",
        ),
        ({"exploration_episodes": 3}, "--exploration-episodes 3: more than the 1 x 2 episodes"),
        ({"replay_size": 10**12}, f"--replay-size {10**12}: 4 tasks need"),
        ({"compile": True}, "--compile is gone: --cuda captures CUDA graphs by itself"),
    ],
)
def test_bad_input(train, tmp_path, flags, part):
    with pytest.raises(SystemExit) as end:
        train(module, **flags)
    line = end.value.code
    assert line.startswith("error: ") and part in line and "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps, horizon, least", [(40, 10, 161), (30, 20, 161), (1, 10, 81)])
def test_a_budget_that_ends_before_the_first_gradient_step_is_refused(train, steps, horizon, least):
    """The result would be untrained; rounds of two episodes, all of them whole."""
    flags = {"picked_tasks": 1, "initial_steps": steps, "horizon": horizon}
    line = rf"^error: --total-timesteps {least - 1}: .* {least - 1} steps .*$"
    with pytest.raises(SystemExit, match=line):
        train(module, total_timesteps=least - 1, **flags)
    _, metrics = train(module, total_timesteps=least, **flags)
    assert "eval/return_after_0_episodes" in metrics


def test_one_task_picked_at_a_time(train):
    folder, _ = train(module, picked_tasks=1)
    assert load(folder)["global_step"] == 320 == 4 * 40 + 4 * 40


@pytest.mark.parametrize("what", ["qf_loss nan", "qf_loss inf", "networks"])
def test_training_that_diverges_leaves_the_last_checkpoint(train, monkeypatch, what):
    """Too large a step size; a loss that overflows; or the last step, after which no loss tells."""
    folder, _ = train(module)
    saved, healthy = load(folder), module.gradient_step

    def poisoned(agent, *rest):
        losses = healthy(agent, *rest)
        if what == "networks":
            agent.sac.actor.biases[-1].data.fill_(math.inf)
        return losses * (math.inf if what == "qf_loss inf" else 1)

    monkeypatch.setattr(module, "gradient_step", poisoned)
    saved["args"] |= {"gradient_steps": 1} if what == "networks" else {}
    saved["args"] |= {"learning_rate": 1e30} if what == "qf_loss nan" else {}
    torch.save(saved, folder / "checkpoint.pt")
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as end:
        train(module, resume=folder, total_timesteps=640, checkpoint_every=1)
    line = end.value.code
    assert line.startswith("error: ") and "\n" not in line, line
    assert what in line and "--learning-rate" in line and "in iteration 3" in line, line
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_the_replay_is_large_enough(train):
    """Twice a task's mean share of the steps; that of the first command line holds to the end."""
    flags = {"num_train_tasks": 8, "replay_size": 0}
    folder, _ = train(module, total_timesteps=1600, eval_every=100, **flags)
    state = load(folder)
    replay = state["own"]["replay"]
    assert len(replay["rows"]) == replay["count"].sum() == state["global_step"] == 1600
    assert state["args"]["replay_size"] == 2 * 1600 / 8
    train(module, resume=folder, total_timesteps=3200)
    assert load(folder)["args"]["replay_size"] == 2 * 1600 / 8


# ------------------------------------------------------------------------------------------- ranks


def in_two_ranks(body) -> list[int]:
    """body(rank) in two processes with the variables of torchrun; their exit codes."""
    skip_beside_a_gpu()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def start(rank):
        os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        os.environ |= {name: "2" for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        body(rank)
        torch.distributed.destroy_process_group()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=start, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def test_two_ranks_average_their_gradients(agent, tmp_path):
    """A step on halves of a batch is that of one process on the whole of it."""
    agent = agent.double()
    batch, context, mask, noise = in_double(*draws(agent))
    one = copy.deepcopy(agent)
    step(one, optimizers(one), (batch, context, mask, noise), settings())

    def body(rank):
        torch.distributed.init_process_group("gloo")
        own = slice(rank * N // 2, (rank + 1) * N // 2)
        half = {name: x[own] for name, x in batch.items()}
        rest = context[own], mask[own], [x[own] for x in noise]
        step(agent, optimizers(agent), (half, *rest), settings())
        torch.save(agent.state_dict(), tmp_path / f"{rank}.pt")

    assert in_two_ranks(body) == [0, 0]
    two, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, x in one.state_dict().items():
        torch.testing.assert_close(two[name], x, rtol=1e-8, atol=1e-8, msg=name)
        assert torch.equal(two[name], other[name])


def test_each_rank_keeps_its_tasks(train, tmp_path, monkeypatch):
    """Two ranks own four tasks each; killed after a checkpoint, both go on where they were."""
    flags = {"num_train_tasks": 8, "total_timesteps": 6 * 160, "checkpoint_every": 2}
    log = module.Run.log

    def log_and_die(run, metrics):
        log(run, metrics)
        if run.iteration == 5:
            os._exit(9)

    def killed(rank):
        monkeypatch.setattr(module.Run, "log", log_and_die)
        train(module, exp_name="killed", **flags)

    assert in_two_ranks(lambda rank: train(module, exp_name="whole", **flags)) == [0, 0]
    assert in_two_ranks(killed) == [9, 9]
    (whole,), (folder,) = (tmp_path.glob(f"runs/*__{name}__*") for name in ("whole", "killed"))
    assert load(folder)["iteration"] == 4
    with pytest.raises(SystemExit, match=r"^error: --resume: .* is a run of 2 ranks, not 1$"):
        train(module, resume=folder)
    assert in_two_ranks(lambda rank: train(module, resume=folder)) == [0, 0]
    states = [load(whole), load(folder)]
    assert states[0]["iteration"] == 6 and states[0]["global_step"] == 960
    for name, x in states[0]["agent"].items():
        assert torch.equal(states[1]["agent"][name], x)
    files = ["checkpoint.pt", "rank1.6.pt"]
    counts = []
    for name in files:
        own, other = (torch.load(run / name, weights_only=True)["own"] for run in (whole, folder))
        assert torch.equal(own["window"], other["window"])
        assert all(torch.equal(x, other["replay"][key]) for key, x in own["replay"].items())
        counts.append(own["replay"]["count"])
    assert [len(count) for count in counts] == [4, 4] and sum(map(sum, counts)) == 960
    assert sorted(path.name for path in folder.glob("*.pt")) == files


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_is_that_of_the_cpu():
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        agent = make_agent()
        batch, context, mask, noise = draws(agent)
        agent = agent.to(device)
        batch = {name: x.to(device) for name, x in batch.items()}
        rest = context.to(device), mask.to(device), [x.to(device) for x in noise]
        losses = step(agent, optimizers(agent), (batch, *rest), settings())
        results.append({"losses": losses, **agent.state_dict()})
    for name, x in results[0].items():
        torch.testing.assert_close(results[1][name].cpu(), x, rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------------- a family learned in seconds


class Sign(gym.Env):
    """A task is +1 or -1, a reward the task times the action: 0 without adaptation, else up to 4."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def sample_tasks(self, n):
        return np.resize([1.0, -1.0], (n, 1))

    def set_task(self, task):
        self.task = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1), {}

    def step(self, action):
        return np.ones(1), float(self.task * action[0]), False, False, {}


gym.register("Sign-v0", Sign, max_episode_steps=4)


def test_learns_to_infer_the_task(train):
    flags = {"meta_batch_size": 2, "num_train_tasks": 2, "picked_tasks": 2, "episodes_per_task": 1}
    flags |= {"horizon": 4, "initial_steps": 40, "prior_steps": 20, "posterior_steps": 20}
    flags |= {"gradient_steps": 100, "warmup_iterations": 1, "warmup_gradient_steps": 100}
    flags |= {"batch_size": 32, "context_size": 8, "context_segment": 1, "context_window": 0}
    flags |= {"hidden_size": 32, "encoder_size": 32, "latent_size": 5, "tau": 0.05, "gamma": 0.5}
    flags |= {"learning_rate": 3e-3, "reward_scale": 20.0, "kl_weight": 0.1}
    flags |= {"num_test_tasks": 10, "exploration_episodes": 1, "total_timesteps": 10 * 80}
    flags |= {"seed": 2}  # with others it can be one task alone that is learned so soon
    folder, metrics = train(module, env_id="Sign-v0", **flags)
    assert metrics["eval/return_after_1_episodes"] > 3 > 2 > metrics["eval/return_after_0_episodes"]
    _, shuffled = train(module, evaluate=folder, eval_context="shuffled")
    # the other task's context makes the other action
    assert shuffled["eval/return_after_1_episodes"] < -2
    _, none = train(module, evaluate=folder, eval_context="none")
    assert none["eval/return_after_1_episodes"] < 2
    assert math.isfinite(none["eval/return_after_1_episodes"])

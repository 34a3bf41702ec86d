"""pearl.py: its mathematics against closed forms and plain loops, its bookkeeping, and what reaches which network."""

import copy
import math
import subprocess
import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, environment, load, tiny
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torch.nn.functional import softplus

import pearl as module

CPU = torch.device("cpu")
SIZES = [2, 2, 1, 2, 1, 1]  # of the COLUMNS of the point robots
N, B, C, Z = 4, 8, 6, 5
SETTINGS = {"gamma": 0.9, "reward_scale": 5.0, "temperature": 1.0, "kl_weight": 0.1}
SETTINGS |= {"regularization": 1e-3, "tau": 0.005}


@pytest.fixture
def agent():
    torch.manual_seed(0)
    return module.Agent(2, 2, 5, Z, 16, 16)


@pytest.fixture
def lively():
    """An agent whose belief depends much on the context, and whose actions on z."""
    torch.manual_seed(0)
    agent = module.Agent(2, 2, 5, Z, 16, 16)
    with torch.no_grad():
        for p in [*agent.encoder.parameters(), *agent.actor.parameters()]:
            p.normal_(0, 0.7)
    return agent


def optimizers(agent, lr=3e-4):
    critics = torch.optim.Adam([*agent.critics.parameters(), *agent.encoder.parameters()], lr=lr)
    return {"critics": critics, "actor": torch.optim.Adam(agent.actor.parameters(), lr=lr)}


def draws(seed=1, n=N):
    """What draw_batch returns, made up."""
    torch.manual_seed(seed)
    batch = {name: torch.randn(n, B, size) for name, size in zip(module.COLUMNS, SIZES, strict=True)}
    batch["terminated"] = (batch["terminated"] > 1).float()
    mask = (torch.arange(C) < torch.arange(n).unsqueeze(1) + 2).float()
    return batch, torch.randn(n, C, 5), mask, [torch.randn(n, Z), torch.randn(n, B, 2), torch.randn(n, B, 2)]


# ----------------------------------------------------------------------------------------------------------- the belief


def test_the_belief_is_a_product_of_gaussians():
    torch.manual_seed(0)
    factors, mask = torch.randn(N, C, 2 * Z).double(), (torch.rand(N, C) < 0.7).double()
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
                torch.testing.assert_close(means[i, d], mean, atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(variances[i, d], (density * (x - mean) ** 2).sum(), atol=1e-6, rtol=1e-5)
    assert (means[1] == 0).all() and (variances[1] == 1).all()  # nothing seen: the prior
    order = torch.randperm(C)
    for a, b in zip(module.belief(factors[:, order], mask[:, order]), (means, variances), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [1, 7, 100])
def test_equal_factors_narrow_the_belief(n):
    factor = torch.randn(1, 1, 2 * Z)
    mean, variance = module.belief(factor.expand(1, n, -1), torch.ones(1, n))
    torch.testing.assert_close(mean, factor[:, 0, :Z])
    torch.testing.assert_close(variance, softplus(factor[:, 0, Z:]) / n)  # softplus gives a variance, not its root
    mean, variance = module.belief(torch.full((1, n, 2 * Z), -100.0), torch.ones(1, n))
    torch.testing.assert_close(variance, torch.full((1, Z), 1e-7 / n))  # the floor


@pytest.mark.parametrize("n, variance, kl", [(1, 0.693, 0.030), (64, 0.01083, 1.768), (1024, 0.00068, 3.149)])
def test_the_first_belief(agent, n, variance, kl):
    """Of an untrained encoder, against the values of the authors' initialisation."""
    with torch.no_grad():
        mean, var = module.belief(agent.encoder(torch.randn(N, n, 5)), torch.ones(N, n))
    assert var.mean().item() == pytest.approx(variance, rel=0.05)
    assert (module.kl_to_prior(mean, var).mean() / Z).item() == pytest.approx(kl, rel=0.05)


def test_kl_to_the_prior():
    mean, variance = torch.randn(N, Z), torch.rand(N, Z) + 0.1
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(module.kl_to_prior(mean, variance), expected)


def test_the_weight_of_the_kl(agent, monkeypatch):
    """kl_weight times the sum over the tasks: twice the tasks, twice the gradient."""
    monkeypatch.setattr(module, "critic_loss", lambda agent, batch, z, *rest: (0 * z.sum(), 0 * z.sum()))
    monkeypatch.setattr(module, "actor_loss", lambda agent, batch, *rest: [next(agent.actor.parameters()).sum()] * 2)
    monkeypatch.setattr(torch.autograd, "grad", partial(torch.autograd.grad, materialize_grads=True))
    found = []
    for times in (1, 2):
        batch, context, mask, noise = draws()
        batch = {name: x.repeat(times, 1, 1) for name, x in batch.items()}
        context, mask, noise = (
            context.repeat(times, 1, 1),
            mask.repeat(times, 1),
            [noise[0].repeat(times, 1), *noise[1:]],
        )
        twin = copy.deepcopy(agent)
        module.gradient_step(twin, optimizers(twin), batch, context, mask, noise, times * N, **SETTINGS)
        found.append([p.grad for p in twin.encoder.parameters()])
        mean, variance = module.belief(twin.encoder(context), mask)
    mean, variance = module.belief(agent.encoder(draws()[1]), draws()[2])
    kl = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum()
    expected = torch.autograd.grad(SETTINGS["kl_weight"] * kl, agent.encoder.parameters())
    for once, twice, g in zip(*found, expected, strict=True):
        torch.testing.assert_close(once, g)
        torch.testing.assert_close(twice, 2 * g)


# ---------------------------------------------------------------------------------------------------- actor and critics


def reached(loss, agent):
    """The networks whose parameters the loss has a gradient in."""
    parts = {name: [*getattr(agent, name).parameters()] for name in ("encoder", "actor", "critics", "targets")}
    loss.backward()
    found = {name for name, ps in parts.items() if any(p.grad is not None and p.grad.abs().sum() > 0 for p in ps)}
    agent.zero_grad(set_to_none=True)
    return found


def test_what_each_loss_reaches(agent):
    batch, context, mask, noise = draws()
    mean, variance = module.belief(agent.encoder(context), mask)
    z = (mean + variance.sqrt() * noise[0]).unsqueeze(1).expand(-1, B, -1)
    qf_loss, _ = module.critic_loss(agent, batch, z, noise[1], 0.9, 5.0, 1.0)
    assert reached(qf_loss, agent) == {"encoder", "critics"}
    mean, variance = module.belief(agent.encoder(context), mask)
    assert reached(module.kl_to_prior(mean, variance).mean(), agent) == {"encoder"}
    mean, variance = module.belief(agent.encoder(context), mask)
    z = (mean + variance.sqrt() * noise[0]).unsqueeze(1).expand(-1, B, -1)
    actor_loss, _ = module.actor_loss(agent, batch, z, noise[2], 1e-3, 1.0)
    assert reached(actor_loss, agent) == {"actor", "critics"}  # only the actor's is applied:
    before = copy.deepcopy(agent.state_dict())
    module.apply_gradient(
        optimizers(agent)["actor"], module.actor_loss(agent, batch, z.detach(), noise[2], 1e-3, 1.0)[0]
    )
    changed = {name.split(".")[0] for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"actor"}


def test_the_target_is_a_constant_of_z(agent):
    """The critics' gradient in z is that with the target held fixed."""
    batch, _, _, noise = draws()
    z = torch.randn(N, B, Z, requires_grad=True)
    (gradient,) = torch.autograd.grad(module.critic_loss(agent, batch, z, noise[1], 0.9, 5.0, 1.0)[0], z)
    with torch.no_grad():
        action, logprob, *_ = agent.act(batch["next_obs"], z, noise[1])
        value = agent.values(agent.targets, batch["next_obs"], action, z).min(0).values - logprob
        y = 5.0 * batch["dense_rewards"][..., 0] + 0.9 * (1 - batch["terminated"][..., 0]) * value
    one, two = agent.values(agent.critics, batch["obs"], batch["actions"], z)
    (expected,) = torch.autograd.grad(((one - y) ** 2).mean() + ((two - y) ** 2).mean(), z)
    torch.testing.assert_close(gradient, expected)


def test_a_whole_step_in_plain_terms(agent):
    """gradient_step against the losses written out, each network with an Adam of its own."""
    batch, context, mask, noise = draws()
    twin = copy.deepcopy(agent)
    found = module.gradient_step(agent, optimizers(agent), batch, context, mask, noise, N, **SETTINGS)
    adam = {
        name: torch.optim.Adam(getattr(twin, name).parameters(), lr=3e-4) for name in ("encoder", "critics", "actor")
    }
    mean, variance = module.belief(twin.encoder(context), mask)
    z = torch.stack([torch.stack([mean[i] + variance[i].sqrt() * noise[0][i]] * B) for i in range(N)])
    qf_loss, qf_values = module.critic_loss(twin, batch, z, noise[1], 0.9, 5.0, 1.0)
    kl = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum()
    (qf_loss + 0.1 * kl).backward()
    adam["critics"].step()
    adam["encoder"].step()
    mean_action, log_std = twin.actor(torch.cat([batch["obs"], z.detach()], -1)).chunk(2, -1)
    raw = mean_action + log_std.exp() * noise[2]
    logprob = Normal(mean_action, log_std.exp()).log_prob(raw) - torch.log(1 - raw.tanh() ** 2)
    q = twin.values(twin.critics, batch["obs"], raw.tanh(), z.detach()).min(0).values
    pg_loss = (logprob.sum(-1) - q).mean() + 1e-3 * ((mean_action**2).mean() + (log_std**2).mean())
    adam["actor"].zero_grad()
    pg_loss.backward()
    adam["actor"].step()
    with torch.no_grad():
        for target, p in zip(twin.targets.parameters(), twin.critics.parameters(), strict=True):
            target.copy_(0.995 * target + 0.005 * p)
    for name, x in agent.state_dict().items():
        torch.testing.assert_close(x, twin.state_dict()[name], atol=1e-6, rtol=1e-5, msg=name)
    expected = [qf_loss, qf_values, kl / N, variance.sqrt().mean(), pg_loss, -logprob.sum(-1).mean()]
    torch.testing.assert_close(found, torch.stack(expected).detach())
    assert len(module.LOSSES) == len(found)
    assert all(p.grad is None for p in agent.targets.parameters())


def test_tanh_gaussian():
    dist, noise = 0.5 * torch.randn(N, B, 6).double(), torch.randn(N, B, 3).double()
    action, logprob, mean, log_std = module.tanh_gaussian(dist, noise)
    assert action.abs().max() < 0.9999  # where torch's own inverse of tanh is still exact
    base = Independent(Normal(dist[..., :3], dist[..., 3:].clamp(max=2).exp()), 1)
    torch.testing.assert_close(logprob, TransformedDistribution(base, TanhTransform()).log_prob(action))
    assert torch.equal(mean, dist[..., :3]) and torch.equal(log_std, dist[..., 3:])
    assert torch.equal(module.tanh_gaussian(dist, 0 * noise)[0], mean.tanh())
    far = module.tanh_gaussian(torch.tensor([30.0, 5.0]), torch.tensor([4.0]))
    assert far[3] == 2 and all(x.isfinite().all() for x in far)  # log std is at most 2; no log of 0


def test_reward_scale_and_temperature(agent):
    """Rewards times c at temperature 1 and KL weight k: c² times the losses at temperature 1/c and weight k / c²."""
    batch, _, _, noise = draws()
    z, c, small = torch.randn(N, B, Z), 5.0, copy.deepcopy(agent)
    with torch.no_grad():
        for critics in (small.critics, small.targets):
            critics.weights[-1].div_(c)
            critics.biases[-1].div_(c)
    one, _ = module.critic_loss(agent, batch, z, noise[1], 0.9, c, 1.0)
    two, _ = module.critic_loss(small, batch, z, noise[1], 0.9, 1.0, temperature=1 / c)
    torch.testing.assert_close(one, c**2 * two)
    one, _ = module.actor_loss(agent, batch, z, noise[2], 0.0, 1.0)
    two, _ = module.actor_loss(small, batch, z, noise[2], 0.0, temperature=1 / c)
    torch.testing.assert_close(one, c * two)


def test_the_twin_critics_differ(agent):
    def gap():
        return min((p[0] - p[1]).abs().max().item() for p in agent.critics.weights)

    assert gap() > 1e-3
    adam, target = optimizers(agent, 1e-3), copy.deepcopy(agent.targets)
    for step in range(100):
        module.gradient_step(agent, adam, *draws(step), N, **SETTINGS)
    assert gap() > 1e-3
    assert not torch.equal(*agent.values(agent.critics, *(torch.ones(3, n) for n in (2, 2, Z))))
    assert all(not torch.equal(a, b) for a, b in zip(target.parameters(), agent.targets.parameters(), strict=True))


def test_regularisers_move_the_actor(lively):
    batch, _, _, noise = draws()
    mean, log_std = lively.act(batch["obs"], torch.zeros(N, B, Z), noise[2])[2:]
    losses = [module.actor_loss(lively, batch, torch.zeros(N, B, Z), noise[2], weight, 1.0)[0] for weight in (0.0, 1e3)]
    expected = 1e3 * ((mean**2).mean() + (log_std**2).mean())
    for p, zero, one, g in zip(
        lively.actor.parameters(),
        *(torch.autograd.grad(x, lively.actor.parameters()) for x in (*losses, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, zero + g, rtol=1e-3, atol=1e-2)
        assert g.abs().max() > 1 or p.numel() == 0


def test_a_stack_of_networks_is_each_of_them():
    torch.manual_seed(0)
    stack, x = module.MLP(3, 8, 2, stack=2), torch.randn(2, N, B, 3)
    for i, y in enumerate(stack(x)):
        expected = x[i]
        for k, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
            expected = expected @ weight[i] + bias[i]
            expected = expected.relu() if k < 3 else expected
        torch.testing.assert_close(y, expected)


# --------------------------------------------------------------------------------------------------- replay and context


def fill(replay, lengths, start=0):
    """Rows that say (task, number within the task) at the end of each task's replay."""
    for i, n in enumerate(lengths):
        numbers = torch.arange(start, start + n)
        rows = torch.stack([torch.full((n,), i), numbers], 1).float().unsqueeze(0)
        replay.add(torch.tensor([i]), rows, torch.ones(1, n))


def test_replay():
    replay, generator = module.Replay(3, 10, 2, CPU), torch.Generator().manual_seed(0)
    fill(replay, [4, 7, 10])
    ids = torch.tensor([2, 0])
    for _ in range(3):
        draw = replay.sample(ids, 400, generator)
        assert (draw[0, :, 0] == 2).all() and (draw[1, :, 0] == 0).all()
        assert set(draw[0, :, 1].tolist()) == set(range(10)) and set(draw[1, :, 1].tolist()) == set(range(4))
    rows = torch.arange(24).view(2, 6, 2).float()
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]).float()
    replay.add(ids, rows, mask)  # only where the mask is 1; task 2 is full, and forgets its oldest
    assert replay.count.tolist() == [5, 7, 13]
    assert replay.gather(torch.tensor([0]), torch.arange(5)[None])[0, :, 1].tolist() == [0, 1, 2, 3, 23]
    kept = replay.gather(torch.tensor([2]), torch.arange(3, 13)[None])[0, :, 1].tolist()
    assert kept == [3, 4, 5, 6, 7, 8, 9, 1, 5, 7]
    assert set(replay.sample(ids[:1], 400, generator)[0, :, 1].tolist()) == set(kept)
    again = module.Replay(3, 10, 2, CPU)
    again.load(replay.state())
    assert torch.equal(again.rows, replay.rows) and torch.equal(again.count, replay.count)
    assert len(replay.state()["rows"]) == 5 + 7 + 10


def test_contexts_are_different_transitions_of_the_window():
    replay, generator = module.Replay(3, 40, 2, CPU), torch.Generator().manual_seed(0)
    fill(replay, [30, 30, 30])
    window = torch.tensor([[0, 30], [10, 5], [7, 0]])
    seen = [set(), set()]
    for _ in range(60):
        context, mask = module.draw_context(replay, window, torch.tensor([1, 0, 2]), 12, 1, 30, 2, generator)
        assert context.shape == (3, 12, 2) and mask.sum(1).tolist() == [5, 12, 0]
        for i, task in enumerate((1, 0)):
            drawn = context[i][mask[i] > 0]
            assert (drawn[:, 0] == task).all() and len(set(drawn[:, 1].tolist())) == len(drawn)  # no repetition
            seen[i] |= set(drawn[:, 1].tolist())
    assert seen == [set(range(10, 15)), set(range(30))]
    assert module.draw_context(replay, window, torch.tensor([0]), 12, 1, 30, 1, generator)[0].shape == (1, 12, 1)


def test_contexts_of_segments():
    """Runs of consecutive transitions, drawn without repetition; what lies beyond the window is masked."""
    replay, generator = module.Replay(2, 40, 2, CPU), torch.Generator().manual_seed(0)
    fill(replay, [30, 30])
    window, seen = torch.tensor([[3, 20], [10, 7]]), set()
    for _ in range(40):
        context, mask = module.draw_context(replay, window, torch.tensor([0, 1]), 11, 5, 20, 2, generator)
        first, second = context[0, :, 1].reshape(2, 5), context[1][mask[1] > 0][:, 1]
        assert context.shape == (2, 10, 2) and torch.equal(first, first[:, :1] + torch.arange(5))
        assert first[0, 0] != first[1, 0] and sorted(second.tolist()) == list(range(10, 17))
        seen |= set(first[:, 0].tolist())
    assert seen == {3, 8, 13, 18}


def test_context_window_reaches_back_over_collections():
    """The latest steps of all phases; while a task is explored, its belief still starts anew."""
    phases = {"prior": 20, "extra": 40}
    replay, window, *_ = play_phases(phases, times=3, context_window=100)
    assert replay.count[:3].tolist() == [180] * 3 and window[:3].tolist() == [[80, 100]] * 3
    *_, (mean, variance) = play_phases(phases, times=3)[3]
    *_, (again, _) = play_phases(phases, times=3, context_window=100)[3]
    assert torch.equal(mean, again) and not torch.equal(variance, torch.ones_like(variance))
    assert play_phases(phases, context_window=100)[1][:3].tolist() == [[0, 60]] * 3  # no more than there is


def play_phases(phases, env_id="PointRobot-v0", horizon=20, episodes=1, agent=None, n=3, times=1, context_window=0):
    """explore in the first n of 5 tasks; returns the replay, windows, rounds, and the beliefs that were acted on."""
    torch.manual_seed(0)
    agent = agent or module.Agent(2, 2, 5, Z, 16, 16)
    envs = module.make_envs(env_id, n * episodes, 1)
    obs, act = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    tasks, beliefs = envs.sample_tasks(5, np.random.default_rng(0)), []
    replay, window = module.Replay(5, 4000, 2 * obs + act + 3, CPU), torch.zeros(5, 2, dtype=torch.long)
    reward = "sparse" if env_id.startswith("Sparse") else "dense"

    def collect(mean, variance, rng):
        beliefs.append((mean, variance))
        return module.collect(mean, variance, tasks[:n], rng, agent, envs, horizon, reward)

    settings = {"size": 8, "segment": 1, "longest": 4000, "width": obs + act + 1}
    for k in range(times):
        beliefs.clear()
        rounds = module.explore(
            phases, torch.arange(n), replay, window, context_window, agent, collect, (1, "x", k), **settings
        )
    return replay, window, rounds, beliefs


def test_phases():
    phases = {"prior": 60, "posterior": 60, "extra": 50}
    replay, window, rounds, beliefs = play_phases(phases, times=2)
    assert len(rounds) == 3 + 3 + 3  # whole episodes
    assert replay.count.tolist() == [2 * 180] * 3 + [0] * 2
    assert window.tolist() == [[180, 120]] * 3 + [[0, 0]] * 2  # anew, and without the extra phase
    from_prior = [bool((mean == 0).all() and (variance == 1).all()) for mean, variance in beliefs]
    assert from_prior == [True] * 4 + [False] * 2 + [True] + [False] * 2  # each phase starts from the prior
    rows = replay.gather(torch.arange(3), torch.arange(180, 360).expand(3, -1))
    expected = torch.cat([module.to_rows(batch)[0] for batch in rounds], 1)
    assert torch.equal(rows, expected)
    replay, window, rounds, _ = play_phases(phases, episodes=2)
    assert len(rounds) == 2 + 2 + 2 and window[0].tolist() == [0, 160] and replay.count[0] == 240


def test_step_counts_of_the_paper():
    """Steps of the initial collection and of an iteration in the authors' code."""
    for env_id, initial, iteration in (("SparsePointRobot-v0", 16_000, 10_000), ("HalfCheetahVel-v0", 200_000, 5_000)):
        args = module.with_preset(module.Args(env_id=env_id, preset="paper"))
        horizon = 20 if "Point" in env_id else 200
        counts = [args.initial_steps, args.prior_steps, args.posterior_steps, args.extra_steps]
        assert all(steps % horizon == 0 for steps in counts)
        assert args.num_train_tasks * args.initial_steps == initial
        assert args.picked_tasks * sum(counts[1:]) == iteration
        assert (args.total_timesteps - initial) / iteration == 500


def test_main_collects_what_the_flags_say(train):
    flags = {"num_train_tasks": 6, "picked_tasks": 3, "prior_steps": 20, "posterior_steps": 20, "extra_steps": 20}
    folder, _ = train(module, initial_steps=40, total_timesteps=2 * 3 * 40 + 2 * 3 * 60, **flags)
    state = load(folder)
    assert state["iteration"] == 4 and state["global_step"] == 600 == state["replay"]["count"].sum()
    picks = (state["replay"]["count"] - 40) / 60
    assert picks.sum() == 6 and picks.max() <= 2  # without replacement: at most once in an iteration
    picked = state["replay"]["count"] > 40
    assert state["window"][:, 1].tolist() == [60 if x else 40 for x in picked]  # context_window
    for other in ({"context_window": 0}, {"warmup_iterations": 3}):
        folder, _ = train(module, initial_steps=40, total_timesteps=2 * 3 * 40 + 2 * 3 * 60, **(flags | other))
        assert load(folder)["window"][:, 1].tolist() == [40] * 6


def test_rows_hold_terminated_but_not_truncated():
    """Asymmetric ends episodes, each at its own step; half-cheetahs run into the time limit alone."""
    sys.path.insert(0, str(ROOT / "tests"))
    agent = module.Agent(3, 2, 6, Z, 8, 8)
    envs = module.make_envs("user_tasks:Asymmetric-v0", 4)
    tasks = envs.sample_tasks(4, np.random.default_rng(0))
    batch = module.collect(*agent.prior(4), tasks, np.random.default_rng(1), agent, envs, 12, "dense")
    rows, mask = module.to_rows(batch)
    for i, length in enumerate(tasks[:, 0].astype(int)):
        assert mask[i].sum() == length and rows[i, :length, -1].tolist() == [0] * (length - 1) + [1]
    envs = module.make_envs("user_tasks:Truncated-v0", 4)
    tasks[:, 0] = 9
    batch = module.collect(*agent.prior(4), tasks, np.random.default_rng(1), agent, envs, 12, "dense")
    rows, mask = module.to_rows(batch)
    assert mask.sum(1).tolist() == [4] * 4 and (rows[..., -1] == 0).all()  # at the limit of 4 the critics bootstrap


def test_next_observations_are_of_the_same_episode():
    replay, *_ = play_phases({"prior": 40})
    rows = replay.gather(torch.arange(3), torch.arange(40).expand(3, -1))
    obs, action, _, next_obs, reward, _ = rows.split(SIZES, -1)
    torch.testing.assert_close(next_obs, obs + 0.1 * action)  # at the last step too: not the start of the next episode
    torch.testing.assert_close(next_obs[:, :19], obs[:, 1:20])
    assert not torch.allclose(next_obs[:, 19], obs[:, 20]) and (reward < 0).all()


def test_sparse_rewards_are_for_the_context_only(train, monkeypatch):
    replay, _, rounds, _ = play_phases({"prior": 2000}, "SparsePointRobot-v0")
    tasks = module.make_envs("SparsePointRobot-v0", 1).sample_tasks(5, np.random.default_rng(0))
    rows = replay.gather(torch.arange(3), torch.arange(2000).expand(3, -1))
    *_, context_reward, next_obs, reward, _ = rows.split(SIZES, -1)
    distance = (next_obs - torch.as_tensor(tasks[:3]).float().unsqueeze(1)).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(reward, -distance)
    torch.testing.assert_close(context_reward, torch.where(distance <= 0.2, 1 - distance, 0.0))
    assert all(torch.equal(batch["rewards"], batch["sparse_reward"]) for batch in rounds)
    seen = []
    monkeypatch.setattr(module, "gradient_step", lambda *args, step=module.gradient_step, **kw: (
        seen.append(args), step(*args, **kw))[1])  # fmt: skip
    train(module, env_id="SparsePointRobot-v0")
    batch, context = seen[-1][2:4]
    assert (batch["dense_rewards"] < 0).all() and (context[..., 4] >= 0).all()


def test_rewards_of_context_and_score_can_differ(train):
    """Trained on dense rewards and tested on sparse ones: the encoder sees dense ones, the score is sparse."""
    _, metrics = train(module, env_id="SparsePointRobot-v0", train_reward="dense", test_reward="sparse")
    assert metrics["eval/return_after_0_episodes"] >= 0 > metrics["charts/episodic_return"]
    _, metrics = train(module, env_id="SparsePointRobot-v0", train_reward="sparse", test_reward="dense")
    assert metrics["eval/return_after_0_episodes"] < 0 <= metrics["charts/episodic_return"]


# ------------------------------------------------------------------------------------------------------------ meta-test


def meta_test(tasks, agent, steps=3, exploration=1, context="own", seed=1, reward="dense", deterministic=True):
    envs = module.make_envs("PointRobot-v0", len(tasks), 1)
    collect = partial(module.collect, agent=agent, envs=envs, horizon=20, reward="dense")
    settings = (len(tasks), 5, reward, steps, exploration, context, seed, deterministic)
    return torch.as_tensor(module.evaluate(tasks, agent, collect, *settings)["return"])


def test_a_task_is_tested_as_if_it_were_alone(lively):
    a, b, other = module.make_envs("PointRobot-v0", 1).sample_tasks(3, np.random.default_rng(5))
    alone = meta_test(np.stack([b]), lively)
    meta_test(np.stack([a]), lively)
    torch.testing.assert_close(meta_test(np.stack([b]), lively), alone, rtol=0, atol=0)  # nothing is left of a
    after_a, after_other = (meta_test(np.stack([first, b]), lively)[:, 1] for first in (a, other))
    torch.testing.assert_close(after_a, after_other, rtol=0, atol=0)


def test_the_belief_is_of_all_steps_seen(lively, monkeypatch):
    """After k episodes, of k sampled episodes of this task; before `exploration`, the prior."""
    tasks, seen = module.make_envs("PointRobot-v0", 1).sample_tasks(4, np.random.default_rng(5)), []
    belief, encoder = module.belief, lively.encoder

    def recorded(factors, mask):
        seen.append(factors)
        return belief(factors, mask)

    monkeypatch.setattr(module, "belief", recorded)
    rounds, collect = [], module.collect
    monkeypatch.setattr(module, "collect", lambda *a, **k: rounds.append(collect(*a, **k)) or rounds[-1])
    meta_test(tasks, lively, steps=4, exploration=2)
    assert [x.shape[1] for x in seen] == [40, 60, 80]
    sampled = rounds[:8:2]  # each followed by one with the mean action, which is only scored
    parts = [torch.cat([x["obs"], x["actions"], x["dense_rewards"][..., None]], -1) for x in sampled]
    context = torch.cat(parts, 2)
    torch.testing.assert_close(seen[-1], encoder(context[:, 0]))


def test_what_is_scored_does_not_change_the_context(train, monkeypatch):
    """Training has contexts of sampled actions; a point at rest gives equal factors, which count as evidence."""
    folder, _ = train(module)
    belief, contexts, scores = module.belief, {}, {}
    for deterministic in (True, False):
        seen = contexts[deterministic] = []
        monkeypatch.setattr(module, "belief", lambda *c, seen=seen: seen.append(c) or belief(*c))
        _, scores[deterministic] = train(module, evaluate=folder, num_eval_steps=3, deterministic_eval=deterministic)
    assert len(contexts[True]) == 3 and scores[True] != scores[False]
    for one, two in zip(contexts[True], contexts[False], strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_the_mean_action_is_scored_in_episodes_of_the_same_draws(lively):
    """z and start are those of the sampled episodes, only the actions have no noise."""
    tasks = module.make_envs("PointRobot-v0", 1).sample_tasks(3, np.random.default_rng(5))
    envs = module.make_envs("PointRobot-v0", 3, 1)
    play = partial(module.collect, *lively.prior(3), tasks, agent=lively, envs=envs, horizon=20, reward="dense")
    for deterministic in (True, False):
        batch = play(module.keyed_rng(1, "eval", 0), deterministic=deterministic)
        expected = module.episode_scores(batch)["return"]
        torch.testing.assert_close(meta_test(tasks, lively, deterministic=deterministic)[0], expected)


@pytest.mark.parametrize("exploration, first", [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_exploration_is_counted_in_episodes(train, monkeypatch, exploration, first):
    """With three episodes between updates, the belief is used once that many are over."""
    seen, belief = [], module.belief
    folder, _ = train(module, eval_episodes=3)
    monkeypatch.setattr(module, "belief", lambda factors, mask: seen.append(mask) or belief(factors, mask))
    train(module, evaluate=folder, num_eval_steps=3, exploration_episodes=exploration)
    assert [mask.shape[1] for mask in seen] == [3 * 10 * k for k in range(first, 4)]


def test_a_meta_test_that_never_uses_the_belief_is_refused(train, tmp_path):
    """Unless that is what was asked for: no context, or no update."""
    folder, _ = train(module)
    with pytest.raises(SystemExit, match=r"^error: --exploration-episodes 7: .* 2 x 3 episodes before .*$"):
        train(module, evaluate=folder, num_eval_steps=2, eval_episodes=3, exploration_episodes=7)
    for flags in ({"eval_context": "none", "num_eval_steps": 2}, {"num_eval_steps": 0}, {"num_eval_steps": 3}):
        train(module, evaluate=folder, eval_episodes=3, exploration_episodes=7, **flags)


def test_comparisons_at_meta_test(lively):
    tasks = module.make_envs("PointRobot-v0", 1).sample_tasks(6, np.random.default_rng(5))
    own, none, shuffled = (meta_test(tasks, lively, context=context) for context in ("own", "none", "shuffled"))
    assert torch.equal(own[0], none[0]) and torch.equal(own[0], shuffled[0])  # the first episode has no context
    assert not torch.allclose(own[1:], none[1:]) and not torch.allclose(own[1:], shuffled[1:])
    assert torch.equal(none, meta_test(tasks, lively, exploration=100))
    swapped = tasks[[0, 0, 0]]  # the contexts of equal tasks are not equal, but of the same task
    assert torch.equal(meta_test(swapped[:1], lively), meta_test(swapped[:1], lively, context="shuffled"))


def test_deterministic_evaluation(lively):
    envs = module.make_envs("PointRobot-v0", 3, 1)
    tasks = envs.sample_tasks(3, np.random.default_rng(0))
    play = partial(module.collect, *lively.prior(3), tasks, agent=lively, envs=envs, horizon=20, reward="dense")
    one, two = (play(rng=np.random.default_rng(7), deterministic=True) for _ in range(2))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    z = one["actions"][:, 0, 0].atanh()  # of the first step: the mean action of one z per episode
    assert not torch.allclose(z[0], z[1])
    noisy = play(rng=np.random.default_rng(7))
    assert torch.equal(noisy["obs"][:, :, 0], one["obs"][:, :, 0]) and not torch.equal(noisy["obs"], one["obs"])


def test_tasks_that_do_not_fill_the_ranks(lively):
    """Five tasks in six lanes: the last lane repeats the first task, and is not scored twice."""
    tasks = module.make_envs("PointRobot-v0", 1).sample_tasks(5, np.random.default_rng(5))
    envs = module.make_envs("PointRobot-v0", 6, 1)
    collect = partial(module.collect, agent=lively, envs=envs, horizon=20, reward="dense")
    scores = module.evaluate(tasks, lively, collect, 6, 5, "dense", 2, 1, "own", 1, True)
    assert scores["return"].shape == (3, 5) and (scores["return"] < 0).all()


# ---------------------------------------------------------------------------------------------------- flags and presets


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_presets(preset):
    families = [*module.POINT_FAMILIES, *module.MUJOCO_FAMILIES, "my_tasks:Reach-v0"]
    for env_id in families:
        args = module.with_preset(module.Args(env_id=env_id, preset=preset))
        unset = {name for name, value in vars(args).items() if value is None}
        assert unset == {"replay_size"}, env_id
        assert args.meta_batch_size <= args.num_train_tasks and args.picked_tasks <= args.num_train_tasks
        assert args.context_size <= args.prior_steps + args.posterior_steps
        assert (args.train_reward == args.test_reward == "sparse") == env_id.startswith("Sparse")
        assert args.num_eval_steps == (19 if env_id.startswith("Sparse") else 2)
        assert args.exploration_episodes <= args.num_eval_steps
        assert args.context_next_obs == ("RandParams" in env_id)
    assert module.with_preset(module.Args(gamma=0.5, preset=preset)).gamma == 0.5
    assert set(module.CPU) | set(module.PAPER) <= {*module.POINT_FAMILIES, *module.MUJOCO_FAMILIES, ""}


@pytest.mark.parametrize(
    "flags, part",
    [
        ({"meta_batch_size": 5}, "--meta-batch-size 5: more than --num-train-tasks 4"),
        ({"picked_tasks": 5}, "--picked-tasks 5: more than --num-train-tasks 4"),
        ({"context_size": 61}, "--context-size 61: more than the 60 steps that contexts are drawn from"),
        ({"context_segment": 17}, "--context-segment 17: more than --context-size 16"),
        ({"env_id": "user_tasks:Discrete-v0"}, "Discrete actions"),
        ({"num_train_tasks": 0}, "--num-train-tasks 0"),
        ({"replay_size": 39}, "--replay-size 39: less than the 40 steps"),
        ({"total_timesteps": 160}, "--total-timesteps 160: must be above the 160 steps of the initial collection"),
        ({"exploration_episodes": 3}, "--exploration-episodes 3: more than the 1 x 2 episodes"),
        ({"replay_size": 10**12}, "the replay does not fit"),
        ({"compile": True}, "--compile"),
    ],
)
def test_bad_input(train, tmp_path, flags, part):
    with pytest.raises(SystemExit) as end:
        train(module, **flags)
    assert str(end.value.code).startswith("error: ") and part in end.value.code and "\n" not in end.value.code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps, horizon, least", [(40, 10, 161), (30, 20, 161), (1, 10, 81)])
def test_a_budget_that_ends_before_the_first_gradient_step_is_refused(train, steps, horizon, least):
    """The result would be untrained; rounds of two episodes, all of them whole."""
    flags = {"picked_tasks": 1, "initial_steps": steps, "horizon": horizon}
    with pytest.raises(SystemExit, match=rf"^error: --total-timesteps {least - 1}: .* {least - 1} steps .*$"):
        train(module, total_timesteps=least - 1, **flags)
    _, metrics = train(module, total_timesteps=least, **flags)
    assert "eval/return_after_0_episodes" in metrics


def test_one_task_picked_at_a_time(train):
    folder, _ = train(module, picked_tasks=1)
    assert load(folder)["global_step"] == 320 == 4 * 40 + 4 * 40


@pytest.mark.parametrize("what", ["qf_loss nan", "qf_loss inf", "networks"])
def test_training_that_diverges_leaves_the_last_checkpoint(train, monkeypatch, what):
    """A step size that is too large; a loss that overflows; or the last gradient step, after which no loss tells."""
    folder, _ = train(module)
    saved, step = load(folder), module.gradient_step

    def poisoned(agent, *args, **kwargs):
        losses = step(agent, *args, **kwargs)
        if what == "networks":
            agent.actor.biases[-1].data.fill_(math.inf)
        return losses * (math.inf if what == "qf_loss inf" else 1)

    monkeypatch.setattr(module, "gradient_step", poisoned)
    saved["args"] |= {"gradient_steps": 1} if what == "networks" else {}
    saved["args"] |= {"learning_rate": 1e30} if what == "qf_loss nan" else {}
    torch.save(saved, folder / "checkpoint.pt")
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as end:
        train(module, resume=folder, total_timesteps=640, checkpoint_every=1)
    line = end.value.code
    assert line.startswith("error: ") and "\n" not in line and what in line and "--learning-rate" in line, line
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_the_replay_is_large_enough(train):
    """Without --replay-size nothing is overwritten: all of what was collected is in the checkpoint."""
    argv = [x for x in tiny(module, total_timesteps=1600, num_train_tasks=8, eval_every=100, exp_name="large")]
    at = argv.index("--replay-size")
    module.main(module.parse(module.Args, argv[:at] + argv[at + 2 :]))
    (folder,) = (p for p in __import__("pathlib").Path("runs").iterdir())
    state = load(folder)
    assert len(state["replay"]["rows"]) == state["replay"]["count"].sum() == state["global_step"] == 1600


RANK = """
import atexit, sys, torch
import pearl, test_pearl
torch.manual_seed(0)
if pearl.ranks()[1] > 1:
    torch.distributed.init_process_group("gloo")
    atexit.register(torch.distributed.destroy_process_group)  # as setup does
agent = pearl.Agent(2, 2, 5, test_pearl.Z, 16, 16).double()
batch, context, mask, noise = test_pearl.draws()
own = pearl.shard(test_pearl.N)
batch = {name: x[own].double() for name, x in batch.items()}
rest = context[own].double(), mask[own].double(), [x[own].double() for x in noise]
step = pearl.gradient_step(agent, test_pearl.optimizers(agent), batch, *rest, test_pearl.N, **test_pearl.SETTINGS)
if pearl.ranks()[0] == 0:
    torch.save(agent.state_dict(), sys.argv[1])
sys.argv[1:2] = []
if pearl.ranks()[1] > 1:
    pearl.main(pearl.parse(pearl.Args))
"""


def test_two_ranks(train, tmp_path):
    """One gradient step on the same batch is that of one process; a run of two saves all replays, and can go on."""
    (tmp_path / "rank.py").write_text(RANK)
    flags = {"num_train_tasks": 8, "num_test_tasks": 5, "total_timesteps": 640, "exp_name": "ranks"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "rank.py"]
    for command in ([sys.executable, "rank.py", "one.pt"], [*launcher, "two.pt", *tiny(module, **flags)]):
        result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=1e-8, atol=1e-8, msg=name)
    (folder,) = (tmp_path / "runs").iterdir()
    state = load(folder)
    count = state["replay"]["count"]
    assert len(count) == 8 and count.sum() == 640 == state["global_step"] == len(state["replay"]["rows"])
    assert state["window"].shape == (8, 2)
    train(module, resume=folder, total_timesteps=800)  # by one process
    assert load(folder)["global_step"] == 800


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_is_that_of_the_cpu():
    batch, context, mask, noise = draws()
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        agent = module.Agent(2, 2, 5, Z, 16, 16).to(device)
        on = [{name: x.to(device) for name, x in batch.items()}, context.to(device), mask.to(device)]
        losses = module.gradient_step(agent, optimizers(agent), *on, [x.to(device) for x in noise], N, **SETTINGS)
        results.append({"losses": losses.cpu()} | {name: x.cpu() for name, x in agent.state_dict().items()})
    for name, x in results[0].items():
        torch.testing.assert_close(results[1][name], x, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_equals_an_eager_one(train):
    flags = {"cuda": True, "gradient_steps": 8}
    states = [load(train(module, compile=compiled, **flags)[0])["agent"] for compiled in (False, True)]
    for name, x in states[0].items():
        torch.testing.assert_close(states[1][name], x, msg=name)


# ------------------------------------------------------------------------------------------ a family learned in seconds


class Sign(gym.Env):
    """A task is +1 or -1, a step's reward the task times the action: 0 without adaptation, up to 4 with it."""

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
    flags = {"meta_batch_size": 2, "num_train_tasks": 2, "picked_tasks": 2, "episodes_per_task": 1, "horizon": 4}
    flags |= {
        "initial_steps": 40,
        "prior_steps": 20,
        "posterior_steps": 20,
        "gradient_steps": 100,
        "batch_size": 32,
        "warmup_iterations": 1,
        "warmup_gradient_steps": 100,
    }
    flags |= {"hidden_size": 32, "encoder_size": 32, "context_size": 8, "learning_rate": 3e-3, "gamma": 0.5}
    flags |= {"num_test_tasks": 10, "exploration_episodes": 1, "total_timesteps": 6 * 80, "reward_scale": 20.0}
    flags |= {"tau": 0.05, "context_segment": 1, "context_window": 0}
    folder, metrics = train(module, env_id="Sign-v0", **flags)
    assert metrics["eval/return_after_1_episodes"] > 3 > 2 > metrics["eval/return_after_0_episodes"]
    _, shuffled = train(module, evaluate=folder, eval_context="shuffled")
    assert shuffled["eval/return_after_1_episodes"] < -2  # the other task's context makes the other action
    _, none = train(module, evaluate=folder, eval_context="none")
    assert none["eval/return_after_1_episodes"] < 2 and math.isfinite(none["eval/return_after_1_episodes"])

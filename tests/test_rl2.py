"""RL²: what the policy sees, credit over the trial, the loss, the paper's tasks, and small tasks of known answer."""

import inspect
import itertools
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from gymnasium.spaces import Box, Discrete
from rl2_references import bandit_optimum
from torch import nn
from user_tasks import Ragged

import rl2
from rl2 import Agent, Memory, collect, evaluate, gae, keyed_rng, make_trial_envs, moments, ppo_loss, update

BOX = Box(-1, 1, (4,))


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_agent(envs, separate_value=False, embedding_size=0):
    obs_size, action_space = envs.single_observation_space.shape[0], envs.single_action_space
    agent = Agent(obs_size, action_space, 30, 8, separate_value, embedding_size=embedding_size)
    for p in agent.parameters():  # as if trained: every path matters
        nn.init.normal_(p, std=0.5)
    agent.obs_std.fill_(1)
    agent.reward_mean, agent.reward_std = torch.tensor(-0.5), torch.tensor(0.25)
    return agent


@torch.no_grad()
def play(env_id, n=6, episodes=3, lanes=slice(None), horizon=None, reward="dense", deterministic=False, **net):
    """An agent, and the trials that it plays; with episodes that end early in the environments of user_tasks."""
    envs = make_trial_envs(env_id, n, lanes=lanes)
    tasks = envs.sample_tasks(n, np.random.default_rng(3))[lanes]
    torch.manual_seed(0)
    agent = make_agent(envs, **net)
    rng = keyed_rng(0, "test")
    return agent, *collect(agent, tasks, rng, envs, episodes, horizon or envs.horizon, reward, deterministic)


RAGGED = ["user_tasks:Matrix-v0", "user_tasks:Discrete-v0"]


# --------------------------------------------------------------------------------------------------------------- trials


@pytest.mark.parametrize("embedding_size", [0, 5])
@pytest.mark.parametrize("env_id", [*RAGGED, "PointRobot-v0"])
def test_what_the_policy_sees(env_id, embedding_size):
    """The last action, reward and end at every step but the first, across the ends of episodes, with no gaps.

    Rewards in their units, clipped to ±10. For an embedding the last observation too.
    """
    agent, batch, scores = play(env_id, embedding_size=embedding_size)
    last_size = agent.action_size + 2
    obs_size = agent.obs_mean.numel()
    last_obs = batch["inputs"][..., obs_size + last_size :]
    assert last_obs.shape[-1] == (obs_size if embedding_size else 0) and (last_obs[:, 0] == 0).all()
    ragged = env_id != "PointRobot-v0"
    assert ragged == (batch["mask"].sum(1).unique().numel() > 1)
    for trial in range(6):
        length = int(batch["mask"][trial].sum())
        assert length == scores["length"][trial].sum() and (batch["mask"][trial, :length] == 1).all()
        obs, last, last_obs = batch["inputs"][trial, :length].tensor_split([obs_size, obs_size + last_size], -1)
        assert torch.equal(last_obs[1:], obs[:-1]) or not embedding_size
        actions, rewards = batch["actions"][trial], batch["rewards"][trial]
        fed_back = torch.eye(3)[actions] if agent.discrete else actions.clamp(-1, 1)
        ends = torch.zeros(length)
        ends[scores["length"][trial].cumsum(0).long() - 1] = 1
        assert (last[0] == 0).all()
        torch.testing.assert_close(last[1:, :-2], fed_back[: length - 1])
        paid = ((rewards[: length - 1] + 0.5) / 0.25).clamp(-10, 10)
        torch.testing.assert_close(last[1:, -2], paid)
        torch.testing.assert_close(last[1:, -1], ends[:-1])
        starts = scores["length"][trial].cumsum(0).long()
        parts = [part.sum() for part in rewards[:length].tensor_split(starts[:-1])]
        torch.testing.assert_close(torch.stack(parts), scores["return"][trial])
    if env_id == "PointRobot-v0":  # the last reward of an episode arrives with the start of the next
        starts = batch["inputs"][:, [0, 20, 40], :2]
        assert starts.abs().max() <= 1 and len(starts.flatten().unique()) == 36
    if not agent.discrete:
        assert batch["actions"].abs().max() > 1, "clipping was not exercised"


@pytest.mark.parametrize("embedding_size", [0, 5])
@pytest.mark.parametrize("separate_value", [False, True])
@pytest.mark.parametrize("env_id", RAGGED)
def test_the_sequence_pass_repeats_what_acted(env_id, separate_value, embedding_size):
    """From h = 0 through the whole trial: the first minibatch's ratios are 1, and the values those acted with."""
    agent, batch, _ = play(env_id, separate_value=separate_value, embedding_size=embedding_size)
    calls = []
    hooks = [
        memory.gru.register_forward_hook(lambda _, args, __: calls.append(args[0].shape)) for memory in agent.memories
    ]
    dist, values, _ = agent(batch["inputs"], agent.initial_state(6))
    valid = batch["mask"] == 1
    logprobs = agent.distribution(dist).log_prob(batch["actions"])
    torch.testing.assert_close(logprobs[valid], batch["logprobs"][valid])
    torch.testing.assert_close(values[valid], batch["values"][valid])
    shape = (*batch["mask"].shape, embedding_size or agent.input_size)
    assert calls == [shape] * (1 + separate_value), "one call a net, no loop over time"
    for hook in hooks:
        hook.remove()
    wrong = agent(batch["inputs"], agent.initial_state(6) + 0.1)[0]
    assert not torch.allclose(wrong[:, 0], dist[:, 0])


def test_a_trial_starts_from_the_initial_state(monkeypatch):
    states = []
    forward = Agent.forward

    def record(agent, inputs, state):
        states.append(state.clone())
        return forward(agent, inputs, state)

    monkeypatch.setattr(Agent, "forward", record)
    agent, *_ = play("PointRobot-v0", episodes=2)
    assert len(states) == 40 and torch.equal(states[0], agent.initial_state(6)) and (states[0] == 0).all()
    assert all((state != 0).all() for state in states[1:])  # the second episode's first among them


def test_the_first_reward_reaches_the_last_action():
    agent, batch, _ = play("PointRobot-v0", episodes=3)
    inputs = batch["inputs"].requires_grad_()
    agent(inputs, agent.initial_state(6))[0][:, -1].sum().backward()
    assert (inputs.grad[:, 1, -2] != 0).all()


def test_sampled_and_most_likely_actions():
    for env_id in RAGGED:
        agent, batch, _ = play(env_id, deterministic=True)
        dist, valid = agent(batch["inputs"], agent.initial_state(6))[0], batch["mask"] == 1
        modes = dist.argmax(-1) if agent.discrete else dist[..., :4]
        torch.testing.assert_close(batch["actions"][valid], modes[valid])
    agent, batch, _ = play("Bandit3Arms4-v0", n=20_000, episodes=1)
    dist = agent(batch["inputs"][:1, :1], agent.initial_state(1))[0][0, 0].softmax(-1)
    shares = torch.eye(3)[batch["actions"][:, 0]].mean(0)
    torch.testing.assert_close(shares, dist, atol=4 * (0.25 / 20_000) ** 0.5, rtol=0)
    agent, batch, _ = play("PointRobot-v0", n=20_000, episodes=1, horizon=1)
    dist = agent(batch["inputs"], agent.initial_state(20_000))[0][:, 0]
    z = (batch["actions"][:, 0] - dist[:, :2]) / dist[:, 2:].exp()
    assert z.mean().abs() < 0.03 and abs(z.std() - 1) < 0.03


@pytest.mark.parametrize("env_id", ["Bandit5Arms10-v0", "TabularMDP-v0", *RAGGED])
def test_a_share_of_the_trials_is_a_share_of_the_whole(env_id):
    _, whole, whole_scores = play(env_id)
    _, part, part_scores = play(env_id, lanes=slice(2, 5))
    longest = part["mask"].shape[1]
    for name in part:
        valid = part["mask"] == 1
        torch.testing.assert_close(part[name][valid], whole[name][2:5, :longest][valid])
    torch.testing.assert_close(part_scores, {name: x[2:5] for name, x in whole_scores.items()})


def test_sparse_rewards_and_success():
    _, dense, dense_scores = play("user_tasks:Matrix-v0")
    _, sparse, scores = play("user_tasks:Matrix-v0", reward="sparse")  # 1 at the first, third, … step of an episode
    expected = ((scores["length"] + 1) / 2).floor()
    torch.testing.assert_close(scores["return"], expected)
    assert (dense_scores["return"] < 0).all() and (scores["success"] == 1).all()
    assert set(sparse["rewards"].unique().tolist()) == {0.0, 1.0} and (dense["rewards"] <= 0).all()


# ---------------------------------------------------------------------------------------------- credit, loss and update


def test_gae_is_the_sum_over_the_rest_of_the_trial():
    """Through the ends of episodes, γ and λ a factor a step, V = 0 after the trial and nowhere else."""
    _, batch, scores = play("user_tasks:Matrix-v0")
    gamma, lam = 0.9, 0.7
    advantages = gae(batch["rewards"], batch["values"], batch["mask"], gamma, lam)
    for trial in range(6):
        length = int(scores["length"][trial].sum())
        r, v = batch["rewards"][trial], torch.cat([batch["values"][trial, :length], torch.zeros(1)])
        for t in range(length):
            deltas = [(gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s]) for s in range(t, length)]
            torch.testing.assert_close(advantages[trial, t], sum(deltas))
    assert (advantages[batch["mask"] == 0] == 0).all()


def test_moments_of_the_valid_steps():
    """Small ones too; a standard deviation of 1 for what varies by rounding alone."""
    mask = (torch.rand(5, 7) > 0.3).double()
    for scale in (3, 3e-7):
        x = scale * (torch.randn(5, 7) + 2)
        valid = x[mask == 1]
        expected = torch.stack([valid.mean(), valid.std(correction=0)])
        torch.testing.assert_close(torch.stack(moments(x, mask)), expected, atol=0, rtol=1e-9)
    for constant in (0, 0.1, -1e-7, 1e7 / 3):
        mask = torch.ones(1000, 100, dtype=torch.float32)
        assert moments(constant * mask, mask)[1] == 1


def test_the_initial_weights():
    """Gates start with a unit variance from standardised inputs; units forget over 1 step, 2, … and the trial."""
    for space, width in ((BOX, 4), (Discrete(6), 1)):
        gru = (agent := Agent(10, space, 50, 64)).memories[0].gru
        inputs = torch.randn(1000, agent.input_size)
        inputs[:, 10:-2] = agent.feedback(torch.randint(6, (1000,)) if agent.discrete else torch.ones(1000, width))
        inputs[:, -2:] = 1
        assert abs((inputs @ gru.weight_ih_l0.T).square().mean() - 1) < 0.2
        nn.init.zeros_(gru.weight_hh_l0)
        _, state = gru(torch.zeros(1, 1, agent.input_size), torch.ones(1, 1, 64))
        kept = state.flatten()
        torch.testing.assert_close(kept / (1 - kept), torch.linspace(1, 49, 64))
    Agent(3, BOX, 1, 8)  # a trial of one step
    agent = Agent(10, Discrete(6), 50, 64, embedding_size=500)  # of inputs with a squared norm of 10 + 1 + 1 + 1 + 10
    memory, inputs = agent.memories[0], torch.randn(1000, agent.input_size)
    inputs[:, 10:-10] = torch.cat([torch.eye(6)[torch.randint(6, (1000,))], torch.ones(1000, 2)], -1)
    features = memory.embedding(inputs)
    assert abs(features.square().mean() - 2) < 0.4
    assert abs((features @ memory.gru.weight_ih_l0.T).square().mean() - 2) < 0.4


def test_memory_with_an_embedding():
    """A ReLU layer, a GRU, and a ReLU layer on its output and the input."""
    memory, inputs = Memory(3, 4, 5), torch.randn(2, 6, 3)
    features, state = memory(inputs, torch.ones(1, 2, 4))
    (first, _), (second, _) = memory.embedding, memory.reader
    remembered, after = memory.gru((inputs @ first.weight.T + first.bias).relu(), torch.ones(1, 2, 4))
    expected = (torch.cat([remembered, inputs], -1) @ second.weight.T + second.bias).relu()
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(state, after)


def test_the_units_of_observations_rewards_and_values(train):
    """Of the first iteration, which does not train; later ones leave them, resumed or not."""
    torch.set_default_dtype(torch.float32)
    (part, _), (whole, _) = (train(rl2, total_timesteps=n * 160, gamma=0.9) for n in (1, 3))
    first, later = load(part)["agent"], load(whole)["agent"]
    resumed = load(train(rl2, resume=part, total_timesteps=3 * 160)[0])["agent"]
    assert all(torch.equal(resumed[name], x) for name, x in later.items())
    envs = make_trial_envs("PointRobot-v0", 8)
    tasks = envs.sample_tasks(8, np.random.default_rng([0, 0, 1]))
    torch.manual_seed(1)
    agent = Agent(2, envs.single_action_space, 20, 8)
    with torch.no_grad():
        batch, _ = collect(agent, tasks, keyed_rng(1, "train", 1), envs, 2, 10, "dense")
    returns = torch.stack([sum(0.9**k * batch["rewards"][:, t + k] for k in range(20 - t)) for t in range(20)])
    obs, rewards = batch["obs"].flatten(0, 1), batch["rewards"]
    assert (batch["inputs"][..., [0, 1, 4]] == 0).all(), "fed in before their units are known"
    for name, p in agent.named_parameters():
        assert torch.equal(first[name], p) and not torch.equal(later[name], p)
    for saved in (first, later):
        torch.testing.assert_close(
            torch.stack([saved["obs_mean"], saved["obs_std"]]), torch.stack([obs.mean(0), obs.std(0, correction=0)])
        )
        for name, x in (("reward", rewards), ("value", returns)):
            torch.testing.assert_close(saved[f"{name}_mean"], x.mean())
            torch.testing.assert_close(saved[f"{name}_std"], x.std(correction=0))
    agent.obs_mean[:], agent.obs_std[:] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1e-3])
    agent.value_mean, agent.value_std = torch.tensor(5.0), torch.tensor(7.0)
    with torch.no_grad():
        scaled, _ = collect(agent, tasks, keyed_rng(1, "train", 1), envs, 1, 1, "dense")
    starts = batch["obs"][:, 0]
    torch.testing.assert_close(scaled["inputs"][:, 0, 0], (starts[:, 0] - 1) / 3)
    assert (scaled["inputs"][:, 0, 1] == -10).all()
    features = agent.memories[0].gru(scaled["inputs"])[0]
    torch.testing.assert_close(scaled["values"], 5 + 7 * agent.critic(features).squeeze(-1))


class InUnits(rl2.PointEnvs):
    """PointRobot-v0, its rewards and observations in other units."""

    def __init__(self, pay, length, *args):
        self.pay, self.length = pay, length
        super().__init__("PointRobot-v0", *args)

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, self.pay * rewards, *rest

    def _obs(self):
        return self.length * super()._obs()


@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.parametrize("pay, length", [(1e4, 1), (1e-2, 1), (1e-7, 1), (1, 1e4), (1, 1e-4)])
def test_learning_does_not_depend_on_units(train, monkeypatch, pay, length, normalize_advantage):
    """Rewards or observations times a constant: the same parameters, and so the same play."""
    runs = []
    for units in ((1, 1), (pay, length)):

        def make(env_id, n, num_threads, lanes, units=units):
            return InUnits(*units, n, lanes)

        monkeypatch.setattr(rl2, "make_trial_envs", make)
        flags = {"normalize_advantage": normalize_advantage, "embedding_size": 8}
        folder, metrics = train(rl2, total_timesteps=5 * 160, **flags)
        agent = load(folder)["agent"]
        measured = ("obs_", "reward_", "value_")
        learned = {name: x for name, x in agent.items() if not name.startswith(measured)}
        runs.append((learned, metrics["eval/return_after_1_episodes"] / units[0]))
    torch.testing.assert_close(runs[1], runs[0], atol=0, rtol=1e-6)


def prepared(env_id, **flags):
    agent, batch, scores = play(env_id, **flags)
    agent.value_mean, agent.value_std = torch.tensor(0.3), torch.tensor(2.0)
    batch["advantages"], batch["returns"] = torch.randn(2, *batch["mask"].shape)
    batch["logprobs"] = batch["logprobs"] + 0.4 * torch.randn(batch["mask"].shape)  # ratios on both sides of the clip
    return agent, batch, scores


WEIGHTS = {"clip_coef": 0.2, "vf_coef": 0.7, "ent_coef": 0.03}


@pytest.mark.parametrize("env_id", RAGGED)
def test_the_loss(env_id):
    agent, batch, _ = prepared(env_id)
    loss, parts = ppo_loss(agent, batch, batch["mask"].sum(), **WEIGHTS)
    dist, values, _ = agent(batch["inputs"], agent.initial_state(6))
    total, n, clipped, kl = 0, 0, 0, 0
    for i, t in itertools.product(*map(range, batch["mask"].shape)):
        if batch["mask"][i, t]:
            distribution = agent.distribution(dist[i, t])
            ratio = (distribution.log_prob(batch["actions"][i, t]) - batch["logprobs"][i, t]).exp()
            a = batch["advantages"][i, t]
            surrogate = min(ratio * a, (1.2 if a > 0 else 0.8) * a)
            total += (
                -surrogate
                + 0.7 / 2 * ((values[i, t] - batch["returns"][i, t]) / 2) ** 2
                - 0.03 * distribution.entropy()
            )
            n, clipped, kl = n + 1, clipped + (abs(ratio - 1) > 0.2), kl + ratio - 1 - ratio.log()
    torch.testing.assert_close(loss, total / n)
    torch.testing.assert_close(parts[3:], torch.stack([kl / n, clipped / n]))


def test_trials_do_not_meet_in_the_loss():
    agent, batch, _ = prepared("user_tasks:Matrix-v0")
    inputs = batch["inputs"].requires_grad_()
    loss = ppo_loss(agent, batch, 1, **WEIGHTS)[0]
    (grads,) = torch.autograd.grad(loss, inputs)
    changed = {name: x.detach().clone() for name, x in batch.items()}
    for name in ("inputs", "advantages", "returns", "logprobs"):
        changed[name][2] += 0.1
    changed["inputs"].requires_grad_()
    (other,) = torch.autograd.grad(ppo_loss(agent, changed, 1, **WEIGHTS)[0], changed["inputs"])
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(grads[rest], other[rest]) and not torch.equal(grads[2], other[2])
    losses = [ppo_loss(agent, {name: x[[i]] for name, x in batch.items()}, 1, **WEIGHTS)[0] for i in range(6)]
    torch.testing.assert_close(sum(losses), loss)


def test_what_follows_the_end_of_a_trial_is_ignored():
    agent, batch, _ = prepared("user_tasks:Matrix-v0")
    poisoned = {name: torch.where(batch["mask"] == 1, x, 1e6) for name, x in batch.items() if x.dim() == 2}
    poisoned = batch | poisoned | {"mask": batch["mask"]}
    for b in (batch, poisoned):
        loss, _ = ppo_loss(agent, b, 1, **WEIGHTS)
        b["gradient"] = torch.autograd.grad(loss, list(agent.parameters()))
    assert all(map(torch.equal, batch["gradient"], poisoned["gradient"]))


def test_a_value_net_of_its_own():
    agent, batch, _ = prepared("user_tasks:Matrix-v0", separate_value=True)
    for weight, moved, at_rest in ((0, 1, 0), (1, 0, 1)):  # the value error alone, and all but the value error
        weighted = batch | {"advantages": batch["advantages"] * weight}
        loss, _ = ppo_loss(agent, weighted, 1, clip_coef=0.2, vf_coef=1 - weight, ent_coef=weight)
        grads = [torch.autograd.grad(loss, list(gru.parameters()), retain_graph=True) for gru in agent.memories]
        assert all((g == 0).all() for g in grads[at_rest]) and all((g != 0).any() for g in grads[moved])


def test_every_trial_once_an_epoch(monkeypatch):
    agent, batch, _ = prepared("user_tasks:Matrix-v0", n=10)
    batch["index"] = torch.arange(10)[:, None].expand_as(batch["mask"])
    met, counts = [], []

    def loss(agent, minibatch, count):
        met.append(minibatch["index"][:, 0].tolist())
        assert count == minibatch["mask"].sum()
        counts.append(count)
        return ppo_loss(agent, minibatch, count, **WEIGHTS)

    before = [p.clone() for p in agent.parameters()]
    losses = update(agent, torch.optim.Adam(agent.parameters()), batch, np.random.default_rng(0), 10, 3, 4, 0.5, loss)
    epochs = [list(itertools.chain(*met[i : i + 4])) for i in (0, 4, 8)]
    assert len(met) == 12 and all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and {len(x) for x in met} == {2, 3}
    assert all(not torch.equal(p, q) for p, q in zip(agent.parameters(), before, strict=True))
    assert losses.keys() == {f"losses/{x}" for x in ("pg_loss", "value_loss", "entropy", "approx_kl", "clipfrac")}


def test_the_gradient_is_clipped():
    agent, batch, _ = prepared("user_tasks:Matrix-v0")
    steps = []
    for max_grad_norm in (1e-3, 1e9):
        optimizer = torch.optim.SGD(agent.parameters(), lr=1)
        saved = {name: x.clone() for name, x in agent.state_dict().items()}
        loss = partial(ppo_loss, **WEIGHTS)
        update(agent, optimizer, batch, np.random.default_rng(0), 6, 1, 1, max_grad_norm, loss)
        steps.append(torch.cat([(x - saved[name]).flatten() for name, x in agent.state_dict().items()]))
        agent.load_state_dict(saved)
    assert steps[0].norm() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(steps[0] / steps[0].norm(), steps[1] / steps[1].norm())


def test_annealing(train, monkeypatch):
    """Step size and the weight of the entropy fall to 0, by a fifth in each of five iterations; or not at all."""
    settings = {"env_id": "Bandit2Arms5-v0", "meta_batch_size": 10, "num_minibatches": 2, "horizon": 5}
    settings |= {"total_timesteps": 250, "episodes_per_task": 1, "num_test_tasks": 10}
    settings |= {"learning_rate": 0.01, "ent_coef": 0.1}
    for anneal, left in ((True, [0.8, 0.6, 0.4, 0.2]), (False, [1, 1, 1, 1])):  # the first one only measures units
        seen, real = [], rl2.update

        def spy(agent, optimizer, *args, loss, real=real, seen=seen, **kwargs):
            seen.append((optimizer.param_groups[0]["lr"], loss.keywords["ent_coef"]))
            return real(agent, optimizer, *args, loss=loss, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(rl2, "update", spy)
            train(rl2, anneal=anneal, **settings)
        np.testing.assert_allclose(seen, [(0.01 * x, 0.1 * x) for x in left])


def test_a_gradient_that_is_not_finite():
    agent, batch, _ = prepared("user_tasks:Matrix-v0")
    batch["advantages"][0, 0] = torch.nan
    with pytest.raises(SystemExit, match="the gradient is not finite"):
        update(
            agent,
            torch.optim.SGD(agent.parameters(), lr=0.1),
            batch,
            np.random.default_rng(0),
            6,
            1,
            1,
            0.5,
            partial(ppo_loss, **WEIGHTS),
        )


# ------------------------------------------------------------------------------------------------------------ meta-test


def test_scores_of_the_meta_test():
    """In the order of the tasks, episodes in parts, the last group wrapped around."""
    tasks, met = np.arange(7.0)[:, None], []

    def trials(tasks, rng):
        met.append((tasks[:, 0].tolist(), rng.integers(100)))
        scores = torch.as_tensor(10 * tasks + np.arange(4))  # 10 x task + episode
        return {}, {"return": scores, "length": scores, "success": scores / 100}

    scores = evaluate(tasks, trials, group=3, num_scores=2, seed=5)
    assert [group for group, _ in met] == [[0, 1, 2], [3, 4, 5], [6, 0, 1]] and len({draw for _, draw in met}) == 3
    np.testing.assert_array_equal(scores["return"], 10 * tasks[:, 0] + np.array([[0.5], [2.5]]))
    np.testing.assert_allclose(scores["success"], scores["return"] / 100)
    assert scores.keys() == {"return", "success"}


def test_what_a_trial_comes_to(train, capsys):
    torch.set_default_dtype(torch.float32)
    _, metrics = train(rl2, env_id="Bandit2Arms5-v0", horizon=0, num_test_tasks=50, episodes_per_task=3)
    tasks = make_trial_envs("Bandit2Arms5-v0", 1).sample_test_tasks(50, np.random.default_rng([0, 1]))
    # two scored episodes, as num_eval_steps is 1
    assert metrics["eval/trial_return"] == pytest.approx(
        metrics["eval/return_after_0_episodes"] + metrics["eval/return_after_1_episodes"]
    )
    assert metrics["eval/regret"] == pytest.approx(10 * tasks.max(1).mean() - metrics["eval/trial_return"])
    assert f"regret: {metrics['eval/regret']:.3f} ± " in capsys.readouterr().out
    _, metrics = train(rl2, env_id="PointRobot-v0", episodes_per_task=4, num_eval_steps=1, eval_episodes=2)
    first, second = (metrics[f"eval/return_after_{n}_episodes"] for n in (0, 2))
    assert metrics["eval/trial_return"] == pytest.approx(2 * (first + second)) and "eval/regret" not in metrics
    assert metrics["eval/improvement"] == pytest.approx(second - first)
    assert f"improvement: {second - first:.3f} ± " in capsys.readouterr().out
    _, metrics = train(rl2, env_id="Bandit2Arms5-v0", horizon=0, num_test_tasks=50, num_eval_steps=0)
    assert "eval/improvement" not in metrics


def test_a_family_of_your_own_is_no_bandit_by_its_name(train, monkeypatch):
    """It has no best arm that regret could be measured by."""
    with monkeypatch.context() as patch:
        patch.setattr(gym.envs.registration, "registry", dict(gym.registry))
        gym.register("BanditMine-v0", Ragged, max_episode_steps=12)
        _, metrics = train(rl2, env_id="BanditMine-v0")
    assert "eval/trial_return" in metrics and "eval/regret" not in metrics


@pytest.mark.parametrize(
    "env_id, expected",
    [
        ("Bandit2Arms3-v0", (1000, 1, 20_000, 0.3, 0)),
        ("TabularMDP-v0", (500, 10, 20_000, 0.3, 9)),
        ("PointRobot-v0", (100, 2, 40, 0.95, 1)),
        ("BanditMine-v0", (100, 2, 40, 0.95, 1)),
        ("Bandits:Bandit2Arms3-v0", (100, 2, 40, 0.95, 1)),
    ],
)
def test_what_is_not_given(env_id, expected):
    names = ("meta_batch_size", "episodes_per_task", "num_test_tasks", "gae_lambda", "num_eval_steps")
    args = rl2.with_defaults(rl2.Args(env_id=env_id))
    assert tuple(getattr(args, name) for name in names) == expected
    given = dict.fromkeys(names, 7) | {"gae_lambda": 0, "num_eval_steps": 0}
    args = rl2.with_defaults(rl2.Args(env_id=env_id, **given))
    assert {name: getattr(args, name) for name in names} == given
    args = rl2.with_defaults(rl2.Args(env_id=env_id, episodes_per_task=6, eval_episodes=2))
    assert args.num_eval_steps == 2


def test_more_minibatches_than_trials(train, tmp_path):
    with pytest.raises(SystemExit, match="error: --num-minibatches 9: more than the 8 trials"):
        train(rl2, num_minibatches=9)
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------- the paper's task families


def test_bandits():
    envs, n = make_trial_envs("Bandit3Arms4-v0", 30_000), 30_000
    tasks = envs.sample_tasks(n, np.random.default_rng(0))
    assert tasks.shape == (n, 3) and envs.horizon == 4 and envs.single_action_space == Discrete(3)
    assert tasks.min() > 0 and tasks.max() < 1 and abs(tasks.mean() - 0.5) < 0.005 and abs(tasks.var() - 1 / 12) < 0.002
    obs, _ = envs.reset(seed=1, options={"task": tasks})
    assert obs.shape == (n, 0)
    paid = []
    for arm in (0, 1, 2, 1):
        obs, rewards, terminated, truncated, info = envs.step(np.full(n, arm))
        assert obs.shape == (n, 0) and not terminated.any() and not truncated.any() and info["episode_end"].all()
        assert set(rewards) == {0.0, 1.0} and abs((rewards - tasks[:, arm]).mean()) < 0.012
        assert abs(np.corrcoef(rewards, tasks[:, arm])[0, 1] - (1 / 12) ** 0.5 / 0.5) < 0.02
        paid.append(rewards)
    assert abs(np.corrcoef(paid[1], paid[3])[0, 1] - 1 / 3) < 0.02  # only p in common: cov = var p = 1/12
    assert bandit_optimum(((0, 0),) * 2, 10) == pytest.approx(6.0218, abs=1e-4)


def test_tabular_mdps():
    envs, n = make_trial_envs("TabularMDP-v0", 4000), 4000
    tasks = envs.sample_tasks(n, np.random.default_rng(0))
    mean, p = tasks[:, :50].reshape(n, 10, 5), tasks[:, 50:].reshape(n, 10, 5, 10)
    assert abs(mean.mean() - 1) < 0.01 and abs(mean.std() - 1) < 0.01
    np.testing.assert_allclose(p.sum(-1), 1)
    assert abs(p.var() - 9 / 1100) < 1e-4  # of an entry of Dirichlet(1, …, 1): (1/10)(9/10)/11
    returns = {}
    values = np.zeros((n, 10))
    greedy = []
    for _ in range(10):  # value iteration, the last step first
        q = mean + np.einsum("nsak,nk->nsa", p, values)
        values, greedy = q.max(-1), [q.argmax(-1), *greedy]
    random = np.random.default_rng(1)
    for name in ("known", "random"):
        obs, _ = envs.reset(seed=2, options={"task": tasks})
        np.testing.assert_array_equal(obs, np.eye(10)[np.zeros(n, int)])
        total = np.zeros(n)
        for t in range(10):
            state = obs.argmax(1)
            actions = greedy[t][np.arange(n), state] if name == "known" else random.integers(5, size=n)
            expected, chances = mean[np.arange(n), state, actions], p[np.arange(n), state, actions]
            obs, rewards, terminated, truncated, _ = envs.step(actions)
            assert (obs.sum(1) == 1).all() and not terminated.any() and not truncated.any()
            assert abs((rewards - expected).mean()) < 0.06 and abs((rewards - expected).std() - 1) < 0.05
            # the next state is as likely as P says: its mean probability is that of a draw from P
            hit = chances[np.arange(n), obs.argmax(1)].mean()
            assert abs(hit - (chances**2).sum(1).mean()) < 0.01
            total += rewards
        returns[name] = total.mean()
    assert returns["random"] == pytest.approx(10, abs=0.3) and returns["known"] == pytest.approx(21.83, abs=0.25)
    assert values[:, 0].mean() == pytest.approx(21.83, abs=0.2)


@pytest.mark.parametrize("env_id", ["Bandit0Arms5-v0", "Bandit5Arms0-v0", "Bandit5Arms-v0", "BanditArms-v0"])
def test_bandits_that_are_none(env_id):
    with pytest.raises(SystemExit, match=f"error: no tasks {env_id}"):
        make_trial_envs(env_id, 2)


# ------------------------------------------------------------------------------------------------ tasks of known answer


class Probe(rl2.TaskEnvs):
    """Episodes of one step or two, in which a bit of the task is to be found out; nothing is observed."""

    def __init__(self, num_envs, lanes, horizon, num_actions):
        nothing = Box(0, 0, (0,), np.float64)
        super().__init__("Probe-v0", num_envs, lanes, horizon, nothing, Discrete(num_actions))

    def sample_tasks(self, n, rng):
        return rng.permutation(np.arange(n) % 2)[:, None]

    def reset(self, *, seed=None, options=None):
        self.bit, self.t = options["task"][:, 0], 0
        return np.zeros((self.num_envs, 0)), {}

    def step(self, actions):
        self.t += 1
        never = np.zeros(self.num_envs, bool)
        return np.zeros((self.num_envs, 0)), self.pay(actions), never, never, {}


class LastStep(Probe):
    """Only the second step pays: 1 if the action is the bit, else -1. Two episodes: 0 and then 1."""

    def pay(self, actions):
        return np.where(actions == self.bit, 1.0, -1.0) * (self.t == 2)


class Guess(Probe):
    """One step. Guess the bit (0, 1): 10 if right, -13 if wrong. Or pass (2): 0.

    Of two episodes, the first is worth a guess, which costs 1.5 on average, as it tells the bit for the second.
    """

    def pay(self, actions):
        return np.where(actions == 2, 0.0, np.where(actions == self.bit, 10.0, -13.0))


def train_on(probe, horizon, num_actions, monkeypatch, tmp_path, iterations=150, **flags):
    """Returns of the first and the second episode after training."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl2, "make_trial_envs", lambda env_id, n, threads, lanes: probe(n, lanes, horizon, num_actions))
    settings = {"meta_batch_size": 128, "hidden_size": 16, "num_threads": 1, "num_test_tasks": 2000, "eval_every": 1000}
    settings |= {"learning_rate": 5e-3, "gae_lambda": 0.95, "episodes_per_task": 2, "num_minibatches": 2} | flags
    steps = iterations * 128 * horizon * settings["episodes_per_task"]
    metrics = rl2.main(rl2.Args(env_id="Probe-v0", total_timesteps=steps, **settings))
    return metrics["eval/return_after_0_episodes"], metrics["eval/return_after_1_episodes"]


def test_the_last_reward_of_an_episode_is_known_in_the_next(monkeypatch, tmp_path):
    first, second = train_on(LastStep, 2, 2, monkeypatch, tmp_path)
    assert abs(first) < 0.15 and second > 0.9


def test_and_is_not_if_it_is_lost(monkeypatch, tmp_path):
    forward = Agent.forward

    def forget_at_the_boundary(agent, inputs, state):
        last = inputs[..., -agent.action_size - 2 :]
        lost = torch.cat([inputs[..., : -agent.action_size - 2], last * (1 - inputs[..., -1:])], -1)
        return forward(agent, lost, state)

    monkeypatch.setattr(Agent, "forward", forget_at_the_boundary)
    first, second = train_on(LastStep, 2, 2, monkeypatch, tmp_path)
    assert abs(first) < 0.15 and abs(second) < 0.15


def test_an_action_is_credited_with_what_later_episodes_pay(monkeypatch, tmp_path):
    first, second = train_on(Guess, 1, 3, monkeypatch, tmp_path, ent_coef=0.1, anneal=True)
    assert first == pytest.approx(-1.5, abs=0.8) and second > 9.5


def test_and_is_not_if_credit_ends_with_the_episode(monkeypatch, tmp_path):
    monkeypatch.setattr(rl2, "gae", lambda rewards, values, mask, gamma, gae_lambda: (rewards - values) * mask)
    first, second = train_on(Guess, 1, 3, monkeypatch, tmp_path, ent_coef=0.1, anneal=True)
    assert abs(first) < 0.1 and abs(second) < 0.1


def test_two_arms(monkeypatch, tmp_path):
    """Between greedy play and the Bayes optimum; and what a policy that learns nothing about its arms gets, blind."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    settings = {"env_id": "Bandit2Arms6-v0", "meta_batch_size": 500, "hidden_size": 16, "learning_rate": 5e-3}
    settings |= {"total_timesteps": 500 * 6 * 100, "num_threads": 1, "eval_every": 1000}
    optimum, error = bandit_optimum(((0, 0),) * 2, 6), (6 / 4 / 20_000) ** 0.5
    score = rl2.main(rl2.Args(**settings))["eval/return_after_0_episodes"]
    assert optimum - 0.1 < score < optimum + 3 * error
    monkeypatch.setattr(Agent, "feedback", lambda agent, actions: torch.zeros(len(actions), 2))
    source, seen = inspect.getsource(rl2.collect), "in_units(tensor(rewards), "
    assert source.count(seen) == 1
    exec(source.replace(seen, f"0 * {seen}"), vars(rl2), scope := {})
    monkeypatch.setattr(rl2, "collect", scope["collect"])
    blind = rl2.main(rl2.Args(**settings))["eval/return_after_0_episodes"]
    assert blind == pytest.approx(3, abs=0.06)

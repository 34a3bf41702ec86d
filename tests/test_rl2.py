"""RL²: what the policy sees, credit over the trial, the loss, the paper's tasks, and small tasks of known answer."""

import itertools
from dataclasses import replace
from typing import ClassVar

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
from rl2 import (
    Agent,
    Args,
    Memory,
    collect,
    distribution,
    evaluate,
    gae,
    make_envs,
    ppo_loss,
    update,
)

BOX = Box(-1, 1, (4,))


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


RAGGED = ["user_tasks:Matrix-v0", "user_tasks:Discrete-v0"]


def set_units(units, mean, std):
    units.mean.copy_(torch.tensor(mean))
    units.std.copy_(torch.tensor(std))


def make_agent(envs, args):
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space, 30, args)
    for p in agent.parameters():  # as if trained: every path matters
        nn.init.normal_(p, std=0.5)
    agent.obs_units.std.fill_(1)
    set_units(agent.reward_units, -0.5, 0.25)
    return agent


def play(env_id, n=6, episodes=3, deterministic=False, **flags):
    """An agent, the trials that it plays, and their scores and lengths (N, E).

    Episodes end early in the environments of user_tasks, whose tasks say when.
    """
    rl2.register_own(env_id)
    envs = make_envs(env_id)
    flags = {"horizon": envs.horizon, "hidden_size": 8} | flags
    args = Args(env_id=env_id, seed=0, episodes_per_task=episodes, **flags)
    tasks = envs.sample_tasks(n, np.random.default_rng(3))
    torch.manual_seed(0)
    agent = make_agent(envs, args)
    batch, scores = collect(agent, tasks, ("test",), args, deterministic=deterministic)
    lengths = tasks[:, :1] if env_id in RAGGED else np.full((n, 1), args.horizon)
    return agent, batch, scores | {"length": torch.as_tensor(lengths).repeat(1, episodes)}


def pass_over(agent, batch):
    """The network's outputs on whole trials."""
    return agent(batch["inputs"], agent.initial_state(len(batch["inputs"])))


# --------------------------------------------------------------------------------------------------------------- trials


@pytest.mark.parametrize("embedding_size", [0, 5])
@pytest.mark.parametrize("env_id", [*RAGGED, "PointRobot-v0"])
def test_what_the_policy_sees(env_id, embedding_size):
    """The last action, reward and end at every step but the first, across the ends of episodes, with no gaps.

    Rewards in their units, clipped to ±10. For an embedding the last observation too.
    """
    agent, batch, scores = play(env_id, embedding_size=embedding_size)
    last_size = agent.action_size + 2
    obs_size = agent.obs_units.mean.numel()
    last_obs = batch["inputs"][..., obs_size + last_size :]
    assert last_obs.shape[-1] == (obs_size if embedding_size else 0) and (last_obs[:, 0] == 0).all()
    ragged = env_id != "PointRobot-v0"
    assert ragged == (batch["mask"].sum(1).unique().numel() > 1)
    for trial in range(6):
        length = int(batch["mask"][trial].sum())
        assert (
            length == scores["length"][trial].sum() and (batch["mask"][trial, :length] == 1).all()
        )
        obs, last, last_obs = batch["inputs"][trial, :length].tensor_split(
            [obs_size, obs_size + last_size], -1
        )
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
    if (
        env_id == "PointRobot-v0"
    ):  # the last reward of an episode arrives with the start of the next
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
    assert len(agent.memories) == 1 + separate_value
    hooks = [
        net.gru.register_forward_hook(lambda _, args, __: calls.append(args[0].shape))
        for net in agent.memories
    ]
    dist_params, values, _ = pass_over(agent, batch)
    valid = batch["mask"] == 1
    logprobs = distribution(dist_params, agent.discrete).log_prob(batch["actions"])
    torch.testing.assert_close(logprobs[valid], batch["logprobs"][valid])
    torch.testing.assert_close(values[valid], batch["values"][valid])
    shape = (*batch["mask"].shape, embedding_size or batch["inputs"].shape[-1])
    assert calls == [shape] * (1 + separate_value), "one call a net, no loop over time"
    for hook in hooks:
        hook.remove()
    wrong = agent(batch["inputs"], agent.initial_state(6) + 0.1)[0]
    assert not torch.allclose(wrong[:, 0], dist_params[:, 0])


def test_a_trial_starts_from_the_initial_state(monkeypatch):
    states = []
    forward = Agent.forward

    def record(agent, inputs, state):
        states.append(state.clone())
        return forward(agent, inputs, state)

    monkeypatch.setattr(Agent, "forward", record)
    agent, *_ = play("PointRobot-v0", episodes=2)
    assert len(states) == 40 and torch.equal(states[0], agent.initial_state(6))
    assert (states[0] == 0).all()
    assert all((state != 0).all() for state in states[1:])  # the second episode's first among them


def test_the_first_reward_reaches_the_last_action():
    agent, batch, _ = play("PointRobot-v0", episodes=3)
    inputs = batch["inputs"].requires_grad_()
    agent(inputs, agent.initial_state(6))[0][:, -1].sum().backward()
    assert (inputs.grad[:, 1, -2] != 0).all()


def test_sampled_and_most_likely_actions():
    for env_id in RAGGED:
        agent, batch, _ = play(env_id, deterministic=True)
        dist_params, valid = pass_over(agent, batch)[0], batch["mask"] == 1
        modes = dist_params.argmax(-1) if agent.discrete else dist_params[..., :4]
        torch.testing.assert_close(batch["actions"][valid], modes[valid])
    agent, batch, _ = play("Bandit3Arms4-v0", n=20_000, episodes=1)
    chances = agent(batch["inputs"][:1, :1], agent.initial_state(1))[0][0, 0].softmax(-1)
    shares = torch.eye(3)[batch["actions"][:, 0]].mean(0)
    torch.testing.assert_close(shares, chances, atol=4 * (0.25 / 20_000) ** 0.5, rtol=0)
    agent, batch, _ = play("PointRobot-v0", n=20_000, episodes=1, horizon=1)
    mean, log_std = pass_over(agent, batch)[0][:, 0].chunk(2, -1)
    z = (batch["actions"][:, 0] - mean) / log_std.exp()
    assert z.mean().abs() < 0.03 and abs(z.std() - 1) < 0.03


def test_every_pull_ends_an_episode():
    """So the policy is told; a state of an MDP does not."""
    _, batch, _ = play("Bandit3Arms4-v0", episodes=2)
    assert (batch["inputs"][:, 1:, -1] == 1).all() and batch["inputs"].shape[1] == 8
    _, batch, _ = play("TabularMDP-v0", episodes=2)
    assert (
        batch["inputs"][:, :, -1].sum(1).tolist() == [1] * 6
        and (batch["inputs"][:, 10, -1] == 1).all()
    )


def test_sparse_rewards_and_success():
    _, dense, dense_scores = play("user_tasks:Matrix-v0")
    _, sparse, scores = play(
        "user_tasks:Matrix-v0", train_reward="sparse"
    )  # 1 at the first, third, … step of an episode
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
            deltas = [
                (gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s])
                for s in range(t, length)
            ]
            torch.testing.assert_close(advantages[trial, t], sum(deltas))
    assert (advantages[batch["mask"] == 0] == 0).all()


def test_units_are_those_of_the_valid_steps():
    """Small ones too; a standard deviation of 1 for what varies by rounding alone."""
    mask = (torch.rand(5, 7) > 0.3).double()
    for scale in (3, 3e-7):
        x = scale * (torch.randn(5, 7) + 2)
        valid = x[mask == 1]
        expected = torch.stack([valid.mean(), valid.std(correction=0)])
        torch.testing.assert_close(torch.stack(rl2.spread(x, mask)), expected, atol=0, rtol=1e-9)
    for constant in (0, 0.1, -1e-7, 1e7 / 3):
        mask = torch.ones(1000, 100, dtype=torch.float32)
        assert rl2.spread(constant * mask, mask)[1] == 1


def test_the_initial_weights():
    """Gates start with a unit variance from standardised inputs; units forget over 1 step, 2, … and the trial."""
    args = Args(hidden_size=64)
    for space, width in ((BOX, 4), (Discrete(6), 6)):
        agent = Agent(10, space, 50, args)
        gru, size = agent.memories[0].gru, 10 + width + 2
        inputs = torch.randn(1000, size)
        actions = (
            torch.eye(6)[torch.randint(6, (1000,))] if agent.discrete else torch.ones(1000, width)
        )
        inputs[:, 10:-2] = actions
        inputs[:, -2:] = 1
        assert abs((inputs @ gru.weight_ih_l0.T).square().mean() - 1) < 0.2
        nn.init.zeros_(gru.weight_hh_l0)
        _, state = gru(torch.zeros(1, 1, size), torch.ones(1, 1, 64))
        kept = state.flatten()
        torch.testing.assert_close(kept / (1 - kept), torch.linspace(1, 49, 64))
    Agent(3, BOX, 1, args)  # a trial of one step
    # of inputs with a squared norm of 10 + 1 + 1 + 1 + 10
    memory = Agent(10, Discrete(6), 50, Args(hidden_size=64, embedding_size=500)).memories[0]
    inputs = torch.randn(1000, 10 + 6 + 2 + 10)
    inputs[:, 10:-10] = torch.cat(
        [torch.eye(6)[torch.randint(6, (1000,))], torch.ones(1000, 2)], -1
    )
    features = memory.embedding(inputs)
    assert abs(features.square().mean() - 2) < 0.4
    assert abs((features @ memory.gru.weight_ih_l0.T).square().mean() - 2) < 0.4


def test_memory_with_an_embedding():
    """A ReLU layer, a GRU, and a ReLU layer on its output and the input."""
    memory, inputs = Memory(3, Args(hidden_size=4, embedding_size=5)), torch.randn(2, 6, 3)
    features, state = memory(inputs, torch.ones(1, 2, 4))
    (first, _), (second, _) = memory.embedding, memory.reader
    remembered, after = memory.gru(
        (inputs @ first.weight.T + first.bias).relu(), torch.ones(1, 2, 4)
    )
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
    envs = make_envs("PointRobot-v0")
    tasks = envs.sample_tasks(8, np.random.default_rng([0, 0, 1]))
    torch.manual_seed(1)
    args = Args(env_id="PointRobot-v0", horizon=10, episodes_per_task=2, hidden_size=8)
    agent = Agent(2, envs.single_action_space, 20, args)
    batch, _ = collect(agent, tasks, ("train", 1), args)
    returns = torch.stack(
        [sum(0.9**k * batch["rewards"][:, t + k] for k in range(20 - t)) for t in range(20)]
    )
    obs, rewards = batch["obs"].flatten(0, 1), batch["rewards"]
    assert (batch["inputs"][..., [0, 1, 4]] == 0).all(), "fed in before their units are known"
    for name, p in agent.named_parameters():
        assert torch.equal(first[name], p) and not torch.equal(later[name], p)
    for saved in (first, later):
        torch.testing.assert_close(
            torch.stack([saved["obs_units.mean"], saved["obs_units.std"]]),
            torch.stack([obs.mean(0), obs.std(0, correction=0)]),
        )
        for name, x in (("reward", rewards), ("value", returns)):
            torch.testing.assert_close(saved[f"{name}_units.mean"], x.mean())
            torch.testing.assert_close(saved[f"{name}_units.std"], x.std(correction=0))
    set_units(agent.obs_units, [1, 2], [3, 1e-3])
    set_units(agent.value_units, 5, 7)
    scaled, _ = collect(agent, tasks, ("train", 1), replace(args, horizon=1, episodes_per_task=1))
    starts = batch["obs"][:, 0]
    torch.testing.assert_close(scaled["inputs"][:, 0, 0], (starts[:, 0] - 1) / 3)
    assert (scaled["inputs"][:, 0, 1] == -10).all()
    features = agent.memories[0].gru(scaled["inputs"])[0]
    torch.testing.assert_close(scaled["values"], 5 + 7 * agent.critic(features).squeeze(-1))


@pytest.mark.parametrize("mean, follows", [(1.9, False), (2.1, True), (-0.1, True)])
def test_units_follow_rewards_that_lie_a_deviation_off(mean, follows):
    """By a tenth of the way."""
    units = rl2.Units()
    set_units(units, 1, 1)
    rewards = mean + 3 * torch.tensor([[-1.0, 1, 7], [1, -1, 1]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0]])
    rl2.follow(units, rewards, mask)
    expected = [1 + 0.1 * (mean - 1), 1 + 0.1 * (3 - 1)] if follows else [1.0, 1.0]
    torch.testing.assert_close([units.mean.item(), units.std.item()], expected)


def test_training_lets_the_units_of_rewards_follow(train, monkeypatch):
    seen = []
    monkeypatch.setattr(rl2, "follow", lambda units, rewards, mask: seen.append(units.mean.item()))
    folder, _ = train(rl2, total_timesteps=3 * 160)
    assert seen == [load(folder)["agent"]["reward_units.mean"].item()] * 2


class InUnits(rl2.PointEnvs):
    """PointRobot-v0, its rewards and observations in other units."""

    def __init__(self, pay, length, num_envs):
        self.pay, self.length = pay, length
        super().__init__("PointRobot-v0", num_envs)

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, self.pay * rewards, *rest

    def _obs(self):
        return self.length * super()._obs()


@pytest.mark.parametrize("pay, length", [(1e4, 1), (1e-2, 1), (1e-7, 1), (1, 1e4), (1, 1e-4)])
def test_learning_does_not_depend_on_units(train, pay, length):
    """Rewards or observations times a constant: the same parameters, and so the same play."""
    runs = []
    for units in ((1, 1), (pay, length)):
        env_id = "InUnits_{:g}_{:g}-v0".format(*units)
        if env_id not in gym.registry:
            named = dict(zip(("pay", "length"), units, strict=True))
            gym.register(env_id, vector_entry_point=InUnits, kwargs=named)
        flags = {"env_id": env_id, "embedding_size": 8}
        folder, metrics = train(rl2, total_timesteps=3 * 160, **flags)
        agent = load(folder)["agent"]
        measured = ("obs_", "reward_", "value_")
        learned = {name: x for name, x in agent.items() if not name.startswith(measured)}
        runs.append((learned, metrics["eval/return_after_1_episodes"] / units[0]))
    torch.testing.assert_close(runs[1], runs[0], atol=0, rtol=1e-6)


def prepared(env_id, **flags):
    agent, batch, scores = play(env_id, **flags)
    set_units(agent.value_units, 0.3, 2)
    batch["advantages"], batch["returns"] = torch.randn(2, *batch["mask"].shape)
    batch["logprobs"] = batch["logprobs"] + 0.4 * torch.randn(
        batch["mask"].shape
    )  # ratios on both sides of the clip
    return agent, batch, scores


PPO = Args(clip_coef=0.2, vf_coef=0.7)  # beside a weight of the entropy of 0.03


@pytest.mark.parametrize("env_id", RAGGED)
def test_the_loss(env_id):
    agent, batch, _ = prepared(env_id)
    loss, parts = ppo_loss(agent, batch, batch["mask"].sum(), 0.03, PPO)
    dist_params, values, _ = pass_over(agent, batch)
    total, n, clipped, kl = 0, 0, 0, 0
    for i, t in itertools.product(*map(range, batch["mask"].shape)):
        if batch["mask"][i, t]:
            policy = distribution(dist_params[i, t], agent.discrete)
            ratio = (policy.log_prob(batch["actions"][i, t]) - batch["logprobs"][i, t]).exp()
            a = batch["advantages"][i, t]
            surrogate = min(ratio * a, (1.2 if a > 0 else 0.8) * a)
            total += (
                -surrogate
                + 0.7 / 2 * ((values[i, t] - batch["returns"][i, t]) / 2) ** 2
                - 0.03 * policy.entropy()
            )
            n, clipped, kl = n + 1, clipped + (abs(ratio - 1) > 0.2), kl + ratio - 1 - ratio.log()
    torch.testing.assert_close(loss, total / n)
    torch.testing.assert_close(parts["losses/approx_kl"], kl / n)
    torch.testing.assert_close(parts["losses/clipfrac"], clipped / n)


def test_trials_do_not_meet_in_the_loss():
    agent, batch, _ = prepared("user_tasks:Matrix-v0")
    inputs = batch["inputs"].requires_grad_()
    loss = ppo_loss(agent, batch, 1, 0.03, PPO)[0]
    (grads,) = torch.autograd.grad(loss, inputs)
    changed = {name: x.detach().clone() for name, x in batch.items()}
    for name in ("inputs", "advantages", "returns", "logprobs"):
        changed[name][2] += 0.1
    changed["inputs"].requires_grad_()
    (other,) = torch.autograd.grad(ppo_loss(agent, changed, 1, 0.03, PPO)[0], changed["inputs"])
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(grads[rest], other[rest]) and not torch.equal(grads[2], other[2])
    losses = [
        ppo_loss(agent, {name: x[[i]] for name, x in batch.items()}, 1, 0.03, PPO)[0]
        for i in range(6)
    ]
    torch.testing.assert_close(sum(losses), loss)


def test_what_follows_the_end_of_a_trial_is_ignored():
    agent, batch, _ = prepared("user_tasks:Matrix-v0")
    poisoned = {
        name: torch.where(batch["mask"] == 1, x, 1e6) for name, x in batch.items() if x.dim() == 2
    }
    poisoned = batch | poisoned | {"mask": batch["mask"]}
    for b in (batch, poisoned):
        loss, _ = ppo_loss(agent, b, 1, 0.03, PPO)
        b["gradient"] = torch.autograd.grad(loss, list(agent.parameters()))
    assert all(map(torch.equal, batch["gradient"], poisoned["gradient"]))


def test_a_value_net_of_its_own():
    agent, batch, _ = prepared("user_tasks:Matrix-v0", separate_value=True)
    for weight, moved, at_rest in (
        (0, 1, 0),
        (1, 0, 1),
    ):  # the value error alone, and all but the value error
        weighted = batch | {"advantages": batch["advantages"] * weight}
        loss, _ = ppo_loss(agent, weighted, 1, weight, replace(PPO, vf_coef=1 - weight))
        grads = [
            torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            for net in agent.memories
        ]
        assert all((g == 0).all() for g in grads[at_rest]) and all(
            (g != 0).any() for g in grads[moved]
        )


def learn(agent, batch, optimizer=torch.optim.SGD, **flags):
    """An update, and the parameters after it."""
    saved = {name: x.clone() for name, x in agent.state_dict().items()}
    flags = {"learning_rate": 1, "update_epochs": 1, "num_minibatches": 1, "ent_coef": 0.03} | flags
    args = replace(PPO, **flags)
    losses = update(
        agent, optimizer(agent.parameters(), torch.zeros(())), batch, ("test",), 1, args
    )
    after = nn.utils.parameters_to_vector(agent.parameters()).detach()
    agent.load_state_dict(saved)
    return losses, after


def test_every_trial_once_an_epoch(monkeypatch):
    agent, batch, _ = prepared("user_tasks:Matrix-v0", n=10)
    batch["inputs"][:, :, 0] = torch.arange(10)[:, None]
    met = []

    def spy(agent, minibatch, count, *rest):
        met.append(minibatch["inputs"][:, 0, 0].tolist())
        assert count == minibatch["mask"].sum()
        return ppo_loss(agent, minibatch, count, *rest)

    monkeypatch.setattr(rl2, "ppo_loss", spy)
    before = [p.clone() for p in agent.parameters()]
    args = replace(PPO, update_epochs=3, num_minibatches=4)
    optimizer = rl2.adam(agent.parameters(), 1e-3, args)
    losses = update(agent, optimizer, batch, ("test",), 1, args)
    epochs = [list(itertools.chain(*met[i : i + 4])) for i in (0, 4, 8)]
    assert len(met) == 12 and all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and {len(x) for x in met} == {2, 3}
    assert all(not torch.equal(p, q) for p, q in zip(agent.parameters(), before, strict=True))
    assert losses.keys() == {
        f"losses/{x}" for x in ("pg_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
    }


def test_what_is_logged_is_the_mean_over_minibatches(monkeypatch):
    agent, batch, _ = prepared("user_tasks:Matrix-v0")
    seen = []

    def spy(*given):
        loss, parts = ppo_loss(*given)
        seen.append(parts)
        return loss, parts

    monkeypatch.setattr(rl2, "ppo_loss", spy)
    losses, _ = learn(agent, batch, update_epochs=2, num_minibatches=3, learning_rate=0.01)
    assert len(seen) == 6 and seen[0] != seen[1]
    for name, value in losses.items():
        assert value == pytest.approx(sum(parts[name].item() for parts in seen) / 6)


def test_two_ranks_with_the_same_trials_do_what_one_does(monkeypatch):
    """Means are over the steps of all ranks: the sum over ranks doubles count and gradients."""
    agent, batch, _ = prepared("user_tasks:Matrix-v0", separate_value=True)
    flags = {"update_epochs": 2, "num_minibatches": 3, "learning_rate": 0.01}
    losses, after = learn(agent, batch, torch.optim.Adam, **flags)
    units = rl2.spread(batch["obs"], batch["mask"])
    monkeypatch.setattr(rl2, "all_reduce", lambda x: 2 * x)
    assert learn(agent, batch, torch.optim.Adam, **flags)[0] == losses
    assert torch.equal(learn(agent, batch, torch.optim.Adam, **flags)[1], after)
    assert all(map(torch.equal, rl2.spread(batch["obs"], batch["mask"]), units))


def test_the_gradient_is_clipped():
    agent, batch, _ = prepared("user_tasks:Matrix-v0")
    before = nn.utils.parameters_to_vector(agent.parameters()).detach()
    steps = [learn(agent, batch, max_grad_norm=norm)[1] - before for norm in (1e-3, 1e9)]
    assert steps[0].norm() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(steps[0] / steps[0].norm(), steps[1] / steps[1].norm())


def test_annealing(train, monkeypatch):
    """Step size and the weight of the entropy fall to 0, by a fifth in each of five iterations; or not at all."""
    settings = {
        "env_id": "Bandit2Arms5-v0",
        "meta_batch_size": 10,
        "num_minibatches": 2,
        "horizon": 5,
    }
    settings |= {"total_timesteps": 250, "episodes_per_task": 1, "num_test_tasks": 10}
    settings |= {"learning_rate": 0.01, "ent_coef": 0.1}
    for anneal, left in (
        (True, [0.8, 0.6, 0.4, 0.2]),
        (False, [1, 1, 1, 1]),
    ):  # the first one only measures units
        weights, rates = [], []

        def spy_on_loss(agent, batch, count, ent_coef, args, weights=weights):
            weights.append(ent_coef.item())
            return ppo_loss(agent, batch, count, ent_coef, args)

        def spy_on_update(agent, optimizer, *rest, rates=rates):
            losses = update(agent, optimizer, *rest)
            rates.append(optimizer.param_groups[0]["lr"].item())
            return losses

        with monkeypatch.context() as patch:
            patch.setattr(rl2, "ppo_loss", spy_on_loss)
            patch.setattr(rl2, "update", spy_on_update)
            train(rl2, anneal=anneal, **settings)
        np.testing.assert_allclose(rates, 0.01 * np.array(left), rtol=1e-6)
        np.testing.assert_allclose(weights, np.repeat(0.1 * np.array(left), 4 * 2), rtol=1e-6)


def test_a_gradient_that_is_not_finite():
    agent, batch, _ = prepared("user_tasks:Matrix-v0")
    batch["advantages"][0, 0] = torch.nan
    with pytest.raises(SystemExit, match="the gradient is not finite"):
        learn(agent, batch)


# ------------------------------------------------------------------------------------------------------------ meta-test


def test_scores_of_the_meta_test(monkeypatch):
    """In the order of the tasks, episodes in parts, the last group wrapped around."""
    tasks, met = np.arange(7.0)[:, None], []

    def trials(agent, tasks, key, args, test, deterministic=False):
        assert test
        met.append((tasks[:, 0].tolist(), key, deterministic))
        scores = torch.as_tensor(10 * tasks + np.arange(4))  # 10 x task + episode
        return {"first": tasks[0, 0]}, {
            "return": scores + 100 * deterministic,
            "success": scores / 100,
        }

    monkeypatch.setattr(rl2, "collect", trials)
    args = Args(env_id="PointRobot-v0", meta_batch_size=3, num_eval_steps=1, eval_episodes=2)
    scores, first = evaluate(None, tasks, args)
    assert [group for group, *_ in met] == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]
    assert len({key for _, key, _ in met}) == 3 and first == {"first": 0}
    expected = 10 * tasks[:, 0] + np.array([[0.5], [2.5]])
    np.testing.assert_array_equal(scores["return"], expected)
    np.testing.assert_allclose(scores["success"], expected / 100)
    np.testing.assert_allclose(scores["trial_return"], 2 * expected.sum(0))
    np.testing.assert_allclose(scores["improvement"], 2)
    assert scores.keys() == {"return", "success", "trial_return", "improvement"}
    met.clear()
    scores, _ = evaluate(None, tasks, replace(args, deterministic_eval=True))
    np.testing.assert_array_equal(scores["return"], expected + 100)
    np.testing.assert_array_equal(scores["sampled_return"], expected)
    np.testing.assert_allclose(scores["trial_return"], 2 * (expected + 100).sum(0))
    assert (
        sorted(mode for *_, mode in met) == 3 * [False] + 3 * [True]
        and len({key for _, key, _ in met}) == 3
    )


def test_what_a_trial_comes_to(train, capsys):
    torch.set_default_dtype(torch.float32)
    _, metrics = train(
        rl2, env_id="Bandit2Arms5-v0", horizon=0, num_test_tasks=50, episodes_per_task=3
    )
    tasks = rl2.BanditEnvs("Bandit2Arms5-v0", 1).sample_tasks(50, np.random.default_rng([0, 1]))
    # two scored episodes, as num_eval_steps is 1
    assert metrics["eval/trial_return"] == pytest.approx(
        metrics["eval/return_after_0_episodes"] + metrics["eval/return_after_1_episodes"]
    )
    assert metrics["eval/regret"] == pytest.approx(
        10 * tasks.max(1).mean() - metrics["eval/trial_return"]
    )
    assert f"regret: {metrics['eval/regret']:.3f} ± " in capsys.readouterr().out
    _, metrics = train(
        rl2, env_id="PointRobot-v0", episodes_per_task=4, num_eval_steps=1, eval_episodes=2
    )
    first, second = (metrics[f"eval/return_after_{n}_episodes"] for n in (0, 2))
    assert (
        metrics["eval/trial_return"] == pytest.approx(2 * (first + second))
        and "eval/regret" not in metrics
    )
    assert metrics["eval/improvement"] == pytest.approx(second - first)
    assert f"improvement: {second - first:.3f} ± " in capsys.readouterr().out
    _, metrics = train(
        rl2, env_id="Bandit2Arms5-v0", horizon=0, num_test_tasks=50, num_eval_steps=0
    )
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
    names = (
        "meta_batch_size",
        "episodes_per_task",
        "num_test_tasks",
        "gae_lambda",
        "num_eval_steps",
    )
    args = rl2.with_defaults(Args(env_id=env_id))
    assert tuple(getattr(args, name) for name in names) == expected
    given = dict.fromkeys(names, 7) | {"gae_lambda": 0, "num_eval_steps": 0}
    args = rl2.with_defaults(Args(env_id=env_id, **given))
    assert {name: getattr(args, name) for name in names} == given
    args = rl2.with_defaults(Args(env_id=env_id, episodes_per_task=6, eval_episodes=2))
    assert args.num_eval_steps == 2


def test_more_minibatches_than_trials(train, tmp_path):
    with pytest.raises(SystemExit, match="error: --num-minibatches 9: more than the 8 trials"):
        train(rl2, num_minibatches=9)
    assert not (tmp_path / "runs").exists()
    folder, _ = train(rl2)
    train(rl2, evaluate=folder, meta_batch_size=1)


def test_a_policy_of_choices_that_diverges():
    """Its choices are finite, whatever they were drawn from."""
    rows = {
        "obs": torch.zeros(2, 3, 1),
        "actions": torch.zeros(2, 3),
        "logprobs": torch.zeros(2, 3),
    }
    rows["logprobs"][1, 2] = torch.nan
    with pytest.raises(SystemExit, match=r"^error: the policy has diverged, its logprobs are not"):
        rl2.require_finite(rows, np.zeros((2, 1)), 0, Args())


# -------------------------------------------------------------------------------------------- the paper's task families


def begin(envs, tasks):
    """The observations after a reset."""
    options = {"task": torch.as_tensor(tasks), "generator": torch.Generator().manual_seed(1)}
    return envs.reset(options=options)[0].numpy()


def test_bandits():
    envs, n = rl2.BanditEnvs("Bandit3Arms4-v0", 30_000), 30_000
    tasks = envs.sample_tasks(n, np.random.default_rng(0))
    assert tasks.shape == (n, 3) and envs.horizon == 4 and envs.single_action_space == Discrete(3)
    assert (
        tasks.min() > 0
        and tasks.max() < 1
        and abs(tasks.mean() - 0.5) < 0.005
        and abs(tasks.var() - 1 / 12) < 0.002
    )
    obs = begin(envs, tasks)
    assert obs.shape == (n, 0)
    paid = []
    for arm in (0, 1, 2, 1):
        obs, rewards, terminated, truncated, info = envs.step(torch.full((n,), arm))
        rewards = rewards.numpy()
        assert obs.shape == (n, 0) and not terminated.any() and not truncated.any() and not info
        assert set(rewards) == {0.0, 1.0} and abs((rewards - tasks[:, arm]).mean()) < 0.012
        assert abs(np.corrcoef(rewards, tasks[:, arm])[0, 1] - (1 / 12) ** 0.5 / 0.5) < 0.02
        paid.append(rewards)
    assert (
        abs(np.corrcoef(paid[1], paid[3])[0, 1] - 1 / 3) < 0.02
    )  # only p in common: cov = var p = 1/12
    assert bandit_optimum(((0, 0),) * 2, 10) == pytest.approx(6.0218, abs=1e-4)


def test_tabular_mdps():
    envs, n = rl2.TabularMDPEnvs("TabularMDP-v0", 4000), 4000
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
        obs = begin(envs, tasks)
        np.testing.assert_array_equal(obs, np.eye(10)[np.zeros(n, int)])
        total = np.zeros(n)
        for t in range(10):
            state = obs.argmax(1)
            actions = (
                greedy[t][np.arange(n), state] if name == "known" else random.integers(5, size=n)
            )
            expected, chances = mean[np.arange(n), state, actions], p[np.arange(n), state, actions]
            told = envs.step(torch.as_tensor(actions))
            obs, rewards, terminated, truncated = (x.numpy() for x in told[:4])
            assert (obs.sum(1) == 1).all() and not terminated.any() and not truncated.any()
            assert (
                abs((rewards - expected).mean()) < 0.06
                and abs((rewards - expected).std() - 1) < 0.05
            )
            # the next state is as likely as P says: its mean probability is that of a draw from P
            hit = chances[np.arange(n), obs.argmax(1)].mean()
            assert abs(hit - (chances**2).sum(1).mean()) < 0.01
            total += rewards
        returns[name] = total.mean()
    assert returns["random"] == pytest.approx(10, abs=0.3) and returns["known"] == pytest.approx(
        21.83, abs=0.25
    )
    assert values[:, 0].mean() == pytest.approx(21.83, abs=0.2)


@pytest.mark.parametrize(
    "env_id", ["Bandit0Arms5-v0", "Bandit5Arms0-v0", "Bandit5Arms-v0", "BanditArms-v0"]
)
def test_bandits_that_are_none(env_id):
    with pytest.raises(SystemExit, match=f"error: no tasks {env_id}"):
        rl2.register_own(env_id)
        make_envs(env_id, 2)


def test_both_come_in_as_families_of_ones_own_do():
    for env_id, family in (
        ("Bandit2Arms3-v0", rl2.BanditEnvs),
        ("TabularMDP-v0", rl2.TabularMDPEnvs),
    ):
        for _ in range(2):
            rl2.register_own(env_id)
        assert type(make_envs(env_id, 5)) is family and make_envs(env_id, 5).num_envs == 5


# ------------------------------------------------------------------------------------------------ tasks of known answer


class Probe(gym.vector.VectorEnv):
    """Episodes of one step or two, in which a bit of the task is to be found out; nothing is observed."""

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    single_observation_space = Box(0, 0, (0,), np.float64)

    def __init__(self, num_envs):
        self.num_envs = num_envs

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

    horizon, single_action_space = 2, Discrete(2)

    def pay(self, actions):
        return np.where(actions == self.bit, 1.0, -1.0) * (self.t == 2)


class Guess(Probe):
    """One step. Guess the bit (0, 1): 10 if right, -13 if wrong. Or pass (2): 0.

    Of two episodes, the first is worth a guess, which costs 1.5 on average, as it tells the bit for the second.
    """

    horizon, single_action_space = 1, Discrete(3)

    def pay(self, actions):
        return np.where(actions == 2, 0.0, np.where(actions == self.bit, 10.0, -13.0))


gym.register("LastStep-v0", vector_entry_point=LastStep)
gym.register("Guess-v0", vector_entry_point=Guess)


def train_on(probe, monkeypatch, tmp_path, iterations=150, **flags):
    """Returns of the first and the second episode after training."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    settings = {
        "meta_batch_size": 128,
        "hidden_size": 16,
        "num_threads": 1,
        "num_test_tasks": 2000,
        "eval_every": 1000,
    }
    settings |= {
        "learning_rate": 5e-3,
        "gae_lambda": 0.95,
        "episodes_per_task": 2,
        "num_minibatches": 2,
    } | flags
    steps = iterations * 128 * probe.horizon * settings["episodes_per_task"]
    metrics = rl2.main(Args(env_id=f"{probe.__name__}-v0", total_timesteps=steps, **settings))
    return metrics["eval/return_after_0_episodes"], metrics["eval/return_after_1_episodes"]


def test_the_last_reward_of_an_episode_is_known_in_the_next(monkeypatch, tmp_path):
    first, second = train_on(LastStep, monkeypatch, tmp_path)
    assert abs(first) < 0.15 and second > 0.9


def test_and_is_not_if_it_is_lost(monkeypatch, tmp_path):
    forward = Agent.forward

    def forget_at_the_boundary(agent, inputs, state):
        last = inputs[..., -agent.action_size - 2 :]
        lost = torch.cat([inputs[..., : -agent.action_size - 2], last * (1 - inputs[..., -1:])], -1)
        return forward(agent, lost, state)

    monkeypatch.setattr(Agent, "forward", forget_at_the_boundary)
    first, second = train_on(LastStep, monkeypatch, tmp_path, iterations=75)
    assert abs(first) < 0.15 and abs(second) < 0.15


def test_an_action_is_credited_with_what_later_episodes_pay(monkeypatch, tmp_path):
    first, second = train_on(Guess, monkeypatch, tmp_path, ent_coef=0.1, anneal=True)
    assert first == pytest.approx(-1.5, abs=0.8) and second > 9.5


def test_and_is_not_if_credit_ends_with_the_episode(monkeypatch, tmp_path):
    monkeypatch.setattr(
        rl2, "gae", lambda rewards, values, mask, gamma, gae_lambda: (rewards - values) * mask
    )
    first, second = train_on(Guess, monkeypatch, tmp_path, ent_coef=0.1, anneal=True)
    assert abs(first) < 0.3 and abs(second) < 0.3


def test_two_arms(monkeypatch, tmp_path):
    """Between greedy play and the Bayes optimum; and what a policy that learns nothing about its arms gets, blind."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    settings = {
        "env_id": "Bandit2Arms6-v0",
        "meta_batch_size": 500,
        "hidden_size": 16,
        "learning_rate": 1e-2,
        "num_minibatches": 4,
    }
    settings |= {"total_timesteps": 500 * 6 * 60, "num_threads": 1, "eval_every": 1000}
    optimum, error = bandit_optimum(((0, 0),) * 2, 6), (6 / 4 / 20_000) ** 0.5
    score = rl2.main(Args(**settings))["eval/return_after_0_episodes"]
    assert optimum - 0.1 < score < optimum + 3 * error
    blank = torch.zeros(500, 3)  # of action and reward
    monkeypatch.setattr(
        Agent, "feedback", lambda *given: torch.cat([blank, given[-1][:, None]], -1)
    )
    settings["total_timesteps"] //= 6
    blind = rl2.main(Args(**settings))["eval/return_after_0_episodes"]
    assert blind == pytest.approx(3, abs=0.06)

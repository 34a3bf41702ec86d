"""RL²: Fast Reinforcement Learning via Slow Reinforcement Learning.
Duan, Schulman, Chen, Bartlett, Sutskever and Abbeel, 2016, arXiv 1611.02779; and, found independently,
Learning to reinforcement learn, Wang et al., 2016, arXiv 1611.05763.

Trains a recurrent policy on trials: E episodes in a row of one task, through which its hidden state h is carried. It is
told what its last action brought, so that it can learn about the task within the trial: the hidden state is what
adapts, and the weights are the learning algorithm. Each iteration:

(1) Draw a meta-batch of N tasks from the training distribution.
(2) Play a trial in each. The policy sees (o_t, a_{t-1}, r_{t-1}, d_{t-1}), where d = 1 if the last step ended an
    episode. h is reset at the start of the trial only.
(3) Estimate advantages A (GAE) on the trial as one sequence: rewards of later episodes count, discounted, for the
    actions of earlier ones. Only the end of the trial is terminal.
(4) Split the trials into minibatches, run the network over each whole trial from h = 0, and back-propagate through it.
(5) Step (Adam) on the loss of PPO: clipped surrogate, value error, entropy. Repeat (4), (5) for several epochs.
(6) Meta-test: trials on held-out tasks with fixed weights, the return of episode 1, 2, ….

Train:     python rl2.py
Resume:    python rl2.py --resume runs/NAME
Evaluate:  python rl2.py --evaluate runs/NAME

Differs from the paper in: PPO (the paper: TRPO), policy and value on one recurrent net (--separate-value: on two), a
smaller net, on TabularMDP-v0 with a layer before and after the recurrent one, and a first iteration that only measures
the units of observations, rewards and values. The list: docs/rl2.md.
"""

from __future__ import annotations

import atexit
import copy
import difflib
import importlib.util
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NoReturn, get_args, get_origin, get_type_hints

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback, during these imports too

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector.utils import batch_space
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = "rl2"
    """name of the experiment, part of the run's folder"""
    env_id: str = "Bandit5Arms10-v0"
    """tasks: Bandit{k}Arms{n}-v0, TabularMDP-v0, a family of the suite (docs/tasks.md), or module:Id-v0 for your own"""
    seed: int = 1
    """seed of the initial parameters, episodes and action noise"""
    task_seed: int = 0
    """seed of the task draws: training and held-out tasks depend on nothing else"""
    total_timesteps: int = 10_000_000
    """environment steps of training, meta-test excluded"""
    meta_batch_size: int | None = None
    """N, tasks and thereby trials per iteration (unset: 1000 on the bandits, 500 on TabularMDP-v0, 100 elsewhere)"""
    episodes_per_task: int | None = None
    """E, episodes of a trial (unset: 1 on the bandits, 10 on TabularMDP-v0, 2 elsewhere)"""
    horizon: int = 0
    """steps per episode at most (0: the family's own)"""
    num_train_tasks: int = 0
    """size of a fixed set of training tasks (0: fresh draws in every iteration)"""
    num_test_tasks: int | None = None
    """held-out tasks of the meta-test (unset: 20,000 on the bandits and TabularMDP-v0, 40 elsewhere)"""
    num_eval_steps: int | None = None
    """scores of a meta-test trial after the first one (unset: as many as make E episodes)"""
    eval_episodes: int = 1
    """episodes whose mean return is one score: a meta-test trial has (num_eval_steps + 1) x eval_episodes of them"""
    deterministic_eval: bool = False
    """meta-test with the most likely or mean action instead of sampled ones"""
    train_reward: Literal["dense", "sparse"] = "dense"
    """reward of meta-training, dense or sparse"""
    test_reward: Literal["dense", "sparse"] = "dense"
    """reward of the meta-test, dense or sparse"""
    gamma: float = 0.99
    """discount per step"""
    cuda: bool = False
    """compute on the GPU (these networks are small: two or three times as fast at best)"""
    torch_deterministic: bool = True
    """use deterministic kernels only"""
    num_threads: int = 0
    """CPU threads of torch and of the simulator (0: all cores)"""
    eval_every: int = 100
    """iterations between meta-tests"""
    checkpoint_every: int = 10
    """iterations between checkpoints"""
    resume: str = ""
    """folder of the run to go on with, from its last checkpoint"""
    evaluate: str = ""
    """folder of the run to meta-test, without training"""

    hidden_size: int = 64
    """units of the recurrent layer"""
    embedding_size: int | None = None
    """units of a layer before and one after the recurrent one (0: none; unset: 128 on TabularMDP-v0, 0 elsewhere)"""
    init_std: float = 1.0
    """standard deviation of the actions before training, of [-1, 1]"""
    separate_value: bool = False
    """give the value function a recurrent layer of its own (better on HalfCheetahVel-v0, and slower)"""
    gae_lambda: float | None = None
    """λ of generalised advantage estimation (unset: the paper's 0.3 on bandits and TabularMDP-v0, 0.95 elsewhere)"""
    normalize_advantage: bool = True
    """standardise advantages over an iteration's steps (off: divide by the unit of values)"""
    learning_rate: float = 2e-3
    """step size of Adam"""
    update_epochs: int = 4
    """passes over an iteration's trials"""
    num_minibatches: int = 8
    """minibatches, of whole trials, per pass"""
    clip_coef: float = 0.2
    """ε, the surrogate's gradient stops where the probability ratio leaves 1 ± ε to its advantage"""
    ent_coef: float = 0.01
    """weight of the entropy, which is maximised"""
    anneal: bool = False
    """let learning_rate and ent_coef fall linearly, to 0 at total_timesteps"""
    vf_coef: float = 0.5
    """weight of the value error"""
    max_grad_norm: float = 0.5
    """the gradient is scaled down to this norm"""


UNSET = {  # what a flag is if it is not given: on bandits, on TabularMDP-v0, elsewhere
    "meta_batch_size": (1000, 500, 100),
    "episodes_per_task": (1, 10, 2),
    "num_test_tasks": (20_000, 20_000, 40),
    "embedding_size": (0, 128, 0),
    "gae_lambda": (0.3, 0.3, 0.95),
}


def with_defaults(args: Args) -> Args:
    """args with values in place of None."""
    kind = 0 if BANDITS.fullmatch(args.env_id) else 1 if args.env_id == "TabularMDP-v0" else 2
    args = replace(args, **{name: of[kind] for name, of in UNSET.items() if getattr(args, name) is None})
    scores = args.episodes_per_task // max(1, args.eval_episodes)
    return replace(args, num_eval_steps=max(0, scores - 1)) if args.num_eval_steps is None else args


# --------------------------------------------------------------------------------------------------------- the network


class Memory(nn.Module):
    """A GRU: inputs (N, S, X) and the state before them (1, N, H) -> features (N, S, F) and the state after them.

    F = H; or, with embedding_size, a ReLU layer of F = embedding_size units before the GRU, which combines what a step
    brings, and one after it, which combines what is remembered with what is seen.
    """

    def __init__(self, input_size: int, hidden_size: int, embedding_size: int):
        super().__init__()
        self.gru = nn.GRU(embedding_size or input_size, hidden_size, batch_first=True)
        self.embedding = self.reader = None
        if embedding_size:
            self.embedding = nn.Sequential(nn.Linear(input_size, embedding_size), nn.ReLU())
            self.reader = nn.Sequential(nn.Linear(hidden_size + input_size, embedding_size), nn.ReLU())

    def initialise(self, active: int, trial_length: int):
        """Weights that let what is seen into the state, and keep it there; `active`: squared norm of an input, about.

        The inputs' share of each gate has variance 1, with an embedding 2. The units' memories reach from one step to
        the trial_length (Tallec and Ollivier 2018, arXiv 1804.11188).
        """
        gru, size = self.gru, self.gru.hidden_size
        if self.embedding:
            nn.init.normal_(self.embedding[0].weight, std=2 * active**-0.5)  # mean square of its outputs: 2
            active = self.embedding[0].out_features
        nn.init.normal_(gru.weight_ih_l0, std=active**-0.5)
        for gate in gru.weight_hh_l0.detach().chunk(3):
            nn.init.orthogonal_(gate)
        nn.init.zeros_(gru.bias_ih_l0)
        nn.init.zeros_(gru.bias_hh_l0)
        memory = torch.linspace(1, max(1, trial_length - 1), size)  # m, steps that a unit remembers
        gru.bias_hh_l0.detach()[size : 2 * size] = memory.log()  # update gate: keeps m / (m + 1)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.embedding:
            return self.gru(inputs, state)
        features, state = self.gru(self.embedding(inputs), state)
        return self.reader(torch.cat([features, inputs], -1)), state


class Agent(nn.Module):
    """A recurrent net with a linear policy and value on top.

    An input is (o_t, a_{t-1}, r_{t-1}, d_{t-1}), X numbers; for an embedding o_{t-1} too, the last step as a whole.
    Box: the policy's outputs are mean and log std, D = 2A, the log std independent of the input; an action is fed back
    as it acted, clipped to [-1, 1]. Discrete: n logits, D = n; an action is fed back as one-hot. State: (1, N, H), or
    (2, N, H) with a second net for the value.
    """

    def __init__(
        self, obs_size, action_space, trial_length, hidden_size, separate_value=False, init_std=1.0, embedding_size=0
    ):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_size = int(action_space.n) if self.discrete else action_space.shape[0]
        self.last_obs_size = obs_size if embedding_size else 0  # numbers of o_{t-1} in an input
        self.input_size = obs_size + self.action_size + 2 + self.last_obs_size
        sizes = (self.input_size, hidden_size, embedding_size)
        self.memories = nn.ModuleList(Memory(*sizes) for _ in range(1 + separate_value))
        features = embedding_size or hidden_size
        self.actor, self.critic = nn.Linear(features, self.action_size), nn.Linear(features, 1)
        active = obs_size + (1 if self.discrete else self.action_size) + 2 + self.last_obs_size
        for memory in self.memories:
            memory.initialise(active, trial_length)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.zeros_(self.actor.bias)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.action_size,), math.log(init_std)))
        # units, measured by main; until then observations and rewards are 0 in an input
        self.register_buffer("obs_mean", torch.zeros(obs_size))
        self.register_buffer("obs_std", torch.full((obs_size,), torch.inf))
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.tensor(torch.inf))
        self.register_buffer("value_mean", torch.zeros(()))
        self.register_buffer("value_std", torch.ones(()))

    def initial_state(self, n: int) -> torch.Tensor:
        return self.actor.weight.new_zeros(len(self.memories), n, self.memories[0].gru.hidden_size)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor):
        """inputs (N, S, X), state before them -> dist (N, S, D), values (N, S), state after them."""
        pairs = (memory(inputs, h[None]) for memory, h in zip(self.memories, state, strict=True))
        features, states = zip(*pairs, strict=True)
        out, values = self.actor(features[0]), self.critic(features[-1]).squeeze(-1) * self.value_std + self.value_mean
        return out if self.discrete else torch.cat([out, self.log_std.expand_as(out)], -1), values, torch.cat(states)

    def distribution(self, dist: torch.Tensor) -> Categorical | Independent:
        """The distribution with parameters dist (..., D); its log_prob and entropy are sums over the dimensions."""
        if self.discrete:
            return Categorical(logits=dist, validate_args=False)
        mean, log_std = dist.chunk(2, -1)
        return Independent(Normal(mean, log_std.exp(), validate_args=False), 1)

    def act(self, dist: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions (N, A) or (N,); noise (N, A) is normal or, for logits, Gumbel, and 0 for the mode."""
        if self.discrete:
            return (dist + noise).argmax(-1)
        mean, log_std = dist.chunk(2, -1)
        return mean + log_std.exp() * noise

    def feedback(self, actions: torch.Tensor) -> torch.Tensor:
        """What the next input tells of actions: (N, A) or (N,) -> (N, A)."""
        if self.discrete:
            return nn.functional.one_hot(actions, self.action_size).to(self.actor.weight.dtype)
        return actions.clamp(-1, 1)


# ------------------------------------------------------------------------------------------------------- the algorithm


def in_units(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """x less its mean in multiples of its standard deviation, clipped to ±10."""
    return ((x - mean) / std).clamp(-10, 10)


def collect(agent, tasks, rng, envs, episodes, horizon, reward, deterministic=False) -> tuple[dict, dict]:
    """(2) A trial of E episodes in each of N tasks; tasks: (N, task size).

    Returns the steps of the trials without gaps: obs (N, S, O) and rewards (N, S) as they are,
    inputs (N, S, X) with both in units, actions (N, S, A) or (N, S), logprobs, values and mask
    (N, S), 0 after a trial's end. And scores of the episodes (N, E): return, length and, where
    tasks report it, success at any step.
    """
    n, like = len(tasks), agent.actor.weight
    tensor = partial(torch.as_tensor, dtype=like.dtype, device=like.device)
    draw = rng.gumbel if agent.discrete else rng.normal
    state, last = agent.initial_state(n), like.new_zeros(n, agent.action_size + 2 + agent.last_obs_size)
    steps, scores = {}, {"return": np.zeros((n, episodes)), "length": np.zeros((n, episodes))}
    for episode in range(episodes):
        obs, _ = envs.reset(seed=int(rng.integers(2**31)), options={"task": tasks})
        noise = draw(size=(envs.total_lanes, horizon, agent.action_size))[envs.lanes] * (not deterministic)
        noise, alive = tensor(noise), np.ones(n, bool)
        for t in range(horizon):
            seen = tensor(obs)
            inputs = torch.cat([in_units(seen, agent.obs_mean, agent.obs_std), last], -1)
            dist, values, new_state = agent(inputs[:, None], state)
            actions = agent.act(dist[:, 0], noise[:, t])
            obs, rewards, terminated, truncated, info = envs.step(require_finite_actions(actions.cpu().numpy()))
            require_finite(envs, {"observations": obs, "rewards": rewards, **info}, alive, tasks, t)
            rewards = (info.get("sparse_reward", np.zeros(n)) if reward == "sparse" else rewards) * alive
            step = {"obs": seen, "inputs": inputs, "actions": actions, "values": values[:, 0]}
            step |= {"logprobs": agent.distribution(dist[:, 0]).log_prob(actions)}
            step |= {"rewards": tensor(rewards), "mask": tensor(alive)}
            for name, x in step.items():
                steps.setdefault(name, []).append(x)
            scores["return"][:, episode] += rewards
            scores["length"][:, episode] += alive
            if "success" in info:
                success = scores.setdefault("success", np.zeros((n, episodes)))[:, episode]
                np.maximum(success, info["success"] * alive, out=success)

            # a lane whose episode has ended waits for the others, and its hidden state stays as it is
            ended = terminated | truncated | (t + 1 == horizon) | info.get("episode_end", False)
            paid = in_units(tensor(rewards), agent.reward_mean, agent.reward_std)
            news = [agent.feedback(actions), paid[:, None], tensor(ended)[:, None]]
            news = torch.cat([*news, inputs[:, : agent.last_obs_size]], -1)
            awake = torch.as_tensor(alive, device=like.device)[:, None]
            state, last = torch.where(awake, new_state, state), torch.where(awake, news, last)
            alive = alive & ~(terminated | truncated)
            if not alive.any():
                break
    batch = {name: torch.stack(x, 1) for name, x in steps.items()}
    longest = int(scores["length"].sum(1).max())
    order = batch["mask"].sort(dim=1, descending=True, stable=True).indices[:, :longest]  # cuts the waiting out
    batch = {name: x[torch.arange(n, device=x.device)[:, None], order] for name, x in batch.items()}
    return batch, {name: tensor(score) for name, score in scores.items()}


def moments(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (...) of x (N, S, ...) over the valid steps, of all ranks.

    The latter, by which to divide, is 1 where it is 0 or no more than rounding.
    """
    count, mask = all_reduce(mask.sum()), mask.view(*mask.shape, *[1] * (x.ndim - 2))
    mean = all_reduce((x * mask).sum((0, 1))) / count
    std = (all_reduce(((x - mean) ** 2 * mask).sum((0, 1))) / count).sqrt()
    return mean, torch.where(std > 1e-5 * mean.abs(), std, 1)


def ppo_loss(agent, batch, count, clip_coef, vf_coef, ent_coef) -> tuple[torch.Tensor, torch.Tensor]:
    """(4), (5) The loss, and its parts to log (5,); means over `count` steps, those of the minibatch on all ranks."""
    dist, values, _ = agent(batch["inputs"], agent.initial_state(len(batch["inputs"])))
    distribution = agent.distribution(dist)
    logratio = (distribution.log_prob(batch["actions"]) - batch["logprobs"]) * batch["mask"]
    ratio = logratio.exp()
    surrogate = torch.min(ratio * batch["advantages"], ratio.clamp(1 - clip_coef, 1 + clip_coef) * batch["advantages"])
    terms = [-surrogate, 0.5 * ((values - batch["returns"]) / agent.value_std) ** 2, distribution.entropy()]
    terms += [ratio - 1 - logratio, ((ratio - 1).abs() > clip_coef).to(ratio.dtype)]  # KL (Schulman's), clipped share
    parts = torch.stack([(term * batch["mask"]).sum() / count for term in terms])
    return parts[0] + vf_coef * parts[1] - ent_coef * parts[2], parts.detach()


def update(agent, optimizer, batch, rng, num_trials, epochs, num_minibatches, max_grad_norm, loss) -> dict[str, float]:
    """(4), (5) PPO on the trials of all ranks, of which batch holds this one's share; loss: ppo_loss, with its weights.

    One permutation for all ranks: each processes those of a minibatch's trials that it owns. Returns what to log.
    """
    mine, total = np.arange(num_trials)[shard(num_trials)], 0
    for _ in range(epochs):
        for members in np.array_split(rng.permutation(num_trials), num_minibatches):
            own = members[np.isin(members, mine)]
            minibatch = {name: x[(own if own.size else mine[:1]) - mine[0]] for name, x in batch.items()}
            minibatch["mask"] = minibatch["mask"] * (own.size > 0)  # a rank that owns none adds a gradient of 0
            value, parts = loss(agent, minibatch, all_reduce(minibatch["mask"].sum()))
            optimizer.zero_grad()
            value.backward()
            for p in agent.parameters():
                all_reduce(p.grad)
            if not nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm).isfinite():
                fail("the gradient is not finite: try a smaller --learning-rate")
            optimizer.step()
            total += parts
    names = ("losses/pg_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac")
    return dict(zip(names, (all_reduce(total) / (epochs * num_minibatches)).tolist(), strict=True))


def evaluate(tasks, collect, group, num_scores, seed) -> dict[str, np.ndarray]:
    """(6) Meta-test on tasks (M, task size): a trial in each, its episodes in num_scores equal parts.

    collect: collect with its settings; group: the tasks that its lanes hold at once. Returns {"return": (num_scores,
    M), ...}, means over the episodes of a part. Draws depend on seed and group alone: every call meets the same trials.
    """
    scores = {}
    for first in range(0, len(tasks), group):
        members = (first + np.arange(group))[shard(group)]  # the last group wraps around
        _, episodes = collect(tasks=tasks[members % len(tasks)], rng=keyed_rng(seed, "eval", first))
        for name in episodes.keys() - {"length"}:
            score = episodes[name].unflatten(1, (num_scores, -1)).mean(-1).T
            scores.setdefault(name, score.new_zeros(num_scores, len(tasks) + group))[:, members] = score
    return gather_scores(scores, len(tasks))


def trial_report(scores, tasks, eval_episodes: int, best: np.ndarray | None, printed=False) -> dict[str, float]:
    """report, the whole trial's return, the last episode's less the first's and, given what the best arm pays in a
    trial, best (M,), the regret.
    """
    returns = scores["return"]
    totals = {"trial_return": eval_episodes * returns.sum(0)}
    totals |= {} if len(returns) == 1 else {"improvement": returns[-1] - returns[0]}
    totals |= {} if best is None else {"regret": best - totals["trial_return"]}
    return report(scores | totals, tasks, eval_episodes, printed)


def main(args: Args) -> dict[str, float]:
    """Train, resume or only evaluate; returns the last value of every eval/* and charts/* tag."""
    args = with_defaults(args)
    device = setup(args)
    checkpoint = load_checkpoint(args.resume or args.evaluate, Args) if args.resume or args.evaluate else {}
    iteration, global_step = checkpoint.get("iteration", 0), checkpoint.get("global_step", 0)
    if args.resume and global_step >= args.total_timesteps:
        show(f"{args.resume} is complete; its meta-test:")
        args = replace(args, resume="", evaluate=args.resume)
    if args.num_minibatches > args.meta_batch_size:
        fail(f"--num-minibatches {args.num_minibatches}: more than the {args.meta_batch_size} trials")

    # tasks, and environments with a lane per trial
    n, episodes, num_scores = args.meta_batch_size, args.episodes_per_task, args.num_eval_steps + 1
    envs = make_trial_envs(args.env_id, n, args.num_threads, shard(n))
    horizon = args.horizon or envs.horizon or fail(f"{args.env_id} has no time limit of its own: give --horizon")
    test_tasks = envs.sample_test_tasks(args.num_test_tasks, np.random.default_rng([args.task_seed, 1]))
    if args.num_train_tasks:
        train_tasks = envs.sample_tasks(args.num_train_tasks, np.random.default_rng([args.task_seed, 0]))
    if "sparse" in (args.train_reward, args.test_reward):
        require_sparse_reward(envs, test_tasks[:1])

    obs_size, action_space = envs.single_observation_space.shape[0], envs.single_action_space
    sizes, options = (horizon * episodes, args.hidden_size), (args.separate_value, args.init_std, args.embedding_size)
    agent = Agent(obs_size, action_space, *sizes, *options).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # the functions above with this run's settings
    play = partial(torch.no_grad()(collect), agent, envs=envs, horizon=horizon)
    collect_train = partial(play, episodes=episodes, reward=args.train_reward)
    collect_test = partial(play, episodes=num_scores * args.eval_episodes, reward=args.test_reward)
    collect_test = partial(collect_test, deterministic=args.deterministic_eval)
    meta_test = partial(evaluate, test_tasks, collect_test, n, num_scores, args.seed)
    pulls = horizon * num_scores * args.eval_episodes
    best = pulls * test_tasks.max(1) if isinstance(envs, BanditEnvs) else None
    loss = partial(ppo_loss, clip_coef=args.clip_coef, vf_coef=args.vf_coef)
    ppo = {"epochs": args.update_epochs, "num_minibatches": args.num_minibatches, "max_grad_norm": args.max_grad_norm}
    if args.evaluate:
        return trial_report(meta_test(), test_tasks, args.eval_episodes, best, printed=True)

    with closing(Run(args, global_step)) as run:
        while global_step < args.total_timesteps and not run.stopping():
            iteration, start = iteration + 1, time.perf_counter()

            # (1) tasks; each rank takes its share
            if args.num_train_tasks:
                order = keyed_rng(args.seed, "tasks", iteration).permutation(args.num_train_tasks)
                tasks = train_tasks[np.resize(order, n)]
            else:
                tasks = envs.sample_tasks(n, np.random.default_rng([args.task_seed, 0, iteration]))

            # (2) trials
            batch, scores = collect_train(tasks[shard(n)], keyed_rng(args.seed, "train", iteration))
            collected = time.perf_counter()

            if iteration == 1:  # the first trials are for the units alone
                agent.obs_mean, agent.obs_std = moments(batch["obs"], batch["mask"])
                agent.reward_mean, agent.reward_std = moments(batch["rewards"], batch["mask"])
                returns = discounted_sum(batch["rewards"], args.gamma)
                agent.value_mean, agent.value_std = moments(returns, batch["mask"])
                losses = {}
            else:
                # (3) advantages over the whole trial
                advantages = gae(batch["rewards"], batch["values"], batch["mask"], args.gamma, args.gae_lambda)
                batch["returns"] = advantages + batch["values"]
                mean, std = 0, agent.value_std
                if args.normalize_advantage:
                    mean, std = moments(advantages, batch["mask"])
                batch["advantages"] = (advantages - mean) / std

                # (4), (5) PPO
                rng = keyed_rng(args.seed, "minibatches", iteration)
                left = 1 - global_step / args.total_timesteps if args.anneal else 1
                optimizer.param_groups[0]["lr"], ent_coef = left * args.learning_rate, left * args.ent_coef
                losses = update(agent, optimizer, batch, rng, n, loss=partial(loss, ent_coef=ent_coef), **ppo)
            updated = time.perf_counter()

            # log, (6) meta-test, save
            global_step += int(all_reduce(batch["mask"].sum()))
            metrics = losses | {
                "charts/episodic_return": task_mean(scores["return"][:, -1]),
                "charts/episodic_length": task_mean(scores["length"]),
                "time/collect": collected - start,
                "time/update": updated - collected,
            }
            if episodes > 1:
                metrics["charts/pre_adaptation_return"] = task_mean(scores["return"][:, 0])
            if iteration % args.eval_every == 0 or global_step >= args.total_timesteps:
                test_scores = meta_test()
                metrics |= trial_report(test_scores, test_tasks, args.eval_episodes, best)
                metrics["time/eval"] = time.perf_counter() - updated
            run.log(metrics, global_step)
            if iteration % args.checkpoint_every == 0:
                learned = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
                run.save(iteration=iteration, global_step=global_step, **learned)

        learned = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        run.save(iteration=iteration, global_step=global_step, **learned)
    if global_step >= args.total_timesteps:
        trial_report(test_scores, test_tasks, args.eval_episodes, best, printed=True)
    return {tag: value for tag, value in run.metrics.items() if tag.startswith(("eval/", "charts/"))}


# ======================================================================================================================
# From here on: blocks shared with the other scripts, the same bytes in each. The algorithm ends above this line.
# ======================================================================================================================

# >>> shared: tasks

POINT_FAMILIES = ["PointRobot-v0", "SparsePointRobot-v0", "Navigation2D-v0"]
POINT_FAMILIES += [f"MultimodalNavigation{modes}-v0" for modes in (1, 2, 4, 6)]


class TaskEnvs(gym.vector.VectorEnv):
    """Lanes of a family of tasks; of total_lanes, this process steps those in the slice `lanes`.

    sample_tasks(n, rng) draws tasks (n, task size); reset(options={"task": tasks}) puts lane i on row i. Nothing resets
    by itself: a lane that has ended stays put and pays 0. horizon: steps per episode, 0 if the family sets none.
    num_modes: 0, or in a family with modes their number; the last number of a task is then the index of its mode.
    """

    num_modes = 0
    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, env_id, total_lanes, lanes, horizon, observation_space, action_space):
        self.env_id, self.total_lanes, self.lanes, self.horizon = env_id, total_lanes, lanes, horizon
        self.num_envs = len(range(total_lanes)[lanes])
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, self.num_envs)
        self.action_space = batch_space(action_space, self.num_envs)

    def sample_test_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return self.sample_tasks(n, rng)


class PointEnvs(TaskEnvs):
    """A point in the plane, paid minus the distance to a goal that it does not see. Formulas, sources: docs/tasks.md.

    tasks: (n, 2) goals; in MultimodalNavigation (n, 3), goal and index of its mode. An action of 1 pushes by 0.1 along
    its axis: the position, or in MultimodalNavigation the velocity.
    """

    def __init__(self, env_id: str, num_envs: int, lanes: slice):
        self.momentum = env_id.startswith("Multimodal")
        self.num_modes = int(env_id[-4]) if self.momentum else 0
        observation_space = gym.spaces.Box(-np.inf, np.inf, (4 if self.momentum else 2,), np.float64)
        action_space = gym.spaces.Box(-1, 1, (2,), np.float64)
        horizon = 20 if env_id.endswith("PointRobot-v0") else 100
        super().__init__(env_id, num_envs, lanes, horizon, observation_space, action_space)

    def sample_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        if self.env_id == "PointRobot-v0":
            return rng.uniform(-1, 1, (n, 2))
        if self.env_id == "Navigation2D-v0":
            return rng.uniform(-0.5, 0.5, (n, 2))
        if self.env_id == "SparsePointRobot-v0":
            angle = rng.uniform(0, np.pi, n)
            return np.stack([np.cos(angle), np.sin(angle)], axis=1)
        mode = (rng.integers(self.num_modes) + np.arange(n)) % self.num_modes  # dealt in turn
        angle = 2 * np.pi * mode / self.num_modes + (0 if self.num_modes == 6 else np.pi / 4)
        radius = 5 if self.num_modes == 6 else 5 * np.sqrt(2)  # a hexagon, or corners (±5, ±5)
        centre = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return np.column_stack([centre + rng.normal(size=(n, 2)), mode])

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        rng, shape = np.random.default_rng(seed), (self.total_lanes, 2)
        start = 1 if self.env_id == "PointRobot-v0" else 0.2 if self.momentum else 0
        self.goals = options["task"][:, :2]
        self.position = rng.uniform(-start, start, shape)[self.lanes]
        self.velocity = rng.uniform(-0.1, 0.1, shape)[self.lanes]  # only MultimodalNavigation has one
        self.ended = np.zeros(self.num_envs, bool)
        return self._obs(), {}

    def step(self, actions: np.ndarray):
        push = 0.1 * np.clip(actions, -1, 1)
        self.velocity = self.velocity + push if self.momentum else push
        self.position = np.where(self.ended[:, None], self.position, self.position + self.velocity)
        offset = self.position - self.goals
        distance = np.linalg.norm(offset, axis=1)
        reward, info = np.where(self.ended, 0, -distance), {}
        if self.env_id == "SparsePointRobot-v0":
            hit = distance <= 0.2
            info = {"sparse_reward": np.where(hit, 1 - distance, 0), "success": hit}
        if self.env_id == "Navigation2D-v0":
            self.ended = self.ended | (np.abs(offset) < 0.01).all(axis=1)
        return self._obs(), reward, self.ended, np.zeros(self.num_envs, bool), info

    def _obs(self) -> np.ndarray:
        return np.hstack([self.position, self.velocity]) if self.momentum else self.position


MUJOCO_FAMILIES = {  # model, frame skip, leading qpos that are not observed, noise of the start, control cost
    "HalfCheetahDir-v0": ("half_cheetah", 5, 1, 0.1, 0.05),
    "HalfCheetahVel-v0": ("half_cheetah", 5, 1, 0.1, 0.05),
    "AntDir-v0": ("ant", 5, 2, 0.1, 0.5),
    "AntGoal-v0": ("ant", 5, 0, 0.1, 0.1),
    "SparseAntGoal-v0": ("ant", 5, 0, 0.1, 0.1),
    "HumanoidDir-v0": ("humanoid", 5, 2, 0.01, 0.1),
    "Walker2dRandParams-v0": ("walker2d", 4, 1, 0.005, 0.001),
    "HopperRandParams-v0": ("hopper", 4, 1, 0.005, 0.001),
}


class MujocoEnvs(TaskEnvs):
    """The MuJoCo families, on gymnasium's model files; all lanes step in one call of MuJoCo's own thread pool.

    tasks: (n, 1) direction, velocity or angle; (n, 2) goal; or (n, F) factors on a model's dynamics. Formulas, sources
    and where they differ from gymnasium's environments: docs/tasks.md.
    """

    def __init__(self, env_id: str, num_envs: int, lanes: slice, num_threads: int):
        import mujoco.rollout

        self.name, self.frame_skip, self.hidden, self.noise, self.control_cost = MUJOCO_FAMILIES[env_id]
        self.model = mujoco.MjModel.from_xml_path(f"{Path(gym.__file__).parent}/envs/mujoco/assets/{self.name}.xml")
        self.varies = {}  # the model's arrays that a task scales, and the base of its factors
        if env_id.endswith("RandParams-v0"):
            self.varies = {"body_mass": 1.5, "body_inertia": 1.5, "geom_friction": 1.5, "dof_damping": 1.3}
            self.model.opt.timestep = 0.004  # the original's, with its frame skip of 4
        obs_size = self.model.nq + self.model.nv - self.hidden
        spaces = (gym.spaces.Box(-x, x, (n,), np.float64) for x, n in ((np.inf, obs_size), (1, self.model.nu)))
        super().__init__(env_id, num_envs, lanes, 200, *spaces)
        threads = num_threads or os.cpu_count()
        self.pool = mujoco.rollout.Rollout(nthread=threads)
        self.data = [mujoco.MjData(self.model) for _ in range(threads)]
        self.models = [copy.copy(self.model) if self.varies else self.model for _ in range(self.num_envs)]

    def sample_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        if self.env_id == "HalfCheetahDir-v0":
            return np.resize([1.0, -1.0], (n, 1))  # dealt in turn
        if self.env_id == "HalfCheetahVel-v0":
            return rng.uniform(0, 3, (n, 1))
        if self.env_id.endswith("Dir-v0"):
            return rng.uniform(0, 2 * np.pi, (n, 1))
        if self.varies:
            bases = np.concatenate([np.full(getattr(self.model, name).size, b) for name, b in self.varies.items()])
            return bases ** rng.uniform(-3, 3, (n, len(bases)))
        half = self.env_id == "SparseAntGoal-v0"  # a half circle of radius 2; AntGoal: a disc of radius 3
        angle, radius = rng.uniform(0, np.pi if half else 2 * np.pi, n), 2 if half else 3 * rng.uniform(size=n) ** 0.5
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        rng, nq, nv = np.random.default_rng(seed), self.model.nq, self.model.nv
        noise = rng.uniform(-self.noise, self.noise, (self.total_lanes, nq + nv))
        if self.name in ("half_cheetah", "ant"):
            noise[:, nq:] = self.noise * rng.normal(size=(self.total_lanes, nv))
        start = np.concatenate([[0.0], self.model.qpos0, np.zeros(nv)])  # time, qpos, qvel
        self.state = start + np.pad(noise, ((0, 0), (1, 0)))[self.lanes]
        self.tasks, self.ended = options["task"], np.zeros(self.num_envs, bool)
        for model, task in zip(self.models, self.tasks, strict=True) if self.varies else ():
            for name in self.varies:
                original = getattr(self.model, name)  # arrays of models are views: scale the original, into the copy
                getattr(model, name)[:] = original * task[: original.size].reshape(original.shape)
                task = task[original.size :]
        return self._obs(), {}

    def step(self, actions: np.ndarray):
        alive, (low, high) = np.flatnonzero(~self.ended), self.model.actuator_ctrlrange.T
        control, models = low + (np.clip(actions, -1, 1) + 1) / 2 * (high - low), [self.models[i] for i in alive]
        states, _ = self.pool.rollout(models, self.data, self.state[alive], control[alive, None], nstep=self.frame_skip)
        before, self.state[alive] = self.state[:, 1:3].copy(), states[:, -1]
        velocity = (self.state[:, 1:3] - before) / (self.frame_skip * self.model.opt.timestep)
        reward, healthy, info = self._judge(velocity)
        reward = np.where(self.ended, 0, reward - self.control_cost * (control**2).sum(axis=1))
        self.ended = self.ended | ~healthy
        return self._obs(), reward, self.ended, np.zeros(self.num_envs, bool), info

    def _judge(self, velocity: np.ndarray):
        """Reward without the cost of control, whether the lane goes on, and info; velocity (B, 2) of the root."""
        (x_velocity, y_velocity), qpos, task = velocity.T, self.state[:, 1:], self.tasks.T
        healthy = np.ones(self.num_envs, bool)
        if self.env_id == "HalfCheetahDir-v0":
            return task[0] * x_velocity, healthy, {}
        if self.env_id == "HalfCheetahVel-v0":
            return -np.abs(x_velocity - task[0]), healthy, {}
        if self.env_id.endswith("Goal-v0"):
            offset = qpos[:, :2] - self.tasks
            distance = np.linalg.norm(offset, axis=1)
            hit = distance <= 0.8
            info = {"sparse_reward": np.where(hit, 1 - distance / 0.8, 0), "success": hit}
            return -np.abs(offset).sum(axis=1), healthy, info if self.env_id.startswith("Sparse") else {}
        if self.env_id.endswith("RandParams-v0"):
            z, pitch = qpos[:, 1], np.abs(qpos[:, 2])
            walker = self.name == "walker2d"
            healthy = (0.8 < z) & (z < 2) & (pitch < 1) if walker else (0.7 < z) & (pitch < 0.2)
            return x_velocity + 1, healthy & (walker | (np.abs(qpos[:, 2:]) < 100).all(axis=1)), {}
        gain, survival, low, high = (1, 1, 0.2, 1) if self.name == "ant" else (1.25, 5, 1, 2)
        speed = x_velocity * np.cos(task[0]) + y_velocity * np.sin(task[0])
        return gain * speed + survival, (low <= qpos[:, 2]) & (qpos[:, 2] <= high), {}

    def _obs(self) -> np.ndarray:
        obs = self.state[:, 1 + self.hidden :].copy()
        if self.varies:
            obs[:, -self.model.nv :] = obs[:, -self.model.nv :].clip(-10, 10)
        return obs


class UserEnvs(TaskEnvs):
    """A registered environment whose unwrapped env has sample_tasks(n) and set_task(task), lane by lane.

    Held-out tasks come from its sample_test_tasks(n) if it has one, and num_modes is its own. [-1, 1] is mapped to the
    bounds of its Box actions; info["sparse_reward"] and info["success"] are passed on.
    """

    def __init__(self, env_id: str, num_envs: int, lanes: slice):
        try:
            envs = [gym.make(env_id, disable_env_checker=True) for _ in range(num_envs)[lanes]]
        except (gym.error.Error, ImportError, ValueError) as error:
            near = difflib.get_close_matches(env_id, [*POINT_FAMILIES, *MUJOCO_FAMILIES, *gym.registry])
            fail(f"no tasks {env_id}: {str(error).splitlines()[0]}" + f" Near: {', '.join(near)}." * bool(near))
        for method in ("sample_tasks", "set_task"):
            if not callable(getattr(envs[0].unwrapped, method, None)):
                fail(f"{env_id} is no family of tasks: it has no method {method} (see docs/tasks.md)")
        self.native = action_space = envs[0].action_space
        if isinstance(self.native, gym.spaces.Box):
            action_space = gym.spaces.Box(-1, 1, (math.prod(self.native.shape),), np.float64)
        elif not isinstance(self.native, gym.spaces.Discrete):
            fail(f"{env_id} has {type(self.native).__name__} actions; Box and Discrete are supported")
        self.envs = [gym.wrappers.FlattenObservation(env) for env in envs]
        self.num_modes = getattr(envs[0].unwrapped, "num_modes", 0)
        observation_space, horizon = self.envs[0].observation_space, envs[0].spec.max_episode_steps or 0
        super().__init__(env_id, num_envs, lanes, horizon, observation_space, action_space)

    def sample_tasks(self, n: int, rng: np.random.Generator, method: str = "sample_tasks") -> np.ndarray:
        self.envs[0].reset(seed=int(rng.integers(2**31)))
        tasks = np.asarray(getattr(self.envs[0].unwrapped, method)(n))
        if len(tasks) != n or tasks.dtype.kind not in "biuf":
            fail(f"{self.env_id}: {method}({n}) must return {n} rows of numbers, not {tasks.dtype} {tasks.shape}")
        return tasks

    def sample_test_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        own = hasattr(self.envs[0].unwrapped, "sample_test_tasks")
        return self.sample_tasks(n, rng, "sample_test_tasks" if own else "sample_tasks")

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        seeds = np.random.default_rng(seed).integers(2**31, size=self.total_lanes)[self.lanes]
        for env, task in zip(self.envs, options["task"], strict=True):
            env.unwrapped.set_task(task)
        self.obs = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(self.envs, seeds, strict=True)])
        self.terminated, self.truncated = np.zeros((2, self.num_envs), bool)
        return self.obs.copy(), {}

    def step(self, actions: np.ndarray):
        if isinstance(self.native, gym.spaces.Discrete):
            actions = self.native.start + actions
        else:
            low, high = (self.native.low, self.native.high) if self.native.is_bounded() else (-1, 1)
            actions = low + (np.clip(actions, -1, 1).reshape(-1, *self.native.shape) + 1) / 2 * (high - low)
        rewards, infos = np.zeros(self.num_envs), {}
        for i in np.flatnonzero(~(self.terminated | self.truncated)):
            result = self.envs[i].step(actions[i].astype(self.native.dtype))
            self.obs[i], rewards[i], self.terminated[i], self.truncated[i], info = result
            for name in info.keys() & {"sparse_reward", "success"}:
                infos.setdefault(name, np.zeros(self.num_envs))[i] = info[name]
        return self.obs.copy(), rewards, self.terminated.copy(), self.truncated.copy(), infos


def make_envs(env_id: str, num_envs: int, num_threads: int = 0, lanes: slice = slice(None)) -> TaskEnvs:
    """num_envs lanes of a family of tasks, of which this process steps `lanes`; ends the program if there is none."""
    if env_id in MUJOCO_FAMILIES:
        return MujocoEnvs(env_id, num_envs, lanes, num_threads)
    return (PointEnvs if env_id in POINT_FAMILIES else UserEnvs)(env_id, num_envs, lanes)


def require_finite(envs: TaskEnvs, values: dict, alive, tasks, t: int):
    """End the program if what a lane that is alive (B,) reports after step t, values (B, ...) by name, is not finite.

    Finite in torch's precision: 1e39 is not, in single precision.
    """
    largest = torch.finfo(torch.get_default_dtype()).max
    for name, value in values.items():
        bad = alive & ~(np.abs(value).reshape(len(alive), -1) <= largest).all(axis=1)
        if bad.any():
            lane, what = range(envs.total_lanes)[envs.lanes][bad.argmax()], name.rstrip("s").replace("_", " ")
            fail(f"{envs.env_id}: {what} is not finite in lane {lane}, step {t}, task {tasks[bad][0]}")


def require_finite_actions(actions: np.ndarray) -> np.ndarray:
    """actions, unless the policy that chose them has diverged."""
    if not np.isfinite(actions).all():
        fail("the policy has diverged, its actions are not finite: try smaller step sizes")
    return actions


def require_sparse_reward(envs: TaskEnvs, task: np.ndarray):
    """End the program if the tasks report no sparse reward; task: (1, task size)."""
    envs.reset(seed=0, options={"task": task.repeat(envs.num_envs, axis=0)})
    if "sparse_reward" not in envs.step(np.zeros(envs.action_space.shape, envs.action_space.dtype))[4]:
        fail(f"{envs.env_id} reports no sparse reward")


def episode_scores(batch) -> dict[str, torch.Tensor]:
    """Means over each task's episodes, (N,): undiscounted return and, where defined, success at any step."""
    scores = {"return": batch["rewards"].sum(-1).mean(1)}
    return scores | ({"success": batch["success"].amax(-1).mean(1)} if "success" in batch else {})


# <<< shared: tasks
# >>> shared: run

MAY_BE_ZERO = {"seed", "task_seed", "horizon", "num_train_tasks", "num_threads", "num_eval_steps"}
MAY_BE_ZERO |= {"gae_lambda", "cg_damping", "ent_coef", "embedding_size"}
MAY_BE_ZERO |= {"bias_size", "expert_noise", "expert_round_steps", "importance_clip"}
MAY_BE_ZERO |= {"init_mu_std"}
MAY_BE_ZERO |= {"posterior_steps", "extra_steps", "warmup_iterations", "kl_weight", "regularization", "context_window"}
FORMAT = 2  # of checkpoints; those without a number were written up to commit 2d14005, which reads them
MAY_CHANGE = {"resume", "evaluate", "total_timesteps", "cuda", "num_threads", "eval_every", "checkpoint_every"}
MAY_CHANGE_TO_EVALUATE = {"num_test_tasks", "num_eval_steps", "eval_episodes", "deterministic_eval", "test_reward"}
MAY_CHANGE_TO_EVALUATE |= {"eval_context", "exploration_episodes"}


def fail(message: str) -> NoReturn:
    """End the program with one line and a non-zero status."""
    raise SystemExit(f"error: {message}")


def keyed_rng(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """The generator of one purpose and key. There are no others, so that no draw depends on an earlier one.

    As a spawn key, (1,) and (1, 0) are two streams; as entropy they would be one.
    """
    entropy = [seed, zlib.crc32(purpose.encode())]
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=key))


def show(*lines: str):
    """Print on rank 0. A reader that has gone (head -1) or a full disk does not end the run."""
    if ranks()[0] == 0 and sys.stdout:
        try:
            print(*lines, sep="\n", flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def ranks() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def require_torchrun():
    """End the program if some of torchrun's variables are set, and not all, or not to what it sets them to."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}:
        return
    if missing := [name for name in names if name not in found]:
        fail(f"{', '.join(found)} without {', '.join(missing)}: start with torchrun, or unset them")
    if not all(value.isdecimal() for name, value in found.items() if name != "MASTER_ADDR"):
        fail(f"no numbers of torchrun: {found}")
    rank, size, local_rank, local_size = (int(found[name]) for name in names[:4])
    if not (rank < size and local_rank < local_size <= size):
        fail(f"RANK {rank} of {size}, LOCAL_RANK {local_rank} of {local_size}: not set by torchrun")


def shard(n: int) -> slice:
    """This rank's share of n items; the number of ranks divides n."""
    rank, size = ranks()
    return slice(rank * n // size, (rank + 1) * n // size)


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum of x over the ranks, in place."""
    try:
        if ranks()[1] > 1:
            torch.distributed.all_reduce(x)
    except RuntimeError as error:  # say so at once: torchrun is about to end this process
        reason = re.split(r"\. |\n", str(error))[0]
        sys.stderr.write(f"error: lost another rank; --resume goes on from the last checkpoint ({reason})\n")
        sys.exit(1)
    return x


def task_mean(x: torch.Tensor) -> float:
    """Mean of x over the tasks of all ranks."""
    return all_reduce(x.mean() / ranks()[1]).item()


def parse(args_class, argv: list[str] | None = None):
    """Args from the command line; those of the saved run are the defaults with --resume or --evaluate."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± or Greek letters
    args = tyro.cli(args_class, args=argv)
    words = sys.argv[1:] if argv is None else argv
    given = {word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for flag in ("--resume", "--evaluate"):
        if flag in given and not getattr(args, flag[2:]):
            fail(f"{flag}: the name of the folder is empty")
    folder = args.resume or args.evaluate
    if not folder or "--env-id" in given:
        sys.path.append(os.getcwd())  # the last place to look for module:Id-v0, if the user named it
    if folder:
        saved = args_class(**load_checkpoint(folder, args_class)["args"])
        if ":" in str(saved.env_id):
            show(f"tasks of {folder} come from {module_file(saved.env_id)}")
        args = tyro.cli(args_class, args=argv, default=saved)
        for name in asdict(saved).keys() - MAY_CHANGE - (MAY_CHANGE_TO_EVALUATE if args.evaluate else set()):
            if getattr(args, name) != getattr(saved, name):
                fail(f"--{name.replace('_', '-')} of {folder} is {getattr(saved, name)} and cannot change")
    return args


def module_file(env_id: str) -> str:
    """The file of module:Id-v0, found without importing it."""
    try:
        return importlib.util.find_spec(env_id.partition(":")[0]).origin
    except (AttributeError, ImportError, ValueError):
        lacking = f"{env_id} is not beside the script, nor installed"
        fail(f"{lacking}; if it is in the working folder, give --env-id {env_id} too")


def is_a(value, kind) -> bool:
    """Whether a flag's value is of its annotation: a type, a Literal, or a union of these."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(is_a(value, one) for one in get_args(kind))
    return type(value) is kind or (type(value) is int and kind is float)


def setup(args) -> torch.device:
    """Check the arguments that every script has, seed torch, set threads and device, join the ranks."""
    require_torchrun()
    kinds = get_type_hints(type(args))
    for name, value in asdict(args).items():
        flag, zero = f"--{name.replace('_', '-')} {value}", name in MAY_BE_ZERO
        if not is_a(value, kinds[name]):
            fail(f"{flag}: must be {getattr(kinds[name], '__name__', kinds[name])}")
        if type(value) in (int, float) and not (0 < value < math.inf or (zero and value == 0)):
            fail(f"{flag}: must be {'0 or more' if zero else 'above 0'}")
        if name in ("gamma", "gae_lambda", "tau", "expert_gamma") and value is not None and value > 1:
            fail(f"{flag}: must be at most 1")
    if args.resume and args.evaluate:
        fail("--resume and --evaluate exclude each other")
    if args.meta_batch_size % ranks()[1]:
        fail(f"--meta-batch-size {args.meta_batch_size}: not divisible by the {ranks()[1]} ranks")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda: torch finds no GPU")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.torch_deterministic)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.cuda else "cpu")
    if args.cuda:
        torch.cuda.set_device(device)  # before any collective, or all ranks meet on the first GPU
    if ranks()[1] > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if args.cuda else "gloo")
        atexit.register(torch.distributed.destroy_process_group)  # its threads can abort a Python that is ending
    return device


def layout(state, name: str = "") -> list[str]:
    """Where what lies in a checkpoint: name, type and, of tensors, dtype and shape of every entry."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return [f"{name} {type(state).__name__}"] + [line for k, x in items for line in layout(x, f"{name}/{k}")]
    shape = f" {state.dtype} {tuple(state.shape)}" if torch.is_tensor(state) else ""
    return [f"{name} {type(state).__name__}{shape}"]


def load_checkpoint(folder: str, args_class) -> dict:
    """The last checkpoint of a run of this script, on the CPU; ends the program if there is none.

    Nothing in it is executed (weights_only). A changed byte shows in the archive's checksums, which torch does not
    compare, and an entry that was added, lost or reshaped in its layout.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file() and any(Path(folder).glob("events.out.tfevents.*")):
        fail(f"{folder} was stopped before its first checkpoint: start again, without --resume")
    if not path.is_file():
        fail(f"{folder} is no run: there is no {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        algorithm, form, args = (checkpoint[name] for name in ("algorithm", "format", "args"))
        whole = checkpoint.pop("layout") == layout(checkpoint)
        args_class(**args) if algorithm == args_class.exp_name else None
    except Exception as error:  # a truncated or foreign file raises almost anything
        fail(f"{path} is damaged or no checkpoint of this version ({type(error).__name__})")
    if algorithm != args_class.exp_name:
        fail(f"{path} was written by {algorithm}.py")
    if form != FORMAT or not whole:
        fail(f"{path} was changed, or is of format {form}; this version reads format {FORMAT}")
    return checkpoint


class Run:
    """What surrounds training: the run's folder, TensorBoard, progress bar, checkpoints, signals. Rank 0 writes."""

    def __init__(self, args, global_step: int):
        self.args, self.metrics, self.signalled, self.writes = args, {}, False, ranks()[0] == 0
        self.first_step, self.start, self.printed = global_step, time.perf_counter(), time.perf_counter()
        self.handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.writes:
            name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
            self.folder = Path(args.resume or "runs/" + re.sub(r"[^\w.-]", "_", name))
            with self.writing():
                # purge_step hides what will be done again
                self.writer = SummaryWriter(str(self.folder), purge_step=global_step + 1)
                rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
                self.writer.add_text("hyperparameters", "\n".join(["|param|value|", "|-|-|", *rows]))
            show(f"writing to {self.folder}")
            self.terminal = bool(sys.stdout) and sys.stdout.isatty()
            file = sys.stdout if self.terminal else open(os.devnull, "w")
            self.bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True, file=file)

    @contextmanager
    def writing(self):
        """Ends the program with one line where the disk is full, the folder read-only, or `runs` a file."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch says "iostream error" of a full disk
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            kept = "; the last checkpoint is kept" if (self.folder / "checkpoint.pt").is_file() else ""
            fail(f"cannot write to {self.folder}: {reason}{kept}")

    def _on_signal(self, number, frame):
        self.signalled = True
        signal.signal(number, signal.SIG_DFL)  # a second one aborts

    def stopping(self) -> bool:
        """Whether a signal has asked any of the ranks to stop."""
        return bool(all_reduce(torch.tensor(int(self.signalled), device="cuda" if self.args.cuda else "cpu")))

    def log(self, metrics: dict[str, float], global_step: int):
        """Write scalars to TensorBoard, and move the bar; without a terminal, print it every ten seconds."""
        now = time.perf_counter()
        self.metrics |= metrics | {"charts/SPS": (global_step - self.first_step) / (now - self.start)}
        if self.writes:
            with self.writing():
                for tag in [*metrics, "charts/SPS"]:
                    self.writer.add_scalar(tag, self.metrics[tag], global_step)
            names = {"charts/pre_adaptation_return": "before", "charts/episodic_return": "after adaptation"}
            shown = [f"{name} {self.metrics[tag]:.2f}" for tag, name in names.items() if tag in self.metrics]
            self.bar.set_postfix_str(", ".join(shown), refresh=False)
            self.bar.update(global_step - self.bar.n)
            if not self.terminal and (now - self.printed > 10 or global_step >= self.args.total_timesteps):
                self.printed = now
                show(str(self.bar))

    def save(self, **state):
        """Replace checkpoint.pt, which is at no moment half written."""
        if self.writes:
            state |= {"algorithm": type(self.args).exp_name, "format": FORMAT}
            state |= {"args": asdict(self.args) | {"resume": "", "evaluate": ""}}
            with self.writing():
                self.writer.flush()  # first: what is logged up to a checkpoint is not logged again
                torch.save(state | {"layout": layout(state)}, self.folder / "checkpoint.tmp")
                os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def close(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.writes:
            self.bar.close()
            self.writer.close()
            if self.signalled and not sys.exc_info()[0]:
                show(f"stopped; --resume {self.folder} goes on from here")


def gather_scores(scores: dict[str, torch.Tensor], num_tasks: int) -> dict[str, np.ndarray]:
    """Scores (K + 1, num_tasks) from what each rank has filled into its columns of (K + 1, num_tasks or more) zeros."""
    if all_reduce(scores["return"].new_tensor(float("success" in scores))) > 0:  # some rank has met it
        scores.setdefault("success", torch.zeros_like(scores["return"]))
    return {name: all_reduce(score)[:, :num_tasks].cpu().numpy() for name, score in sorted(scores.items())}


def over_tasks(score: np.ndarray, tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean of score (..., M) over M tasks (M, ...), half its 95% interval, and the number of different tasks.

    Copies of a task are averaged first. Student's t, its quantile to 0.2% (Abramowitz and Stegun 26.7.5); below four
    different tasks the interval is NaN.
    """
    _, task, copies = np.unique([task.tobytes() for task in tasks], return_inverse=True, return_counts=True)
    score = np.stack([np.bincount(task, row) for row in score.reshape(-1, len(tasks))]) / copies
    n, nu = len(copies), max(len(copies) - 1, 1)
    quantile = 1.96 + 2.372 / nu + 2.823 / nu**2 + 2.556 / nu**3 + 1.589 / nu**4 if n > 3 else math.nan
    half = quantile * score.std(1, ddof=int(n > 1)) / n**0.5
    return score.mean(1), half, n


def report(scores: dict[str, np.ndarray], tasks: np.ndarray, episodes: int, printed=False) -> dict[str, float]:
    """Meta-test scores (K + 1, M), or (M,), of tasks (M, ...) as eval/* metrics; printed, also as a table.

    Row k is what comes after k x episodes.
    """
    metrics, table = {}, []
    for name, score in scores.items():
        means, halves, different = over_tasks(score, tasks)
        shown = [f"{x:10.3f}" + f" ± {half:.3f}" * (different > 3) for x, half in zip(means, halves, strict=True)]
        if score.ndim == 1:
            metrics[f"eval/{name}"] = float(means[0])
            table.append(f"{name}: {shown[0].strip()}")
            continue
        few = f" ({different} different)" if different < len(tasks) else ""
        interval = " and 95% interval over tasks" if different > 3 else ""
        table.append(f"{name} on {len(tasks)} held-out tasks{few}, mean{interval}:")
        for k, mean in enumerate(means):
            metrics[f"eval/{name}_after_{k * episodes}_episodes"] = float(mean)
            table.append(f"  after {k * episodes:4d} episodes {shown[k]}")
    if printed:
        show(*table)
    return metrics


# <<< shared: run
# >>> shared: advantages


def masked_mean(x: torch.Tensor, mask: torch.Tensor, dim=None, keepdim=False) -> torch.Tensor:
    """Mean of x where mask is 1, over dim or everything."""
    return (x * mask).sum(dim, keepdim) / mask.sum(dim, keepdim)


def discounted_sum(x: torch.Tensor, discount: float) -> torch.Tensor:
    """y_t = Σ_{s ≥ t} discount^(s-t) x_s along the last axis, as one product with a triangular matrix."""
    steps = torch.arange(x.shape[-1], device=x.device)
    ahead = steps[:, None] - steps  # (s, t)
    return x @ torch.where(ahead >= 0, discount ** ahead.clamp(min=0).to(x.dtype), 0)


def gae(rewards, values, mask, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimates (..., T); the value after an episode's last step is 0, a time limit included."""
    values = values * mask
    next_values = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    return discounted_sum((rewards + gamma * next_values - values) * mask, gamma * gae_lambda)


# <<< shared: advantages
# ======================================================================================================================
# The task families of the RL² paper, which only this script has.
# ======================================================================================================================


BANDITS = re.compile(r"Bandit([1-9]\d*)Arms([1-9]\d*)-v0")  # their ids


class BanditEnvs(TaskEnvs):
    """Bandit{k}Arms{n}-v0: n pulls of k arms that pay 1 with a probability of their own, U[0, 1], and else 0.

    tasks: (B, k) probabilities. Nothing is observed. An episode is n pulls; as every pull ends an episode of the paper,
    info["episode_end"] is always 1.
    """

    def __init__(self, env_id: str, num_envs: int, lanes: slice):
        self.arms, pulls = map(int, BANDITS.fullmatch(env_id).groups())
        nothing = gym.spaces.Box(0, 0, (0,), np.float64)
        super().__init__(env_id, num_envs, lanes, pulls, nothing, gym.spaces.Discrete(self.arms))

    def sample_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(size=(n, self.arms))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.rng, self.probabilities = np.random.default_rng(seed), options["task"]
        return np.zeros((self.num_envs, 0)), {}

    def step(self, actions: np.ndarray):
        draws, never = self.rng.uniform(size=self.total_lanes)[self.lanes], np.zeros(self.num_envs, bool)
        pays = draws < self.probabilities[np.arange(self.num_envs), actions]
        return np.zeros((self.num_envs, 0)), pays.astype(float), never, never, {"episode_end": ~never}


class TabularMDPEnvs(TaskEnvs):
    """TabularMDP-v0: 10 states, 5 actions, 10 steps from state 0; rewards N(μ, 1), μ ~ N(1, 1); P ~ Dirichlet(1, …, 1).

    tasks: (B, 550): μ (10, 5) and P (10, 5, 10), both flat. Observed is the state, one-hot.
    """

    def __init__(self, env_id: str, num_envs: int, lanes: slice):
        one_hot = gym.spaces.Box(0, 1, (10,), np.float64)
        super().__init__(env_id, num_envs, lanes, 10, one_hot, gym.spaces.Discrete(5))

    def sample_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        mean, weights = rng.normal(1, 1, (n, 50)), rng.exponential(size=(n, 50, 10))
        return np.hstack([mean, (weights / weights.sum(-1, keepdims=True)).reshape(n, 500)])

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.rng, self.tasks, self.state = np.random.default_rng(seed), options["task"], np.zeros(self.num_envs, int)
        return np.eye(10)[self.state], {}

    def step(self, actions: np.ndarray):
        noise = self.rng.normal(size=self.total_lanes)[self.lanes]
        draws = self.rng.uniform(size=self.total_lanes)[self.lanes]
        pair, lanes, never = 5 * self.state + actions, np.arange(self.num_envs), np.zeros(self.num_envs, bool)
        rewards = self.tasks[lanes, pair] + noise
        transition = self.tasks[:, 50:].reshape(-1, 50, 10)[lanes, pair]
        self.state = (transition.cumsum(1)[:, :-1] < draws[:, None]).sum(1)
        return np.eye(10)[self.state], rewards, never, never, {}


def make_trial_envs(env_id: str, num_envs: int, num_threads: int = 0, lanes: slice = slice(None)) -> TaskEnvs:
    """make_envs, and the families above."""
    if BANDITS.fullmatch(env_id):
        return BanditEnvs(env_id, num_envs, lanes)
    if env_id == "TabularMDP-v0":
        return TabularMDPEnvs(env_id, num_envs, lanes)
    return make_envs(env_id, num_envs, num_threads, lanes)


if __name__ == "__main__":
    main(parse(Args))

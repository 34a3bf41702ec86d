"""PEARL: Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context Variables.
Rakelly, Zhou, Quillen, Finn and Levine, ICML 2019, arXiv 1903.08254, Algorithms 1 and 2.

Meta-learns an encoder, which turns the transitions seen in a task (the context c) into a belief q(z|c) about which task
it is, and a soft actor-critic (SAC) whose actor and critics read a z drawn from it. Adapting is inferring z. A set of
training tasks, each with its own replay; first every task gets its initial steps, with z from the prior N(0, I). Then:

(1) Pick tasks, and forget their contexts. Collect in all of them at once, a new z for every episode: from the prior,
    then from the belief. Then collect more steps from the belief, which the replay gets but not the context.
(2) Gradient steps: draw a meta-batch of N tasks; in each a context c from its recent steps and a batch from its replay.
(3) Belief: q(z|c) is the product of one Gaussian per transition, normalised. Draw one z per task.
(4) Critics: twin Q(s, a, z) towards y = scale r + γ (min Q'(s', a', z) - log π(a'|s', z)), a' from the actor.
(5) Encoder: the gradient of (4) through z, and of the KL from the prior to the belief; of nothing else.
(6) Actor: lower log π(a|s, z) - min Q(s, a, z), z a constant. Targets Q' follow the critics slowly.
(7) Meta-test: in held-out tasks, an episode with z from the prior, then from the belief given all of the task's steps.

Train:     python pearl.py
Resume:    python pearl.py --resume runs/NAME
Evaluate:  python pearl.py --evaluate runs/NAME

Differs from the paper in: twin target critics (there a value network and its target), contexts without repetition, and
--preset cpu (smaller networks, batches and step counts; --preset paper has the originals). The list: docs/pearl.md.
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
import torch.nn.functional as F
import tyro
from gymnasium.vector.utils import batch_space
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = "pearl"
    """name of the experiment, part of the run's folder"""
    env_id: str = "SparsePointRobot-v0"
    """task family: one of the suite (docs/tasks.md), or module:Id-v0 for your own"""
    seed: int = 1
    """seed of the initial parameters, episodes and draws from the replay"""
    task_seed: int = 0
    """seed of the task draws: training and held-out tasks depend on nothing else"""
    preset: Literal["cpu", "paper"] = "cpu"
    """values of all flags that are None, by env_id (docs/pearl.md): paper's, or smaller ones for a CPU"""
    total_timesteps: int | None = None
    """environment steps of training, meta-test excluded"""
    meta_batch_size: int | None = None
    """N, tasks per gradient step"""
    episodes_per_task: int = 1
    """E, episodes per task that are collected at once, between two updates of the belief"""
    horizon: int = 0
    """T, steps per episode at most (0: the family's own)"""
    num_train_tasks: int | None = None
    """size of the set of training tasks; each has its own replay"""
    num_test_tasks: int | None = None
    """held-out tasks of the meta-test (unset: 100 on the point families, 40 elsewhere)"""
    num_eval_steps: int | None = None
    """updates of the belief at meta-test (unset: 19 on the sparse families, 2 elsewhere)"""
    eval_episodes: int | None = None
    """episodes per task before each update of the belief at meta-test (unset: episodes_per_task)"""
    deterministic_eval: bool = True
    """score with the mean action instead of sampled ones"""
    train_reward: Literal["dense", "sparse"] | None = None
    """reward in the context at meta-training; the critics always see the dense one (unset: sparse on Sparse*)"""
    test_reward: Literal["dense", "sparse"] | None = None
    """reward of the meta-test; contexts are of train_reward (unset: sparse on Sparse*)"""
    gamma: float | None = None
    """discount per step"""
    cuda: bool = False
    """compute on the GPU (worth it with --compile)"""
    torch_deterministic: bool = True
    """use deterministic kernels only"""
    num_threads: int = 0
    """CPU threads of torch and of the simulator (0: all cores)"""
    eval_every: int = 25
    """iterations between meta-tests"""
    checkpoint_every: int = 10
    """iterations between checkpoints"""
    resume: str = ""
    """folder of the run to go on with, from its last checkpoint"""
    evaluate: str = ""
    """folder of the run to meta-test, without training"""

    picked_tasks: int | None = None
    """tasks in which an iteration collects"""
    initial_steps: int | None = None
    """steps per task before the first gradient step, z from the prior; whole episodes, as in the next three"""
    prior_steps: int | None = None
    """steps per picked task with z from the prior, for context and replay"""
    posterior_steps: int | None = None
    """steps per picked task with z from the belief, for context and replay"""
    extra_steps: int | None = None
    """steps per picked task with z from the belief, for the replay alone"""
    gradient_steps: int | None = None
    """gradient steps per iteration"""
    warmup_iterations: int | None = None
    """iterations, from the first with gradient steps on, that take warmup_gradient_steps instead"""
    warmup_gradient_steps: int = 1000
    """gradient steps per iteration of the warm-up, in which the encoder learns the tasks' contexts by heart"""
    batch_size: int | None = None
    """transitions per task in a gradient step"""
    context_size: int | None = None
    """transitions per task that the encoder reads in a gradient step"""
    context_segment: int | None = None
    """length of the runs of consecutive transitions that a context is made of"""
    context_window: int | None = None
    """latest steps per task that contexts are drawn from (0, and in the warm-up: the last collection's)"""
    context_next_obs: bool | None = None
    """whether the context has the next observation (unset: where the dynamics vary)"""
    replay_size: int | None = None
    """transitions kept per task, the oldest are overwritten (unset: enough for the whole run)"""
    latent_size: int | None = None
    """Z, dimensions of z"""
    hidden_size: int | None = None
    """units in each of the three hidden layers of actor and critics"""
    encoder_size: int | None = None
    """units in each of the three hidden layers of the encoder"""
    learning_rate: float | None = None
    """step size of Adam, for all networks"""
    anneal: bool | None = None
    """let learning_rate fall linearly, to 0 at total_timesteps"""
    tau: float = 0.005
    """share of the critics in the targets, per gradient step"""
    reward_scale: float | None = None
    """factor on the critics' reward"""
    temperature: float | None = None
    """weight of the entropy in the critics' and the actor's objective"""
    kl_weight: float | None = None
    """weight of meta_batch_size x the mean over tasks of the KL, beside the critics' mean squared error"""
    regularization: float | None = None
    """weight of the actor's squared mean (before the tanh) and squared log std"""
    exploration_episodes: int | None = None
    """episodes of a meta-test before the belief is first used, z from the prior"""
    eval_context: Literal["own", "none", "shuffled"] = "own"
    """context at meta-test, for comparison: none keeps the prior, shuffled gives each task that of another"""
    compile: bool = False
    """capture the gradient step as a CUDA graph (needs --cuda and one process)"""


# --------------------------------------------------------------------------------------------------------- the presets

PRESETS = ["num_train_tasks", "meta_batch_size", "picked_tasks", "initial_steps", "prior_steps", "posterior_steps"]
PRESETS += ["extra_steps", "gradient_steps", "batch_size", "context_size", "gamma"]
PRESETS += ["reward_scale", "kl_weight", "exploration_episodes", "total_timesteps"]
# fmt: off
PAPER = {  # the configurations of the authors' code, katerakelly/oyster
    "HalfCheetahDir-v0":       (2,  2, 2, 2000, 1000,   0, 1000,  800, 512,  256, 0.99,   5.0, 0.2, 2, 5_000_000),
    "AntDir-v0":             (100, 16, 5, 2000,  400,   0,  600, 4000, 256,  256, 0.99,   5.0, 0.1, 2, 2_700_000),
    "AntGoal-v0":            (150, 10, 5, 2000,  400,   0,  600, 4000, 256,  256, 0.99,   5.0, 1.0, 2, 2_800_000),
    "SparseAntGoal-v0":      (150, 10, 5, 2000,  400,   0,  600, 4000, 256,  256, 0.99,   5.0, 1.0, 2, 2_800_000),
    "HumanoidDir-v0":        (100, 16, 5, 2000,  400,   0,  600, 4000, 256,  256, 0.99,   5.0, 0.1, 2, 2_700_000),
    "Walker2dRandParams-v0":  (40, 10, 5, 2000,  400,   0,  600, 4000, 256,  100, 0.99,   5.0, 0.1, 2, 2_580_000),
    "HopperRandParams-v0":    (40, 10, 5, 2000,  400,   0,  600, 4000, 256,  100, 0.99,   5.0, 0.1, 2, 2_580_000),
    "PointRobot-v0":          (80, 16, 5,  200,  200,   0,  200, 1000, 256,   64, 0.99, 100.0, 0.1, 1, 1_016_000),
    "SparsePointRobot-v0":    (80, 16, 10, 200,  100, 900,    0, 1000, 256, 1000, 0.90, 100.0, 1.0, 5, 5_016_000),
    "":                      (100, 16, 5, 2000,  400,   0,  600, 2000, 256,  100, 0.99,   5.0, 0.1, 2, 2_700_000),
}  # "": all other families, HalfCheetahVel-v0 among them
CPU = {
    "HalfCheetahDir-v0":       (2,  2, 2, 2000, 1000,   0, 1000,  400, 256,  256, 0.99,   5.0, 0.2, 2,   400_000),
    "PointRobot-v0":         (80, 16, 16,  200,   60,   0,   60,  200,  64,   40, 0.90,  1.0, 1e-5, 1, 1_000_000),
    "SparsePointRobot-v0":    (40, 10, 10, 200,  100, 300,    0,  200,  64,  400, 0.90,  1.0, 1e-4, 15, 1_200_000),
    "":                      (100, 16, 5, 2000,  400,   0,  600,  500,  64,  100, 0.99,   5.0, 0.1, 2,   500_000),
}
# fmt: on
# what the tables do not have: the same for all families, but for two of --preset cpu (docs/pearl.md#presets says why)
COMMON = {"context_segment": 1, "context_window": 0, "temperature": 1.0, "regularization": 1e-3, "anneal": False}
COMMON |= {"warmup_iterations": 0, "latent_size": 5}
CPU_SPECIAL = {name: {"context_segment": 20, "temperature": 0.01} for name in ("PointRobot-v0", "SparsePointRobot-v0")}
CPU_SPECIAL["PointRobot-v0"] |= {"context_window": 1000, "encoder_size": 128, "latent_size": 8, "anneal": True}
CPU_SPECIAL["SparsePointRobot-v0"] |= {"context_window": 1600, "encoder_size": 32, "regularization": 1e-5}
CPU_SPECIAL["SparsePointRobot-v0"] |= {"warmup_iterations": 43}


def with_preset(args: Args) -> Args:
    """args with values in place of None."""
    cpu, sparse = args.preset == "cpu", args.env_id.startswith("Sparse")
    table, small = (CPU if cpu else PAPER), 64 if args.env_id in POINT_FAMILIES else 128
    values = dict(zip(PRESETS, table.get(args.env_id, table[""]), strict=True))
    widths, rate = ((small, small), 1e-3) if cpu else ((300, 200), 3e-4)
    values |= {"hidden_size": widths[0], "encoder_size": widths[1], "learning_rate": rate}
    values |= COMMON | (CPU_SPECIAL.get(args.env_id, {}) if cpu else {})
    values |= {"train_reward": "sparse" if sparse else "dense", "test_reward": "sparse" if sparse else "dense"}
    values |= {"num_eval_steps": 19 if sparse else 2, "eval_episodes": args.episodes_per_task}
    values |= {"num_test_tasks": 100 if args.env_id in POINT_FAMILIES else 40}
    values |= {"context_next_obs": args.env_id.endswith("RandParams-v0")}
    return replace(args, **{name: value for name, value in values.items() if getattr(args, name) is None})


# -------------------------------------------------------------------------------------------------------- the networks


class Agent(nn.Module):
    """The encoder, and actor and critics that read z beside the observation. Initialised as in the authors' code."""

    def __init__(self, obs_size, action_size, context_width, latent_size, hidden_size, encoder_size):
        super().__init__()
        self.encoder = MLP(context_width, encoder_size, 2 * latent_size)
        self.actor = MLP(obs_size + latent_size, hidden_size, 2 * action_size, last=1e-3)
        self.critics = MLP(obs_size + action_size + latent_size, hidden_size, 1, stack=2)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.latent_size = latent_size

    def prior(self, n) -> tuple[torch.Tensor, torch.Tensor]:
        """The belief about n tasks of which nothing is known: mean (n, Z), variance (n, Z)."""
        mean = next(self.parameters()).new_zeros(n, self.latent_size)
        return mean, torch.ones_like(mean)

    def act(self, obs, z, noise) -> tuple[torch.Tensor, ...]:
        """obs (..., O), z (..., Z), noise (..., A) -> action, its log-probability, mean and log std before the tanh."""
        return tanh_gaussian(self.actor(torch.cat([obs, z], -1)), noise)

    def values(self, critics, obs, action, z) -> torch.Tensor:
        """obs (..., O), action (..., A), z (..., Z) -> (2, ...), what each of the twin critics says."""
        x = torch.cat([obs, action, z], -1)
        return critics(x.expand(2, *x.shape)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------- the algorithm


def belief(factors, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """(3) q(z|c): factors (N, C, 2Z) from the encoder, mask (N, C) -> mean (N, Z), variance (N, Z).

    Each transition gives a Gaussian factor, a mean and by softplus a variance. Their product has the sum of their
    precisions and the precision-weighted mean. The prior is no factor; it is the belief where there is no transition.
    """
    mean, variance = factors.chunk(2, -1)
    precision = mask.unsqueeze(-1) / F.softplus(variance).clamp(min=1e-7)
    total = torch.where(mask.any(1, keepdim=True), precision.sum(1), 1)
    return (precision * mean).sum(1) / total, 1 / total


def kl_to_prior(mean, variance) -> torch.Tensor:
    """(5) KL(q(z|c) ‖ N(0, I)), nats, summed over z's dimensions: (N, Z), (N, Z) -> (N,)."""
    return 0.5 * (variance + mean**2 - 1 - variance.log()).sum(-1)


def critic_loss(agent, batch, z, noise, gamma, reward_scale, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """(4) The critics' mean squared errors, summed, and their mean value; batch (N, B, ...) by name, z (N, B, Z)."""
    with torch.no_grad():
        next_action, next_logprob, *_ = agent.act(batch["next_obs"], z, noise)
        next_values = agent.values(agent.targets, batch["next_obs"], next_action, z)
        rewards, terminated = reward_scale * batch["dense_rewards"].squeeze(-1), batch["terminated"].squeeze(-1)
        y = soft_target(rewards, terminated, next_values, next_logprob, gamma, temperature)
    values = agent.values(agent.critics, batch["obs"], batch["actions"], z)
    return (values - y).square().mean((1, 2)).sum(), values.mean()


def actor_loss(agent, batch, z, noise, regularization, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """(6) The actor's loss and its mean log-probability; batch (N, B, ...) by name, z (N, B, Z), a constant."""
    z = z.detach()
    action, logprob, mean, log_std = agent.act(batch["obs"], z, noise)
    value = agent.values(agent.critics, batch["obs"], action, z).amin(0)
    penalty = regularization * (mean.square().mean() + log_std.square().mean())
    return (temperature * logprob - value).mean() + penalty, logprob.mean()


def gradient_step(
    agent, optimizers, batch, context, mask, noise, n, gamma, reward_scale, temperature, kl_weight, regularization, tau
) -> torch.Tensor:
    """(3)-(6) One step of all networks; n: tasks of all ranks together, N of them here. Returns the values of LOSSES.

    batch: (N, B, ...) by name; context (N, C, W), its mask (N, C); noise: normal, for z (N, Z) and two actions
    (N, B, A).
    """
    # (3) one z per task
    mean, variance = belief(agent.encoder(context), mask)
    z = (mean + variance.sqrt() * noise[0]).unsqueeze(1).expand(-1, batch["obs"].shape[1], -1)

    # (4), (5) critics and encoder
    qf_loss, qf_values = critic_loss(agent, batch, z, noise[1], gamma, reward_scale, temperature)
    kl = kl_to_prior(mean, variance).mean()
    apply_gradient(optimizers["critics"], qf_loss + kl_weight * n * kl)

    # (6) the actor, with the critics just updated, and the targets
    pg_loss, logprob = actor_loss(agent, batch, z, noise[2], regularization, temperature)
    apply_gradient(optimizers["actor"], pg_loss)
    follow(agent.targets, agent.critics, tau)
    return torch.stack([qf_loss, qf_values, kl, variance.sqrt().mean(), pg_loss, -logprob]).detach()


LOSSES = ["qf_loss", "qf_values", "kl", "posterior_std", "actor_loss", "entropy"]
COLUMNS = ["obs", "actions", "rewards", "next_obs", "dense_rewards", "terminated"]  # the encoder reads the first ones


def draw_context(replay, window, ids, size, segment, longest, width, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """At most `size` different transitions of the context of each task: (N, C, width), and their mask (N, C).

    window (tasks, 2): where a task's context starts in its replay, and its length; of it, the first `longest` count.
    The draw is one of segments, runs of `segment` consecutive transitions.
    """
    first, length = window[ids].unbind(1)
    starts = torch.arange(0, longest, segment, device=window.device)
    keys = torch.rand(len(ids), len(starts), generator=generator, device=window.device)
    keys = keys.masked_fill(starts >= length.unsqueeze(1), -1)
    chosen = starts[keys.topk(min(size // segment, len(starts))).indices]  # the largest of random keys: a random draw
    offset = (chosen.unsqueeze(2) + torch.arange(segment, device=window.device)).flatten(1)
    mask = (offset < length.unsqueeze(1)).to(replay.rows.dtype)
    return replay.gather(ids, first.unsqueeze(1) + offset)[..., :width], mask


def draw_batch(generator, replay, window, n, batch_size, sizes, latent_size, **context_settings) -> tuple:
    """(2) What gradient_step takes, for n of the tasks in the replay; sizes: of the COLUMNS of its rows."""
    random = {"generator": generator, "device": window.device}
    ids = torch.rand(len(window), **random).topk(n).indices
    batch = dict(zip(COLUMNS, replay.sample(ids, batch_size, generator).split(sizes, -1), strict=True))
    context, mask = draw_context(replay, window, ids, generator=generator, **context_settings)
    shapes = (n, latent_size), (n, batch_size, sizes[1]), (n, batch_size, sizes[1])
    return batch, context, mask, [torch.randn(shape, **random) for shape in shapes]


def collect(mean, variance, tasks, rng, agent, envs, horizon, reward, deterministic=False) -> dict[str, torch.Tensor]:
    """(1), (7) E episodes in each of N tasks, each with a z of its own from the belief, mean and variance (N, Z).

    tasks: (N, task size). Returns (N, E, T, ...) by name; contexts see rewards, critics dense_rewards.
    """
    n, lanes = len(tasks), envs.total_lanes
    draws = rng.normal(size=(lanes, mean.shape[-1])), rng.normal(size=(lanes, horizon, *envs.single_action_space.shape))
    for_z, for_actions = (torch.as_tensor(x[envs.lanes], dtype=mean.dtype, device=mean.device) for x in draws)
    z = (mean.unsqueeze(1) + variance.sqrt().unsqueeze(1) * for_z.unflatten(0, (n, -1))).flatten(0, 1)
    for_actions = for_actions * (not deterministic)

    def act(obs, t):  # (N E, O) -> (N E, A)
        return agent.act(obs, z, for_actions[:, t])[0]

    with torch.no_grad():
        batch = rollout(envs, act, np.repeat(tasks, envs.num_envs // n, axis=0), horizon, rng, mean.device)
    batch["dense_rewards"] = batch["rewards"]
    if reward == "sparse":
        batch["rewards"] = batch["sparse_reward"]
    return {name: x.unflatten(0, (n, -1)) for name, x in batch.items()}


def to_rows(batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Episodes (N, E, T, ...) by name as rows of the replay (N, E T, W), and their mask (N, E T)."""
    columns = [batch[name] if batch[name].ndim == 4 else batch[name].unsqueeze(-1) for name in COLUMNS]
    return torch.cat(columns, -1).flatten(1, 2), batch["mask"].flatten(1, 2)


def explore(phases, ids, replay, window, context_window, agent, collect, key, **context_settings) -> list[dict]:
    """(1) Collect in the tasks ids of this rank, whose contexts start anew; returns the episodes, round by round.

    phases: steps per task by name, on average over the tasks; collect: collect with its settings; key: of the draws.
    With a context_window, the contexts become the latest so many steps in the end.
    """
    rounds, window[ids] = [], torch.stack([replay.count[ids], torch.zeros_like(ids)], 1)
    for phase, steps in phases.items():
        done = 0
        while done < steps * len(ids) * ranks()[1]:
            rng, (mean, variance) = keyed_rng(*key, len(rounds)), agent.prior(len(ids))
            if phase in ("posterior", "extra") and done:  # the first episodes of a phase are from the prior (original)
                generator = torch.Generator(ids.device).manual_seed(int(rng.integers(2**63)))
                context, mask = draw_context(replay, window, ids, generator=generator, **context_settings)
                with torch.no_grad():
                    mean, variance = belief(agent.encoder(context), mask)
            rounds.append(collect(mean, variance, rng=rng))
            rows, mask = to_rows(rounds[-1])
            replay.add(ids, rows, mask)
            if phase != "extra":
                window[ids, 1] += mask.sum(1).long()
            done += int(all_reduce(mask.sum()))
    if context_window:
        length = replay.count[ids].clamp(max=min(context_window, replay.capacity))
        window[ids] = torch.stack([replay.count[ids] - length, length], 1)
    return rounds


def evaluate(
    tasks, agent, collect, group, width, reward, num_steps, exploration, context, seed, deterministic=False
) -> dict:
    """(7) Meta-test on tasks (M, task size): the scores of num_steps + 1 rounds of episodes, scored by `reward`.

    collect: collect with its settings, whose lanes hold `group` tasks. The belief is used after `exploration` rounds;
    context: "own", "none" or "shuffled", see Args. Returns {"return": (num_steps + 1, M), ...}, means over a round's
    episodes. Draws depend on the seed alone. Contexts are of sampled episodes, as in training;
    deterministic ones are extra, with the same z (in the original they make the context).
    """
    members = np.arange(group)[shard(group)]  # the last ones wrap around
    scores, rows, masks = {}, [], []
    for k in range(num_steps + 1):
        mean, variance = agent.prior(len(members))
        if k >= exploration and context != "none":
            with torch.no_grad():
                mean, variance = belief(agent.encoder(torch.cat(rows, 1)[..., :width]), torch.cat(masks, 1))
        if context == "shuffled":
            mean, variance = mean.roll(1, 0), variance.roll(1, 0)
        play = partial(collect, mean, variance, tasks[members % len(tasks)])
        batch = play(keyed_rng(seed, "eval", k))
        for parts, x in zip((rows, masks), to_rows(batch), strict=True):
            parts.append(x)
        batch = play(keyed_rng(seed, "eval", k), deterministic=True) if deterministic else batch
        batch["rewards"] = batch["sparse_reward" if reward == "sparse" else "dense_rewards"]
        for name, score in episode_scores(batch).items():
            scores.setdefault(name, score.new_zeros(num_steps + 1, group))[k, members] = score
    return gather_scores(scores, len(tasks))


def repeat(step, times: int, generator: torch.Generator, capture: bool) -> torch.Tensor:
    """The mean of what `times` calls of step() return; with capture, a few calls and then replays of a CUDA graph."""
    eager = min(times, 3) if capture else times  # a capture needs some calls before it, on another stream
    stream = torch.cuda.Stream() if capture else None
    with torch.cuda.stream(stream):
        total = sum(step() for _ in range(eager))
    if eager < times:
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            total += step()
        for _ in range(times - eager):
            graph.replay()
    return total / times


def main(args: Args) -> dict[str, float]:
    """Train, resume or only evaluate; returns the last value of every eval/* and charts/* tag."""
    args = with_preset(args)
    device = setup(args)
    checkpoint = load_checkpoint(args.resume or args.evaluate, Args) if args.resume or args.evaluate else {}
    iteration, global_step = checkpoint.get("iteration", 0), checkpoint.get("global_step", 0)
    if args.resume and global_step >= args.total_timesteps:
        show(f"{args.resume} is complete; its meta-test:")
        args = replace(args, resume="", evaluate=args.resume)
    rank, num_ranks = ranks()
    if not args.num_train_tasks:
        fail("--num-train-tasks 0: every training task has a replay of its own, so that there must be a set of them")
    if args.compile and (not args.cuda or num_ranks > 1):
        fail("--compile captures a CUDA graph: it needs --cuda, and one process")
    for flag, value in (("meta-batch-size", args.meta_batch_size), ("picked-tasks", args.picked_tasks)):
        if value > args.num_train_tasks:
            fail(f"--{flag} {value}: more than --num-train-tasks {args.num_train_tasks}")
        if value % num_ranks or args.num_train_tasks % num_ranks:
            fail(f"--{flag} {value}, --num-train-tasks {args.num_train_tasks}: not divisible by the {num_ranks} ranks")
    available = args.context_window or args.prior_steps + args.posterior_steps
    if args.context_size > available:
        fail(f"--context-size {args.context_size}: more than the {available} steps that contexts are drawn from")
    if args.context_segment > args.context_size:
        fail(f"--context-segment {args.context_segment}: more than --context-size {args.context_size}")
    exploration = math.ceil(args.exploration_episodes / args.eval_episodes)  # rounds of a meta-test
    if exploration > args.num_eval_steps > 0 and args.eval_context != "none":
        played = f"{args.num_eval_steps} x {args.eval_episodes} episodes before a meta-test's last ones"
        flag = f"--exploration-episodes {args.exploration_episodes}"
        fail(f"{flag}: more than the {played}, so that the belief is never used")

    # tasks, and environments with a lane per episode; each rank has its share of the tasks and lanes
    group = math.ceil(args.num_test_tasks / num_ranks) * num_ranks
    lanes, eval_lanes = args.picked_tasks * args.episodes_per_task, group * args.eval_episodes
    envs = make_envs(args.env_id, lanes, args.num_threads, shard(lanes))
    if isinstance(envs.single_action_space, gym.spaces.Discrete):
        fail(f"{args.env_id} has Discrete actions; pearl.py needs Box")
    eval_envs = make_envs(args.env_id, eval_lanes, args.num_threads, shard(eval_lanes))
    horizon = args.horizon or envs.horizon or fail(f"{args.env_id} has no time limit of its own: give --horizon")
    train_tasks = envs.sample_tasks(args.num_train_tasks, np.random.default_rng([args.task_seed, 0]))
    train_tasks = train_tasks[shard(args.num_train_tasks)]
    test_tasks = envs.sample_test_tasks(args.num_test_tasks, np.random.default_rng([args.task_seed, 1]))
    if "sparse" in (args.train_reward, args.test_reward):
        require_sparse_reward(envs, test_tasks[:1])

    # networks
    obs_size, action_size = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    sizes = [obs_size, action_size, 1, obs_size, 1, 1]  # of COLUMNS
    width = sum(sizes[: 4 if args.context_next_obs else 3])  # of what the encoder reads
    networks = (args.latent_size, args.hidden_size, args.encoder_size)
    agent = Agent(obs_size, action_size, width, *networks).to(device)
    adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=args.cuda)
    trained = {"critics": [*agent.critics.parameters(), *agent.encoder.parameters()]}
    trained["actor"] = [*agent.actor.parameters()]
    optimizers = {name: adam(parameters) for name, parameters in trained.items()}
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])

    # the functions above with this run's settings
    sampling = {"agent": agent, "horizon": horizon, "reward": args.train_reward}
    collect_train = partial(collect, envs=envs, **sampling)
    collect_test = partial(collect, envs=eval_envs, **sampling)
    meta_test = partial(
        evaluate, test_tasks, agent, collect_test, group, width, args.test_reward, args.num_eval_steps, exploration,
        args.eval_context, args.seed, args.deterministic_eval,
    )  # fmt: skip
    if args.evaluate:
        return report(meta_test(), test_tasks, args.eval_episodes, printed=True)
    update = partial(
        gradient_step, agent, optimizers, n=args.meta_batch_size, gamma=args.gamma, reward_scale=args.reward_scale,
        temperature=args.temperature, kl_weight=args.kl_weight, regularization=args.regularization, tau=args.tau,
    )  # fmt: skip

    # replay; steps: of a task in an iteration
    initial = {"initial": args.initial_steps}
    phases = {"prior": args.prior_steps, "posterior": args.posterior_steps, "extra": args.extra_steps}
    length = args.episodes_per_task * horizon  # of a round
    at_first, steps, for_context = (
        sum(math.ceil(x / length) * length for x in parts) for parts in
        (initial.values(), phases.values(), (args.prior_steps, args.posterior_steps))
    )  # fmt: skip
    iterations = math.ceil(args.total_timesteps / (args.picked_tasks * steps))
    picks = iterations * args.picked_tasks / args.num_train_tasks  # of a task, on average; six deviations are enough
    capacity = args.replay_size or 2 * at_first + min(iterations, math.ceil(picks + 6 * picks**0.5)) * steps
    if capacity < max(at_first, steps):
        fail(f"--replay-size {capacity}: less than the {max(at_first, steps)} steps of an iteration")
    if args.total_timesteps <= args.num_train_tasks * at_first:
        needed = f"must be above the {args.num_train_tasks * at_first} steps of the initial collection"
        fail(f"--total-timesteps {args.total_timesteps}: {needed}")
    num_tasks, num_picked = len(train_tasks), args.picked_tasks // num_ranks
    replay = Replay(num_tasks, capacity, sum(sizes), device)
    window = torch.zeros(num_tasks, 2, dtype=torch.long, device=device)
    if checkpoint:
        replay.load(checkpoint["replay"])
        window.copy_(checkpoint["window"][shard(args.num_train_tasks)])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][name])
    longest = max(at_first, for_context, args.context_window)
    of_context = {"size": args.context_size, "segment": args.context_segment, "longest": longest, "width": width}
    draw = partial(
        draw_batch, replay=replay, window=window, n=args.meta_batch_size // num_ranks, batch_size=args.batch_size,
        sizes=sizes, latent_size=args.latent_size, **of_context,
    )  # fmt: skip

    def state():
        moments = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        return {"agent": agent.state_dict(), "optimizers": moments, "replay": replay.state(), "window": join(window)}

    with closing(Run(args, global_step)) as run:
        if run.writes:
            print(", ".join(f"{name} {getattr(args, name)}" for name in PRESETS))
            print(f"replay: {num_tasks} tasks x {capacity} steps, {replay.bytes / 1e9:.2f} GB", flush=True)
        first = math.ceil(num_tasks / num_picked)  # iterations of initial collection, all tasks in turn
        while global_step < args.total_timesteps and not run.stopping():
            iteration, start = iteration + 1, time.perf_counter()
            warming_up = iteration < first + args.warmup_iterations

            # (1) collect
            order = keyed_rng(args.seed, "picks", iteration, rank).permutation(num_tasks)
            in_turn = np.roll(np.arange(num_tasks), num_picked * (1 - iteration))
            picked = (in_turn if iteration <= first else order)[:num_picked]
            ids = torch.as_tensor(picked, device=device)
            reach = 0 if warming_up else args.context_window
            rounds = explore(
                initial if iteration <= first else phases, ids, replay, window, reach, agent,
                partial(collect_train, tasks=train_tasks[picked]), (args.seed, "train", iteration), **of_context,
            )  # fmt: skip
            global_step += int(all_reduce(sum(batch["mask"].sum() for batch in rounds)))
            metrics = {
                "charts/pre_adaptation_return": task_mean(episode_scores(rounds[0])["return"]),
                "charts/episodic_return": task_mean(episode_scores(rounds[-1])["return"]),
                "charts/episodic_length": task_mean(rounds[-1]["mask"].sum(-1)),
            }
            collected = time.perf_counter()

            # (2)-(6) gradient steps
            if iteration >= first:
                seed = int(keyed_rng(args.seed, "update", iteration, rank).integers(2**63))
                generator = torch.Generator(device).manual_seed(seed)
                times = args.warmup_gradient_steps if warming_up else args.gradient_steps
                left = max(0, 1 - global_step / args.total_timesteps) if args.anneal else 1
                for optimizer in optimizers.values():
                    optimizer.param_groups[0]["lr"] = left * args.learning_rate
                losses = repeat(lambda g=generator: update(*draw(g)), times, generator, args.compile)
                losses = dict(zip(LOSSES, (all_reduce(losses) / num_ranks).tolist(), strict=True))
                bad = [f"{name} {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
                if bad or not all(p.isfinite().all() for p in agent.parameters()):
                    bad = ", ".join(bad) or "networks are not finite"
                    advice = f"try a smaller --learning-rate ({args.learning_rate}) or --reward-scale"
                    fail(f"training diverged in iteration {iteration}, {bad}: {advice}")
                metrics |= {f"losses/{name}": loss for name, loss in losses.items()}
            updated = time.perf_counter()
            metrics |= {"time/collect": collected - start, "time/update": updated - collected}

            # log, (7) meta-test, save
            if iteration % args.eval_every == 0 or global_step >= args.total_timesteps:
                scores = meta_test()
                metrics |= report(scores, test_tasks, args.eval_episodes) | {"time/eval": time.perf_counter() - updated}
            run.log(metrics, global_step)
            if iteration % args.checkpoint_every == 0:
                run.save(**state(), iteration=iteration, global_step=global_step)

        run.save(**state(), iteration=iteration, global_step=global_step)
    if global_step >= args.total_timesteps:
        report(scores, test_tasks, args.eval_episodes, printed=True)
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
# >>> shared: rollout


def rollout(envs: TaskEnvs, act, tasks, horizon, rng, device) -> dict[str, torch.Tensor]:
    """One episode in every lane; act: (obs (B, O), t) -> actions (B, A), on device; tasks: a row per lane.

    Returns obs and next_obs (B, T, O), actions (B, T, A) or (B, T), rewards, terminated and mask (B, T), T the longest
    episode; the mask is 1 up to a lane's end, and after it everything is 0. Also sparse_reward and success (B, T) where
    tasks report them.
    """
    obs, _ = envs.reset(seed=int(rng.integers(2**31)), options={"task": tasks})
    alive = np.ones(envs.num_envs, bool)
    tensor = partial(torch.as_tensor, dtype=torch.get_default_dtype(), device=device)
    observations, actions, steps = [tensor(obs)], [], {}
    for t in range(horizon):
        actions.append(act(observations[-1], t))
        obs, reward, terminated, truncated, info = envs.step(require_finite_actions(actions[-1].cpu().numpy()))
        require_finite(envs, {"observations": obs, "rewards": reward, **info}, alive, tasks, t)
        for name, value in {"rewards": reward, "terminated": terminated, "mask": alive, **info}.items():
            steps.setdefault(name, np.zeros((envs.num_envs, horizon)))[:, t] = value * alive
        observations.append(tensor(obs))
        alive = alive & ~(terminated | truncated)
        if not alive.any():
            break
    batch = {name: tensor(x[:, : t + 1]) for name, x in steps.items()}
    batch |= {"obs": torch.stack(observations[:-1], 1), "next_obs": torch.stack(observations[1:], 1)}
    batch["actions"] = torch.stack(actions, 1)
    for name in ("obs", "next_obs", "actions"):
        batch[name][batch["mask"] == 0] = 0
    return batch


# <<< shared: rollout
# >>> shared: sac


class MLP(nn.Module):
    """Three hidden ReLU layers of `hidden` units; `stack` networks at once, each with own weights.

    (..., inputs) -> (..., outputs); of a stack (stack, ..., inputs) -> (stack, ..., outputs).
    Initialised as in the code of PEARL: uniform within 1 / sqrt(hidden), biases 0.1, the last layer
    uniform within `last`.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, stack: int = 1, last: float = 3e-3):
        super().__init__()
        sizes = [inputs, hidden, hidden, hidden, outputs]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for i in range(4):
            bound = hidden**-0.5 if i < 3 else last
            weight = torch.empty(stack, sizes[i], sizes[i + 1]).uniform_(-bound, bound)
            self.weights.append(nn.Parameter(weight))
        for size in sizes[1:4]:
            self.biases.append(nn.Parameter(torch.full((stack, 1, size), 0.1)))
        self.biases.append(nn.Parameter(torch.empty(stack, 1, outputs).uniform_(-last, last)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape[:-1]
        x = x.reshape(len(self.weights[0]), -1, x.shape[-1])
        for i in range(4):
            x = torch.baddbmm(self.biases[i], x, self.weights[i])
            if i < 3:
                x = x.relu_()
        return x.view(*shape, -1)


def tanh_gaussian(dist_params: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tanh of a Gaussian draw: mean and log std (..., 2A), normal noise (..., A).

    Returns the action (..., A), its log-probability (...), mean and log std (..., A).
    """
    mean, log_std = dist_params.chunk(2, -1)
    log_std = log_std.clamp(-20, 2)  # the original's bounds
    raw = mean + log_std.exp() * noise
    log_slope = 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh²)
    logprob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - log_slope
    return raw.tanh(), logprob.sum(-1), mean, log_std


class SoftActorCritic(nn.Module):
    """Actor, twin critics and their targets, which are given something beside the observation."""

    def __init__(self, obs_size: int, action_size: int, given_size: int, hidden_size: int):
        super().__init__()
        inputs = obs_size + given_size
        self.actor = MLP(inputs, hidden_size, 2 * action_size, last=1e-3)
        self.critics = MLP(inputs + action_size, hidden_size, 1, stack=2)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)

    def act(self, obs, given, noise) -> tuple[torch.Tensor, ...]:
        """obs (..., O), given (..., G), normal noise (..., A) -> what tanh_gaussian returns."""
        return tanh_gaussian(self.actor(torch.cat([obs, given], -1)), noise)

    def values(self, critics, obs, given, action) -> torch.Tensor:
        """obs (..., O), given (..., G), action (..., A) -> (2, ...), one value of each critic."""
        x = torch.cat([obs, given, action], -1)
        return critics(x.expand(2, *x.shape)).squeeze(-1)

    def critic_loss(self, batch, given, noise, gamma, reward_scale, temperature) -> tuple:
        """The critics' mean squared errors, summed, and their mean value.

        batch: transitions (N, B, ...) by name; given (N, B, G); noise (N, B, A). The target is
        y = scale r + γ (min Q'(s', a') - temperature log π(a'|s')), a' from the actor, and the
        reward alone at a terminal state.
        """
        with torch.no_grad():
            next_action, next_logprob, *_ = self.act(batch["next_obs"], given, noise)
            next_values = self.values(self.targets, batch["next_obs"], given, next_action)
            soft_value = next_values.amin(0) - temperature * next_logprob
            goes_on = 1 - batch["terminated"].squeeze(-1)
            y = reward_scale * batch["dense_rewards"].squeeze(-1) + gamma * goes_on * soft_value
        values = self.values(self.critics, batch["obs"], given, batch["actions"])
        return (values - y).square().mean((1, 2)).sum(), values.mean()

    def actor_loss(self, batch, given, noise, regularization, temperature) -> tuple:
        """temperature log π(a|s) - min Q(s, a), and the actions' mean log-probability.

        Shapes as in critic_loss. regularization: weight of the squared mean and log std.
        """
        action, logprob, mean, log_std = self.act(batch["obs"], given, noise)
        value = self.values(self.critics, batch["obs"], given, action).amin(0)
        penalty = regularization * (mean.square().mean() + log_std.square().mean())
        return (temperature * logprob - value).mean() + penalty, logprob.mean()

    @torch.no_grad()
    def follow(self, tau: float):
        """targets ← (1 - τ) targets + τ critics."""
        torch._foreach_lerp_([*self.targets.parameters()], [*self.critics.parameters()], tau)


def apply_gradient(optimizer: torch.optim.Optimizer, loss: torch.Tensor):
    """One step of the optimizer along its parameters' gradient, the mean over the ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    if ranks()[1] > 1:
        gradients = [p.grad for p in parameters]
        mean = all_reduce(parameters_to_vector(gradients)) / ranks()[1]
        vector_to_parameters(mean, gradients)
    optimizer.step()


def to_rows(batch: dict, columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Of episodes (N, E, T, ...), the columns as rows (N, E T, W); and the rows' mask (N, E T)."""
    parts = [batch[name] for name in columns]
    parts = [part if part.ndim == 4 else part.unsqueeze(-1) for part in parts]
    return torch.cat(parts, -1).flatten(1, 2), batch["mask"].flatten(1, 2)


def from_rows(rows: torch.Tensor, columns: dict[str, int]) -> dict[str, torch.Tensor]:
    """Rows (..., W) as columns by name, each as wide as columns says."""
    return dict(zip(columns, rows.split([*columns.values()], -1), strict=True))


class Replay:
    """Per task the last `capacity` transitions, each a row of `width` numbers, on the device.

    A rank keeps those of its own tasks. flag: what sets the capacity.
    """

    def __init__(self, num_tasks, capacity, width, device, flag="--replay-size"):
        self.capacity = capacity
        self.bytes = num_tasks * capacity * width * torch.get_default_dtype().itemsize
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0]
        if self.bytes > memory:
            size = f"{num_tasks} tasks need {self.bytes / 1e9:.1f} GB of {memory / 1e9:.1f} GB"
            fail(f"{flag} {capacity}: {size}, give a smaller one")
        self.rows = torch.zeros(num_tasks * capacity, width, device=device)
        self.count = torch.zeros(num_tasks, dtype=torch.long, device=device)  # rows ever added

    def add(self, ids: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor):
        """Append rows (N, B, W) where mask (N, B) is 1 to the different tasks ids (N,)."""
        position = self.count[ids].unsqueeze(1) + mask.long().cumsum(1) - 1
        self.rows[self.index(ids, position)[mask > 0]] = rows[mask > 0]
        self.count[ids] += mask.long().sum(1)

    def gather(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Rows (N, B, W) of the tasks ids (N,), numbered (N, B) from the first ever added."""
        return self.rows[self.index(ids, position)]

    def sample(self, ids: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
        """n rows of each of the tasks ids (N,), with replacement: (N, n, W)."""
        size = self.count[ids].clamp(max=self.capacity).unsqueeze(1)
        options = {"generator": generator, "device": ids.device, "dtype": torch.float64}
        return self.gather(ids, (torch.rand(len(ids), n, **options) * size).long())

    def state(self) -> dict[str, torch.Tensor]:
        """The filled rows and the counts, for load."""
        return {"rows": self.rows[self.filled()], "count": self.count}

    def load(self, state: dict[str, torch.Tensor]):
        """What state has returned."""
        self.count.copy_(state["count"])
        self.rows[self.filled()] = state["rows"].to(self.rows)

    def index(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return ids.unsqueeze(1) * self.capacity + position % self.capacity

    def filled(self) -> torch.Tensor:
        """Which of rows hold a transition, (num_tasks capacity,)."""
        size = self.count.clamp(max=self.capacity).unsqueeze(1)
        return (torch.arange(self.capacity, device=size.device) < size).flatten()


# <<< shared: sac
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

if __name__ == "__main__":
    main(parse(Args))

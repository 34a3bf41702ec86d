# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium>=1.1", "numpy>=1.26.4", "tyro>=1.0.9",
#                 "tensorboard>=2.17.1", "tqdm>=4.66"]
# ///
"""PEARL: Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context Variables.
Rakelly, Zhou, Quillen, Finn and Levine, ICML 2019, arXiv 1903.08254, Algorithms 1 and 2.

Meta-learns an encoder, which turns the transitions seen in a task (the context c) into a belief
q(z|c) about which task it is, and a soft actor-critic (SAC) that is given a z drawn from it.
Adapting is inferring z. Every training task has a replay of its own; first each gets its initial
steps, with z from the prior N(0, I). Then, in every iteration:

(1) Pick tasks, empty their contexts, collect episodes in all: z from the prior; in the posterior
    and extra phases, after their first episodes, from the belief. What prior and posterior phases
    bring is the context; with --context-window it becomes in the end the latest steps of all.
(2) Gradient steps: draw N tasks, and in each a context c and a batch from its replay.
(3) Belief: q(z|c) is the product of one Gaussian per transition, normalised. Draw one z per task.
(4) Critics: twin Q(s, a, z) towards k r + γ (min Q'(s', a', z) - α log π(a'|s', z)); k is the scale
    of rewards, α the temperature.
(5) Encoder: the gradient of (4) through z, and of the KL from the prior to the belief; no other.
(6) Actor: lower α log π(a|s, z) - min Q(s, a, z), z a constant. Targets Q' follow slowly.
(7) Meta-test in held-out tasks: episodes with z from the prior, then from the belief.

Train:     python pearl.py
Resume:    python pearl.py --resume runs/NAME
Evaluate:  python pearl.py --evaluate runs/NAME

Differs from the paper in: twin target critics (there a value network and its target), a measured
scale of rewards, contexts without repetition, on points of runs of steps over several iterations, a
warm-up on SparsePointRobot-v0, smaller numbers (its own: benchmarks/pearl.txt); docs/pearl.md.
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, Literal, NoReturn, get_args, get_type_hints

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly, during these imports too

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# fmt: off
@dataclass(unsafe_hash=True)
class Args:
    """Three values of a flag that is unset are those on SparsePointRobot-v0, on other points, and elsewhere."""

    exp_name: str = "pearl"  # name of the experiment, part of the run's folder
    env_id: str = "SparsePointRobot-v0"  # task family: one of the suite (docs/tasks.md), or module:Id-v0 for your own
    seed: int = 1  # seed of the initial parameters, episodes and draws from the replay
    task_seed: int = 0  # seed of the task draws: training and held-out tasks depend on nothing else
    total_timesteps: int | None = None  # environment steps of training (unset: 1_200_000, 1_000_000, 500_000)
    meta_batch_size: int | None = None  # N, tasks per gradient step (unset: 10, 16, 16)
    episodes_per_task: int = 1  # E, episodes per task collected at once, between two updates of the belief
    horizon: int = 0  # T, steps per episode at most (0: the family's own)
    num_train_tasks: int | None = None  # size of the set of training tasks, each with a replay (unset: 40, 80, 100)
    num_test_tasks: int | None = None  # held-out tasks of the meta-test (unset: 100, 100, 40)
    num_eval_steps: int | None = None  # updates of the belief at meta-test (unset: 19 on Sparse*, else 2)
    eval_episodes: int | None = None  # episodes per task before each of them (unset: episodes_per_task)
    deterministic_eval: bool = True  # score with the mean action instead of sampled ones
    train_reward: Literal["dense", "sparse"] | None = None  # of contexts only (unset: sparse on Sparse*, else dense)
    test_reward: Literal["dense", "sparse"] | None = None  # of the meta-test (unset: sparse on Sparse*, else dense)
    gamma: float | None = None  # discount per step (unset: 0.9, 0.9, 0.99)
    cuda: bool = False  # compute on the GPU, and keep the tasks there if they can be
    cudagraphs: bool = True  # with --cuda: replay what repeats as CUDA graphs (the same numbers, sooner)
    tf32: bool = True  # with --cuda: matrix products in TF32
    torch_deterministic: bool = True  # use deterministic kernels only
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT and WANDB_ENTITY say where
    num_threads: int = 0  # CPU threads of torch and of the simulator (0: all cores)
    eval_every: int = 25  # iterations between meta-tests
    checkpoint_every: int = 10  # iterations between checkpoints
    resume: str = ""  # folder of the run to go on with, from its last checkpoint
    evaluate: str = ""  # folder of the run to meta-test, without training

    picked_tasks: int | None = None  # tasks in which an iteration collects (unset: 10, 16, 5)
    initial_steps: int | None = None  # steps per task before the first gradient step (unset: 200, 200, 2000)
    prior_steps: int | None = None  # steps per picked task with z from the prior (unset: 100, 60, 400)
    posterior_steps: int | None = None  # the same with z from the belief (unset: 300, 0, 0)
    extra_steps: int | None = None  # the same, for the replay but not for the context (unset: 0, 60, 600)
    gradient_steps: int | None = None  # gradient steps per iteration (unset: 200, 200, 500)
    warmup_iterations: int | None = None  # the first iterations, with warmup_gradient_steps instead (unset: 43, 0, 0)
    warmup_gradient_steps: int = 1000  # while the encoder learns its contexts by heart, which gives z a meaning
    batch_size: int = 64  # transitions per task in a gradient step
    context_size: int | None = None  # transitions per task in a context of a gradient step (unset: 400, 40, 100)
    context_segment: int | None = None  # length of the runs of consecutive transitions in it (unset: 20, 20, 1)
    context_window: int | None = None  # latest steps that contexts are of, 0: of a collection (unset: 1600, 1000, 0)
    context_next_obs: tyro.conf.DisallowNone[bool | None] = None  # contexts have next_obs too (unset: on *RandParams)
    replay_size: int = 0  # transitions kept per task (0: twice a task's mean share of total_timesteps)
    latent_size: int | None = None  # Z, dimensions of z (unset: 5, 8, 5)
    hidden_size: int | None = None  # units in each of three hidden layers of actor and critics (unset: 64, 64, 128)
    encoder_size: int | None = None  # units in each of three hidden layers of the encoder (unset: 32, 128, 128)
    learning_rate: float = 1e-3  # step size of Adam, for all networks
    anneal: tyro.conf.DisallowNone[bool | None] = None  # learning_rate falls linearly to 0 (unset: False, True, False)
    tau: float = 0.005  # share of the critics in the targets, per gradient step
    normalize_obs: bool = False  # give networks observations in units measured in the initial collection
    reward_scale: float | None = None  # factor on the critics' reward (unset: measured, about 1.0, 1.0, 5.0)
    temperature: float | None = None  # weight of the entropy for critics and actor (unset: 0.01, 0.01, 1.0)
    kl_weight: float | None = None  # weight of N times the mean KL in the critics' loss (unset: 1e-4, 1e-5, 0.1)
    regularization: float | None = None  # weight of the actor's squared mean and log std (unset: 1e-5, 1e-3, 1e-3)
    exploration_episodes: int | None = None  # episodes of a meta-test before the belief is first used (unset: 15, 1, 2)
    eval_context: Literal["own", "none", "shuffled"] = "own"  # at meta-test; none: the prior, shuffled: another task's

    may_be_zero: ClassVar[set] = {"seed", "task_seed", "horizon", "num_threads", "num_eval_steps", "posterior_steps",
                                  "extra_steps", "warmup_iterations", "context_window", "replay_size",
                                  "kl_weight", "regularization"}
    at_most_one: ClassVar[set] = {"gamma", "tau"}
    gone: ClassVar[dict] = {"--preset": "the paper's values are in benchmarks/pearl.txt",
                      "--compile": "--cuda captures CUDA graphs by itself (--no-cudagraphs: off)"}
# fmt: on


# ----------------------------------------------------------------------------------- the networks


class Agent(nn.Module):
    """The encoder, and a soft actor-critic that is given z; initialised as in the authors' code.

    A belief is a pair, mean (N, Z) and variance (N, Z). columns: of the replay's rows, with their
    widths; the encoder reads the first context_width numbers, which may take in next_obs.
    """

    def __init__(self, obs_size: int, action_size: int, args: Args):
        super().__init__()
        self.columns = {"obs": obs_size, "actions": action_size, "context_rewards": 1}
        self.context_width = sum(self.columns.values()) + obs_size * args.context_next_obs
        self.columns |= {"next_obs": obs_size, "dense_rewards": 1, "terminated": 1}
        self.latent_size = args.latent_size
        self.normalize_obs = args.normalize_obs
        self.encoder = MLP(self.context_width, args.encoder_size, 2 * args.latent_size)
        self.sac = SoftActorCritic(obs_size, action_size, args.latent_size, args.hidden_size)
        # what main measures; until then a column of unknown units is 0 to the networks
        self.register_buffer("reward_scale", torch.tensor(args.reward_scale or 1.0))
        self.register_buffer("means", torch.zeros(sum(self.columns.values())))
        self.register_buffer("units", torch.ones_like(self.means))
        self.register_buffer("bounds", torch.full_like(self.means, torch.inf))
        unknown = ["context_rewards", *(["obs", "next_obs"] if args.normalize_obs else [])]
        for name in unknown:
            from_rows(self.units, self.columns)[name].fill_(torch.inf)

    def prior(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The belief about n tasks of which nothing is known."""
        return self.means.new_zeros(n, self.latent_size), self.means.new_ones(n, self.latent_size)

    def in_units(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (..., W), or their first columns, as networks see them: in units, within bounds."""
        means, units, bounds = (x[: rows.shape[-1]] for x in (self.means, self.units, self.bounds))
        return ((rows - means) / units).clamp(-bounds, bounds)

    def infer(self, rows, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """(3) The belief given contexts: rows (N, C, W) and their mask (N, C)."""
        return belief(self.encoder(self.in_units(rows[..., : self.context_width])), mask)

    def act(self, z, obs, noise) -> torch.Tensor:
        """rollout's callback: actions (N, E, A), given z (N, E, Z), on obs (N, E, O)."""
        return self.sac.act(self.in_units(obs) if self.normalize_obs else obs, z, noise)[0]


def belief(factors, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """(3) q(z|c): factors (N, C, 2Z) from the encoder, mask (N, C) -> mean (N, Z), variance (N, Z).

    Each transition gives a Gaussian factor, a mean and by softplus a variance. Their product has
    the sum of their precisions and the precision-weighted mean. The prior is no factor; it is the
    belief where there is no transition.
    """
    mean, variance = factors.chunk(2, -1)
    precision = mask.unsqueeze(-1) / F.softplus(variance).clamp(min=1e-7)  # the original's floor
    total = torch.where(mask.any(1, keepdim=True), precision.sum(1), 1)
    return (precision * mean).sum(1) / total, 1 / total


def kl_to_prior(mean, variance) -> torch.Tensor:
    """(5) KL(q(z|c) ‖ N(0, I)), nats, summed over z's dimensions: (N, Z), (N, Z) -> (N,)."""
    return 0.5 * (variance + mean**2 - 1 - variance.log()).sum(-1)


# ---------------------------------------------------------------------------------- the algorithm


class Experience:
    """A replay of each of this rank's training tasks (M, K), and which part of it is its context.

    window (M, 2): number of the context's first row, and how many rows it has, at most `longest`.
    """

    def __init__(self, tasks: np.ndarray, agent: Agent, args: Args):
        at_first, prior, posterior, _ = whole_rounds(args)
        device = next(agent.parameters()).device
        self.tasks = tasks
        self.columns = agent.columns
        width = sum(self.columns.values())
        self.replay = Replay(len(tasks), args.replay_size, width, device, "--replay-size")
        self.window = torch.zeros(len(tasks), 2, dtype=torch.long, device=device)
        self.longest = max(at_first, prior + posterior, args.context_window)

    def draw_context(self, ids, generator, args) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts (N, C, W) of the tasks ids (N,), of different runs of rows; and mask (N, C)."""
        device = self.window.device
        first, length = (x.unsqueeze(1) for x in self.window[ids].unbind(1))
        starts = torch.arange(0, self.longest, args.context_segment, device=device)
        # a random choice: runs with the largest keys; those beyond the context come last
        keys = torch.rand(len(ids), len(starts), generator=generator, device=device)
        keys = keys.masked_fill(starts >= length, -1)
        count = min(args.context_size // args.context_segment, len(starts))
        chosen = starts[keys.topk(count).indices]
        within = torch.arange(args.context_segment, device=device)
        offset = (chosen.unsqueeze(2) + within).flatten(1)
        mask = (offset < length).to(self.replay.rows.dtype)
        return self.replay.gather(ids, first + offset), mask

    def draw_batch(self, generator, args) -> tuple:
        """(2) Of this rank's share of N tasks: transitions (N, B, W), contexts (N, C, W), their
        mask (N, C), and normal noise for z (N, Z) and two actions (N, B, A).
        """
        n = args.meta_batch_size // ranks()[1]
        random = {"generator": generator, "device": self.window.device}
        ids = torch.rand(len(self.window), **random).topk(n).indices
        rows = self.replay.sample(ids, args.batch_size, generator)
        context, mask = self.draw_context(ids, generator, args)
        noise = [torch.randn(n, args.latent_size, **random)]
        shape = (*rows.shape[:2], self.columns["actions"])
        noise += [torch.randn(shape, **random) for _ in range(2)]
        return rows, context, mask, noise


@torch.no_grad()
def collect(q, tasks, key, agent, args, test=False, deterministic=False) -> dict:
    """(1), (7) E episodes in each of N tasks (N, K), each with a z of its own from the belief q.

    key: of the draws. Returns the batch of rollout with the rewards of training or of the test,
    and those of contexts, which are always the training's.
    """
    episodes = args.eval_episodes if test else args.episodes_per_task
    mean, variance = (x.unsqueeze(1) for x in q)
    generator = keyed_generator(args, f"latents of {key[0]}", *key[1:])
    shape = (len(tasks), episodes, agent.latent_size)
    z = mean + variance.sqrt() * torch.randn(shape, generator=generator, device=mean.device)
    batch = rollout(agent.act, z, tasks, episodes, key, args, deterministic)
    batch["context_rewards"] = batch[f"{args.train_reward}_rewards"]
    batch["rewards"] = batch[f"{args.test_reward if test else args.train_reward}_rewards"]
    return batch


@torch.no_grad()
def explore(phases, ids, experience, context_window, key, agent, args) -> list[dict]:
    """(1) Collect in the tasks ids (N,), whose contexts start anew; returns the batches.

    phases: by name; args has their steps, means over the tasks of all ranks. context_window: if not
    0, the contexts are in the end the latest so many steps of all phases. key: of the draws.
    """
    replay, window = experience.replay, experience.window
    tasks = experience.tasks[ids.cpu().numpy()]
    window[ids] = torch.stack([replay.count[ids], torch.zeros_like(ids)], 1)  # empty, from here
    batches = []
    for phase in phases:
        steps = getattr(args, f"{phase}_steps") * len(ids) * ranks()[1]
        done = 0
        while done < steps:
            batch_key = (*key, len(batches))
            q = agent.prior(len(ids))
            if phase in ("posterior", "extra") and done:  # first from the prior, as the original
                generator = keyed_generator(args, "contexts", *batch_key[1:])
                q = agent.infer(*experience.draw_context(ids, generator, args))
            batch = collect(q, tasks, batch_key, agent, args)
            rows, mask = to_rows(batch, experience.columns)
            replay.add(ids, rows, mask)
            if phase != "extra":
                length = window[ids, 1] + mask.sum(1).long()
                window[ids, 1] = length.clamp(max=experience.longest)
            done += num_steps([batch])
            batches.append(batch)
    if context_window:
        length = replay.count[ids].clamp(max=min(context_window, replay.capacity))
        window[ids] = torch.stack([replay.count[ids] - length, length], 1)
    return batches


LOSSES = ["qf_loss", "qf_values", "kl", "posterior_std", "actor_loss", "entropy"]


def gradient_step(agent, optimizers, experience, generator, args) -> torch.Tensor:
    """(2)-(6) One step of all networks, on what it draws; returns the values of LOSSES."""
    rows, context, mask, noise = experience.draw_batch(generator, args)
    z_noise, next_noise, action_noise = noise
    batch = from_rows(agent.in_units(rows), agent.columns)

    # (3) one z per task
    mean, variance = agent.infer(context, mask)
    z = (mean + variance.sqrt() * z_noise).unsqueeze(1).expand(-1, args.batch_size, -1)

    # (4), (5) critics and encoder
    qf_loss, qf_values = agent.sac.critic_loss(
        batch, z, next_noise, args.gamma, agent.reward_scale, args.temperature
    )
    kl = kl_to_prior(mean, variance).mean()
    apply_gradient(optimizers["critics"], qf_loss + args.kl_weight * args.meta_batch_size * kl)

    # (6) the actor, with the critics just updated, and the targets
    actor_loss, logprob = agent.sac.actor_loss(
        batch, z.detach(), action_noise, args.regularization, args.temperature
    )
    apply_gradient(optimizers["actor"], actor_loss)
    agent.sac.update_targets(args.tau)
    losses = [qf_loss, qf_values, kl, variance.sqrt().mean(), actor_loss, -logprob]
    return torch.stack(losses).detach()


def gradient_steps(agent, optimizers, experience, times, lr, key, args) -> dict[str, float]:
    """(2)-(6) `times` steps with step size lr; key: of the draws. Returns losses/*, their means."""
    generator = keyed_generator(args, *key)
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["lr"].fill_(lr)
    step = graphed(gradient_step, args)
    total = sum(step(agent, optimizers, experience, generator, args) for _ in range(times))
    means = all_reduce(total / times) / ranks()[1]
    losses = dict(zip(LOSSES, means.tolist(), strict=True))
    require_convergence(losses, agent, key[1], args)
    return {f"losses/{name}": loss for name, loss in losses.items()}


@torch.no_grad()
def evaluate(tasks, agent, args) -> tuple[dict, dict]:
    """(7) Meta-test on tasks (M, K): {"return": (num_eval_steps + 1, M), ...}, and the episodes.

    Draws depend on the seed alone. Contexts are of sampled episodes, as in training; those of
    --deterministic-eval are extra, with the same z.
    """
    scores = []
    contexts = []
    episodes = {}
    for k in progress(range(args.num_eval_steps + 1), args):
        q = agent.prior(len(tasks))
        if k * args.eval_episodes >= args.exploration_episodes and args.eval_context != "none":
            rows, masks = zip(*contexts, strict=True)
            q = agent.infer(torch.cat(rows, 1), torch.cat(masks, 1))
        if args.eval_context == "shuffled":
            q = [x.roll(1, 0) for x in q]
        play = partial(collect, q, tasks, ("eval", k), agent, args, test=True)
        batch = play()
        extra = play(deterministic=True) if args.deterministic_eval else None
        scores.append([episode_scores(batch, extra)])
        episodes[f"obs_{k}"] = batch["obs"]
        contexts.append(to_rows(batch, agent.columns))
    return stack_scores(scores, len(tasks)), episodes


def main(args: Args) -> dict[str, float]:
    """Train, resume or only evaluate; returns the last value of every eval/* and charts/* tag."""
    args, device, checkpoint = setup(args, with_defaults)
    envs, train_tasks, test_tasks = make_tasks(args)
    check_flags(envs, args)
    obs_size = envs.single_observation_space.shape[0]
    agent = Agent(obs_size, envs.single_action_space.shape[0], args).to(device)
    agent.load_state_dict(restore(agent.state_dict(), checkpoint.get("agent")))

    if args.evaluate:
        scores, episodes = evaluate(test_tasks, agent, args)
        return report(scores, test_tasks, args, episodes)

    # this rank's tasks, and the optimizers
    rank, num_ranks = ranks()
    experience = Experience(train_tasks[rank::num_ranks], agent, args)
    num_tasks = len(experience.tasks)
    num_picked = args.picked_tasks // num_ranks
    at_first = math.ceil(num_tasks / num_picked)  # iterations of the initial collection
    optimizers = make_optimizers(agent, checkpoint.get("optimizers", {}), args)

    with Run(args, checkpoint) as run:
        if checkpoint:
            own = run.own(checkpoint)
            experience.replay.load(own["replay"])
            experience.window.copy_(own["window"])
        show_recipe(experience, args)
        while run.next_iteration():
            # (1) collect: at first in all tasks in turn, then in picked ones
            warming_up = run.iteration < at_first + args.warmup_iterations
            if run.iteration <= at_first:
                phases = ["initial"]
                ids = (np.arange(num_picked) + num_picked * (run.iteration - 1)) % num_tasks
            else:
                phases = ["prior", "posterior", "extra"]
                ids = keyed_rng(args.seed, *run.key("picks")).permutation(num_tasks)[:num_picked]
            ids = torch.as_tensor(ids, device=device)
            remaining = 1 - run.global_step / args.total_timesteps
            window = 0 if warming_up else args.context_window
            batches = explore(phases, ids, experience, window, run.key("train"), agent, args)
            run.global_step += num_steps(batches)
            run.lap("collect")

            # (2)-(6) gradient steps, from the end of the initial collection on
            if run.iteration == at_first:
                set_units(agent, experience.replay, args)
            losses = {}
            if run.iteration >= at_first:
                times = args.warmup_gradient_steps if warming_up else args.gradient_steps
                lr = args.learning_rate * (remaining if args.anneal else 1)
                key = run.key("update")
                losses = gradient_steps(agent, optimizers, experience, times, lr, key, args)
            run.lap("update")

            # log, (7) meta-test, save
            metrics = losses | charts(batches)
            if run.due(args.eval_every):
                scores, episodes = evaluate(test_tasks, agent, args)
                metrics |= report(scores, test_tasks, args)
                run.lap("eval")
            run.log(metrics)
            if run.saving():
                own = {"replay": experience.replay.state(), "window": experience.window}
                moments = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
                run.save(own=own, agent=agent.state_dict(), optimizers=moments)
    if run.complete:
        report(scores, test_tasks, args, episodes)
    return run.metrics


# ==================================================================================================
# From here on: blocks shared with other scripts, the same bytes in each. First what belongs to the
# algorithm, then what surrounds it: rollout, tasks, graphs, run.
# ==================================================================================================

# >>> shared: adam


def adam(parameters, lr: float, args, saved: dict | None = None, eps=1e-8) -> torch.optim.Adam:
    """Adam in a form that a graph can hold: step sizes are tensors, to be filled.

    parameters: these, or groups. saved: the state_dict of a checkpoint, of whatever device.
    """
    optimizer = torch.optim.Adam(parameters, lr, eps=eps, fused=True, capturable=args.cuda)
    if saved:
        optimizer.load_state_dict(saved)
    for group in optimizer.param_groups:
        lr = torch.as_tensor(group["lr"], dtype=torch.float32)
        group |= {"lr": lr.to(device_of(args)), "capturable": args.cuda}
    return optimizer


# <<< shared: adam
# >>> shared: moments


def moments(x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Mean and standard deviation (...) of x (*mask.shape, ...) where mask is 1, over all ranks;
    without a mask, of the rows of x (B, ...).
    """
    mask = x.new_ones(len(x)) if mask is None else mask
    dims = tuple(range(mask.ndim))
    weight = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
    count = all_reduce(mask.sum())
    mean = all_reduce((x * weight).sum(dims)) / count
    variance = all_reduce(((x - mean) ** 2 * weight).sum(dims)) / count
    return mean, variance.sqrt()


# <<< shared: moments
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
    def update_targets(self, tau: float):
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


LONG = 1000  # steps of an episode, at most, that room is made for: a limit may be far beyond


class Replay:
    """Per task the last `capacity` transitions, each a row of `width` numbers, on the device.

    A rank keeps those of its own tasks. flag: the one that sets the capacity.
    """

    def __init__(self, num_tasks, capacity, width, device, flag: str):
        self.capacity = capacity
        self.flag = flag
        self.bytes = num_tasks * capacity * width * torch.get_default_dtype().itemsize
        on_card = device.type == "cuda"
        memory = torch.cuda.mem_get_info(device)[0] if on_card else host_memory()
        if self.bytes > memory:
            size = f"{num_tasks} tasks need {self.bytes / 1e9:.1f} GB of {memory / 1e9:.1f} GB"
            fail(f"{flag} {capacity}: {size}, give a smaller one")
        self.rows = torch.zeros(num_tasks * capacity, width, device=device)
        self.count = torch.zeros(num_tasks, dtype=torch.long, device=device)  # rows ever added

    def add(self, ids: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor):
        """Append rows (N, B, W) where mask (N, B) is 1 to the different tasks ids (N,)."""
        most = int(mask.sum(1).max())
        if most > self.capacity:
            fail(f"{self.flag} {self.capacity}: less than the {most} steps of a task at once")
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


def reward_unit(replay: Replay, columns: dict[str, int]) -> torch.Tensor:
    """Standard deviation of the dense rewards in all ranks' replays, at least a tenth of their
    mean; 1 if all are 0.
    """
    rewards = from_rows(replay.rows[replay.filled()], columns)["dense_rewards"].double().flatten()
    mean, std = moments(rewards)
    unit = torch.maximum(std, mean.abs() / 10)  # or rewards that hardly vary would become large
    return torch.where(unit > 0, unit, 1)


# <<< shared: sac
# >>> shared: rollout


@torch.no_grad()
def play_steps(act, params, lanes, noise, envs, args) -> tuple[tuple, dict]:
    """Steps of all lanes, one for each of noise (N, E, T, A), or until none lives.

    lanes: obs (B, O), alive (B,), and the tensors in which a family on the device keeps its state.
    Returns lanes after the steps, and the steps, (B, T, ...) by name.
    """
    obs, alive, state = lanes
    vars(envs).update(state)
    can_be_captured = obs.is_cuda and envs.on_device
    steps = []
    for t in range(noise.shape[2]):
        actions = act(params, obs.unflatten(0, noise.shape[:2]), noise[:, :, t]).flatten(0, 1)
        next_obs, rewards, terminated, truncated, info = step_lanes(envs, actions)
        step = {"obs": obs, "actions": actions, "next_obs": next_obs, "rewards": rewards, **info}
        steps.append(step | {"terminated": terminated, "mask": alive})
        obs = next_obs
        alive = alive & ~(terminated | truncated)
        if not can_be_captured and not alive.any():
            break
    length = noise.shape[2] if obs.is_cuda else 0  # graphs are of one shape
    return (obs, alive, {x: vars(envs)[x] for x in state}), stack_steps(steps, length)


@torch.no_grad()
def rollout(act, params, tasks, episodes, key, args, deterministic=False) -> dict:
    """E episodes in each of N tasks (N, K), all at once; key: of the draws.

    act: params, obs (N, E, O), noise (N, E, A) -> actions (N, E, A), or (N, E) of Discrete ones; a
    method or a function of a module, which a graph can know again. The noise is normal, or Gumbel
    for Discrete actions, and 0 for the mean or mode.
    Returns a batch, T being the longest episode; after an episode's end all of it is 0:

    obs, next_obs           (N, E, T, O)  before and after the step
    actions                 (N, E, T, A)  as chosen, unclipped; (N, E, T) if Discrete
    rewards, dense_rewards  (N, E, T)     of the step
    sparse_rewards, success (N, E, T)     the same, where tasks report them
    terminated              (N, E, T)     1 where the step ended the episode, time limits excluded
    mask                    (N, E, T)     1 up to the episode's end

    On a GPU T is rounded up to whole hundreds, or the horizon: graphs are of one shape.
    """
    envs = make_envs(args.env_id, len(tasks) * episodes)
    of_lanes = np.repeat(tasks, episodes, axis=0)
    generator = keyed_generator(args, *key)
    obs = reset_lanes(envs, of_lanes, generator)
    require_finite({"next_obs": obs.unsqueeze(1)}, of_lanes, -1, args)
    alive = torch.ones(len(of_lanes), dtype=torch.bool, device=obs.device)
    lanes = obs, alive, {name: x for name, x in vars(envs).items() if torch.is_tensor(x)}
    some_steps = graphed(play_steps, args) if envs.on_device else play_steps
    act = act if envs.on_device else graphed(act, args)
    blocks = []
    for first in range(0, args.horizon, 100):
        shape = (len(tasks), episodes, min(100, args.horizon - first))
        noise = draw_noise(envs.single_action_space, shape, generator, deterministic)
        lanes, rows = some_steps(act, params, lanes, noise, envs, args)
        require_finite(rows, of_lanes, first, args)
        blocks.append(rows)
        if not lanes[1].any():
            break

    batch = {name: x.unflatten(0, shape[:2]) for name, x in join_blocks(blocks).items()}
    batch["dense_rewards"] = batch["rewards"]
    if "sparse_reward" in batch:
        batch["sparse_rewards"] = batch.pop("sparse_reward")
    return batch


def episode_scores(batch, mean_actions: dict | None = None) -> dict[str, torch.Tensor]:
    """Means over each task's episodes, (N,): undiscounted return and, where defined, success.

    Given another batch, of mean actions, those are its scores, and the batch's are sampled_*.
    """
    if mean_actions:
        sampled = {f"sampled_{name}": x for name, x in episode_scores(batch).items()}
        return sampled | episode_scores(mean_actions)
    scores = {"return": batch["rewards"].sum(-1).mean(1)}
    if "success" in batch:
        scores["success"] = batch["success"].amax(-1).mean(1)
    return scores


def charts(batches) -> dict[str, float]:
    """charts/*, of an iteration's first batch, before adaptation, and of its last, after it."""
    first, last = batches[0], batches[-1]
    return {
        "charts/pre_adaptation_return": task_mean(episode_scores(first)["return"]),
        "charts/episodic_return": task_mean(episode_scores(last)["return"]),
        "charts/episodic_length": task_mean(last["mask"].sum(-1)),
    }


# <<< shared: rollout
# >>> shared: tasks

POINT_FAMILIES = ["PointRobot-v0", "SparsePointRobot-v0", "Navigation2D-v0"]
POINT_FAMILIES += [f"MultimodalNavigation{modes}-v0" for modes in (1, 2, 4, 6)]
FAMILY_FILES = {  # what lies beside the scripts, and needs one more package
    "mujoco_tasks": r"(HalfCheetah|(Sparse)?Ant|SparseWheeled|Humanoid|Walker2d|Hopper"
    r"|MultimodalReacher)\w+-v0",
    "metaworld_tasks": r"ML\d+(-.*)?",
}


class PointEnvs(gym.vector.VectorEnv):
    """Lanes of points in the plane, paid minus the distance to a goal that they do not see.

    tasks: (n, 2) goals, in MultimodalNavigation (n, 3), goals and the index of their mode. An
    action of 1 pushes by 0.1 along its axis: the position, or in MultimodalNavigation the velocity.
    reset puts lane i in task i; a lane that has ended stays put and pays 0. All on the device of
    the tasks. Formulas, sources: docs/tasks.md.
    """

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    on_device = True  # tensors come and go, and the lanes' state is in attributes that are tensors

    def __init__(self, env_id: str, num_envs: int):
        self.env_id = env_id
        self.num_envs = num_envs
        self.momentum = env_id.startswith("Multimodal")
        self.num_modes = int(env_id[-4]) if self.momentum else 0
        self.horizon = 20 if env_id.endswith("PointRobot-v0") else 100
        obs_size = 4 if self.momentum else 2
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float64)
        self.single_action_space = gym.spaces.Box(-1, 1, (2,), np.float64)

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
        goals = options["task"][:, :2]
        random = partial(torch.rand, generator=options["generator"])
        start = 1 if self.env_id == "PointRobot-v0" else 0.2 if self.momentum else 0
        drawn = 2 * random(2, *goals.shape, dtype=goals.dtype, device=goals.device) - 1
        self.goals = goals
        self.position = start * drawn[0]
        self.velocity = 0.1 * drawn[1]  # of MultimodalNavigation only
        self.ended = torch.zeros_like(goals[:, 0], dtype=torch.bool)
        return self._obs(), {}

    def step(self, actions: torch.Tensor):
        push = 0.1 * actions.clamp(-1, 1)
        self.velocity = self.velocity + push if self.momentum else push
        moved = self.position + self.velocity
        self.position = torch.where(self.ended.unsqueeze(1), self.position, moved)
        offset = self.position - self.goals
        distance = offset.norm(dim=1)
        reward = -distance.masked_fill(self.ended, 0)
        info = {}
        if self.env_id == "SparsePointRobot-v0":
            hit = distance <= 0.2
            info = {"sparse_reward": torch.where(hit, 1 - distance, 0), "success": hit}
        if self.env_id == "Navigation2D-v0":
            self.ended = self.ended | (offset.abs() < 0.01).all(1)
        return self._obs(), reward, self.ended, torch.zeros_like(self.ended), info

    def _obs(self) -> torch.Tensor:
        return torch.cat([self.position, self.velocity], 1) if self.momentum else self.position


class UserEnvs(gym.vector.VectorEnv):
    """A registered environment that has sample_tasks(n) and set_task(task), lane by lane.

    They, and sample_test_tasks(n) for held-out tasks of their own, may be a wrapper's. Vectors in
    [-1, 1] become actions; info["sparse_reward"] and info["success"] are passed on. docs/tasks.md.
    """

    on_device = False

    def __init__(self, env_id: str, num_envs: int):
        self.env_id = env_id
        self.num_envs = num_envs
        self.envs = [gym.make(env_id, disable_env_checker=True) for _ in range(num_envs)]
        atexit.register(self.close)
        for method in ("sample_tasks", "set_task"):
            if not callable(self.of_env(method)):
                fail(f"{env_id} is no family of tasks: it has no method {method} (docs/tasks.md)")
        obs = self.native_obs = self.envs[0].observation_space
        flat = getattr(obs, "is_np_flattenable", False)
        if not flat or (obs.dtype == np.uint8 and len(obs.shape) == 3):  # images
            fail(f"{env_id} has observations {obs}; vectors are supported")
        self.single_observation_space = gym.spaces.flatten_space(obs)
        self.native = self.single_action_space = self.envs[0].action_space
        self.discrete = isinstance(self.native, gym.spaces.Discrete)
        if not self.discrete:
            size = math.prod(self.native.shape) if isinstance(self.native, gym.spaces.Box) else 0
            if size == 0:
                fail(f"{env_id} has actions {self.native}; Box and Discrete are supported")
            self.single_action_space = gym.spaces.Box(-1, 1, (size,), np.float64)
        self.horizon = self.envs[0].spec.max_episode_steps or 0
        self.num_modes = self.of_env("num_modes") or 0
        if self.of_env("sample_test_tasks"):
            self.sample_test_tasks = partial(self.sample_tasks, method="sample_test_tasks")

    def of_env(self, name: str, lane: int = 0):
        """An attribute of a lane's environment or of its wrappers; None if there is none."""
        env = self.envs[lane]
        return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else None

    def sample_tasks(self, n: int, rng, method: str = "sample_tasks") -> np.ndarray:
        self.envs[0].unwrapped.np_random = rng
        tasks = self.of_env(method)(n)
        with suppress(ValueError):  # rows of several lengths
            array = np.asarray(tasks)
            numbers = array.dtype.kind in "biuf" and np.isfinite(array).all()
            if numbers and array.size and array.shape[:1] == (n,):
                return array
        came = " ".join(f"{tasks!r:.80}".split())
        fail(f"{self.env_id}: {method}({n}) must return {n} rows of finite numbers, not {came}")

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        seeds = np.random.default_rng(seed).integers(2**31, size=self.num_envs)
        self.obs = np.zeros((self.num_envs, *self.single_observation_space.shape))
        self.terminated = np.zeros(self.num_envs, bool)
        self.truncated = np.zeros(self.num_envs, bool)
        for i, env in enumerate(self.envs):
            self.of_env("set_task", i)(options["task"][i])
            told = env.reset(seed=int(seeds[i]))
            if not isinstance(told, tuple) or len(told) != 2:
                fail(f"{self.env_id}: reset must return obs and info, not {told!r:.80}")
            self.obs[i] = self._flat("reset", told[0])
        return self.obs.copy(), {}

    def step(self, actions: np.ndarray):
        actions = self.to_native(actions)
        rewards = np.zeros(self.num_envs)
        infos = {}
        for i in np.flatnonzero(~(self.terminated | self.truncated)):
            try:
                obs, reward, terminated, truncated, info = self.envs[i].step(actions[i])
                names = info.keys() & {"sparse_reward", "success"}
            except (AttributeError, ValueError) as error:
                if not re.search("values to unpack|attribute 'keys'", str(error)):
                    raise
                needed = "obs, reward, terminated, truncated and a dictionary"
                fail(f"{self.env_id}: step must return {needed} ({error})")
            self.obs[i] = self._flat("step", obs)
            rewards[i] = self._number("reward", reward)
            self.terminated[i] = self._number("terminated", terminated)
            self.truncated[i] = self._number("truncated", truncated)
            for name in names:
                infos.setdefault(name, np.zeros(self.num_envs))[i] = self._number(name, info[name])
        return self.obs.copy(), rewards, self.terminated.copy(), self.truncated.copy(), infos

    def close_extras(self, **kwargs):
        for env in self.envs:
            env.close()

    def to_native(self, actions: np.ndarray) -> np.ndarray:
        """What its step takes, (B, ...), for an agent's actions (B, A) or (B,).

        Where both bounds are finite [-1, 1] is mapped to them, integers with equal shares;
        elsewhere an action is clipped to the bound that there is.
        """
        space = self.native
        if self.discrete:
            return (space.start + actions).astype(space.dtype)
        whole = space.dtype.kind in "biu"
        largest = math.inf if whole else np.finfo(space.dtype).max
        low, high = space.low.astype(float), space.high.astype(float)
        actions = actions.reshape(-1, *space.shape)
        share = (np.clip(actions, -1, 1) + 1) / 2
        with np.errstate(invalid="ignore", over="ignore"):
            within = low + share * (high - low + whole)
        actions = np.where((low > -largest) & (high < largest), within, actions)
        return np.clip(np.floor(actions) if whole else actions, low, high).astype(space.dtype)

    def _flat(self, method: str, obs) -> np.ndarray:
        """An observation as a vector; ends the program if it is none of its space."""
        with suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):
            flat = gym.spaces.flatten(self.native_obs, obs)
            if flat.shape == self.single_observation_space.shape:
                return flat
        fail(f"{self.env_id}: {method} returned {obs!r:.80}, no observation in {self.native_obs}")

    def _number(self, name: str, value) -> float:
        number = np.asarray(value)
        if number.size != 1 or number.dtype.kind not in "biuf":
            fail(f"{self.env_id}: step returned {name} {value!r:.80}, which must be one number")
        return number.item()


@cache
def make_envs(env_id: str, num_envs: int = 1) -> gym.vector.VectorEnv:
    """num_envs lanes of a family of tasks; ends the program if there is none.

    Families: points; what is registered with a vector_entry_point and steps all lanes at once, as
    mujoco_tasks.py does; and environments of one lane. module:Id-v0 imports the module first.
    """
    if env_id in POINT_FAMILIES:
        return PointEnvs(env_id, num_envs)
    module, _, name = env_id.rpartition(":")
    for file, families in FAMILY_FILES.items():
        if not module and re.fullmatch(families, name):
            module = file
    if module.startswith("."):
        fail(f"no tasks {env_id}: {module} is no name of a module")
    try:
        if module:
            importlib.import_module(module)
        if gym.spec(name).vector_entry_point:
            envs = gym.make_vec(name, num_envs, vectorization_mode="vector_entry_point")
            if hasattr(envs, "sample_tasks"):
                envs.on_device = getattr(envs, "on_device", False)
                return envs
        return UserEnvs(env_id, num_envs)
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        own = error.name == module
        needed = f"{module}.py beside the script" if own else f"pip install {package}"
        fail(f"no tasks {env_id}: {error}; it needs {needed}")
    except gym.error.Error as error:
        near = difflib.get_close_matches(env_id, [*POINT_FAMILIES, *gym.registry])
        hint = f" Near: {', '.join(near)}." if near else ""
        fail(f"no tasks {env_id}: {str(error).splitlines()[0]}{hint}")


def make_tasks(args) -> tuple[gym.vector.VectorEnv, np.ndarray, np.ndarray]:
    """One lane of the family, to ask; the fixed training tasks, if any; and the held-out ones.

    Sets what args leave open: horizon, num_test_tasks and eval_episodes.
    """
    envs = make_envs(args.env_id)
    args.horizon = args.horizon or envs.horizon
    if not args.horizon:
        fail(f"{args.env_id} has no time limit of its own: give --horizon")
    args.num_test_tasks = args.num_test_tasks or (200 if args.env_id in POINT_FAMILIES else 40)
    args.eval_episodes = args.eval_episodes or args.episodes_per_task
    require_memory(envs, args)
    train = np.empty(0)
    if args.num_train_tasks:
        train = envs.sample_tasks(args.num_train_tasks, np.random.default_rng([args.task_seed, 0]))
    sample = getattr(envs, "sample_test_tasks", envs.sample_tasks)
    test = sample(args.num_test_tasks, np.random.default_rng([args.task_seed, 1]))
    sparse = "sparse" in (args.train_reward, args.test_reward)
    if sparse or isinstance(envs, UserEnvs):  # see what a step brings, before many lanes are made
        generator = keyed_generator(args, "first step")
        reset_lanes(envs, test[:1], generator)
        space = envs.single_action_space
        nothing = torch.as_tensor(np.zeros((1, *space.shape), space.dtype))
        info = step_lanes(envs, nothing.to(generator.device))[4]
        if sparse and "sparse_reward" not in info:
            fail(f"{args.env_id} reports no sparse reward: try --train-reward, --test-reward dense")
    return envs, train, test


def require_memory(envs, args):
    """End the program if a phase of episodes, or a layer's moments, cannot fit into memory."""
    steps = args.meta_batch_size * max(args.episodes_per_task, args.eval_episodes) * args.horizon
    width = 2 * math.prod(envs.single_observation_space.shape) + 8
    needed = {"--meta-batch-size x episodes x --horizon": 4 * steps * width}
    needed["--hidden-size"] = 16 * args.hidden_size**2
    needed["--num-test-tasks"] = 8 * args.num_test_tasks
    needed["--num-train-tasks"] = 8 * args.num_train_tasks
    memory = host_memory()
    for flags, size in needed.items():
        if size > memory:
            fail(f"{flags} needs {size / 1e9:,.0f} GB or more, of {memory / 1e9:.0f} GB of memory")


def host_memory() -> float:
    """Bytes; inf on Windows, which does not say."""
    known = hasattr(os, "sysconf")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else math.inf


def meta_batch(envs, train_tasks, args, iteration: int) -> np.ndarray:
    """(1) This rank's share of N tasks: fresh draws, or different ones of the fixed set."""
    rank, num_ranks = ranks()
    n = args.meta_batch_size
    if len(train_tasks):
        order = keyed_rng(args.seed, "tasks", iteration).permutation(len(train_tasks))
        return train_tasks[np.resize(order, n)[rank::num_ranks]]
    rng = np.random.default_rng([args.task_seed, 0, iteration])
    return envs.sample_tasks(n, rng)[rank::num_ranks]


def reset_lanes(envs, tasks: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """Put lane i in task i of tasks (B, K), by draws from generator; obs (B, O), on its device."""
    device = generator.device
    dtype = torch.get_default_dtype()
    if envs.on_device:
        told = torch.as_tensor(tasks, dtype=dtype, device=device)
        return envs.reset(options={"task": told, "generator": generator})[0]
    seed = torch.randint(2**31, (1,), generator=generator, device=device).item()
    obs, _ = envs.reset(seed=seed, options={"task": tasks})
    return torch.as_tensor(obs, dtype=dtype, device=device)


def step_lanes(envs, actions: torch.Tensor) -> tuple:
    """obs (B, O), rewards, terminated, truncated (B,), and of info what we use; as tensors.

    A family on the host gets the actions in one copy, and gives everything in another. An action
    that is not finite is 0 to it: require_finite is yet to find the cause.
    """
    names = ("sparse_reward", "success")
    if envs.on_device:
        *told, info = envs.step(actions)
        return *told, {x: info[x] for x in names if x in info}
    chosen = np.nan_to_num(actions.cpu().numpy(), posinf=0, neginf=0)
    obs, rewards, terminated, truncated, info = envs.step(chosen)
    names = [name for name in names if name in info]
    columns = [obs, rewards, terminated, truncated, *(info[name] for name in names)]
    told = torch.as_tensor(np.column_stack(columns), dtype=torch.get_default_dtype())
    if actions.is_cuda:
        told = told.pin_memory().to(actions.device, non_blocking=True)
    obs, told = told.tensor_split([obs.shape[1]], 1)
    rewards, terminated, truncated, *told = told.unbind(1)
    return obs, rewards, terminated > 0, truncated > 0, dict(zip(names, told, strict=True))


def draw_noise(space, shape: tuple, generator, deterministic=False) -> torch.Tensor:
    """For actions of space: normal (*shape, A), or Gumbel (*shape, n); 0 for the mean or mode."""
    if isinstance(space, gym.spaces.Discrete):
        noise = torch.empty(*shape, int(space.n), device=generator.device)
        noise = -noise.exponential_(generator=generator).log()
    else:
        noise = torch.randn(*shape, *space.shape, generator=generator, device=generator.device)
    return noise.zero_() if deterministic else noise


def stack_steps(steps: list[dict], length: int = 0) -> dict:
    """Steps, (B, ...) by name, as (B, T, ...), T at least length; 0 where mask is, or none is."""
    rows = {}
    for name, like in {name: x for step in steps for name, x in step.items()}.items():
        nothing = torch.zeros_like(like)
        column = [step.get(name, nothing) for step in steps]
        rows[name] = torch.stack(column + [nothing] * (length - len(steps)), 1)
        if like.dtype == torch.bool:
            rows[name] = rows[name].to(torch.get_default_dtype())
    over = rows["mask"] == 0
    for column in rows.values():
        column.masked_fill_(over.view(*over.shape, *[1] * (column.ndim - 2)), 0)
    return rows


def join_blocks(blocks: list[dict]) -> dict:
    """Blocks of steps, (B, T, ...) by name, one after the other; 0 where a block lacks a name."""
    joined = {}
    for name in {name: x for rows in blocks for name, x in rows.items()}:
        parts = [rows.get(name, torch.zeros_like(rows["rewards"])) for rows in blocks]
        joined[name] = torch.cat(parts, 1)
    return joined


def require_finite(rows: dict, tasks: np.ndarray, first: int, args):
    """End the program if in steps (B, T, ...), from step first on, something is not finite.

    1e39 is not, in single precision. Step -1 is the reset.
    """
    if math.isfinite(sum(x.sum() for x in rows.values())):
        return
    names = {"next_obs": "observation", "rewards": "reward", "sparse_reward": "sparse reward"}
    bad = [~x.isfinite().reshape(*x.shape[:2], -1).all(2) for x in rows.values()]
    for t, column, lane in torch.stack(bad).permute(2, 0, 1).nonzero().tolist():  # the first step's
        name = [*rows][column]
        if name in ("actions", "logprobs", "values"):
            fail(f"the policy has diverged, its {name} are not finite: try smaller step sizes")
        where = f"in lane {lane}, step {first + t}, task {tasks[lane]}"
        fail(f"{args.env_id}: {names.get(name, name)} is not finite {where}")


# <<< shared: tasks
# >>> shared: graphs

GRAPHS = {}  # of this run, by what they hold and the tensors' shapes


def graphed(function, args):
    """function, with --cuda captured as a CUDA graph at its first call and replayed from then on.

    It is called with tensors, which are copied in, and dicts, lists and tuples of them; and with
    what the graph holds, functions, networks, optimizers, args. A number would be held too and is
    refused. It returns tensors. There is a graph for each set of what is held and of shapes.
    """
    if args.cuda and args.cudagraphs and ranks()[1] == 1:
        return partial(replay, function)
    return function


def replay(function, *inputs):
    """function(*inputs), by its graph."""
    leaves, form = tree_flatten(inputs)
    tensors = [x for x in leaves if torch.is_tensor(x)]
    held = [x for x in leaves if not torch.is_tensor(x)]
    if any(isinstance(x, int | float) for x in held):
        raise TypeError(f"a graph of {function} would hold a number")
    key = (function, str(form), *held, *((x.shape, x.dtype) for x in tensors))
    if key not in GRAPHS:
        GRAPHS[key] = capture(function, inputs)
    graph, own, outputs = GRAPHS[key]
    for mine, given in zip(own, tensors, strict=True):
        mine.copy_(given)
    graph.replay()
    return tree_map(torch.clone, outputs)


def capture(function, inputs) -> tuple:
    """A graph of function, the tensors that it reads, and its outputs.

    The call before it, which a capture needs, leaves networks, optimizers and draws as they were.
    """
    inputs = tree_map(lambda x: x.detach().clone() if torch.is_tensor(x) else x, inputs)
    leaves = tree_leaves(inputs)

    def state():
        states = tree_leaves([x.state_dict() for x in leaves if hasattr(x, "state_dict")])
        return [x for x in states if torch.is_tensor(x)]

    generator = generator_of(torch.device("cuda"))
    draws = generator.get_state()
    saved = {x.data_ptr(): x.clone() for x in state()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    for x in state():  # an optimizer's moments are new, and begin at 0
        x.copy_(saved.get(x.data_ptr(), torch.zeros_like(x)))
    generator.set_state(draws)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    return graph, [x for x in leaves if torch.is_tensor(x)], outputs


# <<< shared: graphs
# >>> shared: run

FORMAT = 6  # of checkpoints; commit c7abba7 reads 5
MAY_CHANGE = {"resume", "evaluate", "total_timesteps", "cuda", "cudagraphs", "tf32", "num_threads"}
MAY_CHANGE |= {"eval_every", "checkpoint_every", "track"}


def fail(message: str) -> NoReturn:
    """End the program with one line and a non-zero status."""
    raise SystemExit(f"error: {message}")


def show(*lines: str):
    """Print on rank 0. A reader that has gone (head -1) or a full disk does not end the run."""
    if ranks()[0] == 0 and sys.stdout:
        try:
            tqdm.write("\n".join(lines), file=sys.stdout)  # not into the bar
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keyed_rng(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """The generator of one purpose and key. There are no others: no draw depends on an earlier one.

    As a spawn key, (1,) and (1, 0) are two streams; as entropy they would be one.
    """
    entropy = [seed, zlib.crc32(purpose.encode())]
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=key))


@cache
def generator_of(device: torch.device) -> torch.Generator:
    """The one of all draws on a device, which graphs register."""
    return torch.Generator(device)


def keyed_generator(args, purpose: str, *key: int) -> torch.Generator:
    """keyed_rng on the device: the one generator there, seeded; draw before it is seeded anew."""
    seed = int(keyed_rng(args.seed, purpose, *key).integers(2**63))
    return generator_of(device_of(args)).manual_seed(seed)


def device_of(args) -> torch.device:
    return torch.device("cuda" if args.cuda else "cpu")


def ranks() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum of x over the ranks, on each of them."""
    if ranks()[1] == 1:
        return x
    try:
        if torch.distributed.get_backend() == "nccl":
            x = x.cuda()
        torch.distributed.all_reduce(x)
    except RuntimeError as error:  # say so at once: torchrun is about to end this process
        reason = re.split(r"\. |\n", str(error))[0]
        lost = "lost another rank; --resume goes on from the last checkpoint"
        sys.stderr.write(f"error: {lost} ({reason})\n")
        sys.exit(1)
    return x


def task_mean(x: torch.Tensor) -> float:
    """Mean of x over the tasks of all ranks."""
    return all_reduce(x.mean() / ranks()[1]).item()


def num_steps(batches) -> int:
    """Environment steps in the batches of all ranks."""
    return int(all_reduce(sum(batch["mask"].sum() for batch in batches)))


def parse(args_class, argv: list[str] | None = None):
    """Args from the command line; with --resume or --evaluate, the saved run's are the defaults."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack ± and Greek
    words = sys.argv[1:] if argv is None else argv
    given = {word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for flag, instead in getattr(args_class, "gone", {}).items():
        if flag in given:
            fail(f"{flag} is gone: {instead}")
    args = tyro.cli(args_class, args=argv)
    for flag in ("--resume", "--evaluate"):
        if flag in given and not getattr(args, flag[2:]):
            fail(f"{flag}: the name of the folder is empty")
    folder = args.resume or args.evaluate
    if argv is None and (not folder or "--env-id" in given):
        sys.path.append(os.getcwd())  # the last place for module:Id-v0, if the user named it
    if not folder:
        return args
    saved = args_class(**load_checkpoint(folder, args_class)["args"])
    if "--env-id" in given and args.env_id != saved.env_id:
        saved = replace(saved, horizon=0)  # that of the other family
    elif ":" in saved.env_id:
        found = None
        with suppress(ModuleNotFoundError):  # of a module's package
            found = importlib.util.find_spec(saved.env_id.split(":")[0])
        if not found:
            where = f"{saved.env_id} is not beside the script, nor installed; if it is"
            fail(f"{where} in the working folder, give --env-id {saved.env_id} too")
        show(f"tasks of {folder} come from {found.origin}")
    args = tyro.cli(args_class, args=argv, default=saved)
    args.from_parse = True
    return args


def saved_args(args, checkpoint: dict):
    """args of a run to resume or to evaluate.

    In code, main(Args(resume=folder)), what is left at its default is the run's; parse has seen to
    that, and knows what was given.
    """
    saved = type(args)(**checkpoint["args"])
    if not getattr(args, "from_parse", False):
        given = {name: x for name, x in asdict(args).items() if x != getattr(type(args), name)}
        if given.get("env_id", saved.env_id) != saved.env_id:
            given = {"horizon": 0} | given  # that of the other family
        args = replace(saved, **given | {"cuda": args.cuda})  # which is about this machine
    for name, value in asdict(saved).items() if args.resume else ():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} of {args.resume} is {value} and cannot change")
    return args


def check_args(args):
    """End the program if a value is not of its flag's type, or out of range."""
    hints = get_type_hints(type(args))
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        kinds = get_args(hints[name]) or [hints[name]]
        kinds = [choice for kind in kinds for choice in get_args(kind) or [kind]]
        types = tuple({float: (float, int)}.get(x, x) for x in kinds if isinstance(x, type))
        if not isinstance(value, types) and value not in kinds:
            choices = " or ".join(getattr(x, "__name__", str(x)) for x in kinds)
            fail(f"{flag}: must be {choices.replace('NoneType', 'None')}")
        zero = name in args.may_be_zero
        if type(value) in (int, float) and not (0 < value < math.inf or (zero and value == 0)):
            fail(f"{flag}: must be {'0 or more' if zero else 'above 0'}")
        if name in args.at_most_one and (value or 0) > 1:
            fail(f"{flag}: must be at most 1")
        largest = 1024 if name == "num_threads" else 2**63 if type(value) is int else 3e38
        if type(value) in (int, float) and value >= largest:
            fail(f"{flag}: is too large")
    if args.resume and args.evaluate:
        fail("--resume and --evaluate exclude each other")


def setup(args, complete=replace) -> tuple:
    """Check the arguments, seed torch, set threads and device, join the ranks.

    complete: of args, a copy with values for what is unset. Returns that, the device, and the
    checkpoint of --resume or --evaluate, else {}.
    """
    check_args(args)
    checkpoint = {}
    if args.resume or args.evaluate:
        checkpoint = load_checkpoint(args.resume or args.evaluate, type(args))
        args = saved_args(args, checkpoint)
    args = complete(args)
    check_args(args)
    join_ranks(args)
    if args.resume and checkpoint["ranks"] != ranks()[1]:
        fail(f"--resume: {args.resume} is a run of {checkpoint['ranks']} ranks, not {ranks()[1]}")
    if args.resume and checkpoint["global_step"] >= args.total_timesteps:
        show(f"{args.resume} is complete; its meta-test:")
        args = replace(args, resume="", evaluate=args.resume)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads or cores())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    GRAPHS.clear()
    return args, device_of(args), checkpoint


def cores() -> int:
    """This process's share of the usable cores; or OMP_NUM_THREADS, which torchrun sets to 1."""
    if ranks()[1] == 1 and os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def guarded():
    """Leaves torch's settings as they were; in it sys.exit(0) is an error."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    except SystemExit as error:
        if error.code:
            raise
        fail("the environment has called sys.exit()")
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def join_ranks(args):
    """Take this rank's device, and meet the other ranks, if torchrun has started them."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"]
    found = {name: os.environ[name] for name in names if name in os.environ}
    if found.keys() - {"MASTER_PORT"}:
        numbers = [int(value) for value in found.values() if value.isdecimal()]
        whole = len(numbers) == 5 and "MASTER_ADDR" in os.environ
        if not (whole and numbers[0] < numbers[1] and numbers[2] < numbers[3] <= numbers[1]):
            fail(f"{found} was not set by torchrun: start with it, or unset these variables")
    if args.meta_batch_size % ranks()[1]:
        fail(f"--meta-batch-size {args.meta_batch_size}: not divisible by the {ranks()[1]} ranks")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda: torch finds no GPU")
    if args.cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # before any collective
    if ranks()[1] > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if args.cuda else "gloo")
        atexit.register(torch.distributed.destroy_process_group)  # or its threads abort the exit


def layout(state, name: str = "") -> list[str]:
    """What a checkpoint holds: names, types, and dtype and shape of every tensor."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        inside = [line for key, value in items for line in layout(value, f"{name}/{key}")]
        return [f"{name} {type(state).__name__}", *inside]
    shape = f" {state.dtype} {tuple(state.shape)}" if torch.is_tensor(state) else ""
    return [f"{name} {type(state).__name__}{shape}"]


def load_checkpoint(folder: str, args_class, name: str = "checkpoint.pt") -> dict:
    """What Run.save has written last, on the CPU; ends the program if it is not whole.

    Nothing in it is executed (weights_only). A changed byte shows in the archive's checksums, which
    torch does not compare; an entry that was added, lost or reshaped shows in its layout.
    """
    path = Path(folder) / name
    if not os.path.isfile(path):  # or the folder may not be searched
        fail(f"{folder} is no run, or was stopped before its first checkpoint: there is no {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError
        state = torch.load(path, map_location="cpu", weights_only=True)
        algorithm, number = state["algorithm"], state["format"]
        whole = state.pop("layout") == layout(state)
        if algorithm == args_class.exp_name:
            args_class(**state["args"])
    except Exception as error:  # a truncated or foreign file raises almost anything
        fail(f"{path} is damaged or no checkpoint of this version ({type(error).__name__})")
    if algorithm != args_class.exp_name:
        fail(f"{path} was written by {algorithm}.py")
    if number != FORMAT or not whole:
        fail(f"{path} was changed, or is of format {number}; this version reads format {FORMAT}")
    return state


def restore(own: dict, saved: dict | None) -> dict:
    """What was saved in place of own tensors by name, if anything was; their shapes must agree."""
    if saved is None:
        return own
    shapes = [{(name, tuple(x.shape)) for name, x in state.items()} for state in (own, saved)]
    for name, _ in sorted(shapes[0] ^ shapes[1]):
        fail(f"the checkpoint is of other networks than these flags make: {name} differs")
    return {name: saved[name].to(x) for name, x in own.items()}


class Run:
    """What surrounds training: counts, times, TensorBoard, progress bar, checkpoints, signals.

    Rank 0 writes.
    """

    def __init__(self, args, checkpoint: dict):
        self.args = args
        self.iteration = checkpoint.get("iteration", 0)
        self.global_step = self.first_step = checkpoint.get("global_step", 0)
        self.metrics = {}
        self.rank, self.num_ranks = ranks()
        self.signalled = self.stopped = False
        self.tracker = None
        self.start = self.printed = time.perf_counter()
        self.handlers = {}
        with suppress(ValueError):  # off the main thread there are none
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._on_signal)
        now = all_reduce(torch.tensor(time.time_ns() // 10**6 * (self.rank == 0)))  # rank 0's
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{now.item()}"
        self.folder = Path(args.resume or "runs/" + re.sub(r"[^\w.-]", "_", name))
        if self.rank > 0:
            return
        if args.track:
            self._track()
        with self._writing():  # purge_step hides what will be done again
            self.writer = SummaryWriter(str(self.folder), purge_step=self.global_step + 1)
            rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
            self.writer.add_text("hyperparameters", "\n".join(["|param|value|", "|-|-|", *rows]))
        show(f"writing to {self.folder}")
        self.terminal = bool(sys.stdout) and sys.stdout.isatty()
        self.bar = tqdm(
            total=args.total_timesteps,
            initial=self.global_step,
            unit="step",
            unit_scale=True,
            file=sys.stdout if self.terminal else open(os.devnull, "w"),
            bar_format="{l_bar}{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
        )

    def __enter__(self):
        return self

    @contextmanager
    def _writing(self):
        """Ends the program with one line where the disk is full or the folder read-only."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch's own: a full disk
            reason = getattr(error, "strerror", None) or "the disk may be full"
            kept = os.path.isfile(self.folder / "checkpoint.pt")
            last = "; the last checkpoint is kept" if kept else ""
            fail(f"cannot write to {self.folder}: {reason}{last}")

    def _track(self):
        """Before there is a writer: Weights & Biases, which logs what TensorBoard does."""
        try:
            import wandb
        except ModuleNotFoundError:
            fail("--track needs pip install wandb")
        name = self.folder.name
        group = f"{self.args.env_id}__{self.args.exp_name}"
        how = {"resume": "allow", "sync_tensorboard": True, "config": asdict(self.args)}
        wandb.init(id=name, name=name, group=group, **how)
        self.tracker = wandb

    def _on_signal(self, number, frame):
        self.signalled = True
        signal.signal(number, signal.SIG_DFL)  # a second one aborts
        if self.rank == 0:
            with suppress(OSError):
                os.write(2, b"\nstopping after this iteration; again to abort\n")

    @property
    def complete(self) -> bool:
        return self.global_step >= self.args.total_timesteps

    def next_iteration(self) -> bool:
        """Count one more, unless all steps are done or a signal has stopped the run."""
        if self.complete or self.stopped:
            return False
        self.iteration += 1
        self.times = {}
        self.clock = time.perf_counter()
        return True

    def key(self, purpose: str, *key: int) -> tuple:
        """Of this iteration's draws, each rank's its own."""
        return purpose, self.iteration, *key, *([self.rank] if self.rank else [])

    def lap(self, name: str):
        """time/{name}: add the seconds since the last lap of this iteration."""
        if self.args.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times[f"time/{name}"] = self.times.get(f"time/{name}", 0) + now - self.clock
        self.clock = now

    def due(self, every: int) -> bool:
        return self.iteration % every == 0 or self.complete

    def log(self, metrics: dict[str, float]):
        """Write scalars to TensorBoard, and move the bar; without a terminal, every ten seconds."""
        now = time.perf_counter()
        rate = (self.global_step - self.first_step) / (now - self.start)
        metrics = metrics | self.times | {"charts/SPS": rate}
        kept = {tag: x for tag, x in metrics.items() if tag.startswith(("eval/", "charts/"))}
        self.metrics |= kept
        if self.rank > 0:
            return
        with self._writing():
            for tag, value in metrics.items():
                self.writer.add_scalar(tag, value, self.global_step)
        tags = ("charts/pre_adaptation_return", "charts/episodic_return")
        returns = " -> ".join(f"{self.metrics[tag]:.2f}" for tag in tags if tag in self.metrics)
        self.bar.set_description_str(f"return {returns}", refresh=False)
        self.bar.update(min(self.global_step, self.args.total_timesteps) - self.bar.n)
        if not self.terminal and (now - self.printed > 10 or self.complete):
            self.printed = now
            show(str(self.bar))

    def saving(self) -> bool:
        """Whether a checkpoint is due, or a signal has asked one of the ranks to stop here."""
        self.stopped = bool(all_reduce(torch.tensor(int(self.signalled))))
        return self.due(self.args.checkpoint_every) or self.stopped

    def save(self, own: dict | None = None, **state):
        """Replace the checkpoint, which is at no moment half written.

        state is the same on all ranks; own is what each keeps for itself, its replay. That of rank
        0 is in checkpoint.pt, which is renamed last; the others write a file of this iteration.
        """
        if own and self.rank > 0:
            self._write({"own": own}, f"rank{self.rank}.{self.iteration}.pt")
        all_reduce(torch.zeros(1))  # all have written
        if self.rank == 0:
            counts = {"iteration": self.iteration, "global_step": self.global_step}
            self._write(state | counts | {"own": own or {}}, "checkpoint.pt")
        all_reduce(torch.zeros(1))
        for old in self.folder.glob(f"rank{self.rank}.*.pt"):
            if old.name != f"rank{self.rank}.{self.iteration}.pt":
                old.unlink()

    def _write(self, state: dict, name: str):
        state |= {"algorithm": type(self.args).exp_name, "format": FORMAT, "ranks": self.num_ranks}
        state |= {"args": asdict(self.args) | {"resume": "", "evaluate": ""}}
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)  # of a rank on another machine
            if self.rank == 0:
                self.writer.flush()  # first, or it would be logged again
            torch.save(state | {"layout": layout(state)}, self.folder / f"{name}.tmp")
            os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def own(self, checkpoint: dict) -> dict:
        """What this rank has kept for itself in the checkpoint of a run to resume."""
        if self.rank == 0:
            return checkpoint["own"]
        name = f"rank{self.rank}.{self.iteration}.pt"
        return load_checkpoint(str(self.folder), type(self.args), name)["own"]

    def __exit__(self, kind, error, traceback):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.rank == 0:
            self.bar.close()
            self.writer.close()
        if self.tracker:
            self.tracker.finish()
        if self.stopped and not error:
            show(f"stopped; --resume {self.folder} goes on from here")


def progress(steps, args):
    """steps, with a bar in a terminal where a meta-test is all that there is to do."""
    return tqdm(steps, disable=None if args.evaluate else True, leave=False)


def stack_scores(scores: list[list[dict]], num_tasks: int) -> dict[str, np.ndarray]:
    """Scores[k], of groups of tasks after k adaptations -> (K + 1, num_tasks) by name.

    The last group may have wrapped around; what a group does not report is 0.
    """
    stacked = {}
    for name in sorted({name for row in scores for group in row for name in group}):
        rows = [
            torch.cat([group.get(name, 0 * group["return"]) for group in row]) for row in scores
        ]
        stacked[name] = torch.stack(rows)[:, :num_tasks].cpu().numpy()
    return stacked


def over_tasks(score: np.ndarray, tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean of score (..., M) over tasks (M, ...), half its 95% interval, and the different tasks.

    Copies of a task are averaged first. Student's t, its quantile to 0.2% (Abramowitz and Stegun
    26.7.5); below four different tasks the interval is NaN.
    """
    rows = [task.tobytes() for task in tasks]
    _, which, copies = np.unique(rows, return_inverse=True, return_counts=True)
    sums = [np.bincount(which, row) for row in score.reshape(-1, len(tasks))]
    score = np.stack(sums) / copies
    n = len(copies)
    nu = max(n - 1, 1)
    quantile = 1.96 + 2.372 / nu + 2.823 / nu**2 + 2.556 / nu**3 + 1.589 / nu**4
    half = quantile * score.std(1, ddof=min(n - 1, 1)) / n**0.5
    return score.mean(1), half if n > 3 else half * math.nan, n


def report(scores: dict, tasks: np.ndarray, args, episodes: dict | None = None) -> dict[str, float]:
    """Meta-test scores (K + 1, M), or (M,), of tasks (M, ...) as eval/* metrics; NaN: not scored.

    Row k is what comes after k x eval_episodes. Given the episodes, the end of a run, it also
    prints a table, and with --evaluate writes all of it to evaluation.npz.
    """
    metrics, table = {}, []
    for name, score in scores.items():
        known = ~np.isnan(score).reshape(-1, len(tasks)).any(0)
        means, halves, different = over_tasks(score[..., known], tasks[known])
        shown = [f"{mean:10.3f}" for mean in means]
        if different > 3:
            shown = [f"{x} ± {half:.3f}" for x, half in zip(shown, halves, strict=True)]
        if score.ndim == 1:
            metrics[f"eval/{name}"] = float(means[0])
            table.append(f"{name}: {shown[0].strip()}")
            continue
        few = f" ({different} different)" if different < known.sum() else ""
        interval = " and 95% interval over tasks" if different > 3 else ""
        table.append(f"{name} on {known.sum()} held-out tasks{few}, mean{interval}:")
        for k, mean in enumerate(means):
            count = k * args.eval_episodes
            metrics[f"eval/{name}_after_{count}_episodes"] = float(mean)
            table.append(f"  after {count:4d} episodes {shown[k]}")
        if name.removeprefix("sampled_") in ("return", "success"):
            metrics[f"eval/{name}"] = float(means[-1])
    if episodes is not None:
        show(*table)
    if episodes is not None and args.evaluate and ranks()[0] == 0:
        arrays = {name: x.cpu().numpy() for name, x in episodes.items() if x.numel() < 2**22}
        file = Path(args.evaluate) / "evaluation.npz"
        try:
            np.savez(file, tasks=tasks, **scores, **arrays)
        except OSError as error:
            show(f"cannot write {file}: {error.strerror}")
    return metrics


# <<< shared: run

# ==================================================================================================
# Defaults by the kind of tasks and checks of flags, which only this script has.
# ==================================================================================================

BY_KIND = {  # what a flag is if it is not given: on SparsePointRobot-v0, on other points, elsewhere
    "total_timesteps": (1_200_000, 1_000_000, 500_000),
    "meta_batch_size": (10, 16, 16),
    "num_train_tasks": (40, 80, 100),
    "num_test_tasks": (100, 100, 40),
    "gamma": (0.9, 0.9, 0.99),
    "picked_tasks": (10, 16, 5),
    "initial_steps": (200, 200, 2000),
    "prior_steps": (100, 60, 400),
    "posterior_steps": (300, 0, 0),
    "extra_steps": (0, 60, 600),
    "gradient_steps": (200, 200, 500),
    "warmup_iterations": (43, 0, 0),
    "context_size": (400, 40, 100),
    "context_segment": (20, 20, 1),
    "context_window": (1600, 1000, 0),
    "latent_size": (5, 8, 5),
    "hidden_size": (64, 64, 128),
    "encoder_size": (32, 128, 128),
    "anneal": (False, True, False),
    "temperature": (0.01, 0.01, 1.0),
    "kl_weight": (1e-4, 1e-5, 0.1),
    "regularization": (1e-5, 1e-3, 1e-3),
    "exploration_episodes": (15, 1, 2),
}
USUAL_REWARDS = [(0.2, 1), (0.5, 1), (1, 5)]  # the unit where a reward scale was found, and that


def kind_of_tasks(args) -> int:
    if args.env_id in POINT_FAMILIES:
        return 0 if args.env_id.startswith("Sparse") else 1
    return 2


def with_defaults(args):
    """args with values for what is unset, but for what is measured."""
    sparse = args.env_id.startswith("Sparse")
    kind = kind_of_tasks(args)
    values = {name: of[kind] for name, of in BY_KIND.items()}
    values["train_reward"] = values["test_reward"] = "sparse" if sparse else "dense"
    values["num_eval_steps"] = 19 if sparse else 2
    values["context_next_obs"] = "RandParams" in args.env_id
    return replace(args, **{name: x for name, x in values.items() if getattr(args, name) is None})


def set_units(agent: Agent, replay: Replay, args):
    """Measure the replays of all ranks: rewards, for contexts and, without --reward-scale, for the
    critics; and with --normalize-obs observations.
    """
    usual, scale = USUAL_REWARDS[kind_of_tasks(args)]
    unit = reward_unit(replay, agent.columns)
    buffers = (agent.means, agent.units, agent.bounds)
    means, units, bounds = (from_rows(x, agent.columns) for x in buffers)
    units["context_rewards"].fill_(unit / usual)
    if args.reward_scale is None:
        agent.reward_scale.copy_(scale * usual / unit)
    show(f"reward_scale {agent.reward_scale:.3g}")
    if args.normalize_obs:
        mean, std = moments(from_rows(replay.rows[replay.filled()], agent.columns)["obs"].double())
        std = std.clamp(min=std.max() / 10)  # or what hardly moves at first would become large
        for name in ("obs", "next_obs"):
            means[name].copy_(mean)
            units[name].copy_(torch.where(std > 0, std, 1))
            bounds[name].fill_(10)


def require_convergence(losses, agent, iteration: int, args):
    """End the program if a loss or a network is not finite."""
    bad = [f"{name} {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
    if bad or not parameters_to_vector(agent.parameters()).isfinite().all():
        what = ", ".join(bad) or "networks are not finite"
        advice = f"try a smaller --learning-rate ({args.learning_rate}) or --reward-scale"
        fail(f"training diverged in iteration {iteration}, {what}: {advice}")


def make_optimizers(agent, saved: dict, args) -> dict[str, torch.optim.Adam]:
    """Adam for the actor, and for critics and encoder, which learn together."""
    critics = [*agent.sac.critics.parameters(), *agent.encoder.parameters()]
    learn = {"critics": critics, "actor": [*agent.sac.actor.parameters()]}
    return {k: adam(p, args.learning_rate, args, saved.get(k)) for k, p in learn.items()}


def whole_rounds(args) -> list[int]:
    """Steps per task in the initial, prior, posterior and extra phase: whole rounds of episodes."""
    length = args.episodes_per_task * min(args.horizon, LONG)
    phases = [args.initial_steps, args.prior_steps, args.posterior_steps, args.extra_steps]
    return [math.ceil(steps / length) * length for steps in phases]


def check_flags(envs, args):
    """End the program if flags do not go together. Sets replay_size."""
    if isinstance(envs.single_action_space, gym.spaces.Discrete):
        fail(f"{args.env_id} has Discrete actions; pearl.py needs Box")
    for name in ("num_train_tasks", "picked_tasks"):
        if getattr(args, name) % ranks()[1]:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            fail(f"{flag}: not divisible by the {ranks()[1]} ranks")

    tasks = f"--num-train-tasks {args.num_train_tasks}"
    available = args.context_window or args.prior_steps + args.posterior_steps
    limits = [
        ("meta_batch_size", args.num_train_tasks, tasks),
        ("picked_tasks", args.num_train_tasks, tasks),
        ("context_size", available, f"the {available} steps that contexts are drawn from"),
        ("context_segment", args.context_size, f"--context-size {args.context_size}"),
    ]
    if args.num_eval_steps and args.eval_context != "none":
        rounds = f"the {args.num_eval_steps} x {args.eval_episodes} episodes"
        never = f"{rounds} before a meta-test's last ones, so that the belief is never used"
        limits.append(("exploration_episodes", args.num_eval_steps * args.eval_episodes, never))
    for name, most, what in limits:
        if getattr(args, name) > most:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: more than {what}")

    if args.evaluate:
        return
    at_first, *phases = whole_rounds(args)
    least = max(at_first, sum(phases))
    share = math.ceil(args.total_timesteps / args.num_train_tasks)
    args.replay_size = args.replay_size or max(least, 2 * share)
    if args.replay_size < least:
        fail(f"--replay-size {args.replay_size}: less than the {least} steps of an iteration")
    before = args.num_train_tasks * at_first
    if args.total_timesteps <= before:
        needed = f"must be above the {before} steps of the initial collection"
        fail(f"--total-timesteps {args.total_timesteps}: {needed}")


def show_recipe(experience: Experience, args):
    """Print what was left to be chosen by the kind of tasks, and the size of the replay."""
    values = ", ".join(f"{name} {getattr(args, name)}" for name in BY_KIND)
    size = f"{args.replay_size} steps, {experience.replay.bytes / 1e9:.2f} GB"
    show(values, f"replay: {len(experience.tasks)} tasks x {size}")


main = guarded()(main)

if __name__ == "__main__":
    main(parse(Args))

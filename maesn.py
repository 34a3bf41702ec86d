# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium>=1.1", "numpy>=1.26.4", "tyro>=1.0.9",
#                 "tensorboard>=2.17.1", "tqdm>=4.66"]
# ///
"""MAESN: Meta-Reinforcement Learning of Structured Exploration Strategies.
Gupta, Mendonca, Liu, Abbeel and Levine, NeurIPS 2018, arXiv 1802.07245, Algorithm 1.

Meta-learns a policy π(a|o,z) that reads a latent z, drawn once per episode: noise that stays the
same for an episode makes its actions hang together. Each training task has its own latent
distribution N(μ_i, σ_i²), and adapting to a task is moving this distribution. A new task starts
from the prior N(0, I). Each iteration:

(1) Draw a meta-batch of N training tasks, and with them their rows (μ_i, log σ_i) of the table of
    latents.
(2) Collect E episodes in every task: draw ε from N(0, I) for each episode, and act with
    z = μ_i + σ_i ε to its end.
(3) Advantages against a linear baseline, standardised per task: A of every step, and Â of every
    episode as a whole.
(4) Adapt: one gradient step per task on L_i = -mean over episodes e of log N(z_e; μ_i, σ_i²) Â_e,
    in μ_i and log σ_i, with step sizes α that are learned, one per dimension of the latent. z is a
    constant here: the score function. Further inner steps repeat (2)-(4) from there.
(5) Collect E new episodes in every task with the adapted (μ_i', σ_i'); their advantages as in (3).
(6) Meta-gradient in the policy, the table's rows and α, through z' = μ_i' + σ_i' ε with the ε of
    (5), and through (4), of S = -mean over tasks and steps of π(a|o,z') / π_old(a|o,z') A
    + w KL(N(μ_i, σ_i²) || N(0, I)).
(7) Natural gradient: solve H x = ∇S by conjugate gradient. H, the Hessian of the mean KL between
    action distributions before and after, is exactly the mean over i of J_iᵀ F_i J_i; J_i is the
    Jacobian of the distributions' parameters in the meta-parameters, F_i their Fisher matrix.
(8) Line search along x: the first step that lowers S and keeps that KL within δ. Every trial adapts
    anew.
(9) Meta-test: on held-out tasks, from the prior, steps (2)-(4) with a shrinking α.

Train:     python maesn.py
Resume:    python maesn.py --resume runs/NAME
Evaluate:  python maesn.py --evaluate runs/NAME

Differs from the paper in: the policy reads the direction of z only (--no-normalise-latent: z),
three inner steps in training (one), the latent alone adapts, as in the authors' code
(--adapt-policy: the weights too), the exact Fisher-vector product (their code: finite differences),
and a first iteration that only measures the units of observations. The whole list: docs/maesn.md.
"""

from __future__ import annotations

import atexit
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
import tyro
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.utils import parameters_to_vector
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# fmt: off
@dataclass(unsafe_hash=True)
class Args:
    exp_name: str = "maesn"  # name of the experiment, part of the run's folder
    env_id: str = "SparsePointRobot-v0"  # task family: one of the suite (docs/tasks.md), or module:Id-v0 for your own
    seed: int = 1  # seed of the initial parameters, episodes and action noise
    task_seed: int = 0  # seed of the task draws: training and held-out tasks depend on nothing else
    total_timesteps: int = 2_000_000  # environment steps of training, adaptation episodes included
    meta_batch_size: int = 20  # N, tasks per iteration
    episodes_per_task: int = 10  # E, episodes per task before adaptation, and after every inner step
    horizon: int = 0  # T, steps per episode at most (0: the family's own)
    num_train_tasks: int = 100  # size of the set of training tasks; each has its own latent distribution
    num_test_tasks: int = 30  # held-out tasks of the meta-test
    num_eval_steps: int = 10  # adaptation steps at meta-test
    eval_episodes: int = 50  # episodes per task before each of them
    deterministic_eval: bool = False  # score with the mean action instead of sampled ones; z is sampled all the same
    train_reward: Literal["dense", "sparse"] = "dense"  # reward of meta-training
    test_reward: Literal["dense", "sparse"] = "sparse"  # reward of the meta-test
    gamma: float = 0.99  # discount per step
    cuda: bool = False  # compute on the GPU, and keep the tasks there if they can be
    cudagraphs: bool = True  # with --cuda: replay what repeats as CUDA graphs (the same numbers, sooner)
    tf32: bool = False  # with --cuda: matrix products in TF32
    torch_deterministic: bool = True  # use deterministic kernels only
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT and WANDB_ENTITY say where
    num_threads: int = 0  # CPU threads of torch and of the simulator (0: all cores)
    eval_every: int = 25  # iterations between meta-tests
    checkpoint_every: int = 10  # iterations between checkpoints
    resume: str = ""  # folder of the run to go on with, from its last checkpoint
    evaluate: str = ""  # folder of the run to meta-test, without training

    hidden_size: int = 64  # units in each of the policy's two hidden layers
    init_std: float = 1.0  # standard deviation of the actions before training, of [-1, 1]
    latent_dim: int = 2  # Z, dimensions of the latent z
    init_mu_std: float = 1.0  # standard deviation over tasks of the latents' means μ before training
    normalise_latent: bool = True  # scale z to the length √Z before the policy reads it: only its direction counts
    latent_adaptation: bool = True  # adapt the latent in training (no: LatentSpace, at meta-test only)
    adapt_policy: bool = False  # adapt the policy's weights too, by policy gradient with a learned step size for each
    num_inner_steps: int = 3  # K, adaptation steps in training
    inner_lr: float = 1.5  # α before training, step size of the latents' means μ
    sigma_lr: float = 0.5  # the same of the latents' log σ
    policy_lr: float = 0.1  # the same of the policy's weights, with --adapt-policy
    eval_lr_decay: float = 0.5  # factor on α at each adaptation step at meta-test, from the third on
    kl_weight: float = 0.1  # w, weight of the KL from the prior to the latents before adaptation
    gae_lambda: float = 1.0  # λ of generalised advantage estimation
    max_kl: float = 0.01  # δ, trust region: mean KL between old and new action distributions after adaptation, nats
    cg_iters: int = 10  # conjugate gradient iterations
    cg_damping: float = 1e-5  # multiple of the identity added to the Fisher matrix

    may_be_zero: ClassVar[set] = {"seed", "task_seed", "horizon", "num_train_tasks", "num_threads", "num_eval_steps",
                                  "init_mu_std", "kl_weight", "gae_lambda", "cg_damping"}
    at_most_one: ClassVar[set] = {"gamma", "gae_lambda"}
# fmt: on


# ------------------------------------------------------------------------------------- the policy


class Policy(nn.Module):
    """Two tanh layers to the parameters of the action distribution: obs (..., O) and z -> (..., D).

    z is given once for all that it broadcasts to. Box: mean and log std, D = 2A, the log std
    independent of the observation. Discrete: n logits.
    """

    def __init__(self, obs_size: int, action_space: gym.Space, args: Args):
        super().__init__()
        self.normalise_latent = args.normalise_latent
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        out_size = int(action_space.n) if self.discrete else action_space.shape[0]
        self.net = nn.Sequential(
            nn.Linear(obs_size + args.latent_dim, args.hidden_size),
            nn.Tanh(),
            nn.Linear(args.hidden_size, args.hidden_size),
            nn.Tanh(),
            nn.Linear(args.hidden_size, out_size),
        )
        for layer in self.net[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.net[-1].weight.data *= 0.1  # small actions at first
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((out_size,), math.log(args.init_std)))
        self.units = Units(obs_size)  # which main measures

    def forward(self, obs: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if self.normalise_latent:
            z = math.sqrt(z.shape[-1]) * z / (z.norm(dim=-1, keepdim=True) + 1e-8)
        out = self.net(torch.cat([self.units(obs), z.expand(*obs.shape[:-1], -1)], -1))
        if self.discrete:
            return out
        log_std = self.log_std.clamp(min=math.log(1e-6))  # the original's floor
        return torch.cat([out, log_std.expand_as(out)], -1)

    def act(self, params, obs, noise) -> torch.Tensor:
        """rollout's callback: actions (N, E, A) of params (θ, φ, z) on obs (N, E, O)."""
        return draw_actions(policies(self, params, obs), noise, self.discrete)


# Dictionaries by name: φ, what is adapted to a task, has mu and log_sigma (Z,), and with
# --adapt-policy the weights; θ has the weights before adaptation, for all tasks.


def latent(phi, eps) -> torch.Tensor:
    """z = μ + σ ε, a row per episode: eps (..., E, Z) -> (..., E, Z)."""
    return phi["mu"].unsqueeze(-2) + phi["log_sigma"].exp().unsqueeze(-2) * eps


def behave(phi, theta, obs, z, policy) -> torch.Tensor:
    """dist_params of one task's policy: obs (E, ..., O), z (E, ..., Z) -> (E, ..., D)."""
    weights = {name: phi.get(name, p) for name, p in theta.items()}
    return functional_call(policy, weights, (obs, z))


def policies(policy, params, obs) -> torch.Tensor:
    """behave in N tasks: params (θ, φ, z (N, E, ..., Z)), obs (N, E, ..., O) -> (N, E, ..., D)."""
    theta, phi, z = params
    return vmap(lambda phi, obs, z: behave(phi, theta, obs, z, policy))(phi, obs, z)


# ---------------------------------------------------------------------------------- the algorithm


def episode_advantages(batch, args) -> torch.Tensor:
    """(3) Â (N, E): discounted returns less the baseline at the start, standardised per task.

    0 where a task's returns are equal: what is left of them is rounding.
    """
    returns = discounted_sum(batch["rewards"], args.gamma)
    baseline = linear_baseline(batch["obs"], returns, batch["mask"])
    whole = returns[..., 0]  # of whole episodes, (N, E)
    advantages = whole - baseline[..., 0]
    centred = advantages - advantages.mean(1, keepdim=True)
    std = centred.std(1, correction=0, keepdim=True)
    differ = whole.amax(1) - whole.amin(1) > 1e-6 * whole.abs().amax(1)
    return centred / (std + 1e-8) * differ.unsqueeze(1)


@torch.no_grad()
def collect(params, tasks, key, policy, args, test=False, deterministic=False) -> dict:
    """(2), (3), (5) E episodes in each of N tasks, in task i with φ_i, and their advantages.

    params: (θ, φ of N tasks); tasks: (N, K); key: of the draws. Returns the batch of rollout with
    the rewards of training or of the test; ε and z of its episodes, eps and z (N, E, Z); advantages
    (N, E, T) and episode_advantages (N, E); and the policies' dist_params (N, E, T, D) and the
    actions' logprobs (N, E, T).
    """
    theta, phi = params
    episodes = args.eval_episodes if test else args.episodes_per_task
    generator = keyed_generator(args, f"latents of {key[0]}", *key[1:])
    size = (len(tasks), episodes, args.latent_dim)
    eps = torch.randn(size, generator=generator, device=generator.device)
    z = latent(phi, eps)
    batch = rollout(policy.act, (theta, phi, z), tasks, episodes, key, args, deterministic)
    batch["rewards"] = batch[f"{args.test_reward if test else args.train_reward}_rewards"]
    batch |= {"eps": eps, "z": z}
    batch["episode_advantages"] = episode_advantages(batch, args)
    batch["advantages"] = standardised_advantages(batch, args)
    batch["dist_params"] = policies(policy, (theta, phi, z.unsqueeze(2)), batch["obs"])
    actor = distribution(batch["dist_params"], policy.discrete)
    batch["logprobs"] = actor.log_prob(batch["actions"])
    return batch


def inner_loss(phi, theta, batch, policy) -> torch.Tensor:
    """L of one task, batch without its task axis: -mean over episodes of log N(z; μ, σ²) Â, z a
    constant; with weights in φ (--adapt-policy) plus maml_trpo.py's lvc loss of the actions.
    """
    density = Normal(phi["mu"], phi["log_sigma"].exp(), validate_args=False)
    loss = -(density.log_prob(batch["z"]).sum(-1) * batch["episode_advantages"]).mean()
    if phi.keys() & theta.keys():
        dist_params = behave(phi, theta, batch["obs"], batch["z"].unsqueeze(1), policy)
        ratio = probability_ratio(dist_params, batch, policy.discrete)
        loss = loss - masked_mean(ratio * batch["advantages"], batch["mask"])
    return loss


def inner_step(phi, theta, batch, step_sizes, policy) -> dict:
    """(4) φ' = φ - α ∇L(φ) for one task; step_sizes: α by name; what has none stays."""
    grads = grad(inner_loss)(phi, theta, batch, policy)
    moved = {name: phi[name] - alpha * grads[name] for name, alpha in step_sizes.items()}
    return {name: moved.get(name, p) for name, p in phi.items()}


def inner_steps(phi, theta, batch, step_sizes, policy) -> dict:
    """(4) for N tasks at once: φ and batch have a leading axis."""
    step = partial(inner_step, step_sizes=step_sizes, policy=policy)
    return vmap(step, in_dims=(0, None, 0))(phi, theta, batch)


def split(meta) -> tuple[dict, dict, dict]:
    """Meta-parameters to θ, the table of latents (tasks, Z), and the step sizes α by name."""
    table = {name: meta[name] for name in ("mu", "log_sigma")}
    lrs = {name: p for name, p in meta.items() if name.startswith("log_lr.")}
    theta = {name: p for name, p in meta.items() if name not in table | lrs}
    step_sizes = {name.removeprefix("log_lr."): p.exp() for name, p in lrs.items()}
    return theta, table, step_sizes


def start(theta, latents, step_sizes) -> dict:
    """φ of N tasks before adaptation: latents (N, Z) by name, and the weights that are adapted."""
    n = len(latents["mu"])
    weights = {name: p.expand(n, *p.shape) for name, p in theta.items() if name in step_sizes}
    return latents | weights


def adapted_policies(vector, data, policy, args) -> torch.Tensor:
    """What (6) and (7) differentiate, and each trial of (8) computes: the adapted policies'
    dist_params (N, E, T, D) on the last batch, as a function of the meta-parameters (P,).

    data: meta, for names and shapes; rows (N,), those of the tasks in the table; and batches, of
    which all but the last are adapted to.
    """
    *inner_batches, outer_batch = data["batches"]
    theta, table, step_sizes = split(unflatten(vector, data["meta"]))

    def of_task(phi, inner_batches, obs, eps):
        for batch in inner_batches:
            phi = inner_step(phi, theta, batch, step_sizes, policy)
        return behave(phi, theta, obs, latent(phi, eps).unsqueeze(1), policy)

    phi = start(theta, {name: p[data["rows"]] for name, p in table.items()}, step_sizes)
    together = vmap(of_task, chunk_size=tasks_at_once(outer_batch["obs"]))
    return together(phi, inner_batches, outer_batch["obs"], outer_batch["eps"])


def latent_kl(vector, data) -> torch.Tensor:
    """KL(N(μ_i, σ_i²) || N(0, I)) before adaptation, summed over Z, (N,)."""
    meta = unflatten(vector, data["meta"])
    mu = meta["mu"][data["rows"]]
    log_sigma = meta["log_sigma"][data["rows"]]
    return 0.5 * (mu**2 + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(-1)


def weighted_kl(vector, data, args) -> torch.Tensor:
    """(6) This rank's share of w KL, the mean over tasks."""
    return args.kl_weight / ranks()[1] * latent_kl(vector, data).mean()


def evaluate(meta, tasks, policy, args) -> tuple[dict, dict]:
    """(9) Meta-test on tasks (M, K): scores before and after each of num_eval_steps adaptations.

    Returns {"return": (num_eval_steps + 1, M), ...}, means over a task's episodes, and the first
    tasks' episodes. Every meta-test makes the same draws. Only sampled episodes are adapted to;
    those of --deterministic-eval are extra.
    """
    theta, table, learned = split(meta)
    # α shrink from the third step on, LatentSpace's constant ones from the fourth (original)
    full_steps = 2 if "mu" in learned else 3
    constant = {"mu": args.inner_lr, "log_sigma": args.sigma_lr}
    step_sizes = {name: table[name].new_full((), x) for name, x in constant.items()} | learned
    scores = [[] for _ in range(args.num_eval_steps + 1)]
    episodes = {}
    for first in progress(range(0, len(tasks), args.meta_batch_size), args):
        # the last group is filled up from the first tasks: one shape for all
        group = tasks[np.arange(first, first + args.meta_batch_size) % len(tasks)]
        prior = {name: p.new_zeros(len(group), args.latent_dim) for name, p in table.items()}
        phi = start(theta, prior, step_sizes)
        for k in range(args.num_eval_steps + 1):
            params = (theta, phi)
            play = partial(collect, params, group, ("eval", first, k), policy, args, test=True)
            batch = play()
            extra = play(deterministic=True) if args.deterministic_eval else None
            scores[k].append(episode_scores(batch, extra))
            if first == 0:
                episodes[f"obs_{k}"] = batch["obs"]
            if k < args.num_eval_steps:
                decay = args.eval_lr_decay ** max(0, k + 1 - full_steps)
                shrunk = {name: alpha * decay for name, alpha in step_sizes.items()}
                phi = graphed(inner_steps, args)(phi, theta, batch, shrunk, policy)
    scores = stack_scores(scores, len(tasks))
    return scores | found_so_far(scores), episodes


def main(args: Args) -> dict[str, float]:
    """Train, resume or only evaluate; returns the last value of every eval/* and charts/* tag."""
    args, device, checkpoint = setup(args)
    check_flags(args)
    envs, train_tasks, test_tasks = make_tasks(args)

    # meta-parameters: weights, the table of latents, logarithms of step sizes
    policy = Policy(envs.single_observation_space.shape[0], envs.single_action_space, args)
    meta = {name: p.detach() for name, p in policy.named_parameters()}
    step_sizes = {}
    if args.adapt_policy:
        step_sizes = {name: torch.full_like(p, args.policy_lr) for name, p in meta.items()}
    if args.latent_adaptation:
        step_sizes["mu"] = torch.full((args.latent_dim,), args.inner_lr)
        step_sizes["log_sigma"] = torch.full((args.latent_dim,), args.sigma_lr)
    meta["mu"] = args.init_mu_std * torch.randn(args.num_train_tasks, args.latent_dim)
    meta["log_sigma"] = torch.zeros(args.num_train_tasks, args.latent_dim)
    meta |= {f"log_lr.{name}": alpha.log() for name, alpha in step_sizes.items()}
    meta = restore({name: p.to(device) for name, p in meta.items()}, checkpoint.get("meta"))
    units = restore(policy.units.state_dict(), checkpoint.get("units"))
    policy.units.load_state_dict(units)
    policy.to(device)
    num_inner_steps = args.num_inner_steps if step_sizes else 0  # else nothing adapts

    if args.evaluate:
        scores, episodes = evaluate(meta, test_tasks, policy, args)
        return report(scores, test_tasks, args, episodes)

    with Run(args, checkpoint) as run:
        while run.next_iteration():
            # (1) tasks, by their rows in the table
            rows = meta_batch(envs, np.arange(args.num_train_tasks), args, run.iteration)
            tasks = train_tasks[rows]
            rows = torch.as_tensor(rows, device=device)

            # (2)-(5) collect and adapt, and collect with the adapted latents
            theta, table, step_sizes = split(meta)
            phi = start(theta, {name: p[rows] for name, p in table.items()}, step_sizes)
            adapt = graphed(inner_steps, args)
            batches = []
            for k in range(num_inner_steps + 1):
                batches.append(collect((theta, phi), tasks, run.key("train", k), policy, args))
                if k < num_inner_steps:
                    phi = adapt(phi, theta, batches[k], step_sizes, policy)
            run.lap("collect")

            losses = {}
            if run.iteration == 1:  # no update yet: its episodes only set the units
                policy.units.measure(batches[0]["obs"], batches[0]["mask"])
            else:
                # (6)-(8) meta-update
                vector = parameters_to_vector(meta.values())
                data = {"meta": meta, "rows": rows, "batches": batches}
                vector, losses = meta_update(
                    vector, data, adapted_policies, policy, args, penalty=weighted_kl
                )
                losses["losses/latent_kl"] = task_mean(latent_kl(vector, data))
                meta = unflatten(vector, meta)
            run.lap("update")

            # log, (9) meta-test, save
            run.global_step += num_steps(batches)
            entropy = mean_entropy(batches[-1], policy.discrete)
            metrics = losses | {"losses/entropy": entropy} | charts(batches)
            if run.due(args.eval_every):
                scores, episodes = evaluate(meta, test_tasks, policy, args)
                metrics |= report(scores, test_tasks, args)
                run.lap("eval")
            run.log(metrics)
            if run.saving():
                run.save(meta=meta, units=policy.units.state_dict())
    if run.complete:
        report(scores, test_tasks, args, episodes)
    return run.metrics


# ==================================================================================================
# From here on: blocks shared with other scripts, the same bytes in each. First what belongs to the
# algorithm, then what surrounds it: rollout, tasks, graphs, run.
# ==================================================================================================

# >>> shared: actions


class Choice(Categorical):
    """Categorical in fewer operations, and without gather, whose gradient is slow on a GPU if it is
    to be deterministic.
    """

    def log_prob(self, value):
        choices = torch.arange(self.logits.shape[-1], device=value.device)
        return torch.where(value.unsqueeze(-1) == choices, self.logits, 0).sum(-1)

    def entropy(self):
        return -(self.probs * self.logits).sum(-1)


def distribution(dist_params: torch.Tensor, discrete=False) -> Choice | Independent:
    """Of mean and log std (..., 2A), or of logits (..., n); log_prob and KL are sums over A."""
    if discrete:
        return Choice(logits=dist_params, validate_args=False)
    mean, log_std = dist_params.chunk(2, -1)
    return Independent(Normal(mean, log_std.exp(), validate_args=False), 1)


def draw_actions(dist_params: torch.Tensor, noise: torch.Tensor, discrete=False) -> torch.Tensor:
    """Actions (..., A), or (...); noise (..., A): normal, for logits Gumbel, 0 for mean or mode."""
    if discrete:
        return (dist_params + noise).argmax(-1)  # Gumbel noise makes it a draw from the softmax
    mean, log_std = dist_params.chunk(2, -1)
    return mean + log_std.exp() * noise


def probability_ratio(dist_params: torch.Tensor, batch: dict, discrete=False) -> torch.Tensor:
    """π(a|o) / π_old(a|o) of the actions of a batch; 1 where the mask is 0."""
    logprobs = distribution(dist_params, discrete).log_prob(batch["actions"])
    return torch.exp((logprobs - batch["logprobs"]) * batch["mask"])


def tasks_at_once(obs: torch.Tensor) -> int | None:
    """How many of the tasks of obs (N, E, T, O) vmap takes at a time: 8000 steps suit a cache."""
    return None if obs.is_cuda else max(1, 8000 // math.prod(obs.shape[1:-1]))


# <<< shared: actions
# >>> shared: divergence


def divergence(old_params, new_params, discrete=False) -> torch.Tensor:
    """KL(old || new) of the actions, nats: dist_params (..., D) of both -> (...)."""
    old, new = (distribution(x, discrete) for x in (old_params, new_params))
    if discrete:  # kl_divergence looks for chances of 0: no graph can
        return (old.probs * (old.logits - new.logits)).sum(-1)
    return kl_divergence(old, new)


def mean_entropy(batch, discrete=False) -> float:
    """Of the policies that acted, nats: the mean over all ranks' tasks, of means over steps."""
    entropy = distribution(batch["dist_params"], discrete).entropy()
    return task_mean(masked_mean(entropy, batch["mask"], (1, 2)))


# <<< shared: divergence
# >>> shared: advantages


def masked_mean(x: torch.Tensor, mask: torch.Tensor, dim=None, keepdim=False) -> torch.Tensor:
    """Mean of x where mask is 1, over dim or everything."""
    return (x * mask).sum(dim, keepdim) / mask.sum(dim, keepdim)


def discounted_sum(x: torch.Tensor, discount: float) -> torch.Tensor:
    """y_t = Σ_{s ≥ t} discount^(s-t) x_s along the last axis, by a triangular matrix, whose product
    is in double precision, as TF32 would be too coarse.
    """
    steps = torch.arange(x.shape[-1], device=x.device)
    ahead = steps[:, None] - steps  # (s, t)
    weights = torch.where(ahead >= 0, discount ** ahead.clamp(min=0).double(), 0)
    return (x.double() @ weights).to(x.dtype)


def gae(rewards, values, mask, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimates (..., T); after an episode's last step, one that a time limit
    ends included, the value is 0.
    """
    values = values * mask
    next_values = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    return discounted_sum((rewards + gamma * next_values - values) * mask, gamma * gae_lambda)


# <<< shared: advantages
# >>> shared: baseline


def linear_baseline(obs: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (N, E, T), linear in o, o², t, t², t³ and 1, fitted to the returns of each task.

    Ridge regression (1e-5) on the data that it predicts, o clipped to ±10 and t in hundreds: Duan
    et al. 2016, arXiv 1604.06778, and the code of Finn et al. In double precision, as the features
    are nearly collinear.
    """
    obs = obs.clamp(-10, 10).double()
    t = torch.arange(obs.shape[2], device=obs.device).double() / 100
    time = torch.stack([t, t**2, t**3, torch.ones_like(t)], -1).expand(*obs.shape[:3], 4)
    x = torch.cat([obs, obs**2, time], -1).flatten(1, 2)  # (N, E T, F)
    xm = x * mask.double().flatten(1, 2).unsqueeze(-1)
    ridge = 1e-5 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    targets = returns.double().flatten(1, 2).unsqueeze(-1)
    weights = torch.linalg.solve(xm.mT @ x + ridge, xm.mT @ targets)
    return (x @ weights).view_as(returns).to(returns.dtype)


def standardised_advantages(batch, args) -> torch.Tensor:
    """(N, E, T) against each task's linear baseline, with mean 0 and std 1 over its steps."""
    mask = batch["mask"]
    returns = discounted_sum(batch["rewards"], args.gamma)
    values = linear_baseline(batch["obs"], returns, mask)
    advantages = gae(batch["rewards"], values, mask, args.gamma, args.gae_lambda)
    centred = (advantages - masked_mean(advantages, mask, (1, 2), True)) * mask
    return centred / (masked_mean(centred**2, mask, (1, 2), True).sqrt() + 1e-8)


# <<< shared: baseline
# >>> shared: trpo


def unflatten(vector: torch.Tensor, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vector's entries under the names and shapes of like."""
    pieces = vector.split([p.numel() for p in like.values()])
    return {name: piece.view_as(like[name]) for name, piece in zip(like, pieces, strict=True)}


def conjugate_gradient(product, b: torch.Tensor, iters: int, tolerance: float = 1e-10) -> tuple:
    """Solves product(x) = b from x = 0, up to |residual|² < tolerance (original).

    product: symmetric and positive definite. Returns x and product(x), both (P,).
    """
    x = torch.zeros_like(b)
    residual = direction = b
    for _ in range(iters):
        energy = residual @ residual
        solved = energy < tolerance
        if not b.is_cuda and solved:  # a graph goes on, with steps of 0
            break
        image = product(direction)
        step = torch.where(solved, 0, energy / (direction @ image))
        x = x + step * direction
        residual = residual - step * image
        direction = residual + torch.where(solved, 0, residual @ residual / energy) * direction
    return x, b - residual


def line_search(vector, step, loss_and_kl, old, max_kl: float, shrink=0.8, tries=15) -> tuple:
    """The first of vector - shrink^j step that lowers the loss and keeps the KL within max_kl.

    loss_and_kl: (P,) -> (loss, KL), equal on all ranks; old: its value at vector; 0.8 and 15 are
    the original's. Returns (the vector or, if there is none, the old one, its value, tries).
    """
    for j in range(tries):
        candidate = vector - shrink**j * step
        new = loss_and_kl(candidate)
        if new[0] < old[0] and new[1] <= max_kl:
            return candidate, new, j + 1
    return vector, old, tries


def surrogate_and_kl(dist_params, batch, discrete: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of S, and of the KL between old and new policies: means over the steps of a
    task, then over tasks; dist_params (N, E, T, D): what new policies do on batch.
    """
    steps = batch["mask"].sum((1, 2), keepdim=True)
    weight = batch["mask"] / (steps * len(steps) * ranks()[1])
    ratio = probability_ratio(dist_params, batch, discrete)
    kl = divergence(batch["dist_params"], dist_params, discrete)
    return -(weight * ratio * batch["advantages"]).sum(), (weight * kl).sum()


def natural_gradient(vector, data, dist_of, penalty, policy, args) -> tuple[torch.Tensor, ...]:
    """(6), (7) The gradient of the loss at vector, and the step, both (P,)."""
    batch = data["batches"][-1]

    def surrogate(dist_params):
        return surrogate_and_kl(dist_params, batch, policy.discrete)[0]

    def kl(dist_params):
        return surrogate_and_kl(dist_params, batch, policy.discrete)[1]

    # (6) ∇S = Jᵀ ∂S/∂dist_params; pull: (N, E, T, D) -> ((P,),), c -> Jᵀ c
    dist_params, pull = vjp(lambda vector: dist_of(vector, data, policy, args), vector)
    gradient = pull(grad(surrogate)(dist_params))[0]
    if penalty:
        gradient = gradient + grad(penalty)(vector, data, args)
    gradient = all_reduce(gradient)

    # (7) H v = Jᵀ F J v, all from the graph of (6): pull is linear, so that its own vjp, push, is
    # v -> J v, (P,) -> ((N, E, T, D),); F is the Hessian of the KL in dist_params, and symmetric
    _, push = vjp(lambda c: pull(c)[0], torch.zeros_like(dist_params))
    _, fisher = vjp(grad(kl), dist_params)

    def fisher_product(v):
        (moved,) = push(v)
        (weighted,) = fisher(moved)
        (product,) = pull(weighted)
        return all_reduce(product) + args.cg_damping * v

    direction, image = conjugate_gradient(fisher_product, gradient, args.cg_iters)
    step = direction * torch.sqrt(2 * args.max_kl / (direction @ image + 1e-8))  # ½ sᵀ H s = δ
    return gradient.detach(), step.detach()


@torch.no_grad()
def trial(vector, data, dist_of, penalty, policy, args) -> torch.Tensor:
    """(8) Loss and KL at vector, (2,), of all ranks."""
    dist_params = dist_of(vector, data, policy, args)
    loss, kl = surrogate_and_kl(dist_params, data["batches"][-1], policy.discrete)
    if penalty:
        loss = loss + penalty(vector, data, args)
    return all_reduce(torch.stack([loss, kl]))


def meta_update(vector, data, dist_of, policy, args, penalty=None) -> tuple[torch.Tensor, dict]:
    """(6)-(8) One natural gradient step on the meta-parameters, vector (P,).

    dist_of: vector, data, policy, args -> dist_params (N, E, T, D) of the adapted policies on the
    last of data's batches; penalty: vector, data, args -> this rank's share of a further term of
    the loss. Returns the new vector, the old one if no step was acceptable, and what to log.
    """
    given = (data, dist_of, penalty, policy, args)
    gradient, step = graphed(natural_gradient, args)(vector, *given)
    if not gradient.isfinite().all():
        fail("the meta-gradient is not finite: try a smaller --inner-lr")

    # (8) is a loop over step sizes
    def loss_and_kl(vector):
        return graphed(trial, args)(vector, *given).tolist()

    old = loss_and_kl(vector)
    vector, new, tries = line_search(vector, step, loss_and_kl, old, args.max_kl)
    losses = {"losses/surrogate": new[0], "losses/kl": new[1], "losses/line_search_tries": tries}
    return vector, losses


# <<< shared: trpo
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
# >>> shared: units


def spread(x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """moments, but a standard deviation of 1 for what varies by no more than rounding."""
    mean, std = moments(x, mask)
    return mean, torch.where(std > 1e-5 * mean.abs(), std, 1)


class Units(nn.Module):
    """x (..., *shape) less its mean, over its standard deviation, within ±10; 0 until measured."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.full(shape, torch.inf))

    def measure(self, x: torch.Tensor, mask: torch.Tensor | None = None):
        """Those of x (*mask.shape, *shape) become the units; mask: see moments."""
        mean, std = spread(x, mask)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) / self.std).clamp(-10, 10)


# <<< shared: units
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


def found_so_far(scores: dict) -> dict[str, np.ndarray]:
    """Whether an episode adapted to so far was a success, if tasks report it."""
    if "success" not in scores:
        return {}
    hits = np.maximum.accumulate(scores.get("sampled_success", scores["success"]) > 0)
    return {"found": np.pad(hits[:-1], ((1, 0), (0, 0))).astype(float)}


def check_flags(args):
    """End the program if there are no latents to learn."""
    if not args.num_train_tasks:
        fail("--num-train-tasks 0: each training task has its own latent, there must be a set")
    if args.latent_dim == 1 and args.normalise_latent:  # ±1 has no gradient
        fail("--latent-dim 1: z would be a sign: give --latent-dim 2 or --no-normalise-latent")


main = guarded()(main)

if __name__ == "__main__":
    main(parse(Args))

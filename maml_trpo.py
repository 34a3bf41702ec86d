"""MAML-TRPO: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks.
Finn, Abbeel and Levine, ICML 2017, arXiv 1703.03400, Algorithm 3 (reinforcement learning).

Meta-learns the initial parameters θ of a policy, such that one policy-gradient step on a few episodes of a new task
gives a policy φ that is good at this task. Each iteration:

(1) Draw a meta-batch of N tasks from the training distribution.
(2) Collect E episodes in every task i with the policy of θ.
(3) Per task: fit a linear baseline to the returns, estimate advantages A (GAE) and standardise them.
(4) Adapt: one gradient step per task on the inner loss, φ_i = θ - α ∇L_i(θ).
    Further inner steps repeat (2)-(4) from φ_i.
(5) Collect E new episodes in every task with the adapted policy φ_i, and their advantages as in (3).
(6) Meta-gradient of the surrogate S(θ) = -mean over i and t of π_φi(θ)(a|o) / π_old(a|o) A, through
    (4), in which advantages are constants (--inner-loss lvc-std: all but their standardisation).
(7) Natural gradient: conjugate gradient on H x = ∇S. H = mean over i of J_iᵀ F_i J_i is the exact Hessian at θ of
    the KL between old and new adapted policies; J_i maps θ to what φ_i does, F_i is the Fisher matrix of that.
(8) Line search along x: take the first step that lowers S and keeps the KL within δ. Every trial adapts anew.
(9) Meta-test: (2)-(4) on held-out tasks, the return after every adaptation step.

Train:     python maml_trpo.py
Resume:    python maml_trpo.py --resume runs/NAME
Evaluate:  python maml_trpo.py --evaluate runs/NAME

Differs from the paper in: the likelihood-ratio inner loss (--inner-loss logli is the paper's), the exact Fisher-vector
product (its code: finite differences), two tanh layers of 64 units (ReLU of 100). The whole list: docs/maml_trpo.md.
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
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = "maml_trpo"
    """name of the experiment, part of the run's folder"""
    env_id: str = "Navigation2D-v0"
    """task family: one of the suite (docs/tasks.md), or module:Id-v0 for your own"""
    seed: int = 1
    """seed of the initial parameters, episodes and action noise"""
    task_seed: int = 0
    """seed of the task draws: training and held-out tasks depend on nothing else"""
    total_timesteps: int = 5_000_000
    """environment steps of training, adaptation episodes included, meta-test excluded"""
    meta_batch_size: int = 20
    """N, tasks per iteration"""
    episodes_per_task: int = 20
    """E, episodes per task in each phase of an iteration: before adaptation, and after every inner step"""
    horizon: int = 0
    """T, steps per episode at most (0: the family's own)"""
    num_train_tasks: int = 0
    """size of a fixed set of training tasks (0: fresh draws in every iteration)"""
    num_test_tasks: int | None = None
    """held-out tasks of the meta-test (unset: 200 on the point families, 40 elsewhere)"""
    num_eval_steps: int = 3
    """adaptation steps at meta-test"""
    eval_episodes: int | None = None
    """episodes per task before each adaptation step at meta-test (unset: episodes_per_task)"""
    deterministic_eval: bool = False
    """score with the mean action instead of sampled ones"""
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
    eval_every: int = 25
    """iterations between meta-tests"""
    checkpoint_every: int = 10
    """iterations between checkpoints"""
    resume: str = ""
    """folder of the run to go on with, from its last checkpoint"""
    evaluate: str = ""
    """folder of the run to meta-test, without training"""

    hidden_size: int = 64
    """units in each of the policy's two hidden layers"""
    init_std: float = 1.0
    """standard deviation of the actions before training, of [-1, 1]"""
    num_inner_steps: int = 1
    """K, adaptation steps in training"""
    inner_lr: float = 0.1
    """α, step size of the adaptation"""
    inner_loss: Literal["lvc", "logli", "lvc-std"] = "lvc"
    """lvc: likelihood ratio; logli: log-likelihood (the paper's); lvc-std: lvc, std(A) varying"""
    first_order: bool = False
    """drop the second derivatives: treat the inner gradient as a constant"""
    learn_inner_lr: bool = False
    """meta-learn one step size per parameter, starting from inner_lr"""
    eval_lr_decay: float = 0.5
    """factor on the step size of all adaptation steps at meta-test but the first"""
    gae_lambda: float = 1.0
    """λ of generalised advantage estimation"""
    max_kl: float = 0.01
    """δ, trust region: mean KL between old and new adapted policies, nats"""
    cg_iters: int = 10
    """conjugate gradient iterations"""
    cg_damping: float = 1e-5
    """multiple of the identity added to the Fisher matrix"""


# ---------------------------------------------------------------------------------------------------------- the policy


class Policy(nn.Module):
    """Two tanh layers to the parameters of the action distribution: obs (..., O) -> (..., D).

    Box: mean and log std, D = 2A, the log std independent of the observation. Discrete: n logits, D = n.
    """

    def __init__(self, obs_size: int, action_space: gym.Space, hidden_size: int, init_std: float = 1.0):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.out_size = int(action_space.n) if self.discrete else action_space.shape[0]
        hidden = [nn.Linear(obs_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, hidden_size), nn.Tanh()]
        self.net = nn.Sequential(*hidden, nn.Linear(hidden_size, self.out_size))
        for layer in self.net[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.out_size,), math.log(init_std)))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        out = self.net(obs)
        return out if self.discrete else torch.cat([out, self.log_std.clamp(min=math.log(1e-6)).expand_as(out)], -1)

    def distribution(self, dist: torch.Tensor) -> Categorical | Independent:
        """The distribution with parameters dist (..., D); its log_prob and KL are sums over the action's dimensions."""
        if self.discrete:
            return Categorical(logits=dist, validate_args=False)
        mean, log_std = dist.chunk(2, -1)
        return Independent(Normal(mean, log_std.exp(), validate_args=False), 1)


def distributions(policy, params, obs) -> torch.Tensor:
    """What N policies do, at once: params (N, ...) by name, obs (N, ..., O) -> dist (N, ..., D)."""
    return vmap(lambda params, obs: functional_call(policy, params, (obs,)))(params, obs)


# ------------------------------------------------------------------------------------------------------- the algorithm


def collect(params, tasks, rng, envs, policy, horizon, gamma, gae_lambda, reward, deterministic=False) -> dict:
    """(2), (3), (5) E episodes in each of N tasks, in task i with the policy params[i], and their advantages.

    params: (N, ...) by name; tasks: (N, task size). Returns obs (N, E, T, O), actions (N, E, T, A) or (N, E, T), dist
    (N, E, T, D) and its logprobs, and rewards, advantages and mask (0 after an episode's end), all (N, E, T).
    """
    n = len(tasks)
    noise = rng.gumbel if policy.discrete else rng.normal
    noise = noise(size=(envs.total_lanes, horizon, policy.out_size))[envs.lanes] * (not deterministic)
    noise = torch.as_tensor(noise, dtype=torch.get_default_dtype(), device=params["net.0.weight"].device)

    def act(obs, t):  # (N E, O) -> (N E, A) or (N E,)
        dist = distributions(policy, params, obs.unflatten(0, (n, -1))).flatten(0, 1)
        if policy.discrete:
            return (dist + noise[:, t]).argmax(-1)  # Gumbel noise makes it a draw from the softmax
        mean, log_std = dist.chunk(2, -1)
        return mean + log_std.exp() * noise[:, t]

    with torch.no_grad():
        batch = rollout(envs, act, np.repeat(tasks, envs.num_envs // n, axis=0), horizon, rng, noise.device)
        batch = {name: x.unflatten(0, (n, -1)) for name, x in batch.items()}
        if reward == "sparse":
            batch["rewards"] = batch["sparse_reward"]
        batch["advantages"] = standardised_advantages(batch, gamma, gae_lambda)
        batch["dist"] = distributions(policy, params, batch["obs"])
        batch["logprobs"] = policy.distribution(batch["dist"]).log_prob(batch["actions"])
    return batch


def inner_loss(params, batch, policy, kind) -> tuple[torch.Tensor, torch.Tensor]:
    """L of one task, batch without its task axis, a mean over its steps; and σ_A for inner_step.

    logli: -log π(a|o) A. lvc: -π(a|o) / π_old(a|o) A, with the same gradient at π = π_old, where it is taken, but a
    Hessian that keeps the ∇log π ∇log πᵀ A that logli drops (ProMP, arXiv 1810.06784).
    σ_A² = E_θ[A²] - E_θ[A]², where E_θ[f] = E_old[π / π_old f] and E_old[A²] = 1.
    """
    logprobs = policy.distribution(functional_call(policy, params, (batch["obs"],))).log_prob(batch["actions"])
    difference = (logprobs - batch["logprobs"]) * batch["mask"]  # exp of a padded step could be infinite
    ratio, advantages = torch.exp(difference), batch["advantages"]
    mean = partial(masked_mean, mask=batch["mask"])
    # the 1 in place of mean(A²) makes it 1 where all A are 0, too
    variance = 1 + mean((ratio - 1) * advantages**2) - mean(ratio * advantages) ** 2
    return -mean((logprobs if kind == "logli" else ratio) * advantages), variance.sqrt()


def inner_step(params, batch, lr, policy, kind, first_order=False) -> dict:
    """(4) φ = θ - α ∇L(θ) for one task; lr: α by name, a number or a tensor.

    lvc-std: α ∇L(θ) / σ_A(θ), L as with lvc. A has been divided by its standard deviation, which
    depends on θ; σ_A(θ) is that in units of its value at π_old. There it is 1, so that the step is
    that of lvc, but not its derivative.
    """
    grads, std = grad(inner_loss, has_aux=True)(params, batch, policy, kind)
    if kind == "lvc-std":
        grads = {name: g / std for name, g in grads.items()}
    return {name: p - lr[name] * (grads[name].detach() if first_order else grads[name]) for name, p in params.items()}


def split(meta, inner_lr) -> tuple[dict, dict]:
    """Meta-parameters to θ and the step size α of each parameter, learned or inner_lr."""
    theta = {name: p for name, p in meta.items() if not name.startswith("log_lr.")}
    return theta, {name: meta[f"log_lr.{name}"].exp() if f"log_lr.{name}" in meta else inner_lr for name in theta}


def adapted_distributions(vector, like, inner_batches, obs, inner_lr, policy, kind, first_order=False) -> torch.Tensor:
    """The map of (6)-(8): meta-parameters (P,), named as in like, to what the φ_i(θ) do on obs, dist (N, E, T, D)."""
    theta, lr = split(unflatten(vector, like), inner_lr)

    def of_task(inner_batches, obs):
        params = theta
        for batch in inner_batches:
            params = inner_step(params, batch, lr, policy, kind, first_order)
        return functional_call(policy, params, (obs,))

    chunk = None if obs.is_cuda else max(1, 8000 // obs[0, ..., 0].numel())  # tasks at a time that suit a CPU's cache
    return vmap(of_task, chunk_size=chunk)(inner_batches, obs)


def evaluate(meta, tasks, collect, adapt, group, num_steps, inner_lr, lr_decay, seed, deterministic=False) -> dict:
    """(9) Meta-test on tasks (M, task size): the scores before and after each of num_steps adaptation steps.

    collect and adapt: collect and inner_step with their settings; group: the tasks that collect's lanes hold at once.
    Returns {"return": (num_steps + 1, M), ...}, means over a task's episodes. Draws depend on seed and group alone, so
    that every call meets the same episodes. Only sampled episodes are adapted to; deterministic ones are extra.
    """
    scores = {}
    for first in range(0, len(tasks), group):
        members = (first + np.arange(group))[shard(group)]  # the last group wraps around
        theta, lr = split(meta, inner_lr)
        params = {name: p.expand(len(members), *p.shape) for name, p in theta.items()}
        for k in range(num_steps + 1):
            episodes = partial(collect, params, tasks[members % len(tasks)], keyed_rng(seed, "eval", first, k))
            batch = episodes()
            for name, score in episode_scores(episodes(deterministic=True) if deterministic else batch).items():
                scores.setdefault(name, score.new_zeros(num_steps + 1, len(tasks) + group))[k, members] = score
            if k < num_steps:
                scaled_lr = {name: x * (lr_decay if k else 1) for name, x in lr.items()}
                params = vmap(partial(adapt, lr=scaled_lr))(params, batch)
    return gather_scores(scores, len(tasks))


def main(args: Args) -> dict[str, float]:
    """Train, resume or only evaluate; returns the last value of every eval/* and charts/* tag."""
    device = setup(args)
    checkpoint = load_checkpoint(args.resume or args.evaluate, Args) if args.resume or args.evaluate else {}
    iteration, global_step = checkpoint.get("iteration", 0), checkpoint.get("global_step", 0)
    if args.resume and global_step >= args.total_timesteps:
        show(f"{args.resume} is complete; its meta-test:")
        args = replace(args, resume="", evaluate=args.resume)

    # tasks, and environments with a lane per episode
    n, num_eval_episodes = args.meta_batch_size, args.eval_episodes or args.episodes_per_task
    lanes, eval_lanes = n * args.episodes_per_task, n * num_eval_episodes
    envs = make_envs(args.env_id, lanes, args.num_threads, shard(lanes))
    eval_envs = make_envs(args.env_id, eval_lanes, args.num_threads, shard(eval_lanes)) if eval_lanes != lanes else envs
    horizon = args.horizon or envs.horizon or fail(f"{args.env_id} has no time limit of its own: give --horizon")
    num_test_tasks = args.num_test_tasks or (200 if args.env_id in POINT_FAMILIES else 40)
    test_tasks = envs.sample_test_tasks(num_test_tasks, np.random.default_rng([args.task_seed, 1]))
    if args.num_train_tasks:
        train_tasks = envs.sample_tasks(args.num_train_tasks, np.random.default_rng([args.task_seed, 0]))

    if "sparse" in (args.train_reward, args.test_reward):
        require_sparse_reward(envs, test_tasks[:1])

    # meta-parameters: θ, and with --learn-inner-lr the logarithms of its step sizes
    obs_size = envs.single_observation_space.shape[0]
    policy = Policy(obs_size, envs.single_action_space, args.hidden_size, args.init_std)
    meta = {name: p.detach() for name, p in policy.named_parameters()}
    if args.learn_inner_lr:
        meta |= {f"log_lr.{name}": torch.full_like(p, math.log(args.inner_lr)) for name, p in meta.items()}
    meta = {name: p.to(device) for name, p in (checkpoint["meta"] if checkpoint else meta).items()}

    # the functions above with this run's settings
    sampling = {"policy": policy, "horizon": horizon, "gamma": args.gamma, "gae_lambda": args.gae_lambda}
    collect_train = partial(collect, envs=envs, reward=args.train_reward, **sampling)
    collect_test = partial(collect, envs=eval_envs, reward=args.test_reward, **sampling)
    inner = {"policy": policy, "kind": args.inner_loss, "first_order": args.first_order}
    adapt = partial(inner_step, **inner)
    meta_test = partial(
        evaluate, tasks=test_tasks, collect=collect_test, adapt=adapt, group=n, num_steps=args.num_eval_steps,
        inner_lr=args.inner_lr, lr_decay=args.eval_lr_decay, seed=args.seed, deterministic=args.deterministic_eval,
    )  # fmt: skip
    trust_region = {"max_kl": args.max_kl, "cg_iters": args.cg_iters, "cg_damping": args.cg_damping}
    if args.evaluate:
        return report(meta_test(meta), test_tasks, num_eval_episodes, printed=True)

    with closing(Run(args, global_step)) as run:
        while global_step < args.total_timesteps and not run.stopping():
            iteration, start = iteration + 1, time.perf_counter()

            # (1) tasks; each rank takes its share
            if args.num_train_tasks:
                order = keyed_rng(args.seed, "tasks", iteration).permutation(args.num_train_tasks)
                tasks = train_tasks[np.resize(order, n)]
            else:
                tasks = envs.sample_tasks(n, np.random.default_rng([args.task_seed, 0, iteration]))
            tasks = tasks[shard(n)]

            # (2)-(5) collect and adapt, and collect with the adapted policies
            theta, lr = split(meta, args.inner_lr)
            params, batches = {name: p.expand(len(tasks), *p.shape) for name, p in theta.items()}, []
            for k in range(args.num_inner_steps + 1):
                batches.append(collect_train(params, tasks, keyed_rng(args.seed, "train", iteration, k)))
                if k < args.num_inner_steps:
                    params = vmap(partial(adapt, lr=lr))(params, batches[k])
            collected = time.perf_counter()

            # (6)-(8) meta-update
            *inner_batches, outer_batch = batches
            dist_of = partial(adapted_distributions, like=meta, inner_batches=inner_batches, obs=outer_batch["obs"])
            dist_of = partial(dist_of, inner_lr=args.inner_lr, **inner)
            vector = parameters_to_vector(meta.values())
            vector, losses = meta_update(vector, dist_of, outer_batch, policy, **trust_region)
            meta = unflatten(vector, meta)
            updated = time.perf_counter()

            # log, (9) meta-test, save
            global_step += int(all_reduce(sum(batch["mask"].sum() for batch in batches)))
            entropy = policy.distribution(outer_batch["dist"]).entropy()
            metrics = losses | {
                "losses/entropy": task_mean(masked_mean(entropy, outer_batch["mask"], (1, 2))),
                "charts/pre_adaptation_return": task_mean(episode_scores(batches[0])["return"]),
                "charts/episodic_return": task_mean(episode_scores(outer_batch)["return"]),
                "charts/episodic_length": task_mean(outer_batch["mask"].sum(-1)),
                "time/collect": collected - start,
                "time/update": updated - collected,
            }
            if iteration % args.eval_every == 0 or global_step >= args.total_timesteps:
                scores = meta_test(meta)
                metrics |= report(scores, test_tasks, num_eval_episodes) | {"time/eval": time.perf_counter() - updated}
            run.log(metrics, global_step)
            if iteration % args.checkpoint_every == 0:
                run.save(meta=meta, iteration=iteration, global_step=global_step)

        run.save(meta=meta, iteration=iteration, global_step=global_step)
    if global_step >= args.total_timesteps:
        report(scores, test_tasks, num_eval_episodes, printed=True)
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
# >>> shared: baseline


def linear_baseline(obs: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (N, E, T) of a linear function of o, o², t, t², t³ and 1, fitted to the returns of each task by itself.

    Ridge regression (1e-5) on the data that it predicts, o clipped to ±10 and t in hundreds: Duan et al. 2016,
    arXiv 1604.06778, and the code of Finn et al. In double precision, as the features are nearly collinear.
    """
    obs, t = obs.clamp(-10, 10).double(), torch.arange(obs.shape[2], device=obs.device).double() / 100
    time = torch.stack([t, t**2, t**3, torch.ones_like(t)], -1).expand(*obs.shape[:3], 4)
    x = torch.cat([obs, obs**2, time], -1).flatten(1, 2)  # (N, E T, F)
    xm = x * mask.double().flatten(1, 2).unsqueeze(-1)
    ridge = 1e-5 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(xm.mT @ x + ridge, xm.mT @ returns.double().flatten(1, 2).unsqueeze(-1))
    return (x @ weights).view_as(returns).to(returns.dtype)


def standardised_advantages(batch, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Advantages (N, E, T) against the task's linear baseline, with mean 0 and std 1 over the steps of each task."""
    mask = batch["mask"]
    values = linear_baseline(batch["obs"], discounted_sum(batch["rewards"], gamma), mask)
    advantages = gae(batch["rewards"], values, mask, gamma, gae_lambda)
    centred = (advantages - masked_mean(advantages, mask, (1, 2), True)) * mask
    return centred / (masked_mean(centred**2, mask, (1, 2), True).sqrt() + 1e-8)


# <<< shared: baseline
# >>> shared: trpo


def unflatten(vector: torch.Tensor, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vector's entries under the names and shapes of like."""
    pieces = vector.split([p.numel() for p in like.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(like.items(), pieces, strict=True)}


def conjugate_gradient(product, b: torch.Tensor, iters: int, tolerance: float = 1e-10) -> torch.Tensor:
    """Solves product(x) = b, product symmetric and positive definite, from x = 0 to |residual|² < tolerance at most.

    Returns x and product(x), both (P,).
    """
    x, residual, direction = torch.zeros_like(b), b, b
    for _ in range(iters):
        energy = residual @ residual
        if energy < tolerance:
            break
        image = product(direction)
        step = energy / (direction @ image)
        x, residual = x + step * direction, residual - step * image
        direction = residual + (residual @ residual) / energy * direction
    return x, b - residual


def line_search(vector, step, loss_and_kl, old, max_kl: float, shrink: float = 0.8, tries: int = 15):
    """The first of vector - shrink^j step that lowers the loss and keeps the KL within max_kl; else vector itself.

    loss_and_kl: (P,) -> (loss, KL), equal on all ranks; old: its value at vector. Returns (vector, its value, tries).
    """
    for j in range(tries):
        candidate = vector - shrink**j * step
        new = loss_and_kl(candidate)
        if new[0] < old[0] and new[1] <= max_kl:
            return candidate, new, j + 1
    return vector, old, tries


def meta_update(vector, dist_of, batch, policy, max_kl, cg_iters, cg_damping, penalty=None):
    """(6)-(8) One natural gradient step on the meta-parameters, vector (P,).

    dist_of: (P,) -> (N, E, T, D), the adapted_distributions on batch; penalty: (P,) -> this rank's share of a further
    term of the loss. Returns the new vector, which is the old one if no step was acceptable, and what to log.
    """
    steps = batch["mask"].sum((1, 2), keepdim=True)
    weight = batch["mask"] / (steps * len(steps) * ranks()[1])  # mean over a task's steps, then over all tasks

    def surrogate(dist):
        difference = policy.distribution(dist).log_prob(batch["actions"]) - batch["logprobs"]
        return -(weight * torch.exp(difference * batch["mask"]) * batch["advantages"]).sum()

    def kl(dist):
        return (weight * kl_divergence(policy.distribution(batch["dist"]), policy.distribution(dist))).sum()

    def loss_and_kl(vector, dist):
        loss = surrogate(dist) + (penalty(vector) if penalty else 0)
        return all_reduce(torch.stack([loss, kl(dist)])).tolist()

    # (6) ∇S = Jᵀ ∂S/∂dist
    dist, pull = vjp(dist_of, vector)  # pull: c -> Jᵀ c
    gradient = pull(grad(surrogate)(dist))[0]
    gradient = all_reduce(gradient + grad(penalty)(vector) if penalty else gradient)
    if not gradient.isfinite().all():
        fail("the meta-gradient is not finite: try a smaller --inner-lr")

    # (7) H v = Jᵀ F J v, all from the graph of (6): pull is linear, so that its own vjp is v -> J v
    _, push = vjp(lambda c: pull(c)[0], torch.zeros_like(dist))
    _, fisher = vjp(grad(kl), dist)  # F is the Hessian of the KL in dist, and symmetric

    def fisher_product(v):
        return all_reduce(pull(*fisher(*push(v)))[0]) + cg_damping * v

    direction, image = conjugate_gradient(fisher_product, gradient, cg_iters)
    step = direction * torch.sqrt(2 * max_kl / (direction @ image + 1e-8))  # ½ sᵀ H s = δ

    # (8) is a loop over step sizes
    with torch.no_grad():
        old = loss_and_kl(vector, dist)
        vector, new, tries = line_search(vector, step, lambda x: loss_and_kl(x, dist_of(x)), old, max_kl)
    return vector, {"losses/surrogate": new[0], "losses/kl": new[1], "losses/line_search_tries": tries}


# <<< shared: trpo

if __name__ == "__main__":
    main(parse(Args))

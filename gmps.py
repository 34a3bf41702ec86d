"""GMPS: Guided Meta-Policy Search.
Mendonca, Gupta, Kralev, Abbeel, Levine and Finn, NeurIPS 2019, arXiv 1904.00956.

Meta-learns, like MAML, initial parameters θ of a policy from which a policy-gradient step adapts to a new task. But
the meta-objective is supervised: the adapted policy is to do in each training task what an expert of this task does.
It can be optimised off-policy, many gradient steps on one batch of episodes. Only training has experts. First they act:

(1) Train the expert: one SAC policy that sees the true task, on the dense reward of all training tasks. Or take a
    scripted expert, or a file of demonstrations.
(2) Demonstrations: in every training task i the expert acts, with some noise. Its states and actions a* are D_i. The
    policy reads observations in the units (mean, spread) of these states.

Then, round by round:

(3) Collect E episodes in N training tasks with the policy of θ. Per task: fit a linear baseline, estimate advantages A
    (GAE) and standardise them.
(4) DAgger: collect episodes with the adapted policies φ_i, and add their states to D_i with the expert's actions.
(5) Adapt: one policy-gradient step per task on (3), φ_i = θ - α ∘ ∇L_i(θ), with a step size for each parameter. L_i is
    the mean of -w A log π_θ(a|o); the importance weight w = π_θ(a|o) / π_old(a|o), a constant, is 1 before (6).
(6) Hundreds of Adam steps on θ and α, through (5), on the mean of (μ_φi(o) - a*)² over the states of all D_i.
(7) Meta-test: (3) and (5) on held-out tasks, where nothing but the reward tells the task.

Train:     python gmps.py
Resume:    python gmps.py --resume runs/NAME
Evaluate:  python gmps.py --evaluate runs/NAME

Differs from the paper in the policy's size and input, minibatches of D_i, DAgger's place in a round: docs/gmps.md.
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
from torch.func import functional_call, grad, vmap
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = "gmps"
    """name of the experiment, part of the run's folder"""
    env_id: str = "SparsePointRobot-v0"
    """task family: one of the suite (docs/tasks.md), or module:Id-v0 for your own"""
    seed: int = 1
    """seed of the initial parameters, episodes and draws from the data"""
    task_seed: int = 0
    """seed of the task draws: training and held-out tasks depend on nothing else"""
    total_timesteps: int = 50_000
    """environment steps of training, those of the expert included, meta-test excluded"""
    meta_batch_size: int = 10
    """N, tasks per round"""
    episodes_per_task: int = 20
    """E, episodes per task in a round, to adapt to"""
    horizon: int = 0
    """T, steps per episode at most (0: the family's own)"""
    num_train_tasks: int = 20
    """size of the set of training tasks; each has its own demonstrations"""
    num_test_tasks: int | None = None
    """held-out tasks of the meta-test (unset: 200 on the point families, 40 elsewhere)"""
    num_eval_steps: int = 1
    """adaptation steps at meta-test; training has one"""
    eval_episodes: int | None = None
    """episodes per task before each adaptation step at meta-test (unset: episodes_per_task)"""
    deterministic_eval: bool = True
    """score with the mean action instead of sampled ones"""
    train_reward: Literal["dense", "sparse"] = "dense"
    """reward that training adapts to; a SAC expert always gets the dense one"""
    test_reward: Literal["dense", "sparse"] = "dense"
    """reward of the meta-test, dense or sparse"""
    gamma: float = 0.9
    """discount per step"""
    cuda: bool = False
    """compute on the GPU (these networks are small: the CPU is faster, a large --hidden-size aside)"""
    torch_deterministic: bool = True
    """use deterministic kernels only"""
    num_threads: int = 0
    """CPU threads of torch and of the simulator (0: all cores)"""
    eval_every: int = 1
    """iterations between meta-tests; none while the expert is trained"""
    checkpoint_every: int = 1
    """iterations between checkpoints"""
    resume: str = ""
    """folder of the run to go on with, from its last checkpoint"""
    evaluate: str = ""
    """folder of the run to meta-test, without training"""

    expert: Literal["sac", "scripted", "demos"] = "sac"
    """who is imitated: a SAC policy trained first, the family's expert_action, or the file of --demos"""
    demos: str = ""
    """.npz file of demonstrations, for --expert demos (docs/gmps.md)"""
    dagger: bool = True
    """let the expert label the states that adapted policies visit (there is nobody to ask with --expert demos)"""
    expert_timesteps: int = 8_000
    """environment steps that the SAC expert is trained on before the rounds"""
    expert_episodes: int = 5
    """episodes per training task: of an iteration of the SAC expert, of the demonstrations, and of DAgger in a round"""
    expert_noise: float = 0.3
    """standard deviation of the noise on the demonstrating expert's actions, of [-1, 1]; labels have none"""
    expert_gradient_steps: int = 400
    """gradient steps of the SAC expert per iteration"""
    expert_batch_size: int = 16
    """transitions per training task in a gradient step of the SAC expert"""
    expert_gamma: float = 0.9
    """discount per step of the SAC expert"""
    expert_learning_rate: float = 1e-3
    """step size of Adam for the SAC expert"""
    expert_reward_scale: float = 30.0
    """factor on the SAC expert's reward; the entropy has the weight 1"""
    tau: float = 0.01
    """share of the SAC expert's critics in their targets, per gradient step"""
    hidden_size: int = 64
    """units in each hidden layer of the policy and of the SAC expert"""
    bias_size: int = 4
    """parameters appended to the policy's input as constants"""
    init_std: float = 0.3
    """standard deviation of the actions before training, of [-1, 1]"""
    adapt: Literal["all", "bias", "none"] = "all"
    """parameters that the inner step changes: all, only those of bias_size, or none (behaviour cloning)"""
    inner_lr: float = 0.2
    """α before training, step size of the adaptation"""
    importance_clip: float = 1.5
    """c, importance weights are clipped to [1/c, c] (1: no weights, 0: no clipping)"""
    gae_lambda: float = 1.0
    """λ of generalised advantage estimation"""
    gradient_steps: int = 200
    """Adam steps per round"""
    batch_size: int = 100
    """labelled states per task in an Adam step"""
    learning_rate: float = 1e-3
    """step size of Adam for θ and α, in the first round"""
    learning_rate_decay: float = 0.75
    """factor on the step size for θ and α after every round"""
    dataset_size: int = 10_000
    """labelled states kept per training task, the oldest are overwritten"""


# -------------------------------------------------------------------------------------------------------- the networks


class Policy(nn.Module):
    """Two ReLU layers to mean and log std of the actions: obs (..., O) -> (..., 2A).

    They read observations in the units of the demonstrations, and the parameters `bias`, the same for all observations
    (the paper's bias transformation). The log std does not depend on the observation.
    """

    def __init__(self, obs_size: int, action_size: int, hidden_size: int, bias_size: int, init_std: float):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(bias_size))
        first, second = nn.Linear(obs_size + bias_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden_size, action_size))
        for layer in self.net[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.log_std = nn.Parameter(torch.full((action_size,), math.log(init_std)))
        self.register_buffer("obs_mean", torch.zeros(obs_size))
        self.register_buffer("obs_std", torch.ones(obs_size))

    @torch.no_grad()
    def measure(self, obs: torch.Tensor):
        """The mean and spread of obs (B, O), those of other ranks included, become the units of the input."""
        count = all_reduce(obs.new_tensor(len(obs)))
        self.obs_mean.copy_(all_reduce(obs.sum(0)) / count)
        std = (all_reduce((obs - self.obs_mean).square().sum(0)) / count).sqrt()
        self.obs_std.copy_(torch.where(std > 1e-3, std, 1))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        obs = ((obs - self.obs_mean) / self.obs_std).clamp(-10, 10)
        mean = self.net(torch.cat([obs, self.bias.expand(*obs.shape[:-1], -1)], -1))
        return torch.cat([mean, self.log_std.clamp(min=math.log(1e-6)).expand_as(mean)], -1)


# --------------------------------------------------------------------------------------------------------- the experts


class Expert(nn.Module):
    """(1) SAC that reads the true task beside the observation, for all training tasks at once.

    tasks: (all of them, task size), of which this rank owns M; its replay keeps their transitions, as rows of COLUMNS.
    """

    COLUMNS: ClassVar = ("obs", "actions", "rewards", "next_obs", "terminated")

    def __init__(self, tasks, obs_size, action_size, capacity, args):
        super().__init__()
        self.gamma, self.tau, hidden_size = args.expert_gamma, args.tau, args.hidden_size
        self.temperature = 1 / args.expert_reward_scale  # the same problem in small values, learned faster
        scale, self.num_tasks = tasks.std(0, correction=0), len(tasks)
        self.mean, self.scale, self.tasks = tasks.mean(0), torch.where(scale > 0, scale, 1), tasks[shard(len(tasks))]
        inputs, self.action_size = obs_size + tasks[0].numel(), action_size
        self.actor = MLP(inputs, hidden_size, 2 * action_size, last=1e-3)
        self.critics = MLP(inputs + action_size, hidden_size, 1, stack=2)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.to(tasks.device)
        adam = partial(torch.optim.Adam, lr=args.expert_learning_rate, fused=True)
        self.optimizers = {"critics": adam(self.critics.parameters()), "actor": adam(self.actor.parameters())}
        self.widths = [obs_size, action_size, 1, obs_size, 1]  # of COLUMNS
        self.replay = Replay(len(self.tasks), capacity, sum(self.widths), tasks.device)

    def act(self, obs, task, noise) -> tuple[torch.Tensor, ...]:
        """obs (..., O), task (..., task size), noise (..., A) -> action (..., A), its log-probability (...), …"""
        return tanh_gaussian(self.actor(self.inputs(obs, task)), noise)

    def mean_action(self, obs, task) -> torch.Tensor:
        return self.act(obs, task, obs.new_zeros(self.action_size))[0]

    def values(self, critics, obs, task, action) -> torch.Tensor:
        """What each of the twin critics says, (2, ...)."""
        x = self.inputs(obs, task, action)
        return critics(x.expand(2, *x.shape)).squeeze(-1)

    def inputs(self, obs, task, *more) -> torch.Tensor:
        return torch.cat([obs, ((task - self.mean) / self.scale).reshape(*obs.shape[:-1], -1), *more], -1)

    def step(self, batch, task, noise) -> torch.Tensor:
        """A gradient step; batch: the COLUMNS (M, B, ...), task (M, B, task size), noise (2, M, B, A)."""
        obs, actions, rewards, next_obs, terminated = batch
        with torch.no_grad():
            next_actions, next_logprobs, *_ = self.act(next_obs, task, noise[0])
            next_values = self.values(self.targets, next_obs, task, next_actions)
            rewards, terminated = rewards.squeeze(-1), terminated.squeeze(-1)
            y = soft_target(rewards, terminated, next_values, next_logprobs, self.gamma, self.temperature)
        qf_loss = (self.values(self.critics, obs, task, actions) - y).square().mean((1, 2)).sum()
        apply_gradient(self.optimizers["critics"], qf_loss)
        actions, logprobs, *_ = self.act(obs, task, noise[1])
        actor_loss = (self.temperature * logprobs - self.values(self.critics, obs, task, actions).amin(0)).mean()
        apply_gradient(self.optimizers["actor"], actor_loss)
        follow(self.targets, self.critics, self.tau)
        return torch.stack([qf_loss, actor_loss, -logprobs.mean()]).detach()

    def learn(self, num_steps, batch_size, generator) -> dict[str, float]:
        """num_steps gradient steps, each on batch_size transitions of every task; returns means of what they say."""
        ids, total = torch.arange(len(self.tasks), device=self.tasks.device), 0
        task = self.tasks.unsqueeze(1).expand(-1, batch_size, *self.tasks.shape[1:])
        for _ in range(num_steps):
            batch = self.replay.sample(ids, batch_size, generator).split(self.widths, -1)
            noise = torch.randn(2, self.num_tasks, batch_size, self.action_size, generator=generator, device=ids.device)
            total += self.step(batch, task, noise[:, shard(self.num_tasks)])
        means = (all_reduce(total) / num_steps / ranks()[1]).tolist()
        if not all(map(math.isfinite, means)):
            fail("the expert's loss is not finite: try a smaller --expert-learning-rate or reward")
        return dict(zip(("expert/qf_loss", "expert/actor_loss", "expert/entropy"), means, strict=True))

    def state(self) -> dict:
        moments = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"networks": self.state_dict(), "optimizers": moments, "replay": self.replay.state()}

    def load(self, state: dict):
        self.load_state_dict(state["networks"])
        self.replay.load(state["replay"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


def scripted_expert(envs):
    """The family's own expert: (obs (B, O), task (B, task size)) -> actions (B, A) in [-1, 1]."""
    if envs.env_id in ("PointRobot-v0", "SparsePointRobot-v0", "Navigation2D-v0"):
        return lambda obs, task: (task - obs) / 0.1  # straight to the goal
    method = getattr(envs.envs[0].unwrapped, "expert_action", None) if isinstance(envs, UserEnvs) else None
    if not callable(method):
        fail(f"--expert scripted: {envs.env_id} has no method expert_action(obs, task)")

    def act(obs, task):
        rows, size = zip(obs.cpu().numpy(), task.cpu().numpy(), strict=True), envs.single_action_space.shape[0]
        actions = [np.asarray(method(*row), float).ravel() for row in rows]
        if not all(action.shape == (size,) and np.isfinite(action).all() for action in actions):
            fail(f"{envs.env_id}: expert_action(obs, task) must return {size} finite numbers")
        return torch.as_tensor(np.stack(actions), dtype=obs.dtype, device=obs.device)

    return act


def label(batch, tasks, act) -> torch.Tensor:
    """What the expert does, a* (N, E, T, A), in the states of episodes (N, E, T, ...); act: (obs, tasks) -> actions."""
    valid, labels = batch["mask"] > 0, torch.zeros_like(batch["actions"])
    with torch.no_grad():
        labels[valid] = act(batch["obs"][valid], tasks[valid.nonzero()[:, 0]]).clamp(-1, 1)
    return labels


def load_demos(path: str, obs_size: int, action_size: int, task_shape: tuple) -> tuple[np.ndarray, ...]:
    """Tasks (M, task size) of a file of demonstrations, their rows of obs and action (M, B, O + A), and a mask (M, B).

    Ends the program if the file is not as docs/gmps.md says.
    """
    names = "observations", "actions", "task_index", "tasks"
    try:
        if not Path(path).is_file():
            raise FileNotFoundError  # a FIFO could keep us waiting for ever
        with np.load(path) as file:
            obs, actions, index, tasks = arrays = [file[name] for name in names]
    except Exception as error:  # a file of another kind raises almost anything
        fail(f"--demos {path}: no .npz file with the arrays {', '.join(names)} ({type(error).__name__})")
    steps, num_tasks = obs.shape[:1], tasks.shape[:1]
    shapes = (*steps, obs_size), (*steps, action_size), steps, (*num_tasks, *task_shape)
    for name, x, shape in zip(names, arrays, shapes, strict=True):
        if x.shape != shape or x.dtype.kind not in "biuf":
            fail(f"--demos {path}: {name} is {x.dtype} {x.shape}, not numbers of shape {shape}")
        if not np.isfinite(x).all():
            fail(f"--demos {path}: {name} is not finite in row {np.argwhere(~np.isfinite(x))[0][0]}")
    if np.abs(actions).max(initial=0) > 1 + 1e-6:
        fail(f"--demos {path}: actions reach {np.abs(actions).max():.4g} in absolute value; they must be in [-1, 1]")
    if not np.array_equal(np.unique(index), np.arange(len(tasks))):
        fail(f"--demos {path}: task_index must name every row of tasks, 0 to {len(tasks) - 1}, and no other")
    count = np.bincount(index.astype(int))
    mask = np.arange(count.max(initial=0)) < count[:, None]
    rows = np.zeros((*mask.shape, obs_size + action_size))
    rows[mask] = np.hstack([obs, actions])[np.argsort(index, kind="stable")]
    return tasks, rows, mask


# ------------------------------------------------------------------------------------------------------- the algorithm


def episodes(choose, tasks, rng, envs, horizon, device) -> dict[str, torch.Tensor]:
    """E episodes in each of N tasks, (N, E, T, ...) by name; choose: obs (N E, O), noise (N E, A) -> actions."""
    noise = rng.normal(size=(envs.total_lanes, horizon, *envs.single_action_space.shape))[envs.lanes]
    noise = torch.as_tensor(noise, dtype=torch.get_default_dtype(), device=device)
    lanes = np.repeat(tasks, envs.num_envs // len(tasks), axis=0)
    batch = torch.no_grad()(rollout)(envs, lambda obs, t: choose(obs, noise[:, t]), lanes, horizon, rng, device)
    return {name: x.unflatten(0, (len(tasks), -1)) for name, x in batch.items()}


def log_density(dist, actions) -> torch.Tensor:
    """log π(a|o), a sum over the action's dimensions: dist (..., 2A), actions (..., A) -> (...)."""
    mean, log_std = dist.chunk(2, -1)
    return (-0.5 * ((actions - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def collect(params, tasks, rng, envs, policy, horizon, gamma, gae_lambda, reward, deterministic=False) -> dict:
    """(3) E episodes in each of N tasks, in task i with the policy params[i], and their advantages.

    params: (N, ...) by name; tasks: (N, task size). Returns what rollout does, (N, E, T, ...), advantages and logprobs.
    """

    def distributions(obs):  # (N, ..., O) -> (N, ..., 2A)
        return vmap(lambda params, obs: functional_call(policy, params, (obs,)))(params, obs)

    def choose(obs, noise):
        mean, log_std = distributions(obs.unflatten(0, (len(tasks), -1))).flatten(0, 1).chunk(2, -1)
        return mean if deterministic else mean + log_std.exp() * noise

    batch = episodes(choose, tasks, rng, envs, horizon, params["bias"].device)
    batch["rewards"] = batch["sparse_reward" if reward == "sparse" else "rewards"]
    with torch.no_grad():
        batch["advantages"] = standardised_advantages(batch, gamma, gae_lambda)
        batch["logprobs"] = log_density(distributions(batch["obs"]), batch["actions"])
    return batch


def inner_step(theta, lr, batch, policy, importance_clip) -> tuple[dict, torch.Tensor]:
    """(5) φ = θ - α ∘ ∇L(θ) of one task, and its largest importance weight; lr: α by name, of the adapted parameters.

    L = -mean over the task's steps of w log π(a|o) A, w = π(a|o) / π_old(a|o) held constant and clipped to [1/c, c].
    """

    def loss(adapted):
        logprobs = log_density(functional_call(policy, theta | adapted, (batch["obs"],)), batch["actions"])
        difference = ((logprobs - batch["logprobs"]) * batch["mask"]).detach()  # exp of a padded step could be infinite
        bound = math.log(importance_clip) if importance_clip else math.inf
        weight = difference.clamp(-bound, bound).exp()
        return -masked_mean(weight * logprobs * batch["advantages"], batch["mask"]), difference.amax().exp()

    gradient, weight = grad(loss, has_aux=True)({name: theta[name] for name in lr})
    return theta | {name: theta[name] - lr[name] * gradient[name] for name in lr}, weight


def imitation_loss(theta, lr, batch, obs, labels, policy, importance_clip) -> tuple[torch.Tensor, torch.Tensor]:
    """(6) Mean of (μ_φi(o) - a*)² over tasks, states and the action's dimensions, and the largest weights, (N,).

    batch: (N, E, T, ...) by name, of (3); obs (N, B, O) and labels (N, B, A): drawn from the D_i.
    """

    def of_task(batch, obs):
        params, weight = inner_step(theta, lr, batch, policy, importance_clip)
        return functional_call(policy, params, (obs,)), weight

    chunk = None if obs.is_cuda else max(1, 8000 // batch["mask"][0].numel())  # tasks at a time that suit a CPU's cache
    dist, weights = vmap(of_task, chunk_size=chunk)(batch, obs)
    return (dist[..., : labels.shape[-1]] - labels).square().mean(), weights


def add_rows(store, ids, batch, columns):
    """Append episodes (N, E, T, ...) by name, of the tasks ids, to a replay: their columns as rows."""
    parts = [batch[name] if batch[name].ndim == 4 else batch[name].unsqueeze(-1) for name in columns]
    store.add(ids, torch.cat(parts, -1).flatten(1, 2), batch["mask"].flatten(1, 2))


@torch.no_grad()
def evaluate(theta, lr, tasks, collect, adapt, group, num_steps, seed, deterministic) -> dict:
    """(7) Meta-test on tasks (M, task size): the scores before and after each of num_steps adaptation steps.

    collect and adapt: collect and inner_step with their settings; group: the tasks that collect's lanes hold at once.
    Returns {"return": (num_steps + 1, M), ...}, means over a task's episodes. Draws depend on seed and group alone, so
    that every call meets the same episodes. Only sampled episodes are adapted to; deterministic ones are extra.
    """
    scores = {}
    for first in range(0, len(tasks), group):
        members = (first + np.arange(group))[shard(group)]  # the last group wraps around
        params = {name: p.expand(len(members), *p.shape) for name, p in theta.items()}
        for k in range(num_steps + 1):
            play = partial(collect, params, tasks[members % len(tasks)], keyed_rng(seed, "eval", first, k))
            batch = play()
            for name, score in episode_scores(play(deterministic=True) if deterministic else batch).items():
                scores.setdefault(name, score.new_zeros(num_steps + 1, len(tasks) + group))[k, members] = score
            if k < num_steps:
                params, _ = vmap(lambda params, batch: adapt(params, lr, batch))(params, batch)
    return gather_scores(scores, len(tasks))


def main(args: Args) -> dict[str, float]:
    """Train, resume or only evaluate; returns the last value of every eval/* and charts/* tag."""
    device = setup(args)
    checkpoint = load_checkpoint(args.resume or args.evaluate, Args) if args.resume or args.evaluate else {}
    iteration, global_step = checkpoint.get("iteration", 0), checkpoint.get("global_step", 0)
    if args.resume and global_step >= args.total_timesteps:
        show(f"{args.resume} is complete; its meta-test:")
        args = replace(args, resume="", evaluate=args.resume)
    n, num_tasks, own = args.meta_batch_size, args.num_train_tasks, shard(args.num_train_tasks)
    if num_tasks < n:
        fail(f"--num-train-tasks {num_tasks}: less than --meta-batch-size {n}, and every task needs an expert")
    if num_tasks % ranks()[1]:
        fail(f"--num-train-tasks {num_tasks}: not divisible by the {ranks()[1]} ranks")
    if 0 < args.importance_clip < 1:
        fail(f"--importance-clip {args.importance_clip}: must be 0, or 1 or more")
    if bool(args.demos) != (args.expert == "demos"):
        fail("--expert demos and --demos FILE go together")

    # tasks, and environments with a lane per episode; each rank has its share of the tasks and lanes
    def make(lanes):
        return make_envs(args.env_id, lanes, args.num_threads, shard(lanes))

    num_eval_episodes = args.eval_episodes or args.episodes_per_task
    envs = make(n * args.episodes_per_task)
    if isinstance(envs.single_action_space, gym.spaces.Discrete):
        fail(f"{args.env_id} has Discrete actions; gmps.py needs Box")
    eval_envs = envs if num_eval_episodes == args.episodes_per_task else make(n * num_eval_episodes)
    horizon = args.horizon or envs.horizon or fail(f"{args.env_id} has no time limit of its own: give --horizon")
    obs_size, action_size = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    num_test_tasks = args.num_test_tasks or (200 if args.env_id in POINT_FAMILIES else 40)
    test_tasks = envs.sample_test_tasks(num_test_tasks, np.random.default_rng([args.task_seed, 1]))
    train_tasks = envs.sample_tasks(num_tasks, np.random.default_rng([args.task_seed, 0]))
    if "sparse" in (args.train_reward, args.test_reward):
        require_sparse_reward(envs, test_tasks[:1])
    at_once = 0 if args.demos else args.expert_episodes * horizon  # labelled states of a task
    if checkpoint:
        train_tasks = checkpoint["tasks"].numpy()
    elif args.demos:
        train_tasks, rows, mask = load_demos(args.demos, obs_size, action_size, train_tasks.shape[1:])
        at_once = mask.shape[1]
        if len(train_tasks) != num_tasks:
            fail(f"--num-train-tasks {num_tasks}: {args.demos} has demonstrations of {len(train_tasks)} tasks")
    steps = num_tasks * args.expert_episodes * horizon  # at most, of one batch of the expert's episodes
    least = {"sac": args.expert_timesteps + 2 * steps, "scripted": steps + 1, "demos": 1}[args.expert]
    if args.total_timesteps < least:
        fail(f"--total-timesteps {args.total_timesteps}: the expert can use them up, give {least} or more")
    if args.dataset_size < at_once:
        fail(f"--dataset-size {args.dataset_size}: less than the {at_once} states of a task that are added at once")

    # meta-parameters: θ, and α for each of those that the inner step changes
    policy = Policy(obs_size, action_size, args.hidden_size, args.bias_size, args.init_std).to(device)
    policy.load_state_dict(checkpoint.get("units", {}), strict=False)
    meta = {name: p.detach() for name, p in policy.named_parameters()}
    adapted = {"all": list(meta), "bias": ["bias"], "none": []}[args.adapt]
    meta |= {f"lr.{name}": torch.full_like(meta[name], args.inner_lr) for name in adapted}
    meta = {name: p.to(device).requires_grad_() for name, p in (checkpoint["meta"] if checkpoint else meta).items()}
    theta = {name: p for name, p in meta.items() if not name.startswith("lr.")}
    lr = {name: meta[f"lr.{name}"] for name in adapted}

    # the functions above with this run's settings
    sampling = {"policy": policy, "horizon": horizon, "gamma": args.gamma, "gae_lambda": args.gae_lambda}
    collect_train = partial(collect, reward=args.train_reward, **sampling)
    collect_test = partial(collect, envs=eval_envs, reward=args.test_reward, **sampling)
    inner = {"policy": policy, "importance_clip": args.importance_clip}
    testing = partial(inner_step, **inner), n, args.num_eval_steps, args.seed, args.deterministic_eval
    meta_test = partial(evaluate, theta, lr, test_tasks, collect_test, *testing)
    if args.evaluate:
        return report(meta_test(), test_tasks, num_eval_episodes, printed=True)

    # the expert, and the D_i of this rank's tasks
    tensor = partial(torch.as_tensor, dtype=torch.get_default_dtype(), device=device)
    optimizer = torch.optim.Adam(meta.values(), lr=args.learning_rate, fused=True)
    ids, own_tasks = torch.arange(own.stop - own.start, device=device), tensor(train_tasks)[own]
    data = Replay(len(ids), args.dataset_size, obs_size + action_size, device)
    if args.expert == "sac":
        capacity = math.ceil(args.expert_timesteps / num_tasks) + at_once
        sac = Expert(tensor(train_tasks), obs_size, action_size, capacity, args)
    if args.expert != "demos":
        act = sac.mean_action if args.expert == "sac" else scripted_expert(envs)
        lane_tasks = own_tasks.repeat_interleave(args.expert_episodes, 0)
        expert_envs = make(num_tasks * args.expert_episodes)
        dagger_envs = make(n * args.expert_episodes) if n < num_tasks else expert_envs
        demonstrate = partial(episodes, tasks=train_tasks[own], envs=expert_envs, horizon=horizon, device=device)
    elif not checkpoint:
        data.add(ids, tensor(rows[own]), tensor(mask[own]))
        policy.measure(data.rows[data.filled(), :obs_size])
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        data.load(checkpoint["data"])
    if checkpoint and args.expert == "sac":
        sac.load(checkpoint["sac"])

    def state():
        saved = {"meta": {name: p.detach() for name, p in meta.items()}, "optimizer": optimizer.state_dict()}
        saved |= {"units": dict(policy.named_buffers()), "tasks": torch.from_numpy(train_tasks), "data": data.state()}
        return saved | ({"sac": sac.state()} if args.expert == "sac" else {})

    with closing(Run(args, global_step)) as run:
        while global_step < args.total_timesteps and not run.stopping():
            iteration, start, metrics = iteration + 1, time.perf_counter(), {}
            rng, generator = partial(keyed_rng, args.seed, "train", iteration), torch.Generator(device)
            generator.manual_seed(int(keyed_rng(args.seed, "update", iteration).integers(2**63)))
            demonstrated = bool(data.count.any())

            # (1) collect with the expert, and train it
            if not demonstrated and args.expert == "sac":
                batch = demonstrate(lambda obs, noise: sac.act(obs, lane_tasks, noise)[0], rng=rng(0))
                add_rows(sac.replay, ids, batch, sac.COLUMNS)
                global_step += int(all_reduce(batch["mask"].sum()))
                metrics["expert/return"], collected = task_mean(episode_scores(batch)["return"]), time.perf_counter()
                metrics |= sac.learn(args.expert_gradient_steps, args.expert_batch_size, generator)

            # (2) demonstrations
            if not demonstrated and (args.expert != "sac" or global_step >= args.expert_timesteps):
                batch = demonstrate(lambda obs, noise: act(obs, lane_tasks) + args.expert_noise * noise, rng=rng(1))
                batch["labels"], collected = label(batch, own_tasks, act), time.perf_counter()
                add_rows(data, ids, batch, ["obs", "labels"])
                policy.measure(data.rows[data.filled(), :obs_size])
                if args.expert == "sac":
                    sac.replay.count.zero_()  # no longer needed, nor saved
                global_step += int(all_reduce(batch["mask"].sum()))
                metrics["expert/demonstration_return"] = task_mean(episode_scores(batch)["return"])

            # (3) a batch of episodes in one of each num_tasks / n neighbouring tasks, in turn. Where a pass over
            # them begins is drawn: families deal their modes in turn, too, and a round is to hold them all
            if demonstrated:
                firsts = np.arange(n + 1) * num_tasks // n
                draw = keyed_rng(args.seed, "tasks", iteration * n // num_tasks)
                begin = draw.integers(firsts[:-1], firsts[1:])
                picked = (firsts[:-1] + (begin + iteration) % np.diff(firsts))[shard(n)]
                tasks, picked = train_tasks[picked], torch.as_tensor(picked - own.start, device=device)
                params = {name: p.detach().expand(len(tasks), *p.shape) for name, p in theta.items()}
                batch, collected = collect_train(params, tasks, rng(2), envs), time.perf_counter()
                global_step += int(all_reduce(batch["mask"].sum()))
                metrics["charts/pre_adaptation_return"] = task_mean(episode_scores(batch)["return"])
                if args.dagger and args.expert != "demos":  # (4) DAgger
                    params, _ = torch.no_grad()(vmap(partial(inner_step, theta, lr, **inner)))(batch)
                    visited, collected = collect_train(params, tasks, rng(3), dagger_envs), time.perf_counter()
                    visited["labels"] = label(visited, tensor(tasks), act)
                    add_rows(data, picked, visited, ["obs", "labels"])
                    global_step += int(all_reduce(visited["mask"].sum()))
                    metrics["charts/episodic_return"] = task_mean(episode_scores(visited)["return"])
                    metrics["charts/episodic_length"] = task_mean(visited["mask"].sum(-1))

                loss, weight = 0, torch.zeros(len(tasks), device=device)
                for _ in range(args.gradient_steps):  # (5), (6) many steps on this one batch
                    obs, labels = data.sample(picked, args.batch_size, generator).split([obs_size, action_size], -1)
                    imitation, weights = imitation_loss(theta, lr, batch, obs, labels, **inner)
                    apply_gradient(optimizer, imitation)
                    loss, weight = loss + imitation.detach(), torch.maximum(weight, weights)
                optimizer.param_groups[0]["lr"] *= args.learning_rate_decay
                metrics["losses/imitation"] = task_mean(loss / args.gradient_steps)
                metrics["losses/importance_weight"] = join(weight).amax().item()  # of all ranks
                metrics["losses/action_std"] = theta["log_std"].exp().mean().item()
                if not math.isfinite(metrics["losses/imitation"]):
                    fail("the imitation loss is not finite: try a smaller --inner-lr or --learning-rate")
            updated = time.perf_counter()
            metrics |= {"time/collect": collected - start, "time/update": updated - collected}

            # log, (7) meta-test, save
            if global_step >= args.total_timesteps or (demonstrated and iteration % args.eval_every == 0):
                scores = meta_test()
                metrics |= report(scores, test_tasks, num_eval_episodes) | {"time/eval": time.perf_counter() - updated}
            run.log(metrics, global_step)
            if iteration % args.checkpoint_every == 0:
                run.save(**state(), iteration=iteration, global_step=global_step)

        run.save(**state(), iteration=iteration, global_step=global_step)
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
# >>> shared: sac


class MLP(nn.Module):
    """Three hidden ReLU layers of `hidden` units; with `stack`, that many networks at once, each with its own weights.

    (..., inputs) -> (..., outputs), with a stack (stack, ..., inputs) -> (stack, ..., outputs). Initialised as in the
    code of PEARL: uniform within 1 / sqrt(hidden), biases 0.1, the last layer uniform within `last`.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, stack: int = 1, last: float = 3e-3):
        super().__init__()
        sizes = [inputs, hidden, hidden, hidden, outputs]
        bounds = [hidden**-0.5] * 3 + [last]
        weights = [torch.empty(stack, *sizes[i : i + 2]).uniform_(-bounds[i], bounds[i]) for i in range(4)]
        biases = [torch.full((stack, 1, hidden), 0.1) for _ in range(3)]
        biases.append(torch.empty(stack, 1, outputs).uniform_(-last, last))
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, x = x.shape[:-1], x.reshape(len(self.weights[0]), -1, x.shape[-1])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = x.relu_() if i < 3 else x
        return x.view(*shape, -1)


def tanh_gaussian(dist: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tanh of a Gaussian draw: dist (..., 2A), its mean and log std, and normal noise (..., A) -> action (..., A),
    its log-probability (...), mean and log std (..., A).
    """
    mean, log_std = dist.chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    raw = mean + log_std.exp() * noise
    log_slope = 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh²)
    logprob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - log_slope
    return raw.tanh(), logprob.sum(-1), mean, log_std


def soft_target(rewards, terminated, next_values, next_logprob, gamma: float, temperature: float = 1.0) -> torch.Tensor:
    """r + γ (min Q'(s', a') - temperature log π(a'|s')), only r at a terminal state; next_values (2, ...)."""
    return rewards + gamma * (1 - terminated) * (next_values.amin(0) - temperature * next_logprob)


def apply_gradient(optimizer: torch.optim.Optimizer, loss: torch.Tensor):
    """One step of the optimizer along the gradient of the loss in its parameters, the mean over the ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = torch.autograd.grad(loss, parameters)
    if ranks()[1] > 1:
        vector = all_reduce(torch.cat([g.flatten() for g in gradients])) / ranks()[1]
        gradients = [
            g.view_as(p) for g, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    optimizer.step()


@torch.no_grad()
def follow(targets: nn.Module, networks: nn.Module, tau: float):
    """targets ← (1 - τ) targets + τ networks."""
    torch._foreach_lerp_([*targets.parameters()], [*networks.parameters()], tau)


class Replay:
    """Per task the last `capacity` transitions, each a row of `width` numbers, in one tensor on the device."""

    def __init__(self, num_tasks: int, capacity: int, width: int, device: torch.device):
        self.capacity, self.bytes = capacity, num_tasks * capacity * width * torch.get_default_dtype().itemsize
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free
        if self.bytes > free:
            size = f"{num_tasks} tasks x {capacity} steps need {self.bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB"
            fail(f"the replay does not fit, {size}: give a smaller --replay-size (gmps.py: --dataset-size)")
        self.rows = torch.zeros(num_tasks * capacity, width, device=device)
        self.count = torch.zeros(num_tasks, dtype=torch.long, device=device)  # rows ever added

    def add(self, ids: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor):
        """Append rows (N, B, W) where mask (N, B) is 1 to the tasks ids (N,)."""
        position = self.count[ids].unsqueeze(1) + mask.long().cumsum(1) - 1
        self.rows[self.index(ids, position)[mask > 0]] = rows[mask > 0]
        self.count[ids] += mask.long().sum(1)

    def index(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return ids.unsqueeze(1) * self.capacity + position % self.capacity

    def gather(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Rows (N, B, W) of the tasks ids (N,), numbered (N, B) from the first that was ever added."""
        return self.rows[self.index(ids, position)]

    def sample(self, ids: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
        """n rows of each of this rank's tasks ids, with replacement: (N, n, W); ranks share what one would draw."""
        everyone, size = len(ids) * ranks()[1], self.count[ids].clamp(max=self.capacity).unsqueeze(1)
        draws = torch.rand(everyone, n, generator=generator, device=ids.device, dtype=torch.float64)[shard(everyone)]
        return self.gather(ids, (draws * size).long())

    def state(self) -> dict[str, torch.Tensor]:
        """The filled rows and the counts, of all ranks on rank 0."""
        return {"rows": join(self.rows[self.filled()]), "count": join(self.count)}

    def load(self, state: dict[str, torch.Tensor]):
        own = shard(len(state["count"]))
        size = state["count"].clamp(max=self.capacity)
        first = [int(size[:stop].sum()) for stop in (own.start, own.stop)]
        self.count.copy_(state["count"][own])
        self.rows[self.filled()] = state["rows"][slice(*first)].to(self.rows)

    def filled(self) -> torch.Tensor:
        size = self.count.clamp(max=self.capacity).unsqueeze(1)
        return (torch.arange(self.capacity, device=size.device) < size).flatten()


def join(x: torch.Tensor) -> torch.Tensor:
    """x of all ranks, one after the other, on the CPU of rank 0."""
    x, (rank, size) = x.cpu(), ranks()
    if size == 1:
        return x
    parts = [None] * size if rank == 0 else None
    torch.distributed.gather_object(x, parts)
    return torch.cat(parts) if parts else x


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

if __name__ == "__main__":
    main(parse(Args))

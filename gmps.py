# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium>=1.1", "numpy>=1.26.4", "tyro>=1.0.9",
#                 "tensorboard>=2.17.1", "tqdm>=4.66"]
# ///
"""GMPS: Guided Meta-Policy Search.
Mendonca, Gupta, Kralev, Abbeel, Levine and Finn, NeurIPS 2019, arXiv 1904.00956.

Meta-learns, like MAML, initial parameters θ of a policy from which a policy-gradient step adapts to
a new task. But the meta-objective is supervised: the adapted policy is to do in each training task
what an expert of this task does. It can be optimised off-policy, many gradient steps on one batch
of episodes. Only training has experts. First they act:

(1) Train the expert: one SAC policy that sees the true task, on the dense reward of all training
    tasks. Or take a scripted expert, or a file of demonstrations.
(2) Demonstrations: in every training task i the expert acts, with some noise. Its states and
    actions a* are D_i. The policy reads observations in the units (mean, spread) of these states.

Then, round by round:

(3) Collect E episodes in N training tasks with the policy of θ. Per task: fit a linear baseline,
    estimate advantages A (GAE) and standardise them.
(4) DAgger: collect episodes with the policies φ_i, adapted as in (5), and add their states to D_i
    with the expert's actions.
(5) Adapt: one policy-gradient step per task on (3), φ_i = θ - α ∘ ∇L_i(θ), with a step size for
    each parameter. L_i is the mean of -w A log π_θ(a|o); the importance weight
    w = π_θ(a|o) / π_old(a|o), a constant, clipped, is 1 before (6).
(6) Hundreds of Adam steps on θ and α, through (5), on the mean of (μ_φi(o) - a*)² over states drawn
    from these tasks' D_i. The means of θ and α over the steps are what the next round begins with.
(7) Meta-test: (3) and (5) on held-out tasks, where nothing but the reward tells the task.

Train:     python gmps.py
Resume:    python gmps.py --resume runs/NAME
Evaluate:  python gmps.py --evaluate runs/NAME

Differs from the paper in clipped importance weights, the policy's size and input, minibatches of
D_i, half of the tasks in a round, DAgger's place in it, step sizes that fall, and the means in (6).
The whole list: docs/gmps.md.
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
from torch.distributions import Categorical, Independent, Normal
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# fmt: off
@dataclass(unsafe_hash=True)
class Args:
    exp_name: str = "gmps"  # name of the experiment, part of the run's folder
    env_id: str = "SparsePointRobot-v0"  # task family: one of the suite (docs/tasks.md), or module:Id-v0 for your own
    seed: int = 1  # seed of the initial parameters, episodes and draws from the data
    task_seed: int = 0  # seed of the task draws: training and held-out tasks depend on nothing else
    total_timesteps: int = 50_000  # environment steps of training, those of the expert included
    meta_batch_size: int = 10  # N, tasks per round
    episodes_per_task: int = 20  # E, episodes per task in a round, to adapt to
    horizon: int = 0  # T, steps per episode at most (0: the family's own)
    num_train_tasks: int = 20  # size of the set of training tasks; each has its own demonstrations
    num_test_tasks: int | None = None  # held-out tasks of the meta-test (unset: 200 on points, 40 elsewhere)
    num_eval_steps: int = 1  # adaptation steps at meta-test; training has one
    eval_episodes: int | None = None  # episodes per task before each of them (unset: episodes_per_task)
    deterministic_eval: bool = True  # score with the mean action instead of sampled ones
    train_reward: Literal["dense", "sparse"] = "dense"  # what training adapts to; SAC experts get the dense one
    test_reward: Literal["dense", "sparse"] = "dense"  # reward of the meta-test
    gamma: float = 0.9  # discount per step
    cuda: bool = False  # compute on the GPU, and keep the tasks there if they can be
    cudagraphs: bool = True  # with --cuda: replay what repeats as CUDA graphs (the same numbers, sooner)
    tf32: bool = False  # with --cuda: matrix products in TF32
    torch_deterministic: bool = True  # use deterministic kernels only
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT and WANDB_ENTITY say where
    num_threads: int = 0  # CPU threads of torch and of the simulator (0: all cores)
    eval_every: int = 1  # iterations between meta-tests; none while the expert is trained
    checkpoint_every: int = 1  # iterations between checkpoints
    resume: str = ""  # folder of the run to go on with, from its last checkpoint
    evaluate: str = ""  # folder of the run to meta-test, without training

    expert: Literal["sac", "scripted", "demos"] = "sac"  # a SAC policy, the family's expert_action, or --demos
    demos: str = ""  # .npz file of demonstrations, for --expert demos (docs/gmps.md)
    dagger: bool = True  # the expert labels what adapted policies visit (with --expert demos there is none to ask)
    expert_timesteps: int = 8_000  # environment steps that the SAC expert is trained on before the rounds
    expert_episodes: int = 5  # episodes per task: of an iteration of SAC, of the demonstrations, of DAgger in a round
    expert_noise: float = 0.3  # std of the noise on a demonstrating expert's actions, of [-1, 1]; labels have none
    expert_gradient_steps: int = 400  # gradient steps of the SAC expert per iteration
    expert_batch_size: int = 16  # transitions per training task in a gradient step of the SAC expert
    expert_gamma: float = 0.9  # discount per step of the SAC expert
    expert_learning_rate: float = 1e-3  # step size of Adam for the SAC expert
    expert_reward_scale: float = 6.0  # factor on the SAC expert's reward, of measured unit; the entropy has weight 1
    tau: float = 0.01  # share of the SAC expert's critics in their targets, per gradient step
    hidden_size: int = 64  # units in each hidden layer of the policy and of the SAC expert
    bias_size: int = 4  # parameters appended to the policy's input as constants
    init_std: float = 0.3  # standard deviation of the actions before training, of [-1, 1]
    adapt: Literal["all", "bias", "none"] = "all"  # what the inner step changes; none is behaviour cloning
    inner_lr: float = 0.2  # α before training, step size of the adaptation
    importance_clip: float = 1.5  # c, importance weights are clipped to [1/c, c] (1: no weights)
    gae_lambda: float = 1.0  # λ of generalised advantage estimation
    theta_weight: float = 0.0  # weight of the same loss with θ itself, so that its episodes come near what pays
    gradient_steps: int = 200  # Adam steps per round
    batch_size: int = 100  # labelled states per task in an Adam step
    learning_rate: float = 1e-3  # step size of Adam for θ and α, in the first round
    averaged_share: float = 0.9  # a round's θ and α are their means over this share of its Adam steps (0: the last)
    learning_rate_decay: float = 0.75  # factor on the step size for θ and α after every round
    dataset_size: int = 10_000  # labelled states kept per training task, the oldest are overwritten

    may_be_zero: ClassVar[set] = {"seed", "task_seed", "horizon", "num_threads", "num_eval_steps", "gae_lambda",
                                  "expert_noise", "bias_size", "theta_weight",
                                  "averaged_share"}
    at_most_one: ClassVar[set] = {"gamma", "gae_lambda", "expert_gamma", "tau", "averaged_share"}
    gone: ClassVar[dict] = {"--expert-round-steps": "it paid on one family of three (docs/gmps.md)"}
# fmt: on


# ------------------------------------------------------------------------------------- the policy


class Policy(nn.Module):
    """Two ReLU layers to mean and log std of the actions: obs (..., O) -> (..., 2A).

    They read observations in the units of the demonstrations, and the parameters `bias`, the same
    for all observations (the paper's bias transformation). The log std is one for all of them.
    `adapted` names the parts of θ that the inner step changes; `step_sizes` are their α.
    """

    def __init__(self, obs_size: int, action_size: int, args: Args):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(args.bias_size))
        self.net = nn.Sequential(
            nn.Linear(obs_size + args.bias_size, args.hidden_size),
            nn.ReLU(),
            nn.Linear(args.hidden_size, args.hidden_size),
            nn.ReLU(),
            nn.Linear(args.hidden_size, action_size),
        )
        for layer in self.net[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.log_std = nn.Parameter(torch.full((action_size,), math.log(args.init_std)))
        theta = dict(self.named_parameters())
        self.adapted = {"all": [*theta], "bias": ["bias"], "none": []}[args.adapt]
        step_sizes = [torch.full_like(theta[name], args.inner_lr) for name in self.adapted]
        self.step_sizes = nn.ParameterList(step_sizes)
        self.units = Units(obs_size)  # those of the demonstrations

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        mean = self.net(torch.cat([self.units(obs), self.bias.expand(*obs.shape[:-1], -1)], -1))
        log_std = self.log_std.clamp(min=math.log(1e-6))  # the original's floor
        return torch.cat([mean, log_std.expand_as(mean)], -1)

    def split(self) -> tuple[dict, dict]:
        """The meta-parameters: θ by name, and α of the adapted ones by name."""
        parameters = self.named_parameters()
        theta = {name: p for name, p in parameters if not name.startswith("step_sizes.")}
        return theta, dict(zip(self.adapted, self.step_sizes, strict=True))

    def at(self, params, obs) -> torch.Tensor:
        """forward with params, by name."""
        return functional_call(self, params, (obs,), tie_weights=False)  # none are tied

    def each(self, params, obs) -> torch.Tensor:
        """forward of N policies at once: params (N, ...) by name, obs (N, ..., O)."""
        return vmap(self.at)(params, obs)

    def act(self, params, obs, noise) -> torch.Tensor:
        """rollout's callback: actions (N, E, A) of params (N, ...) on obs (N, E, O)."""
        return draw_actions(self.each(params, obs), noise)


# ---------------------------------------------------------------------------------- the algorithm


@torch.no_grad()
def collect(params, tasks, key, policy, args, test=False, deterministic=False) -> dict:
    """(3) E episodes in each of N tasks, in task i with the policy params[i], and their advantages.

    params: (N, ...) by name; tasks: (N, K); key: of the draws. Returns the batch of rollout with
    the rewards of training or of the test, advantages and the actions' logprobs, (N, E, T).
    """
    episodes = args.eval_episodes if test else args.episodes_per_task
    batch = rollout(policy.act, params, tasks, episodes, key, args, deterministic)
    batch["rewards"] = batch[f"{args.test_reward if test else args.train_reward}_rewards"]
    batch["advantages"] = standardised_advantages(batch, args)
    dist_params = policy.each(params, batch["obs"])
    batch["logprobs"] = distribution(dist_params).log_prob(batch["actions"])
    return batch


def inner_loss(params, batch, policy, args) -> torch.Tensor:
    """L of one task, batch without its task axis: -mean over the task's steps of w log π(a|o) A.

    w = π(a|o) / π_old(a|o), held constant and clipped to [1/c, c].
    """
    dist_params = policy.at(params, batch["obs"])
    weight = probability_ratio(dist_params, batch).detach()
    weight = weight.clamp(1 / args.importance_clip, args.importance_clip)
    objective = weight * distribution(dist_params).log_prob(batch["actions"])
    return -masked_mean(objective * batch["advantages"], batch["mask"])


def inner_step(params, batch, step_sizes, policy, args) -> dict:
    """(5) φ = θ - α ∘ ∇L(θ) for one task; step_sizes: α by name, of the adapted parameters."""
    adapted = {name: params[name] for name in step_sizes}
    grads = grad(lambda some: inner_loss(params | some, batch, policy, args))(adapted)
    return params | {name: p - step_sizes[name] * grads[name] for name, p in adapted.items()}


def inner_steps(params, batch, step_sizes, policy, args) -> dict:
    """(5) for N tasks at once: params and batch have a leading axis."""
    step = partial(inner_step, step_sizes=step_sizes, policy=policy, args=args)
    return vmap(step)(params, batch)


def imitation_loss(theta, step_sizes, batch, states, labels, policy, args) -> torch.Tensor:
    """(6) Mean of (μ_φi(o) - a*)² over tasks, states and the action's dimensions, and theta_weight
    times that of μ_θ.

    batch: (N, E, T, ...) by name, of (3); states (N, B, O) and labels (N, B, A) are of the D_i.
    """

    def of_task(batch, states):
        return policy.at(inner_step(theta, batch, step_sizes, policy, args), states)

    together = vmap(of_task, chunk_size=tasks_at_once(batch["obs"]))
    means, _ = together(batch, states).chunk(2, -1)
    loss = (means - labels).square().mean()
    if args.theta_weight:
        means, _ = policy.at(theta, states).chunk(2, -1)
        loss = loss + args.theta_weight * (means - labels).square().mean()
    return loss


def imitation_step(ids, batch, optimizer, data, policy, generator, args) -> torch.Tensor:
    """(6) An Adam step on θ and α, on states drawn from the D_i of the tasks ids (N,); its loss."""
    states, labels = data.sample(ids, args.batch_size, generator)
    theta, step_sizes = policy.split()
    loss = imitation_loss(theta, step_sizes, batch, states, labels, policy, args)
    apply_gradient(optimizer, loss)
    return loss.detach()


def pick_tasks(n: int, num_tasks: int, run, args) -> np.ndarray:
    """The tasks of a round, n of a rank's num_tasks.

    They are cut into n runs of neighbours, as families deal their modes in turn; of each run a
    round takes one, the next one every time. A pass is num_tasks / n rounds; where each run begins
    is drawn anew for every pass.
    """
    firsts = np.arange(n + 1) * num_tasks // n
    rank = [run.rank] if run.rank else []  # as in run.key
    rng = keyed_rng(args.seed, "tasks", run.iteration * n // num_tasks, *rank)
    begin = rng.integers(firsts[:-1], firsts[1:])
    return firsts[:-1] + (begin + run.iteration) % np.diff(firsts)


def imitation_round(optimizer, data, policy, run, args) -> dict[str, float]:
    """(3)-(6) Collect, let the expert label more states, and imitate it; returns what to log."""
    n = args.meta_batch_size // run.num_ranks
    picked = pick_tasks(n, len(data.tasks), run, args)
    tasks = data.tasks[picked]
    ids = data.ids[picked]
    theta, step_sizes = policy.split()

    # (3) a batch of episodes
    params = {name: p.detach().expand(n, *p.shape) for name, p in theta.items()}
    batch = collect(params, tasks, run.key("train", 2), policy, args)  # 0 and 1: the expert's
    run.global_step += num_steps([batch])
    metrics = {"charts/pre_adaptation_return": task_mean(episode_scores(batch)["return"])}

    # (4) DAgger, where there is somebody to ask
    if args.dagger and data.act:
        with torch.no_grad():
            params = graphed(inner_steps, args)(params, batch, step_sizes, policy, args)
        fewer = replace(args, episodes_per_task=args.expert_episodes)
        visited = collect(params, tasks, run.key("train", 3), policy, fewer)
        run.global_step += num_steps([visited])
        data.add(ids, visited)
        metrics |= charts([batch, visited])
    run.lap("collect")

    # (5), (6) Adam steps, all on this one batch
    names = ("obs", "actions", "mask", "advantages", "logprobs")
    batch = {name: batch[name] for name in names}
    generator = keyed_generator(args, *run.key("update"))
    step = graphed(imitation_step, args)
    total = 0
    averaged = max(1, round(args.averaged_share * args.gradient_steps))  # the last so many
    parameters = [p.detach() for p in policy.parameters()]
    means = [torch.zeros_like(p) for p in parameters]
    for k in range(args.gradient_steps):
        total += step(ids, batch, optimizer, data, policy, generator, args)
        if k >= args.gradient_steps - averaged:
            torch._foreach_add_(means, parameters, alpha=1 / averaged)
    torch._foreach_copy_(parameters, means)  # what the next round begins with
    optimizer.param_groups[0]["lr"].mul_(args.learning_rate_decay)

    metrics["losses/imitation"] = task_mean(total / args.gradient_steps)
    metrics["losses/action_std"] = theta["log_std"].exp().mean().item()
    with torch.no_grad():
        ratio = probability_ratio(policy.at(theta, batch["obs"]), batch) * batch["mask"]
    metrics["losses/importance_weight"] = task_mean(ratio.flatten(1).amax(1))
    if not math.isfinite(metrics["losses/imitation"]):
        fail("the imitation loss is not finite: try a smaller --inner-lr or --learning-rate")
    run.lap("update")
    return metrics


@torch.no_grad()
def evaluate(tasks, policy, args) -> tuple[dict, dict]:
    """(7) Meta-test on tasks (M, K): scores before and after each of num_eval_steps adaptations.

    Returns {"return": (num_eval_steps + 1, M), ...}, means over a task's episodes, and the first
    tasks' episodes. Every meta-test makes the same draws. Only sampled episodes are adapted to;
    those of --deterministic-eval are extra.
    """
    theta, step_sizes = policy.split()
    scores = [[] for _ in range(args.num_eval_steps + 1)]
    episodes = {}
    for first in progress(range(0, len(tasks), args.meta_batch_size), args):
        # the last group is filled up from the first tasks: one shape for all
        group = tasks[np.arange(first, first + args.meta_batch_size) % len(tasks)]
        params = {name: p.expand(len(group), *p.shape) for name, p in theta.items()}
        for k in range(args.num_eval_steps + 1):
            play = partial(collect, params, group, ("eval", first, k), policy, args, test=True)
            batch = play()
            extra = play(deterministic=True) if args.deterministic_eval else None
            scores[k].append(episode_scores(batch, extra))
            if first == 0:
                episodes[f"obs_{k}"] = batch["obs"]
            if k < args.num_eval_steps:
                params = graphed(inner_steps, args)(params, batch, step_sizes, policy, args)
    return stack_scores(scores, len(tasks)), episodes


def main(args: Args) -> dict[str, float]:
    """Train, resume or only evaluate; returns the last value of every eval/* and charts/* tag."""
    args, device, checkpoint = setup(args)
    envs, train_tasks, test_tasks = make_tasks(args)
    check_flags(envs, args)
    obs_size = envs.single_observation_space.shape[0]
    action_size = envs.single_action_space.shape[0]

    # meta-parameters, θ and α
    policy = Policy(obs_size, action_size, args).to(device)
    policy.load_state_dict(restore(policy.state_dict(), checkpoint.get("policy")))
    if args.evaluate:
        scores, episodes = evaluate(test_tasks, policy, args)
        return report(scores, test_tasks, args, episodes)

    # the expert, and the D_i of this rank's tasks
    if checkpoint:
        train_tasks = checkpoint["tasks"].numpy()
    elif args.demos:
        train_tasks, rows, mask = load_demos(obs_size, action_size, train_tasks.shape[1:], args)
    saved = checkpoint.get("optimizer")
    optimizer = adam(policy.parameters(), args.learning_rate, args, saved)
    sac, data = make_expert(envs, train_tasks, args, checkpoint.get("sac"))
    if args.demos and not checkpoint:
        data.fill(rows, mask)
        policy.units.measure(data.states())

    with Run(args, checkpoint) as run:
        if checkpoint:
            own = run.own(checkpoint)
            data.replay.load(own["data"])
            if sac:
                sac.replay.load(own["sac"])
        while run.next_iteration():
            demonstrated = bool(data.replay.count.any())
            if demonstrated:
                # (3)-(6) a round
                metrics = imitation_round(optimizer, data, policy, run, args)
            else:
                # (1), (2) the expert and its demonstrations, at the end of this file
                metrics = expert_iteration(sac, data, policy, run, args)

            # log, (7) meta-test, save
            if demonstrated and run.due(args.eval_every):
                scores, episodes = evaluate(test_tasks, policy, args)
                metrics |= report(scores, test_tasks, args)
                run.lap("eval")
            run.log(metrics)
            if run.saving():
                own = {"data": data.replay.state()}
                state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
                state["tasks"] = torch.from_numpy(train_tasks)
                if sac:
                    own["sac"] = sac.replay.state()
                    state["sac"] = sac.state_dict()
                run.save(own=own, **state)
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
# (1), (2) The experts and what they demonstrate, which only this script has.
# ==================================================================================================


def expert_iteration(sac, data, policy, run, args) -> dict[str, float]:
    """(1) Train the SAC expert, if that is who is imitated; (2) in the end, or at once, let the
    expert demonstrate. Returns what to log.
    """
    episodes = args.expert_episodes
    metrics = {}

    # (1) episodes in all tasks, and gradient steps
    if sac:
        batch = rollout(
            sac.act, data.tasks_on_device, data.tasks, episodes, run.key("train", 0), args
        )
        run.global_step += num_steps([batch])
        rows, mask = to_rows(batch, sac.columns)
        sac.replay.add(data.ids, rows, mask)
        metrics["expert/return"] = task_mean(episode_scores(batch)["return"])
        run.lap("collect")
        if run.iteration == 1:
            sac.networks.reward_unit.copy_(reward_unit(sac.replay, sac.columns))
        metrics |= sac.learn(data.tasks_on_device, run.key("update"), args)
        run.lap("update")

    # (2) demonstrations
    if not sac or run.global_step >= args.expert_timesteps:
        # a graph would be replayed but once, and cannot hold a user's expert, which is on the host
        once = replace(args, cudagraphs=False)
        batch = rollout(
            data.noisy_act, data.tasks_on_device, data.tasks, episodes, run.key("train", 1), once
        )
        run.global_step += num_steps([batch])
        if run.complete:
            used_up = f"the expert has used up {run.global_step}, give more"
            fail(f"--total-timesteps {args.total_timesteps}: {used_up}")
        data.add(data.ids, batch)
        policy.units.measure(data.states())
        metrics["expert/demonstration_return"] = task_mean(episode_scores(batch)["return"])
        run.lap("collect")
        if sac:
            sac.replay.count.zero_()  # no longer needed, nor saved
    return metrics


class SacExpert:
    """(1) SAC that is given the true task, in units, for all training tasks at once.

    tasks: (all of them, K); a rank keeps the transitions of its own M, as rows of columns. saved:
    the state_dict of a checkpoint.
    """

    def __init__(self, tasks, obs_size: int, action_size: int, args: Args, saved=None):
        self.mean = tasks.mean(0)
        scale = tasks.std(0, correction=0)
        self.scale = torch.where(scale > 0, scale, 1)
        networks = SoftActorCritic(obs_size, action_size, tasks[0].numel(), args.hidden_size)
        networks.register_buffer("reward_unit", torch.ones(()))
        self.networks = networks.to(tasks.device)
        saved = saved or {"networks": None, "optimizers": {}}
        networks.load_state_dict(restore(networks.state_dict(), saved["networks"]))
        self.optimizers = {}
        for name in ("critics", "actor"):
            parameters = getattr(networks, name).parameters()
            moments = saved["optimizers"].get(name)
            self.optimizers[name] = adam(parameters, args.expert_learning_rate, args, moments)
        self.columns = {"obs": obs_size, "actions": action_size, "dense_rewards": 1}
        self.columns |= {"next_obs": obs_size, "terminated": 1}
        own = len(tasks) // ranks()[1]
        capacity = math.ceil(args.expert_timesteps / len(tasks))
        capacity += args.expert_episodes * min(args.horizon, LONG)  # of what goes beyond
        width = sum(self.columns.values())
        self.replay = Replay(own, capacity, width, tasks.device, "--expert-timesteps")

    def units(self, tasks) -> torch.Tensor:
        """What the networks are given: tasks (B, K) less their mean, over their spread."""
        return ((tasks - self.mean) / self.scale).flatten(1)

    def act(self, tasks, obs, noise) -> torch.Tensor:
        """rollout's callback: tasks (M, K), obs (M, E, O), normal noise (M, E, A) -> (M, E, A)."""
        given = self.units(tasks).unsqueeze(1).expand(-1, obs.shape[1], -1)
        return self.networks.act(obs, given, noise)[0]

    def mean_actions(self, obs, tasks) -> torch.Tensor:
        """obs (B, O), tasks (B, K) -> (B, A)."""
        noise = obs.new_zeros(len(obs), self.columns["actions"])
        return self.networks.act(obs, self.units(tasks), noise)[0]

    def step(self, tasks, generator, args) -> torch.Tensor:
        """A gradient step on a batch of every own task (M, K); its losses, and the entropy."""
        ids = torch.arange(len(tasks), device=tasks.device)
        rows = self.replay.sample(ids, args.expert_batch_size, generator)
        batch = from_rows(rows, self.columns)
        given = self.units(tasks).unsqueeze(1).expand(-1, args.expert_batch_size, -1)
        shape = (2, *batch["actions"].shape)
        noise = torch.randn(shape, generator=generator, device=tasks.device)
        # the same problem as with rewards times the scale, in small values, is learned faster
        temperature = 1 / args.expert_reward_scale
        gamma, scale = args.expert_gamma, 1 / self.networks.reward_unit
        qf_loss, _ = self.networks.critic_loss(batch, given, noise[0], gamma, scale, temperature)
        apply_gradient(self.optimizers["critics"], qf_loss)
        actor_loss, logprob = self.networks.actor_loss(batch, given, noise[1], 0, temperature)
        apply_gradient(self.optimizers["actor"], actor_loss)
        self.networks.update_targets(args.tau)
        return torch.stack([qf_loss, actor_loss, -logprob]).detach()

    def learn(self, tasks, key, args) -> dict[str, float]:
        """Gradient steps; returns the means of what they say. key: of the draws."""
        generator = keyed_generator(args, *key)
        step = graphed(SacExpert.step, args)
        times = args.expert_gradient_steps
        total = sum(step(self, tasks, generator, args) for _ in range(times))
        means = (all_reduce(total / times) / ranks()[1]).tolist()
        if not all(map(math.isfinite, means)):
            fail("the expert's loss is not finite: try a smaller --expert-learning-rate or reward")
        names = ("expert/qf_loss", "expert/actor_loss", "expert/entropy")
        return dict(zip(names, means, strict=True))

    def state_dict(self) -> dict:
        """What changes, and is the same on all ranks; a graph asks for it too."""
        moments = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"networks": self.networks.state_dict(), "optimizers": moments}


def scripted_expert(envs):
    """The family's own: (obs (B, O), tasks (B, K)) -> actions (B, A) in [-1, 1]."""
    if getattr(envs, "env_id", "") in ("PointRobot-v0", "SparsePointRobot-v0", "Navigation2D-v0"):
        return lambda obs, tasks: (tasks - obs) / 0.1  # straight to the goal
    owner = envs.envs[0].unwrapped if isinstance(envs, UserEnvs) else envs
    name = getattr(envs, "env_id", type(envs).__name__)
    if not callable(getattr(owner, "expert_action", None)):
        fail(f"--expert scripted: {name} has no method expert_action(obs, task)")
    shape = envs.single_action_space.shape

    def act(obs, tasks):
        pairs = zip(obs.cpu().numpy(), tasks.cpu().numpy(), strict=True)
        actions = [np.asarray(owner.expert_action(*pair), float).ravel() for pair in pairs]
        if not all(action.shape == shape and np.isfinite(action).all() for action in actions):
            fail(f"{name}: expert_action(obs, task) must return {shape[0]} finite numbers")
        return torch.as_tensor(np.stack(actions), dtype=obs.dtype, device=obs.device)

    return act


def make_expert(envs, train_tasks: np.ndarray, args: Args, saved: dict | None = None) -> tuple:
    """The SAC expert, if that is who is imitated, and the D_i, empty; tasks (all of them, K).

    saved: the SAC expert's state_dict of a checkpoint.
    """
    sizes = (envs.single_observation_space.shape[0], envs.single_action_space.shape[0])
    dtype = torch.get_default_dtype()
    on_device = torch.as_tensor(train_tasks, dtype=dtype, device=device_of(args))
    sac = act = None
    if args.expert == "sac":
        sac = SacExpert(on_device, *sizes, args, saved)
        act = sac.mean_actions
    if args.expert == "scripted":
        act = scripted_expert(envs)
    return sac, Demonstrations(train_tasks, on_device, act, sizes, args)


class Demonstrations:
    """(2) D_i of this rank's M training tasks: states, and what the expert does there, a*.

    tasks: (all of them, K); on_device: the same there. act: (obs (B, O), tasks (B, K)) ->
    actions (B, A), or None where there is nobody to ask.
    """

    def __init__(self, tasks: np.ndarray, on_device: torch.Tensor, act, sizes: tuple, args: Args):
        rank, num_ranks = ranks()
        self.own = np.array_split(np.arange(len(tasks)), num_ranks)[rank]
        self.tasks = tasks[self.own]
        self.tasks_on_device = on_device[self.own]
        self.ids = torch.arange(len(self.own), device=on_device.device)
        self.act = act
        self.noise = args.expert_noise
        self.columns = dict(zip(("obs", "labels"), sizes, strict=True))
        size = args.dataset_size
        self.replay = Replay(len(self.own), size, sum(sizes), on_device.device, "--dataset-size")

    def fill(self, rows: np.ndarray, mask: np.ndarray):
        """Keep what load_demos returns."""
        device = self.tasks_on_device.device
        rows = torch.as_tensor(rows[self.own], dtype=self.tasks_on_device.dtype, device=device)
        self.replay.add(self.ids, rows, torch.as_tensor(mask[self.own], device=device))

    def noisy_act(self, tasks, obs, noise) -> torch.Tensor:
        """rollout's callback: tasks (M, K), obs (M, E, O), normal noise (M, E, A) -> (M, E, A)."""
        lanes = tasks.repeat_interleave(obs.shape[1], 0)
        actions = self.act(obs.flatten(0, 1), lanes).unflatten(0, obs.shape[:2])
        return actions + self.noise * noise

    @torch.no_grad()
    def add(self, ids: torch.Tensor, batch: dict):
        """Label the states of episodes (N, E, T, ...) of the tasks ids (N,), and keep them."""
        valid = batch["mask"] > 0
        labels = torch.zeros_like(batch["actions"])
        tasks = self.tasks_on_device[ids][valid.nonzero()[:, 0]]
        labels[valid] = self.act(batch["obs"][valid], tasks).clamp(-1, 1)
        rows, mask = to_rows(batch | {"labels": labels}, self.columns)
        self.replay.add(ids, rows, mask)

    def sample(self, ids: torch.Tensor, n: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """States (N, n, O) of the tasks ids (N,), and labels (N, n, A)."""
        return self.replay.sample(ids, n, generator).split([*self.columns.values()], -1)

    def states(self) -> torch.Tensor:
        """All of them, (B, O)."""
        return self.replay.rows[self.replay.filled(), : self.columns["obs"]]


def load_demos(obs_size: int, action_size: int, task_shape: tuple, args: Args) -> tuple:
    """The file --demos: tasks (M, K), rows of obs and action (M, B, O + A), and their mask (M, B).

    Ends the program if the file is not as docs/gmps.md says.
    """
    path = args.demos
    names = ("observations", "actions", "task_index", "tasks")
    try:
        if not Path(path).is_file():
            raise FileNotFoundError  # a FIFO could keep us waiting for ever
        with np.load(path) as file:
            arrays = {name: file[name] for name in names}
    except Exception as error:  # a file of another kind raises almost anything
        lacking = f"no .npz file with the arrays {', '.join(names)}"
        fail(f"--demos {path}: {lacking} ({type(error).__name__})")
    obs, actions, index, tasks = arrays.values()
    steps = obs.shape[:1]
    shapes = [(*steps, obs_size), (*steps, action_size), steps, (*tasks.shape[:1], *task_shape)]
    for (name, x), shape in zip(arrays.items(), shapes, strict=True):
        if x.shape != shape or x.dtype.kind not in "biuf":
            fail(f"--demos {path}: {name} is {x.dtype} {x.shape}, not numbers of shape {shape}")
        if not np.isfinite(x).all():
            row = np.argwhere(~np.isfinite(x))[0][0]
            fail(f"--demos {path}: {name} is not finite in row {row}")
    largest = np.abs(actions).max(initial=0)
    if largest > 1 + 1e-6:
        allowed = "in absolute value; they must be in [-1, 1]"
        fail(f"--demos {path}: actions reach {largest:.4g} {allowed}")
    if not np.array_equal(np.unique(index), np.arange(len(tasks))):
        every = f"every row of tasks, 0 to {len(tasks) - 1}, and no other"
        fail(f"--demos {path}: task_index must name {every}")
    count = np.bincount(index.astype(int))
    mask = np.arange(count.max(initial=0)) < count[:, None]
    if len(tasks) != args.num_train_tasks:
        found = f"{path} has demonstrations of {len(tasks)} tasks"
        fail(f"--num-train-tasks {args.num_train_tasks}: {found}")
    if mask.shape[1] > args.dataset_size:
        fail(f"--dataset-size {args.dataset_size}: {path} has a task of {mask.shape[1]} states")
    rows = np.zeros((*mask.shape, obs_size + action_size))
    rows[mask] = np.hstack([obs, actions])[np.argsort(index, kind="stable")]
    return tasks, rows, mask


def check_flags(envs, args):
    """End the program if flags exclude each other, or leave no steps for a round."""
    if isinstance(envs.single_action_space, gym.spaces.Discrete):
        fail(f"{args.env_id} has Discrete actions; gmps.py needs Box")
    if args.num_train_tasks < args.meta_batch_size:
        few = f"less than --meta-batch-size {args.meta_batch_size}, and every task needs an expert"
        fail(f"--num-train-tasks {args.num_train_tasks}: {few}")
    if args.num_train_tasks % ranks()[1]:
        fail(f"--num-train-tasks {args.num_train_tasks}: not divisible by the {ranks()[1]} ranks")
    if args.importance_clip < 1:
        fail(f"--importance-clip {args.importance_clip}: must be 1 or more")
    if bool(args.demos) != (args.expert == "demos"):
        fail("--expert demos and --demos FILE go together")
    episodes = args.expert_episodes * min(args.horizon, LONG)  # steps in a task at once
    steps = min(args.num_train_tasks * episodes, args.expert_timesteps)
    least = args.expert_timesteps + 2 * steps
    if args.expert == "sac" and args.total_timesteps < least and not args.evaluate:
        used_up = f"the expert can use them up, give {least} or more"
        fail(f"--total-timesteps {args.total_timesteps}: {used_up}")
    if args.dataset_size < episodes and not (args.demos or args.evaluate):
        few = f"less than the {episodes} states of a task that are added at once"
        fail(f"--dataset-size {args.dataset_size}: {few}")


main = guarded()(main)

if __name__ == "__main__":
    main(parse(Args))

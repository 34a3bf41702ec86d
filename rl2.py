# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium>=1.1", "numpy>=1.26.4", "tyro>=1.0.9",
#                 "tensorboard>=2.17.1", "tqdm>=4.66"]
# ///
"""RL²: Fast Reinforcement Learning via Slow Reinforcement Learning.
Duan, Schulman, Chen, Bartlett, Sutskever and Abbeel, 2016, arXiv 1611.02779; and, independently,
Learning to reinforcement learn, Wang et al., 2016, arXiv 1611.05763.

Trains a recurrent policy on trials: E episodes in a row of one task, through which its hidden state
h is carried. As it sees what its last action brought, it can learn about the task within the trial:
h adapts, and the weights are the learning algorithm. Each iteration:

(1) Draw a meta-batch of N tasks from the training distribution.
(2) Play a trial in each. The policy sees (o_t, a_{t-1}, r_{t-1}, d_{t-1}), where d = 1 if the last
    step ended an episode (on bandits every step). h is 0 at the start of the trial only.
(3) Estimate advantages A (GAE) on the trial as one sequence: rewards of later episodes count,
    discounted, for the actions of earlier ones. Only the end of the trial is terminal.
(4) For a minibatch of trials: run the network over each from h = 0.
(5) Step (Adam) on the loss of PPO: clipped surrogate, value error, entropy; its gradient goes back
    through whole trials. Repeat (4) and (5).
(6) Meta-test: trials on held-out tasks with fixed weights, the return of episode 1, 2, ….

Train:     python rl2.py
Resume:    python rl2.py --resume runs/NAME
Evaluate:  python rl2.py --evaluate runs/NAME

Differs from the paper in: PPO (the paper: TRPO), a smaller recurrent net, which policy and value
share (on TabularMDP-v0 with a layer before it and one after it), and a first iteration that only
measures the units of observations, rewards and values; those of rewards follow later. The whole
list: docs/rl2.md.
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
from torch.distributions import Categorical, Independent, Normal
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# fmt: off
@dataclass(unsafe_hash=True)
class Args:
    exp_name: str = "rl2"  # name of the experiment, part of the run's folder
    env_id: str = "Bandit5Arms10-v0"  # Bandit{k}Arms{n}-v0, TabularMDP-v0, one of docs/tasks.md, or module:Id-v0
    seed: int = 1  # seed of the initial parameters, episodes and action noise
    task_seed: int = 0  # seed of the task draws: training and held-out tasks depend on nothing else
    total_timesteps: int = 10_000_000  # environment steps of training, meta-test excluded
    meta_batch_size: int | None = None  # N, trials per iteration (unset: bandits 1000, TabularMDP-v0 500, else 100)
    episodes_per_task: int | None = None  # E, episodes of a trial (unset: bandits 1, TabularMDP-v0 10, else 2)
    horizon: int = 0  # steps per episode at most (0: the family's own)
    num_train_tasks: int = 0  # size of a fixed set of training tasks (0: fresh draws in every iteration)
    num_test_tasks: int | None = None  # held-out tasks of the meta-test (unset: bandits, TabularMDP-v0 20,000, else 40)
    num_eval_steps: int | None = None  # parts of a meta-test's trial, less one (unset: E // eval_episodes parts)
    eval_episodes: int = 1  # episodes of such a part, whose mean return is its score
    deterministic_eval: bool = False  # play the meta-test's trials with the most likely or mean action, throughout
    train_reward: Literal["dense", "sparse"] = "dense"  # reward of meta-training
    test_reward: Literal["dense", "sparse"] = "dense"  # reward of the meta-test
    gamma: float = 0.99  # discount per step
    cuda: bool = False  # compute on the GPU, and keep the tasks there if they can be
    cudagraphs: bool = True  # with --cuda: replay what repeats as CUDA graphs (the same numbers, sooner)
    tf32: bool = True  # with --cuda: matrix products in TF32
    torch_deterministic: bool = True  # use deterministic kernels only
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT and WANDB_ENTITY say where
    num_threads: int = 0  # CPU threads of torch and of the simulator (0: all cores)
    eval_every: int = 100  # iterations between meta-tests
    checkpoint_every: int = 10  # iterations between checkpoints
    resume: str = ""  # folder of the run to go on with, from its last checkpoint
    evaluate: str = ""  # folder of the run to meta-test, without training

    hidden_size: int = 64  # units of the recurrent layer
    embedding_size: int | None = None  # units of layers before and after it (0: none; unset: TabularMDP-v0 128, else 0)
    init_std: float = 1.0  # standard deviation of the actions before training, of [-1, 1]
    separate_value: bool = False  # a recurrent layer of its own for the value (better on HalfCheetahVel-v0, and slower)
    gae_lambda: float | None = None  # λ of GAE (unset: bandits and TabularMDP-v0 the paper's 0.3, else 0.95)
    learning_rate: float = 2e-3  # step size of Adam
    update_epochs: int = 4  # passes over an iteration's trials
    num_minibatches: int = 8  # minibatches, of whole trials, per pass
    clip_coef: float = 0.2  # ε: ratios are clipped to 1 ± ε where that lowers the surrogate
    ent_coef: float = 0.01  # weight of the entropy, which is maximised
    anneal: bool = False  # let learning_rate and ent_coef fall linearly, to 0 at total_timesteps
    vf_coef: float = 0.5  # weight of the value error
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm

    may_be_zero: ClassVar[set] = {"seed", "task_seed", "horizon", "num_train_tasks", "num_threads", "num_eval_steps",
                                  "embedding_size", "gae_lambda", "ent_coef"}
    at_most_one: ClassVar[set] = {"gamma", "gae_lambda"}
# fmt: on


# ------------------------------------------------------------------------------------ the network


class Memory(nn.Module):
    """A GRU: inputs (N, S, X), state before them (1, N, H) -> features (N, S, F), state after them.

    F = H, or embedding_size: a ReLU layer before the GRU, and one after it, which sees inputs too.
    """

    def __init__(self, input_size: int, args: Args):
        super().__init__()
        size = args.embedding_size
        self.gru = nn.GRU(size or input_size, args.hidden_size, batch_first=True)
        self.embedding = None
        if size:
            self.embedding = nn.Sequential(nn.Linear(input_size, size), nn.ReLU())
            self.reader = nn.Sequential(nn.Linear(args.hidden_size + input_size, size), nn.ReLU())

    def initialise(self, mean_square: int, trial_length: int):
        """Weights that let inputs into the state, and keep it there; mean_square: of |input|.

        The inputs' share of each gate has variance 1, with an embedding 2. The units' memories
        reach from one step to trial_length (Tallec and Ollivier 2018, arXiv 1804.11188).
        """
        if self.embedding:  # its outputs have a mean square of 2
            nn.init.normal_(self.embedding[0].weight, std=2 * mean_square**-0.5)
            mean_square = self.gru.input_size
        nn.init.normal_(self.gru.weight_ih_l0, std=mean_square**-0.5)
        for gate in self.gru.weight_hh_l0.detach().chunk(3):
            nn.init.orthogonal_(gate)
        nn.init.zeros_(self.gru.bias_ih_l0)
        nn.init.zeros_(self.gru.bias_hh_l0)
        m = torch.linspace(1, max(1, trial_length - 1), self.gru.hidden_size)  # steps remembered
        self.gru.bias_hh_l0.detach().chunk(3)[1].copy_(m.log())  # update gate: keeps m / (m + 1)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor):
        if not self.embedding:
            return self.gru(inputs, state)
        features, state = self.gru(self.embedding(inputs), state)
        return self.reader(torch.cat([features, inputs], -1)), state


class Agent(nn.Module):
    """A recurrent net with a linear policy and value on top; with --separate-value two such nets.

    An input, of X numbers, is o_t and the feedback of the last step: a_{t-1}, r_{t-1}, d_{t-1}, and
    for an embedding o_{t-1} too. The state is (1, N, H), of two nets (2, N, H). dist_params are,
    Box: mean and log std, D = 2A, the log std independent of the input; Discrete: n logits.
    """

    def __init__(self, obs_size: int, action_space: gym.Space, trial_length: int, args: Args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_size = int(action_space.n) if self.discrete else action_space.shape[0]
        self.last_obs_size = obs_size if args.embedding_size else 0  # of o_{t-1}
        self.feedback_size = self.action_size + 2 + self.last_obs_size
        input_size = obs_size + self.feedback_size
        nets = [Memory(input_size, args) for _ in range(1 + args.separate_value)]
        self.memories = nn.ModuleList(nets)  # the policy's, and the value's if it has its own
        self.actor = nn.Linear(args.embedding_size or args.hidden_size, self.action_size)
        self.critic = nn.Linear(args.embedding_size or args.hidden_size, 1)
        mean_square = input_size - (self.action_size - 1 if self.discrete else 0)  # one-hot: 1
        for memory in self.memories:
            memory.initialise(mean_square, trial_length)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.zeros_(self.actor.bias)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((self.action_size,), math.log(args.init_std)))
        # main measures these; until then observations and rewards are 0 in an input, as std is inf
        self.obs_units = Units(obs_size)
        self.reward_units = Units()
        self.value_units = Units()
        self.value_units.std.fill_(1)

    def initial_state(self, n: int) -> torch.Tensor:
        return self.critic.weight.new_zeros(len(self.memories), n, self.memories[0].gru.hidden_size)

    def feedback(self, inputs, actions, rewards, episode_over) -> torch.Tensor:
        """(2) What the next input tells of this step: a (one-hot, or clipped), r, d, perhaps o."""
        if self.discrete:
            choices = torch.arange(self.action_size, device=actions.device)
            actions = (actions.unsqueeze(1) == choices).to(rewards)
        rewards = self.reward_units(rewards)
        obs = inputs[:, : self.last_obs_size]  # an input begins with it
        return torch.cat([actions.clamp(-1, 1), rewards[:, None], episode_over[:, None], obs], -1)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor):
        """inputs (N, S, X), state before -> dist_params (N, S, D), values (N, S), state after."""
        pairs = [memory(inputs, h) for memory, h in zip(self.memories, state.split(1), strict=True)]
        features, after = zip(*pairs, strict=True)
        values = self.critic(features[-1]).squeeze(-1)
        values = values * self.value_units.std + self.value_units.mean
        dist_params = self.actor(features[0])
        if not self.discrete:
            dist_params = torch.cat([dist_params, self.log_std.expand_as(dist_params)], -1)
        return dist_params, values, torch.cat(after)


# ---------------------------------------------------------------------------------- the algorithm


def act(agent, carry, obs, noise) -> tuple[dict, torch.Tensor]:
    """A step of the policy in all lanes, and the network's state after it.

    carry: the state before (1, N, H), and feedback of the last step (N, F); noise (N, A).
    """
    state, feedback = carry
    inputs = torch.cat([agent.obs_units(obs), feedback], -1)  # (2) o_t, a_{t-1}, r_{t-1}, d_{t-1}
    dist_params, values, state = agent(inputs.unsqueeze(1), state)
    actions = draw_actions(dist_params[:, 0], noise, agent.discrete)
    logprobs = distribution(dist_params[:, 0], agent.discrete).log_prob(actions)
    step = {"obs": obs, "inputs": inputs, "actions": actions}
    return step | {"logprobs": logprobs, "values": values[:, 0]}, state


def remember(agent, carry, state, step, alive, episode_over) -> tuple:
    """carry before the next step, also of a new episode; a lane that waits keeps what it had."""
    state_before, feedback_before = carry
    feedback = agent.feedback(step["inputs"], step["actions"], step["rewards"], episode_over)
    alive = alive.unsqueeze(1)
    return torch.where(alive, state, state_before), torch.where(alive, feedback, feedback_before)


@torch.no_grad()
def collect(agent, tasks, key, args, test=False, deterministic=False) -> tuple[dict, dict]:
    """(2) A trial in each of N tasks (N, K). Returns a batch, S being the longest, and scores:

    obs               (N, S, O)  as they are
    inputs            (N, S, X)  of the network: observations and rewards in units
    actions           (N, S, A)  as chosen, unclipped; (N, S) if Discrete
    logprobs, values  (N, S)     of the policy that acted
    rewards, mask     (N, S)     as they are; 1 up to the trial's end
    return, success   (N, E)     scores of the episodes; success at any step, if tasks report it
    """
    n = len(tasks)
    episodes = (args.num_eval_steps + 1) * args.eval_episodes if test else args.episodes_per_task
    reward = args.test_reward if test else args.train_reward
    generator = keyed_generator(args, *key)
    state = agent.initial_state(n)
    carry = state, state.new_zeros(n, agent.feedback_size)
    on_device = make_envs(args.env_id, n).on_device
    placed = torch.as_tensor(tasks).to(state) if on_device else tasks  # once, not for every episode
    played = []
    for _ in range(episodes):
        carry, rows = play_episode(agent, carry, placed, generator, reward, deterministic, args)
        played.append(rows)

    batch = join_blocks(played)
    scores = trial_scores(batch, [rows["mask"].shape[1] for rows in played])
    names = ("obs", "inputs", "actions", "logprobs", "values", "rewards", "mask")
    return without_waiting({name: batch[name] for name in names}, args), scores


def ppo_loss(agent, batch, count, ent_coef, args) -> tuple[torch.Tensor, dict]:
    """The loss, and its parts to log: sums over a minibatch's steps, divided by count."""
    # (4) the network over whole trials, from h = 0
    dist_params, values, _ = agent(batch["inputs"], agent.initial_state(len(batch["mask"])))
    policy = distribution(dist_params, agent.discrete)

    # (5) PPO
    logratio = (policy.log_prob(batch["actions"]) - batch["logprobs"]) * batch["mask"]
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    gain = torch.min(ratio * batch["advantages"], clipped * batch["advantages"])

    def mean(x):
        return (x * batch["mask"]).sum() / count

    pg_loss = -mean(gain)
    value_loss = mean(0.5 * ((values - batch["returns"]) / agent.value_units.std) ** 2)
    entropy = mean(policy.entropy())
    loss = pg_loss + args.vf_coef * value_loss - ent_coef * entropy
    parts = {"pg_loss": pg_loss, "value_loss": value_loss, "entropy": entropy}
    parts["approx_kl"] = mean(ratio - 1 - logratio)  # Schulman's estimate
    parts["clipfrac"] = mean((ratio - 1).abs() > args.clip_coef)
    return loss, {f"losses/{name}": part.detach() for name, part in parts.items()}


def ppo_steps(agent, optimizer, batch, orders, ent_coef, args) -> tuple[dict, torch.Tensor]:
    """(4), (5) A step of Adam per minibatch of trials; orders (epochs, N) permute a rank's trials.

    Sums are over all ranks. Returns the means of the loss's parts, and the sum of the gradients'
    norms.
    """
    logged = []
    norms = 0
    for order in orders:
        for trials in order.tensor_split(args.num_minibatches):
            minibatch = {name: x[trials] for name, x in batch.items()}
            count = all_reduce(minibatch["mask"].sum())
            loss, parts = ppo_loss(agent, minibatch, count, ent_coef, args)
            optimizer.zero_grad()
            loss.backward()
            for p in agent.parameters():
                p.grad = all_reduce(p.grad)
            norms += nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            logged.append(parts)
    means = {name: all_reduce(torch.stack([x[name] for x in logged]).mean()) for name in logged[0]}
    return means, norms


def update(agent, optimizer, batch, key, remaining, args) -> dict[str, float]:
    """(4), (5) PPO; remaining: factor on step size and weight of the entropy. Returns losses/*."""
    generator = keyed_generator(args, *key)
    device = generator.device
    draw = partial(torch.randperm, len(batch["mask"]), generator=generator, device=device)
    orders = torch.stack([draw() for _ in range(args.update_epochs)])
    optimizer.param_groups[0]["lr"].fill_(remaining * args.learning_rate)
    ent_coef = torch.full((), remaining * args.ent_coef, device=device)  # graphs take no numbers
    used = ("inputs", "actions", "logprobs", "advantages", "returns", "mask")
    batch = {name: batch[name] for name in used}
    means, norms = graphed(ppo_steps, args)(agent, optimizer, batch, orders, ent_coef, args)
    if not norms.isfinite():
        fail("the gradient is not finite: try a smaller --learning-rate")
    return {name: mean.item() for name, mean in means.items()}


def follow(units, rewards, mask):
    """If rewards (N, S) have left the units by a std, move those a tenth of the way to theirs.

    Training raises rewards, and in units far below them they could not be told apart.
    """
    mean, std = spread(rewards, mask)
    share = 0.1 * ((mean - units.mean).abs() > units.std)
    units.mean.lerp_(mean, share)
    units.std.lerp_(std, share)


def evaluate(agent, tasks, args) -> tuple[dict, dict]:
    """(6) Meta-test on tasks (M, K): a trial in each, in num_eval_steps + 1 equal parts.

    Returns {"return": (num_eval_steps + 1, M), ...}, means over a part's episodes, trial_return,
    improvement and regret (M,) of whole trials; and the first tasks' trials. Every meta-test makes
    the same draws.
    """
    parts = args.num_eval_steps + 1
    scores = [[] for _ in range(parts)]  # of each part, by groups of tasks
    for first in progress(range(0, len(tasks), args.meta_batch_size), args):
        # the last group is filled up from the first tasks: one shape for all
        group = tasks[np.arange(first, first + args.meta_batch_size) % len(tasks)]
        play = partial(collect, agent, group, ("eval", first), args, test=True)
        batch, played = play(deterministic=args.deterministic_eval)
        if first == 0:
            trials = batch
        if args.deterministic_eval:
            played |= {f"sampled_{name}": x for name, x in play()[1].items()}
        for k in range(parts):
            scores[k].append({name: x.chunk(parts, 1)[k].mean(1) for name, x in played.items()})
    return with_trials(stack_scores(scores, len(tasks)), tasks, args), trials


def main(args: Args) -> dict[str, float]:
    """Train, resume or only evaluate; returns the last value of every eval/* and charts/* tag."""
    args, device, checkpoint = setup(args, with_defaults)
    check_flags(args)
    register_own(args.env_id)
    envs, train_tasks, test_tasks = make_tasks(args)

    obs_size = envs.single_observation_space.shape[0]
    trial_length = args.horizon * args.episodes_per_task
    agent = Agent(obs_size, envs.single_action_space, trial_length, args).to(device)
    agent.load_state_dict(restore(agent.state_dict(), checkpoint.get("agent")))
    saved = checkpoint.get("optimizer")
    optimizer = adam(agent.parameters(), args.learning_rate, args, saved, eps=1e-5)  # CleanRL's

    if args.evaluate:
        scores, episodes = evaluate(agent, test_tasks, args)
        return report(scores, test_tasks, args, episodes)

    with Run(args, checkpoint) as run:
        while run.next_iteration():
            # (1) tasks
            tasks = meta_batch(envs, train_tasks, args, run.iteration)

            # (2) trials
            batch, played = collect(agent, tasks, run.key("train"), args)
            run.lap("collect")

            losses = {}
            if run.iteration == 1:  # no update yet: its trials only set the units
                returns = discounted_sum(batch["rewards"], args.gamma)
                agent.obs_units.measure(batch["obs"], batch["mask"])
                agent.reward_units.measure(batch["rewards"], batch["mask"])
                agent.value_units.measure(returns, batch["mask"])
            else:
                # (3) advantages over the whole trial
                rewards, values = batch["rewards"], batch["values"]
                advantages = gae(rewards, values, batch["mask"], args.gamma, args.gae_lambda)
                mean, std = spread(advantages, batch["mask"])
                batch["advantages"] = (advantages - mean) / std
                batch["returns"] = advantages + values

                # (4), (5) PPO
                remaining = 1 - run.global_step / args.total_timesteps if args.anneal else 1
                losses = update(agent, optimizer, batch, run.key("minibatches"), remaining, args)
                follow(agent.reward_units, batch["rewards"], batch["mask"])
            run.lap("update")

            # log, (6) meta-test, save
            run.global_step += num_steps([batch])
            metrics = losses | trial_charts(batch, played)
            if run.due(args.eval_every):
                scores, episodes = evaluate(agent, test_tasks, args)
                metrics |= report(scores, test_tasks, args)
                run.lap("eval")
            run.log(metrics)
            if run.saving():
                run.save(agent=agent.state_dict(), optimizer=optimizer.state_dict())
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
# Steps of lanes that remember, the RL² paper's task families, defaults by the kind of tasks and
# checks of flags, which only this script has.
# ==================================================================================================


@torch.no_grad()
def play_lanes(agent, lanes, noise, ends, envs, reward, args) -> tuple[tuple, dict]:
    """Steps of an episode in all lanes, one for each of noise (N, T, A), or until none lives.

    lanes: carry (see act), obs (N, O), alive (N,), and the tensors in which a family on the device
    keeps its state; ends (T,): 1 where the agent is told that the episode is over; reward: dense or
    sparse. Returns lanes after the steps, and the steps.
    """
    carry, obs, alive, tensors = lanes
    vars(envs).update(tensors)
    captured = obs.is_cuda and envs.on_device  # all of this is a graph; else two of each step are
    choose, tell = (act, remember) if captured else (graphed(f, args) for f in (act, remember))
    steps = []
    for t in range(noise.shape[1]):
        step, state = choose(agent, carry, obs, noise[:, t])
        next_obs, rewards, terminated, truncated, info = step_lanes(envs, step["actions"])
        if reward == "sparse":
            rewards = info.get("sparse_reward", torch.zeros_like(rewards))
        step |= {"rewards": rewards, "next_obs": next_obs, "mask": alive, **info}
        steps.append(step)
        over = terminated | truncated
        seen = {name: step[name] for name in ("inputs", "actions", "rewards")}
        carry = tell(agent, carry, state, seen, alive, torch.where(over, 1, ends[t]))
        obs = next_obs
        alive = alive & ~over
        if not captured and not alive.any():
            break
    length = noise.shape[1] if obs.is_cuda else 0  # graphs are of one shape
    lanes = carry, obs, alive, {name: vars(envs)[name] for name in tensors}
    return lanes, stack_steps(steps, length)


def play_episode(agent, carry, tasks, generator, reward, deterministic, args) -> tuple:
    """An episode in each of N tasks (N, K): the carry after it, and steps (N, T, ...) by name."""
    envs = make_envs(args.env_id, len(tasks))
    some_steps = graphed(play_lanes, args) if envs.on_device else play_lanes
    obs = reset_lanes(envs, tasks, generator)
    require_finite({"next_obs": obs.unsqueeze(1)}, tasks, -1, args)
    alive = torch.ones(len(tasks), dtype=torch.bool, device=obs.device)
    lanes = carry, obs, alive, {name: x for name, x in vars(envs).items() if torch.is_tensor(x)}
    blocks = []
    for first in range(0, args.horizon, 100):
        t = torch.arange(first, min(first + 100, args.horizon), device=obs.device)
        shape = (len(tasks), len(t))
        noise = draw_noise(envs.single_action_space, shape, generator, deterministic)
        ends = (t + 1 == args.horizon) | getattr(envs, "ends_every_step", False)
        lanes, rows = some_steps(agent, lanes, noise, ends.to(obs), envs, reward, args)
        require_finite(rows, tasks, first, args)
        blocks.append(rows)
        if not lanes[2].any():
            break
    return lanes[0], join_blocks(blocks)


def without_waiting(batch: dict, args) -> dict:
    """Trials (N, S, ...), each one sequence: what was played, in its order, then what pads."""
    order = batch["mask"].sort(dim=1, descending=True, stable=True).indices
    if not args.cuda:  # graphs are of one shape
        order = order[:, : int(batch["mask"].sum(1).max())]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return {name: x[rows, order] for name, x in batch.items()}


def trial_scores(batch: dict, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Of a trial's episodes of these lengths, (N, E): return and, where defined, success."""
    scores = {"return": torch.stack([x.sum(1) for x in batch["rewards"].split(lengths, 1)], 1)}
    if "success" in batch:
        scores["success"] = torch.stack([x.amax(1) for x in batch["success"].split(lengths, 1)], 1)
    return scores


def trial_charts(batch: dict, scores: dict) -> dict[str, float]:
    """charts/*, of a trial's first episode, if it has several, and of its last."""
    returns = scores["return"]
    episodes = returns.shape[1]
    first = {"charts/pre_adaptation_return": task_mean(returns[:, 0])} if episodes > 1 else {}
    return first | {
        "charts/episodic_return": task_mean(returns[:, -1]),
        "charts/episodic_length": task_mean(batch["mask"].sum(1) / episodes),
    }


def with_trials(scores: dict, tasks: np.ndarray, args) -> dict:
    """Scores of episodes, and what whole trials come to."""
    scores["trial_return"] = args.eval_episodes * scores["return"].sum(0)
    if args.num_eval_steps:
        scores["improvement"] = scores["return"][-1] - scores["return"][0]
    if isinstance(make_envs(args.env_id), BanditEnvs):
        pulls = args.horizon * (args.num_eval_steps + 1) * args.eval_episodes
        scores["regret"] = pulls * tasks.max(1) - scores["trial_return"]  # to the best arm
    return scores


BANDITS = re.compile(r"Bandit([1-9]\d*)Arms([1-9]\d*)-v0")  # their ids


class BanditEnvs(gym.vector.VectorEnv):
    """Bandit{k}Arms{n}-v0: n pulls of k arms; each pays 1 with its own probability, U[0, 1], or 0.

    tasks: (B, k) probabilities. Nothing is observed. An episode is n pulls.
    """

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    on_device = True
    ends_every_step = True  # the agent is told so, as a pull is an episode in the paper

    def __init__(self, env_id: str, num_envs: int):
        self.env_id = env_id
        self.num_envs = num_envs
        self.arms, self.horizon = map(int, BANDITS.fullmatch(env_id).groups())
        self.single_observation_space = gym.spaces.Box(0, 0, (0,), np.float64)
        self.single_action_space = gym.spaces.Discrete(self.arms)

    def sample_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(size=(n, self.arms))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.probabilities = options["task"]
        self.generator = options["generator"]
        return self.probabilities[:, :0], {}

    def step(self, actions: torch.Tensor):
        chance = self.probabilities.gather(1, actions.unsqueeze(1)).squeeze(1)
        drawn = torch.rand(chance.shape, generator=self.generator, device=chance.device)
        never = torch.zeros_like(chance, dtype=torch.bool)
        return self.probabilities[:, :0], (drawn < chance).to(chance), never, never, {}


class TabularMDPEnvs(gym.vector.VectorEnv):
    """TabularMDP-v0: 10 states, 5 actions, 10 steps from state 0; the state is observed, one-hot.

    Rewards N(μ, 1), μ ~ N(1, 1); transitions P ~ Dirichlet(1, …, 1). tasks: (B, 550): μ (10, 5) and
    P (10, 5, 10), both flat.
    """

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    on_device = True
    horizon = 10

    def __init__(self, env_id: str, num_envs: int):
        self.env_id = env_id
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 1, (10,), np.float64)
        self.single_action_space = gym.spaces.Discrete(5)

    def sample_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        tasks = np.empty((n, 550))
        tasks[:, :50] = rng.normal(1, 1, (n, 50))
        weights = rng.exponential(size=(n, 50, 10))
        np.divide(weights, weights.sum(-1, keepdims=True), out=tasks[:, 50:].reshape(n, 50, 10))
        return tasks

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.mean = options["task"][:, :50]
        self.transitions = options["task"][:, 50:].unflatten(1, (50, 10))
        self.generator = options["generator"]
        self.state = torch.zeros_like(self.mean[:, 0], dtype=torch.long)
        return self._obs(), {}

    def step(self, actions: torch.Tensor):
        pair = (5 * self.state + actions).unsqueeze(1)
        mean = self.mean.gather(1, pair).squeeze(1)
        chances = self.transitions.gather(1, pair.unsqueeze(2).expand(-1, 1, 10)).squeeze(1)
        noise = torch.randn(mean.shape, generator=self.generator, device=mean.device)
        rates = torch.empty_like(chances).exponential_(generator=self.generator)
        self.state = (chances / rates).argmax(1)  # a race: the first of clocks of these speeds
        never = torch.zeros_like(mean, dtype=torch.bool)
        return self._obs(), mean + noise, never, never, {}

    def _obs(self) -> torch.Tensor:
        states = torch.arange(10, device=self.state.device)
        return (self.state.unsqueeze(1) == states).to(self.mean)


def register_own(env_id: str):
    """Let make_envs find the family of this id, if it is one of the two above."""
    family = {"TabularMDP-v0": TabularMDPEnvs}.get(env_id)
    if BANDITS.fullmatch(env_id):
        family = BanditEnvs
    if family and env_id not in gym.registry:
        gym.register(env_id, vector_entry_point=family, kwargs={"env_id": env_id})


def with_defaults(args: Args) -> Args:
    """args with values in place of None, by the kind of tasks."""
    names = "meta_batch_size", "episodes_per_task", "num_test_tasks", "embedding_size", "gae_lambda"
    values = 100, 2, 40, 0, 0.95
    if args.env_id == "TabularMDP-v0":
        values = 500, 10, 20_000, 128, 0.3
    if BANDITS.fullmatch(args.env_id):
        values = 1000, 1, 20_000, 0, 0.3
    given = {name: value for name, value in asdict(args).items() if value is not None}
    args = replace(args, **dict(zip(names, values, strict=True)) | given)
    if args.num_eval_steps is None:
        scores = args.episodes_per_task // max(1, args.eval_episodes)
        args.num_eval_steps = max(0, scores - 1)
    return args


def check_flags(args):
    """End the program if a minibatch would be empty."""
    trials = args.meta_batch_size // ranks()[1]
    if args.num_minibatches > trials and not args.evaluate:
        fail(f"--num-minibatches {args.num_minibatches}: more than the {trials} trials of a rank")


main = guarded()(main)

if __name__ == "__main__":
    main(parse(Args))

"""What RL²'s network remembers of TabularMDP-v0: it learns, by imitation, the action with the highest posterior mean.

    python benchmarks/rl2_memory.py [--embedding-size 128] [--hidden-size 64] [--learning-rate 3e-3] [--steps 2000000]

The network plays trials with its own actions and is trained (cross-entropy, Adam) towards the softmax of ten times the
posterior means of the state's actions, given the trial so far. No credit has to be assigned: what is not learned here
is not remembered. Prints the trial's return, and the share of actions with the highest posterior mean in the last five
episodes: in state 0, where episodes start, and elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rl2 import Agent, Args, collect, make_envs, register_own

TRIALS, MINIBATCH, EPOCHS, EPISODES, STEPS = 500, 62, 4, 10, 10


def posterior_means(
    states: torch.Tensor, actions: torch.Tensor, rewards: torch.Tensor
) -> torch.Tensor:
    """Of the actions in each step's state, before the step: (N, S) each -> (N, S, 5). Prior and noise are N(·, 1)."""
    trials = torch.arange(len(states))
    total, count = torch.ones(2, len(states), 10, 5)
    means = []
    for state, action, reward in zip(states.T, actions.T, rewards.T, strict=True):
        means.append((total / count)[trials, state])
        total[trials, state, action] += reward
        count[trials, state, action] += 1
    return torch.stack(means, 1)


def main(args: argparse.Namespace):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    register_own("TabularMDP-v0")
    envs = make_envs("TabularMDP-v0", TRIALS)
    play = Args(
        env_id="TabularMDP-v0",
        seed=args.seed,
        horizon=STEPS,
        episodes_per_task=EPISODES,
        hidden_size=args.hidden_size,
        embedding_size=args.embedding_size,
    )
    agent = Agent(10, envs.single_action_space, EPISODES * STEPS, play)
    agent.obs_units.mean.fill_(0.1)
    agent.obs_units.std.fill_(0.33)
    agent.reward_units.mean.fill_(1)
    agent.reward_units.std.fill_(1.41)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    iterations = args.steps // (TRIALS * EPISODES * STEPS)
    for iteration in range(iterations + 1):
        tasks = envs.sample_tasks(TRIALS, np.random.default_rng([args.seed, 0, iteration]))
        batch, scores = collect(agent, tasks, ("memory", iteration), play)
        states = batch["inputs"][..., :10].argmax(-1)
        means = posterior_means(states, batch["actions"], batch["rewards"])
        if iteration % 20 == 0 or iteration == iterations:
            chosen = means.gather(-1, batch["actions"][..., None])[..., 0]
            greedy = (chosen == means.amax(-1))[:, -5 * STEPS :].float()
            first = states[:, -5 * STEPS :] == 0
            print(
                f"{iteration * TRIALS * EPISODES * STEPS:>9,} steps, {time.perf_counter() - start:.0f} s: "
                f"return {scores['return'].sum(1).mean():.1f}, "
                f"greedy in state 0 {greedy[first].mean():.2f}, elsewhere {greedy[~first].mean():.2f}",
                flush=True,
            )
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / iterations)
        target = (10 * means).softmax(-1)
        for _ in range(EPOCHS):
            for members in torch.randperm(TRIALS).split(MINIBATCH):
                logits, _, _ = agent(batch["inputs"][members], agent.initial_state(len(members)))
                loss = -(target[members] * logits.log_softmax(-1)).sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--embedding-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())

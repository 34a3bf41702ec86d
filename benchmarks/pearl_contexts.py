"""Has PEARL's encoder learned the contexts of its replay by heart? Compares them with new ones.

    python benchmarks/pearl_contexts.py runs/NAME [--rounds 12]

For a run of pearl.py on a family whose task is a goal in the plane. Prints the return in the
training tasks, with the mean action, and how far from the goal the last steps are, given a belief
from two episodes: of the replay, or collected by the agent now.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pearl


@torch.no_grad()
def main(folder: str, rounds: int):
    checkpoint = pearl.load_checkpoint(folder, pearl.Args)
    args = replace(pearl.Args(**checkpoint["args"]), cuda=False, episodes_per_task=1)
    envs, tasks, _ = pearl.make_tasks(args)
    tasks = tasks[:: checkpoint["ranks"]]  # of rank 0, whose replay is in the checkpoint
    obs_size = envs.single_observation_space.shape[0]
    agent = pearl.Agent(obs_size, envs.single_action_space.shape[0], args)
    agent.load_state_dict(checkpoint["agent"])
    experience = pearl.Experience(tasks, agent, args)
    experience.replay.load(checkpoint["own"]["replay"])
    experience.window.copy_(checkpoint["own"]["window"])
    ids = torch.arange(len(tasks)).repeat(rounds)
    tasks = np.tile(tasks, (rounds, 1))

    def of_replay():
        generator = torch.Generator().manual_seed(0)
        two = replace(args, context_size=2 * args.horizon, context_segment=args.horizon)
        return experience.draw_context(ids, generator, two)

    def collected(deterministic):
        q = agent.prior(len(tasks))
        episodes = []
        for k in range(2):  # from the prior, then from the belief
            batch = pearl.collect(q, tasks, ("contexts", k), agent, args, False, deterministic)
            episodes.append(pearl.to_rows(batch, agent.columns))
            q = agent.infer(*episodes[0])
        return [torch.cat(parts, 1) for parts in zip(*episodes, strict=True)]

    print("| context of two episodes | return | distance at the end |\n|-|-|-|")
    contexts = {
        "of the replay": of_replay(),
        "new, sampled actions": collected(False),
        "new, mean actions": collected(True),
    }
    for name, context in contexts.items():
        q = agent.infer(*context)
        batch = pearl.collect(q, tasks, ("scored",), agent, args, deterministic=True)
        last = batch["next_obs"][:, 0, -args.horizon // 4 :, :2].numpy()
        miss = np.linalg.norm(last - tasks[:, None, :2], axis=-1).mean()
        print(f"| {name} | {batch['dense_rewards'].sum(-1).mean():.2f} | {miss:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--rounds", type=int, default=12, help="times that each task is played")
    given = parser.parse_args()
    main(given.run, given.rounds)

"""Has PEARL's encoder learned the contexts of its replay by heart? Compares them with new ones, in the training tasks.

    python benchmarks/pearl_contexts.py runs/NAME [--rounds 12]

For a run of pearl.py on a family whose task is a goal in the plane. Prints the return, with the mean action, and how
far from the goal the last steps are, given a belief from two episodes: of the replay, or collected by the agent now.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pearl


def main(folder: str, rounds: int):
    checkpoint = pearl.load_checkpoint(folder, pearl.Args)
    args = pearl.Args(**checkpoint["args"])
    envs = pearl.make_envs(args.env_id, 1)
    tasks = envs.sample_tasks(args.num_train_tasks, np.random.default_rng([args.task_seed, 0]))
    ids, tasks = torch.arange(len(tasks)).repeat(rounds), np.tile(tasks, (rounds, 1))
    obs_size, action_size = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    sizes = [obs_size, action_size, 1, obs_size, 1, 1]
    width = sum(sizes[: 4 if args.context_next_obs else 3])
    agent = pearl.Agent(obs_size, action_size, width, args.latent_size, args.hidden_size, args.encoder_size)
    agent.load_state_dict(checkpoint["agent"])
    horizon = args.horizon or envs.horizon
    settings = {"agent": agent, "horizon": horizon, "reward": args.train_reward}
    collect = partial(pearl.collect, tasks=tasks, envs=pearl.make_envs(args.env_id, len(tasks)), **settings)

    @torch.no_grad()
    def belief(rows, mask):
        return pearl.belief(agent.encoder(rows[..., :width]), mask)

    def of_replay():
        count, window = checkpoint["replay"]["count"], checkpoint["window"]
        replay = pearl.Replay(len(count), int(count.max()), sum(sizes), torch.device("cpu"))
        replay.load(checkpoint["replay"])
        of_context = {"size": 2 * horizon, "segment": horizon, "longest": int(window[:, 1].max()), "width": width}
        return pearl.draw_context(replay, window, ids, generator=torch.Generator().manual_seed(0), **of_context)

    def collected(deterministic):
        episodes = []
        for k in range(2):  # from the prior, then from the belief
            mean, variance = belief(*episodes[0]) if k else agent.prior(len(tasks))
            rng = pearl.keyed_rng(0, "contexts", k)
            episodes.append(pearl.to_rows(collect(mean, variance, rng=rng, deterministic=deterministic)))
        return tuple(torch.cat(parts, 1) for parts in zip(*episodes, strict=True))

    print("| context of two episodes | return | distance at the end |\n|-|-|-|")
    contexts = {"of the replay": of_replay(), "new, sampled actions": collected(False), "new, mean": collected(True)}
    for name, context in contexts.items():
        batch = collect(*belief(*context), rng=pearl.keyed_rng(0, "scored"), deterministic=True)
        last = batch["next_obs"][:, 0, -horizon // 4 :, :2].numpy()
        miss = np.linalg.norm(last - tasks[:, None, :2], axis=-1).mean()
        print(f"| {name} | {batch['dense_rewards'].sum(-1).mean():.2f} | {miss:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--rounds", type=int, default=12, help="times that each training task is played")
    given = parser.parse_args()
    main(given.run, given.rounds)

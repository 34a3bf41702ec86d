"""Writes the demonstrations of a family's scripted expert to a file for gmps.py --expert demos.

    python benchmarks/write_demos.py SparsePointRobot-v0 demos.npz
    PYTHONPATH=benchmarks python benchmarks/write_demos.py metaworld_tasks:ML1-reach-v3 demos.npz --horizon 100

The tasks are the training tasks that gmps.py would draw. The expert acts with noise; the labels have none.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gmps


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env_id")
    parser.add_argument("file", type=Path)
    parser.add_argument("--num-train-tasks", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=5, help="per task")
    parser.add_argument("--horizon", type=int, default=0, help="steps per episode at most (0: the family's own)")
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation, of actions in [-1, 1]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task-seed", type=int, default=0)
    args = parser.parse_args(argv)

    envs = gmps.make_envs(args.env_id, args.num_train_tasks * args.episodes)
    act, horizon = gmps.scripted_expert(envs), args.horizon or envs.horizon
    tasks = envs.sample_tasks(args.num_train_tasks, np.random.default_rng([args.task_seed, 0]))
    tensor = torch.as_tensor(tasks, dtype=torch.get_default_dtype())
    of_lane, rng = tensor.repeat_interleave(args.episodes, 0), gmps.keyed_rng(args.seed, "demonstrations")

    def noisy(obs, noise):
        return act(obs, of_lane) + args.noise * noise

    batch = gmps.episodes(noisy, tasks, rng, envs, horizon, torch.device("cpu"))
    valid = batch["mask"] > 0
    np.savez_compressed(
        args.file,
        observations=batch["obs"][valid].numpy(),
        actions=gmps.label(batch, tensor, act)[valid].numpy(),
        task_index=valid.nonzero()[:, 0].numpy(),
        tasks=tasks,
    )
    scores = {name: f"{score.mean():.2f}" for name, score in gmps.episode_scores(batch).items()}
    print(f"{args.file}: {int(valid.sum())} states of {len(tasks)} tasks, {scores}")


if __name__ == "__main__":
    main()

"""Writes the demonstrations of a family's scripted expert to a file for gmps.py --expert demos.

    python benchmarks/write_demos.py SparsePointRobot-v0 demos.npz
    python benchmarks/write_demos.py ML1-reach-v3 demos.npz --horizon 100

The tasks are the training tasks that gmps.py would draw. The expert acts with noise; the labels
have none.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gmps


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env_id")
    parser.add_argument("file", type=Path)
    parser.add_argument("--num-train-tasks", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=5, help="per task")
    parser.add_argument("--horizon", type=int, default=0, help="steps per episode at most")
    parser.add_argument("--noise", type=float, default=0.3, help="std, of actions in [-1, 1]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task-seed", type=int, default=0)
    given = parser.parse_args(argv)

    args = gmps.Args(env_id=given.env_id, seed=given.seed, task_seed=given.task_seed)
    args.num_train_tasks = given.num_train_tasks
    args.horizon = given.horizon
    args.expert = "scripted"
    args.expert_noise = given.noise
    envs, tasks, _ = gmps.make_tasks(args)
    args.dataset_size = given.episodes * args.horizon
    _, data = gmps.make_expert(envs, tasks, args)
    key = ("demonstrations",)
    batch = gmps.rollout(data.noisy_act, data.tasks_on_device, tasks, given.episodes, key, args)
    data.add(data.ids, batch)

    obs, labels = data.replay.state()["rows"].split([*data.columns.values()], -1)
    index = data.ids.repeat_interleave(data.replay.count)
    np.savez_compressed(
        given.file,
        observations=obs.numpy(),
        actions=labels.numpy(),
        task_index=index.numpy(),
        tasks=tasks,
    )
    scores = {name: f"{x.mean():.2f}" for name, x in gmps.episode_scores(batch).items()}
    print(f"{given.file}: {len(index)} states of {len(tasks)} tasks, {scores}")


if __name__ == "__main__":
    main()

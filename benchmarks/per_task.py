"""Meta-tests a saved run task by task: the mean return of each different held-out task after every adaptation step.

    python benchmarks/per_task.py maml_trpo runs/NAME [--num-test-tasks 40]

A finite family, HalfCheetahDir-v0 for instance, has few of them, each met many times.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(script: str, folder: str, flags: list[str]):
    module = importlib.import_module(script)
    args = module.parse(module.Args, ["--evaluate", folder, *flags])
    with mock.patch.object(module, "report", wraps=module.report) as report:
        module.main(args)
    returns = report.call_args.args[0]["return"]  # (K + 1, M)
    envs = module.make_envs(args.env_id, 1)
    tasks = envs.sample_test_tasks(returns.shape[1], np.random.default_rng([args.task_seed, 1]))
    different, which = np.unique(tasks, axis=0, return_inverse=True)
    for i, task in enumerate(different):
        scores = returns[:, which.ravel() == i]
        errors = 1.96 * scores.std(1) / scores.shape[1] ** 0.5
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in zip(scores.mean(1), errors, strict=True)]
        print(f"task {np.round(task, 3)}, {scores.shape[1]} times: ", " -> ".join(cells))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

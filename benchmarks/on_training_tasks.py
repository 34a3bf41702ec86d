"""The meta-test of a run on its training tasks in place of held-out ones: what it has learned by heart.

    python benchmarks/on_training_tasks.py rl2 runs/NAME --num-test-tasks 250

Flags are those of --evaluate; evaluation.npz in the run's folder is that of training tasks then. Of a fixed set
(--num-train-tasks) give --num-test-tasks as many.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np


def main(script: str, folder: str, *flags: str) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    script = script.removesuffix(".py")
    module = importlib.import_module(script)
    args = module.parse(module.Args, ["--evaluate", folder, *flags])
    if script == "rl2":
        module.register_own(args.env_id)
    envs = module.make_envs(args.env_id)
    stream = [args.task_seed, 0]  # of training tasks, in make_tasks
    envs.sample_test_tasks = lambda n, rng: envs.sample_tasks(n, np.random.default_rng(stream))
    return module.main(args)


if __name__ == "__main__":
    main(*sys.argv[1:])

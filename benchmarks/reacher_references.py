"""What there is to gain on MultimodalReacher: policies written by hand, which know this or that of a task.

    python benchmarks/reacher_references.py

The tip is drawn by a spring to a point, and the joints are damped (Jacobian transpose); of both constants the best of a
grid. What is printed goes into docs/tasks.md.
"""

import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mujoco_tasks import ReacherEnvs

TASKS = 500


def play(envs, tasks, target=None, spring=0.0, damping=0.0) -> float:
    """Mean return of the tasks (B, 3) where the tip is drawn to target (B, 2); None: no forces."""
    envs.reset(seed=0, options={"task": tasks})
    total = 0
    for _ in range(envs.horizon):
        actions = np.zeros((len(tasks), 3))
        if target is not None:
            angle = envs.state[:, 1:4].cumsum(axis=1)  # of each link in the plane
            links = 0.1 * np.stack([-np.sin(angle), np.cos(angle)], axis=1)  # (B, 2, 3)
            # a joint moves all links from its own on
            jacobian = links[..., ::-1].cumsum(axis=-1)[..., ::-1]
            force = spring * (target - envs._tip())
            actions = (jacobian * force[..., None]).sum(axis=1) - damping * envs.state[:, 4:]
        total += envs.step(actions)[1].mean()
    return total


def main():
    for modes in (2, 4, 6):
        envs = ReacherEnvs(f"MultimodalReacher{modes}-v0", TASKS)
        tasks = envs.sample_tasks(TASKS, np.random.default_rng(0))
        goals, mode = tasks[:, :2], tasks[:, 2].astype(int)
        centres = np.stack([goals[mode == m].mean(axis=0) for m in range(modes)])
        print(f"{modes} modes, stands still: {play(envs, tasks):.1f}")
        targets = {"shoulder": np.zeros_like(goals)}
        targets |= {"centre of its mode": centres[mode], "goal": goals}
        for name, target in targets.items():
            grid = itertools.product((10, 20, 30, 60), (0.1, 0.15, 0.2, 0.3))
            best = max((play(envs, tasks, target, *constants), *constants) for constants in grid)
            print(
                f"{modes} modes, {name}: {best[0]:.1f} (spring {best[1]}, damping {best[2]})",
                flush=True,
            )


if __name__ == "__main__":
    main()

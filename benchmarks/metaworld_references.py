"""What there is to gain on ML1-reach-v3: held-out goals, one episode in each, without learning.

    python benchmarks/metaworld_references.py [horizon]

expert: the scripted policy, which is told the goal. centre: straight to the mean of these goals, where it stays.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from metaworld_tasks import MetaWorldEnvs

GOALS = 50


def main(horizon: int):
    envs = MetaWorldEnvs("ML1-reach-v3", GOALS)
    tasks = envs.sample_test_tasks(GOALS, np.random.default_rng(0))
    for who in ("expert", "centre"):
        obs, _ = envs.reset(options={"task": tasks})
        total = success = 0
        for _ in range(horizon):
            actions = np.stack([envs.expert_action(*pair) for pair in zip(obs, tasks, strict=True)])
            if who == "centre":
                goals = np.stack([*envs.goals.values()])
                actions[:, :3] = 10 * (goals.mean(0) - obs[:, :3])
            obs, rewards, _, _, info = envs.step(actions)
            total += rewards
            success = np.maximum(success, info["success"])
        print(f"{who}: return {np.mean(total):.1f}, success {np.mean(success):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)

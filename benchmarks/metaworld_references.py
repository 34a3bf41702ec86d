"""What there is to gain on ML1 of reach, push or pick-place: held-out goals, one episode in each, without learning.

    python benchmarks/metaworld_references.py [ID] [HORIZON]

expert: the scripted policy, which is told the goal. centre: the same, told the mean of these goals.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metaworld_tasks  # noqa: F401  (which registers the families)

GOALS = 50


def main(env_id: str = "ML1-reach-v3", horizon: str = "500"):
    envs = gym.make_vec(env_id, num_envs=GOALS, vectorization_mode="vector_entry_point")
    tasks = envs.sample_test_tasks(GOALS, np.random.default_rng(0))
    for who in ("expert", "centre"):
        if who == "centre":
            mean = np.mean([*envs.goals.values()], axis=0)
            envs.goals = dict.fromkeys(envs.goals, mean)
        obs, _ = envs.reset(options={"task": tasks})
        total = success = 0
        for _ in range(int(horizon)):
            actions = np.stack([envs.expert_action(*pair) for pair in zip(obs, tasks, strict=True)])
            obs, rewards, _, _, info = envs.step(actions)
            total += rewards
            success = np.maximum(success, info["success"])
        print(f"{who}: return {np.mean(total):.1f}, success {np.mean(success):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

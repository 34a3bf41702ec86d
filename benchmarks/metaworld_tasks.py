"""Meta-World (Yu et al. 2019, arXiv 1910.10897) as task families: ML1-*, ML10, ML25 and ML45.

    pip install metaworld
    PYTHONPATH=benchmarks python maml_trpo.py --env-id metaworld_tasks:ML1-reach-v3

Goals are hidden, success is in info, and training and held-out tasks are the benchmark's own.
"""

from __future__ import annotations

from functools import cache

import gymnasium as gym
import metaworld
import numpy as np


@cache
def benchmark(name: str):
    """ML1-reach-v3 to metaworld.ML1("reach-v3"), and so on; building one takes seconds."""
    return metaworld.ML1(name[4:], seed=0) if name.startswith("ML1-") else getattr(metaworld, name)(seed=0)


class MetaWorld(gym.Env):
    """A task is a row (split, index) of the benchmark's lists: split 0 its training tasks, 1 its test tasks."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, name: str):
        ml = benchmark(name)
        self.classes, self.tasks = {**ml.train_classes, **ml.test_classes}, (ml.train_tasks, ml.test_tasks)
        self.envs = {}  # a simulator per class, made when it is first needed

    def sample_tasks(self, n: int, split: int = 0) -> np.ndarray:
        """Classes are dealt in turn; a task is drawn from those of its class."""
        names = np.array([task.env_name for task in self.tasks[split]])
        dealt = np.resize(np.unique(names), n)
        return np.array([(split, self.np_random.choice(np.flatnonzero(names == name))) for name in dealt])

    def sample_test_tasks(self, n: int) -> np.ndarray:
        return self.sample_tasks(n, split=1)

    def set_task(self, task: np.ndarray):
        chosen = self.tasks[int(task[0])][int(task[1])]
        if chosen.env_name not in self.envs:
            self.envs[chosen.env_name] = self.classes[chosen.env_name]()
        self.env = self.envs[chosen.env_name]
        self.env.set_task(chosen)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self.env.reset(seed=seed) if hasattr(self, "env") else (np.zeros(39), {})

    def step(self, action: np.ndarray):
        return self.env.step(action)


for name in [*(f"ML1-{task}" for task in metaworld.ALL_V3_ENVIRONMENTS), "ML10", "ML25", "ML45"]:
    gym.register(name, MetaWorld, max_episode_steps=500, kwargs={"name": name})

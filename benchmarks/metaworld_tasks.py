"""Meta-World (Yu et al. 2019, arXiv 1910.10897) as task families: ML1-*, ML10, ML25 and ML45.

    pip install metaworld && export PYTHONPATH=benchmarks
    python maml_trpo.py --env-id metaworld_tasks:ML1-reach-v3 --meta-batch-size 10 --episodes-per-task 5

Goals are hidden, success is in info, and training and held-out tasks are the benchmark's own. Experts, for gmps.py, are
Meta-World's scripted policies.
"""

from collections import defaultdict
from functools import cache, partialmethod

import gymnasium as gym
import metaworld
import numpy as np
from metaworld.policies import ENV_POLICY_MAP

idle = defaultdict(list)  # simulators by class that no lane uses: each takes 20 MB and up to a second to make


def simulator(task):
    """One that no lane uses, in the task."""
    make = metaworld.ALL_V3_ENVIRONMENTS[task.env_name]
    env = idle[make].pop() if idle[make] else make()
    env.set_task(task)
    return env


@cache
def expert(task):
    """The scripted policy of a task, and the goal, which the task's observations hide."""
    env = simulator(task)
    env.reset()
    idle[type(env)].append(env)
    return ENV_POLICY_MAP[task.env_name](), env._target_pos.copy()


@cache
def benchmark(name: str):
    """ML1-reach-v3 to metaworld.ML1("reach-v3"), and so on; building one takes seconds."""
    return metaworld.ML1(name[4:], seed=0) if name.startswith("ML1-") else getattr(metaworld, name)(seed=0)


class MetaWorld(gym.Env):
    """A task is a row (split, index) of the benchmark's lists: split 0 its training tasks, 1 its test tasks."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, name: str):
        self.tasks = benchmark(name).train_tasks, benchmark(name).test_tasks

    def sample_tasks(self, n: int, split: int = 0) -> np.ndarray:
        """Classes are dealt in turn and in random order, each with its tasks in random order; none comes twice."""
        names = np.array([task.env_name for task in self.tasks[split]])
        of_class = np.array([np.flatnonzero(names == name) for name in np.unique(names)])  # (classes, 50)
        shuffled = self.np_random.permutation(self.np_random.permuted(of_class, axis=1))
        return np.column_stack([np.full(n, split), np.resize(shuffled.T, n)])

    sample_test_tasks = partialmethod(sample_tasks, split=1)

    def set_task(self, task: np.ndarray):
        if hasattr(self, "env"):
            idle[type(self.env)].append(self.env)
        self.env = simulator(self.tasks[int(task[0])][int(task[1])])

    def expert_action(self, obs: np.ndarray, task: np.ndarray) -> np.ndarray:
        policy, goal = expert(self.tasks[int(task[0])][int(task[1])])
        return policy.get_action(np.concatenate([obs[:-3], goal]).astype(np.float64)).clip(-1, 1)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self.env.reset(seed=seed) if hasattr(self, "env") else (np.zeros(39), {})

    def step(self, action: np.ndarray):
        return self.env.step(action)


for name in [*(f"ML1-{task}" for task in metaworld.ALL_V3_ENVIRONMENTS), "ML10", "ML25", "ML45"]:
    gym.register(name, MetaWorld, max_episode_steps=500, kwargs={"name": name})

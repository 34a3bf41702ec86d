"""Meta-World (Yu et al. 2019, arXiv 1910.10897) as task families: ML1-*, ML10, ML25 and ML45.
pip install metaworld, and lay this file beside the script or into the working folder.

    python maml_trpo.py --env-id ML1-reach-v3 --meta-batch-size 10 --episodes-per-task 5

Goals are hidden, success is in info, and training and held-out tasks are the benchmark's own.
Experts, for gmps.py, are Meta-World's scripted policies. More in docs/tasks.md.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import ClassVar

import gymnasium as gym
import numpy as np

METAWORLD_TASKS = """
assembly basketball bin-picking box-close button-press button-press-topdown
button-press-topdown-wall button-press-wall coffee-button coffee-pull coffee-push dial-turn
disassemble door-close door-lock door-open door-unlock drawer-close drawer-open faucet-close
faucet-open hammer hand-insert handle-press handle-press-side handle-pull handle-pull-side
lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall plate-slide
plate-slide-back plate-slide-back-side plate-slide-side push push-back push-wall reach reach-wall
shelf-place soccer stick-pull stick-push sweep sweep-into window-close window-open
""".split()


@cache
def benchmark(env_id: str):
    """ML1-reach-v3 to metaworld.ML1("reach-v3"), and so on; building one takes seconds."""
    import metaworld

    if env_id.startswith("ML1-"):
        return metaworld.ML1(env_id.removeprefix("ML1-"), seed=0)
    return getattr(metaworld, env_id)(seed=0)


class MetaWorldEnvs(gym.vector.VectorEnv):
    """tasks: (n, 2), each the split (0: training, 1: test) and the index in its list of tasks."""

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    horizon = 500
    num_modes = 0
    idle: ClassVar = defaultdict(list)  # simulators by class: each takes 20 MB and up to a second

    def __init__(self, env_id: str, num_envs: int):
        import metaworld.policies

        self.env_id = env_id
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
        self.single_action_space = gym.spaces.Box(-1, 1, (4,), np.float64)
        self.classes = metaworld.ALL_V3_ENVIRONMENTS
        self.policies = metaworld.policies.ENV_POLICY_MAP
        self.splits = (benchmark(env_id).train_tasks, benchmark(env_id).test_tasks)
        self.lanes = []
        self.goals = {}

    def sample_tasks(self, n: int, rng: np.random.Generator, split: int = 0) -> np.ndarray:
        """Classes are dealt in turn and in random order, each with its tasks in random order.

        None comes twice before all have come.
        """
        names = np.array([task.env_name for task in self.splits[split]])
        of_class = np.array([np.flatnonzero(names == name) for name in np.unique(names)])
        shuffled = rng.permutation(rng.permuted(of_class, axis=1))  # (classes, 50)
        return np.column_stack([np.full(n, split), np.resize(shuffled.T, n)])

    def sample_test_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return self.sample_tasks(n, rng, split=1)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """seed: of no effect, as a task says where everything starts."""
        for simulator in self.lanes:
            self.idle[type(simulator)].append(simulator)
        self.lanes = [self._simulator(self._named(row)) for row in options["task"]]
        self.obs = np.stack([simulator.reset()[0] for simulator in self.lanes])
        self.ended = np.zeros(self.num_envs, bool)
        return self.obs.copy(), {}

    def step(self, actions: np.ndarray):
        actions = np.clip(actions, -1, 1).astype(np.float32)
        rewards = np.zeros(self.num_envs)
        success = np.zeros(self.num_envs)
        for i in np.flatnonzero(~self.ended):  # a lane ends after 500 steps, and not before
            self.obs[i], rewards[i], _, self.ended[i], info = self.lanes[i].step(actions[i])
            success[i] = info["success"]
        terminated = np.zeros(self.num_envs, bool)
        return self.obs.copy(), rewards, terminated, self.ended.copy(), {"success": success}

    def expert_action(self, obs: np.ndarray, task: np.ndarray) -> np.ndarray:
        """What Meta-World's scripted policy does, which is told the goal: obs (39,) -> (4,)."""
        named = self._named(task)
        if named not in self.goals:
            simulator = self._simulator(named)
            simulator.reset()
            self.goals[named] = simulator._target_pos.copy()
            self.idle[type(simulator)].append(simulator)
        told = np.concatenate([obs[:-3], self.goals[named]]).astype(np.float64)
        return self.policies[named.env_name]().get_action(told).clip(-1, 1)

    def _named(self, row: np.ndarray):
        """A row as Meta-World's task: its class's name, and where things are."""
        split, index = row.astype(int)
        return self.splits[split][index]

    def _simulator(self, named):
        """One that no lane uses, in the task."""
        make = self.classes[named.env_name]
        simulator = self.idle[make].pop() if self.idle[make] else make()
        simulator.set_task(named)
        return simulator


for name in [*(f"ML1-{task}-v3" for task in METAWORLD_TASKS), "ML10", "ML25", "ML45"]:
    gym.register(name, vector_entry_point=MetaWorldEnvs, kwargs={"env_id": name})

"""A family of tasks as a user may write one, in all the shapes that the scripts accept."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

ACTIONS = {
    "asymmetric": Box(np.array([-2, 0], np.float32), np.array([1, 5], np.float32)),
    "matrix": Box(-1, 3, (2, 2), np.float64),
    "unbounded": Box(-np.inf, np.inf, (2,), np.float64),
    "discrete": Discrete(3, start=3),
    "binary": gym.spaces.MultiBinary(2),
}
OBSERVATIONS = {
    "flat": Box(-np.inf, np.inf, (3,), np.float64),
    "dict": Dict(
        {"place": Box(-np.inf, np.inf, (2,), np.float64), "clock": Box(0, np.inf, (1,), np.float64)}
    ),
}


class Ragged(gym.Env):
    """A task is (length, target). An episode ends after `length` steps; the reward is minus the distance of the
    action to the target; success is reported at the end only, and the sparse reward at every other step.
    """

    made: ClassVar[list] = []  # every one that was ever made
    fault = ()  # (step, what, value): where to return a value; step -1 is the reset

    def __init__(self, actions="asymmetric", observations="flat"):
        self.action_space, self.observation_space = ACTIONS[actions], OBSERVATIONS[observations]
        self.given, self.seeds = [], []
        self.made.append(self)

    def sample_tasks(self, n):
        return np.column_stack([self.np_random.integers(2, 9, n), self.np_random.normal(size=n)])

    def set_task(self, task):
        self.task = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.given = 0, []
        self.seeds.append(seed)
        self.place = self.np_random.normal(size=2)
        return self.observe(), {}

    def step(self, action):
        assert self.steps < self.task[0], "stepped after its end"
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.given.append(action)
        self.steps += 1
        reward = self.spoil("reward", -np.abs(action - self.task[1]).mean())
        info = {"sparse_reward": self.spoil("sparse reward", 1.0)} if self.steps % 2 else {}
        info |= {"success": True} if self.steps == self.task[0] else {}
        return self.observe(), reward, self.steps == self.task[0], False, info

    def spoil(self, what, value):
        return self.fault[2] if self.fault[:2] == (self.steps - 1, what) else value

    def observe(self):
        place = self.place * self.spoil("observation", 1)
        clock = np.array([self.steps / 10])
        flat = isinstance(self.observation_space, Box)
        return np.concatenate([place, clock]) if flat else {"place": place, "clock": clock}


class Split(Ragged):
    """Has held-out tasks of its own: their targets are above 100."""

    def sample_test_tasks(self, n):
        return self.sample_tasks(n) + np.array([0, 100])


class Uneven(Ragged):
    """Reports success where the target is above 0 only: of the first seven held-out tasks, in the fourth."""

    def sample_test_tasks(self, n):
        length, target = self.sample_tasks(n).T
        return np.column_stack([length, np.where(np.arange(n) % 4 == 3, 1, -1) * np.abs(target)])

    def step(self, action):
        *result, info = super().step(action)
        return *result, {
            name: value for name, value in info.items() if name != "success" or self.task[1] > 0
        }


for actions in ACTIONS:
    gym.register(
        f"{actions.capitalize()}-v0", Ragged, max_episode_steps=12, kwargs={"actions": actions}
    )
gym.register("Dict-v0", Ragged, max_episode_steps=12, kwargs={"observations": "dict"})
gym.register("Endless-v0", Ragged)
gym.register("Truncated-v0", Ragged, max_episode_steps=4)
gym.register("Split-v0", Split, max_episode_steps=12)
gym.register("Uneven-v0", Uneven, max_episode_steps=12, kwargs={"actions": "matrix"})

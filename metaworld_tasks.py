"""Meta-World (Yu et al. 2019, arXiv 1910.10897) as task families: ML1-*, ML10, ML25 and ML45.
pip install metaworld, and lay this file beside the script or into the working folder.

    python maml_trpo.py --env-id ML1-reach-v3 --meta-batch-size 10 --episodes-per-task 5

Goals are hidden, success is in info, and training and held-out tasks are the benchmark's own.
Rewards are Meta-World's V2; ML10-reward-v1 and so on have V1. In ML1-reach-v3-same-start, and so
for push and pick-place, the object begins in one place, and does not tell tasks apart. Lanes are
spread over as many processes as torch has threads (--num-threads); how many changes no number.
Experts, for gmps.py, are Meta-World's scripted policies. More in docs/metaworld.md.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import traceback
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


def from_same_start(task):
    """A task of reach, push or pick-place with its object where these classes have it at first, as
    it was in all tasks of Meta-World's first version. The goal stays.
    """
    data = pickle.loads(task.data)
    data["rand_vec"] = np.concatenate([[0, 0.6, 0.02], data["rand_vec"][3:]])
    return task._replace(data=pickle.dumps(data))


class Simulators:
    """Those of one process: of the lanes of each owner, and idle ones, by class and reward.

    Each takes 20 MB and up to a second to make; put in a task, it forgets the last one.
    """

    def __init__(self):
        self.lanes = defaultdict(list)
        self.idle = defaultdict(list)

    def take(self, task, reward: str):
        """An idle one, or a new one, in a task of Meta-World's."""
        import metaworld

        make = metaworld.ALL_V3_ENVIRONMENTS[task.env_name]
        idle = self.idle[make, reward]
        simulator = idle.pop() if idle else make(reward_function_version=reward)
        simulator.set_task(task)
        return simulator

    def give_back(self, simulator):
        self.idle[type(simulator), simulator.reward_function_version].append(simulator)

    def reset(self, owner: int, tasks: list, reward: str) -> list[np.ndarray]:
        for simulator in self.lanes[owner]:
            self.give_back(simulator)
        self.lanes[owner] = [self.take(task, reward) for task in tasks]
        return [np.stack([simulator.reset()[0] for simulator in self.lanes[owner]])]

    def step(self, owner: int, actions: np.ndarray) -> list[np.ndarray]:
        """obs (B, 39), and rewards, ended and success, (B,)."""
        obs = np.zeros((len(actions), 39))
        rewards, ended, success = np.zeros((3, len(actions)))
        for i, simulator in enumerate(self.lanes[owner]):
            if simulator.curr_path_length < simulator.max_path_length:
                obs[i], rewards[i], _, ended[i], info = simulator.step(actions[i])
                success[i] = info["success"]
            else:
                obs[i], ended[i] = simulator._last_stable_obs, 1
        return [obs, rewards, ended, success]


def serve():
    """A process that helps: this file as a program. Pickles come in, (method, arguments), and go
    out; it ends when its input does, so with the process that started it, however that ended.
    """
    calls, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints goes elsewhere
    simulators = Simulators()
    try:
        while True:
            method, *arguments = pickle.load(calls)
            try:
                result = getattr(simulators, method)(*arguments)
            except Exception:
                result = traceback.format_exc()
            pickle.dump(result, results)
            results.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody is there any more


class MetaWorldEnvs(gym.vector.VectorEnv):
    """tasks: (n, 2), each the split (0: training, 1: test) and the index in its list of tasks."""

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    horizon = 500
    num_modes = 0
    here: ClassVar = Simulators()  # of all objects, as are the helpers
    helpers: ClassVar = []

    def __init__(self, env_id: str, num_envs: int, reward: str = "v2", same_start: bool = False):
        import metaworld.policies
        import torch

        self.env_id = env_id
        self.num_envs = num_envs
        self.reward = reward
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
        self.single_action_space = gym.spaces.Box(-1, 1, (4,), np.float64)
        self.policies = metaworld.policies.ENV_POLICY_MAP
        self.splits = (benchmark(env_id).train_tasks, benchmark(env_id).test_tasks)
        if same_start:
            self.splits = [[from_same_start(task) for task in tasks] for tasks in self.splits]
        self.processes = max(1, min(torch.get_num_threads(), num_envs // 4))  # this one counts
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
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        program = [sys.executable, os.path.abspath(__file__)]
        while len(self.helpers) < self.processes - 1:  # Ctrl-C is not for them: scripts save first
            self.helpers.append(subprocess.Popen(program, **pipes, start_new_session=True))
        tasks = [self._named(row) for row in options["task"]]
        # classes cost differently: every process has its share of the lanes of each
        order = np.argsort([task.env_name for task in tasks], kind="stable")
        self.shares = [order[i :: self.processes] for i in range(self.processes)]
        of_shares = [[tasks[i] for i in share] for share in self.shares]
        (obs,) = self._everywhere("reset", of_shares, self.reward)
        return obs, {}

    def step(self, actions: np.ndarray):
        actions = np.clip(actions, -1, 1).astype(np.float32)
        of_shares = [actions[share] for share in self.shares]
        obs, rewards, ended, success = self._everywhere("step", of_shares)
        return obs, rewards, np.zeros(self.num_envs, bool), ended > 0, {"success": success}

    def expert_action(self, obs: np.ndarray, task: np.ndarray) -> np.ndarray:
        """What Meta-World's scripted policy does, which is told the goal: obs (39,) -> (4,)."""
        named = self._named(task)
        if named not in self.goals:
            simulator = self.here.take(named, self.reward)
            simulator.reset()
            self.goals[named] = simulator._target_pos.copy()
            self.here.give_back(simulator)
        told = np.concatenate([obs[:-3], self.goals[named]]).astype(np.float64)
        return self.policies[named.env_name]().get_action(told).clip(-1, 1)

    def _named(self, row: np.ndarray):
        """A row as Meta-World's task: its class's name, and where things are."""
        split, index = row.astype(int)
        return self.splits[split][index]

    def _everywhere(self, method: str, of_shares: list, *more) -> list[np.ndarray]:
        """A method of the Simulators of all processes; what they return, lane by lane."""
        helpers = self.helpers[: self.processes - 1]
        try:
            for helper, given in zip(helpers, of_shares[1:], strict=True):
                pickle.dump((method, id(self), given, *more), helper.stdin)
                helper.stdin.flush()
            parts = [getattr(self.here, method)(id(self), of_shares[0], *more)]
            parts += [pickle.load(helper.stdout) for helper in helpers]
            for part in parts:
                if isinstance(part, str):
                    raise RuntimeError(f"in a process that steps Meta-World:\n{part}")
        except BaseException as error:
            stop_helpers()  # nobody has taken their answers
            if isinstance(error, EOFError | BrokenPipeError | pickle.UnpicklingError):
                raise RuntimeError("a process that steps Meta-World has died") from error
            raise
        results = []
        for columns in zip(*parts, strict=True):
            results.append(np.empty((self.num_envs, *columns[0].shape[1:])))
            for share, column in zip(self.shares, columns, strict=True):
                results[-1][share] = column
        return results


@atexit.register
def stop_helpers():
    while MetaWorldEnvs.helpers:
        helper = MetaWorldEnvs.helpers.pop()
        helper.kill()
        helper.communicate()  # waits, and closes the pipes


for name in [*(f"ML1-{task}-v3" for task in METAWORLD_TASKS), "ML10", "ML25", "ML45"]:
    for end, reward in ("", "v2"), ("-reward-v1", "v1"):
        given = {"env_id": name, "reward": reward}
        gym.register(name + end, vector_entry_point=MetaWorldEnvs, kwargs=given)
for name in "ML1-reach-v3", "ML1-push-v3", "ML1-pick-place-v3":
    given = {"env_id": name, "same_start": True}
    gym.register(f"{name}-same-start", vector_entry_point=MetaWorldEnvs, kwargs=given)

if __name__ == "__main__":
    serve()

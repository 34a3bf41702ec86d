"""The MuJoCo families of tasks, on gymnasium's model files: pip install mujoco, and lay this file
beside the script or into the working folder.

    python maml_trpo.py --env-id HalfCheetahVel-v0

All lanes step in one call of MuJoCo's own thread pool. A family of yours that steps all lanes at
once looks like the class below: a gymnasium VectorEnv with autoreset disabled, sample_tasks(n, rng),
horizon and reset(options={"task": tasks}), registered with a vector_entry_point. Formulas, sources
and where they differ from gymnasium's environments: docs/tasks.md.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch

MUJOCO_FAMILIES = {  # model, frame skip, leading qpos not observed, noise of the start, control cost
    "HalfCheetahDir-v0": ("half_cheetah", 5, 1, 0.1, 0.05),
    "HalfCheetahVel-v0": ("half_cheetah", 5, 1, 0.1, 0.05),
    "AntDir-v0": ("ant", 5, 2, 0.1, 0.5),
    "AntFwdBack-v0": ("ant", 5, 2, 0.1, 0.005),
    "AntGoal-v0": ("ant", 5, 0, 0.1, 0.1),
    "SparseAntGoal-v0": ("ant", 5, 0, 0.1, 0.1),
    "SparseWheeledGoal-v0": ("wheeled", 1, 0, 0.01, 0.05),
    "HumanoidDir-v0": ("humanoid", 5, 2, 0.01, 0.1),
    "Walker2dRandParams-v0": ("walker2d", 4, 1, 0.005, 0.001),
    "HopperRandParams-v0": ("hopper", 4, 1, 0.005, 0.001),
    "MultimodalReacher2-v0": ("reacher", 2, 0, 0.1, 0.1),
    "MultimodalReacher4-v0": ("reacher", 2, 0, 0.1, 0.1),
    "MultimodalReacher6-v0": ("reacher", 2, 0, 0.1, 0.1),
}
MODELS = {  # of our own; the others are gymnasium's
    # gymnasium's reacher with a third link, without walls and target
    "reacher": """<mujoco>
      <option integrator="RK4" timestep="0.01"> <flag contact="disable"/> </option>
      <default> <joint axis="0 0 1" armature="1" damping="1"/> <motor ctrlrange="-1 1" gear="200"/>
        <geom type="capsule" fromto="0 0 0 0.1 0 0" size="0.01" rgba="0 0.4 0.6 1"/> </default>
      <worldbody>
        <body pos="0 0 0.01"> <joint name="joint0"/> <geom/>
          <body pos="0.1 0 0"> <joint name="joint1" range="-172 172"/> <geom/>
            <body pos="0.1 0 0"> <joint name="joint2" range="-172 172"/> <geom/>
              <site name="tip" pos="0.1 0 0"/>
            </body>
          </body>
        </body>
      </worldbody>
      <actuator> <motor joint="joint0"/> <motor joint="joint1"/> <motor joint="joint2"/> </actuator>
    </mujoco>""",
    # a box that neither rolls nor pitches, on two driven wheels; full throttle takes it 6 m in 2 s
    "wheeled": """<mujoco>
      <option timestep="0.01"/>
      <default> <geom rgba="0 0.4 0.6 1"/> <motor ctrlrange="-2 2" gear="0.125"/>
        <default class="wheel"> <joint axis="0 1 0"/>
          <geom type="cylinder" size="0.1 0.02" zaxis="0 1 0" mass="0.2"/> </default> </default>
      <worldbody>
        <geom type="plane" size="10 10 1" rgba="0.9 0.9 0.9 1"/>
        <body name="car" pos="0 0 0.1">
          <joint type="slide" axis="1 0 0"/> <joint type="slide" axis="0 1 0"/>
          <joint type="slide" axis="0 0 1"/> <joint type="hinge" axis="0 0 1"/>
          <geom type="box" size="0.2 0.1 0.03" mass="1"/>
          <body pos="0 0.13 0" childclass="wheel"> <joint name="left"/> <geom/> </body>
          <body pos="0 -0.13 0" childclass="wheel"> <joint name="right"/> <geom/> </body>
        </body>
      </worldbody>
      <actuator> <motor joint="left"/> <motor joint="right"/> </actuator>
    </mujoco>""",
}
# the model's arrays that a task of *RandParams scales, and the base of its factors
VARIED = {"body_mass": 1.5, "body_inertia": 1.5, "geom_friction": 1.5, "dof_damping": 1.3}


class MujocoEnvs(gym.vector.VectorEnv):
    """Lanes of a family; reset puts lane i in task i, a lane that has ended stays put and pays 0.

    tasks: (n, 1) direction, velocity or angle; (n, 2) goal; or (n, F) factors on a model's
    dynamics.
    """

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    horizon = 200
    num_modes = 0

    def __init__(self, env_id: str, num_envs: int):
        import mujoco.rollout

        self.env_id = env_id
        self.num_envs = num_envs
        model, skip, hidden, noise, control_cost = MUJOCO_FAMILIES[env_id]
        self.frame_skip = skip
        self.hidden = hidden
        self.noise = noise
        self.control_cost = control_cost
        self.name = model
        assets = Path(gym.__file__).parent / "envs" / "mujoco" / "assets"
        xml = MODELS.get(model) or (assets / f"{model}.xml").read_text()
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.varies = env_id.endswith("RandParams-v0")
        if self.varies:
            self.model.opt.timestep = 0.004  # the original's, with its frame skip of 4
        self.state = self._start()
        obs_size = self._obs().shape[1]
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float64)
        self.single_action_space = gym.spaces.Box(-1, 1, (self.model.nu,), np.float64)
        threads = torch.get_num_threads()
        self.pool = mujoco.rollout.Rollout(nthread=threads)
        self.data = [mujoco.MjData(self.model) for _ in range(threads)]
        self.models = [self.model] * num_envs
        if self.varies:
            self.models = [copy.copy(self.model) for _ in range(num_envs)]

    def sample_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        if self.env_id == "HalfCheetahDir-v0":
            return np.resize([1.0, -1.0], (n, 1))  # dealt in turn
        if self.env_id == "HalfCheetahVel-v0":
            return rng.uniform(0, 3, (n, 1))
        if self.env_id == "AntFwdBack-v0":
            return np.resize([0.0, np.pi], (n, 1))  # dealt in turn
        if self.env_id.endswith("Dir-v0"):
            return rng.uniform(0, 2 * np.pi, (n, 1))
        if self.varies:
            sizes = [getattr(self.model, name).size for name in VARIED]
            bases = np.repeat([*VARIED.values()], sizes)
            return bases ** rng.uniform(-3, 3, (n, len(bases)))
        if self.env_id.startswith("Sparse"):  # a half circle of radius 2
            angle = rng.uniform(0, np.pi, n)
            radius = np.full(n, 2.0)
        else:  # a disc of radius 3
            angle = rng.uniform(0, 2 * np.pi, n)
            radius = 3 * rng.uniform(size=n) ** 0.5
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        rng = np.random.default_rng(seed)
        nq, nv = self.model.nq, self.model.nv
        noise = rng.uniform(-self.noise, self.noise, (self.num_envs, nq + nv))
        if self.name in ("half_cheetah", "ant"):
            noise[:, nq:] = self.noise * rng.normal(size=(self.num_envs, nv))
        self.state = self._start() + np.pad(noise, ((0, 0), (1, 0)))
        self.tasks = options["task"]
        self.ended = np.zeros(self.num_envs, bool)
        if self.varies:
            for model, task in zip(self.models, self.tasks, strict=True):
                self._scale(model, task)
        return self._obs(), {}

    def _start(self) -> np.ndarray:
        """(B, 1 + nq + nv): time, qpos and qvel, without noise."""
        start = np.concatenate([[0.0], self.model.qpos0, np.zeros(self.model.nv)])
        return np.tile(start, (self.num_envs, 1))

    def _scale(self, model, factors: np.ndarray):
        """The original's arrays times the factors of a task, into its copy."""
        for name in VARIED:
            original = getattr(self.model, name)
            own = factors[: original.size].reshape(original.shape)
            getattr(model, name)[:] = original * own  # arrays of models are views
            factors = factors[original.size :]

    def step(self, actions: np.ndarray):
        alive = np.flatnonzero(~self.ended)
        low, high = self.model.actuator_ctrlrange.T
        control = low + (np.clip(actions, -1, 1) + 1) / 2 * (high - low)
        before = self.state[:, 1:3].copy()
        if len(alive):
            states, _ = self.pool.rollout(
                [self.models[i] for i in alive],
                self.data,
                self.state[alive],
                control[alive, None],
                nstep=self.frame_skip,
            )
            self.state[alive] = states[:, -1]
        velocity = (self.state[:, 1:3] - before) / (self.frame_skip * self.model.opt.timestep)
        reward, healthy, info = self._judge(velocity)
        reward = np.where(self.ended, 0, reward - self.control_cost * (control**2).sum(axis=1))
        self.ended = self.ended | ~healthy
        return self._obs(), reward, self.ended, np.zeros(self.num_envs, bool), info

    def _judge(self, velocity: np.ndarray):
        """Reward without the cost of control, whether the lane goes on, and info.

        velocity: (B, 2), of the root.
        """
        x_velocity, y_velocity = velocity.T
        qpos = self.state[:, 1:]  # and qvel behind it
        task = self.tasks.T
        healthy = np.ones(self.num_envs, bool)
        if self.env_id == "HalfCheetahDir-v0":
            return task[0] * x_velocity, healthy, {}
        if self.env_id == "HalfCheetahVel-v0":
            return -np.abs(x_velocity - task[0]), healthy, {}
        if self.env_id.endswith("Goal-v0"):
            offset = qpos[:, :2] - self.tasks
            distance = np.linalg.norm(offset, axis=1)
            reward = -np.abs(offset).sum(axis=1) if self.name == "ant" else -distance
            if self.env_id == "AntGoal-v0":
                return reward, healthy, {}
            hit = distance <= 0.8
            sparse = np.where(hit, 1 - distance / 0.8, 0)
            return reward, healthy, {"sparse_reward": sparse, "success": hit}
        if self.name == "walker2d":
            height, pitch = qpos[:, 1], np.abs(qpos[:, 2])
            return x_velocity + 1, (0.8 < height) & (height < 2) & (pitch < 1), {}
        if self.name == "hopper":
            healthy = (0.7 < qpos[:, 1]) & (np.abs(qpos[:, 2]) < 0.2)
            return x_velocity + 1, healthy & (np.abs(qpos[:, 2:]) < 100).all(axis=1), {}
        speed = x_velocity * np.cos(task[0]) + y_velocity * np.sin(task[0])
        height = qpos[:, 2]
        if self.name == "ant":
            bonus = 0.05 if self.env_id == "AntFwdBack-v0" else 1
            return speed + bonus, (0.2 <= height) & (height <= 1), {}
        return 1.25 * speed + 5, (1 <= height) & (height <= 2), {}  # humanoid

    def _obs(self) -> np.ndarray:
        obs = self.state[:, 1 + self.hidden :].copy()
        if self.varies:
            obs[:, -self.model.nv :] = obs[:, -self.model.nv :].clip(-10, 10)
        return obs


class ReacherEnvs(MujocoEnvs):
    """Lanes of an arm of three links, whose goals are around num_modes points.

    tasks: (n, 3) goal and the index of its mode.
    """

    horizon = 50

    def __init__(self, env_id: str, num_envs: int):
        super().__init__(env_id, num_envs)
        self.num_modes = int(env_id[-4])

    def sample_tasks(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """On the diagonal, at the corners of a square or on a hexagon; modes are dealt in turn."""
        mode = (rng.integers(self.num_modes) + np.arange(n)) % self.num_modes
        angle = 2 * np.pi * mode / self.num_modes + (0 if self.num_modes == 6 else np.pi / 4)
        goal = 0.225 * 2**0.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        goal = goal + 0.1 * rng.normal(size=(n, 2))
        radius = np.linalg.norm(goal, axis=1, keepdims=True)
        return np.column_stack([goal * np.minimum(1, 0.3 / radius), mode])  # within reach

    def _judge(self, velocity: np.ndarray):
        reward = -np.abs(self._tip() - self.tasks[:, :2]).sum(axis=1)
        return reward, np.ones(self.num_envs, bool), {}

    def _tip(self) -> np.ndarray:
        """Where the reacher's three links end, (B, 2)."""
        angle = self.state[:, 1:4].cumsum(axis=1)
        return 0.1 * np.stack([np.cos(angle).sum(1), np.sin(angle).sum(1)], axis=1)

    def _obs(self) -> np.ndarray:
        angle, velocity = self.state[:, 1:4], self.state[:, 4:]
        return np.concatenate([np.cos(angle), np.sin(angle), velocity], axis=1)


for name, family in MUJOCO_FAMILIES.items():
    entry_point = ReacherEnvs if family[0] == "reacher" else MujocoEnvs
    gym.register(name, vector_entry_point=entry_point, kwargs={"env_id": name})

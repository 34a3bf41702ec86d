"""The MuJoCo families against gymnasium's v5 environments: same state, same actions, step by step."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

from maml_trpo import make_envs
from mujoco_tasks import MUJOCO_FAMILIES

POSITIONS_AND_VELOCITIES = {
    f"include_{name}_in_observation": False
    for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
}
ANT = {"include_cfrc_ext_in_observation": False}
V5 = {  # the environment whose observations, ends and dynamics a family has
    "HalfCheetahDir-v0": ("HalfCheetah-v5", {}),
    "HalfCheetahVel-v0": ("HalfCheetah-v5", {}),
    "AntDir-v0": ("Ant-v5", ANT),
    "AntGoal-v0": (
        "Ant-v5",
        ANT
        | {"exclude_current_positions_from_observation": False, "terminate_when_unhealthy": False},
    ),
    "HumanoidDir-v0": ("Humanoid-v5", POSITIONS_AND_VELOCITIES),
    "Walker2dRandParams-v0": ("Walker2d-v5", {"xml_file": "walker2d.xml", "frame_skip": 4}),
    "HopperRandParams-v0": ("Hopper-v5", {"frame_skip": 4}),
}
V5["AntFwdBack-v0"] = V5["AntDir-v0"]
V5["SparseAntGoal-v0"] = V5["AntGoal-v0"]
VARIED = ("Walker2dRandParams-v0", "HopperRandParams-v0")


def expected_reward(env_id, task, velocity, position, info):
    """From the formulas of docs/tasks.md; the cost of control from gymnasium, at the family's weight."""
    if env_id == "HalfCheetahDir-v0":
        return task[0] * velocity[0] + 0.5 * info["reward_ctrl"]
    if env_id == "HalfCheetahVel-v0":
        return -abs(velocity[0] - task[0]) + 0.5 * info["reward_ctrl"]
    if env_id == "AntDir-v0":
        return velocity @ [np.cos(task[0]), np.sin(task[0])] + info["reward_ctrl"] + 1
    if env_id == "AntFwdBack-v0":
        return (1 if task[0] == 0 else -1) * velocity[0] + 0.01 * info["reward_ctrl"] + 0.05
    if env_id == "HumanoidDir-v0":
        return 1.25 * velocity @ [np.cos(task[0]), np.sin(task[0])] + info["reward_ctrl"] + 5
    if env_id in VARIED:
        return velocity[0] + info["reward_ctrl"] + 1
    return -np.abs(position - task).sum() + 0.2 * info["reward_ctrl"]


@pytest.fixture(params=MUJOCO_FAMILIES)
def env_id(request):
    return request.param


def actions_shape(envs):
    return (envs.num_envs, *envs.single_action_space.shape)


def drive(envs, tasks, steps=10, seed=3, scale=1.0):
    """Observations, rewards and ends of a few steps of random actions."""
    rng, (obs, _) = np.random.default_rng(seed), envs.reset(seed=seed, options={"task": tasks})
    results = [obs]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = envs.step(
            scale * rng.uniform(-1, 1, actions_shape(envs))
        )
        assert not truncated.any()
        results += [obs, reward, terminated]
    return results


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("env_id", V5)
def test_agrees_with_gymnasium(env_id):
    """Until the reference ends, or for 30 steps; the varied families with a task of their own in the reference."""
    name, settings = V5[env_id]
    envs, rng, lane = make_envs(env_id, 3), np.random.default_rng(0), 1
    tasks = envs.sample_tasks(3, rng)
    obs, _ = envs.reset(seed=1, options={"task": tasks})
    reference = gym.make(name, **settings).unwrapped
    reference.reset(seed=0)
    if env_id in VARIED:
        reference.model.opt.timestep = 0.004
        start = 0
        for array, base in (
            ("body_mass", 1.5),
            ("body_inertia", 1.5),
            ("geom_friction", 1.5),
            ("dof_damping", 1.3),
        ):
            values = getattr(reference.model, array)
            factors = tasks[lane, start : start + values.size].reshape(values.shape)
            assert (factors >= base**-3).all() and (factors <= base**3).all()
            values *= factors
            start += values.size
        assert start == tasks.shape[1]
    nq = reference.model.nq
    reference.set_state(envs.state[lane, 1 : 1 + nq], envs.state[lane, 1 + nq :])
    assert envs.horizon == 200 and reference.dt == pytest.approx(
        {"Hum": 0.015, "Wal": 0.016, "Hop": 0.016}.get(env_id[:3], 0.05)
    )
    low, high = reference.action_space.low, reference.action_space.high
    compared = 0
    while compared < 30:
        compared += 1
        actions, before = rng.uniform(-1, 1, actions_shape(envs)), reference.data.qpos[:2].copy()
        expected_obs, _, expected_end, _, info = reference.step(
            low + (actions[lane] + 1) / 2 * (high - low)
        )
        obs, reward, terminated, _, _ = envs.step(actions)
        velocity = (reference.data.qpos[:2] - before) / reference.dt
        expected = expected_reward(env_id, tasks[lane], velocity, reference.data.qpos[:2], info)
        np.testing.assert_allclose(obs[lane], expected_obs, rtol=0, atol=1e-5)
        assert reward[lane] == pytest.approx(expected, abs=1e-5)
        assert terminated[lane] == expected_end
        if expected_end:
            break
    assert compared >= 10


@pytest.mark.parametrize("env_id", V5)
def test_ends_where_gymnasium_does(env_id):
    """Healthy or not, on the edge of each range, in one step without forces."""
    name, settings = V5[env_id]
    reference, envs = gym.make(name, **settings).unwrapped, make_envs(env_id, 40)
    tasks = envs.sample_tasks(40, np.random.default_rng(0))
    if env_id in VARIED:
        tasks[:], reference.model.opt.timestep = 1, 0.004
    envs.reset(seed=0, options={"task": tasks})
    reference.reset(seed=0)
    nq, root = reference.model.nq, 2 if reference.model.nq > 9 else 1
    envs.state[:, 1 + root] = np.linspace(0.1, 2.1, 40)  # height
    if nq <= 9:
        envs.state[20:, 1 + root], envs.state[20:, 2 + root] = (
            1.25,
            np.linspace(-1.2, 1.2, 20),
        )  # pitch
    starts = envs.state.copy()
    _, _, terminated, _, _ = envs.step(np.zeros(actions_shape(envs)))
    expected = []
    for start in starts:
        reference.set_state(start[1 : 1 + nq], start[1 + nq :])
        expected.append(reference.step(np.zeros(envs.single_action_space.shape))[2])
    assert terminated.tolist() == expected
    assert (0 < sum(expected) < 40) == (
        env_id not in ("HalfCheetahDir-v0", "HalfCheetahVel-v0", "AntGoal-v0", "SparseAntGoal-v0")
    )


OWN = {  # observations and reward of models that are not gymnasium's, from MuJoCo's own arrays
    "MultimodalReacher4-v0": (
        lambda data: [np.cos(data.qpos), np.sin(data.qpos), data.qvel],
        lambda data, goal: (
            -np.abs(data.site("tip").xpos[:2] - goal).sum() - 0.1 * data.ctrl @ data.ctrl
        ),
    ),
    "SparseWheeledGoal-v0": (
        lambda data: [data.qpos, data.qvel],
        lambda data, goal: (
            -np.linalg.norm(data.body("car").xpos[:2] - goal) - 0.05 * data.ctrl @ data.ctrl
        ),
    ),
}


@pytest.mark.parametrize("env_id", OWN)
def test_models_of_our_own(env_id):
    """A lane against MuJoCo itself, stepped by hand, and what its model says of places."""
    import mujoco

    envs = make_envs(env_id, 3)
    obs_of, reward_of = OWN[env_id]
    rng = np.random.default_rng(0)
    tasks = envs.sample_tasks(3, rng)
    envs.reset(seed=1, options={"task": tasks})
    data = mujoco.MjData(envs.model)
    nq = envs.model.nq
    data.qpos[:], data.qvel[:] = envs.state[1, 1 : 1 + nq], envs.state[1, 1 + nq :]
    for _ in range(30):
        actions = rng.uniform(-1.5, 1.5, actions_shape(envs))
        obs, reward, terminated, truncated, _ = envs.step(actions)
        data.ctrl[:] = actions[1].clip(-1, 1) * envs.model.actuator_ctrlrange[:, 1]
        mujoco.mj_step(envs.model, data, envs.frame_skip)
        np.testing.assert_allclose(obs[1], np.concatenate(obs_of(data)), rtol=0, atol=1e-5)
        mujoco.mj_kinematics(envs.model, data)
        assert reward[1] == pytest.approx(reward_of(data, tasks[1, :2]), abs=1e-5)
        assert not (terminated | truncated).any()


def test_the_wheeled_robot_drives_and_turns():
    """Full throttle: 6 m in its 2 s, as the original's; one wheel alone turns it away from that side."""
    envs = make_envs("SparseWheeledGoal-v0", 3)
    envs.reset(seed=0, options={"task": envs.sample_tasks(3, np.random.default_rng(0))})
    assert envs.horizon * envs.model.opt.timestep == 2
    for _ in range(envs.horizon):
        obs = envs.step(np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))[0]
    assert obs[0, 0] == pytest.approx(6.25, abs=0.3) and abs(obs[0, 3]) < 0.1
    assert obs[1, 3] < -1 and obs[2, 3] > 1  # yaw


def test_modes_of_the_reacher():
    """Dealt in turn, around the points that docs/tasks.md names, within the arm's reach."""
    for modes in (2, 4, 6):
        envs = make_envs(f"MultimodalReacher{modes}-v0", 1)
        tasks = envs.sample_tasks(1000, np.random.default_rng(0))
        mode = tasks[:, 2].astype(int)
        assert envs.num_modes == modes and (np.diff(mode) % modes == 1).all()
        assert np.linalg.norm(tasks[:, :2], axis=1).max() <= 0.3 + 1e-9
        angle = np.arctan2(tasks[:, 1], tasks[:, 0])
        centre = np.deg2rad({2: [45, 225], 4: [45, 135, 225, 315], 6: range(0, 360, 60)}[modes])
        off = (angle - np.array(centre)[mode] + np.pi) % (2 * np.pi) - np.pi
        sums = [off[mode == m].mean() for m in range(modes)]
        assert np.abs(sums).max() < 0.1 and 0.2 < off.std() < 0.5


def test_threads_do_not_matter(env_id):
    """One thread or two give the same bits."""
    make = gym.spec(env_id).vector_entry_point
    envs = make(env_id, 6)
    tasks = envs.sample_tasks(6, np.random.default_rng(0))
    expected = drive(envs, tasks)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    two = make(env_id, 6)
    torch.set_num_threads(threads)
    assert len(two.data) == 2 and same(drive(two, tasks), expected)


def test_a_task_leaves_nothing_behind(env_id):
    """Tasks A, B, A: the second A is the first, and B is another."""
    envs = make_envs(env_id, 4)
    a, b = (envs.sample_tasks(4, np.random.default_rng(i)) for i in (0, 1))
    if env_id in ("HalfCheetahDir-v0", "AntFwdBack-v0"):
        b = a[::-1]  # the other one of two
    first, other, again = drive(envs, a), drive(envs, b), drive(envs, a)
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("env_id", ["AntDir-v0", "HumanoidDir-v0", *VARIED])
def test_ended_lanes_stay(env_id):
    """A lane that is too high, or leans too far, ends; it stays where it is and pays nothing, and the others go on,
    until none is left."""
    envs = make_envs(env_id, 4)
    envs.reset(seed=0, options={"task": envs.sample_tasks(4, np.random.default_rng(0))})
    envs.state[0, 3] = 1.5 if env_id in VARIED else 5
    obs, reward, terminated, _, _ = envs.step(np.zeros(actions_shape(envs)))
    assert terminated.tolist() == [True, False, False, False] and reward[0] != 0
    later, reward, terminated, _, _ = envs.step(np.ones(actions_shape(envs)))
    assert reward[0] == 0 and (reward[1:] != 0).all() and terminated[0]
    np.testing.assert_array_equal(later[0], obs[0])
    assert (later[1:] != obs[1:]).any(axis=1).all()
    envs.ended[:] = True
    last, reward, *_ = envs.step(np.ones(actions_shape(envs)))
    assert np.array_equal(last, later) and not reward.any()


@pytest.mark.parametrize("env_id", ["SparseAntGoal-v0", "SparseWheeledGoal-v0"])
def test_sparse_goals(env_id):
    """Sparse reward and success on the disc of radius 0.8 around the goal, and there alone."""
    envs = make_envs(env_id, 3)
    tasks = envs.sample_tasks(3, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(tasks, axis=1), 2)
    assert (tasks[:, 1] > 0).all()
    envs.reset(seed=0, options={"task": tasks})
    envs.state[:2, 1:3] = tasks[:2] + np.array([[0, 0], [0.4, 0.4]])
    _, _, _, _, info = envs.step(np.zeros(actions_shape(envs)))
    distance = np.linalg.norm(envs.state[:, 1:3] - tasks, axis=1)
    assert info["success"].tolist() == [True, True, False]
    np.testing.assert_allclose(
        info["sparse_reward"], np.where(distance < 0.8, 1 - distance / 0.8, 0)
    )


def test_task_distributions():
    draw = {
        env_id: make_envs(env_id, 1).sample_tasks(2000, np.random.default_rng(0))
        for env_id in MUJOCO_FAMILIES
    }
    assert draw["HalfCheetahDir-v0"][:3, 0].tolist() == [1, -1, 1]
    assert draw["AntFwdBack-v0"][:3, 0].tolist() == [0, np.pi, 0]
    velocity = draw["HalfCheetahVel-v0"]
    assert 0 <= velocity.min() < 0.01 and 2.99 < velocity.max() <= 3
    for env_id in ("AntDir-v0", "HumanoidDir-v0"):
        assert 0 <= draw[env_id].min() < 0.02 and 6.26 < draw[env_id].max() <= 2 * np.pi
    radius = np.linalg.norm(draw["AntGoal-v0"], axis=1)
    assert radius.max() <= 3 and np.mean(radius < 1.5) == pytest.approx(
        0.25, abs=0.04
    )  # uniform on the disc
    assert (
        draw["Walker2dRandParams-v0"].shape[1] == 65 and draw["HopperRandParams-v0"].shape[1] == 41
    )


def test_what_is_missing_is_named(monkeypatch):
    """The file, or the package that it needs."""
    make_envs.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mujoco", None)
        with pytest.raises(
            SystemExit, match=r"^error: no tasks HalfCheetahVel-v0: .*pip install mujoco$"
        ):
            make_envs("HalfCheetahVel-v0")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "mujoco_tasks")
    line = r"^error: no tasks HalfCheetahVel-v0: .* mujoco_tasks.py beside the script$"
    with pytest.raises(SystemExit, match=line):
        make_envs("HalfCheetahVel-v0")

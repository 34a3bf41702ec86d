"""The shared block `tasks`: families against their formulas and known returns, user environments, rollouts."""

import importlib
import math
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import user_tasks
from conftest import LEAST, OWN, SCRIPTS, TINY, load, one_for_all, tiny, two_rollouts
from gymnasium.spaces import Box
from user_tasks import Ragged

import maml_trpo
from maml_trpo import POINT_FAMILIES, Args, episode_scores, make_envs, make_tasks, rollout

FRESH = [
    name for name in ("maml_trpo", "rl2", "mmaml") if name in SCRIPTS
]  # the scripts that can draw new tasks in every iteration


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(Ragged, "made", [])


def begin(envs, tasks):
    """The observations after a reset, by draws that are not those of the tasks: starts would equal goals."""
    generator = torch.Generator().manual_seed(99)
    obs, _ = envs.reset(options={"task": torch.as_tensor(tasks), "generator": generator})
    return obs.numpy()


def play(envs, tasks, act):
    """One episode of a family on the device, in numpy; act: (obs, t) -> actions. Yields what each step returned,
    after the observation before it."""
    obs = begin(envs, tasks)
    for t in range(envs.horizon):
        before = obs.copy()
        told = envs.step(torch.as_tensor(act(before, t)))
        obs, reward, terminated, _ = (x.numpy() for x in told[:4])
        yield before, obs, reward, terminated, {name: x.numpy() for name, x in told[4].items()}


def make(env_id, n, seed=0):
    envs = make_envs(env_id, n)
    return envs, envs.sample_tasks(n, np.random.default_rng(seed))


# --------------------------------------------------------------------------------------------------- the point families


@pytest.mark.parametrize("env_id", POINT_FAMILIES)
def test_rewards_and_moves_follow_the_formulas(env_id):
    envs, tasks = make(env_id, 50)
    rng, given, ended, hits = np.random.default_rng(1), [], np.zeros(50, bool), 0

    def act(obs, t):  # both ways leave [-1, 1]: 1 is the most, and pushes by 0.1
        given.append(rng.normal(scale=2, size=(50, 2)) if t < 4 else to_goal(obs[:, :2], tasks))
        return given[-1]

    for before, obs, reward, terminated, info in play(envs, tasks, act):
        distance = np.sqrt((obs[:, 0] - tasks[:, 0]) ** 2 + (obs[:, 1] - tasks[:, 1]) ** 2)
        push = 0.1 * np.clip(given[-1], -1, 1)
        if env_id.startswith("Multimodal"):
            velocity = before[:, 2:] + push
            expected = np.hstack([before[:, :2] + velocity, velocity])
        else:
            expected = np.where(ended[:, None], before, before + push)
        np.testing.assert_allclose(obs, expected, atol=1e-12)
        np.testing.assert_allclose(reward, np.where(ended, 0, -distance), atol=1e-12)
        if env_id == "Navigation2D-v0":
            ended |= (abs(obs[:, 0] - tasks[:, 0]) < 0.01) & (abs(obs[:, 1] - tasks[:, 1]) < 0.01)
        assert (terminated == ended).all()
        if env_id == "SparsePointRobot-v0":
            np.testing.assert_allclose(
                info["sparse_reward"], (distance <= 0.2) * (1 - distance), atol=1e-12
            )
            assert (info["success"] == (distance <= 0.2)).all()
            hits += info["success"].sum()
        else:
            assert not info
    assert hits or env_id != "SparsePointRobot-v0"
    assert ended.any() or env_id != "Navigation2D-v0"


def still(obs, tasks):
    return np.zeros((len(obs), 2))


def to_goal(obs, tasks):
    return (tasks[:, :2] - obs) / 0.1


def to_centre(obs, tasks):
    return -obs / 0.1


def brake(obs, tasks):
    return -obs[:, 2:] / 0.1


@pytest.mark.parametrize(
    "env_id, act, known, tolerance",  # tolerances: about three standard errors
    [
        ("Navigation2D-v0", still, -38.26, 0.7),
        ("Navigation2D-v0", to_goal, -0.51, 0.02),
        ("PointRobot-v0", to_goal, -5.2, 0.25),
        ("PointRobot-v0", to_centre, -15.8, 0.3),
        ("SparsePointRobot-v0", still, -20, 1e-9),
        ("SparsePointRobot-v0", to_goal, -3.83, 0.03),
        ("MultimodalNavigation1-v0", brake, -715, 5),
        ("MultimodalNavigation2-v0", brake, -716, 5),
        ("MultimodalNavigation4-v0", brake, -715, 5),
        ("MultimodalNavigation6-v0", brake, -510, 5),
    ],
)
def test_known_returns(env_id, act, known, tolerance):
    envs, tasks = make(env_id, 4000)
    steps = list(play(envs, tasks, lambda obs, t: act(obs, tasks)))
    assert sum(step[2] for step in steps).mean() == pytest.approx(known, abs=tolerance)
    if env_id == "SparsePointRobot-v0":
        sparse = sum(step[4]["sparse_reward"] for step in steps).mean()
        assert sparse == pytest.approx(13.36 if act is to_goal else 0, abs=0.04)
    if env_id == "Navigation2D-v0":
        assert steps[10][3].all() == (
            act is to_goal
        )  # 0.5 at 0.1 a step, and the last bit in one more


@pytest.mark.parametrize(
    "env_id, start", [("PointRobot-v0", 1), ("Navigation2D-v0", 0), ("SparsePointRobot-v0", 0)]
)
def test_starts(env_id, start):
    envs, tasks = make(env_id, 1000)
    obs = begin(envs, tasks)
    assert abs(obs).max() == pytest.approx(start, abs=0.01)
    assert obs.std(0) == pytest.approx(start / 3**0.5, abs=0.05)


def test_multimodal_starts():
    envs, tasks = make("MultimodalNavigation4-v0", 1000)
    obs = begin(envs, tasks)
    assert abs(obs).max(0) == pytest.approx([0.2, 0.2, 0.1, 0.1], abs=0.01)
    assert obs.std(0) == pytest.approx(np.array([0.2, 0.2, 0.1, 0.1]) / 3**0.5, abs=0.01)


def test_goals():
    for env_id, size in (("PointRobot-v0", 1), ("Navigation2D-v0", 0.5)):
        goals = make(env_id, 2000)[1]
        assert abs(goals).max() == pytest.approx(size, abs=0.01)
        assert goals.std(0) == pytest.approx(size / 3**0.5, abs=0.05)
    x, y = make("SparsePointRobot-v0", 2000)[1].T
    np.testing.assert_allclose(np.hypot(x, y), 1)
    angles = np.sort(np.arctan2(y, x))
    assert angles == pytest.approx(np.linspace(0, np.pi, 2000), abs=0.1)  # uniform


CORNERS = {1: [(5, 5)], 2: [(5, 5), (-5, -5)], 4: [(5, 5), (-5, 5), (-5, -5), (5, -5)]}
CORNERS[6] = [(5 * np.cos(k * np.pi / 3), 5 * np.sin(k * np.pi / 3)) for k in range(6)]


@pytest.mark.parametrize("modes", [1, 2, 4, 6])
def test_modes(modes):
    envs, tasks = make(f"MultimodalNavigation{modes}-v0", 6000)
    assert envs.num_modes == modes
    for mode, centre in enumerate(CORNERS[modes]):
        goals = tasks[tasks[:, 2] == mode, :2]
        assert len(goals) == 6000 / modes
        assert goals.mean(0) == pytest.approx(centre, abs=3 / len(goals) ** 0.5)
        assert goals.std(0) == pytest.approx([1, 1], abs=3 / (2 * len(goals)) ** 0.5)
    assert (np.diff(tasks[:, 2]) % modes == 1 % modes).all()  # dealt in turn
    firsts = {make(f"MultimodalNavigation{modes}-v0", 1, seed)[1][0, 2] for seed in range(60)}
    assert firsts == set(
        range(modes)
    )  # but not always from the first mode on: a draw of one task is fair too


def test_a_lane_that_has_ended_stays_put():
    envs, tasks = make("Navigation2D-v0", 20)
    ended, seen = np.zeros(20, bool), 0
    for before, obs, reward, terminated, _ in play(
        envs, tasks, lambda obs, t: to_goal(obs, tasks) if t < 8 else 1 + 0 * obs
    ):
        assert (
            (obs[ended] == before[ended]).all()
            and (reward[ended] == 0).all()
            and terminated[ended].all()
        )
        ended, seen = terminated, seen + ended.sum()
    assert seen > 500


# ------------------------------------------------------------------------------------------------------------- rollouts


def roll(env_id, tasks, act, horizon):
    """One episode in each task, without an axis of episodes; act: (obs (N, O), t) -> actions."""
    steps = iter(range(horizon))

    def callback(params, obs, noise):
        return act(obs[:, 0], next(steps)).unsqueeze(1)

    args = Args(env_id=env_id, horizon=horizon)
    batch = rollout(callback, {}, tasks, 1, ("test", 2), args)
    return {name: x[:, 0] for name, x in batch.items()}


def point_rollout(envs, tasks, horizon=30):
    """Straight to the goal, from t = 3 on."""
    goals = torch.as_tensor(tasks[:, :2], dtype=torch.get_default_dtype())
    return roll(envs.env_id, tasks, lambda obs, t: (goals - obs) / 0.1 * (t > 2), horizon)


def test_rollout_masks_what_follows_an_end():
    envs, tasks = make("Navigation2D-v0", 20)
    batch = point_rollout(envs, tasks)
    length = batch["mask"].sum(1).int()
    longest = length.max()
    assert 3 < length.min() < longest < 10
    assert {name: x.shape[:2] for name, x in batch.items()} == dict.fromkeys(batch, (20, longest))
    assert batch.keys() == {
        "obs",
        "next_obs",
        "actions",
        "rewards",
        "dense_rewards",
        "terminated",
        "mask",
    }
    assert batch["obs"].shape == batch["next_obs"].shape == batch["actions"].shape
    assert {x.dtype for x in batch.values()} == {torch.get_default_dtype()}
    goals = torch.as_tensor(tasks, dtype=torch.get_default_dtype())
    for lane, n in enumerate(length):
        assert (batch["mask"][lane] == (torch.arange(longest) < n)).all()
        assert all((x[lane, n:] == 0).all() for x in batch.values())
        ends = torch.cat(
            [batch["obs"][lane, 1:n], goals[lane : lane + 1]]
        )  # the reward belongs to the next position
        distances = (ends - goals[lane]).norm(dim=1)[:-1]
        torch.testing.assert_close(batch["rewards"][lane, : n - 1], -distances)
        assert torch.equal(batch["next_obs"][lane, : n - 1], batch["obs"][lane, 1:n])
        ends = batch["next_obs"][lane, n - 1]  # of the step that ended the episode, if one did
        assert (
            batch["terminated"][lane].sum() == (n < 10) == ((ends - goals[lane]).abs() < 0.01).all()
        )
        assert batch["terminated"][lane, n - 1] == (n < 10)


def test_rollout_ignores_what_a_lane_reports_after_its_end(monkeypatch):
    envs, tasks = make("Navigation2D-v0", 20)
    step = envs.step

    def careless(actions):
        obs, reward, terminated, truncated, _ = step(actions)
        paid = torch.ones_like(reward)
        return obs, paid, terminated & (reward != 0), truncated, {"success": paid > 0}

    monkeypatch.setattr(envs, "step", careless)
    batch = point_rollout(envs, tasks)
    assert 0 < batch["mask"].mean() < 1
    assert torch.equal(batch["rewards"], batch["mask"]) and torch.equal(
        batch["success"], batch["mask"]
    )


def test_rollout_ends_at_the_horizon():
    envs, tasks = make("SparsePointRobot-v0", 4)
    batch = point_rollout(envs, tasks, horizon=15)
    assert all(x.shape[:2] == (4, 15) for x in batch.values()) and (batch["mask"] == 1).all()
    assert batch.keys() >= {"sparse_rewards", "success"} and (batch["terminated"] == 0).all()
    batch = {name: x.unflatten(0, (2, 2)) for name, x in batch.items()}
    scores = episode_scores(batch)
    torch.testing.assert_close(scores["return"], batch["rewards"].sum(2).mean(1))
    assert (scores["success"] == 1).all()
    worse = batch | {"rewards": batch["rewards"] - 1, "success": 0 * batch["success"]}
    both = episode_scores(worse, batch)
    assert both.keys() == {"return", "success", "sampled_return", "sampled_success"}
    assert torch.equal(both["return"], scores["return"])
    torch.testing.assert_close(both["sampled_return"], scores["return"] - 15)


def record_tasks(envs_class, monkeypatch):
    """A set that receives every task which a lane is reset to."""
    met, reset = set(), envs_class.reset

    def recorded(envs, *, seed=None, options=None):
        met.update(map(tuple, options["task"].tolist()))
        return reset(envs, seed=seed, options=options)

    monkeypatch.setattr(envs_class, "reset", recorded)
    return met


def test_tasks_come_from_the_task_seed_alone(script, train, monkeypatch):
    met, envs = record_tasks(script.PointEnvs, monkeypatch), make_envs("PointRobot-v0")
    for task_seed, seed in ((3, 1), (4, 2)):
        train_tasks, test_tasks = (
            envs.sample_tasks(n, np.random.default_rng([task_seed, k])) for k, n in ((0, 6), (1, 7))
        )
        met.clear()
        train(
            script,
            task_seed=task_seed,
            seed=seed,
            num_train_tasks=6,
            num_test_tasks=7,
            total_timesteps=6 * 160,
        )
        drawn = np.concatenate([train_tasks, test_tasks]).astype(np.float32)
        assert met == set(map(tuple, drawn.tolist()))  # each of them, and no others


@pytest.mark.parametrize("name", FRESH)
def test_fresh_tasks_in_every_iteration(name, train, monkeypatch):
    script = importlib.import_module(name)
    met, runs = record_tasks(script.PointEnvs, monkeypatch), []
    for seed in (1, 2):
        met.clear()
        train(script, seed=seed, total_timesteps=3 * 160)
        runs.append(met.copy())
    assert runs[0] == runs[1]  # whatever the seed
    assert len(runs[0]) == 3 * {**TINY, **OWN[name]}["meta_batch_size"] + TINY["num_test_tasks"]


# ---------------------------------------------------------------------------------------------------- user environments


def user_rollout(env_id, n=6, value=0.0):
    """(envs, tasks, batch), the same number in every entry of every action."""
    envs, tasks = make(env_id, n)
    discrete = isinstance(envs.single_action_space, gym.spaces.Discrete)
    shape = (n,) if discrete else (n, *envs.single_action_space.shape)
    return envs, tasks, roll(env_id, tasks, lambda obs, t: torch.full(shape, value), 12)


def test_user_episodes_end_each_at_its_own_step():
    envs, tasks, batch = user_rollout("user_tasks:Asymmetric-v0")
    assert len(set(tasks[:, 0])) > 2  # lengths
    assert batch["mask"].sum(1).tolist() == tasks[:, 0].tolist()
    for lane, env in enumerate(envs.envs):
        n = int(tasks[lane, 0])
        assert len(env.unwrapped.given) == n  # the environment itself refuses to be stepped on
        assert all((x[lane, n:] == 0).all() for x in batch.values())
        steps = torch.arange(batch["mask"].shape[1])
        torch.testing.assert_close(batch["obs"][lane, :n, 2], steps[:n] / 10)
        # both are reported at some steps only
        assert batch["success"][lane].tolist() == (steps == n - 1).tolist()
        assert batch["sparse_rewards"][lane].tolist() == ((steps % 2 == 0) & (steps < n)).tolist()
    obs, reward, terminated, truncated, _ = envs.step(np.zeros((6, 2)))  # all have ended
    assert terminated.all() and not truncated.any() and (reward == 0).all()
    assert obs[:, 2].tolist() == pytest.approx((tasks[:, 0] / 10).tolist())


def test_a_time_limit_ends_an_episode_too():
    envs, tasks, batch = user_rollout("user_tasks:Truncated-v0")
    assert (
        envs.horizon == 4 and batch["mask"].sum(1).tolist() == np.minimum(tasks[:, 0], 4).tolist()
    )
    envs.step(np.zeros((6, 2)))  # all have ended, and none of them is stepped
    assert [len(env.unwrapped.given) for env in envs.envs] == np.minimum(tasks[:, 0], 4).tolist()
    assert min(tasks[:, 0]) < 4 < max(tasks[:, 0])


@pytest.mark.parametrize(
    "value, native", [(-1, [-2, 0]), (0, [-0.5, 2.5]), (1, [1, 5]), (-7, [-2, 0]), (3, [1, 5])]
)
def test_asymmetric_bounds(value, native):
    envs, tasks, batch = user_rollout("user_tasks:Asymmetric-v0", value=value)
    given = envs.envs[0].unwrapped.given[0]
    assert given.tolist() == native and given.dtype == np.float32
    torch.testing.assert_close(batch["rewards"][0, 0].item(), -np.abs(native - tasks[0, 1]).mean())
    assert (envs.single_action_space.low == -1).all() and (envs.single_action_space.high == 1).all()


def test_action_spaces():
    envs, _, _ = user_rollout("user_tasks:Matrix-v0", value=0.5)
    assert envs.single_action_space.shape == (4,)
    assert envs.envs[0].unwrapped.given[0].tolist() == [[2, 2], [2, 2]]  # the box is [-1, 3]
    envs, _ = make("user_tasks:Matrix-v0", 2)
    envs.reset(seed=0, options={"task": np.array([[5, 0], [5, 0]])})
    envs.step(np.array([[-1, 0, 1, 0.5], [1, 0, -1, 0.5]]))
    assert [env.unwrapped.given[0].tolist() for env in envs.envs] == [
        [[-1, 1], [3, 2]],
        [[3, 1], [-1, 2]],
    ]
    envs, _, _ = user_rollout("user_tasks:Unbounded-v0", value=0.5)
    assert envs.envs[0].unwrapped.given[0].tolist() == [0.5, 0.5]  # nothing to map to
    for index in (0, 2):
        envs, _, batch = user_rollout("user_tasks:Discrete-v0", value=index)
        assert envs.single_action_space.n == 3 and batch["actions"].shape == batch["mask"].shape
        assert set(envs.envs[0].unwrapped.given) == {3 + index}
    with pytest.raises(SystemExit, match="error: user_tasks:Binary-v0 has actions MultiBinary"):
        make_envs("user_tasks:Binary-v0", 1)


def test_dict_observations_are_flattened():
    envs, _, batch = user_rollout("user_tasks:Dict-v0")
    assert envs.single_observation_space.shape == (3,)
    env = envs.envs[0].unwrapped
    parts = {"place": env.place, "clock": np.zeros(1)}
    np.testing.assert_allclose(
        batch["obs"][0, 0], gym.spaces.flatten(env.observation_space, parts), rtol=1e-6
    )


def test_user_environments_are_seeded():
    made = []
    for seed in (0, 0, 1):
        make_envs.cache_clear()
        made.append(make("user_tasks:Asymmetric-v0", 6, seed))
    (one, tasks), (two, same_tasks), (_, others) = made
    assert (tasks == same_tasks).all() and (tasks != others)[:, 1].all()
    starts = [
        envs.reset(seed=seed, options={"task": tasks})[0]
        for envs, seed in ((one, 5), (two, 5), (one, 6))
    ]
    assert (starts[0] == starts[1]).all() and (starts[0] != starts[2])[:, :2].all()
    assert len(np.unique(starts[0][:, 0])) == 6  # every lane has a seed of its own
    assert None not in [seed for env in Ragged.made for seed in env.seeds]


@one_for_all
def test_held_out_tasks_of_its_own(script, train, monkeypatch):
    met = record_tasks(script.UserEnvs, monkeypatch)
    for env_id, held_out in (
        ("user_tasks:Split-v0", TINY["num_test_tasks"]),
        ("user_tasks:Asymmetric-v0", 0),
    ):
        met.clear()
        train(script, env_id=env_id, num_train_tasks=6)
        assert (
            sum(target > 90 for _, target in met) == held_out
            and len(met) == 6 + TINY["num_test_tasks"]
        )


NO_ROWS = [np.zeros((3, 2)), np.full((5, 2), "a"), [{"goal": 1}] * 5, [], None, {"a": 1}, 3.0]
NO_ROWS += [
    pytest.param((x for x in range(5)), id="generator"),
    [[1, 2], [1]] + [[1, 2]] * 3,
    np.zeros((5, 0)),
    np.zeros((5, 2)) * 1j,
]


@pytest.mark.parametrize("tasks", NO_ROWS, ids=str)
def test_tasks_must_be_rows_of_numbers(monkeypatch, tasks):
    monkeypatch.setattr(Ragged, "sample_tasks", lambda env, n: tasks)
    line = r"^error: user_tasks:Asymmetric-v0: .*must return 5 rows of finite numbers, not "
    with pytest.raises(SystemExit, match=line):
        make("user_tasks:Asymmetric-v0", 5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tasks_must_be_finite(monkeypatch, value):
    monkeypatch.setattr(Ragged, "sample_tasks", lambda env, n: np.full((n, 2), value))
    with pytest.raises(
        SystemExit, match=r"^error: user_tasks:Asymmetric-v0: .*5 rows of finite numbers, not array"
    ):
        make("user_tasks:Asymmetric-v0", 5)


SPACES = {
    "Sequence": gym.spaces.Sequence(gym.spaces.Discrete(3)),
    "Graph": gym.spaces.Graph(gym.spaces.Box(-1, 1, (2,)), None),
    "None": None,
}


@pytest.mark.parametrize("name", SPACES)
def test_observations_that_no_vector_holds(monkeypatch, name):
    make_one = Ragged.__init__

    def init(env, **settings):
        make_one(env, **settings)
        env.observation_space = SPACES[name]

    monkeypatch.setattr(Ragged, "__init__", init)
    with pytest.raises(SystemExit, match=rf"^error: user_tasks:Asymmetric-v0 has obs.*{name}"):
        make_envs("user_tasks:Asymmetric-v0", 2)


INF, BIG = np.inf, np.finfo(np.float32).max
BOUNDS = {  # space: actions of the agent, and what they are there
    "Half": (Box(0, INF, (1,), np.float32), {-3: 0, 0.5: 0.5, 7: 7}),
    "HalfUp": (Box(-INF, -2, (1,), np.float32), {-7: -7, 0: -2}),
    "Finfo": (Box(-BIG, BIG, (1,), np.float32), {-7: -7, 0.5: 0.5}),
    "Constant": (Box(1, 1, (1,), np.float32), {-1: 1, 0: 1, 9: 1}),
    "Whole": (Box(0, 4, (1,), np.int64), {-1: 0, -0.61: 0, -0.59: 1, 0: 2, 0.59: 3, 0.61: 4, 1: 4}),
    "Bytes": (Box(0, 255, (1,), np.uint8), {-9: 0, 0: 128, 1: 255}),
    "Bits": (Box(0, 1, (1,), bool), {-0.1: 0, 0.1: 1}),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_actions(monkeypatch, name):
    """The environment asserts that they are in its space."""
    space, actions = BOUNDS[name]
    monkeypatch.setitem(user_tasks.ACTIONS, "unbounded", space)
    envs, _ = make("user_tasks:Unbounded-v0", len(actions))
    envs.reset(seed=0, options={"task": np.full((len(actions), 2), 5.0)})
    envs.step(np.array([*actions], float)[:, None])
    given = [env.unwrapped.given[0] for env in envs.envs]
    assert [x.item() for x in given] == pytest.approx([*actions.values()])
    assert {x.dtype for x in given} == {space.dtype}


def test_bounds_are_of_each_dimension(monkeypatch):
    space = Box(np.array([0, -INF], np.float32), np.array([10, INF], np.float32))
    monkeypatch.setitem(user_tasks.ACTIONS, "unbounded", space)
    envs, _ = make("user_tasks:Unbounded-v0", 1)
    envs.reset(seed=0, options={"task": np.full((1, 2), 5.0)})
    envs.step(np.array([[0.5, 0.5]]))
    assert envs.envs[0].unwrapped.given[0].tolist() == [7.5, 0.5]
    assert envs.to_native(np.array([[0.5, 0.5]]))[0].tolist() == [7.5, 0.5]


class Wind(gym.Wrapper):
    """Tasks from outside, by a wrapper; its reset needs the task that was set."""

    def sample_tasks(self, n):
        return self.np_random.uniform(-1, 1, (n, 1))

    def set_task(self, task):
        self.wind = task

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return obs + self.wind, info


class Place(gym.Env):
    observation_space = Box(-INF, INF, (1,), np.float64)
    action_space = Box(-1, 1, (1,), np.float64)
    closed = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1), {}

    def step(self, action):
        return np.zeros(1), 0.0, False, False, {}

    def close(self):
        Place.closed += 1


gym.register("Wind-v0", lambda: Wind(Place()), max_episode_steps=3)


@one_for_all
def test_tasks_of_a_wrapper(script, train):
    envs, tasks = make("Wind-v0", 3)
    assert len(np.unique(tasks)) == 3
    assert np.array_equal(tasks, make("Wind-v0", 3)[1])
    assert np.array_equal(envs.reset(seed=0, options={"task": tasks})[0], tasks)
    train(script, env_id="Wind-v0", horizon=0, total_timesteps=2 * 160)


def test_environments_are_closed(monkeypatch):
    """At the end of the process, after an error too."""
    at_exit = []
    monkeypatch.setattr(maml_trpo.atexit, "register", at_exit.append)
    make("Wind-v0", 4)
    before = Place.closed
    for call in at_exit:
        call()
    assert Place.closed == before + 4


def test_pictures_are_refused(monkeypatch):
    monkeypatch.setitem(user_tasks.OBSERVATIONS, "flat", Box(0, 255, (64, 64, 3), np.uint8))
    with pytest.raises(SystemExit, match=r"has observations .* vectors are supported"):
        make_envs("user_tasks:Asymmetric-v0", 1)


@pytest.mark.parametrize(
    "method, returned, message",
    [
        ("step", (np.zeros(3), 1.0, False, {}), "step must return .*expected 5"),
        ("step", (np.zeros(3), 1.0, False, False, None), "step must return .* a dictionary"),
        ("step", (np.zeros(3), 1.0, None, False, {}), "step returned terminated None"),
        ("step", (np.zeros(3), 1.0, False, False, {"success": "yes"}), "step returned success"),
        ("reset", np.zeros(3), "reset must return obs and info, not array"),
    ],
)
def test_results_of_another_form(monkeypatch, train, method, returned, message):
    """One line before many lanes are made."""
    monkeypatch.setattr(Ragged, method, lambda env, *args, **kwargs: returned)
    with pytest.raises(SystemExit, match=f"^error: user_tasks:Asymmetric-v0: {message}"):
        train(maml_trpo, env_id="user_tasks:Asymmetric-v0")
    assert len(Ragged.made) == 1


def test_errors_of_an_environment_keep_their_traceback(monkeypatch, train):
    """Also those that look like ours."""

    def fails(env, action):
        return [].item

    monkeypatch.setattr(Ragged, "step", fails)
    with pytest.raises(AttributeError, match="item"):
        train(maml_trpo, env_id="user_tasks:Asymmetric-v0")


for limit in (12, 100_000):
    gym.register(f"Limit{limit}-v0", Ragged, max_episode_steps=limit)


def test_a_time_limit_that_is_not_reached_costs_nothing(train, script):
    """Episodes of ten steps at most, under a limit of a hundred thousand."""
    flags = {"horizon": 0, "total_timesteps": LEAST[script.__name__]}
    if script.__name__ == "pearl":
        flags |= {"replay_size": 0, "episodes_per_task": 1, "total_timesteps": 4001}
    lengths = []
    for limit in (12, 100_000):
        _, metrics = train(script, env_id=f"Limit{limit}-v0", **flags)
        lengths.append(metrics["charts/episodic_length"])
    assert lengths[0] == pytest.approx(lengths[1], abs=2)


@pytest.mark.parametrize("obs", [None, "abc", np.zeros(4), {"place": np.zeros(3)}, 1.0], ids=str)
@pytest.mark.parametrize("env_id", ["user_tasks:Asymmetric-v0", "user_tasks:Dict-v0"])
def test_observations_outside_their_space(monkeypatch, env_id, obs):
    monkeypatch.setattr(Ragged, "observe", lambda env: obs)
    envs, tasks = make_envs(env_id, 2), np.full((2, 2), 5.0)
    with pytest.raises(
        SystemExit, match=rf"^error: {env_id}: reset returned .*, no observation in "
    ):
        envs.reset(seed=0, options={"task": tasks})


@pytest.mark.parametrize("what", ["reward", "sparse_reward"])
@pytest.mark.parametrize("value", [[1.0, 2.0], None, "1.0", 1j, np.ones(3)], ids=str)
def test_rewards_that_are_no_numbers(what, value):
    envs, _ = make("user_tasks:Asymmetric-v0", 2)
    envs.envs[1].unwrapped.fault = (0, what.replace("_", " "), value)
    envs.reset(seed=0, options={"task": np.full((2, 2), 5.0)})
    with pytest.raises(
        SystemExit, match=rf"^error: user_tasks:Asymmetric-v0: step returned {what} .* one number"
    ):
        envs.step(np.zeros((2, 2)))


def test_rewards_of_one_element_are_numbers():
    envs, _ = make("user_tasks:Asymmetric-v0", 2)
    envs.envs[1].unwrapped.fault = (0, "reward", np.array([[-3.0]]))
    envs.reset(seed=0, options={"task": np.full((2, 2), 5.0)})
    assert envs.step(np.zeros((2, 2)))[1][1] == -3


@one_for_all
def test_an_environment_that_exits_is_an_error(script, train, monkeypatch):
    """sys.exit(0) in a step must not end the program as if all had gone well."""
    monkeypatch.setattr(Ragged, "step", lambda env, action: sys.exit(0))
    with pytest.raises(SystemExit, match=r"^error: the environment has called sys.exit\(\)$"):
        train(script, env_id="user_tasks:Asymmetric-v0")


def test_a_module_that_exits_is_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(SystemExit, match=r"^error: the environment has called sys.exit\(\)$"):
        maml_trpo.main(Args(env_id="exits:Id-v0"))


@pytest.mark.parametrize("module", ["../../x", ".x", "x/y", "a b", "1"])
def test_names_that_are_no_modules(module):
    with pytest.raises(SystemExit, match=r"^error: no tasks .*:Id-v0: (.* is no name|No module)"):
        make_envs(f"{module}:Id-v0", 1)


@one_for_all
def test_a_module_in_the_current_folder(tmp_path, monkeypatch, train, script):
    (tmp_path / "my_family.py").write_text(
        "import gymnasium, user_tasks\ngymnasium.register('Mine-v0', user_tasks.Ragged, max_episode_steps=5)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["x", *tiny(script, env_id="my_family:Mine-v0", horizon=0)])
    metrics = script.main(script.parse(script.Args))
    (folder,) = (tmp_path / "runs").iterdir()
    assert metrics["charts/episodic_length"] <= 5 and "eval/success_after_0_episodes" in metrics
    assert ":" not in folder.name


@one_for_all
def test_without_a_time_limit_the_horizon_must_be_given(script, train, tmp_path):
    with pytest.raises(
        SystemExit, match=r"^error: user_tasks:Endless-v0 has no time limit .*--horizon$"
    ):
        train(script, env_id="user_tasks:Endless-v0", horizon=0)
    assert not (tmp_path / "runs").exists()
    train(script, env_id="user_tasks:Endless-v0", horizon=5)


@pytest.mark.parametrize("env_id", ["SparsePointRobot-v0", "user_tasks:Asymmetric-v0"])
def test_sparse_rewards_where_there_are_any(script, train, env_id):
    make_tasks(Args(env_id=env_id, test_reward="sparse"))
    train(script, env_id=env_id, train_reward="sparse", test_reward="sparse")


@pytest.mark.parametrize("value", [np.nan, -1e39])
@pytest.mark.parametrize("what", ["reward", "observation", "sparse reward"])
@two_rollouts
def test_a_value_that_is_not_finite_stops_the_run(script, train, monkeypatch, what, value):
    """Nor one that is not in single precision; and the last checkpoint stays as it was."""
    least = LEAST[script.__name__]
    folder, _ = train(script, env_id="user_tasks:Asymmetric-v0", total_timesteps=least)
    saved = load(folder)
    lane = script.make_envs("user_tasks:Asymmetric-v0", 8).envs[3].unwrapped
    lane.fault = (2, what, value)
    with pytest.raises(SystemExit, match=f"{what} is not finite in lane 3, step 2") as error:
        train(script, resume=folder, total_timesteps=saved["global_step"] + 1)
    assert str(error.value).startswith("error: user_tasks:Asymmetric-v0") and "\n" not in str(
        error.value
    )
    assert load(folder)["global_step"] == saved["global_step"]
    lane.fault = ()
    train(script, resume=folder, total_timesteps=saved["global_step"] + 1)


@two_rollouts
def test_a_reset_that_is_not_finite_is_named(script, train):
    lane = script.make_envs("user_tasks:Asymmetric-v0", 8).envs[3].unwrapped
    lane.fault = (-1, "observation", np.nan)
    with pytest.raises(SystemExit, match=r"observation is not finite in lane 3, step -1, task"):
        train(script, env_id="user_tasks:Asymmetric-v0", total_timesteps=LEAST[script.__name__])


def test_actions_and_observations_of_no_numbers(monkeypatch, train):
    """Nothing to observe is a task (a bandit); nothing to do is none."""
    monkeypatch.setattr(Ragged, "observe", lambda env: np.zeros(0))
    make_one = Ragged.__init__

    def init(env, **settings):
        make_one(env, **settings)
        env.observation_space = gym.spaces.Box(-1, 1, (0,))

    monkeypatch.setattr(Ragged, "__init__", init)
    train(maml_trpo, env_id="user_tasks:Asymmetric-v0", total_timesteps=1)
    maml_trpo.make_envs.cache_clear()
    monkeypatch.setitem(user_tasks.ACTIONS, "asymmetric", gym.spaces.Box(-1, 1, (0,)))
    with pytest.raises(SystemExit, match=r"^error: user_tasks:Asymmetric-v0 has actions Box"):
        maml_trpo.make_envs("user_tasks:Asymmetric-v0", 1)


def test_actions_that_are_not_finite_are_the_policys_fault(script, train, monkeypatch):
    """A policy that has diverged is named, not the first environment that it acts in."""

    noise = script.draw_noise
    monkeypatch.setattr(script, "draw_noise", lambda *args: math.nan * noise(*args))
    with pytest.raises(
        SystemExit, match=r"^error: the policy has diverged, its actions are not finite"
    ):
        train(script)

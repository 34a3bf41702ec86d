"""metaworld_tasks.py: Meta-World's own splits, hidden goals, success, and a tiny run."""

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import gmps
import maml_trpo
import metaworld_tasks
from maml_trpo import Args, episode_scores, make_envs, rollout

metaworld = pytest.importorskip("metaworld")
SawyerReachV3Policy = pytest.importorskip("metaworld.policies").SawyerReachV3Policy
ML1, ML10 = "ML1-reach-v3", "ML10"
NUM_GOALS = 10  # of each class; Meta-World has 50, which take it seconds


@pytest.fixture(autouse=True, scope="module")
def few_goals():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metaworld, "_N_GOALS", NUM_GOALS)
        metaworld_tasks.benchmark.cache_clear()
        yield
    metaworld_tasks.benchmark.cache_clear()


@pytest.fixture(params=[ML1, ML10])
def family(request):
    """A benchmark, its classes, and three lanes of it."""
    ml = metaworld_tasks.benchmark(request.param)
    return ml, {**ml.train_classes, **ml.test_classes}, make_envs(request.param, 3)


def lanes(envs):
    """The simulators that this process steps, in the order of their lanes."""
    return [envs.here.lanes[id(envs)][i] for i in np.argsort(envs.shares[0])]


@pytest.fixture
def two_processes():
    """What makes eight lanes of a family, stepped by this process and by another one."""
    torch.set_num_threads(2)
    yield lambda env_id=ML1: metaworld_tasks.MetaWorldEnvs(env_id, 8)
    torch.set_num_threads(1)
    metaworld_tasks.stop_helpers()


def play(env_id, tasks, act, horizon):
    return rollout(act, None, tasks, 1, ("train", 0), Args(env_id=env_id, horizon=horizon))


def test_names(monkeypatch):
    """They are known without the package; what needs it says so in one line."""
    names = [f"{name}-v3" for name in metaworld_tasks.METAWORLD_TASKS]
    assert sorted(names) == sorted(metaworld.ALL_V3_ENVIRONMENTS)
    assert isinstance(make_envs(f"metaworld_tasks:{ML1}"), metaworld_tasks.MetaWorldEnvs)
    with pytest.raises(SystemExit, match="Near: ML1-push-v3"):
        make_envs("ML1-puhs-v3")
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(SystemExit, match=r"^error: no tasks ML45: .* pip install metaworld$"):
        make_envs("ML45")


def test_splits_are_the_benchmarks_own(family):
    ml, classes, envs = family
    splits = (ml.train_tasks, ml.test_tasks)
    train, test = ({(task.env_name, task.data) for task in tasks} for tasks in splits)
    assert not train & test
    assert len(classes) == 1 or not ml.train_classes.keys() & ml.test_classes.keys()
    for split, own in enumerate(splits):
        sample = [envs.sample_tasks, envs.sample_test_tasks][split]
        rows = sample(len(own), np.random.default_rng(0))
        assert (rows[:, 0] == split).all()
        envs.reset(options={"task": rows[:3]})
        for row, simulator in zip(rows, lanes(envs), strict=False):
            task = own[row[1]]
            assert type(simulator) is classes[task.env_name]
            expected = pickle.loads(task.data)["rand_vec"]
            np.testing.assert_array_equal(simulator._last_rand_vec, expected)


def test_tasks_are_dealt_class_by_class(family):
    """No task comes twice before all have come, and a small meta-batch leaves no class out for
    ever.
    """
    ml, _, envs = family
    for own, sample in (
        (ml.train_tasks, envs.sample_tasks),
        (ml.test_tasks, envs.sample_test_tasks),
    ):
        index, other = (sample(len(own) + 7, np.random.default_rng(seed))[:, 1] for seed in (0, 1))
        assert len(set(index[:-7])) == len(own) and (index[-7:] == index[:7]).all()
        assert (index != other).any()
        names, known = [own[i].env_name for i in index[:-7]], {task.env_name for task in own}
        assert set(names[: len(known)]) == known and names == names[: len(known)] * NUM_GOALS
        draws = [sample(1, np.random.default_rng(seed))[0, 1] for seed in range(50)]
        assert {own[i].env_name for i in draws} == known


def test_goals_are_hidden(family):
    _, classes, envs = family
    for sample in (envs.sample_tasks, envs.sample_test_tasks):
        tasks = sample(3, np.random.default_rng(0))
        batch = play(envs.env_id, tasks, lambda _, obs, noise: torch.full((3, 1, 4), 0.3), 5)
        assert batch["obs"].shape == (3, 1, 5, 39) and (batch["obs"][..., -3:] == 0).all()
        assert (batch["obs"][..., :3] != 0).all()
        assert all(simulator._target_pos.any() for simulator in lanes(envs))
        assert len({type(simulator) for simulator in lanes(envs)}) == min(3, len(classes))


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_success_is_that_of_the_benchmark():
    """Meta-World's own solution, told the goal, succeeds; a hand that stays does not."""
    envs, expert = make_envs(ML1, 2), SawyerReachV3Policy()
    tasks = envs.sample_tasks(2, np.random.default_rng(0))

    def act(_, obs, noise):
        told = np.concatenate([obs[1, 0, :36], lanes(envs)[1]._target_pos])
        return torch.tensor(np.stack([np.zeros(4), expert.get_action(told)])).unsqueeze(1)

    assert episode_scores(play(ML1, tasks, act, 100))["success"].tolist() == [0, 1]


def test_simulators_are_used_again_and_remember_nothing(monkeypatch):
    """Three lanes go through five classes with two simulators of each, not with fifteen."""
    here = metaworld_tasks.Simulators()
    monkeypatch.setattr(metaworld_tasks.MetaWorldEnvs, "here", here)
    envs = make_envs(ML10, 3)
    tasks = envs.sample_test_tasks(5, np.random.default_rng(0))
    actions = np.random.default_rng(1).uniform(-1, 1, (20, 3, 4))
    seen = {}
    for turn in range(10):
        chosen = (turn + np.arange(3)) % 5
        envs.reset(seed=0, options={"task": tasks[chosen]})
        for action in actions:
            obs, rewards, *_ = envs.step(action)
        expected = seen.setdefault(turn % 5, (obs, rewards))
        assert np.array_equal(obs, expected[0]) and np.array_equal(rewards, expected[1])
    assert len(lanes(envs)) + sum(map(len, here.idle.values())) <= 10


def test_a_lane_ends_after_500_steps_and_stays():
    envs = make_envs(ML1, 2)
    envs.reset(options={"task": envs.sample_tasks(2, np.random.default_rng(0))})
    lanes(envs)[0].curr_path_length = envs.horizon - 1
    last, rewards, terminated, truncated, _ = envs.step(np.ones((2, 4)))
    assert rewards.all() and not terminated.any() and truncated.tolist() == [True, False]
    obs, rewards, terminated, truncated, _ = envs.step(np.ones((2, 4)))
    assert rewards[0] == 0 and rewards[1] != 0 and truncated.tolist() == [True, False]
    assert np.array_equal(obs[0], last[0]) and not np.array_equal(obs[1], last[1])


def test_rewards_of_version_1():
    """They are other rewards for the same steps."""
    envs, other = make_envs(ML1, 2), make_envs(f"{ML1}-reward-v1", 2)
    tasks = envs.sample_tasks(2, np.random.default_rng(0))
    told = []
    for one in (envs, other):
        one.reset(options={"task": tasks})
        told.append(one.step(np.ones((2, 4))))
        versions = {simulator.reward_function_version for simulator in lanes(one)}
        assert versions == {"v2" if one is envs else "v1"}
    assert np.array_equal(told[0][0], told[1][0]) and (told[0][4]["success"] == 0).all()
    assert (told[0][1] < 10).all() and (told[1][1] != told[0][1]).all()
    assert metaworld_tasks.MetaWorldEnvs(ML1, 1).reward == "v2"


@pytest.mark.parametrize("name", ["reach", "push", "pick-place"])
def test_tasks_that_begin_the_same(name):
    """Goals and split are ML1's; the object is where the class has it before it has a task."""
    envs, other = make_envs(f"ML1-{name}-v3-same-start", 3), make_envs(f"ML1-{name}-v3", 3)
    for sample in ("sample_tasks", "sample_test_tasks"):
        tasks = getattr(envs, sample)(3, np.random.default_rng(0))
        obs, _ = envs.reset(options={"task": tasks})
        theirs, _ = other.reset(options={"task": tasks})
        assert (obs == obs[0]).all() and len(np.unique(theirs[:, 4:7], axis=0)) == 3
        start = lanes(envs)[0].init_config["obj_init_pos"]
        assert np.allclose(obs[:, 4:7], start, atol=1e-3)
        goals = [[x._target_pos for x in lanes(one)] for one in (envs, other)]
        assert np.array_equal(*goals) and len(np.unique(goals[0], axis=0)) == 3


# ------------------------------------------------------------------------------ several processes


def test_the_number_of_processes_changes_no_number():
    seen, n = [], 13  # shares of 5, 4 and 4 lanes
    for processes in (1, 3):
        torch.set_num_threads(processes)
        envs = metaworld_tasks.MetaWorldEnvs(ML10, n)
        torch.set_num_threads(1)
        assert envs.processes == processes
        rng = np.random.default_rng(0)
        rows = []
        for _ in range(2):
            tasks = envs.sample_tasks(5, rng).repeat(3, 0)[:n]
            rows.append(envs.reset(options={"task": tasks})[0])
            for _ in range(8):
                *told, info = envs.step(rng.uniform(-1.5, 1.5, (n, 4)))
                rows.append(np.column_stack([*told, info["success"]]))
        envs.here.lanes[id(envs)][0].curr_path_length = 499  # a lane ends, in this process
        for _ in range(2):
            rows.append(np.column_stack(envs.step(np.ones((n, 4)))[:4]))
        assert len(envs.helpers) >= envs.processes - 1
        seen.append(np.hstack(rows))
    metaworld_tasks.stop_helpers()
    assert np.array_equal(*seen)


def test_how_lanes_are_shared_out(two_processes):
    assert metaworld_tasks.MetaWorldEnvs(ML1, 7).processes == 1
    envs = two_processes(ML10)
    tasks = envs.sample_tasks(4, np.random.default_rng(0))
    envs.reset(options={"task": np.concatenate([tasks, tasks])})
    assert len({type(simulator) for simulator in lanes(envs)}) == 4  # a lane of each class


def test_an_error_in_another_process_is_told(two_processes):
    envs = two_processes()
    tasks = envs.sample_tasks(8, np.random.default_rng(0))
    envs.reset(options={"task": tasks})
    good = envs._named(tasks[0])
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in take.*KeyError: 'nothing-v3'"):
        envs._everywhere("reset", [[good] * 4, [good._replace(env_name="nothing-v3")] * 4], "v2")
    envs.reset(options={"task": tasks})  # with new processes
    envs.helpers[0].kill()
    with pytest.raises(RuntimeError, match="has died"):
        envs.step(np.zeros((8, 4)))


def test_no_process_outlives_the_one_that_started_it():
    """Not even if that is killed: all who can write to its standard error are gone."""
    source = f"""
import numpy as np, time, torch, metaworld_tasks
torch.set_num_threads(2)
envs = metaworld_tasks.MetaWorldEnvs({ML1!r}, 8)
envs.reset(options={{"task": envs.sample_tasks(8, np.random.default_rng(0))}})
print(len(envs.helpers), flush=True)
time.sleep(600)
"""
    folder = metaworld_tasks.__file__.removesuffix("metaworld_tasks.py")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen([sys.executable, "-c", source], cwd=folder, **pipes)
    assert started.stdout.readline() == b"1\n"
    started.kill()
    started.communicate(timeout=60)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_tiny_run(train, num_threads):
    flags = {"env_id": ML1, "horizon": 5, "total_timesteps": 1, "num_threads": num_threads}
    _, metrics = train(maml_trpo, **flags)
    assert len(metaworld_tasks.MetaWorldEnvs.helpers) == num_threads - 1
    metaworld_tasks.stop_helpers()
    assert {"eval/success_after_0_episodes", "eval/success_after_2_episodes"} <= metrics.keys()
    assert metrics["charts/episodic_length"] == 5 and metrics["charts/episodic_return"] > 0


def test_success_by_class(train, capsys):
    """Of a run's file; copies of a task count once, and the mean over classes is not that over tasks."""
    import plot

    folder, _ = train(maml_trpo, env_id=ML1, horizon=5, total_timesteps=1)
    train(maml_trpo, evaluate=folder)
    capsys.readouterr()
    plot.classes(str(folder / "evaluation.npz"))
    row, mean = (rf"\| {name} \| 5 \| 0.00 \[0.00, 0.43\] \|" for name in (ML1[4:], "all classes"))
    assert re.search(f"{row}.*\n{mean}", capsys.readouterr().out)

    names = [task.env_name for task in metaworld_tasks.benchmark(ML10).test_tasks]
    index = [
        names.index(name) + i for name in ("door-close-v3", "lever-pull-v3") for i in (0, 0, 1)
    ]
    tasks = np.column_stack([np.ones(6), index])[:5]  # one of them is the only one of its class
    success = np.array([[0, 0, 0, 0, 0], [1, 1, 0, 1, 1]])
    np.savez(folder / "evaluation.npz", tasks=tasks, success=success)
    plot.classes(str(folder / "evaluation.npz"), ML10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| class | tasks | before | after 1 |"
    low, high = plot.share_interval(0.5, 2)
    assert lines[2].startswith("| door-close-v3 | 2 | 0.00 [0.00, ")
    assert lines[2].endswith(f"| 0.50 [{low:.2f}, {high:.2f}] |")
    assert lines[3].startswith("| lever-pull-v3 | 1 |") and "| 1.00 [" in lines[3]
    assert lines[4].startswith("| all classes | 3 |") and "| 0.75 [" in lines[4]


def test_wilsons_interval():
    """Against its definition: the shares that are 1.96 standard errors away."""
    import plot

    low, high = plot.share_interval(np.array([0.3, 0.9]), 20)
    for bound in (low, high):
        distance = np.abs(bound - [0.3, 0.9]) / np.sqrt(bound * (1 - bound) / 20)
        np.testing.assert_allclose(distance, 1.96)
    assert plot.share_interval(0.0, 20)[0] == 0


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_scripted_experts_are_told_the_goal():
    """Of any task, also of one that no lane is in; asking leaves the lanes alone. The noisy expert
    still succeeds.
    """
    envs = gmps.make_envs(ML1, 2)
    act, tasks = gmps.scripted_expert(envs), envs.sample_tasks(3, np.random.default_rng(0))
    before, _ = envs.reset(options={"task": tasks[:2]})
    told = torch.as_tensor(tasks).float()
    first = act(torch.as_tensor(before[[0, 0, 0]]).float(), told)
    assert len(first.unique(dim=0)) == 3 and (first.abs() <= 1).all()
    after, *_ = envs.step(np.zeros((2, 4)))
    assert np.abs(after - before).max() < 0.1

    args = gmps.Args(env_id=ML1, expert_noise=0.1, horizon=100)
    data = gmps.Demonstrations(tasks[:2], told[:2], act, (39, 4), args)
    batch = gmps.rollout(data.noisy_act, data.tasks_on_device, data.tasks, 1, ("train", 1), args)
    assert (batch["obs"][..., -3:] == 0).all()
    assert episode_scores(batch)["success"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_demonstrations_are_written_and_used(train, tmp_path):
    import write_demos

    argv = ["--num-train-tasks", "4", "--episodes", "1", "--horizon", "5"]
    write_demos.main([ML1, str(tmp_path / "demos.npz"), *argv])
    flags = {"env_id": ML1, "horizon": 5, "total_timesteps": 1}
    folder, metrics = train(gmps, expert="demos", demos="demos.npz", **flags)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["own"]["data"]["count"].tolist() == [5] * 4
    assert "eval/success_after_2_episodes" in metrics
    with np.load(tmp_path / "demos.npz") as file:
        assert file["observations"].shape == (20, 39) and np.abs(file["actions"]).max() <= 1
        assert file["task_index"].tolist() == np.repeat(np.arange(4), 5).tolist()
        rows = state["own"]["data"]["rows"].numpy()
        written = np.hstack([file["observations"], file["actions"]])
        np.testing.assert_array_equal(rows, written.astype(np.float32))

"""benchmarks/metaworld_tasks.py: Meta-World's own splits, hidden goals, success, and a tiny run."""

import pickle
from collections import defaultdict

import metaworld_tasks
import numpy as np
import pytest
import torch
from metaworld.policies import SawyerReachV3Policy

import gmps
import maml_trpo
from maml_trpo import episode_scores, make_envs, rollout

ML1, ML10 = "metaworld_tasks:ML1-reach-v3", "metaworld_tasks:ML10"


@pytest.fixture(scope="module", params=[ML1, ML10])
def family(request):
    """A benchmark, its classes, and three lanes of it."""
    ml = metaworld_tasks.benchmark(request.param.split(":")[1])
    return ml, {**ml.train_classes, **ml.test_classes}, make_envs(request.param, 3, 1)


def play(envs, tasks, act, horizon):
    return rollout(envs, act, tasks, horizon, np.random.default_rng(0), torch.device("cpu"))


def test_splits_are_the_benchmarks_own(family):
    ml, classes, envs = family
    train, test = ({(task.env_name, task.data) for task in tasks} for tasks in (ml.train_tasks, ml.test_tasks))
    assert not train & test and (len(classes) == 1 or not ml.train_classes.keys() & ml.test_classes.keys())
    for split, own in enumerate([ml.train_tasks, ml.test_tasks]):
        rows = [envs.sample_tasks, envs.sample_test_tasks][split](len(own), np.random.default_rng(0))
        assert (rows[:, 0] == split).all()
        for row in rows[:4]:
            env, task = envs.envs[0].unwrapped, own[row[1]]
            env.set_task(row)
            assert type(env.env) is classes[task.env_name]
            np.testing.assert_array_equal(env.env._last_rand_vec, pickle.loads(task.data)["rand_vec"])


def test_tasks_are_dealt_class_by_class(family):
    """No task comes twice before all have come, and a small meta-batch leaves no class out for ever."""
    ml, _, envs = family
    for own, sample in ((ml.train_tasks, envs.sample_tasks), (ml.test_tasks, envs.sample_test_tasks)):
        index, other = (sample(len(own) + 7, np.random.default_rng(seed))[:, 1] for seed in (0, 1))
        assert len(set(index[:-7])) == len(own) and (index[-7:] == index[:7]).all() and (index != other).any()
        names, known = [own[i].env_name for i in index[:-7]], {task.env_name for task in own}
        assert set(names[: len(known)]) == known and names == names[: len(known)] * 50
        first = {own[sample(1, np.random.default_rng(seed))[0, 1]].env_name for seed in range(50)}
        assert first == known


def test_goals_are_hidden(family):
    _, classes, envs = family
    for sample in (envs.sample_tasks, envs.sample_test_tasks):
        tasks = sample(3, np.random.default_rng(0))
        batch = play(envs, tasks, lambda obs, t: torch.full((3, 4), 0.3), 5)
        assert batch["obs"].shape == (3, 5, 39) and (batch["obs"][..., -3:] == 0).all()
        assert (batch["obs"][..., :3] != 0).all() and all(env.unwrapped.env._target_pos.any() for env in envs.envs)
        assert len({type(env.unwrapped.env) for env in envs.envs}) == min(3, len(classes))


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_success_is_that_of_the_benchmark():
    """Meta-World's own solution, told the goal, succeeds; a hand that stays does not."""
    envs, expert = make_envs(ML1, 2, 1), SawyerReachV3Policy()
    tasks = envs.sample_tasks(2, np.random.default_rng(0))

    def act(obs, t):
        goal = envs.envs[1].unwrapped.env._target_pos
        return torch.tensor(np.stack([np.zeros(4), expert.get_action(np.concatenate([obs[1, :36], goal]))]))

    batch = play(envs, tasks, act, 100)
    batch = {name: x.unflatten(0, (2, 1)) for name, x in batch.items()}
    assert episode_scores(batch)["success"].tolist() == [0, 1]


def test_simulators_are_used_again(monkeypatch):
    """Three lanes go through five classes with two simulators of each, not with fifteen."""
    monkeypatch.setattr(metaworld_tasks, "idle", defaultdict(list))
    envs = make_envs(ML10, 3, 1)
    tasks = envs.sample_test_tasks(5, np.random.default_rng(0))
    for turn in range(10):
        envs.reset(seed=0, options={"task": tasks[(turn + np.arange(3)) % 5]})
    assert len(envs.envs) + sum(map(len, metaworld_tasks.idle.values())) <= 10


def test_a_tiny_run(train):
    _, metrics = train(maml_trpo, env_id=ML1, horizon=5, total_timesteps=1)
    assert {"eval/success_after_0_episodes", "eval/success_after_2_episodes"} <= metrics.keys()
    assert metrics["charts/episodic_length"] == 5 and metrics["charts/episodic_return"] > 0


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_scripted_experts_are_told_the_goal():
    """Of any task, also of one that no lane is in; asking leaves the lanes alone. The noisy expert still succeeds."""
    envs = gmps.make_envs(ML1, 2, 1)
    act, tasks = gmps.scripted_expert(envs), envs.sample_tasks(3, np.random.default_rng(0))
    envs.reset(seed=0, options={"task": tasks[:2]})
    before, told = envs.obs.copy(), torch.as_tensor(tasks).float()
    first = act(torch.as_tensor(before[[0, 0, 0]]).float(), told)
    assert len(first.unique(dim=0)) == 3 and (first.abs() <= 1).all()
    envs.step(np.zeros((2, 4)))
    assert np.abs(envs.obs - before).max() < 0.1

    def noisy(obs, noise):
        return act(obs, told[:2]) + 0.1 * noise

    batch = gmps.episodes(noisy, tasks[:2], np.random.default_rng(0), envs, 100, torch.device("cpu"))
    assert (batch["obs"][..., -3:] == 0).all() and episode_scores(batch)["success"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_demonstrations_are_written_and_used(train, tmp_path):
    import write_demos

    argv = ["--num-train-tasks", "4", "--episodes", "1", "--horizon", "5"]
    write_demos.main([ML1, str(tmp_path / "demos.npz"), *argv])
    folder, metrics = train(gmps, env_id=ML1, horizon=5, expert="demos", demos="demos.npz", total_timesteps=1)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["data"]["count"].tolist() == [5] * 4 and "eval/success_after_2_episodes" in metrics
    with np.load(tmp_path / "demos.npz") as file:
        assert file["observations"].shape == (20, 39) and np.abs(file["actions"]).max() <= 1

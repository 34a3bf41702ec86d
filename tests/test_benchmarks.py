"""benchmarks/: a list becomes CSVs once, what is computed from them is right, figures and films are drawn."""

import ast
import importlib
import importlib.util
import subprocess
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, to_argv

import maml_trpo
import rl2


def load_module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plot, run = load_module("plot"), load_module("run")
pearl_contexts, rl2_memory = load_module("pearl_contexts"), load_module("rl2_memory")
animate, on_training_tasks = load_module("animate"), load_module("on_training_tasks")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A house of its own, with one script, for the runs and results."""
    (tmp_path / "maml_trpo.py").write_bytes((ROOT / "maml_trpo.py").read_bytes())
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """A script's run as a program, without the seconds that a start takes."""
    start = subprocess.run

    def run_here(argv, stdout=None, stderr=None, cwd=None, **kwargs):
        if not cwd:
            return start(argv, stdout=stdout, stderr=stderr, **kwargs)
        monkeypatch.chdir(cwd)
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                maml_trpo.main(maml_trpo.parse(maml_trpo.Args, argv[2:]))
            except SystemExit as end:
                print(end.code)
                return subprocess.CompletedProcess(argv, 1)
        return subprocess.CompletedProcess(argv, 0)

    return lambda: monkeypatch.setattr(subprocess, "run", run_here)


def test_a_list_becomes_csvs(place, in_this_process):
    command = " ".join(["maml_trpo.py", *to_argv(TINY | {"hidden_size": 8, "eval_every": 1})])
    (place / "some.txt").write_text(f"# comment\n\nb | 1-2 | {command}\na | 3 | {command}\n")
    found = run.experiments(place / "some.txt")
    assert [one[:2] for one in found] == [("b", 1), ("b", 2), ("a", 3)]
    assert run.run("some", *found[0]).startswith("b_1: done in")
    path = place / "benchmarks" / "results" / "some" / "b_1.csv"
    lines = path.read_text().splitlines()
    assert f"# command: python {command} --seed 1" in lines and lines[3].startswith("# seconds: ")
    rows = plot.read(path)
    assert (
        list(rows["global_step"]) == [160, 320]
        and np.isfinite(rows["eval/return_after_2_episodes"]).all()
    )
    assert run.run("some", *found[0]) == "b_1: was done"
    in_this_process()  # from here on
    path.unlink()
    assert run.run("some", *found[0]).startswith("b_1: done in")  # its checkpoint was complete
    again = plot.read(path)
    assert all(np.array_equal(again[name], rows[name]) for name in rows)
    assert run.run("some", "bad", 1, ["maml_trpo.py", "--gamma", "2"]).startswith(
        "bad_1: not finished (error: --gamma"
    )
    assert not path.with_name("bad_1.csv").exists()


def test_a_run_that_was_stopped_goes_on(place, monkeypatch, in_this_process):
    command = ["maml_trpo.py", *to_argv(TINY | {"hidden_size": 8, "total_timesteps": 800})]
    in_this_process()
    whole, attempts = subprocess.run, []

    def stop_the_first(argv, **kwargs):
        if kwargs.get("cwd"):
            attempts.append(argv)
            if len(attempts) == 1:  # as a signal after the second iteration would
                done = whole([*argv, "--total-timesteps", "320"], **kwargs)
                kwargs["stdout"].write("stopped; --resume runs/NAME goes on from here\n")
                return done
            argv = [*argv, "--total-timesteps", "800"]
        return whole(argv, **kwargs)

    monkeypatch.setattr(subprocess, "run", stop_the_first)
    assert run.run("some", "a", 1, command).startswith("a_1: not finished (stopped")
    assert run.run("some", "a", 1, command).startswith("a_1: done in")
    assert "--resume" in attempts[1] and "--seed" not in attempts[1]
    assert (
        plot.read(place / "benchmarks" / "results" / "some" / "a_1.csv")["global_step"][-1] == 800
    )


def test_statistics(tmp_path, capsys):
    assert plot.iqm(np.array([100.0, 1, 2, 3, -50])) == 2  # one cut from each end
    assert plot.iqm(np.array([1.0, 2, 9])) == 4
    x = np.random.default_rng(1).normal(size=(200, 400))  # 200 experiments of 400 seeds
    low, high = plot.interval(x, draws=300)
    assert (low < plot.iqm(x)).all() and (plot.iqm(x) < high).all()
    assert 0.88 < ((low < 0) & (0 < high)).mean() < 1
    for seed, last in (("1", 5.0), ("2_stopped", 7.0)):
        rows = f"# seconds: 3\nglobal_step,eval/a,eval/b\n10,1,2\n20,3,\n30,{last},4\n"
        (tmp_path / f"x_{seed}.csv").write_text(rows)
    paths = sorted(map(str, tmp_path.glob("*.csv")))
    plot.table(["eval/a", "eval/c"], paths)
    assert "| x | 2 | 30 | 6.00 [5.00, 7.00] |  |" in capsys.readouterr().out
    plot.steps_to("eval/a", 6, paths)
    assert "| x | never, 30 | 5.00, 7.00 |" in capsys.readouterr().out
    steps, values = plot.over_seeds([plot.read(path) for path in paths], "eval/b")
    assert list(steps) == [10, 30] and values.tolist() == [[2, 2], [4, 4]]


def test_figures(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    for seed in (1, 2):
        rows = f"global_step,eval/return_after_0_episodes\n{10 * seed},1\n20,\n30,{seed}\n"
        (tmp_path / f"Some-v0_x_{seed}.csv").write_text(rows)
    paths = sorted(map(str, tmp_path.glob("*.csv")))
    plot.curves(str(tmp_path / "a.png"), "eval/return_after_0_episodes", paths)
    plot.figure(str(tmp_path / "b.png"), paths, ["the best=3", "the worst=-1"])
    plot.families(str(tmp_path / "c.png"), paths)
    rows = "global_step,eval/return_after_0_episodes,eval/return_after_10_episodes,eval/return\n"
    (tmp_path / "y_1.csv").write_text(rows + "10,1,2,2\n30,2,4,4\n")
    plot.figure(str(tmp_path / "d.png"), [str(tmp_path / "y_1.csv")])
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in "abcd")


def test_scores_per_task(train, monkeypatch, capsys):
    """Each different held-out task once; the tasks' means make up the mean of the meta-test."""
    flags = {"env_id": "HalfCheetahDir-v0", "horizon": 5, "num_test_tasks": 4}
    folder, metrics = train(maml_trpo, **flags)
    train(maml_trpo, evaluate=folder)
    capsys.readouterr()
    plot.tasks(str(folder / "evaluation.npz"))
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(":")[0] for row in rows] == ["task [-1.], 2 times", "task [1.], 2 times"]
    cells = [row.split(":  ")[1].split(" -> ") for row in rows]
    means = np.array([[float(cell.split(" ±")[0]) for cell in row] for row in cells])
    returns = [x for tag, x in sorted(metrics.items()) if tag.startswith("eval/return_after")]
    assert np.allclose(means.mean(0), returns, atol=0.1)


def test_training_tasks(train):
    """In place of the held-out ones: those that the run has seen."""
    folder, _ = train(maml_trpo, num_train_tasks=6)
    on_training_tasks.main("maml_trpo", str(folder), "--num-test-tasks", "6")
    envs = maml_trpo.make_envs("PointRobot-v0")
    with np.load(folder / "evaluation.npz") as file:
        expected = envs.sample_tasks(6, np.random.default_rng([0, 0]))
        assert np.array_equal(file["tasks"], expected)
    folder, _ = train(rl2, env_id="Bandit2Arms3-v0", horizon=0, num_eval_steps=0)
    on_training_tasks.main("rl2.py", str(folder))


def test_both_scores(train):
    """The mean action's scores are those of --deterministic-eval, the sampled ones those without."""
    _, both = train(maml_trpo, deterministic_eval=True)
    _, sampled = train(maml_trpo, deterministic_eval=False)
    tags = [tag for tag in sampled if tag.startswith("eval/")]
    assert tags
    for tag in tags:
        assert both[tag.replace("eval/", "eval/sampled_")] == sampled[tag] != both[tag]


def test_figures_of_an_evaluation(train, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    for name, figure in (("maesn", plot.episodes_in_the_plane), ("mmaml", plot.embedding)):
        script = importlib.import_module(name)
        folder, _ = train(script)
        train(script, evaluate=folder)
        figure(str(tmp_path / f"{name}.png"), str(folder / "evaluation.npz"))
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def film(path, *flags):
    """The frames that animate.py writes, one image each."""
    image = pytest.importorskip("PIL.Image")
    animate.main([str(path), *map(str, flags)])
    with image.open(path) as gif:
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB")))
    return frames


def test_films_of_points(train, tmp_path):
    import maesn

    pytest.importorskip("matplotlib")
    folder, _ = train(maesn)
    frames = film(tmp_path / "a.gif", folder, "--task", 0, 3, "--episodes", 2)
    assert len(frames) == 31 and (frames[0] != frames[-1]).any()  # 10 steps in three parts each


def test_films_of_mujoco(train, tmp_path, monkeypatch):
    """The states that it renders are those that the policy saw; by EGL, whatever other tests render by."""
    pytest.importorskip("matplotlib")
    folder, _ = train(maml_trpo, env_id="HalfCheetahDir-v0", horizon=6)
    for (tasks, batch, count), adapted_to in zip(
        animate.record(*animate.load(str(folder), [])), (0, 2), strict=True
    ):
        assert tasks.shape == (4, 1) and count == adapted_to
        states = batch["states"][..., 2:].to(batch["obs"])  # time and the root's x are not observed
        assert torch.equal(states, batch["obs"]) and states.shape == (4, 2, 6, 17)
    gl_context = pytest.importorskip("mujoco.gl_context")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    try:
        importlib.reload(gl_context)
        animate.require_rendering()
    except (Exception, SystemExit) as error:
        pytest.skip(f"cannot render here: {error}")
    frames = film(tmp_path / "a.gif", folder, "--task", 0, 1, "--names", "there", "back")
    assert len(frames) == 6 and (frames[0] != frames[-1]).any()


def test_what_no_film_is_made_of(train, tmp_path):
    import rl2

    with pytest.raises(SystemExit, match="is no run"):
        animate.main(["a.gif", str(tmp_path / "nothing")])
    folder, _ = train(rl2)
    with pytest.raises(SystemExit, match="within an episode"):
        animate.main(["a.gif", str(folder)])


def test_posterior_means_of_the_tabular_mdp():
    states, actions = torch.tensor([[0, 3, 0, 0]]), torch.tensor([[1, 1, 1, 2]])
    means = rl2_memory.posterior_means(states, actions, torch.tensor([[4.0, -2.0, 1.0, 5.0]]))
    expected = torch.ones(1, 4, 5)  # the prior's mean
    expected[0, 2:, 1] = torch.tensor(
        [(1 + 4) / 2, (1 + 4 + 1) / 3]
    )  # what was paid in state 0 for action 1
    torch.testing.assert_close(means, expected)


def test_contexts_of_pearl(train, capsys):
    """Three different contexts, played from the same starts: an agent that is blind to its context scores the same."""
    import pearl

    def different(agent):
        torch.save(checkpoint | {"agent": agent}, folder / "checkpoint.pt")
        pearl_contexts.main(str(folder), rounds=2)
        rows = capsys.readouterr().out.splitlines()[-3:]
        return len({row.split(" | ", 1)[1] for row in rows})

    folder, _ = train(pearl)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    agent = checkpoint["agent"]
    for name in ("encoder.weights.3", "sac.actor.weights.3"):  # untrained, they hardly react
        agent[name] *= 300
    assert different(agent) == 3
    first = "sac.actor.weights.0"
    blind = torch.cat(
        [agent[first][:, :2], 0 * agent[first][:, 2:]], 1
    )  # obs are two numbers, then comes z
    assert different(agent | {first: blind}) == 1


SCRIPTS = ("gmps", "maesn", "maml_trpo", "mmaml", "pearl", "rl2")


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.name)
def test_names_of_the_scripts_exist(path):
    """What a program takes from a script that it imports by name; some parts run on a GPU alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in SCRIPTS:
                assert hasattr(importlib.import_module(node.value.id), node.attr), ast.unparse(node)

"""Bad input gets one line before anything is written, and a script works where it is copied to."""

import copy
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from conftest import (
    LEAST,
    ROOT,
    SCRIPTS,
    TINY,
    environment,
    load,
    one_for_all,
    stands_for_all,
    tiny,
    two_for_all,
)

import maml_trpo


@pytest.fixture
def refuse(train, script, tmp_path):
    """refuse(**flags): main ends with one line, which is returned, and leaves the folder as it is."""

    def refuse(**flags):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            train(script, **flags)
        line = end.value.code
        assert (
            isinstance(line, str)
            and line.startswith("error: ")
            and "\n" not in line
            and len(line) < 500
        )
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return refuse


def test_numbers_out_of_range(refuse, script):
    """Of every flag that is a number: not finite, below 0, 0 where that makes no sense, above 1."""
    kinds = get_type_hints(script.Args)
    names = [field.name for field in fields(script.Args)]
    counts = [name for name in names if kinds[name] in (int, int | None)]
    reals = [name for name in names if kinds[name] in (float, float | None)]
    assert len(counts) > 10 and len(reals) > 2
    bad = [(name, -1) for name in counts] + [(name, -0.5) for name in reals]
    bad += [(name, value) for name in reals for value in ("nan", "inf")]
    bad += [(name, 0) for name in counts + reals if name not in script.Args.may_be_zero]
    bad += [(name, 1.5) for name in script.Args.at_most_one]
    for name, value in bad:
        line = refuse(**{name: value})
        assert f"--{name.replace('_', '-')} {float(value) if name in reals else value}" in line
        assert "must be" in line


def test_zero_where_it_makes_no_sense(script):
    """Tests of the table of flags that may be 0, which the test above takes for granted."""
    positive = {"total_timesteps", "meta_batch_size", "episodes_per_task", "num_test_tasks"}
    positive |= {"eval_episodes", "eval_every", "checkpoint_every", "gamma", "hidden_size"}
    assert not positive & script.Args.may_be_zero
    assert {"gamma"} <= script.Args.at_most_one


HUGE = [
    ("seed", 2**63),
    ("task_seed", 2**63),
    ("num_threads", 100_000),
    ("total_timesteps", 10**19),
]


@pytest.mark.parametrize("flag, value", HUGE)
@one_for_all
def test_numbers_that_no_machine_takes(refuse, flag, value):
    assert f"--{flag.replace('_', '-')} {value}: is too large" in refuse(**{flag: value})


BIG = ["meta_batch_size", "horizon", "hidden_size", "num_test_tasks", "num_train_tasks"]


@pytest.mark.parametrize("flag", BIG)
def test_sizes_that_do_not_fit(refuse, script, flag):
    """Said before anything is allocated, in a line that names the flag."""
    line = refuse(**{flag: 10**13})
    assert f"--{flag.replace('_', '-')}" in line


def test_step_sizes_that_diverge(script, train):
    flags = {
        "maml_trpo": {"inner_lr": 1e37},
        "maesn": {"policy_lr": 1e37, "adapt_policy": True},
        "mmaml": {"inner_lr": 1e37},
        "rl2": {"learning_rate": 1e30},
        "pearl": {"learning_rate": 1e30},
        "gmps": {"learning_rate": 1e30},
    }
    with pytest.raises(SystemExit, match=r"^error: .*(finite|diverged)"):
        train(script, **flags[script.__name__], total_timesteps=8 * 160)
    name = next(iter(flags[script.__name__]))
    with pytest.raises(SystemExit, match=r"^error: .* 1e\+300: is too large"):
        train(script, **{name: 1e300})


@stands_for_all("pearl", "gmps")
def test_a_machine_that_does_not_tell_its_memory(train, script, monkeypatch):
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    train(script)


@one_for_all
def test_names_that_no_folder_has(train, script):
    with pytest.raises(SystemExit, match=r"^error: cannot write to .*: File name too long$"):
        train(script, exp_name="x" * 300)


def test_the_least_that_is_allowed(train, script):
    least = {"num_eval_steps": 0, "num_test_tasks": 1, "total_timesteps": LEAST[script.__name__]}
    train(script, seed=0, task_seed=0, horizon=1, gamma=1, **least)


@pytest.mark.parametrize(
    "env_id, parts",
    [
        ("Navigation2-v0", ["Navigation2-v0", "Near: ", "Navigation2D-v0"]),
        ("PointRobot-v1", ["PointRobot-v0"]),
        ("no such thing", ["no such thing"]),
        ("", ["error: "]),
        ("CartPole-v1", ["CartPole-v1", "sample_tasks", "docs/tasks.md"]),
        ("no_such_module:Mine-v0", ["no_such_module"]),
        ("user_tasks:NoSuch-v0", ["NoSuch"]),
        ("user_tasks:Binary-v0", ["MultiBinary", "Box and Discrete"]),
    ],
)
@one_for_all
def test_environments_that_are_none(refuse, env_id, parts):
    line = refuse(env_id=env_id)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("flag", ["train_reward", "test_reward"])
@one_for_all
def test_a_sparse_reward_where_there_is_none(refuse, flag):
    assert "Navigation2D-v0 reports no sparse reward" in refuse(
        env_id="Navigation2D-v0", **{flag: "sparse"}
    )


@one_for_all
def test_cuda_without_a_gpu(refuse, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--cuda" in refuse(cuda=True)


# --------------------------------------------------------------------------------------------------- resuming what?


@pytest.fixture
def folder(train, script):
    return train(script)[0]


def test_a_complete_run_is_meta_tested(train, script, capsys):
    """A run that was killed after its last checkpoint, before its table was printed."""
    folder, _ = train(script)
    before = (folder / "checkpoint.pt").read_bytes()
    printed = capsys.readouterr().out
    _, metrics = train(script, resume=folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder} is complete; its meta-test:"
    table = [line for line in lines if " ± " in line]
    assert table == [line for line in printed.splitlines() if " ± " in line] != []
    assert all(tag.startswith("eval/") for tag in metrics) and metrics
    assert (folder / "checkpoint.pt").read_bytes() == before


@one_for_all
def test_a_run_without_a_checkpoint(refuse, folder):
    (folder / "checkpoint.pt").unlink()
    for flag in ("resume", "evaluate"):
        assert "or was stopped before its first checkpoint" in refuse(**{flag: folder})


@pytest.mark.parametrize("argv", [["--resume", ""], ["--resume="], ["--evaluate", ""]])
@one_for_all
def test_a_folder_without_a_name(script, argv, tmp_path, monkeypatch):
    """An unset variable of the shell must not start a run from nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SystemExit, match=f"^error: {argv[0].rstrip('=')}: the name of the folder is empty$"
    ):
        script.main(script.parse(script.Args, [*tiny(script), *argv]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag, value", [("env_id", "Navigation2D-v0"), ("gamma", 0.5), ("num_test_tasks", 6)]
)
@one_for_all
def test_a_flag_that_cannot_change(refuse, folder, flag, value):
    line = refuse(resume=folder, total_timesteps=640, **{flag: value})
    assert f"--{flag.replace('_', '-')}" in line and "cannot change" in line


def test_an_evaluation_may_have_other_flags(train, refuse, script, folder):
    """Any that the networks do not depend on."""
    _, metrics = train(script, evaluate=folder, env_id="SparsePointRobot-v0", gamma=0.5, seed=7)
    assert metrics
    assert "the checkpoint is of other networks" in refuse(evaluate=folder, hidden_size=9)
    assert "the checkpoint is of other networks" in refuse(
        evaluate=folder, env_id="MultimodalNavigation2-v0"
    )


@one_for_all
def test_what_may_change(train, script, folder):
    steps = load(folder)["global_step"] + 1
    train(
        script,
        resume=folder,
        total_timesteps=steps,
        num_threads=1,
        eval_every=1,
        checkpoint_every=1,
        cuda=False,
    )
    args = load(folder)["args"]
    assert (
        args["total_timesteps"] == steps
        and args["resume"] == ""
        and args["horizon"] == TINY["horizon"]
    )


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
@one_for_all
def test_folders_that_are_no_runs(refuse, folder, flag, tmp_path):
    assert "is no run" in refuse(**{flag: "runs/none"})
    assert "is no run" in refuse(**{flag: "."})
    assert "exclude each other" in refuse(resume=folder, evaluate=folder)
    path, checkpoint = folder / "checkpoint.pt", load(folder)
    whole = path.read_bytes()
    torch.save(checkpoint | {"algorithm": "another"}, path)
    assert "written by another.py" in refuse(**{flag: folder})
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"\x93random bytes" * 100):
        path.write_bytes(content)
        assert "damaged" in refuse(**{flag: folder})
    tensors = [x for part in checkpoint.values() if isinstance(part, dict) for x in part.values()]
    weight = next(x for x in tensors if torch.is_tensor(x) and x.ndim == 2 and x.any())
    place = whole.index(weight.numpy().tobytes()) + 5
    path.write_bytes(
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    )  # which torch does not see
    torch.load(path)
    assert "damaged" in refuse(**{flag: folder})
    for content in (
        [1, 2],
        {"weights": torch.zeros(3)},
        checkpoint | {"more": folder},
    ):  # a Path is not only weights
        torch.save(content, path)
        assert "damaged" in refuse(**{flag: folder})


def places(state, at=()):
    """The way to every entry of a nest of dictionaries and lists."""
    items = (
        state.items()
        if isinstance(state, dict)
        else enumerate(state)
        if isinstance(state, list)
        else ()
    )
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


@two_for_all
def test_a_checkpoint_with_entries_lost_or_reshaped(train, script, folder, refuse):
    """One line, wherever in the file it is, and not a traceback from where it is used."""
    path, checkpoint = folder / "checkpoint.pt", load(folder)
    every = [place for place in places(checkpoint) if place[0] not in ("args", "layout")]
    for place in every[:: max(1, len(every) // 25)]:
        for change in ("lost", "reshaped"):
            crafted = copy.deepcopy(checkpoint)
            parent = crafted
            for key in place[:-1]:
                parent = parent[key]
            if change == "lost":
                del parent[place[-1]]
            elif torch.is_tensor(parent[place[-1]]):
                parent[place[-1]] = torch.zeros(3, 1, 2)
            else:
                parent[place[-1]] = "another"
            torch.save(crafted, path)
            line = refuse(evaluate=folder)
            assert any(word in line for word in ("damaged", "was changed", "another.py")), (
                place,
                line,
            )
    torch.save(checkpoint | {"format": 1}, path)
    assert f"format 1; this version reads format {script.FORMAT}" in refuse(evaluate=folder)


FOREIGN = """
import gymnasium as gym, numpy as np, pathlib
pathlib.Path("imported").touch()


class Still(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (2,))

    def sample_tasks(self, n):
        return self.np_random.uniform(size=(n, 1))

    def set_task(self, task):
        self.task = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1), {}

    def step(self, action):
        return np.zeros(1), -float(np.abs(action - self.task).mean()), False, False, {}


gym.register("Still-v0", Still, max_episode_steps=10)
"""


def test_a_checkpoint_imports_nothing_from_the_working_folder(tmp_path, monkeypatch):
    """Unless --env-id names the module: whoever sends a checkpoint must not choose what is run."""
    script = maml_trpo
    shutil.copy(script.__file__, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "foreign.py").write_text(FOREIGN)
    file = f"../{Path(script.__file__).name}"
    own = ["--env-id", "foreign:Still-v0"]
    monkeypatch.chdir(elsewhere)
    monkeypatch.syspath_prepend(str(elsewhere))
    script.main(script.parse(script.Args, tiny(script, env_id="foreign:Still-v0")))
    del sys.modules["foreign"]
    (folder,) = (elsewhere / "runs").iterdir()
    (elsewhere / "imported").unlink()
    shutil.copy(elsewhere / "foreign.py", folder)
    result = run([f"{tmp_path}/{file[3:]}", "--evaluate", folder], folder)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "give --env-id foreign:Still-v0 too" in result.stderr
    assert not (folder / "imported").exists()
    others = [f"{tmp_path}/{file[3:]}", "--evaluate", folder, "--env-id", "PointRobot-v0"]
    result = run(others, folder)
    assert "give --env-id" not in result.stderr  # PointRobot needs no foreign.py
    assert not (folder / "imported").exists()
    result = run([file, "--evaluate", folder, *own], elsewhere)
    assert result.returncode == 0 and "held-out tasks" in result.stdout, result.stderr
    assert f"tasks of {folder} come from {elsewhere / 'foreign.py'}" in result.stdout


# ------------------------------------------------------------------------------------------------------ where it writes


@one_for_all
def test_folders_that_cannot_be_written(train, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")
    with pytest.raises(SystemExit, match=r"^error: cannot write to runs/.*: [A-Z].*$"):
        train(script)


@one_for_all
def test_a_full_disk_keeps_the_last_checkpoint(train, script, folder, monkeypatch, capsys):
    before = (folder / "checkpoint.pt").read_bytes()

    def full(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")

    def full_too(file, **arrays):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        line = r"^error: cannot write to .*: the disk may be full; the last checkpoint is kept$"
        with pytest.raises(SystemExit, match=line):
            train(script, resume=folder, total_timesteps=640)
    assert (folder / "checkpoint.pt").read_bytes() == before
    monkeypatch.setattr(np, "savez", full_too)
    capsys.readouterr()
    train(script, evaluate=folder)  # prints its table all the same
    output = capsys.readouterr().out
    assert "evaluation.npz: No space left on device" in output and "held-out tasks" in output


# ------------------------------------------------------------------------------------ as its own process


# Starting one takes seconds: where a block does it that is the same in all, one script stands for them.


def run(command, cwd):
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment(), capture_output=True, text=True
    )


def test_an_error_is_one_line_on_stderr(tmp_path, script=maml_trpo):
    result = run([script.__file__, *tiny(script, env_id="Navigation-v0")], tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_copy_of_the_script_is_enough(tmp_path, script=maml_trpo):
    shutil.copy(script.__file__, tmp_path)
    result = run(["-I", "maml_trpo.py", *tiny(script)], tmp_path)  # -I: nothing else on the path
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.startswith("writing to runs/") and "held-out tasks" in result.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert load(folder)["global_step"] == TINY["total_timesteps"]


def test_a_script_needs_no_other_file(script, tmp_path, monkeypatch, capfd):
    """The same in this process, where nothing of the project is found."""
    shutil.copy(script.__file__, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != ROOT])
    for name in (*SCRIPTS, "mujoco_tasks", "metaworld_tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *tiny(script)])
    interrupt = signal.getsignal(signal.SIGINT)
    runpy.run_path(sys.argv[0], run_name="__main__")
    signal.signal(signal.SIGINT, interrupt)
    output, errors = capfd.readouterr()
    assert output.startswith("writing to runs/") and "held-out tasks" in output and not errors
    (folder,) = (tmp_path / "runs").iterdir()
    assert load(folder)["global_step"] == TINY["total_timesteps"]


def test_a_reader_that_leaves(tmp_path, script=maml_trpo):
    """python X.py | head -1, where no Greek letters are known: training goes on, to its end."""
    command = [sys.executable, script.__file__, *tiny(script)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment() | {"PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("writing to runs/")
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, "")
    process.stderr.close()
    (folder,) = (tmp_path / "runs").iterdir()
    assert load(folder)["global_step"] == TINY["total_timesteps"]


def test_help_on_terminals_without_greek_letters(monkeypatch, script):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        script.parse(script.Args, ["--help"])
    terminal.flush()
    assert end.value.code == 0 and b"--env-id" in terminal.buffer.getvalue()


def test_ctrl_c_ends_without_a_traceback(tmp_path, script=maml_trpo):
    """During the imports; and --evaluate, which has nothing to save, leaves it at that."""
    (tmp_path / "gymnasium.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    shutil.copy(script.__file__, tmp_path)
    result = run([Path(script.__file__).name], tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_help_names_every_flag_and_writes_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        script.parse(script.Args, ["--help"])
    usage = capsys.readouterr().out
    assert end.value.code == 0 and not list(tmp_path.iterdir())
    for field in fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in usage or f"no-{field.name}" in usage


def test_importing_does_nothing(script, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    path, generator = sys.path.copy(), torch.get_rng_state()
    runpy.run_path(script.__file__, run_name="imported")
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert path == sys.path and torch.equal(generator, torch.get_rng_state())


# ------------------------------------------------------------------------------------------ called from code


SMALL = {"env_id": "PointRobot-v0", "meta_batch_size": 4, "num_test_tasks": 3, "num_threads": 1}


def test_code_may_evaluate_and_resume(script, train, capsys):
    """What main(Args(evaluate=folder)) leaves at its default is the run's, as on the command line; so with resume."""
    folder, metrics = train(script)
    saved = {tag: x for tag, x in metrics.items() if tag.startswith("eval/")}
    assert script.main(script.Args(evaluate=str(folder))) == saved
    checkpoint = load(folder)
    checkpoint["args"]["cuda"] = True  # of a run elsewhere
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert script.main(script.Args(evaluate=str(folder))) == saved
    fewer = script.main(script.Args(evaluate=str(folder), num_test_tasks=2))
    assert fewer.keys() == saved.keys() and fewer != saved
    assert "on 2 held-out tasks" in capsys.readouterr().out
    script.main(script.Args(resume=str(folder), total_timesteps=4 * 160))
    assert load(folder)["args"]["env_id"] == "PointRobot-v0"
    assert load(folder)["global_step"] == 4 * 160
    with pytest.raises(SystemExit, match=r"--seed of .* is 1 and cannot change"):
        script.main(script.Args(resume=str(folder), total_timesteps=5 * 160, seed=2))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"num_test_tasks": 2.5}, "--num-test-tasks 2.5: must be int"),
        ({"train_reward": "spars"}, "--train-reward spars: must be dense or sparse"),
        ({"gamma": "0.9"}, "--gamma 0.9: must be float"),
        ({"cuda": "no"}, "--cuda no: must be bool"),
        ({"seed": None}, "--seed None: must be int"),
        ({"env_id": 3}, "--env-id 3: must be str"),
    ],
)
@one_for_all
def test_values_of_another_type(script, flags, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        script.main(script.Args(**flags))


@one_for_all
def test_whole_numbers_are_numbers(script, train):
    train(script, gamma=1)


@one_for_all
def test_main_leaves_the_settings_of_torch_as_they_were(script, monkeypatch, tmp_path):
    """After a run, and after one that is refused."""
    monkeypatch.chdir(tmp_path)

    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            signal.getsignal(signal.SIGINT),
            list(sys.path),
        )

    torch.use_deterministic_algorithms(False)
    before = settings()
    script.main(script.parse(script.Args, tiny(script, num_threads=2)))
    assert settings() == before
    with pytest.raises(SystemExit):
        script.main(script.Args(env_id="None-v0", num_threads=2))
    assert settings() == before

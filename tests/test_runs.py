"""Seeds, resuming, signals, checkpoints, --evaluate and ranks."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    LEAST,
    TINY,
    environment,
    load,
    one_for_all,
    skip_beside_a_gpu,
    tiny,
    two_for_all,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import maml_trpo

LONG = 10**9


def state(folder):
    """All of a checkpoint but the command line."""
    return {name: value for name, value in load(folder).items() if name != "args"}


def same(a, b, tolerance=0):
    """Whether two nests of tensors and numbers are equal, bit for bit without a tolerance."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name], tolerance) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if torch.is_tensor(a):
        equal = (
            torch.equal
            if not tolerance
            else lambda a, b: torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        )
        return a.dtype == b.dtype and equal(a, b)
    return a == b or (isinstance(a, float) and abs(a - b) <= tolerance * max(1, abs(a)))


def scalars(folder):
    """{tag: {step: value}} of what a run logged, without timings; fails if a tag has a step twice."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    logged = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), f"{tag}: {steps}"
        if tag != "charts/SPS" and not tag.startswith("time/"):
            logged[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return logged


def test_the_seed_decides(script, train, monkeypatch):
    first, again, other = (train(script, seed=seed)[0] for seed in (1, 1, 2))
    assert same(state(first), state(again)) and scalars(first) == scalars(again)
    assert not same(state(first), state(other)) and scalars(first) != scalars(other)
    with monkeypatch.context() as patch:  # of the initial parameters
        keyed = script.keyed_rng
        patch.setattr(script, "keyed_rng", lambda seed, *key: keyed(0, *key))
        first, other = (state(train(script, seed=seed)[0]) for seed in (1, 2))
        assert not same(first, other)
    with monkeypatch.context() as patch:  # and of the episodes
        set_seed = torch.manual_seed
        patch.setattr(torch, "manual_seed", lambda seed: set_seed(0))
        first, other = (state(train(script, seed=seed)[0]) for seed in (1, 2))
        assert not same(first, other)


def test_meta_tests_do_not_change_training(script, train):
    often, rarely = (
        train(script, eval_every=every, num_test_tasks=n)[0] for every, n in ((1, 5), (LONG, 3))
    )
    assert same(state(often), state(rarely))


def test_what_main_returns(script, train):
    folder, metrics = train(script, env_id="SparsePointRobot-v0", eval_every=1)
    logged = scalars(folder)
    expected = {
        tag: values[max(values)]
        for tag, values in logged.items()
        if tag.startswith(("eval/", "charts/"))
    }
    assert metrics.keys() == expected.keys() | {"charts/SPS"}
    assert {tag: metrics[tag] for tag in expected} == pytest.approx(expected)
    assert {"charts/episodic_return", "charts/episodic_length"} <= metrics.keys()
    assert any(tag.startswith("eval/return_after_") for tag in metrics)
    assert {
        tag.replace("success", "return") for tag in metrics if "success" in tag
    } <= metrics.keys()
    logged = {
        tag: values for tag, values in logged.items() if not tag.startswith("expert/")
    }  # of a phase that is over
    assert all(max(values) == state(folder)["global_step"] for values in logged.values())


# of Discrete actions it differs from step to step; rl2.py's is part of its loss
@pytest.mark.parametrize(
    "name, actions", [("maml_trpo", "Discrete"), ("maesn", "Discrete"), ("mmaml", "Matrix")]
)
def test_the_entropy_is_that_of_steps_that_were_taken(name, actions, train, monkeypatch):
    """Mean over tasks of the mean over their steps; padding has no part in it."""
    script = importlib.import_module(name)
    collect = script.collect
    entropies = []

    def spoil_the_padding(*args, **settings):
        batch = collect(*args, **settings)
        taken = batch["mask"] == 1
        entropy = script.distribution(batch["dist_params"], actions == "Discrete").entropy()
        means = [x[steps].mean().item() for x, steps in zip(entropy, taken, strict=True)]
        entropies.append(sum(means) / len(means))
        batch["dist_params"][..., -1][~taken] += 1  # a logit, or a log standard deviation
        return batch

    monkeypatch.setattr(script, "collect", spoil_the_padding)
    env_id = f"user_tasks:{actions}-v0"  # episodes of two to eight steps
    folder, _ = train(script, env_id=env_id, total_timesteps=1)
    (logged,) = scalars(folder)["losses/entropy"].values()
    # after adaptation; further ones are the meta-test's
    assert logged == pytest.approx(entropies[1], rel=1e-5)


RESUMED_OWN = {
    "maml_trpo": [{"learn_inner_lr": True, "num_inner_steps": 2}, {"num_train_tasks": 6}],
    "rl2": [{"separate_value": True, "embedding_size": 6, "episodes_per_task": 2}],
    "gmps": [{"expert_timesteps": 160}, {"dagger": False}],
    "mmaml": [
        {"num_inner_steps": 2},
        {"no_modulation": True},
        {"env_id": "MultimodalNavigation2-v0", "oracle_mode": True},
    ],
    "pearl": [
        {"replay_size": 50},  # is overwritten
        {
            "prior_steps": 20,
            "posterior_steps": 0,
            "extra_steps": 20,
            "context_next_obs": True,
        },
    ],
    "maesn": [{"adapt_policy": True, "num_inner_steps": 2, "latent_dim": 3}],
}


def test_a_resumed_run_equals_the_uninterrupted_one(script, train):
    for flags in ({}, *RESUMED_OWN[script.__name__]):
        whole, metrics = train(script, total_timesteps=4 * 160, **flags)
        part, _ = train(script, total_timesteps=2 * 160, **flags)
        half = state(part)
        _, resumed_metrics = train(script, resume=part, total_timesteps=4 * 160)
        assert same(state(part), state(whole)) and not same(state(part), half)
        logged, expected = scalars(part), scalars(whole)
        for tag, values in expected.items():
            # the first half ended with a meta-test of its own
            assert values.items() <= logged[tag].items() and (
                tag.startswith("eval/") or values == logged[tag]
            )
        del metrics["charts/SPS"], resumed_metrics["charts/SPS"]
        assert resumed_metrics == metrics


class Crash(Exception):
    pass


@two_for_all
def test_a_crash_after_a_checkpoint_loses_nothing(script, train, monkeypatch):
    """What was logged after the last checkpoint is done again, and is in TensorBoard once."""
    whole, _ = train(script, total_timesteps=5 * 160, checkpoint_every=2)
    log = script.Run.log

    def log_and_crash(run, metrics):
        log(run, metrics)
        if run.global_step >= half["global_step"] + 1:
            run.writer.flush()
            raise Crash

    half = state(train(script, total_timesteps=2 * 160)[0])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(script.Run, "log", log_and_crash)
        train(script, total_timesteps=5 * 160, checkpoint_every=2, exp_name="crashed")
    (crashed,) = whole.parent.glob("*__crashed__*")
    assert same(state(crashed), half)
    train(script, resume=crashed, total_timesteps=5 * 160)
    assert same(state(crashed), state(whole)) and scalars(crashed) == scalars(whole)


@one_for_all
def test_a_checkpoint_is_never_half_written(script, train, monkeypatch):
    folder, _ = train(script)
    before, size = state(folder), (folder / "checkpoint.pt").stat().st_size
    save = torch.save

    def half_a_save(content, path):
        save(content, path)
        os.truncate(path, size // 2)
        raise Crash

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(Crash):
        train(script, resume=folder, total_timesteps=640, checkpoint_every=1)
    assert same(state(folder), before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@two_for_all
def test_signals(script, train, tmp_path, number):
    """SIGTERM ends the iteration and saves; after SIGKILL the last checkpoint is good."""
    skip_beside_a_gpu()
    pid = os.fork()
    if pid == 0:
        code = 1
        sys.stdout = open("output", "w")
        os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT), 2)
        try:
            train(script, total_timesteps=LONG, checkpoint_every=3, exp_name="stopped")
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    while not (found := list(tmp_path.glob("runs/*__stopped__*/checkpoint.pt"))):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(pid, number)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output = Path("output").read_text()
    folder = found[0].parent
    stopped = state(folder)
    if number == signal.SIGTERM:
        assert code == 0
        assert "stopping after this iteration; again to abort" in Path("errors").read_text()
        assert f"stopped; --resume {folder.relative_to(tmp_path)} goes on from here" in output
        last = max(max(values) for values in scalars(folder).values())
        assert stopped["global_step"] == last  # nothing that was done is lost
    else:
        assert code == -signal.SIGKILL and "--resume" not in output
    total = stopped["global_step"] + 160
    train(script, resume=folder, total_timesteps=total)
    whole, _ = train(script, total_timesteps=total)
    assert same(state(folder), state(whole)) and scalars(folder).keys() == scalars(whole).keys()


@one_for_all
def test_a_second_signal_aborts(script, train, monkeypatch):
    log, handler = script.Run.log, signal.getsignal(signal.SIGINT)

    def log_and_interrupt(run, metrics):
        log(run, metrics)
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL

    monkeypatch.setattr(script.Run, "log", log_and_interrupt)
    folder, _ = train(script, total_timesteps=640)  # one signal: returns after one iteration
    assert state(folder)["iteration"] == 1
    assert signal.getsignal(signal.SIGINT) is handler


@one_for_all
def test_a_run_that_fails_does_not_say_that_it_goes_on_from_here(
    script, train, monkeypatch, capsys
):
    def interrupt_and_crash(run, metrics):
        signal.raise_signal(signal.SIGTERM)
        raise Crash

    monkeypatch.setattr(script.Run, "log", interrupt_and_crash)
    with pytest.raises(Crash):
        train(script)
    assert "goes on from here" not in capsys.readouterr().out


def test_evaluate(script, train, capsys):
    folder, metrics = train(script, env_id="SparsePointRobot-v0")
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    _, again = train(script, evaluate=folder)
    table = capsys.readouterr().out
    assert again == {tag: value for tag, value in metrics.items() if tag.startswith("eval/")} != {}
    assert f"return on {TINY['num_test_tasks']} held-out tasks, mean and 95% interval" in table
    for tag, value in again.items():
        name, _, number = tag.removeprefix("eval/").partition("_after_")
        rows = [x for x in again if x.startswith(f"{tag}_after_")]
        if rows:  # the last of them, without its number
            assert value == again[max(rows, key=lambda x: int(x.split("_")[-2]))]
            continue
        after = f"after {number.removesuffix('_episodes'):>4} episodes {value:10.3f} ± "
        assert (after if number else f"{name}: {value:.3f} ± ") in table
    with np.load(folder / "evaluation.npz") as file:  # where figures come from
        assert file["tasks"].shape == (TINY["num_test_tasks"], 2)
        for tag, value in again.items():
            name, _, number = tag.removeprefix("eval/").partition("_after_")
            rows = [other for other in again if other.startswith(f"eval/{name}_after_")]
            row = rows.index(tag) if number else -1 if rows else ()
            assert np.nanmean(file[name][row]) == pytest.approx(value, rel=1e-5)
    (folder / "evaluation.npz").unlink()
    assert files == {path: path.stat().st_mtime_ns for path in folder.iterdir()}  # nothing else
    _, more = train(script, evaluate=folder, num_test_tasks=3, num_eval_steps=0)
    assert more.keys() < again.keys() and "on 3 held-out tasks" in capsys.readouterr().out
    assert len(list(folder.parent.iterdir())) == 1


# --------------------------------------------------------------------------------------------- ranks


def fork_ranks(body, n=2):
    """body(rank) in n processes with torchrun's variables; their exit codes and standard errors."""
    skip_beside_a_gpu()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = [Path(f"stderr_{rank}") for rank in range(n)]
    pids = []
    for rank in range(n):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            sys.stderr = names[rank].open("w")
            sys.stdout = open(os.devnull, "w")
            os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
            os.environ |= {name: str(n) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                body(rank)
                torch.distributed.destroy_process_group()
                code = 0
            except SystemExit as end:
                sys.stderr.write(f"{end.code}\n" if isinstance(end.code, str) else "")
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes, [name.read_text() for name in names]


def test_two_ranks(script, train, tmp_path, monkeypatch):
    """Their parameters are the same; one that is killed ends the other, and the run can go on.

    On episodes that end early, each at its own step, so that the ranks' batches differ in length.
    How ranks end and go on is shared: two whose ranks keep replays stand for all.
    """
    steps = 5 * 160 + LEAST[script.__name__]
    flags = {"env_id": "user_tasks:Uneven-v0", "checkpoint_every": 2, "num_minibatches": 1}
    if script.__name__ != "rl2":
        del flags["num_minibatches"]
    log, save = script.Run.log, script.Run.save

    def run(rank, death=0, **more):
        def log_and_die(run, metrics):
            log(run, metrics)
            if run.iteration == death and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        def save_and_keep(run, **state):
            save(run, **state)
            own = state.pop("own", None)
            torch.save(state | {"metrics": run.metrics}, f"rank_{rank}.pt")
            torch.save(own, f"own_{rank}.pt")

        monkeypatch.setattr(script.Run, "log", log_and_die)
        monkeypatch.setattr(script.Run, "save", save_and_keep)
        train(script, **more)

    codes, errors = fork_ranks(
        lambda rank: run(rank, exp_name="whole", total_timesteps=steps, **flags)
    )
    assert codes == [0, 0], errors
    (whole,) = (tmp_path / "runs").iterdir()
    one, two = (torch.load(f"rank_{rank}.pt", weights_only=True) for rank in (0, 1))
    del one["metrics"]["charts/SPS"], two["metrics"]["charts/SPS"]
    assert same(one, two)
    owns = [torch.load(f"own_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert owns == [None, None] or not same(*owns)
    if script.__name__ not in ("gmps", "pearl"):
        return

    def killed(rank):
        run(rank, death=5, exp_name="killed", total_timesteps=steps, **flags)

    codes, errors = fork_ranks(killed)
    assert codes == [1, -signal.SIGKILL], errors
    line = "error: lost another rank; --resume goes on from the last checkpoint"
    assert errors[0].startswith(line) and errors[0].count("\n") == 1
    (folder,) = set((tmp_path / "runs").iterdir()) - {whole}
    stopped = state(folder)
    assert stopped["iteration"] == 4 and stopped["ranks"] == 2
    with pytest.raises(SystemExit, match=r"^error: --resume: .* is a run of 2 ranks, not 1$"):
        train(script, resume=folder)
    codes, errors = fork_ranks(lambda rank: run(rank, resume=folder))
    assert codes == [0, 0], errors
    assert same(state(folder), state(whole))
    files = [sorted(path.name for path in run.glob("*.pt")) for run in (folder, whole)]
    assert files[0] == files[1]
    for name in files[0]:
        assert same(*(torch.load(run / name, weights_only=True)["own"] for run in (folder, whole)))
    train(script, evaluate=folder)  # on any number of ranks


def test_torchrun(train, tmp_path):
    """The README's command, once and for all six."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher.append("--local-addr=127.0.0.1")  # a sandbox may not resolve its own name
    command = [*launcher, maml_trpo.__file__, *tiny("maml_trpo", total_timesteps=160)]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("writing to") == result.stdout.count("return on 5 held-out") == 1


@one_for_all
def test_ranks_that_do_not_divide_the_meta_batch(script, train, tmp_path, monkeypatch):
    for name, value in (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "3"}).items():
        monkeypatch.setenv(name, value)
    line = r"^error: --meta-batch-size \d: not divisible by the 3 ranks$"
    with pytest.raises(SystemExit, match=line):
        train(script)
    assert not (tmp_path / "runs").exists()


# torchrun's variables, all right; each case below spoils them
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "spoiled",
    [
        {"WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        TORCHRUN | {"RANK": "2"},
        TORCHRUN | {"RANK": "-1"},
        TORCHRUN | {"WORLD_SIZE": "two"},
        TORCHRUN | {"WORLD_SIZE": ""},
        TORCHRUN | {"LOCAL_RANK": "2"},
        TORCHRUN | {"LOCAL_WORLD_SIZE": "4"},
        TORCHRUN | {"MASTER_PORT": "none"},
    ],
)
@one_for_all
def test_variables_of_torchrun_set_by_accident(script, train, tmp_path, monkeypatch, spoiled):
    """WORLD_SIZE alone would have waited for another process for ever."""
    for name, value in spoiled.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=r"^error: .*torchrun.*$"):
        train(script)
    assert not (tmp_path / "runs").exists()


@one_for_all
def test_each_rank_takes_its_own_gpu_before_it_joins_the_others(script, monkeypatch):
    """Else the first collective of all ranks would sit on the first GPU."""
    calls = []
    for name, value in (TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend: calls.append(backend)
    )
    monkeypatch.setattr(script.atexit, "register", lambda function: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    script.setup(script.Args(cuda=True, num_threads=1, meta_batch_size=2))
    assert calls == [1, "nccl"]


@one_for_all
def test_keys_of_draws_do_not_alias(script):
    """A key and the same key with a 0 after it are two streams, as are two purposes."""
    keys = [(), (0,), (0, 0), (1,), (1, 0), (1, 0, 0), (0, 1)]
    draws = {
        script.keyed_rng(seed, purpose, *key).random()
        for seed in (0, 1)
        for purpose in "ab"
        for key in keys
    }
    assert len(draws) == 4 * len(keys)


@one_for_all
def test_what_is_logged_is_flushed_before_the_checkpoint_is_replaced(script, train, monkeypatch):
    """Killed between the two, a run must not lose the points of its last iteration."""
    calls, replace, flush = [], os.replace, SummaryWriter.flush
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    monkeypatch.setattr(
        SummaryWriter, "flush", lambda writer: calls.append("flush") or flush(writer)
    )
    train(script, checkpoint_every=1)
    assert calls.count("replace") >= 2
    assert all(calls[i - 1] == "flush" for i, call in enumerate(calls) if call == "replace")


# 97.5% quantiles of Student's t by degrees of freedom, from a table
STUDENT = {3: 3.182, 4: 2.776, 9: 2.262, 19: 2.093, 39: 2.023, 199: 1.972}


@pytest.mark.parametrize("nu", STUDENT)
@one_for_all
def test_intervals_are_students(script, nu):
    rng = np.random.default_rng(nu)
    score, tasks = rng.normal(size=(2, nu + 1)), rng.normal(size=(nu + 1, 3))
    mean, half, different = script.over_tasks(score, tasks)
    assert different == nu + 1
    np.testing.assert_allclose(mean, score.mean(1))
    np.testing.assert_allclose(
        half, STUDENT[nu] * score.std(1, ddof=1) / (nu + 1) ** 0.5, rtol=2e-3
    )


@one_for_all
def test_copies_of_a_task_count_once(script, capsys):
    """HalfCheetahDir has two tasks, however often they are met: their spread says nothing about other tasks."""
    rng = np.random.default_rng(0)
    score, tasks = rng.normal(size=(2, 12)), np.tile(rng.normal(size=(6, 2)), (2, 1))
    mean, half, different = script.over_tasks(score, tasks)
    once = script.over_tasks(score.reshape(2, 2, 6).mean(1), tasks[:6])
    np.testing.assert_allclose((mean, half), once[:2])
    assert different == once[2] == 6
    args = script.Args(eval_episodes=10)
    for n in (1, 2, 3):
        scores = {"return": score[:, :n], "extra": score[0, :n]}
        metrics = script.report(scores, tasks[:n], args, {})
        table = capsys.readouterr().out
        assert "±" not in table and "interval" not in table
        assert f"return on {n} held-out tasks, mean:" in table
        assert metrics["eval/return_after_10_episodes"] == pytest.approx(score[1, :n].mean())
        assert metrics["eval/extra"] == pytest.approx(score[0, :n].mean())
    script.report({"return": score}, np.tile(tasks[:2], (6, 1)), args, {})
    assert "return on 12 held-out tasks (2 different), mean:" in capsys.readouterr().out


@one_for_all
def test_tasks_that_a_score_leaves_out(script, capsys):
    """NaN marks them, in all rows."""
    rng = np.random.default_rng(0)
    score, tasks = rng.normal(size=(2, 9)), rng.normal(size=(9, 2))
    some = score.copy()
    some[:, 5:] = np.nan
    args = script.Args(eval_episodes=10)
    metrics = script.report({"return": some}, tasks, args, {})
    table = capsys.readouterr().out
    assert metrics == script.report({"return": score[:, :5]}, tasks[:5], args)
    assert "return on 5 held-out tasks, mean and 95% interval" in table
    assert script.report({"return": score}, tasks, args) != metrics
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------- Weights & Biases


@one_for_all
def test_track(script, train, monkeypatch):
    """One run there for a folder, begun before the writer, with all flags; gone on with by --resume."""
    calls = []
    fake = SimpleNamespace(
        init=lambda **settings: calls.append(settings), finish=lambda: calls.append("finish")
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder, _ = train(script, track=True)
    assert calls[1:] == ["finish"]
    first = calls[0]
    assert first["id"] == first["name"] == folder.name
    assert first["resume"] == "allow" and first["sync_tensorboard"]
    saved = load(folder)["args"]
    assert {name: x for name, x in first["config"].items() if saved[name] != x} == {}
    assert first["group"] == f"PointRobot-v0__{saved['exp_name']}"
    train(script, resume=folder, total_timesteps=4 * 160)
    assert calls[2]["id"] == folder.name and calls[3:] == ["finish"]


@one_for_all
def test_track_without_the_package(script, train, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match=r"^error: --track needs pip install wandb$"):
        train(script, track=True)
    assert not (tmp_path / "runs").exists()


@one_for_all
def test_evaluate_on_other_tasks(script, train, capsys):
    """Other held-out tasks, and another family with the same spaces, whose episodes have its own
    length unless --horizon is given; one of other spaces gets a line.
    """
    folder, metrics = train(script)
    own = {tag: x for tag, x in metrics.items() if tag.startswith("eval/")}
    _, others = train(script, evaluate=folder, task_seed=7)
    assert others.keys() == own.keys() and others != own
    _, sparse = train(script, evaluate=folder, env_id="SparsePointRobot-v0", task_seed=7)
    assert sparse.keys() > own.keys() and "eval/success" in sparse
    for flags, length in (({}, 100), ({"horizon": 7}, 7)):
        train(script, evaluate=folder, env_id="Navigation2D-v0", num_test_tasks=1, **flags)
        file = np.load(Path(folder) / "evaluation.npz")
        steps = file["mask"].shape[1] if "mask" in file else file["obs_0"].shape[2]
        assert steps % length == 0 and steps > 0
    with pytest.raises(SystemExit, match=r"^error: the checkpoint is of other networks"):
        train(script, evaluate=folder, env_id="MultimodalNavigation2-v0")

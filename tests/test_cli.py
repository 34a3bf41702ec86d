"""Bad input gets one line before anything is written, and a script works where it is copied to."""

import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, environment, load, tiny


@pytest.fixture
def refuse(train, script, tmp_path):
    """refuse(**flags): main ends with one line, which is returned, and leaves the folder as it is."""

    def refuse(**flags):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            train(script, **flags)
        line = end.value.code
        assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line and len(line) < 500
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return refuse


COUNTS = ["total_timesteps", "meta_batch_size", "episodes_per_task", "num_test_tasks", "eval_episodes", "eval_every"]
BAD = [(name, value) for name in [*COUNTS, "checkpoint_every"] for value in (0, -1)]
BAD += [(name, -1) for name in ("seed", "task_seed", "horizon", "num_train_tasks", "num_eval_steps", "num_threads")]
BAD += [("gamma", value) for value in (0, -0.5, 1.5, "nan", "inf")]
BAD_MAML = [("max_kl", 0), ("max_kl", -0.01), ("inner_lr", 0), ("inner_lr", -0.1), ("inner_lr", "inf")]
BAD_MAML += [("init_std", 0)]
BAD_MAML += [("hidden_size", 0), ("num_inner_steps", 0), ("cg_iters", 0), ("cg_damping", -1), ("gae_lambda", 1.5)]
BAD_RL2 = [("hidden_size", 0), ("gae_lambda", 1.5), ("learning_rate", 0), ("update_epochs", 0), ("num_minibatches", 0)]
BAD_RL2 += [("clip_coef", 0), ("ent_coef", -1), ("vf_coef", -1), ("max_grad_norm", 0)]
BAD_PEARL = [
    (name, value) for name in ("picked_tasks", "initial_steps", "prior_steps", "batch_size") for value in (0, -1)
]
BAD_PEARL += [("posterior_steps", -1), ("extra_steps", -1), ("gradient_steps", 0), ("context_size", 0)]
BAD_PEARL += [
    ("learning_rate", 0),
    ("tau", 0),
    ("tau", 1.5),
    ("reward_scale", 0),
    ("kl_weight", -1),
    ("kl_weight", "nan"),
]
BAD_PEARL += [("hidden_size", 0), ("encoder_size", 0), ("latent_size", 0), ("exploration_episodes", 0)]
BAD_PEARL += [("warmup_iterations", -1), ("warmup_gradient_steps", 0)]
BAD_GMPS = [(name, 0) for name in ("expert_timesteps", "expert_episodes", "expert_gradient_steps", "expert_batch_size")]
BAD_GMPS += [(name, 0) for name in ("hidden_size", "init_std", "inner_lr", "gradient_steps", "learning_rate")]
BAD_GMPS += [("batch_size", 0), ("dataset_size", 0), ("expert_reward_scale", 0), ("expert_gamma", 0)]
BAD_GMPS += [
    ("expert_noise", -1),
    ("bias_size", -1),
    ("importance_clip", -1),
    ("gae_lambda", 1.5),
    ("tau", 2),
    ("learning_rate_decay", 0),
]
BAD_GMPS += [("importance_clip", 0.5), ("expert_gamma", 1.5), ("expert_learning_rate", 0)]
BAD_MAESN = [
    ("latent_dim", 0),
    ("init_mu_std", -1),
    ("inner_lr", 0),
    ("sigma_lr", 0),
    ("policy_lr", 0),
    ("eval_lr_decay", 0),
]
BAD_MAESN += [("kl_weight", -1), ("num_inner_steps", 0), ("max_kl", 0), ("hidden_size", 0), ("init_std", 0)]
BAD_MMAML = [(name, 0) for name in ("hidden_size", "encoder_size", "num_inner_steps", "update_epochs", "action_scale")]
BAD_MMAML += [(name, 0) for name in ("inner_lr", "learning_rate", "modulation_learning_rate", "init_std", "clip_coef")]
BAD_MMAML += [("target_clipfrac", 0), ("kl_weight", -1), ("gae_lambda", 2)]
BAD_OWN = {
    "maml_trpo": BAD_MAML,
    "rl2": BAD_RL2,
    "pearl": BAD_PEARL,
    "gmps": BAD_GMPS,
    "maesn": BAD_MAESN,
    "mmaml": BAD_MMAML,
}


@pytest.mark.parametrize("flag, value", BAD)
def test_numbers_out_of_range(refuse, flag, value):
    line = refuse(**{flag: value})
    assert f"--{flag.replace('_', '-')} {value}" in line and "must be" in line


def test_own_numbers_out_of_range(refuse, script):
    for flag, value in BAD_OWN[script.__name__]:
        line = refuse(**{flag: value})
        assert f"--{flag.replace('_', '-')} {value}" in line and "must be" in line


def test_the_least_that_is_allowed(train, script):
    train(script, seed=0, task_seed=0, num_eval_steps=0, num_test_tasks=1, horizon=1, gamma=1, total_timesteps=1)


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
def test_environments_that_are_none(refuse, env_id, parts):
    line = refuse(env_id=env_id)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("flag", ["train_reward", "test_reward"])
def test_a_sparse_reward_where_there_is_none(refuse, flag):
    assert "Navigation2D-v0 reports no sparse reward" in refuse(env_id="Navigation2D-v0", **{flag: "sparse"})


def test_cuda_without_a_gpu(refuse, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--cuda" in refuse(cuda=True)


# --------------------------------------------------------------------------------------------------- resuming what?


@pytest.fixture
def folder(train, script):
    return train(script)[0]


def test_a_complete_run(refuse, folder):
    assert "is complete" in refuse(resume=folder)


@pytest.mark.parametrize("flag, value", [("env_id", "Navigation2D-v0"), ("gamma", 0.5), ("num_test_tasks", 6)])
def test_a_flag_that_cannot_change(refuse, folder, flag, value):
    line = refuse(resume=folder, total_timesteps=640, **{flag: value})
    assert f"--{flag.replace('_', '-')}" in line and "cannot change" in line
    if flag != "num_test_tasks":  # this may change for an evaluation
        assert "cannot change" in refuse(evaluate=folder, **{flag: value})


def test_what_may_change(train, script, folder):
    steps = load(folder)["global_step"] + 1
    train(script, resume=folder, total_timesteps=steps, num_threads=1, eval_every=1, checkpoint_every=1, cuda=False)
    args = load(folder)["args"]
    assert args["total_timesteps"] == steps and args["resume"] == "" and args["horizon"] == TINY["horizon"]


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
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
    for content in ([1, 2], {"weights": torch.zeros(3)}, checkpoint | {"more": folder}):  # a Path is not only weights
        torch.save(content, path)
        assert "damaged" in refuse(**{flag: folder})


# ------------------------------------------------------------------------------------------------- as its own process


def run(command, cwd):
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment(), capture_output=True, text=True)


@pytest.mark.parametrize("flags", [{"env_id": "Navigation-v0"}, {"resume": "runs/none"}])
def test_an_error_is_one_line_on_stderr(script, tmp_path, flags):
    result = run([script.__file__, *tiny(script, **flags)], tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_copy_of_the_script_is_enough(script, tmp_path):
    name = Path(script.__file__).name
    shutil.copy(script.__file__, tmp_path)
    usage = run(["-I", name, "--help"], tmp_path)  # -I: nothing else on the path
    assert usage.returncode == 0 and usage.stderr == "" and "--meta-batch-size" in usage.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    result = run(["-I", name, *tiny(script)], tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.startswith("writing to runs/") and "held-out tasks" in result.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert load(folder)["global_step"] == TINY["total_timesteps"]


def test_importing_does_nothing(script, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    path, generator = sys.path.copy(), torch.get_rng_state()
    runpy.run_path(script.__file__, run_name="imported")
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert path == sys.path and torch.equal(generator, torch.get_rng_state())

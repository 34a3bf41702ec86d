"""What the tests share: the scripts, a tiny configuration, and a way to run a script in a folder of its own."""

import importlib
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
torch.set_num_threads(1)
# tqdm's own lock is shared with forked children, which may be killed while they hold it
tqdm.set_lock(threading.RLock())
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # of a cluster's job
event_file_writer._global_uid = event_file_writer.AtomicCounter(
    10**6
)  # files of one second are sorted by it, as text

SCRIPTS = ["maml_trpo", "rl2", "pearl", "gmps", "maesn", "mmaml"]  # the house, on each of these

# PointRobot has random starts and never ends early; an iteration of each script takes 160 steps
TINY = {
    "env_id": "PointRobot-v0",
    "meta_batch_size": 4,
    "episodes_per_task": 2,
    "horizon": 10,
    "num_test_tasks": 5,
    "num_eval_steps": 1,
    "num_threads": 1,
    "total_timesteps": 320,
}
OWN = {
    # 4 tasks x 2 episodes x 10 steps, before and after adaptation
    "maml_trpo": {"hidden_size": 8},
    "rl2": {"hidden_size": 8, "meta_batch_size": 8, "num_minibatches": 2},
    # 4 tasks x 2 episodes x 10 steps, a prior and a posterior phase; first without gradient steps
    "pearl": {
        "num_train_tasks": 4,
        "picked_tasks": 4,
        "initial_steps": 40,
        "prior_steps": 20,
        "posterior_steps": 20,
        "extra_steps": 0,
        "warmup_iterations": 1,
        "warmup_gradient_steps": 2,
        "gradient_steps": 2,
        "batch_size": 8,
        "context_size": 16,
        "context_segment": 4,
        "context_window": 60,
        "replay_size": 500,
        "hidden_size": 8,
        "encoder_size": 8,
        "anneal": False,  # a longer run would have other step sizes from the start
        "exploration_episodes": 1,
    },
    # 80 steps of the SAC expert and 80 of demonstrations, then rounds of 80 and DAgger's 80
    "gmps": {
        "hidden_size": 8,
        "num_train_tasks": 4,
        "expert_timesteps": 80,
        "expert_episodes": 2,
        "expert_gradient_steps": 2,
        "gradient_steps": 2,
        "checkpoint_every": 10,
    },
    "maesn": {
        "hidden_size": 8,
        "num_train_tasks": 6,
        "num_inner_steps": 1,
        "eval_episodes": 2,
        "test_reward": "dense",
    },
    "mmaml": {"hidden_size": 8, "encoder_size": 8, "num_inner_steps": 1},
}
# total_timesteps: above the initial collection, or the expert and its demonstrations
LEAST = dict.fromkeys(SCRIPTS, 1) | {"pearl": 161, "gmps": 240}


def to_argv(flags):
    """{"inner_lr": 0.2, "cuda": False} to ["--inner-lr", "0.2", "--no-cuda"]."""
    argv = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        argv += (
            [f"--{'' if value else 'no-'}{name}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return argv


def tiny(script, **flags):
    """The command line of a tiny run; one that resumes or evaluates takes its settings from the checkpoint."""
    name = getattr(script, "__name__", script)
    return to_argv(
        flags if {"resume", "evaluate"} & flags.keys() else {**TINY, **OWN[name], **flags}
    )


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


def skip_beside_a_gpu():
    """Of tests that fork: where torch finds a GPU, autograd has threads that do not survive it."""
    if torch.cuda.is_available():
        pytest.skip("forks, and this machine has a GPU")


def stands_for_all(*names):
    """Of a test of shared blocks, which are the same bytes in all: these scripts stand for them."""
    return pytest.mark.parametrize("script", names, indirect=True)


one_for_all = stands_for_all("maml_trpo")
two_for_all = stands_for_all("maml_trpo", "gmps")  # one that also keeps a replay of its own
two_rollouts = stands_for_all("maml_trpo", "rl2")  # whose trials are steps of its own


@pytest.fixture(autouse=True)
def fresh_environments():
    """Scripts keep the lanes that they have made; no test finds those of another."""
    yield
    for name in SCRIPTS:
        if name in sys.modules:
            sys.modules[name].make_envs.cache_clear()


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(script, **flags) runs main in tmp_path and returns the run's folder and what main returned."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    names, writers = iter(range(100)), []

    def keep(*args, **kwargs):
        writers.append(SummaryWriter(*args, **kwargs))
        return writers[-1]

    def run(script, **flags):
        monkeypatch.setattr(script, "SummaryWriter", keep)
        if not {"resume", "evaluate"} & flags.keys():
            flags.setdefault("exp_name", f"run{next(names)}")  # tells the runs of a test apart
        metrics = script.main(script.parse(script.Args, tiny(script, **flags)))
        folder = (
            flags.get("resume")
            or flags.get("evaluate")
            or next(Path("runs").glob(f"*__{flags['exp_name']}__*"))
        )
        return Path(folder), metrics

    yield run
    for (
        number,
        handler,
    ) in handlers.items():  # a run that ends in an error leaves its own behind, and an open writer
        signal.signal(number, handler)
    for writer in writers:
        writer.close()


def load(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def environment():
    """For a process that is to find the scripts and user_tasks."""
    paths = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

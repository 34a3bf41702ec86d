"""On a GPU: what is computed is what the CPU computes, resuming is exact, and checkpoints change device."""

import subprocess
import sys

import pytest
import torch
from conftest import LEAST, ROOT, environment, load, tiny
from test_runs import same, scalars, state
from torch.overrides import TorchFunctionMode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class HostGenerator(torch.Generator):
    """The CPU's, which the scripts take for the GPU's."""

    device = torch.device("cuda")


class DrawOnHost(TorchFunctionMode):
    """What is drawn from such a generator is drawn on the CPU and moved."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is None:
            return function(*args, **kwargs)
        if function is torch.Tensor.exponential_:
            like = torch.empty(args[0].shape, dtype=args[0].dtype)
            return args[0].copy_(like.exponential_(**kwargs))
        device = kwargs.pop("device")
        return function(*args, **kwargs).to(device)


@pytest.fixture
def doubles():
    """Double precision: ten steps of conjugate gradients make single rounding visible."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_an_iteration_from_the_same_draws_is_that_of_the_cpu(script, train, monkeypatch, doubles):
    steps = {"total_timesteps": max(320, LEAST[script.__name__])}
    cpu, _ = train(script, **steps)
    generator = HostGenerator()
    monkeypatch.setattr(script, "generator_of", lambda device: generator)
    with DrawOnHost():
        gpu, _ = train(script, **steps, cuda=True, cudagraphs=False, tf32=False)
    numbers, expected = scalars(gpu), scalars(cpu)
    assert expected.keys() == numbers.keys()
    for tag, values in expected.items():
        if not tag.startswith("time/") and tag != "charts/SPS":
            assert numbers[tag] == pytest.approx(values, rel=1e-3, abs=1e-4), tag


def test_a_run_resumed_by_a_new_process_equals_the_uninterrupted_one(script, tmp_path):
    """Both in processes of their own, graphs included."""

    def run(name, **flags):
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, ROOT / f"{script.__name__}.py", *tiny(script, **flags)]
        where = {"cwd": tmp_path / name, "env": environment()}
        subprocess.run(command, check=True, capture_output=True, **where)
        (folder,) = (tmp_path / name / "runs").iterdir()
        return folder

    whole = run("whole", cuda=True, total_timesteps=4 * 160)
    part = run("part", cuda=True, total_timesteps=2 * 160)
    half = state(part)
    run("part", resume=part, total_timesteps=4 * 160)
    assert same(state(part), state(whole)) and not same(state(part), half)


@pytest.mark.parametrize("cuda", [False, True])
def test_a_run_goes_on_where_it_did_not_begin(script, train, cuda):
    """Its networks do the same there, by other draws."""
    folder, metrics = train(script, total_timesteps=2 * 160, cuda=cuda)
    _, elsewhere = train(script, evaluate=folder, cuda=not cuda)
    assert elsewhere.keys() == {tag for tag in metrics if tag.startswith("eval/")}
    train(script, resume=folder, total_timesteps=4 * 160, cuda=not cuda)
    train(script, resume=folder, total_timesteps=6 * 160, cuda=cuda)
    assert load(folder)["global_step"] >= 6 * 160

"""On a GPU: what is computed is what the CPU computes, resuming is exact, and checkpoints change device."""

import pytest
import torch
from conftest import load
from test_runs import same, scalars, state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_an_iteration_is_that_of_the_cpu(script, train):
    if script.__name__ in ("pearl", "gmps"):
        pytest.skip("draws its minibatches on the device")
    cpu, gpu = (train(script, total_timesteps=160, cuda=cuda)[0] for cuda in (False, True))
    assert scalars(cpu).keys() == scalars(gpu).keys()
    for tag, values in scalars(cpu).items():
        assert scalars(gpu)[tag] == pytest.approx(values, rel=1e-3, abs=1e-4), tag


def test_a_resumed_run_equals_the_uninterrupted_one(script, train):
    train(
        script, cuda=True
    )  # a process's first gradient can differ in its last bits: maesn.py's did
    whole, part = (train(script, total_timesteps=n * 160, cuda=True)[0] for n in (4, 2))
    half = state(part)
    train(script, resume=part, total_timesteps=4 * 160)
    assert same(state(part), state(whole)) and not same(state(part), half)


@pytest.mark.parametrize("cuda", [False, True])
def test_a_run_goes_on_where_it_did_not_begin(script, train, cuda):
    folder, metrics = train(script, total_timesteps=2 * 160, cuda=cuda)
    _, elsewhere = train(script, evaluate=folder, cuda=not cuda)
    assert elsewhere == pytest.approx({tag: metrics[tag] for tag in elsewhere}, rel=1e-3, abs=1e-4)
    train(script, resume=folder, total_timesteps=4 * 160, cuda=not cuda)
    train(script, resume=folder, total_timesteps=6 * 160, cuda=cuda)
    assert load(folder)["global_step"] >= 6 * 160

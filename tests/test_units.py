"""Observations in units, in the three scripts whose policies are feed-forward and trained by their own returns."""

import copy
import importlib

import pytest
import torch
from conftest import load
from plain import in_units
from test_runs import scalars


@pytest.fixture(params=["maml_trpo", "maesn", "mmaml"])
def measured(request, train, monkeypatch):
    """A run of one iteration, of ragged episodes: its folder, the policy as it was measured, and on what."""
    script = importlib.import_module(request.param)
    make, measure, made, seen = script.Policy.__init__, script.Units.measure, [], []

    def spy_on_policy(policy, *given):
        make(policy, *given)
        made.append(policy)

    def spy(units, obs, mask):
        (policy,) = made
        seen.append((copy.deepcopy(policy), obs, mask))
        measure(units, obs, mask)

    monkeypatch.setattr(script.Policy, "__init__", spy_on_policy)
    monkeypatch.setattr(script.Units, "measure", spy)
    folder, _ = train(
        script,
        env_id="user_tasks:Dict-v0",
        total_timesteps=1,
        train_reward="dense",
        test_reward="dense",
    )
    ((policy, obs, mask),) = seen
    return folder, policy, obs, mask


def test_the_first_iteration_measures_and_learns_nothing(measured):
    folder, policy, obs, mask = measured
    valid = obs[mask > 0]
    assert len(valid) < mask.numel()
    saved = load(folder)
    units = {f"units.{name}": x for name, x in saved.get("units", {}).items()}
    state = saved.get("agent") or saved["meta"] | units
    state = {name.removeprefix("policy."): x for name, x in state.items()}
    torch.testing.assert_close(state["units.mean"], valid.mean(0))
    torch.testing.assert_close(state["units.std"], valid.std(0, unbiased=False))
    assert all(torch.equal(state[name], p) for name, p in policy.named_parameters())
    assert not [tag for tag in scalars(folder) if "losses/surrogate" in tag or "pg_loss" in tag]


def test_what_the_net_is_given(measured):
    """Nothing at first, then observations less their mean over their deviation, clipped to ±10."""
    _, policy, obs, mask = measured
    given = (obs, mask)
    obs = obs[mask > 0]
    obs[0], obs[1] = 1e6, -1e6
    more = []
    if type(policy).__module__ == "maesn":
        more = [torch.ones(policy.net[0].in_features - obs.shape[1])]  # z
    if type(policy).__module__ == "mmaml":
        more = [torch.zeros(2, 2, policy.mean.in_features)]  # τ
    assert torch.equal(policy(obs, *more), policy(0 * obs, *more))
    policy.units.measure(*given)
    mean, std = policy.units.mean, policy.units.std
    standard = ((obs - mean) / std).clamp(-10, 10)
    for row, bound in ((0, 10), (1, -10)):
        at, within = (mean + x * std for x in (bound, 0.95 * bound))
        torch.testing.assert_close(policy(obs[row], *more), policy(at, *more))
        assert not torch.allclose(policy(at, *more), policy(within, *more))
    plain = copy.deepcopy(policy)
    plain.units.mean.zero_()
    torch.testing.assert_close(policy(obs, *more), in_units(plain)(standard, *more))
    assert not torch.equal(policy(obs, *more), policy(0 * obs, *more))

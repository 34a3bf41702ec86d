"""CUDA graphs: what is captured gives what is not, bit for bit. Each test twice: on a GPU, if there is one, and on
the CPU with the graphs of slow_graphs.py."""

import importlib
from types import SimpleNamespace

import pytest
import slow_graphs
import torch
from test_runs import same, scalars, state
from torch import nn

import maml_trpo

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ARGS = maml_trpo.Args(cuda=True)


@pytest.fixture(params=["slow", pytest.param("gpu", marks=NO_GPU)])
def device(request, monkeypatch):
    """The device's name; on the CPU, graphs in slow motion for all scripts."""
    if request.param == "gpu":
        return "cuda"
    for name in ("maml_trpo", "rl2", "pearl", "gmps", "maesn", "mmaml"):
        slow_graphs.install(monkeypatch, importlib.import_module(name))
    return "cpu"


@pytest.fixture(autouse=True)
def no_graphs_of_others():
    maml_trpo.GRAPHS.clear()


# ------------------------------------------------------------------------------------- the block graphs


def step(params, step_size):
    """A function of tensors by name."""
    return {name: x - step_size * x.sin() for name, x in params.items()}


def test_a_graph_for_each_shape_and_new_numbers_in_each(device):
    for size in (3, 4, 3):
        for step_size in (0.1, 0.2):
            params = {"a": torch.randn(size, device=device), "b": torch.randn(2, device=device)}
            alpha = torch.tensor(step_size, device=device)
            got = maml_trpo.graphed(step, ARGS)(params, alpha)
            expected = step(params, alpha)
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], expected[name]) for name in got)
    assert len(maml_trpo.GRAPHS) == 2


def test_names_and_order_of_a_dictionary_are_kept(device):
    a, b = torch.randn(2, 3, device=device)
    alpha = torch.ones((), device=device)
    graphed = maml_trpo.graphed(step, ARGS)
    first, second = graphed({"a": a, "b": b}, alpha), graphed({"b": b, "a": a}, alpha)
    assert all(torch.equal(first[name], second[name]) for name in "ab")
    other = graphed({"a": a, "c": b}, alpha)
    assert list(other) == ["a", "c"]


def test_outputs_last(device):
    """They are not what the next replay overwrites."""
    graphed = maml_trpo.graphed(step, ARGS)
    alpha = torch.ones((), device=device)
    first = graphed({"a": torch.ones(3, device=device)}, alpha)["a"]
    kept = first.clone()
    graphed({"a": torch.zeros(3, device=device)}, alpha)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("number", [0.1, 3, True])
def test_numbers_are_refused(device, number):
    """The graph would go on with the first one."""
    with pytest.raises(TypeError, match="would hold a number"):
        maml_trpo.graphed(step, ARGS)({"a": torch.ones(3, device=device)}, number)


def test_without_cuda_or_with_ranks_it_is_the_function(monkeypatch):
    off = SimpleNamespace(cuda=False, cudagraphs=True)
    assert maml_trpo.graphed(step, off) is step
    assert maml_trpo.graphed(step, SimpleNamespace(cuda=True, cudagraphs=False)) is step
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert maml_trpo.graphed(step, ARGS) is step


def draw(scale, args):
    generator = maml_trpo.generator_of(maml_trpo.device_of(args))
    return scale * torch.randn(5, generator=generator, device=scale.device)


def test_draws_are_those_of_the_key(device):
    """Captured, seeded anew and replayed, twice: as without a graph. So the next one, which goes on from there."""
    scale = torch.tensor(2.0, device=device)
    drawn = []
    for function in (draw, maml_trpo.graphed(draw, ARGS)):
        for key in (1, 2, 1):
            maml_trpo.keyed_generator(ARGS, "test", key)
            drawn.append(torch.stack([function(scale, ARGS) for _ in range(3)]))
    eager, captured = drawn[:3], drawn[3:]
    assert all(torch.equal(x, y) for x, y in zip(eager, captured, strict=True))
    assert torch.equal(eager[0], eager[2])
    assert not torch.equal(eager[0], eager[1])
    assert not torch.equal(eager[0][0], eager[0][1])


def learn(net, optimizer, x, args):
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("resumed", [False, True])
def test_the_first_call_takes_one_step(device, resumed):
    """The call before a capture leaves no trace in weights and moments, new ones and those of a checkpoint. A step
    size that is filled anew counts.
    """
    ways = []
    for function in (learn, maml_trpo.graphed(learn, ARGS)):
        torch.manual_seed(0)
        net = nn.Linear(3, 2).to(device)
        optimizer = torch_adam(net)
        x = torch.randn(4, 3, device=device)
        if resumed:
            learn(net, optimizer, x, ARGS)
        losses = []
        for lr in (0.1, 0.1, 0.01):
            optimizer.param_groups[0]["lr"].fill_(lr)
            losses.append(function(net, optimizer, x, ARGS).item())
        ways.append((losses, net.state_dict(), optimizer.state_dict()["state"]))
    assert ways[0][0] == ways[1][0]
    assert len(set(ways[0][0])) == 3
    assert same(ways[0][1:], ways[1][1:])


def torch_adam(net):
    import rl2

    return rl2.adam(net.parameters(), 0.1, ARGS)


# ------------------------------------------------------------------------------------------ the scripts


def train_both(script, train, **flags):
    """A run without graphs and one with them: their folders."""
    flags = {"total_timesteps": 3 * 160, "cuda": True} | flags
    return [train(script, cudagraphs=graphs, **flags)[0] for graphs in (False, True)]


def test_graphs_change_nothing(device, script, train):
    eager, captured = train_both(script, train)
    assert script.GRAPHS
    assert same(state(captured), state(eager))
    numbers, expected = scalars(captured), scalars(eager)
    for tag in expected.keys() - {"charts/SPS"}:
        assert tag.startswith("time/") or numbers[tag] == expected[tag], tag


@pytest.mark.parametrize(
    "name, flags",
    [
        ("rl2", {"env_id": "Bandit5Arms10-v0"}),
        ("rl2", {"env_id": "TabularMDP-v0", "embedding_size": 8}),
        ("rl2", {"separate_value": True, "anneal": True}),
        ("rl2", {"env_id": "user_tasks:Matrix-v0"}),
        ("maml_trpo", {"env_id": "Navigation2D-v0", "horizon": 120}),
        ("maml_trpo", {"env_id": "SparsePointRobot-v0", "inner_loss": "lvc-std"}),
        ("maml_trpo", {"learn_inner_lr": True, "num_inner_steps": 2, "first_order": True}),
        ("maml_trpo", {"env_id": "user_tasks:Matrix-v0"}),
        ("maesn", {"adapt_policy": True}),
        ("mmaml", {"env_id": "MultimodalNavigation2-v0", "oracle_mode": True}),
        ("mmaml", {"no_modulation": True}),
        ("mmaml", {"env_id": "user_tasks:Discrete-v0"}),
        ("gmps", {"expert": "scripted"}),
    ],
)
def test_graphs_of_other_families_and_flags(device, name, flags, train):
    script = importlib.import_module(name)
    eager, captured = train_both(script, train, **flags)
    assert same(state(captured), state(eager))


@NO_GPU
def test_a_resumed_run_captures_anew(script, train):
    """The first replay of a process is of a checkpoint's networks and moments."""
    whole, part = (train(script, total_timesteps=n * 160, cuda=True)[0] for n in (4, 2))
    train(script, resume=part, total_timesteps=4 * 160)
    assert same(state(part), state(whole))

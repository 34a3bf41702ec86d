"""CUDA graphs, without a GPU: what is captured gives what is not, bit for bit."""

import slow_graphs
from test_runs import same, scalars, state


def test_graphs_change_nothing(script, train, monkeypatch):
    graphs = slow_graphs.install(monkeypatch, script)
    folder, _ = train(script, total_timesteps=4 * 160, cuda=True, cudagraphs=False)
    assert not graphs
    captured, _ = train(script, total_timesteps=4 * 160, cuda=True)
    assert graphs and any(graph.replays > 1 for graph in graphs)
    assert same(state(captured), state(folder))
    numbers, expected = scalars(captured), scalars(folder)
    for tag in expected.keys() - {"charts/SPS"}:
        assert tag.startswith("time/") or numbers[tag] == expected[tag], tag

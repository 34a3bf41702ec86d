"""What RL² is to be measured by: classical algorithms and exact optima on the bandits and tabular MDPs of its paper.

    python benchmarks/rl2_references.py Bandit5Arms10-v0 Bandit10Arms10-v0 TabularMDP-v0
    python benchmarks/rl2_references.py runs/NAME [runs/NAME ...]    also scores these runs of rl2.py

On the held-out tasks of rl2.py; prints a Markdown table of trial returns, mean ± standard error over the trials.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.setrecursionlimit(10_000)

import rl2  # noqa: E402

TRIALS = 20_000
UCB1_WEIGHTS = (
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    1.0,
)  # of the confidence bound, added to the posterior mean; the best is shown


@cache
def bandit_optimum(arms: tuple, pulls: int) -> float:
    """Expected return of Bayes-optimal play; arms: (wins, losses) of each, sorted, as their order does not matter."""
    if pulls == 0:
        return 0.0
    best = 0.0
    for i, (wins, losses) in enumerate(arms):
        if i and arms[i] == arms[i - 1]:
            continue
        others = arms[:i] + arms[i + 1 :]
        win = bandit_optimum(tuple(sorted((*others, (wins + 1, losses)))), pulls - 1)
        lose = bandit_optimum(tuple(sorted((*others, (wins, losses + 1)))), pulls - 1)
        p = (wins + 1) / (wins + losses + 2)
        best = max(best, p * (1 + win) + (1 - p) * lose)
    return best


def gittins_indices(pulls: int, grid: int = 500) -> np.ndarray:
    """Index (pulls + 1, wins, losses) of an arm for so many pulls left.

    The sure pay per pull at which one would as soon leave the arm for good, by backward induction on a grid of pays.
    """
    pay, size = np.linspace(0, 1, grid), pulls + 1
    wins, losses = np.ogrid[:size, :size]
    p = ((wins + 1) / (wins + losses + 2))[..., None]
    value, indices = np.zeros((size + 1, size + 1, grid)), np.zeros((size, size, size))
    for left in range(1, size):
        go = p * (1 + value[1:, :-1]) + (1 - p) * value[:-1, 1:]
        indices[left] = (go > left * pay).sum(-1) / grid
        value[:-1, :-1] = np.maximum(go, left * pay)
    return indices


def play_bandits(tasks: np.ndarray, pulls: int, index, rng) -> np.ndarray:
    """Returns (M,) of pulling the arm with the highest index(wins, losses, t); ties are broken at random."""
    wins, losses = np.zeros((2, *tasks.shape))
    lanes = np.arange(len(tasks))
    for t in range(pulls):
        scores = index(wins, losses, t)
        arm = (scores + 1e-9 * rng.uniform(size=scores.shape)).argmax(1)
        pays = rng.uniform(size=len(tasks)) < tasks[lanes, arm]
        wins[lanes, arm] += pays
        losses[lanes, arm] += ~pays
    return wins.sum(1)


def bandit_references(env_id: str, tasks: np.ndarray, rng) -> dict[str, np.ndarray | float]:
    arms, pulls = map(int, re.findall(r"\d+", env_id)[:2])

    indices, lanes = gittins_indices(pulls), {"rng": rng, "tasks": tasks, "pulls": pulls}

    def mean(wins, losses, t):
        return (wins + 1) / (wins + losses + 2)

    def gittins(wins, losses, t):
        return indices[pulls - t, wins.astype(int), losses.astype(int)]

    def ucb1(wins, losses, t, weight):
        return mean(wins, losses, t) + weight * np.sqrt(2 * np.log(t + 1) / (wins + losses + 1))

    bounds = (play_bandits(index=partial(ucb1, weight=weight), **lanes) for weight in UCB1_WEIGHTS)
    exact = {"optimum": bandit_optimum(((0, 0),) * arms, pulls)} if pulls <= 10 else {}
    return exact | {
        "Gittins": play_bandits(index=gittins, **lanes),
        "UCB1": max(bounds, key=np.mean),
        "greedy": play_bandits(index=mean, **lanes),
        "Thompson": play_bandits(
            index=lambda wins, losses, t: rng.beta(wins + 1, losses + 1), **lanes
        ),
        "random": play_bandits(index=lambda wins, losses, t: np.zeros_like(wins), **lanes),
        "best arm known": float(pulls * tasks.max(1).mean()),
    }


def plan(mean: np.ndarray, p: np.ndarray, horizon: int) -> np.ndarray:
    """Actions (horizon, M, S) of value iteration; mean (M, S, A), p (M, S, A, S)."""
    value, actions = np.zeros(mean.shape[:2]), []
    for _ in range(horizon):
        q = mean + np.einsum("msax,mx->msa", p, value)
        value, actions = q.max(-1), [q.argmax(-1), *actions]
    return np.array(actions)


def play_mdps(tasks: np.ndarray, episodes: int, belief, rng) -> np.ndarray:
    """Returns (M,) of planning, at the start of each episode, on belief(visits, reward sums, transition counts)."""
    n, lanes = len(tasks), np.arange(len(tasks))
    envs = rl2.TabularMDPEnvs("TabularMDP-v0", n)
    visits, sums = np.zeros((2, n, 10, 5))
    counts = np.zeros((n, 10, 5, 10))
    total = np.zeros(n)
    for _ in range(episodes):
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        told = {"task": torch.as_tensor(tasks), "generator": generator}
        obs = envs.reset(options=told)[0].numpy()
        actions = plan(*belief(visits, sums, counts), envs.horizon)
        for t in range(envs.horizon):
            state = obs.argmax(1)
            action = actions[t, lanes, state]
            obs, reward = (x.numpy() for x in envs.step(torch.as_tensor(action))[:2])
            visits[lanes, state, action] += 1
            sums[lanes, state, action] += reward
            counts[lanes, state, action, obs.argmax(1)] += 1
            total += reward
    return total


def mdp_references(tasks: np.ndarray, rng, episodes: int = 10) -> dict[str, np.ndarray]:
    mean, p = tasks[:, :50].reshape(-1, 10, 5), tasks[:, 50:].reshape(-1, 10, 5, 10)

    # the posterior's means: N(1, 1) prior, unit noise; Dirichlet(1) prior
    def expected(visits, sums, counts):
        posterior = counts + 1
        return (1 + sums) / (1 + visits), posterior / posterior.sum(-1, keepdims=True)

    def sampled(visits, sums, counts):
        mean, _ = expected(visits, sums, counts)
        weights = rng.standard_gamma(counts + 1)
        drawn = mean + rng.normal(size=mean.shape) / np.sqrt(1 + visits)
        return drawn, weights / weights.sum(-1, keepdims=True)

    def arbitrary(visits, sums, counts):
        return rng.normal(size=visits.shape), np.full(counts.shape, 0.1)

    return {
        "MDP known": play_mdps(tasks, episodes, lambda *_: (mean, p), rng),
        "greedy": play_mdps(tasks, episodes, expected, rng),
        "PSRL": play_mdps(tasks, episodes, sampled, rng),
        "random": play_mdps(tasks, episodes, arbitrary, rng),
    }


def score(run: str) -> tuple[str, np.ndarray]:
    """Environment and trial returns (M,) of a run of rl2.py."""
    with contextlib.redirect_stdout(io.StringIO()):
        threads = str(torch.get_num_threads())
        args = rl2.parse(rl2.Args, ["--evaluate", run, "--num-threads", threads])
        rl2.main(args)
    return args.env_id, np.load(Path(run) / "evaluation.npz")["trial_return"]


def main(names: list[str]):
    runs = {}
    for name in names:
        if Path(name).exists():
            env_id, returns = score(name)
            runs.setdefault(env_id, {})[f"RL² ({name})"] = returns
        else:
            runs.setdefault(name, {})
    print("| family | | trial return |\n|-|-|-|", flush=True)
    for env_id, scores in runs.items():
        rng = np.random.default_rng(1)
        rl2.register_own(env_id)
        tasks = rl2.make_envs(env_id).sample_tasks(TRIALS, np.random.default_rng([0, 1]))
        scores |= (
            mdp_references(tasks, rng)
            if env_id == "TabularMDP-v0"
            else bandit_references(env_id, tasks, rng)
        )
        for name, x in scores.items():
            error = "" if isinstance(x, float) else f" ± {np.std(x) / len(x) ** 0.5:.3f}"
            print(f"| {env_id} | {name} | {np.mean(x):.3f}{error} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))

"""The meta-tests of finished runs as CSV, and tables and figures of such CSVs.

    python benchmarks/plot.py csv runs/NAME benchmarks/results/NAME_SEED.csv
    python benchmarks/plot.py table TAG [TAG ...] CSV [CSV ...]    the last values, over the seeds of each label
    python benchmarks/plot.py steps TAG VALUE CSV [CSV ...]        environment steps until TAG first reaches VALUE
    python benchmarks/plot.py curves PNG TAG CSV [CSV ...]         TAG against environment steps, a line per label
    python benchmarks/plot.py families PNG CSV [CSV ...]           the last return, a panel per FAMILY_LABEL_SEED.csv
    python benchmarks/plot.py figure PNG CSV [CSV ...] [BOUND=VALUE ...]    returns of one label: training, adaptation

Of the evaluation.npz that --evaluate writes to a run's folder:

    python benchmarks/plot.py tasks NPZ            the return of each different held-out task
    python benchmarks/plot.py classes NPZ [ENV_ID] the success in each class of held-out tasks (Meta-World)
    python benchmarks/plot.py episodes PNG NPZ     episodes in the plane, before and after adaptation (maesn.py)
    python benchmarks/plot.py embedding PNG NPZ    embeddings of the tasks, by mode (mmaml.py)

A CSV's label is its name up to _SEED.csv or _SEED_stopped.csv. Over seeds: the interquartile mean and its 95% bootstrap
interval (Agarwal et al. 2021, arXiv 2108.13264). Only the figures need matplotlib.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

# of Okabe and Ito: apart for those who see red and green alike
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]


def pyplot():
    """matplotlib's, with these colours."""
    import matplotlib.pyplot as plt

    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLORS)
    return plt


def to_csv(run: str, path: str, about: dict[str, str] | None = None):
    """eval/* tags of a run against global_step, one row per meta-test; about: comments for the top of the file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run, size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
    rows = defaultdict(dict)
    for tag in tags:
        for event in events.Scalars(tag):
            rows[event.step][tag] = round(event.value, 4)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in (about or {}).items())
        writer = csv.DictWriter(file, ["global_step", *tags])
        writer.writeheader()
        writer.writerows({"global_step": step, **row} for step, row in sorted(rows.items()))


def read(path: str) -> dict[str, np.ndarray]:
    """The columns of a CSV by name."""
    with open(path) as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def by_label(paths: list[str]) -> dict[str, list[dict[str, np.ndarray]]]:
    """The runs of each label, in the order of the paths."""
    runs = defaultdict(list)
    for path in paths:
        runs[re.sub(r"_\d+(_stopped)?$", "", Path(path).stem)].append(read(path))
    return runs


def iqm(x: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: without the lowest and the highest quarter, rounded down."""
    cut = x.shape[-1] // 4
    return np.sort(x, -1)[..., cut : x.shape[-1] - cut].mean(-1)


def interval(x: np.ndarray, draws: int = 5_000) -> np.ndarray:
    """95% bootstrap interval (2, ...) of the interquartile mean over the last axis."""
    picks = np.random.default_rng(0).integers(x.shape[-1], size=(draws, x.shape[-1]))
    return np.percentile(iqm(np.moveaxis(x[..., picks], -2, 0)), [2.5, 97.5], axis=0)


def summary(x: list[float]) -> str:
    x = np.array(x)
    low, high = interval(x)
    return f"{iqm(x):.2f} [{low:.2f}, {high:.2f}]"


def table(tags: list[str], paths: list[str]):
    print(f"| label | seeds | steps | {' | '.join(tags)} |")
    print("|-|-|-" + "|-" * len(tags) + "|")
    for label, runs in by_label(paths).items():
        steps = np.mean([run["global_step"][-1] for run in runs])
        cells = [summary([run[tag][-1] for run in runs]) if tag in runs[0] else "" for tag in tags]
        print(f"| {label} | {len(runs)} | {steps:,.0f} | {' | '.join(cells)} |")


def steps_to(tag: str, value: float, paths: list[str]):
    print(
        f"| label | steps until {tag} reaches {value:g}, by seed | the last value, by seed |\n|-|-|-|"
    )
    for label, runs in by_label(paths).items():
        first = [run["global_step"][run[tag] >= value][:1] for run in runs]
        steps = ", ".join(f"{x[0]:,.0f}" if len(x) else "never" for x in first)
        print(f"| {label} | {steps} | {', '.join(f'{run[tag][-1]:.2f}' for run in runs)} |")


def save(fig, png: str):
    for axes in fig.axes:
        axes.spines[["top", "right"]].set_visible(False)
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(png, dpi=150)


def over_seeds(runs: list[dict[str, np.ndarray]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of several runs at the steps that all of them reach: steps (S,), values (S, seeds)."""
    runs = [{column: x[~np.isnan(run[name])] for column, x in run.items()} for run in runs]
    first = max(run["global_step"][0] for run in runs)
    last = min(run["global_step"][-1] for run in runs)
    steps = np.unique(np.concatenate([run["global_step"] for run in runs]))
    steps = steps[(first <= steps) & (steps <= last)]
    return steps, np.stack([np.interp(steps, run["global_step"], run[name]) for run in runs], -1)


def draw(
    axes,
    labels: dict[str, list[dict[str, np.ndarray]]],
    everyone: list[str],
    tag: str | None = None,
):
    """A line per label, with the interval over its seeds; of a tag, or of the last return that a label has.

    everyone: the labels of all panels, each of which has its colour.
    """
    from matplotlib.ticker import LogLocator

    for label, runs in labels.items():
        name = tag or max((x for x in runs[0] if x.startswith("eval/return_after_")), key=episodes)
        steps, values = over_seeds(runs, name)
        about = f"{len(runs)}" if tag else f"{(n := episodes(name))} episode" + "s" * (n != 1)
        color = f"C{everyone.index(label)}"
        axes.plot(steps, iqm(values), color=color, label=f"{label} ({about})")
        axes.fill_between(steps, *interval(values), color=color, alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="million environment steps of meta-training")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1e6:g}")
    axes.xaxis.set_minor_formatter(lambda steps, _: "")


def episodes(tag: str) -> int:
    return int(re.search(r"\d+", tag).group())


def curves(png: str, tag: str, paths: list[str]):
    """One panel; steps on a logarithmic axis."""
    plt = pyplot()

    fig, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    labels = by_label(paths)
    draw(axes, labels, list(labels), tag)
    axes.set(ylabel=tag)
    fig.legend(frameon=False, title="label (seeds)", loc="outside right upper")
    save(fig, png)


def families(png: str, paths: list[str]):
    """A panel per family, of CSVs named FAMILY_LABEL_SEED.csv: each label's return after all its adaptation."""
    plt = pyplot()

    panels = defaultdict(dict)
    for name, runs in by_label(paths).items():
        family, label = name.split("_", 1)
        panels[family][label] = runs
    fig, row = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 4.6), layout="constrained", squeeze=False
    )
    everyone = sorted({label for labels in panels.values() for label in labels})
    for axes, (family, labels) in zip(row[0], panels.items(), strict=True):
        draw(axes, labels, everyone)
        low, high = np.percentile(
            np.concatenate([line.get_ydata() for line in axes.lines]), [25, 75]
        )
        bottom = max(
            axes.get_ylim()[0], low - 5 * (high - low)
        )  # one bad test would flatten all lines
        top = axes.dataLim.y1
        axes.set(title=family, ylim=(bottom, top + 0.05 * (top - bottom)))
        axes.legend(
            frameon=False,
            fontsize="small",
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.17),
        )
    row[0, 0].set(ylabel="return on held-out tasks, adapted")
    save(fig, png)


def figure(png: str, paths: list[str], bounds: list[str] = ()):
    """Left: return after the first few n episodes and after all, during training. Right: after every n, at the end.

    bounds: NAME=VALUE, drawn as dashed lines. Over seeds: left the interquartile mean and its interval, right each.
    """
    plt = pyplot()

    runs = [read(path) for path in paths]
    tags = {episodes(tag): tag for tag in runs[0] if tag.startswith("eval/return_after_")}
    every = sorted(tags)
    widths = [1.7, 1] if len(every) > 1 else [1]  # one n is no curve
    size = (3 + 2.2 * sum(widths), 3.4)
    fig, row = plt.subplots(
        1,
        len(widths),
        figsize=size,
        width_ratios=widths,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    left, *right = row[0]
    for i, n in enumerate(sorted({*every[:3], every[-1]})):
        steps, values = over_seeds(runs, tags[n])
        about = f"after {n} episodes" if right else "the script"
        left.plot(steps / 1e6, iqm(values), "o-", markersize=3, color=f"C{i}", label=about)
        left.fill_between(steps / 1e6, *interval(values), color=f"C{i}", alpha=0.2, linewidth=0)
    left.set(xlabel="million environment steps of meta-training", ylabel="return on held-out tasks")
    left.set_xlim(left=0)
    for axes in right:
        for run in runs:
            last = [over_seeds([run], tags[n])[1][-1, 0] for n in every]
            axes.plot(every, last, "o-", markersize=4, color="0.3", alpha=0.8)
        axes.set(xlabel="episodes of the new task", title="at the end, a line per seed")
        if len(every) < 7:
            axes.set_xticks(every)
    for axes in row[0]:
        for i, bound in enumerate(bounds):
            name, value = bound.split("=")
            dashes = (0, (6 - 2 * i, 2))
            axes.axhline(float(value), color="0.5", linestyle=dashes, linewidth=1, label=name)
    fig.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside right upper")
    save(fig, png)


def tasks(npz: str):
    """A line per different task: its mean return after each adaptation, with a 95% interval over its copies."""
    with np.load(npz) as file:
        returns, every = file["return"], file["tasks"]  # (K + 1, M), (M, ...)
    different, which = np.unique(every, axis=0, return_inverse=True)
    for i, task in enumerate(different):
        scores = returns[:, which.ravel() == i]
        errors = 1.96 * scores.std(1) / scores.shape[1] ** 0.5
        cells = [f"{x:.1f} ± {error:.1f}" for x, error in zip(scores.mean(1), errors, strict=True)]
        print(f"task {np.round(task, 3)}, {scores.shape[1]} times: ", " -> ".join(cells))


def share_interval(share, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95% interval of a share of n; of means in [0, 1] it is too wide rather than too narrow."""
    z = 1.96**2 / n
    half = (z * share * (1 - share) + z**2 / 4) ** 0.5
    return (share + z / 2 - half) / (1 + z), (share + z / 2 + half) / (1 + z)


def classes(npz: str, env_id: str = ""):
    """A row per class of Meta-World's: the mean success of its different held-out tasks after each adaptation.

    env_id: if not given, that of the checkpoint beside the file. The last row is the mean over classes.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch

    from metaworld_tasks import benchmark

    if not env_id:
        checkpoint = torch.load(Path(npz).parent / "checkpoint.pt", weights_only=True)
        env_id = checkpoint["args"]["env_id"]
    of = benchmark(re.sub(r".*:|-reward-v1$|-same-start$", "", env_id))
    with np.load(npz) as file:
        success, rows = file["success"], file["tasks"].astype(int)  # (K + 1, M), (M, 2)
    rows, which = np.unique(rows, axis=0, return_inverse=True)
    copies = np.bincount(which.ravel())
    success = np.stack([np.bincount(which.ravel(), x) / copies for x in success])
    names = np.array([(of.train_tasks, of.test_tasks)[split][i].env_name for split, i in rows])
    columns = ["before", *(f"after {k}" for k in range(1, len(success)))]
    print(f"| class | tasks | {' | '.join(columns)} |\n|{'-|' * (2 + len(columns))}")
    means = {name: success[:, names == name].mean(1) for name in np.unique(names)}
    counts = {name: (names == name).sum() for name in means}
    means["all classes"] = np.mean([*means.values()], axis=0)
    counts["all classes"] = len(names)
    for name, shares in means.items():
        bounds = zip(shares, *share_interval(shares, counts[name]), strict=True)
        cells = [f"{share:.2f} [{low:.2f}, {high:.2f}]" for share, low, high in bounds]
        print(f"| {name} | {counts[name]} | {' | '.join(cells)} |")


def episodes_in_the_plane(png: str, npz: str):
    """Before adaptation and after its last step; the first two observations are x and y, a task is a goal."""
    plt = pyplot()

    with np.load(npz) as file:
        goals = file["tasks"]
        phases = [
            file[name] for name in sorted(file.files, key=len) if name.startswith("obs_")
        ]  # (N, E, T, O)
    fig, row = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharex=True, sharey=True)
    for axes, shown, title in zip(
        row, (phases[0][:1], phases[-1][:5]), ("before", "after"), strict=True
    ):
        for i, paths in enumerate(shown):
            axes.plot(*paths[..., :2].transpose(2, 1, 0), color=f"C{i}", alpha=0.4, linewidth=0.8)
            axes.plot(*goals[i, :2], "*", color=f"C{i}", markersize=14, markeredgecolor="k")
        axes.set(title=f"{shown.shape[1]} episodes per task, {title} adaptation", aspect="equal")
    save(fig, png)


def embedding(png: str, npz: str):
    """Embeddings (Z, M) in their two principal components, coloured by the last number of each task, its mode."""
    plt = pyplot()

    with np.load(npz) as file:
        points, modes = file["embedding"], file["tasks"][:, -1]
    centred = points - points.mean(1, keepdims=True)
    directions, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    fig, axes = plt.subplots(figsize=(4.5, 4), layout="constrained")
    dots = axes.scatter(*directions[:, :2].T @ centred, c=modes, s=12, cmap="turbo")
    share = sizes**2 / (sizes**2).sum()
    axes.set(
        xlabel=f"first component ({share[0]:.0%})", ylabel=f"second component ({share[1]:.0%})"
    )
    fig.colorbar(dots, label="mode, or the last number of the task")
    save(fig, png)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tasks", npz]:
            tasks(npz)
        case ["classes", npz, *env_id] if len(env_id) < 2:
            classes(npz, *env_id)
        case ["episodes", png, npz]:
            episodes_in_the_plane(png, npz)
        case ["embedding", png, npz]:
            embedding(png, npz)
        case ["csv", run, path]:
            to_csv(run, path)
        case ["table", *names] if names and names[-1].endswith(".csv"):
            table(
                [name for name in names if "/" in name and not name.endswith(".csv")],
                [n for n in names if n.endswith(".csv")],
            )
        case ["steps", tag, value, *paths] if paths:
            steps_to(tag, float(value), paths)
        case ["curves", png, tag, *paths] if paths:
            curves(png, tag, paths)
        case ["families", png, *paths] if paths:
            families(png, paths)
        case ["figure", png, *names] if names:
            figure(png, [n for n in names if "=" not in n], [n for n in names if "=" in n])
        case _:
            sys.exit(__doc__)

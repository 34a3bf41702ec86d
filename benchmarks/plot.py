"""Adaptation curves of finished runs: the meta-test's returns to CSV, and CSVs to a figure.

    python benchmarks/plot.py csv runs/NAME benchmarks/results/NAME.csv
    python benchmarks/plot.py figure docs/figures/NAME.png benchmarks/results/SEED1.csv benchmarks/results/SEED2.csv

Needs matplotlib for the second.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path


def to_csv(run: str, path: str):
    """eval/* tags of a run against global_step, one row per meta-test."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
    rows = defaultdict(dict)
    for tag in tags:
        for event in events.Scalars(tag):
            rows[event.step][tag] = round(event.value, 4)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["global_step", *tags])
        writer.writeheader()
        writer.writerows({"global_step": step, **row} for step, row in sorted(rows.items()))


def figure(png: str, paths: list[str]):
    """Left: return after n episodes during training, a line per n. Right: the adaptation curve at the end, per run."""
    import matplotlib.pyplot as plt

    runs = []
    for path in paths:
        with open(path) as file:
            runs.append([{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)])
    tags = {int(re.search(r"\d+", tag).group()): tag for tag in runs[0][0] if tag.startswith("eval/return")}
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[1.7, 1], layout="constrained")
    for i, (n, tag) in enumerate(sorted(tags.items())):
        for j, rows in enumerate(runs):
            steps = [row["global_step"] / 1e6 for row in rows]
            label = f"after {n} episodes" if j == 0 else None
            left.plot(steps, [row[tag] for row in rows], color=f"C{i}", alpha=0.9 if j == 0 else 0.5, label=label)
    for rows in runs:
        right.plot(sorted(tags), [rows[-1][tags[n]] for n in sorted(tags)], "o-", color="0.3", alpha=0.8)
    left.set(xlabel="million environment steps of meta-training", ylabel="return on held-out tasks")
    right.set(xlabel="episodes of the new task", xticks=sorted(tags), title="at the end, a line per seed")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(png, dpi=150)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["csv", run, path]:
            to_csv(run, path)
        case ["figure", png, *paths] if paths:
            figure(png, paths)
        case _:
            sys.exit(__doc__)

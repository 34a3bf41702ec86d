"""Runs the experiments of a list and keeps one CSV of each: what its meta-tests said, at which step, and its origin.

    python benchmarks/run.py benchmarks/LIST.txt [--jobs 2]

A line of the list is `label | seeds | script and flags`, for instance `pearl | 1-3 | pearl.py --env-id PointRobot-v0`.
Results are benchmarks/results/LIST/{label}_{seed}.csv. A run whose CSV is there is not run again, one that was stopped
goes on from its checkpoint; the runs and their logs are in benchmarks/runs/LIST/. plot.py makes tables and figures.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plot import to_csv

ROOT = Path(__file__).resolve().parent.parent


def experiments(path: Path) -> list[tuple[str, int, list[str]]]:
    """(label, seed, script and flags) of a list, all labels with their first seed, then with the second, and so on."""
    found = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            label, seeds, command = (part.strip() for part in line.split("|"))
            first, _, last = seeds.partition("-")
            found += [
                (label, seed, shlex.split(command))
                for seed in range(int(first), int(last or first) + 1)
            ]
    return sorted(found, key=lambda one: one[1])


def run(name: str, label: str, seed: int, command: list[str]) -> str:
    """Run one experiment unless its CSV is there; returns what became of it."""
    result = ROOT / "benchmarks" / "results" / name / f"{label}_{seed}.csv"
    if result.exists():
        return f"{label}_{seed}: was done"
    folder, (script, *flags) = ROOT / "benchmarks" / "runs" / name / f"{label}_{seed}", command
    folder.mkdir(parents=True, exist_ok=True)
    done = [path.parent.relative_to(folder) for path in folder.glob("runs/*/checkpoint.pt")]
    flags = ["--resume", str(done[0])] if done else [*flags, "--seed", str(seed)]
    clock, start = folder / "seconds", time.time()
    with open(folder / "log.txt", "a") as log:
        process = subprocess.run(
            [sys.executable, ROOT / script, *flags], cwd=folder, stdout=log, stderr=log
        )
    seconds = (
        time.time() - start + (float(clock.read_text()) if clock.exists() else 0)
    )  # of all attempts
    clock.write_text(str(seconds))
    last = (folder / "log.txt").read_text().splitlines()[-1:]
    if process.returncode or last[0].startswith("stopped"):
        return f"{label}_{seed}: not finished ({last[0] if last else ''})"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    told = shutil.which("git") and subprocess.run(git, capture_output=True, text=True)
    commit = told.stdout.strip() if told else ""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    if "--cuda" in flags:
        card = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        machine = (
            f"{subprocess.run(card, capture_output=True, text=True).stdout.strip()}, {machine}"
        )
    about = {
        "command": f"python {shlex.join([*command, '--seed', str(seed)])}",
        "commit": commit,
        "machine": machine,
        "seconds": f"{seconds:.0f}",
    }
    to_csv(str(next(folder.glob("runs/*"))), str(result), about)
    return f"{label}_{seed}: done in {seconds:.0f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("list", type=Path)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at once, at most the number of cores"
    )
    args = parser.parse_args()
    with ThreadPoolExecutor(min(args.jobs, os.cpu_count())) as pool:
        for outcome in pool.map(lambda one: run(args.list.stem, *one), experiments(args.list)):
            print(outcome, flush=True)


if __name__ == "__main__":
    main()

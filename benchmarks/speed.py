"""Seconds per iteration, split into collecting and updating, and peak memory, of each script at its defaults.

    python benchmarks/speed.py [--iterations 10] [further flags of the script]

Prints a Markdown table; the first iteration, which warms up, is not counted. docs/performance.md holds its output.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"maml_trpo.py": 80_000}  # environment steps of an iteration at most


def child(script: str, flags: list[str]):
    """In a process of its own: run the script, then print medians of its time/* tags, steps per second and memory."""
    sys.path.insert(0, str(ROOT))
    module = __import__(script.removesuffix(".py"))
    import numpy as np
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module.main(module.parse(module.Args, flags))
    (folder,) = Path("runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    collect, update = (np.array([e.value for e in events.Scalars(f"time/{x}")][1:]) for x in ("collect", "update"))
    steps = np.diff([e.step for e in events.Scalars("time/collect")])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9)
    row = [np.median(collect), np.median(update), np.median(collect + update), np.median(steps / (collect + update))]
    print(f"| {script} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} | {row[3]:,.0f} | {memory:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.child:
        return child(args.child, flags)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print(
        "| script | collect, s | update, s | iteration, s | env steps/s | peak memory, GB |\n|-|-|-|-|-|-|", flush=True
    )
    for script, steps in SCRIPTS.items():
        flags = ["--total-timesteps", str(args.iterations * steps), "--eval-every", "1000000", *flags]
        command = [sys.executable, __file__, "--child", script, *flags]
        with tempfile.TemporaryDirectory() as folder:
            output = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(output.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

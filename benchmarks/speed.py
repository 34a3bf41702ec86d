"""Speed: the MuJoCo families against gymnasium's vector environments and bare mj_step, ML10 against Meta-World's own
vector environments and its bare step, an iteration of each script, and a full-size gradient step of PEARL against the
matrix products in it.

    python benchmarks/speed.py envs [--lanes 400] [--rounds 5]
    python benchmarks/speed.py metaworld [--lanes 20] [--rounds 5]
    python benchmarks/speed.py scripts [--iterations 10] [further flags of the scripts, as --cuda]
    python benchmarks/speed.py pearl [--rounds 5] [--threads 0] [--cuda]

With --cuda the environments in the plane, bandits and MDPs are part of acting. Prints Markdown tables;
docs/performance.md holds their output. Everything that is compared is measured in turns within
one run, and the median is shown.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import gymnasium as gym
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SCRIPTS = [  # script, flags, environment steps of an iteration at most
    ("maml_trpo.py", "", 80_000),
    ("maml_trpo.py", "--env-id HalfCheetahVel-v0", 160_000),
    ("gmps.py", "--expert scripted", 10_000),
    ("maesn.py", "", 16_000),
    ("mmaml.py", "", 60_000),
    ("pearl.py", "--env-id PointRobot-v0 --initial-steps 20", 1_920),
    ("rl2.py", "", 10_000),
    ("rl2.py", "--env-id TabularMDP-v0", 50_000),
    ("rl2.py", "--env-id HalfCheetahVel-v0", 40_000),
]
LARGE = [  # with --cuda, these too
    ("maml_trpo.py", "--meta-batch-size 40", 160_000),
    ("maesn.py", "--meta-batch-size 200 --num-train-tasks 200", 160_000),
    (
        "rl2.py",
        "--env-id Bandit10Arms100-v0 --meta-batch-size 4096 --hidden-size 256 --update-epochs 2"
        " --num-minibatches 16",
        409_600,
    ),
]
V5 = {
    "HalfCheetahVel-v0": "HalfCheetah-v5",
    "AntDir-v0": "Ant-v5",
    "HumanoidDir-v0": "Humanoid-v5",
    "Walker2dRandParams-v0": "Walker2d-v5",
    "HopperRandParams-v0": "Hopper-v5",
}


def rate(step, actions) -> float:
    """Environment steps per second of a function that takes the actions of all lanes; actions (steps, lanes, A)."""
    start = time.perf_counter()
    for action in actions:
        step(action)
    return actions.shape[0] * actions.shape[1] / (time.perf_counter() - start)


def bare_rate(model, frame_skip: int, pool: ThreadPoolExecutor, states, actions) -> float:
    """As rate, of mj_step alone: one MjData a core, from the same states; no observations, no rewards."""
    import mujoco

    cores, (steps, lanes, _) = os.cpu_count(), actions.shape

    def run(core: int):
        data = mujoco.MjData(model)
        for lane in range(core, lanes, cores):
            mujoco.mj_setState(model, data, states[lane], mujoco.mjtState.mjSTATE_FULLPHYSICS)
            for action in actions[:, lane]:
                data.ctrl = action
                mujoco.mj_step(model, data, frame_skip)

    start = time.perf_counter()
    list(pool.map(run, range(cores)))
    return steps * lanes / (time.perf_counter() - start)


def seconds_of(call, device: str) -> float:
    """How long call() takes, until its last kernel has ended."""
    import torch

    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def envs_table(lanes: int, rounds: int, steps: int = 20):
    import maml_trpo

    pool, rng = ThreadPoolExecutor(os.cpu_count()), np.random.default_rng(0)
    print(
        f"| family, {lanes} lanes | steps/s | SyncVectorEnv | AsyncVectorEnv | bare mj_step | / Sync | / bare |"
    )
    print("|-|-|-|-|-|-|-|", flush=True)
    for family, v5 in V5.items():
        envs = maml_trpo.make_envs(family, lanes)
        tasks = envs.sample_tasks(lanes, rng)
        vectors = {
            mode: gym.make_vec(v5, num_envs=40, vectorization_mode=mode)
            for mode in ("sync", "async")
        }
        rates = {name: [] for name in ("ours", "sync", "async", "bare")}
        for _ in range(rounds):
            actions = rng.uniform(-0.3, 0.3, (steps, lanes, envs.model.nu))
            envs.reset(seed=0, options={"task": tasks})
            states = envs.state.copy()
            rates["bare"].append(bare_rate(envs.model, envs.frame_skip, pool, states, actions))
            rates["ours"].append(rate(envs.step, actions))
            for mode, vector in vectors.items():
                vector.reset(seed=0)
                rates[mode].append(rate(vector.step, actions[:, :40]))
        ours, sync, asynchronous, bare = (np.median(x) for x in rates.values())
        row = f"{ours:,.0f} | {sync:,.0f} | {asynchronous:,.0f} | {bare:,.0f} | {ours / sync:.1f} | {ours / bare:.2f}"
        print(f"| {family} | {row} |", flush=True)
        for vector in vectors.values():
            vector.close()


def processor_seconds(pids) -> float:
    """What these processes have used so far (Linux)."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def metaworld_table(lanes: int, rounds: int, steps: int = 200):
    """ML10's training classes in equal shares, 10, 20, 50 or 100 lanes; random actions, the same for all."""
    import torch

    import maml_trpo
    from metaworld_tasks import MetaWorldEnvs, Simulators

    rng, here, make = np.random.default_rng(0), Simulators(), partial(MetaWorldEnvs, "ML10", lanes)
    torch.set_num_threads(1)
    ours = {"`metaworld_tasks.py`, one process": make()}
    tasks = ours["`metaworld_tasks.py`, one process"].sample_tasks(lanes, rng)
    torch.set_num_threads(maml_trpo.cores())
    several = make()
    ours[f"`metaworld_tasks.py`, {several.processes} processes"] = several
    theirs = {}
    for mode in ("sync", "async"):
        given = {"vector_strategy": mode, "meta_batch_size": lanes, "seed": 0}
        theirs[f"`Meta-World/ML10-train`, {mode}"] = gym.make_vec("Meta-World/ML10-train", **given)
    simulators = [here.take(several._named(row), "v2") for row in tasks]

    def bare_step(actions):
        for simulator, action in zip(simulators, actions, strict=True):
            simulator.step(action)

    wall, processor = defaultdict(list), defaultdict(list)
    for k in range(rounds + 1):
        actions = rng.uniform(-1, 1, (steps, lanes, 4)).astype(np.float32)
        for simulator in simulators:
            simulator.reset()
        for envs in ours.values():
            envs.reset(options={"task": tasks})
        for envs in theirs.values():
            envs.call("sample_tasks")
            envs.reset()
        calls = {"bare `env.step`, one process": bare_step}
        calls |= {name: envs.step for name, envs in (ours | theirs).items()}
        for name, step in calls.items():
            pids = [os.getpid()]
            if name.endswith("processes"):
                pids += [helper.pid for helper in several.helpers]
            if name.endswith("async"):
                pids += [process.pid for process in theirs[name].unwrapped.processes]
            before = processor_seconds(pids)
            rates = [rate(step, action[None]) for action in actions]
            used = processor_seconds(pids) - before
            wall[name] += rates * (k > 0)  # the first round warms up
            processor[name] += [steps * lanes / used] * (k > 0)
    print(
        f"| ML10, {lanes} lanes | steps/s | / bare | steps per second of processor time | / bare |"
    )
    print("|-|-|-|-|-|")
    columns = [{name: np.median(x) for name, x in rates.items()} for rates in (wall, processor)]
    for name in wall:
        pairs = [(column[name], column["bare `env.step`, one process"]) for column in columns]
        cells = " | ".join(f"{x:,.0f} | {x / bare:.2f}" for x, bare in pairs)
        print(f"| {name} | {cells} |", flush=True)
    for envs in theirs.values():
        envs.close()


def script_row(script: str, flags: list[str]):
    """In a process of its own: run the script, then print medians of its times, steps per second, the share of
    torch.mm's speed at which it multiplies matrices while it acts and updates, and its memory (with --cuda, the GPU's).
    """
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.flop_counter import FlopCounterMode

    module, simulating, totals = __import__(script.removesuffix(".py")), [0.0], []
    counter = FlopCounterMode(display=False)

    def timed(make):
        def make_timed(*args, **kwargs):
            envs = make(*args, **kwargs)
            step = envs.step

            def timed_step(actions):
                start = time.perf_counter()
                result = step(actions)
                simulating[0] += time.perf_counter() - start
                return result

            envs.step = timed_step
            return envs

        return make_timed

    module.make_envs = cache(
        timed(module.make_envs)
    )  # once per lanes, or steps would be timed twice
    log = module.Run.log

    def timed_log(run, *args):
        totals.append(simulating[0])
        if (
            len(totals) == 5
        ):  # the sixth iteration is slow: its products are counted; PEARL has gradient steps by then
            counter.__enter__()
        if len(totals) == 6:
            counter.__exit__(None, None, None)
        log(run, *args)

    module.Run.log = timed_log
    graphed = module.graphed  # replays cannot be counted
    module.graphed = lambda f, args: f if len(totals) == 5 else graphed(f, args)
    module.main(module.parse(module.Args, flags))
    (folder,) = Path("runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    # without the first iteration, which warms up, the sixth, and the last, which ends with a meta-test
    timed = [*range(1, 5), *range(6, len(totals) - 1)]
    collect, update = (
        np.array([e.value for e in events.Scalars(f"time/{x}")])[timed]
        for x in ("collect", "update")
    )
    steps, simulate = (
        np.diff(x, prepend=0)[timed]
        for x in ([e.step for e in events.Scalars("time/collect")], totals)
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e9 if sys.platform == "darwin" else 1e6
    )
    memory = torch.cuda.max_memory_allocated() / 1e9 if "--cuda" in flags else memory
    seconds = " | ".join(
        f"{np.median(x):.3f}" for x in (collect - simulate, simulate, update, collect + update)
    )
    speed = counter.get_total_flops() / np.median(collect - simulate + update) / 1e9
    size, device = (8192, "cuda") if "--cuda" in flags else (1024, "cpu")
    a, products = torch.randn(size, size, device=device), []
    for _ in range(20):
        products.append(2 * size**3 / seconds_of(lambda: torch.mm(a, a), device) / 1e9)
    share = f"{speed:.0f} GFLOP/s, {speed / np.median(products):.0%}"
    if device == "cuda" and script in ("rl2.py", "mmaml.py"):
        share = "not known: those of cuDNN's GRU are not counted"
    print(f"{seconds} | {np.median(steps / (collect + update)):,.0f} | {share} | {memory:.2f} |")


def scripts_table(iterations: int, flags: list[str]):
    columns = ["script", "act, s", "simulate, s", "update, s", "iteration, s", "steps/s"]
    columns += ["matrix products, share of torch.mm", "peak memory, GB"]
    print(f"| {' | '.join(columns)} |\n|{'-|' * len(columns)}", flush=True)
    rows = SCRIPTS + LARGE * ("--cuda" in flags)
    for script, own, steps in sorted(rows, key=lambda row: "Cheetah" in row[1]):  # the longest last
        given = [
            *own.split(),
            "--total-timesteps",
            str(iterations * steps),
            "--eval-every",
            "1000000",
            *flags,
        ]
        command = [sys.executable, __file__, "row", script, *given]
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        lines = done.stderr.splitlines() if done.returncode else done.stdout.splitlines()
        print(f"| `{f'{script} {own}'.strip()}` | {lines[-1]}", flush=True)


def pearl_table(rounds: int, num_threads: int, device: str):
    """A gradient step at half-cheetah-vel's paper preset, drawing included, against torch.mm of the same sizes.

    On a GPU also replayed as a CUDA graph.
    """
    import torch

    import pearl

    torch.set_num_threads(num_threads or os.cpu_count())
    lines = (ROOT / "benchmarks" / "pearl.txt").read_text().splitlines()
    (recipe,) = (
        x for x in lines if "paper" in x.split("|")[0] and "--env-id HalfCheetahVel-v0" in x
    )
    flags = shlex.split(recipe.split("|")[2])[1:]
    args = pearl.with_defaults(
        pearl.parse(pearl.Args, [*flags, *(["--cuda"] if device == "cuda" else [])])
    )
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    args.horizon, args.replay_size = 200, 2000
    n, b, c = args.meta_batch_size, args.batch_size, args.context_size
    steps = 300 if device == "cuda" else 5
    agent = pearl.Agent(17, 6, args).to(device)
    networks = {"critics": [*agent.sac.critics.parameters(), *agent.encoder.parameters()]}
    networks["actor"] = [*agent.sac.actor.parameters()]
    optimizers = {name: pearl.adam(p, 3e-4, args) for name, p in networks.items()}
    experience = pearl.Experience(np.zeros((args.num_train_tasks, 1)), agent, args)
    replay, rand = experience.replay, partial(torch.randn, device=device)
    ids = torch.arange(args.num_train_tasks, device=device)
    replay.add(
        ids, rand(len(ids), 2000, replay.rows.shape[1]), torch.ones(len(ids), 2000, device=device)
    )
    experience.window.copy_(torch.stack([0 * ids, 0 * ids + 400], 1))
    generator = pearl.keyed_generator(args, "update")

    def gradient_steps(graphed):
        step = graphed(pearl.gradient_step, args)
        for _ in range(steps):
            step(agent, optimizers, experience, generator, args)

    def products(mlp, rows, times, weight, inputs):
        """(rows, in, out) of the products: forward, and gradients in the weights and in the inputs of the layers."""
        for i, w in enumerate(mlp.weights):
            a, b = w.shape[1:]
            found = (
                [(rows, a, b)]
                + weight * [(a, rows, b)]
                + (inputs or (weight and i > 0)) * [(rows, b, a)]
            )
            yield from times * found

    q, pi = agent.sac.critics, agent.sac.actor
    shapes = [
        *products(agent.encoder, n * c, 1, True, False),
        *products(pi, n * b, 1, False, False),
    ]
    shapes += [
        *products(q, n * b, 2, False, False),
        *products(q, n * b, 2, True, True),
    ]  # targets; critics
    shapes += [
        *products(pi, n * b, 1, True, False),
        *products(q, n * b, 2, False, True),
    ]  # actor, through the critics
    pairs = [(rand(a, b), rand(b, c), rand(a, c)) for a, b, c in shapes]

    def bound():
        for _ in range(steps):
            for a, b, out in pairs:
                torch.mm(a, b, out=out)

    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    calls = {f"pearl.py, {where}": partial(gradient_steps, lambda function, args: function)}
    if device == "cuda":
        calls["the same as a CUDA graph"] = partial(gradient_steps, pearl.graphed)
    calls["torch.mm of the same sizes"] = bound
    times = {name: [] for name in calls}
    for k in range(rounds + 1):
        for name, call in calls.items():
            times[name] += [seconds_of(call, device) / steps] * (k > 0)  # the first round warms up
    flop = 2 * sum(a * b * c for a, b, c in shapes)
    print(f"{flop / 1e9:.1f} GFLOP a step\n")
    print(
        "| gradient step, HalfCheetahVel-v0, 16 tasks x 256, 3 x 300 | ms | GFLOP/s | share |\n|-|-|-|-|"
    )
    for name, seconds in times.items():
        share = np.median(times["torch.mm of the same sizes"]) / np.median(seconds)
        print(
            f"| {name} | {1000 * np.median(seconds):.2f} | {flop / np.median(seconds) / 1e9:,.0f} | {share:.0%} |"
        )


def main():
    if sys.argv[1:2] == ["row"]:
        return script_row(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["envs", "metaworld", "scripts", "pearl"])
    parser.add_argument("--lanes", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    args, flags = parser.parse_known_args()
    if args.iterations < 8:
        parser.error(
            "--iterations: at least 8, of which the first, the sixth and the last are not timed"
        )
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n"
    )
    if args.what == "envs":
        envs_table(args.lanes or 400, args.rounds)
    elif args.what == "metaworld":
        metaworld_table(args.lanes or 20, args.rounds)
    elif args.what == "pearl":
        pearl_table(args.rounds, args.threads, "cuda" if "--cuda" in flags else "cpu")
    else:
        scripts_table(args.iterations, flags)


if __name__ == "__main__":
    main()

"""Held-out tasks of a run before and after adaptation, side by side, as a GIF.

    python benchmarks/animate.py OUT.gif runs/NAME [--task 0 1 --names forwards backwards]

It plays the meta-test of --evaluate again: what it draws are episodes of that, and flags that are
not its own, such as --num-eval-steps 1, are the script's. Of a MuJoCo family it renders the episode
of median return, a row for each task; of points in the plane it draws the first --episodes of each
task, all in one panel. For all scripts but rl2.py, which adapts within an episode. Needs matplotlib
and, for MuJoCo, its rendering: by EGL where there is no screen, or by what MUJOCO_GL says.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
from itertools import islice, product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def load(folder: str, flags: list[str]):
    """The script of a run, and its args to evaluate it."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        sys.exit(f"error: {folder} is no run: there is no {path}")
    script = importlib.import_module(torch.load(path, weights_only=True)["algorithm"])
    if not hasattr(script, "rollout"):
        sys.exit(f"error: {script.__name__}.py adapts within an episode, there is no after")
    return script, script.parse(script.Args, ["--evaluate", folder, *flags])


def record(script, args) -> list[tuple]:
    """Of the meta-test's first tasks, before and after: tasks, batch, episodes adapted to.

    A batch is that of rollout, of mean actions if the meta-test scores these; on MuJoCo it also has
    states (N, E, T, 1 + nq + nv), before each step.
    """
    rollout, phases = script.rollout, {}

    def recorded(act, params, tasks, episodes, key, args, deterministic=False):
        lanes = script.make_envs(args.env_id, len(tasks) * episodes)
        step, states = lanes.step, []

        def recorded_step(actions):
            states.append(torch.as_tensor(lanes.state.copy()))
            return step(actions)

        with patch.object(lanes, "step", recorded_step if hasattr(lanes, "frame_skip") else step):
            batch = rollout(act, params, tasks, episodes, key, args, deterministic)
        if states:
            batch["states"] = torch.stack(states, 1).unflatten(0, (len(tasks), episodes))
        if key[:-1] in (("eval",), ("eval", 0)):
            phases[key[-1]] = tasks, batch, key[-1] * args.eval_episodes
        return batch

    with patch.object(script, "rollout", recorded):
        script.main(args)
    return [phases[min(phases)], phases[max(phases)]]


def require_rendering():
    """End the program if MuJoCo cannot render."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco

        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
    except Exception as error:  # each way of rendering fails with its own
        gl = os.environ.get("MUJOCO_GL", "")
        sys.exit(f"error: cannot render with MUJOCO_GL={gl} ({error}): give another, egl or osmesa")


def make_panels(rows: int, width: int, height: int):
    """A figure of rows of two panels, of so many pixels each, with a line of text above."""
    from matplotlib.figure import Figure

    gap, strip = 8, 28
    size = np.array([2 * width + 3 * gap, rows * (height + strip) + gap])
    figure = Figure(size / 100, dpi=100)
    panels = np.empty((rows, 2), object)
    for i, j in np.ndindex(rows, 2):
        corner = np.array([gap + j * (width + gap), gap + (rows - 1 - i) * (height + strip)])
        panels[i, j] = figure.add_axes([*corner / size, *np.array([width, height]) / size])
        panels[i, j].set(xticks=[], yticks=[])
    return figure, panels


def snapshot(figure) -> np.ndarray:
    """The figure as it is now, (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def told(count: int) -> str:
    return f"after {count} episodes" if count else "before adaptation"


def plain(model):
    """A copy of the model on an endless grey floor with a line every metre, below a white sky."""
    model = copy.copy(model)
    model.light_castshadow[:] = False
    model.mat_reflectance[:] = 0
    model.tex_data[:] = 255
    (floor,) = np.flatnonzero(model.geom_type == 0)  # the plane
    material = model.geom_matid[floor]
    texture = model.mat_texid[material].max()
    model.geom_size[floor, :2] = 0
    model.geom_rgba[floor] = model.mat_rgba[material] = [0.7, 0.7, 0.7, 1]
    model.mat_texuniform[material], model.mat_texrepeat[material] = True, 2
    height, width = model.tex_height[texture], model.tex_width[texture]
    pixels = model.tex_data[model.tex_adr[texture] :][: 3 * height * width]
    pixels = pixels.reshape(height, width, 3)
    pixels[: height // 25] = pixels[:, : width // 25] = 160
    return model


def render(phases, model, rows: list[int], names: list[str], width=300, height=108):
    """Frames of the simulator, one for each step; the camera goes along with the torso."""
    import mujoco

    model = plain(model)
    data, camera = mujoco.MjData(model), mujoco.MjvCamera()
    mujoco.mj_forward(model, data)
    tall = data.xpos[1, 2]  # the torso, 0.7 m of a cheetah
    camera.azimuth, camera.elevation, camera.distance = 90, -15, 1.5 + 1.4 * tall
    figure, panels = make_panels(len(rows), width, height)
    shown = []
    for (i, row), (j, (_, batch, count)) in product(enumerate(rows), enumerate(phases)):
        episode = batch["rewards"][row].sum(-1).median(0).indices
        image = panels[i, j].imshow(np.zeros((height, width, 3)), aspect="auto")
        text = f"{names[i]}, {told(count)}"
        states, rewards = batch["states"][row, episode], batch["rewards"][row, episode]
        shown.append((panels[i, j], image, text, states.numpy(), rewards.cumsum(0)))
    with mujoco.Renderer(model, height, width) as renderer:
        for t in range(max(len(states) for *_, states, _ in shown)):
            for axes, image, text, states, returns in shown:
                now = min(t, len(states) - 1)
                data.qpos = states[now, 1 : 1 + model.nq]
                mujoco.mj_forward(model, data)
                camera.lookat = [*data.xpos[1, :2], 0.85 * tall]
                renderer.update_scene(data, camera)
                image.set_data(renderer.render())
                axes.set_title(f"{text}: return {returns[now].round().int()}", size=10)
            yield snapshot(figure)


def draw(phases, rows: list[int], episodes: int, substeps: int = 3):
    """Frames of points in the plane: the ways of each task's first episodes, its goal as a star."""
    from matplotlib.patches import Circle

    size = np.array([300, 160])
    figure, panels = make_panels(1, *size)
    shown = []
    for axes, (tasks, batch, count) in zip(panels[0], phases, strict=True):
        mean = batch["rewards"][rows].sum(-1).mean()
        axes.set_title(f"{told(count)}: return {mean:.1f}", size=10)
        for i, row in enumerate(rows):
            if "success" in batch:  # of SparsePointRobot, which pays within a circle
                axes.add_patch(Circle(tasks[row, :2], 0.2, color="0.9"))
            axes.plot(*tasks[row, :2], "*", color=f"C{i}", markersize=14, markeredgecolor="k")
            mask = batch["mask"][row, :episodes].bool().numpy()  # (E, T)
            obs, moved = (batch[x][row, :episodes, :, :2].numpy() for x in ("obs", "next_obs"))
            way = [obs[:, 0]]
            for t in np.repeat(np.arange(mask.shape[1]), substeps):
                way.append(way[-1] + mask[:, t, None] * (moved - obs)[:, t] / substeps)
            way = np.stack(way).transpose(2, 0, 1)  # (2, substeps T + 1, E)
            lines = axes.plot(*way, color=f"C{i}", alpha=0.6, linewidth=1)
            shown.append((way, lines, axes.plot(*way[:, 0], "o", color=f"C{i}", markersize=4)[0]))
    limits = np.array([[axes.dataLim.min, axes.dataLim.max] for axes in panels[0]])
    low, high = limits.min((0, 1)), limits.max((0, 1))
    half = 0.55 * size * max((high - low) / size)  # the same scale for x and y, and a margin
    (left, bottom), (right, top) = (low + high) / 2 - half, (low + high) / 2 + half
    for axes in panels[0]:
        axes.set(xlim=(left, right), ylim=(bottom, top))
    for t in range(max(way.shape[1] for way, *_ in shown)):
        for way, lines, points in shown:
            past = way[:, : t + 1]
            points.set_data(past[:, -1])
            for line, xy in zip(lines, past.transpose(2, 0, 1), strict=True):
                line.set_data(xy)
        yield snapshot(figure)


def save(frames, path: str, fps: float):
    """A GIF that stays a while at the end, all frames with the same few colours."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    few = np.concatenate([images[0], images[len(images) // 2], images[-1]])
    palette = Image.fromarray(few).quantize(24, Image.Quantize.MAXCOVERAGE, kmeans=2)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times = [1000 / fps] * (len(images) - 1) + [2000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0)
    print(f"{path}: {len(images)} frames, {Path(path).stat().st_size / 1e6:.2f} MB")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("gif")
    parser.add_argument("run")
    parser.add_argument("--task", type=int, nargs="+", default=[0], help="numbers, from 0")
    parser.add_argument("--names", nargs="+", help="of these tasks")
    parser.add_argument("--episodes", type=int, default=10, help="of a task, in the plane")
    parser.add_argument("--fps", type=float, default=20, help="steps per second")
    parser.add_argument("--every", type=int, default=1, help="steps to a frame")
    given, flags = parser.parse_known_args(argv)
    names = given.names or [f"task {i}" for i in given.task]
    if len(names) != len(given.task):
        parser.error("--names: one for each --task")

    script, args = load(given.run, flags)
    points = args.env_id in script.POINT_FAMILIES
    if not points:
        require_rendering()
    envs = script.make_envs(args.env_id)
    if not (points or hasattr(envs, "frame_skip")) or "Reacher" in args.env_id:
        sys.exit(f"error: {args.env_id} is neither points in the plane nor walks on MuJoCo")
    phases = record(script, args)
    if max(given.task) >= (count := len(phases[0][0])):
        parser.error(f"--task: there are 0 to {count - 1} in the first group of the meta-test")
    if points:
        frames = draw(phases, given.task, given.episodes)
    else:
        frames = render(phases, envs.model, given.task, names)
    frames = islice(frames, 0, None, given.every)
    save(frames, given.gif, given.fps / given.every)


if __name__ == "__main__":
    main()

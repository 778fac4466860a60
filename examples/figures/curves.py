"""Learning curves from `metrics.jsonl`: one run beside the published DreamerV3, or several seeds as mean and range."""

from __future__ import annotations

import argparse
import csv
import difflib
import itertools
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from ..training.metrics import read_metrics
from .bootstrap import bootstrap_band

OURS, PUBLISHED = "#1764ab", "#8a8a8a"
# By suite, how its published curves were played, where the suite's default plays otherwise.
RETURNS = ("eval/return", "train/return")  # what DreamerV3's published curves show
PLAYED_WITH = {"atari100k": "with sticky actions (env.sticky=0.25)"}
PALETTE = [OURS, "#c8553d", "#2f8f5b", "#7d5ba6", "#b8860b", "#17a2b8", "#d36ba6", "#4a4a4a", "#94a323", "#7a3b1d"]


def draw_curve(logdir: str | os.PathLike, suite: str, task: str, out_png: str | os.PathLike) -> Path | None:
    """Evaluation and training returns of one run over environment frames. None, with a notice, if it cannot draw."""
    evaluated, trained = read_curve(logdir, "eval/return"), read_curve(logdir, "train/return")
    longest = max((curve[0][-1] for curve in (evaluated, trained) if len(curve[0])), default=None)
    if longest is None:
        print(f"No learning curve: {Path(logdir) / 'metrics.jsonl'} has no returns yet.")
        return None
    figure = new_figure()
    if figure is None:
        return None
    axes = figure.subplots()
    _draw_published(axes, suite, task, longest)
    if len(trained[0]):
        axes.plot(*trained, color=OURS, alpha=0.3, linewidth=1, label="training episodes")
    if len(evaluated[0]):
        marker = "o" if len(evaluated[0]) <= 60 else None
        axes.plot(*evaluated, color=OURS, linewidth=2, marker=marker, markersize=3.5, label="evaluation (mode actions)")
    _label(axes, f"{task} ({suite})")
    return save_figure(figure, out_png)


def draw_runs(
    logdirs: Sequence[str | os.PathLike],
    labels: Sequence[str],
    out_png: str | os.PathLike,
    *,
    title: str = "",
    key: str = "eval/return",
    bootstrap: bool = False,
    panels: Sequence[str] | None = None,
    published: Mapping[str, tuple[str, str]] | None = None,
) -> Path | None:
    """Mean over the runs that share a label, with a band from the worst to the best of them.

    bootstrap: the band is the 95 % bootstrap interval of the mean.
    panels: the panel that each run is drawn in, by its title; by default there is one.
    published: by panel the suite and task of the published curve to draw in it.
    """
    if len(logdirs) != len(labels):
        raise ValueError(f"{len(logdirs)} logdirs with {len(labels)} labels: give each run one; seeds share theirs.")
    panels = [title] * len(labels) if panels is None else panels
    titles = list(dict.fromkeys(panels)) or [title]
    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    figure = new_figure(width=6.4 * (1 + 0.4 * (columns - 1)), height=4.0 * (1 + 0.55 * (rows - 1)))
    if figure is None:
        return None
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, titles, strict=False):
        longest = 0
        for index, label in enumerate(dict.fromkeys(labels)):
            those = [each for each in zip(logdirs, labels, panels, strict=True) if each[1:] == (label, panel)]
            longest = max(longest, _draw_mean(axes, [logdir for logdir, *_ in those], label, index, key, bootstrap))
        if published and panel in published and longest and key in RETURNS:
            _draw_published(axes, *published[panel], longest)
        _label(axes, panel, "episode return" if key in RETURNS else key)
    for axes in grid[len(titles) :]:
        axes.remove()
    repeated = len(set(zip(labels, panels, strict=True))) < len(labels)
    meaning = "mean and 95 % bootstrap interval" if bootstrap else "mean and range"
    return save_figure(figure, out_png, legend_title=meaning if repeated else None)


def _draw_mean(axes, logdirs, label, index, key, bootstrap):
    """Of the runs that have values; the last frame they go to."""
    runs = [run for run in (read_curve(logdir, key) for logdir in logdirs) if len(run[0])]
    if not runs:
        if logdirs:
            print(f"No {key} in the runs called {label!r}.")
        return 0
    frames, values = _common_grid(runs)
    ends = sorted(run[0][-1] for run in runs)
    if not len(frames):
        print(f"The runs called {label!r} have no frames in common, and no mean is drawn.")
        return 0
    if ends[0] < ends[-1]:
        print(f"The mean of {label!r} is drawn up to frame {ends[0]:.0f}, where the shortest of its runs ends.")
    color = PALETTE[index % len(PALETTE)]
    band = bootstrap_band(values) if bootstrap else (values.min(0), values.max(0))
    seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    style = dict(color=color, linewidth=2, marker="o" if len(frames) == 1 else None)  # a line needs two points
    axes.plot(frames, values.mean(0), label=f"{label}{seeds}", zorder=3, **style)
    axes.fill_between(frames, *band, color=color, alpha=0.15, linewidth=0)
    return frames[-1]


def read_curve(logdir: str | os.PathLike, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Frames [N] and values [N] of the lines that have `key`."""
    if not (Path(logdir) / "metrics.jsonl").exists():
        return np.zeros(0), np.zeros(0)
    lines = read_metrics(logdir, containing=f'"{key}"')
    points = {
        line["step"]: line[key] for line in lines if type(line.get(key)) in (int, float) and np.isfinite(line[key])
    }
    return np.array(list(points), dtype=float), np.array(list(points.values()), dtype=float)


def folder_names(logdirs: Sequence[Path]) -> list[str]:
    """The folder that each run lies in: by its name, or by its path where another folder has the same name."""
    folders = [logdir.resolve().parent for logdir in logdirs]
    names = [folder.name for folder in dict.fromkeys(folders)]
    return [folder.name if names.count(folder.name) == 1 else os.path.relpath(folder) for folder in folders]


def known_keys(logdir: str | os.PathLike, key: str) -> str:
    """What a run has in place of a key that it has not: those it resembles, or all."""
    if not (Path(logdir) / "metrics.jsonl").exists():
        return f"{logdir} has no metrics.jsonl."
    known = sorted({name for line in read_metrics(logdir) for name in line} - {"step"})
    if not known:
        return f"{logdir} has no entries yet."
    near = difflib.get_close_matches(key, known, n=3)
    return f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(known)}."


def picture(path: str) -> Path:
    """An argument of a command line: a file that a picture can be drawn into."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:  # said when it is drawn
        return Path(path)
    if Path(path).suffix.lstrip(".").lower() not in FigureCanvasBase.filetypes:
        known = ", ".join(sorted(FigureCanvasBase.filetypes))
        raise argparse.ArgumentTypeError(f"{path!r} must end like a picture: {known}")
    return Path(path)


def published_curve(suite: str, task: str) -> dict | None:
    """DreamerV3's published curve: frames, mean and std, each [N], and the number of seeds; None if there is none."""
    names = {task, f"dmc_{task}", f"atari_{task}"}  # as the published tables write them
    with resources.files("r2dreamer.configs").joinpath("reference_curves.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["suite"] == suite and row["task"] in names]
    if not rows:
        return None
    column = lambda name: np.array([float(row[name]) for row in rows])
    return {
        "frames": column("env_steps"),
        "mean": column("score_mean"),
        "std": column("score_std"),
        "seeds": int(rows[0]["seeds"]),
    }


def _draw_published(axes, suite, task, longest):
    """As much of the published curve as the run covers, so that a short run is not squeezed into a corner."""
    curve = published_curve(suite, task)
    if curve is None:
        return
    shown = max(2, int((curve["frames"] <= longest).sum()) + 1)  # at least a line, and one point past the run
    frames, mean, std = (curve[name][:shown] for name in ("frames", "mean", "std"))
    label = f"DreamerV3 (published, {curve['seeds']} seeds, mean and std)"
    if suite in PLAYED_WITH:
        label += f",\n{PLAYED_WITH[suite]}"
    axes.plot(frames, mean, color=PUBLISHED, linewidth=1.5, linestyle="--", label=label)
    axes.fill_between(frames, mean - std, mean + std, color=PUBLISHED, alpha=0.15, linewidth=0)


def _common_grid(runs):
    """Every run's values [run, N] at the frames of all of them, as far as all of them go."""
    first, last = max(run[0][0] for run in runs), min(run[0][-1] for run in runs)
    frames = np.unique(np.concatenate([run[0] for run in runs]))
    frames = frames[(frames >= first) & (frames <= last)]  # none where one run ended before another began to report
    return frames, np.stack([np.interp(frames, *run) for run in runs])


def new_figure(width=6.4, height=4.0):
    try:
        # Figure alone, without pyplot: no display, no global state, no setting of the user's is touched.
        from matplotlib.figure import Figure
    except ImportError:
        print('No picture: drawing one needs pip install "torchrl-r2dreamer[plot]"')
        return None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _label(axes, title, quantity="episode return"):
    from matplotlib.ticker import FuncFormatter

    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("environment frames")
    axes.set_ylabel(quantity)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _readable(value)))
    axes.set_xlim(left=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure, out_png, legend_title=None):
    handles, labels = zip(*[axes.get_legend_handles_labels() for axes in figure.axes], strict=True)
    legend = dict(zip(itertools.chain(*labels), itertools.chain(*handles), strict=True))  # each label once
    if legend:
        # Below the axes: wherever a curve goes, the legend does not cover it.
        place = dict(loc="outside lower center", ncols=2, frameon=False, fontsize=9, title=legend_title)
        figure.legend(legend.values(), legend.keys(), **place)
    out_png = Path(out_png)
    try:
        out_png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_png)
    except OSError as error:
        print(f"No picture: {error}")
        return None
    return out_png


def _readable(frames: float) -> str:
    """1500000 as 1.5M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(frames) >= size:
            return f"{frames / size:g}{unit}"
    return f"{frames:g}"

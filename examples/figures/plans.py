"""A plan file: rows of trainings with the score each must reach, and how every run of it stands.

    overrides: [experiment=dmc_small_vectors, env=dmc_proprio]     # of every row
    rows:
      - {overrides: [env.task=walker_walk, "seed=0,1,2"], bar: 461}

Overrides are those of train.py, in hydra's multirun syntax; of one key the last one counts. A row needs no bar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..training.grid import Run, plan_rows
from .curves import published_curve, read_curve


def read_plan(path: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """The runs of a plan file, each row's overrides after the file's own and before the given ones."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a plan: {' '.join(str(error).split())}.") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not rows or not isinstance(rows, list) or content.keys() - {"overrides", "rows"}:
        raise ValueError(f"{path} must hold rows, and may hold overrides. examples/plans has some to copy.")
    shared = _overrides(content.get("overrides", []), f"{path}: overrides")
    grids = []
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict) or not {"overrides"} <= row.keys() <= {"overrides", "bar"}:
            raise ValueError(f"{where} must hold overrides, and may hold a bar: {row!r}.")
        bar = row.get("bar")
        if bar is not None and not (type(bar) in (int, float) and math.isfinite(bar)):
            raise ValueError(f"{where} has bar={bar!r}, which must be a finite number.")
        every = [*shared, *_overrides(row["overrides"], where), *overrides]
        grids.append((list({each.partition("=")[0]: each for each in every}.values()), bar))  # the last of a key counts
    return plan_rows(grids)


def _overrides(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(
            f'{where} must be a list of text, for example ["env=dmc_vision", "seed=0,1,2"], not {value!r}.'
        )
    return value


def seconds(run: Run) -> tuple[float, float]:
    """Frames and seconds of training so far, evaluations included."""
    frames, speeds = read_curve(run.logdir, "speed/fps")
    if not len(frames):
        return 0.0, 0.0
    steps = [now - before for before, now in zip([0.0, *frames], frames, strict=False)]
    return float(frames[-1]), sum(step / speed for step, speed in zip(steps, speeds, strict=True) if speed > 0)


def hours_left(runs: Sequence[Run]) -> float | None:
    """What is not trained yet, at the measured speed of its variant, or of all where that has none. None: not known."""
    measured = {run: seconds(run) for run in runs}
    left = 0.0
    for run in runs:
        if run.finished:
            continue
        alike = [measured[each] for each in runs if each.variant == run.variant and measured[each][0]]
        frames, spent = map(sum, zip(*(alike or measured.values()), strict=True))
        if not frames:
            return None
        left += max(0.0, run.total_frames - max(measured[run][0], run.saved)) * spent / frames / 3600
    return left


def summary(runs: Sequence[Run]) -> str:
    """One line: how many runs are done, are running and are missing, and the hours that they take."""
    done, running = sum(run.finished for run in runs), sum(run.running for run in runs)
    left = hours_left(runs)
    hours = "not known yet" if left is None else f"about {left:.1f} hours, one run at a time"
    return f"{len(runs)} runs: {done} done, {running} running, {len(runs) - done - running} missing. Left: {hours}."


def report(runs: Sequence[Run], key: str = "eval/return") -> str:
    """Markdown: how every run stands. A bar counts as met or not when the run is done."""
    columns = ("task", "variant", "seed", "state", "frames", key, "minutes", "DreamerV3, published", "bar", "met")
    lines = [columns, ["---"] * len(columns), *(_row(run, key) for run in runs)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(run: Run, key: str) -> list[str]:
    frames, spent = seconds(run)
    frames = max(frames, run.saved)  # a short run measures no speed
    _, scores = read_curve(run.logdir, key)
    state = "done" if run.finished else "running" if run.running else "stopped" if frames else "missing"
    score = f"{scores[-1]:.4g}" if len(scores) else ""
    of_returns = key == "eval/return"
    bar, published = (run.bar, _published(run)) if of_returns else (None, "")  # both are of returns
    met = "" if bar is None or not run.finished or not score else "yes" if scores[-1] >= bar else "no"
    bar = "" if bar is None else f"{bar:g}"
    seed = run.logdir.name.removeprefix("seed")
    minutes = f"{spent / 60:.0f}" if spent else ""
    return [run.task, run.variant, seed, state, f"{frames:.0f}", score, minutes, published, bar, met]


def _published(run: Run) -> str:
    """DreamerV3's published mean, at the last published frame that the run reaches."""
    curve = published_curve(run.suite, run.task.removeprefix(f"{run.suite}-"))
    known = 0 if curve is None else int((curve["frames"] <= run.total_frames).sum())
    return f"{curve['mean'][known - 1]:.4g}" if known else ""

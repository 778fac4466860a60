"""What was found about latents: one line a cell as JSON, a table, a figure of R2 against size or distraction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..figures.curves import PALETTE, PUBLISHED, new_figure, save_figure

# What a readout reads: its line and its marker.
READ = {"latents": ("-", "o"), "embedding": (":", "x"), "pixels": ("--", "s"), "other facts": ("-.", "^")}
FLOOR = -0.1  # of the figure; a readout that misleads is drawn there
DIFFICULTIES = ("none", "easy", "medium", "hard")

Level = float | str  # a size, or how difficult distractions are


def said(level: Level) -> str:
    return level if isinstance(level, str) else f"{level:.4g}"


def rank(level: Level) -> float:
    """Smaller for what is easier to see."""
    return DIFFICULTIES.index(level) if isinstance(level, str) else -level


def write_results(results: Sequence[dict], out: Path) -> list[Path]:
    """results.jsonl, table.md and latents.png in ``out``; what was written."""
    lines, table = out / "results.jsonl", out / "table.md"
    lines.write_text("".join(json.dumps(result) + "\n" for result in results))
    table.write_text(markdown(results))
    figure = draw(results, out / "latents.png")
    return [lines, table, *([figure] if figure else [])]


def gather(results: Sequence[dict]) -> dict[tuple, dict[str, list[float]]]:
    """R2 of every seed, by (task, fact, level), then by what was read: "r2dreamer, latents" or "pixels"."""
    found: dict[tuple, dict[str, list[float]]] = {}
    for result in results:
        for read, scores in result["scores"].items():
            label = f"{result['member']}, {read}" if read in ("latents", "embedding") else read
            for fact, score in scores.items():
                place = found.setdefault((result["task"], fact, result["level"]), {})
                place.setdefault(label, []).append(score["r2"])
    return found


def markdown(results: Sequence[dict]) -> str:
    """A table for each task: a row for each thing read, a column for each fact and level; the mean over seeds, and their range."""
    found, tables = gather(results), []
    for task in dict.fromkeys(task for task, _, _ in found):
        columns = {place[1:]: scores for place, scores in found.items() if place[0] == task}
        heads = [f"{fact}, {said(level)}" for fact, level in columns]
        rows = [[f"{task}, R2 on held-out episodes", *heads], ["---"] + ["---:"] * len(heads)]
        for label in dict.fromkeys(label for scores in columns.values() for label in scores):
            rows.append([label, *(_mean(scores.get(label, [])) for scores in columns.values())])
        tables.append("".join("| " + " | ".join(row) + " |\n" for row in rows))
    return "\n".join(tables)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def draw(results: Sequence[dict], out: Path) -> Path | None:
    """A row of panels for each task, a panel for each fact: R2 against level, a line for each thing read."""
    found = gather(results)
    facts: dict[str, dict[str, None]] = {}  # of each task, in their order
    for task, fact, _ in found:
        facts.setdefault(task, {})[fact] = None
    columns = max(map(len, facts.values()), default=1)
    figure = new_figure(width=4.2 * columns, height=3.0 * max(len(facts), 1) + 1)
    if figure is None:
        return None
    grid = figure.subplots(len(facts), columns, squeeze=False)
    members = list(
        dict.fromkeys(result["member"] for result in results if result["member"] not in ("baselines", "untrained"))
    )
    for row, (task, names) in zip(grid, facts.items(), strict=True):
        for axes, fact in zip(row, names, strict=False):
            _panel(axes, {place[2]: scores for place, scores in found.items() if place[:2] == (task, fact)}, members)
            axes.set_title(f"{task}: {fact}", loc="left", fontsize=10)
        for axes in row[len(names) :]:
            axes.remove()
    return save_figure(figure, out, legend_title="R2 on held-out episodes, mean over seeds; small marks are seeds")


def _panel(axes, by_level: dict[Level, dict[str, list[float]]], members: Sequence[str]) -> None:
    levels = sorted(by_level, key=rank, reverse=True)  # the easiest to see is on the right
    sizes = not any(isinstance(level, str) for level in levels)
    places = {level: level if sizes else place for place, level in enumerate(levels)}
    for label in dict.fromkeys(label for scores in by_level.values() for label in scores):
        member, _, read = label.rpartition(", ")
        color = PALETTE[members.index(member) % len(PALETTE)] if member in members else PUBLISHED
        line, marker = READ[read]
        style = dict(color=color, linestyle=line, marker=marker, markersize=5, linewidth=1.8 if line == "-" else 1.1)
        shown = {places[level]: by_level[level][label] for level in levels if label in by_level[level]}
        axes.plot(list(shown), [max(FLOOR, np.mean(values)) for values in shown.values()], label=label, **style)
        points = [(place, max(FLOOR, value)) for place, values in shown.items() for value in values]
        axes.plot(*zip(*points, strict=True), marker, markersize=3, color=color)
    axes.axhline(0, color="#4a4a4a", linewidth=0.8)
    axes.set_xscale("log" if sizes else "linear")
    axes.set_xticks(list(places.values()), [said(level) for level in levels], minor=False)
    axes.minorticks_off()
    axes.set_ylim(FLOOR - 0.03, 1.03)
    axes.set_xlabel("size, fraction of the stock task's" if sizes else "difficulty of the distractions")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)

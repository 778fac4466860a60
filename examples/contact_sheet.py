"""Draws a benchmark of images: the tasks of DMC-Subtle under the stock ones, or the axes of Distracting Control.

python examples/contact_sheet.py --out dmc_subtle.png
python examples/contact_sheet.py --shrink 1/20 --size 64
python examples/contact_sheet.py --suite dmc_distracting --size 128
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import r2dreamer.examples  # noqa: F401 - sets how threads wait, before torch is imported
from r2dreamer.envs import make_dmc, make_dmc_distracting, make_dmc_subtle
from r2dreamer.envs.base.errors import require
from r2dreamer.envs.control.distracting import SCALES
from r2dreamer.envs.control.subtle import OFFICIAL
from r2dreamer.examples.figures.curves import picture

SEED = 8
AXES = ("background", "colour", "moving_camera")
TASKS = ("walker_walk", "reacher_easy", "cartpole_swingup", "cheetah_run", "finger_spin")  # of Distracting Control


def subtle_sheet(shrink: str | None, size: int) -> list[tuple[str, list[tuple[str, Callable]]]]:
    """Rows from the bottom: the name of the row, and what each image says and makes."""
    small, stock = [], []
    for task, official in OFFICIAL.items():
        name, said = "_".join(official.stock), shrink or f"1/{round(1 / official.shrink)}"
        make = lambda task=task: make_dmc_subtle(task, seed=SEED, shrink=shrink, image_size=size)
        small.append((f"{task}, {said}", make))
        stock.append((name, lambda name=name: make_dmc(name, seed=SEED, from_pixels=True, image_size=size)))
    return [("DMC-Subtle", small), ("stock", stock)]


def distracting_sheet(size: int) -> list[tuple[str, list[tuple[str, Callable]]]]:
    """A row for each difficulty and one for the stock tasks; a column for each axis alone, and for all on each task."""
    columns = [(TASKS[0], axis) for axis in AXES] + [(task, None) for task in TASKS]
    rows = []
    for difficulty in reversed(SCALES):
        row = []
        for task, only in columns:
            axes = {axis: only in (None, axis) for axis in AXES}
            make = lambda task=task, axes=axes, difficulty=difficulty: make_dmc_distracting(
                task, seed=SEED, difficulty=difficulty, image_size=size, **axes
            )
            row.append((f"{only.replace('_', ' ') if only else 'all'}: {task}", make))
        rows.append((difficulty, row))
    stock = [
        (task, lambda task=task: make_dmc(task, seed=SEED, from_pixels=True, image_size=size)) for task, _ in columns
    ]
    return [*rows, ("stock", stock)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["dmc_subtle", "dmc_distracting"], default="dmc_subtle")
    parser.add_argument("--out", type=picture, help="the picture; without, SUITE.png")
    parser.add_argument("--size", type=int, default=320, help="pixels of one image; the agent sees 64")
    parser.add_argument("--shrink", help="fraction of the stock size, such as 1/20; without, the paper's")
    arguments = parser.parse_args()
    if arguments.shrink is not None and arguments.suite != "dmc_subtle":
        parser.error(f"--shrink {arguments.shrink} is of --suite dmc_subtle: {arguments.suite} has sizes of its own")
    if arguments.size < 1:
        parser.error(f"--size {arguments.size} must be at least 1")
    try:
        print(draw(arguments))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(str(error))


def draw(arguments: argparse.Namespace) -> Path:
    """Writes the picture, and returns its path."""
    out = arguments.out or Path(f"{arguments.suite}.png")
    require("matplotlib", "plot").use("Agg")
    import matplotlib.pyplot as plt

    size, title, gap, dots = arguments.size, 28, 4, 100
    subtle = arguments.suite == "dmc_subtle"
    rows = subtle_sheet(arguments.shrink, size) if subtle else distracting_sheet(size)
    width, height = title + len(rows[0][1]) * (size + gap), len(rows) * (size + title)
    figure = plt.figure(figsize=(width / dots, height / dots), dpi=dots)
    for row, (name, images) in enumerate(rows):
        for column, (label, make) in enumerate(images):
            left, bottom = title + column * (size + gap), row * (size + title)
            # A pixel of the image is one of the figure: what is a few pixels small would not survive scaling.
            axis = figure.add_axes([left / width, bottom / height, size / width, size / height])
            env = make()
            axis.imshow(env.reset()["pixels"].permute(1, 2, 0), interpolation="none")
            env.close()
            axis.set_title(label, fontsize=min(11, size / 24))
            axis.axis("off")
            if column == 0:
                axis.text(-title / 2, size / 2, name, rotation=90, ha="center", va="center")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


if __name__ == "__main__":
    main()

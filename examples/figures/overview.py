"""Draws the README's picture: two images with a small target, and the curves of agents that must see one.

python -m r2dreamer.examples.figures.overview --out examples/results/overview.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from r2dreamer.envs import make_dmc_subtle, make_probe
from r2dreamer.envs.base.errors import require

from .curves import PALETTE, read_curve

RUNS = Path(__file__).parent.parent / "results" / "family" / "probes"
SEED = 9
MEMBERS = {"R2-Dreamer, no decoder": "baseline", "Dreamer V3, with a decoder": "dreamer"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("overview.png"))
    arguments = parser.parse_args()
    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.8, 3.5), dpi=130, layout="constrained")
    reacher, probe, curves = figure.subplots(1, 3, width_ratios=[1, 1, 1.5])
    image = show(
        reacher, make_dmc_subtle("reacher", seed=SEED, image_size=256), "DMC-Subtle reacher:\na target of 1/3 the size"
    )
    circle(reacher, image[..., 0] > 1.5 * image[..., 2], right_of=128)
    image = show(
        probe, make_probe("small_target", seed=SEED), "Probe small_target:\n2x2 white pixels decide the reward"
    )
    circle(probe, image.min(-1) == 255)
    for (name, folder), color in zip(MEMBERS.items(), PALETTE, strict=False):
        for run in sorted(RUNS.glob(f"small_target-{folder}/seed*")):
            curves.plot(*read_curve(run, "train/return"), color=color, alpha=0.9, linewidth=1.8, label=name)
            name = None  # one entry of the legend for all seeds
    curves.axhline(8, color="#8a8a8a", linestyle="--", linewidth=1, label="best possible")
    curves.axhline(4, color="#8a8a8a", linestyle=":", linewidth=1, label="guessing")
    curves.set(
        title="Learning small_target, 3 seeds each",
        xlabel="environment frames",
        ylabel="training return",
        xlim=(0, None),
    )
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1, 0.5))
    figure.savefig(arguments.out)
    print(arguments.out)


def show(axes, env, title):
    """Draws the first image of an episode, and returns it, [H, W, 3]."""
    image = env.reset()["pixels"].permute(1, 2, 0).numpy()
    axes.imshow(image, interpolation="none")
    axes.set_title(title, fontsize=11)
    axes.axis("off")
    return image


def circle(axes, mask, right_of=0):
    """A ring around the pixels [H, W] of the mask that lie to the right of a column."""
    rows, columns = np.nonzero(mask)
    rows, columns = rows[columns > right_of], columns[columns > right_of]
    axes.scatter(columns.mean(), rows.mean(), s=420, facecolors="none", edgecolors="white", linewidths=2)


if __name__ == "__main__":
    main()

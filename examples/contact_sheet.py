"""Draws the tasks of DMC-Subtle under the stock tasks they are built on, both beginning the same episode.

python examples/contact_sheet.py --out dmc_subtle.png
python examples/contact_sheet.py --shrink 1/20 --size 64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import r2dreamer.examples  # noqa: F401 - sets how threads wait, before torch is imported
from r2dreamer.envs import make_dmc, make_dmc_subtle
from r2dreamer.envs.base.errors import require
from r2dreamer.envs.transforms.subtle import OFFICIAL

SEED = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dmc_subtle.png"))
    parser.add_argument("--size", type=int, default=320, help="pixels of one image; the agent sees 64")
    parser.add_argument("--shrink", help="fraction of the stock size, such as 1/20; without, the paper's")
    arguments = parser.parse_args()

    require("matplotlib", "plot").use("Agg")
    import matplotlib.pyplot as plt

    size, title, gap, dots = arguments.size, 28, 4, 100
    width, height = title + len(OFFICIAL) * (size + gap), 2 * (size + title)
    figure = plt.figure(figsize=(width / dots, height / dots), dpi=dots)
    for column, (task, official) in enumerate(OFFICIAL.items()):
        name, shrink = "_".join(official.stock), arguments.shrink or f"1/{round(1 / official.shrink)}"
        stock = make_dmc(name, seed=SEED, from_pixels=True, image_size=size)
        subtle = make_dmc_subtle(task, seed=SEED, shrink=arguments.shrink, image_size=size)
        for row, (env, label) in enumerate(((subtle, f"{task}, {shrink}"), (stock, name))):
            left, bottom = title + column * (size + gap), row * (size + title)
            # A pixel of the image is one of the figure: what is a few pixels small would not survive scaling.
            axis = figure.add_axes([left / width, bottom / height, size / width, size / height])
            axis.imshow(env.reset()["pixels"].permute(1, 2, 0), interpolation="none")
            axis.set_title(label, fontsize=min(11, size / 24))
            axis.axis("off")
            if column == 0:
                axis.text(-title / 2, size / 2, ("DMC-Subtle", "stock")[row], rotation=90, ha="center", va="center")
    figure.savefig(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()

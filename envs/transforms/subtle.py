"""DMC-Subtle as a transform: `DMCSubtle()` shrinks the paper's things in a DMControlEnv of TorchRL's.

`DMCSubtle(geoms="target", shrink=1 / 20)` shrinks any others. The paper's tasks as a suite are in `suites/dmc_subtle.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..control.subtle import Subtle
from .hooks import ControlTransform


class DMCSubtle(ControlTransform):
    """Shrinks things in a DeepMind Control environment where `physics.render` draws it; its specs stay as they are.

    The environment keeps its image size: TorchRL's default is 240x320, and the paper's is `RenderPixels(64)`. The transform
    changes the environment itself. Reset the environment next.

    Args:
        task: One of the paper's five; ``None`` is the one of the environment's domain. What shrinks can be named instead.
        geoms: Names in the environment's XML, one or several.
        sites: The same.
        tendons: The same.
        classes: Default classes, with all their geoms and sites.
        shrink: What sizes are multiplied by, a number in (0, 1] or a fraction such as ``"1/20"``. ``None`` is the paper's
            size, also where the environment has an easier task of the same domain, with a bigger target.
        physics: ``"official"`` compiles the edited XML as the paper does: masses, inertias and the rewarded region change
            too. ``"frozen"`` shrinks only what is seen; states and rewards stay the same, to the bit.
        xml: What the environment was compiled from. Not needed for the tasks of the suite.
        assets: The files that the XML includes.

    Example:
        >>> from r2dreamer.envs import DMCSubtle, RenderPixels
        >>> from torchrl.envs import Compose, DMControlEnv, TransformedEnv
        >>> env = DMControlEnv("reacher", "hard", frame_skip=2)
        >>> env = TransformedEnv(env, Compose(DMCSubtle(), RenderPixels(64)))
        >>> env.reset()["pixels"].shape
        torch.Size([3, 64, 64])
        >>> env = TransformedEnv(DMControlEnv("swimmer", "swimmer6"), DMCSubtle(geoms="target", shrink=1 / 4))
    """

    def __init__(
        self, task: str | None=None, *, geoms: str | Sequence[str]=(), sites: str | Sequence[str]=(), tendons: str | Sequence[str]=(), classes: str | Sequence[str]=(), shrink: float | str | None = None, physics: Any="official", xml: str | None=None,
        assets: Mapping[str, str | bytes] | None=None,
    ):  # fmt: skip
        super().__init__(Subtle(task, geoms, sites, tendons, classes, shrink, physics, xml, assets))

"""Distracting Control as a transform, on a DMControlEnv of TorchRL's."""

from __future__ import annotations

from pathlib import Path

from ..control.distracting import Distracting
from .hooks import ControlTransform


class DMCDistracting(ControlTransform):
    """Distracts from a DeepMind Control task where `physics.render` draws it; specs, states and rewards stay as they are.

    The transform changes the environment itself. Reset the environment next. It goes with `DMCSubtle`, in either order.
    What an episode looks like follows from the environment's seed and from nothing else.

    Args:
        background: A moving texture takes the place of the sky, and the ground becomes transparent, but not that of walker
            and cheetah, as in the original.
        colour: Colours of bodies and ground.
        camera: Position and roll of the fixed and tracking cameras; the free camera (-1) stays.
        difficulty: "easy", "medium" or "hard": how far colours and camera go, and whether there are 4, 8 or all backgrounds.
        dynamic: Whether the distractions move within an episode.
        split: "train" or "val": never do the two share a background.
        frames: A folder with the frames of films, one folder each (DAVIS, for example); ``None`` computes textures.

    Example:
        >>> from r2dreamer.envs import DMCDistracting, RenderPixels
        >>> from torchrl.envs import Compose, DMControlEnv, TransformedEnv
        >>> env = DMControlEnv("walker", "walk", frame_skip=2)
        >>> env = TransformedEnv(env, Compose(DMCDistracting(difficulty="easy"), RenderPixels(64)))
        >>> env.reset()["pixels"].shape
        torch.Size([3, 64, 64])
    """

    def __init__(
        self, *, background: bool = True, colour: bool = True, camera: bool = True, difficulty: str = "easy",
        dynamic: bool = True, split: str = "train", frames: str | Path | None = None,
    ):  # fmt: skip
        super().__init__(Distracting(background, colour, camera, difficulty, dynamic, split, frames))

"""Images on the way into the contract: uint8 [C, H, W] of the wanted size, cheaply."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

CHANNELS = (1, 3, 4)


def is_image(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether an array of this shape and dtype is an image: uint8, and [H, W], [H, W, C] or [C, H, W]."""
    if dtype != np.uint8:
        return False
    return len(shape) == 2 or (len(shape) == 3 and (shape[-1] in CHANNELS or shape[0] in CHANNELS))


def to_pixels(image: np.ndarray, size: int | None = None, grayscale: bool = False) -> np.ndarray:
    """A uint8 image [H, W], [H, W, C] or [C, H, W] as a uint8 array [C, size, size] of its own."""
    if image.ndim == 2:
        image = image[..., None]
    elif image.shape[-1] not in CHANNELS:
        if grayscale and len(image) == 4:
            raise ValueError(
                f"grayscale=True of an image {list(image.shape)}, whose first axis looks like four grey frames: leave "
                "grayscale out. Colours and opacity come as [H, W, 4]."
            )
        image = image.transpose(1, 2, 0)
    # A copy, because simulators reuse their buffers and flip them by negative strides, which torch refuses. It stays
    # [H, W, C] in memory: torch resizes uint8 images five times faster that way.
    pixels = torch.from_numpy(image.copy(order="C")).permute(2, 0, 1)[None]  # [1, C, H, W]
    if size is not None and pixels.shape[-2:] != (size, size):
        # Antialiased, because a thin pole sampled at single points flickers.
        pixels = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    if grayscale and pixels.shape[1] >= 3:  # what a fourth channel says of opacity is left out
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        pixels = (pixels[:, :3] * weights).sum(1, keepdim=True).round().to(torch.uint8)
    return pixels[0].contiguous().numpy()

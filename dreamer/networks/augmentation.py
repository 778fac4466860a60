"""Random shift, the augmentation of DrQ and DreamerPro: a switch of its own, usable with every objective."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey


def random_shift(images: torch.Tensor, pad: int = 3) -> torch.Tensor:
    """Every sequence of images [B, T, C, H, W] moved by its own offset, the same over time; values and dtype kept.

    Borders are replicated, offsets are uniform in [-pad, pad] pixels, fractions of a pixel interpolate bilinearly.
    """
    batch, time, channels, height, width = images.shape
    value = images.reshape(batch, time * channels, height, width)
    value = F.pad(value.float(), (pad, pad, pad, pad), mode="replicate")
    offset = 2 * pad * torch.rand(batch, 2, device=images.device)  # where the window begins, rows and columns
    for dim, size in ((2, height), (3, width)):
        start = offset[:, dim - 2]
        whole = start.floor().clamp_max(2 * pad - 1)
        fraction = (start - whole).view(batch, 1, 1, 1)
        index = whole.long().view(batch, 1) + torch.arange(size + 1, device=images.device)  # [B, size + 1]
        index = index.view(batch, 1, -1, 1) if dim == 2 else index.view(batch, 1, 1, -1)
        window = value.take_along_dim(index, dim)
        value = torch.lerp(window.narrow(dim, 0, size), window.narrow(dim, 1, size), fraction)
    value = value.reshape(images.shape)
    return (value if images.is_floating_point() else value.round()).to(images.dtype)


class RandomShift(TensorDictModuleBase):
    """Replaces the images of records [B, T] below ``"next"`` by shifted ones, in a copy; vectors stay as they are.

    Warns where there is no image: nothing is augmented then.

    Args:
        pad: the largest offset in pixels.

    Example:
        >>> from tensordict import TensorDict
        >>> records = TensorDict({"next": {"pixels": torch.randint(256, (2, 5, 3, 8, 8), dtype=torch.uint8)}}, [2, 5])
        >>> shifted = RandomShift(pad=3)(records)["next", "pixels"]
        >>> shifted.shape, shifted.dtype
        (torch.Size([2, 5, 3, 8, 8]), torch.uint8)
    """

    in_keys: list[NestedKey] = []
    out_keys: list[NestedKey] = []

    def __init__(self, pad: int = 3):
        super().__init__()
        if pad < 1:
            raise ValueError(f"pad={pad} must be at least one pixel; to shift nothing leave the augmentation out.")
        self.pad = pad

    @torch.no_grad()
    def forward(self, records: TensorDictBase) -> TensorDictBase:
        shifted = records.copy()
        after = records.get("next").copy()
        images = {
            key: value
            for key, value in after.items()
            if isinstance(value, torch.Tensor) and value.ndim == records.ndim + 3
        }
        if not images:
            warnings.warn("RandomShift found no image to shift: these records are not augmented.", stacklevel=2)
        for key, value in images.items():
            after.set(key, random_shift(value, self.pad))
        return shifted.set("next", after)

"""The paper's convolutions on a GPU, and the upsampling of a compiled decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..networks.decoders import ImageDecoder
from ..networks.encoders import ImageEncoder
from .mixing import Fast

CHANNELS = 16  # that a GPU's convolution reads at once; for fewer it has slow kernels only


class PooledConvolution(Fast, ImageEncoder):
    """On a GPU: few channels become more, and the bias is added after the pooling, to a quarter of the numbers."""

    def pooled(self, convolution: nn.Conv2d, value: torch.Tensor) -> torch.Tensor:
        return super().pooled(convolution, value) if value.device.type == "cpu" else pooled(convolution, value)


def pooled(convolution: nn.Conv2d, value: torch.Tensor) -> torch.Tensor:
    """As ``ImageEncoder.pooled``, from the weight and bias of ``convolution``, which is not called."""
    if value.shape[1] < CHANNELS and convolution.weight.shape[-1] % 2:
        out = by_squares(value, convolution.weight).amax(-2)
    else:
        out = F.max_pool2d(F.conv2d(value, convolution.weight, padding="same"), 2).permute(0, 2, 3, 1)
    assert convolution.bias is not None  # ImageEncoder builds each with one
    return out + convolution.bias.to(out.dtype)  # the same for all four: the largest stays the largest


def by_squares(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The four outputs [N, H/2, W/2, 4, O] of a convolution (odd kernel, stride 1, SAME) in each 2x2 square of its input.

    Squares become channels, of which there are then four times as many, and each output a convolution of its own. Of three
    channels and a 5x5 kernel that is twice as much to multiply, and six times as fast on an H100.
    """
    radius = weight.shape[-1] // 2
    reach = (radius + 1) // 2  # squares beyond its own that an output sees
    size = 2 * (2 * reach + 1)  # of their pixels
    before = [2 * reach - radius + offset for offset in (0, 1)]  # unseen pixels, of the first output and of the second
    after = [size - weight.shape[-1] - unseen for unseen in before]
    kernels = [F.pad(weight, (before[x], after[x], before[y], after[y])) for y in (0, 1) for x in (0, 1)]
    squares, kernels = F.pixel_unshuffle(value, 2), F.pixel_unshuffle(torch.cat(kernels), 2)
    missing = -squares.shape[1] % CHANNELS
    squares, kernels = (F.pad(each, (0, 0, 0, 0, 0, missing)) for each in (squares, kernels))
    squares = squares.contiguous(memory_format=torch.channels_last)
    return F.conv2d(squares, kernels, padding=reach).permute(0, 2, 3, 1).unflatten(-1, (4, -1))


class ExpandedUpsampling(Fast, ImageDecoder):
    """Compiled: the gradient of an expansion is a sum, that of an interpolation a scatter."""

    def doubled(self, value: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return super().doubled(value)
        return value[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2)


MIXINS = PooledConvolution, ExpandedUpsampling

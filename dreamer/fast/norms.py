"""RMSNorm and SiLU of large tensors on a CPU, block by block: all passes but the first stay in the cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..networks.layers import NormSiLU
from .mixing import Fast

BLOCK = 2**18  # elements that stay in a core's cache


class BlockedNorm(Fast, NormSiLU):
    """The layer, block by block where its input is large."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if value.device.type != "cpu" or value.numel() <= 4 * BLOCK or torch.compiler.is_compiling():
            return super().forward(value)
        return BlockedNormSiLU.apply(value, self.weight, self.eps)


class BlockedNormSiLU(torch.autograd.Function):
    """Forward and backward pass over blocks of rows."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        features = value.shape[-1]
        rows = value.reshape(-1, features)  # [N, C]
        out, scales = torch.empty_like(rows), torch.empty(len(rows), 1)
        step = max(1, BLOCK // features)
        blocks = zip(rows.split(step), out.split(step), scales.split(step), strict=True)
        for block, block_out, scale in blocks:
            block = block.float()
            norm = torch.linalg.vector_norm(block, dim=-1, keepdim=True)
            scale.copy_(norm.square_().div_(features).add_(eps).rsqrt_())
            block_out.copy_(F.silu(block * scale * weight))
        ctx.save_for_backward(rows, weight, scales)
        return out.view(value.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, weight, scales = ctx.saved_tensors
        features = weight.shape[0]
        out, weight_gradient = torch.empty_like(rows), torch.zeros_like(weight)
        step = max(1, BLOCK // features)
        pieces = (tensor.split(step) for tensor in (rows, scales, gradient.reshape(rows.shape), out))
        for block, scale, block_gradient, block_out in zip(*pieces, strict=True):
            normed = block.float() * scale
            # d loss / d (normed * weight)
            inner = torch.ops.aten.silu_backward(block_gradient.float(), normed * weight)
            product = inner * normed
            weight_gradient += product.sum(0)
            mean = (product @ weight).div_(features).unsqueeze(-1)
            block_out.copy_(inner.mul_(weight).addcmul_(normed, mean, value=-1).mul_(scale))
        return out.view(gradient.shape), weight_gradient, None


MIXINS = (BlockedNorm,)

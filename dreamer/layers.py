"""Building blocks: Linear -> RMSNorm -> SiLU, block-diagonal Linear, the truncated-normal initialisation.

Every layer computes in the dtype its input arrives in (or the one autocast asks for); norms compute in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-4


def init_weight(weight: torch.Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Truncated normal of std 1.1368/sqrt(fan_in), cut at two std, times ``scale``."""
    std = 1.1368 / fan_in**0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    with torch.no_grad():
        weight.mul_(scale)


class Linear(nn.Linear):
    """``nn.Linear`` with the Dreamer initialisation; ``scale`` shrinks an output layer (0 for critics and reward)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, scale: float = 1.0):
        self.scale = scale
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        init_weight(self.weight, self.in_features, self.scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension with a float32 gain and no shift."""

    def __init__(self, features: int, eps: float = NORM_EPS):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(value.float(), self.weight.shape, self.weight, self.eps)
        return normed.to(value.dtype)


def normed_linear(in_features: int, out_features: int) -> nn.Sequential:
    """Linear -> RMSNorm -> SiLU, the layer everything dense is made of."""
    return nn.Sequential(Linear(in_features, out_features), RMSNorm(out_features), nn.SiLU())


def mlp(in_features: int, units: int, layers: int, out_features: int | None = None, *, scale: float = 1.0):
    """``layers`` normed linears, then an output Linear scaled by ``scale`` unless ``out_features`` is None."""
    widths = [in_features] + [units] * layers
    stack = [layer for i in range(layers) for layer in normed_linear(widths[i], widths[i + 1])]
    if out_features is not None:
        stack.append(Linear(widths[-1], out_features, scale=scale))
    return nn.Sequential(*stack)


class BlockLinear(nn.Module):
    """Independent Linears on ``num_blocks`` equal slices of the input (fan-in counts the *whole* input).

    Of an input made of a per-block slice and a part repeated for every block, the repeated part is an ordinary dense
    Linear: ``shared_features`` is its width, and :meth:`forward` takes it as a second argument, never copied per block.
    """

    def __init__(self, in_features: int, out_features: int, num_blocks: int, *, shared_features: int = 0):
        super().__init__()
        if in_features % num_blocks or out_features % num_blocks:
            raise ValueError(
                f"in_features={in_features} and out_features={out_features} must be divisible by "
                f"num_blocks={num_blocks}; choose widths that are multiples of it."
            )
        self.num_blocks = num_blocks
        self.weight = nn.Parameter(torch.empty(num_blocks, in_features // num_blocks, out_features // num_blocks))
        self.bias = nn.Parameter(torch.zeros(out_features))
        fan_in = in_features + shared_features * num_blocks
        init_weight(self.weight, fan_in)
        if shared_features:
            self.shared_weight = nn.Parameter(torch.empty(out_features, shared_features))
            init_weight(self.shared_weight, fan_in)

    def forward(self, value: torch.Tensor, shared: torch.Tensor | None = None) -> torch.Tensor:
        blocks = value.reshape(-1, self.num_blocks, self.weight.shape[1]).transpose(0, 1)  # [G, N, in/G]
        out = torch.bmm(blocks, self.weight).transpose(0, 1)  # [N, G, out/G]
        out = out.reshape(*value.shape[:-1], -1)  # [..., out]
        bias = self.bias if shared is None else F.linear(shared, self.shared_weight, self.bias)
        return out + bias.to(out.dtype)

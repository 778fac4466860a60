"""Building blocks: Linear -> RMSNorm -> SiLU, block-diagonal Linear, the truncated-normal initialisation.

Every layer computes in the dtype its input arrives in (or the one autocast asks for); norms compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


def init_weight(weight: torch.Tensor, fan_in: float, scale: float = 1.0) -> None:
    """Truncated normal of std 1.1368/sqrt(fan_in), cut at two std, times ``scale``."""
    std = 1.1368 / fan_in**0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    with torch.no_grad():
        weight.mul_(scale)


def init_convolution(convolution: nn.Conv2d | nn.ConvTranspose2d, fan_in: float) -> None:
    """The same for a convolution's weight; its bias becomes 0."""
    init_weight(convolution.weight, fan_in)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


def smallest_map(image_shape: tuple[int, int, int], stages: int, verb: str) -> tuple[int, int]:
    """Height and width of an image halved ``stages`` times; the error of other sizes says what it could not ``verb``."""
    channels, height, width = image_shape
    stride = 2**stages
    if height % stride or width % stride:
        remedy = (
            f"Resize the observation, for example to {max(1, round(height / stride)) * stride}x"
            f"{max(1, round(width / stride)) * stride} (env.make.image_size in the example trainer)."
        )
        if width <= 4 < channels:
            remedy = (
                "They seem to be [H, W, C], and [C, H, W] is read: use torchrl's ToTensorImage or PermuteTransform."
            )
        raise ValueError(
            f"Images of {height}x{width} cannot be {verb}d: height and width must be divisible by the {verb}r's stride "
            f"{stride} (2 for each of {stages} stages). {remedy}"
        )
    return height // stride, width // stride


def bounded(action: torch.Tensor) -> torch.Tensor:
    """action / max(1, |action|), with no gradient through the divisor: actions outside of [-1, 1] count as the bound."""
    return action / action.detach().abs().clamp_min(1)


def joint_positions(parameters: Sequence[torch.Tensor], *modules: nn.Module) -> list[tuple[int, ...]]:
    """Where among ``parameters`` the pieces of one weight matrix are, whose gradient norm is one number: a tuple for each.

    A layer below ``modules`` that holds a matrix in pieces returns them from ``joint_parameters()``.

    Args:
        parameters: those of an optimiser's group, for example.
        *modules: searched for layers that hold a matrix in pieces.
    """
    positions = {id(parameter): position for position, parameter in enumerate(parameters)}
    layers = dict.fromkeys(layer for module in modules for layer in module.modules())
    joint = [getattr(layer, "joint_parameters", tuple)() for layer in layers]
    known = [pieces for pieces in joint if pieces and all(id(piece) in positions for piece in pieces)]
    return [tuple(positions[id(piece)] for piece in pieces) for pieces in known]


class Linear(nn.Linear):
    """``nn.Linear`` with the Dreamer initialisation.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: whether there is one; it begins at 0.
        scale: of the first weights: 0 for critics and reward, 0.01 for actors.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, scale: float = 1.0):
        self.scale = scale
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        init_weight(self.weight, self.in_features, self.scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def split_linear(first: int, second: int, out_features: int) -> tuple[Linear, Linear]:
    """A Linear over [first, second], as one for each, of which the second has the bias; fan-in counts both inputs."""
    joint = Linear(first + second, out_features)
    parts = Linear(first, out_features, bias=False), Linear(second, out_features)
    with torch.no_grad():
        for part, weight in zip(parts, joint.weight.split([first, second], 1), strict=True):
            part.weight.copy_(weight)
    return parts


class NormSiLU(nn.Module):
    """RMSNorm of the last dimension (float32 gain, no shift), then SiLU; float32 inside, the input's dtype outside.

    Args:
        features: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, features: int, eps: float = 1e-4):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(value.float(), self.weight.shape, self.weight, self.eps)
        return F.silu(normed.to(value.dtype))


def normed_linear(in_features: int, out_features: int) -> nn.Sequential:
    """Linear -> RMSNorm -> SiLU, the layer everything dense is made of.

    Args:
        in_features: size of the input.
        out_features: size of the output.
    """
    return nn.Sequential(Linear(in_features, out_features), NormSiLU(out_features))


def mlp(
    in_features: int,
    units: int,
    layers: int,
    out_features: int | None = None,
    *,
    scale: float = 1.0,
    make_layer: Callable[[int, int], nn.Sequential] = normed_linear,
) -> nn.Sequential:
    """Normed linears, then an output Linear.

    Args:
        in_features: size of the input.
        units: width of the normed linears.
        layers: number of them.
        out_features: size of the output. None leaves the output Linear out.
        scale: of the output Linear's first weights.
        make_layer: of (inputs, outputs), in the place of a normed linear.
    """
    widths = [in_features] + [units] * layers
    stack = [layer for before, after in pairwise(widths) for layer in make_layer(before, after)]
    if out_features is not None:
        stack.append(Linear(widths[-1], out_features, scale=scale))
    return nn.Sequential(*stack)


# Of Linear -> ELU, the dense layers of Dreamer V1 and V2.
elu_mlp = partial(mlp, make_layer=lambda before, after: nn.Sequential(Linear(before, after), nn.ELU()))


class BlockLinear(nn.Module):
    """Independent Linears on equal slices of the input (fan-in counts the *whole* input).

    An input may be a slice for each block and a part that all blocks read. That part passes one dense Linear, and is never
    copied for each block.

    Args:
        in_features: size of the input, without the shared part.
        out_features: size of the output.
        num_blocks: number of slices; divides both sizes.
        shared_features: size of the shared part, the second argument of :meth:`forward`; 0: there is none.
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

    def joint_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.weight, self.shared_weight) if hasattr(self, "shared_weight") else ()

    def forward(self, value: torch.Tensor, shared: torch.Tensor | None = None) -> torch.Tensor:
        blocks = value.reshape(-1, self.num_blocks, self.weight.shape[1]).transpose(0, 1)  # [G, N, in/G]
        out = torch.bmm(blocks, self.weight).transpose(0, 1)  # [N, G, out/G]
        out = out.reshape(*value.shape[:-1], self.bias.shape[0])  # [..., out]
        bias = self.bias if shared is None else F.linear(shared, self.shared_weight, self.bias)
        return out + bias.to(out.dtype)

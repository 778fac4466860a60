"""Observation decoders: latents -> observation, the mirror image of the encoder.

Images: belief and state to the smallest feature map, then [nearest upsampling x2 -> 5x5 convolution -> channel RMSNorm ->
SiLU] per stage, the last one without norm, to pixels in (0, 1). Vectors: an MLP, in symlog space.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules.functional import symexp

from ..sizes import Sizes
from .heads import FeatureMLP
from .layers import BlockLinear, Linear, NormSiLU, init_convolution, normed_linear, smallest_map


class ImageDecoder(nn.Module):
    """(state, belief) -> images [..., C, H, W] in (0, 1), float32.

    The belief reaches the smallest feature map by a block-Linear, each block some of its channels everywhere; the state by an
    MLP of one hidden layer, twice ``units`` wide. Their sum is normed.

    Args:
        state_size: size of the state (stochastic latent).
        belief_size: size of the belief (deterministic latent).
        image_shape: (C, H, W).
        depth: channels of the last stage, before its multiplier.
        units: half the width of the state's hidden layer.
        multipliers: channels of the stages, in the encoder's order, times ``depth``.
        blocks: of the belief's block-Linear, at most.
        kernel: size of the convolutions.
    """

    compiles = ("forward",)

    def __init__(
        self,
        state_size: int,
        belief_size: int,
        image_shape: tuple[int, int, int],
        *,
        depth: int,
        units: int,
        multipliers: tuple[int, ...] = (2, 3, 4, 4),
        blocks: int = 8,
        kernel: int = 5,
    ):
        super().__init__()
        widths = [depth * multiplier for multiplier in reversed(multipliers)]  # from the smallest map upwards
        self.smallest = (*smallest_map(image_shape, len(multipliers), "decode"), widths[0])
        positions = math.prod(self.smallest)
        # Each block of the belief draws some of the channels, everywhere.
        self.blocks = math.gcd(blocks, widths[0])
        self.belief_in = BlockLinear(belief_size, positions, self.blocks)
        self.state_in = nn.Sequential(*normed_linear(state_size, 2 * units), Linear(2 * units, positions))
        self.norms = nn.ModuleList(NormSiLU(stage) for stage in widths)
        outs = [*widths[1:], image_shape[0]]
        convolutions = [nn.Conv2d(i, o, kernel, padding="same") for i, o in zip(widths, outs, strict=True)]
        for convolution in convolutions:
            init_convolution(convolution, convolution.in_channels * kernel**2)
        self.convolutions = nn.ModuleList(convolutions)

    def forward(self, state: torch.Tensor, belief: torch.Tensor) -> torch.Tensor:
        height, width, channels = self.smallest
        drawn = self.belief_in(belief.to(state.dtype)).reshape(-1, self.blocks, height, width, channels // self.blocks)
        value = self.state_in(state).reshape(-1, *self.smallest)  # [N, H, W, C]
        value = value + drawn.permute(0, 2, 3, 1, 4).flatten(3)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            value = self.doubled(norm(value)).permute(0, 3, 1, 2)  # channels last in memory, as in the encoder
            value = convolution(value).permute(0, 2, 3, 1)
        image = torch.sigmoid(value.permute(0, 3, 1, 2).float())
        return image.reshape(*state.shape[:-1], *image.shape[1:])

    def doubled(self, value: torch.Tensor) -> torch.Tensor:
        """Nearest upsampling x2: [N, H, W, C] -> [N, 2H, 2W, C]."""
        return F.interpolate(value.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest").permute(0, 2, 3, 1)


def _image(sizes: Sizes, shape: tuple[int, int, int]) -> ImageDecoder:
    return ImageDecoder(
        sizes.state,
        sizes.belief,
        shape,
        depth=sizes.depth,
        units=sizes.units,
        multipliers=sizes.multipliers,
        blocks=sizes.blocks,
    )


def _vector(sizes: Sizes, size: int) -> FeatureMLP:
    return FeatureMLP(sizes.features, sizes.units, sizes.vector_layers, size)


class ObservationDecoder(TensorDictModuleBase):
    """Writes what the latents say every observation looks like, below ``"reconstruction"`` under the observation's key.

    Reads ``("next", "state")``, ``("next", "belief")``; writes ``("next", "reconstruction", key)``: images in (0, 1),
    vectors in symlog space. :meth:`decode` gives observations in their own units.

    Args:
        sizes: of the agent.
        make_image: builds the network (state, belief) -> image for sizes and an image's shape. Default:
            :class:`ImageDecoder`.
        make_vector: builds the network (state, belief) -> vector for sizes and a vector's size. Default:
            :class:`FeatureMLP`.

    Example:
        >>> from tensordict import TensorDict
        >>> sizes = Sizes(state=6, belief=8, embedding=5, images={"pixels": (3, 16, 16)}, vectors={"speed": 2},
        ...               units=4, depth=2, multipliers=(1, 2), vector_layers=1, blocks=4)
        >>> latents = TensorDict({"next": {"state": torch.zeros(5, 6), "belief": torch.zeros(5, 8)}}, [5])
        >>> seen = ObservationDecoder(sizes)(latents)["next", "reconstruction"]
        >>> seen["pixels"].shape, seen["speed"].shape
        (torch.Size([5, 3, 16, 16]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        make_image: Callable[[Sizes, tuple[int, int, int]], nn.Module] | None = None,
        make_vector: Callable[[Sizes, int], nn.Module] | None = None,
    ):
        super().__init__()
        self.image_channels = {key: shape[0] for key, shape in sizes.images.items()}
        self.vector_sizes = dict(sizes.vectors)
        self.image = self.vector = None
        if sizes.images:
            shape = next(iter(sizes.images.values()))
            self.image = (make_image or _image)(sizes, (sum(self.image_channels.values()), *shape[1:]))
        if sizes.vectors:
            self.vector = (make_vector or _vector)(sizes, sum(sizes.vectors.values()))
        self.in_keys: list[NestedKey] = [("next", "state"), ("next", "belief")]
        observed = [*self.image_channels, *self.vector_sizes]
        self.out_keys: list[NestedKey] = [("next", "reconstruction", key) for key in observed]

    def predict(self, state: torch.Tensor, belief: torch.Tensor) -> dict[str, torch.Tensor]:
        """By key: images in (0, 1), vectors in symlog space."""
        parts: dict[str, torch.Tensor] = {}
        if self.image is not None:
            images = self.image(state, belief).split(list(self.image_channels.values()), -3)
            parts |= dict(zip(self.image_channels, images, strict=True))
        if self.vector is not None:
            vectors = self.vector(state, belief).split(list(self.vector_sizes.values()), -1)
            parts |= dict(zip(self.vector_sizes, vectors, strict=True))
        return parts

    def decode(self, state: torch.Tensor, belief: torch.Tensor) -> dict[str, torch.Tensor]:
        """By key: images in (0, 1), vectors in their own units."""
        predicted = self.predict(state, belief)
        return {key: symexp(value) if key in self.vector_sizes else value for key, value in predicted.items()}

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for key, value in self.predict(*(tensordict.get(key) for key in self.in_keys)).items():
            tensordict.set(("next", "reconstruction", key), value)
        return tensordict

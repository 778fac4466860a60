"""Observation encoders: e_t = enc(o_t).

Images: [5x5 convolution -> 2x2 max-pool -> channel RMSNorm -> SiLU] per stage. Vectors: symlog, then an MLP.
Several images concatenate on channels, all vectors concatenate, and the two embeddings concatenate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules.functional import symlog

from .layers import NormSiLU, init_convolution, mlp, smallest_map


def centred(images: Sequence[torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (or float in [0, 1]) images [..., C, H, W] stacked on channels and moved to [-0.5, 0.5]: [N, C, H, W].

    Channels last: the norms then run over contiguous channels, and convolutions are 2x faster on CPUs. uint8 is laid out
    so before it grows fourfold.
    """
    if len(images) > 1:
        images = [torch.cat([image if image.is_floating_point() else image / 255 for image in images], -3)]
    image = images[0].reshape(-1, *images[0].shape[-3:]).contiguous(memory_format=torch.channels_last)
    return image.to(dtype) - 0.5 if image.is_floating_point() else image.to(dtype).div_(255).sub_(0.5)


class ImageEncoder(nn.Module):
    """Convolutional encoder of the paper: uint8 (or float in [0, 1]) images [..., C, H, W] to [..., E].

    ``depth * multipliers`` are the channels of the stages; every stage halves height and width.

    Args:
        image_shape: (C, H, W).
        depth: channels of a stage, before its multiplier.
        multipliers: one for each stage.
        kernel: size of the convolutions.
    """

    compiles = ("forward",)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        depth: int,
        multipliers: tuple[int, ...] = (2, 3, 4, 4),
        kernel: int = 5,
    ):
        super().__init__()
        height, width = smallest_map(image_shape, len(multipliers), "encode")
        widths = [image_shape[0]] + [depth * multiplier for multiplier in multipliers]
        convolutions = [nn.Conv2d(widths[i], widths[i + 1], kernel, padding="same") for i in range(len(multipliers))]
        for convolution in convolutions:
            init_convolution(convolution, convolution.in_channels * kernel**2)
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(NormSiLU(out_channels) for out_channels in widths[1:])
        self.out_features = widths[-1] * height * width

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        value = centred(images, self.convolutions[0].weight.dtype)  # pyright: ignore[reportArgumentType] - of a Conv2d
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            pooled = self.pooled(convolution, value)  # pyright: ignore[reportArgumentType] - a ModuleList of Conv2d
            value = norm(pooled).permute(0, 3, 1, 2)
        return value.reshape(*images[0].shape[:-3], self.out_features)

    def pooled(self, convolution: nn.Conv2d, value: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, H/2, W/2, O]: the largest output of ``convolution`` in each 2x2 square."""
        return F.max_pool2d(convolution(value), 2).permute(0, 2, 3, 1)


class StridedEncoder(nn.Module):
    """[convolution -> channel RMSNorm -> SiLU] per stage: images [..., C, H, W] to [..., E], several times cheaper on a CPU.

    The paper's :class:`ImageEncoder` convolves at full resolution and pools. Here every stage strides instead. The default
    first stage reads patches of 4x4, so that no convolution runs over more than 16x16 positions of a 64x64 image.

    ``build_agent(image_encoder=StridedEncoder)`` puts it in the paper's place; in a configuration,
    ``model.image_encoder._target_``.

    Args:
        image_shape: (C, H, W).
        channels: of each stage.
        kernels: sizes of its convolutions.
        strides: and their strides.
    """

    compiles = ("forward",)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: Sequence[int] = (16, 32, 64),
        kernels: Sequence[int] = (4, 3, 3),
        strides: Sequence[int] = (4, 2, 2),
    ):
        super().__init__()
        if not len(channels) == len(kernels) == len(strides) > 0:
            raise ValueError(
                f"channels={list(channels)}, kernels={list(kernels)} and strides={list(strides)} must have one entry for "
                "each stage of the encoder."
            )
        for kernel, stride in zip(kernels, strides, strict=True):
            if kernel < stride:
                raise ValueError(f"kernel {kernel} with stride {stride} leaves pixels unread; use a larger kernel.")
        widths = [image_shape[0], *channels]
        convolutions, size = [], list(image_shape[1:])
        for before, after, kernel, stride in zip(widths, channels, kernels, strides, strict=False):
            padding = (kernel - stride + 1) // 2
            convolutions.append(nn.Conv2d(before, after, kernel, stride, padding))
            size = [(n + 2 * padding - kernel) // stride + 1 for n in size]
        for each in convolutions:
            init_convolution(each, each.in_channels * each.kernel_size[0] ** 2)
        self.convolutions = nn.ModuleList(convolutions)
        if min(size) < 1:
            raise ValueError(
                f"Images of {image_shape[1]}x{image_shape[2]} are too small for kernels={list(kernels)} with "
                f"strides={list(strides)}: nothing is left of them. Use larger images or fewer stages."
            )
        self.norms = nn.ModuleList(NormSiLU(width) for width in channels)
        self.out_features = channels[-1] * size[0] * size[1]

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        value = centred(images, self.convolutions[0].weight.dtype)  # pyright: ignore[reportArgumentType] - of a Conv2d
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            value = norm(convolution(value).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return value.reshape(*images[0].shape[:-3], self.out_features)


class VectorEncoder(nn.Module):
    """symlog, then ``layers`` normed linears: vectors [..., n] concatenated, to [..., units].

    Args:
        in_features: n, of all vectors together.
        units: width of the layers.
        layers: number of them.
        frequencies: each adds sine and cosine of the entries. The paper has none.
        make_layers: builds the stack: ``mlp`` or ``elu_mlp``.
    """

    compiles = ("forward",)

    def __init__(
        self,
        in_features: int,
        units: int,
        layers: int = 3,
        frequencies: Sequence[float] = (),
        make_layers: Callable[..., nn.Sequential] = mlp,
    ):
        super().__init__()
        self.frequencies = tuple(frequencies)
        entries = in_features * (1 + 2 * len(self.frequencies))
        self.layers = make_layers(entries, units, layers)
        self.out_features = units if layers else entries

    def forward(self, *vectors: torch.Tensor) -> torch.Tensor:
        value = symlog(torch.cat(vectors, -1).float())
        waves = [wave(frequency * value) for frequency in self.frequencies for wave in (torch.sin, torch.cos)]
        return self.layers(torch.cat([value, *waves], -1) if waves else value)


class Encoder(Protocol):
    """What ``make_image`` and ``make_vector`` of :class:`ObservationEncoder` build: a module that knows its output's width."""

    out_features: int

    def __call__(self, *values: torch.Tensor) -> torch.Tensor: ...


def read(tensordict: TensorDictBase, keys: Sequence[NestedKey], reader: str, remedy: str) -> list[Any]:
    """The entries ``keys``; the error of missing ones says what is there, and how the ``reader`` gets them."""
    values = [tensordict.get(key, None) for key in keys]
    if lost := [key for key, value in zip(keys, values, strict=True) if value is None]:
        present = sorted(str(key) for key in tensordict.keys(True, True))
        raise ValueError(
            f"{reader} reads {', '.join(map(repr, lost))}, which {'is' if len(lost) == 1 else 'are'} missing.\n"
            f"There is {', '.join(present[:12])}{' and more' if len(present) > 12 else ''}.\n{remedy}"
        )
    return values


class ObservationEncoder(TensorDictModuleBase):
    """Encodes image and vector entries into one embedding e_t: below ``"next"``, as records hold them, or :meth:`at_root`.

    Args:
        image_shapes: shapes (C, H, W) by key; may be empty.
        vector_sizes: sizes by key; may be empty.
        depth: as in :class:`ImageEncoder`.
        units: as in :class:`VectorEncoder`.
        multipliers: as in :class:`ImageEncoder`.
        make_image: builds another network for an image's shape, with ``out_features``. Default: :class:`ImageEncoder`.
        make_vector: builds another network for a vector's size, with ``out_features``. Default: :class:`VectorEncoder`.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> encoder = ObservationEncoder({"pixels": (3, 16, 16)}, {"speed": 2}, depth=2, units=8, multipliers=(1, 2))
        >>> record = TensorDict({"next": {"pixels": torch.zeros(5, 3, 16, 16, dtype=torch.uint8),
        ...                               "speed": torch.ones(5, 2)}}, [5])
        >>> encoder(record)["next", "encoded_latents"].shape[-1] == encoder.out_features
        True
    """

    def __init__(
        self,
        image_shapes: dict[str, tuple[int, int, int]],
        vector_sizes: dict[str, int],
        *,
        depth: int,
        units: int,
        multipliers: tuple[int, ...] = (2, 3, 4, 4),
        make_image: Callable[[tuple[int, int, int]], Encoder] | None = None,
        make_vector: Callable[[int], Encoder] | None = None,
    ):
        super().__init__()
        if not image_shapes and not vector_sizes:
            raise ValueError("The environment offers no observation to encode: neither image_shapes nor vector_sizes.")
        self.image_keys, self.vector_keys = list(image_shapes), list(vector_sizes)
        self.image = self.vector = None
        if image_shapes:
            sizes = {(height, width) for _, height, width in image_shapes.values()}
            if len(sizes) > 1:
                raise ValueError(f"Images are stacked on channels and need one size, got {image_shapes}; resize them.")
            channels = sum(shape[0] for shape in image_shapes.values())
            make_image = make_image or partial(ImageEncoder, depth=depth, multipliers=multipliers)
            self.image = make_image((channels, *sizes.pop()))
        if vector_sizes:
            make_vector = make_vector or partial(VectorEncoder, units=units)
            self.vector = make_vector(sum(vector_sizes.values()))
        self.out_features = sum(part.out_features for part in (self.image, self.vector) if part is not None)
        self._place("next")

    def _place(self, *prefix: str) -> None:
        place = lambda key: (*prefix, key) if prefix else key
        self.in_keys: list[NestedKey] = [place(key) for key in self.image_keys + self.vector_keys]
        self.out_keys: list[NestedKey] = [place("encoded_latents")]

    def at_root(self) -> ObservationEncoder:
        """The same networks, shared, reading the observation at the root of a TensorDict, as a policy needs."""
        twin = ObservationEncoder.__new__(ObservationEncoder)
        nn.Module.__init__(twin)
        twin.image_keys, twin.vector_keys, twin.out_features = self.image_keys, self.vector_keys, self.out_features
        twin.image, twin.vector = self.image, self.vector
        twin._place()
        return twin

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        remedy = "Records hold observations below 'next', and a policy reads them at the root; rename yours (RenameTransform)."
        values = read(tensordict, self.in_keys, "The encoder", remedy)
        images, vectors = values[: len(self.image_keys)], values[len(self.image_keys) :]
        parts = []
        if self.image is not None:
            parts.append(self.image(*images))
        if self.vector is not None:
            parts.append(self.vector(*vectors))
        return tensordict.set(self.out_keys[0], parts[0] if len(parts) == 1 else torch.cat(parts, -1))

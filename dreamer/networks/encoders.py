"""Observation encoders: e_t = enc(o_t).

Images: [5x5 convolution -> 2x2 max-pool -> channel RMSNorm -> SiLU] per stage. Vectors: symlog, then an MLP.
Several images concatenate on channels, all vectors concatenate, and the two embeddings concatenate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules.functional import symlog

from .layers import NormSiLU, init_convolution, mlp


def centred(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 (or float in [0, 1]) images [..., C, H, W] stacked on channels and moved to [-0.5, 0.5]: [N, C, H, W].

    Channels last: the norms then run over contiguous channels, and convolutions are 2x faster on CPUs. uint8 is laid out
    so before it grows fourfold.
    """
    if len(images) > 1:
        images = [torch.cat([image if image.is_floating_point() else image / 255 for image in images], -3)]
    image = images[0].reshape(-1, *images[0].shape[-3:]).contiguous(memory_format=torch.channels_last)
    return image - 0.5 if image.is_floating_point() else image.float().div_(255).sub_(0.5)


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
        channels, height, width = image_shape
        stride = 2 ** len(multipliers)
        if height % stride or width % stride:
            raise ValueError(
                f"Images of {height}x{width} cannot be encoded: height and width must be divisible by the encoder's "
                f"stride {stride} ({len(multipliers)} stages of 2x2 pooling). Resize the observation, for example to "
                f"{max(1, round(height / stride)) * stride}x{max(1, round(width / stride)) * stride} "
                f"(env.make.image_size in the example trainer)."
            )
        widths = [channels] + [depth * multiplier for multiplier in multipliers]
        convolutions = [nn.Conv2d(widths[i], widths[i + 1], kernel, padding="same") for i in range(len(multipliers))]
        for convolution in convolutions:
            init_convolution(convolution, convolution.in_channels * kernel**2)
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(NormSiLU(out_channels) for out_channels in widths[1:])
        self.out_features = widths[-1] * (height // stride) * (width // stride)

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        value = centred(images)
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
        wrong = [(kernel, stride) for kernel, stride in zip(kernels, strides, strict=True) if kernel < stride]
        if wrong:
            raise ValueError(
                f"kernel {wrong[0][0]} with stride {wrong[0][1]} leaves pixels unread; use a kernel of at least the stride."
            )
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
        value = centred(images)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            value = norm(convolution(value).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return value.reshape(*images[0].shape[:-3], self.out_features)


def vector_features(vectors: Sequence[torch.Tensor], frequencies: Sequence[float]) -> torch.Tensor:
    """symlog of concatenated vectors, and beside it its sine and cosine at each frequency."""
    value = vectors[0] if len(vectors) == 1 else torch.cat(tuple(vectors), -1)
    value = symlog(value.float())
    waves = [wave(frequency * value) for frequency in frequencies for wave in (torch.sin, torch.cos)]
    return torch.cat([value, *waves], -1) if waves else value


class VectorEncoder(nn.Module):
    """symlog, then ``layers`` normed linears: vectors [..., n] concatenated, to [..., units].

    Args:
        in_features: n, of all vectors together.
        units: width of the layers.
        layers: number of them.
        frequencies: each adds sine and cosine of the entries. The paper has none.
    """

    compiles = ("forward",)

    def __init__(self, in_features: int, units: int, layers: int = 3, frequencies: Sequence[float] = ()):
        super().__init__()
        self.frequencies = tuple(frequencies)
        self.layers = mlp(in_features * (1 + 2 * len(self.frequencies)), units, layers)
        self.out_features = units

    def forward(self, *vectors: torch.Tensor) -> torch.Tensor:
        return self.layers(vector_features(vectors, self.frequencies))


class Encoder(Protocol):
    """What ``make_image`` and ``make_vector`` of :class:`ObservationEncoder` build: a module that knows its output's width."""

    out_features: int

    def __call__(self, *values: torch.Tensor) -> torch.Tensor: ...


class ObservationEncoder(TensorDictModuleBase):
    """Encodes image and vector entries into one embedding e_t, written to ``out_key``.

    Args:
        image_shapes: shapes (C, H, W) by key; may be empty.
        vector_sizes: sizes by key; may be empty.
        depth: as in :class:`ImageEncoder`.
        units: as in :class:`VectorEncoder`.
        multipliers: as in :class:`ImageEncoder`.
        vector_layers: layers of the vector encoder.
        make_image: builds another network for an image's shape, with ``out_features``. Default: :class:`ImageEncoder`.
        make_vector: builds another network for a vector's size, with ``out_features``. Default: :class:`VectorEncoder`.
        prefix: put before every key: ``("next",)`` for records, ``()`` for acting (see :meth:`at_root`).
        out_key: where the embedding is written.

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
        vector_layers: int = 3,
        make_image: Callable[[tuple[int, int, int]], Encoder] | None = None,
        make_vector: Callable[[int], Encoder] | None = None,
        prefix: tuple[str, ...] = ("next",),
        out_key: str = "encoded_latents",
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
            make_vector = make_vector or partial(VectorEncoder, units=units, layers=vector_layers)
            self.vector = make_vector(sum(vector_sizes.values()))
        self.out_features = sum(part.out_features for part in (self.image, self.vector) if part is not None)
        self._set_prefix(prefix, out_key)

    def _set_prefix(self, prefix: tuple[str, ...], out_key: str) -> None:
        place = lambda key: (*prefix, key) if prefix else key
        self.prefix, self.out_key = prefix, place(out_key)
        self.in_keys: list[NestedKey] = [place(key) for key in self.image_keys + self.vector_keys]
        self.out_keys: list[NestedKey] = [self.out_key]

    def at_root(self, out_key: str = "encoded_latents") -> ObservationEncoder:
        """The same networks, shared, reading the observation at the root of a TensorDict, as a policy needs."""
        twin = ObservationEncoder.__new__(ObservationEncoder)
        nn.Module.__init__(twin)
        twin.image_keys, twin.vector_keys, twin.out_features = self.image_keys, self.vector_keys, self.out_features
        twin.image, twin.vector = self.image, self.vector
        twin._set_prefix((), out_key)
        return twin

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        values = [tensordict.get(key, None) for key in self.in_keys]
        if lost := [key for key, value in zip(self.in_keys, values, strict=True) if value is None]:
            raise ValueError(
                f"The encoder reads {', '.join(map(repr, lost))}, which {'is' if len(lost) == 1 else 'are'} missing. There is "
                f"{', '.join(sorted(str(key) for key in tensordict.keys(True, True)))}.\n"
                "Records hold observations below 'next', and a policy reads them at the root; rename yours (RenameTransform)."
            )
        images, vectors = values[: len(self.image_keys)], values[len(self.image_keys) :]
        parts = []
        if self.image is not None:
            parts.append(self.image(*images))
        if self.vector is not None:
            parts.append(self.vector(*vectors))
        return tensordict.set(self.out_key, parts[0] if len(parts) == 1 else torch.cat(parts, -1))

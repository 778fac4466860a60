"""What an agent sees and does, and what a head must know of the agent it is built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict.utils import NestedKey
from torchrl.data import Bounded, Categorical, Composite, MultiOneHot, OneHot, TensorSpec, Unbounded

UNLIMITED = 1e10  # simulators write a large number where an action has no bound


@dataclass(frozen=True)
class ObservationSpace:
    """What the encoder needs to know: image shapes (C, H, W) and vector sizes, by key.

    Args:
        images: shape (C, H, W) of each image.
        vectors: size of each vector.
    """

    images: dict[str, tuple[int, int, int]]
    vectors: dict[str, int]

    @classmethod
    def from_spec(cls, spec: Composite, ignore: tuple[str, ...] = ("is_init", "metrics")) -> ObservationSpace:
        """Sorts the entries of an environment's observation spec: three dimensions are images, one are vectors.

        What transforms add is an entry, too (``episode_reward``): name in ``ignore`` what is not to be seen. The whole
        ``step_count`` of TorchRL's ``StepCounter`` is not.
        """
        if spec.shape:
            raise ValueError(
                f"These observations are of {list(spec.shape)} environments beside each other: give observation_spec_unbatched."
            )
        images, vectors = {}, {}
        for key, entry in sorted(spec.items()):
            if key in ignore or (key == "step_count" and entry is not None and entry.dtype == torch.int64):
                continue
            if entry is None or isinstance(entry, Composite) or entry.ndim not in (1, 3):
                raise ValueError(
                    f"Observation {key!r} has shape {None if entry is None else tuple(entry.shape)}; the encoder takes "
                    "images [C, H, W] and vectors [n]. Flatten it with torchrl.envs.FlattenObservation or leave it out."
                )
            if entry.ndim == 3:
                images[key] = tuple(entry.shape)
            else:
                vectors[key] = entry.shape[0]
        return cls(images, vectors)


@dataclass(frozen=True)
class ActionSpace:
    """Number of action entries, and whether they are one choice (one-hot) or a continuous vector.

    Args:
        size: number of entries of an action.
        discrete: whether an action is a choice, one-hot.
    """

    size: int
    discrete: bool

    @classmethod
    def from_spec(cls, spec: TensorSpec) -> ActionSpace:
        if isinstance(spec, OneHot) and not isinstance(spec, MultiOneHot) and spec.ndim == 1:
            return cls(spec.shape[-1], True)
        continuous = isinstance(spec, Bounded | Unbounded) and not isinstance(spec, Categorical)
        if continuous and spec.dtype.is_floating_point and spec.ndim == 1:
            _check_range(spec)
            return cls(spec.shape[0], False)
        raise ValueError(
            f"Action space {spec.__class__.__name__}{tuple(spec.shape)} of {spec.dtype} is not supported: actions are one "
            "vector of real numbers (Bounded) or one choice (OneHot). For an index, use categorical_action_encoding=False; of "
            "environments beside each other, give action_spec_unbatched."
        )


def _check_range(spec: TensorSpec) -> None:
    """Where there is a range it is [-1, 1]: the mode of an actor stays in it, and the core takes no larger action."""
    if not isinstance(spec, Bounded):
        return
    space: Any = spec.space
    for bound, expected in ((space.low, -1.0), (space.high, 1.0)):
        if ((bound.abs() < UNLIMITED) & ((bound - expected).abs() > 1e-6)).any():
            raise ValueError(
                f"Actions lie in [{space.low.min():g}, {space.high.max():g}], and an agent acts in [-1, 1]: append "
                "r2dreamer.envs.ClippedActionScaling() to the environment's transforms."
            )


@dataclass(frozen=True)
class Sizes:
    """What a head of ``build_agent(heads=...)`` is built from.

    Such a head is a function of these that returns a TensorDictModule reading and writing entries below ``"next"``.

    Args:
        state: size of the state (stochastic latent).
        belief: size of the belief (deterministic latent).
        embedding: size of the embedding.
        images: shape (C, H, W) of each image.
        vectors: size of each vector.
        units: width of the heads' layers.
        depth: channels of a stage of the image networks, before its multiplier.
        multipliers: one for each stage.
        vector_layers: layers of the vector networks.
        blocks: of the recurrent core.
        actions: entries of an action.
    """

    state: int
    belief: int
    embedding: int
    images: dict[str, tuple[int, int, int]]
    vectors: dict[str, int]
    units: int
    depth: int
    multipliers: tuple[int, ...]
    vector_layers: int
    blocks: int
    actions: int = 0

    @property
    def features(self) -> int:
        """Of state and belief beside each other."""
        return self.state + self.belief


def check_sizes(widths: Mapping[str, int], layers: Mapping[str, int]) -> None:
    """Refuses widths and numbers of layers that no network has."""
    for name, width in widths.items():
        if width < 1:
            raise ValueError(f"model.{name}={width} must be a positive number of features.")
    for name, count in layers.items():
        if count < 0:
            raise ValueError(f"model.{name}_layers={count} must not be negative.")


def check_names(observations: ObservationSpace, written: Sequence[NestedKey]) -> None:
    """Refuses observations of a name that agent or loss write; a reward that is observed is given to the losses apart."""
    taken = {key[1] if key[0] == "next" and len(key) == 2 else key for key in written} - {"reward"} | {"true_reward"}
    for name in sorted({*observations.images, *observations.vectors} & taken):
        raise ValueError(
            f"The observation {name!r} has the name of an entry that the agent writes, and would be overwritten. Append "
            f"torchrl.envs.RenameTransform([{name!r}], ['observed_{name}']) to the environment's transforms."
        )

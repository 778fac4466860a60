"""What a head must know of the agent it is built for."""

from __future__ import annotations

from dataclasses import dataclass


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

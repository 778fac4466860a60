"""What a head must know of the agent it is built for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Widths of the latents and the embedding, the observations (images (C, H, W), vectors n), the model's widths, the action.

    A head of ``build_agent(heads=...)`` is a function of these that returns a TensorDictModule reading and writing
    entries below ``"next"``.
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

"""Barlow Twins between projected latents and embedding, the objective of R2-Dreamer.

L = sum_i (C_ii - 1)^2 + alpha sum_{i != j} C_ij^2, C the correlation of k and sg e over the samples
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase

from ..functional import barlow_twins_loss
from ..ranks import pool
from ..wiring import require_not_negative
from .base import TWO_VIEWS, Objective, Terms, two_views


class BarlowTwins(Objective):
    """R2-Dreamer's objective: the projected latents k and the embedding e are two views of one observation.

    weight * [sum_i (C_ii - 1)^2 + redundancy_weight * sum_{i != j} C_ij^2], C the correlation of k and e over all B*T
    samples, over those of all ranks where ``torch.distributed`` runs several. The embedding is detached: the encoder
    learns through the posterior and the heads, and a target that moves to please the loss would let both views collapse.

    Reads ``("next", "projected_latents")`` and ``("next", "encoded_latents")``, both [B, T, E].

    Args:
        weight: of the term.
        redundancy_weight: of the entries beside the diagonal.
        detach_target: False lets the embedding learn, too: the paper's ablation.
        factor: multiplies whatever weight an experiment has.
    """

    terms = ("barlow",)
    reads = TWO_VIEWS

    def __init__(
        self, weight: float = 0.05, redundancy_weight: float = 5e-4, detach_target: bool = True, factor: float = 1.0
    ):
        super().__init__(weight, factor)
        require_not_negative(redundancy_weight=redundancy_weight)
        self.redundancy_weight, self.detach_target = redundancy_weight, detach_target

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        projected, target = two_views(tensordict, keys)
        if self.detach_target:
            target = target.detach()
        (projected, target), total = pool(projected.flatten(0, -2), target.flatten(0, -2))
        invariance, redundancy = barlow_twins_loss(projected, target, self.redundancy_weight, total=total)
        terms = {"barlow": self.weight * (invariance + redundancy)}
        return terms, {"barlow_invariance": invariance.detach(), "barlow_redundancy": redundancy.detach()}

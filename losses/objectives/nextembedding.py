"""NE-Dreamer: a causal head predicts the embedding of the next step (arXiv 2603.02765).

L = sum_i (C_ii - 1)^2 + alpha sum_{i != j} C_ij^2, C the correlation of the predictions f_t and sg e_{t+1}
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase

from ..functional import barlow_twins_loss
from ..ranks import pool
from ..wiring import entry, require_not_negative
from .base import Objective, Terms, two_views


class NextEmbedding(Objective):
    """Barlow Twins between what the latents up to t predict and the embedding of t + 1, over all pairs of one episode.

    A pair across the beginning of an episode counts for nothing. The embedding is detached: it learns as the RSSM's input.

    Reads ``("next", "predicted_latents")`` and ``("next", "encoded_latents")``, both [B, T, E], and ``is_init`` [B, T, 1].

    Args:
        weight: of the term.
        factor: multiplies the weight.
        redundancy_weight: alpha.
    """

    terms = ("next_embedding",)
    reads = ("predicted_latents", "encoded_latents")

    def __init__(self, weight: float = 1.0, redundancy_weight: float = 5e-4, factor: float = 1.0):
        super().__init__(weight, factor)
        require_not_negative(redundancy_weight=redundancy_weight)
        self.redundancy_weight = redundancy_weight

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        predicted, embedding = two_views(tensordict, keys, "predicted_latents")
        is_init = entry(tensordict, keys, "is_init").reshape(*embedding.shape[:2], 1)
        same_episode = 1 - is_init[:, 1:].float()  # [B, T-1, 1]
        rows = (each.flatten(0, 1) for each in (predicted[:, :-1], embedding[:, 1:].detach(), same_episode))
        (predicted, embedding, keep), total = pool(*rows)
        invariance, redundancy = barlow_twins_loss(predicted, embedding, self.redundancy_weight, keep, total)
        diagnostics = {"next_invariance": invariance.detach(), "next_redundancy": redundancy.detach()}
        return {"next_embedding": self.weight * (invariance + redundancy)}, diagnostics

"""Dreamer-CDP: the belief alone predicts the embedding, before the observation is known.

L = mean (1 - cos(f(h_t), sg e_t))
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from tensordict import TensorDictBase

from .base import Objective, Terms, two_views


class DreamerCDP(Objective):
    """Continuous deterministic prediction: the cosine distance between the embedding and its prediction by the belief.

    The embedding is detached. The encoder learns as the RSSM's input: of earlier steps, through the belief.

    Reads ``("next", "predicted_latents")`` and ``("next", "encoded_latents")``, both [B, T, E].

    Args:
        weight: of the term.
        factor: multiplies the weight.
    """

    terms = ("cdp",)
    reads = ("predicted_latents", "encoded_latents")

    def __init__(self, weight: float = 1.0, factor: float = 500.0):
        super().__init__(weight, factor)

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        predicted, embedding = two_views(tensordict, keys, "predicted_latents")
        cosine = F.cosine_similarity(predicted.float(), embedding.detach().float(), dim=-1).mean()
        return {"cdp": self.weight * (1 - cosine)}, {"cdp_cosine": cosine.detach()}

"""InfoNCE between projected latents and embedding.

L = -mean_n ln softmax_m(k_n . e_m)[n]
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from ..functional import info_nce_loss
from ..ranks import gather_ranks, own_rows
from .base import TWO_VIEWS, Objective, Terms, two_views


class InfoNCE(Objective):
    """Each projected latent must pick its own embedding among those of the whole batch.

    The defaults, raw dot products, are those of the R2-Dreamer paper's comparison. The embedding is detached, as in
    :class:`BarlowTwins`. Negatives come from every rank.

    Reads ``("next", "projected_latents")`` and ``("next", "encoded_latents")``, both [B, T, E].

    Args:
        weight: of the term.
        cosine: takes unit vectors, the usual contrastive form.
        temperature: divides the scores.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from r2dreamer.losses import R2DreamerWorldModelLoss
        >>> views = TensorDict({"next": {"projected_latents": 9 * torch.eye(6).view(2, 3, 6),
        ...                              "encoded_latents": torch.eye(6).view(2, 3, 6)}}, [2, 3])
        >>> terms, diagnostics = InfoNCE()(views, R2DreamerWorldModelLoss.default_keys())
        >>> terms["infonce"] < 0.01, diagnostics["infonce_accuracy"]
        (tensor(True), tensor(1.))
    """

    terms = ("infonce",)
    reads = TWO_VIEWS

    def __init__(self, weight: float = 1.0, cosine: bool = False, temperature: float = 1.0):
        super().__init__(weight)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive; 1.0 leaves the scores as they are.")
        self.cosine, self.temperature = cosine, temperature

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        projected, target = (view.flatten(0, -2) for view in two_views(tensordict, keys))
        targets = gather_ranks(target.detach())
        own = own_rows(torch.arange(len(targets), device=targets.device))
        loss, accuracy = info_nce_loss(projected, targets, cosine=self.cosine, temperature=self.temperature, own=own)
        return {"infonce": self.weight * loss}, {"infonce_accuracy": accuracy}

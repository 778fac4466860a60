"""Reconstruction, the objective of Dreamer V1 to V3: a decoder must draw the observation from the latents.

L = sum over pixels (decoded - o)^2 + sum over vector entries (decoded - symlog o)^2, mean over B and T
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.modules.functional import symlog

from .base import Objective, Terms


class Reconstruction(Objective):
    """Squared error of everything the world model's decoder wrote.

    Reads every entry of ``("next", "reconstruction")``, images [B, T, C, H, W] in (0, 1) and vectors [B, T, n] in symlog
    space, and beside it ``("next", key)``, the observation: images uint8, or floats in [0, 1]. The gradient reaches
    decoder, posterior and, through the embedding, the encoder.

    Example:
        >>> from tensordict import TensorDict
        >>> seen = {"speed": torch.zeros(2, 3, 4), "reconstruction": {"speed": torch.full((2, 3, 4), 0.5)}}
        >>> terms, _ = Reconstruction()(TensorDict({"next": seen}, [2, 3]), keys=None)
        >>> terms["reconstruction"]  # 4 entries, 0.25 each
        tensor(1.)
    """

    terms = ("reconstruction",)

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        after, dims = tensordict.get("next"), tensordict.ndim
        decoded = after.get("reconstruction", None)
        if decoded is None:
            raise ValueError(
                'The world model wrote no ("next", "reconstruction"): this objective needs a decoder, for example '
                'build_agent(..., heads={"decoder": ObservationDecoder}).'
            )
        unseen = [key for key in decoded.keys() if after.get(key, None) is None]
        if unseen:
            raise ValueError(
                f"The decoder draws {unseen}, and the records hold no observation of that name below 'next'. Give the "
                "decoder the names of the observations."
            )
        errors = {
            key: (predicted.float() - _target(after.get(key), dims)).square().flatten(dims).sum(-1).mean()
            for key, predicted in decoded.items()
        }
        first, *others = errors.values()
        terms = {"reconstruction": self.weight * sum(others, first)}
        return terms, {f"reconstruction_{key}": error.detach() for key, error in errors.items()}


def _target(observation: torch.Tensor, batch_dims: int) -> torch.Tensor:
    if observation.ndim > batch_dims + 1:
        return observation.float() if observation.is_floating_point() else observation.float() / 255
    return symlog(observation.float())

"""Representation objectives: what makes the latents know the observation.

An objective is a module called with the posterior TensorDict and the loss's keys; it returns its weighted terms by name
(``barlow`` becomes ``loss_barlow``) and detached diagnostics. A new one is one class in one file and one config.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from ..functional import barlow_twins_loss
from ..ranks import gather_ranks
from ..wiring import NEXT, entry

Terms = dict[str, torch.Tensor]
TWO_VIEWS = ("projected_latents", "encoded_latents")


class Objective(nn.Module):
    """What every objective has: the names of its ``terms``, a ``weight``, and a hook after each update.

    The example trainer on a GPU records ``forward`` as a CUDA graph: after three updates its Python no longer runs. What
    changes from update to update must then be a tensor that is filled in place, and no value may be read on the host;
    ``capture=false`` lifts that. ``after_update`` always runs.
    """

    terms: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()  # accepted keys that the world model must write, checked at construction of the loss

    def __init__(self, weight: float = 1.0):
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight={weight} of {type(self).__name__} must not be negative; 0 switches it off.")
        self.weight = weight

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        """Weighted terms by name, and detached diagnostics."""
        raise NotImplementedError  # this is what an objective is

    def after_update(self) -> None:
        """Called once after every step of the optimiser: networks that follow others do it here."""


def two_views(tensordict: TensorDictBase, keys: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The projected latents and the embedding as rows of samples, both [B*T, E] and attached."""
    projected = entry(tensordict, keys, "projected_latents", NEXT).flatten(0, -2)
    target = entry(tensordict, keys, "encoded_latents", NEXT).flatten(0, -2)
    if projected.shape != target.shape:
        raise ValueError(
            f"{keys.projected_latents!r} has {projected.shape[-1]} features and {keys.encoded_latents!r} has "
            f"{target.shape[-1]}; build the projection head with the embedding's size."
        )
    return projected, target


class BarlowTwins(Objective):
    """R2-Dreamer's objective: the projected latents k and the embedding e are two views of one observation.

    weight * [sum_i (C_ii - 1)^2 + redundancy_weight * sum_{i != j} C_ij^2], C the correlation of k and e over all B*T
    samples, over those of all ranks where ``torch.distributed`` runs several. The embedding is detached: the encoder
    learns through the posterior and the heads, and a target that moves to please the loss would let both views collapse.
    ``detach_target=False`` exists for the paper's ablation, and ``factor``, on top of the weight, for those that multiply
    whatever weight an experiment has.

    Reads ``("next", "projected_latents")`` and ``("next", "encoded_latents")``, both [B, T, E].
    """

    terms = ("barlow",)
    reads = TWO_VIEWS

    def __init__(
        self,
        weight: float = 0.05,
        redundancy_weight: float = 5e-4,
        detach_target: bool = True,
        factor: float = 1.0,
    ):
        super().__init__(weight * factor)
        self.redundancy_weight, self.detach_target = redundancy_weight, detach_target

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        projected, target = two_views(tensordict, keys)
        if self.detach_target:
            target = target.detach()
        invariance, redundancy = barlow_twins_loss(
            gather_ranks(projected), gather_ranks(target), self.redundancy_weight
        )
        terms = {"barlow": self.weight * (invariance + redundancy)}
        return terms, {"barlow_invariance": invariance.detach(), "barlow_redundancy": redundancy.detach()}


class NoObjective(Objective):
    """Nothing but reward, continuation and KL teach the latents: the ablation in which they may collapse.

    ``weight`` weighs nothing; it is there because experiments set it for every objective alike.
    """

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        return {}, {}

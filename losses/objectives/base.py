"""Representation objectives: what makes the latents know the observation.

An objective is a module called with the posterior TensorDict and the loss's keys; it returns its weighted terms by name
(``barlow`` becomes ``loss_barlow``) and detached diagnostics. A new one is one class in one file and one config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from ..wiring import NEXT, entry

Terms = dict[str, torch.Tensor]
TWO_VIEWS = ("projected_latents", "encoded_latents")


class Objective(nn.Module):
    """What every objective has: the names of its ``terms``, a weight, and a hook after each update.

    The example trainer on a GPU records ``forward`` as a CUDA graph: after three updates its Python no longer runs. What
    changes from update to update must then be a tensor that is filled in place, and no value may be read on the host;
    ``capture=false`` lifts that. ``after_update`` always runs.

    Args:
        weight: of the terms.
        factor: times the weight: what stays, and what ablations change, where an experiment sets the weight.
    """

    terms: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()  # accepted keys that the world model must write, checked at construction of the loss

    def __init__(self, weight: float = 1.0, factor: float = 1.0):
        super().__init__()
        if weight * factor < 0:
            raise ValueError(f"weight={weight} of {type(self).__name__} must not be negative; 0 switches it off.")
        self.weight = weight * factor

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        """Weighted terms by name, and detached diagnostics."""
        raise NotImplementedError  # this is what an objective is

    def after_update(self) -> None:
        """Called once after every step of the optimiser: networks that follow others do it here."""


def check_results(objective: nn.Module, results: Any, terms: set[str], diagnostics: set[str]) -> tuple[Terms, Terms]:
    """What an objective returned; refuses names of the loss's own ``terms`` and ``diagnostics``, and what would be summed wrongly."""
    name = type(objective).__name__
    if not (
        isinstance(results, tuple | list) and len(results) == 2 and all(isinstance(each, Mapping) for each in results)
    ):
        raise ValueError(
            f"{name}.forward returned a {type(results).__name__}; expected two dicts: weighted terms by name, and diagnostics."
        )
    mine = [*terms.intersection(results[0].keys()), *diagnostics.intersection(results[1].keys())]
    if mine:
        raise ValueError(f"{name} returned {sorted(mine)}, which the loss writes itself. Give them other names.")
    losses = [each for each in results[1].keys() if each.startswith("loss_")]
    if losses:
        raise ValueError(
            f"{name} returned the diagnostics {losses}: entries that begin with 'loss_' are summed. Give them other names."
        )
    declared: Any = getattr(objective, "terms", ())
    if declared and (unnamed := sorted(results[0].keys() - {*declared})):
        raise ValueError(
            f"{name} returned the terms {unnamed}, and its `terms` are {declared!r}: a tuple of their names."
        )
    for kind, values in zip(("term", "diagnostic"), results, strict=True):
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{name} returned the {kind} {key!r} as a {type(value).__name__}; expected a tensor.")
            if value.numel() != 1:
                raise ValueError(
                    f"{name} returned the {kind} {key!r} of shape {list(value.shape)}; expected one number. Take its mean."
                )
    return results[0], results[1]


def two_views(
    tensordict: TensorDictBase, keys: Any, name: str = "projected_latents"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head ``name`` wrote and the embedding, both [B, T, E] and attached."""
    view, target = entry(tensordict, keys, name, NEXT), entry(tensordict, keys, "encoded_latents", NEXT)
    if view.shape != target.shape:
        raise ValueError(
            f"{getattr(keys, name)!r} has {view.shape[-1]} features and {keys.encoded_latents!r} has "
            f"{target.shape[-1]}; build the head with the embedding's size."
        )
    return view, target

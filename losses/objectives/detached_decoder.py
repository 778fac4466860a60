"""A decoder that only looks: what do the latents of a member without decoder know about the observation?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from .base import Objective, Terms
from .reconstruction import Reconstruction


class DetachedDecoder(Objective):
    """Trains a decoder of its own on detached latents; nothing but this decoder ever gets a gradient from it.

    Its term ``detached_decoder`` is the decoder's :class:`Reconstruction` loss. Reads what the decoder reads, and the observation.

    Args:
        decoder: latents -> ``("next", "reconstruction")``.
        weight: of the term.
    """

    terms = ("detached_decoder",)

    def __init__(self, decoder: TensorDictModuleBase, weight: float = 1.0):
        super().__init__(weight)
        self.decoder, self.reconstruction = decoder, Reconstruction()

    @classmethod
    def of(cls, agent: Any, *, decoder: Callable[[Any], TensorDictModuleBase], weight: float = 1.0) -> DetachedDecoder:
        """With a decoder made for the agent's ``sizes``; the random numbers after it are those without it."""
        with torch.random.fork_rng(devices=[]):
            return cls(decoder(agent.sizes), weight)

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        terms, diagnostics = self.reconstruction(self.decoder(tensordict.detach()), keys)
        renamed = {name.replace("reconstruction", "detached_decoder"): value for name, value in diagnostics.items()}
        return {"detached_decoder": self.weight * terms["reconstruction"]}, renamed

"""Softmax over few classes on a CPU, without gradient.

Torch vectorises along the classes. Where they do not fill a register, it computes one number at a time.
"""

from __future__ import annotations

import torch

from ..networks.heads import OneHotParameters
from ..rssm.latents import CategoricalLatent
from .mixing import Fast

VECTOR = 16  # float32 numbers in a register


def unimix_probs(logits: torch.Tensor, unimix: float) -> torch.Tensor:
    """As in ``networks.distributions``, in place and without gradient."""
    odds = (logits.float() - logits.amax(-1, keepdim=True)).exp_()
    probs = odds.div_(odds.sum(-1, keepdim=True))
    return (1 - unimix) * probs + unimix / logits.shape[-1] if unimix else probs


def narrow(logits: torch.Tensor) -> bool:
    """Whether these classes are few, on a CPU, and need no gradient."""
    gradient = logits.requires_grad and torch.is_grad_enabled()
    few = logits.shape[-1] < VECTOR and logits.device.type == "cpu"
    return few and not gradient and not torch.compiler.is_compiling()


class NarrowLatent(Fast, CategoricalLatent):
    """The latent, with its own softmax where classes are few."""

    def probs(self, logits: torch.Tensor) -> torch.Tensor:
        return unimix_probs(logits, self.unimix) if narrow(logits) else super().probs(logits)


class NarrowParameters(Fast, OneHotParameters):
    """The same for actions."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return unimix_probs(logits, self.unimix) if narrow(logits) else super().forward(logits)


MIXINS = NarrowLatent, NarrowParameters

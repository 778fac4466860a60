"""Divergences between posterior and prior; like the representation objective, an object passed to the world-model loss."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from .functional import categorical_entropy, divergence, log_mixed
from .objectives.base import Terms
from .ranks import ranks, sum_ranks
from .wiring import NEXT, entry, require_not_negative

READS = ("prior_logits", "posterior_logits")


class CategoricalKL(nn.Module):
    """dynamics * max(free, KL(sg q || p)) + representation * max(free, KL(q || sg p)) on the mixed probabilities.

    Each KL is summed over the S categoricals, clipped at ``free_nats`` per (b, t), then averaged.

    Args:
        dynamics: weight of the term that trains the prior.
        representation: weight of the term that trains the posterior.
        free_nats: a smaller KL counts as this.
        unimix: share of the uniform distribution in both.
        average_first: clip the average over all (b, t), of all ranks, instead. With weights 0.8 and 0.2 this is Dreamer V2's balanced KL.

    Example:
        >>> divergences = torch.tensor([[0.5, 3.5]])  # of two steps; their mean is 2
        >>> [CategoricalKL(average_first=first).clipped(divergences).item() for first in (False, True)]
        [2.25, 2.0]
    """

    compiles = ("compare",)

    terms = ("dynamics", "representation")
    reads = READS

    def __init__(
        self,
        dynamics: float = 1.0,
        representation: float = 0.1,
        free_nats: float = 1.0,
        unimix: float = 0.01,
        average_first: bool = False,
    ):
        super().__init__()
        require_not_negative(dynamics=dynamics, representation=representation, free_nats=free_nats)
        if not 0 <= unimix < 1:
            raise ValueError(f"unimix={unimix} must be in [0, 1).")
        self.dynamics, self.representation = dynamics, representation
        self.free_nats, self.unimix, self.average_first = free_nats, unimix, average_first

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        posterior = entry(tensordict, keys, "posterior_logits", NEXT).float()
        prior = entry(tensordict, keys, "prior_logits", NEXT).float()
        dynamics, representation, diagnostics = self.compare(posterior, prior)
        terms = {"dynamics": self.dynamics * self.clipped(dynamics)}
        return terms | {"representation": self.representation * self.clipped(representation)}, diagnostics

    def compare(self, posterior: torch.Tensor, prior: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Terms]:
        """Both divergences [B, T] of logits [B, T, S, K], and diagnostics."""
        # As TorchRL's categorical_kl_terms, which is NaN where logits differ by hundreds and nothing is mixed in.
        q, p = log_mixed(posterior, self.unimix), log_mixed(prior, self.unimix)
        kl = divergence(q.detach(), p)
        with torch.no_grad():
            diagnostics = {
                "kl": kl.mean(),  # what is left where the free nats hide it from the loss
                "prior_entropy": categorical_entropy(prior, self.unimix).mean(),
                "posterior_entropy": categorical_entropy(posterior, self.unimix).mean(),
            }
        return kl, divergence(q, p.detach()), diagnostics

    def clipped(self, divergence: torch.Tensor) -> torch.Tensor:
        """The mean of divergences [B, T], of which ``free_nats`` are free."""
        if self.average_first:
            return _mean_of_ranks(divergence).clamp_min(self.free_nats)
        return divergence.clamp_min(self.free_nats).mean()


class GaussianKL(nn.Module):
    """weight * max(free_nats, mean KL(q || p)) of diagonal Gaussians: Dreamer V1's, which trains both sides alike.

    Reads ``prior_logits`` and ``posterior_logits`` [B, T, S, 2], means and standard deviations. The KL is summed over S and
    averaged before it is clipped.

    Args:
        weight: of the term.
        free_nats: a smaller KL counts as this.
    """

    terms = ("kl",)
    reads = READS

    def __init__(self, weight: float = 1.0, free_nats: float = 3.0):
        super().__init__()
        require_not_negative(weight=weight, free_nats=free_nats)
        self.weight, self.free_nats = weight, free_nats

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        posterior, posterior_std = entry(tensordict, keys, "posterior_logits", NEXT).float().unbind(-1)
        prior, prior_std = entry(tensordict, keys, "prior_logits", NEXT).float().unbind(-1)
        ratio = (posterior_std / prior_std).square()
        distance = ((posterior - prior) / prior_std).square()
        kl = _mean_of_ranks(0.5 * (ratio + distance - 1 - ratio.log()).sum(-1))
        spread = {"prior_std": prior_std.detach().mean(), "posterior_std": posterior_std.detach().mean()}
        return {"kl": self.weight * kl.clamp_min(self.free_nats)}, {"kl": kl.detach(), **spread}


def _mean_of_ranks(values: torch.Tensor) -> torch.Tensor:
    return sum_ranks(values.mean()) / ranks()

"""SIGReg, the Gaussian regulariser of LeJEPA (arXiv 2511.08544), beside the agreement of projected latents and embedding.

L = mean (k - e)^2 + gamma mean_a T(a),  T(a) = N int |1/N sum_n exp(i t a.e_n) - exp(-t^2/2)|^2 exp(-t^2/2) dt
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase

from ..ranks import from_first_rank, ranks, sum_ranks
from ..wiring import require_not_negative
from .base import TWO_VIEWS, Objective, Terms, two_views


class SIGReg(Objective):
    """The two views agree, and along random directions a the embeddings are distributed as a standard normal.

    Both views learn: no target is detached, the normal distribution keeps them from collapsing. T is the statistic of
    Epps and Pulley, by the trapezoidal rule at 17 points from -5 to 5. Directions are drawn anew for every update, the
    same on every rank.

    Reads ``("next", "projected_latents")`` and ``("next", "encoded_latents")``, both [B, T, E].

    Args:
        weight: of the term.
        factor: multiplies the weight.
        gaussian: gamma, the weight of the statistic.
        directions: number of them.
    """

    terms = ("sigreg",)
    reads = TWO_VIEWS

    def __init__(self, weight: float = 1.0, gaussian: float = 0.1, directions: int = 256, factor: float = 1.0):
        super().__init__(weight, factor)
        require_not_negative(gaussian=gaussian)
        if directions < 1:
            raise ValueError(f"directions={directions} of SIGReg must be positive.")
        self.gaussian, self.directions = gaussian, directions

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        projected, embedding = (view.flatten(0, -2).float() for view in two_views(tensordict, keys))  # [N, E]
        with torch.autocast(embedding.device.type, enabled=False):
            agreement = (projected - embedding).square().mean()
            drawn = torch.randn(self.directions, embedding.shape[-1], device=embedding.device)
            statistic = epps_pulley(embedding @ F.normalize(from_first_rank(drawn), dim=-1).T).mean()
        loss = agreement + self.gaussian * statistic
        diagnostics = {"sigreg_agreement": agreement.detach(), "sigreg_statistic": statistic.detach()}
        return {"sigreg": self.weight * loss}, diagnostics


def epps_pulley(samples: torch.Tensor, points: int = 9, end: float = 5.0) -> torch.Tensor:
    """How far samples [N, M], those of all ranks, are from a standard normal, in each of M columns: [M].

    The integrand is even: the integral from 0 to ``end`` is taken twice.
    """
    t = torch.linspace(0.0, end, points, device=samples.device)
    normal = (-t.square() / 2).exp()
    angles, count = samples.unsqueeze(-1) * t, ranks() * len(samples)  # [N, M, points]
    cosine, sine = sum_ranks(torch.stack([angles.cos().sum(0), angles.sin().sum(0)])) / count
    distance = (cosine - normal).square() + sine.square()
    return 2 * count * torch.trapezoid(distance * normal, t, dim=-1)

"""VICReg between projected latents and embedding (arXiv 2105.04906).

L = mean (k - e)^2 + variance [v(k) + v(e)] + covariance [c(k) + c(e)],
v = mean_i max(0, 1 - std_i), c = sum_{i != j} Cov_ij^2 / E
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from ..functional import centre
from ..ranks import pool
from ..wiring import require_not_negative
from .base import TWO_VIEWS, Objective, Terms, two_views


class VICReg(Objective):
    """The two views agree, every feature varies, and no two features say the same.

    Both views learn: not a detached target but the hinge on each feature's standard deviation keeps them from collapsing.

    Reads ``("next", "projected_latents")`` and ``("next", "encoded_latents")``, both [B, T, E].

    Args:
        weight: of the sum.
        variance: weight of the hinge. The paper's proportion of the three terms is 25 : 25 : 1.
        covariance: weight of the covariances.
    """

    terms = ("vicreg",)
    reads = TWO_VIEWS

    def __init__(self, weight: float = 1.0, variance: float = 1.0, covariance: float = 0.04):
        super().__init__(weight)
        require_not_negative(variance=variance, covariance=covariance)
        self.variance, self.covariance = variance, covariance

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        views, total = pool(*(view.flatten(0, -2) for view in two_views(tensordict, keys)))  # [N, E] each
        with torch.autocast(views[0].device.type, enabled=False):
            k, e = (view.float() for view in views)
            invariance = (k - e).square().mean()
            variance, covariance = self._spread(k, e, total)
        loss = invariance + self.variance * variance + self.covariance * covariance
        diagnostics = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return {"vicreg": self.weight * loss}, {f"vicreg_{name}": each.detach() for name, each in diagnostics.items()}

    @staticmethod
    def _spread(k: torch.Tensor, e: torch.Tensor, total) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both views together: the hinge on the standard deviations, and the squared covariances beside the diagonal."""
        samples, features = k.shape
        if samples < 2:
            raise ValueError(f"VICReg compares over samples and needs at least 2, got {samples}.")
        count = total(torch.ones_like(k[:, 0]).sum())
        k, e = (centre(view, count, total=total) for view in (k, e))
        variance = total(torch.cat([k.square().sum(0), e.square().sum(0)])) / (count - 1)
        std = (variance + 1e-4).sqrt()  # the root of 0 has an infinite gradient
        # Covariances are symmetric: one matrix holds those of k above its diagonal and those of e below it.
        covariance = total((k.T @ k).triu(1) + (e.T @ e).tril(-1)) / (count - 1)
        return (1 - std).relu().sum() / features, 2 * covariance.square().sum() / features

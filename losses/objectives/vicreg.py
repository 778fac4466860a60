"""VICReg between projected latents and embedding (arXiv 2105.04906).

L = mean (k - e)^2 + variance [v(k) + v(e)] + covariance [c(k) + c(e)],
v = mean_i max(0, 1 - std_i), c = sum_{i != j} Cov_ij^2 / E
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from .base import TWO_VIEWS, Objective, Terms, all_rows, two_views


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
        self.variance, self.covariance = variance, covariance

    def forward(self, tensordict: TensorDictBase, keys: Any) -> tuple[Terms, Terms]:
        views = [all_rows(view).float() for view in two_views(tensordict, keys)]  # [N, E] each
        with torch.autocast(views[0].device.type, enabled=False):
            invariance = (views[0] - views[1]).square().mean()
            variance, covariance = (sum(pair) for pair in zip(*map(self._spread, views), strict=True))
        loss = invariance + self.variance * variance + self.covariance * covariance
        diagnostics = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return {"vicreg": self.weight * loss}, {f"vicreg_{name}": each.detach() for name, each in diagnostics.items()}

    @staticmethod
    def _spread(view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The hinge on the standard deviations, and the squared covariances beside the diagonal."""
        centred = view - view.mean(0)
        covariance = centred.T @ centred / (len(view) - 1)  # [E, E]
        std = (covariance.diagonal() + 1e-4).sqrt()  # the root of 0 has an infinite gradient
        off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
        return (1 - std).relu().mean(), off_diagonal / view.shape[-1]

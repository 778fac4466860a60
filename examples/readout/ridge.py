"""Linear readouts: ridge regression from features to facts, scored by R2 on episodes that nothing was fitted to.

w = argmin |Y - X w|^2 + a |w|^2; the penalty a is chosen per number on the last fifth of the training episodes, then w is
fitted to all of them. R2 = 1 - |Y - X w|^2 / |Y - mean of the training episodes|^2: 0 is what a constant scores.
"""

from __future__ import annotations

import numpy as np
import torch

from ..figures.bootstrap import percentiles

PENALTIES = torch.logspace(-7, 2, 10, dtype=torch.float64)  # times the largest eigenvalue's hundredth
VALIDATION = 0.2  # of the training episodes
DRAWS = 1000


class Ridge:
    """The solutions for all penalties of features X [N, F] and targets Y [N, D], both centred here."""

    def __init__(self, features: torch.Tensor, targets: torch.Tensor):
        x, y = features.double(), targets.double()
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        x, y = x - self.x_mean, y - self.y_mean
        self.wide = x.shape[1] > x.shape[0]
        values, vectors = torch.linalg.eigh(x @ x.T if self.wide else x.T @ x)
        values = values.clamp_min(0)
        scale = values[-1].clamp_min(1e-30) / 100
        shrunk = 1 / (values + PENALTIES[:, None] * scale)  # [P, R]
        onto = vectors.T @ (y if self.wide else x.T @ y)  # [R, D]
        solved = vectors @ (shrunk[..., None] * onto)  # [P, R, D]
        self.weights = x.T @ solved if self.wide else solved  # [P, F, D]

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """[P, N, D], one prediction for each penalty."""
        return (features.double() - self.x_mean) @ self.weights + self.y_mean


def heldout_r2(features: torch.Tensor, facts: torch.Tensor, episodes: int) -> dict[str, float]:
    """R2 of facts [E, T, D] from features [E, T, F], the mean over D, with its 95 % interval over held-out episodes.

    The first ``episodes`` rows are fitted to, the others scored on. D numbers that never change are refused.
    """
    fit = max(1, min(episodes - 1, round(episodes * (1 - VALIDATION))))
    flat = lambda value, *rows: value[slice(*rows)].flatten(0, 1)
    chosen = Ridge(flat(features, 0, fit), flat(facts, 0, fit))
    errors = (chosen.predict(flat(features, fit, episodes)) - flat(facts, fit, episodes)).square().mean(1)  # [P, D]
    best = errors.argmin(0)  # [D]
    final = Ridge(flat(features, 0, episodes), flat(facts, 0, episodes))
    predicted = final.predict(flat(features, episodes, None))  # [P, N, D]
    predicted = torch.stack([predicted[penalty, :, i] for i, penalty in enumerate(best)], -1)
    target = flat(facts, episodes, None).double()
    rows = (len(facts) - episodes, -1)
    residual = (predicted - target).square().unflatten(0, rows).sum(1).numpy()  # [held-out episodes, D]
    total = (target - final.y_mean).square().unflatten(0, rows).sum(1).numpy()
    if not (total.sum(0) > 0).all():
        raise ValueError("A fact that never changes has no R2; leave it out.")
    r2 = lambda counts: (1 - counts @ residual / (counts @ total)).mean(-1)
    drawn = np.random.default_rng(0).multinomial(len(total), [1 / len(total)] * len(total), size=DRAWS)
    low, high = percentiles(r2(drawn))
    return {"r2": float(r2(np.ones(len(total)))), "low": float(low), "high": float(high)}


def products(facts: torch.Tensor) -> torch.Tensor:
    """The numbers [..., D] and all products of two of them."""
    first, second = torch.triu_indices(facts.shape[-1], facts.shape[-1])
    return torch.cat([facts, facts[..., first] * facts[..., second]], -1)

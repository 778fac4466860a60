"""Bootstrap intervals: how far a mean over a few seeds may be off."""

from __future__ import annotations

import numpy as np

DRAWS = 4000


def bootstrap_means(values: np.ndarray, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Means [draws, ...] of resampled runs [runs, ...]; the same runs are drawn for every trailing entry."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(values), size=(draws, len(values)))  # [draws, runs]
    counts = np.apply_along_axis(np.bincount, 1, chosen, minlength=len(values))
    return np.tensordot(counts / len(values), values, 1)


def percentiles(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval that holds 95 % of the means."""
    return tuple(np.percentile(means, [2.5, 97.5], axis=0))


def bootstrap_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean over runs [runs, N]."""
    return percentiles(bootstrap_means(values))


def bootstrap_difference(values: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference between two means, of runs [n] and [m] that share nothing."""
    low, high = percentiles(bootstrap_means(values, seed=0) - bootstrap_means(reference, seed=1))
    return float(low), float(high)

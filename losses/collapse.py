"""Is a representation alive? How far it spreads over the samples, and in how many directions, for the metrics of a run."""

from __future__ import annotations

import torch

from .ranks import gather_ranks, ranks

SAMPLES = 512  # rows that the rank is taken over: it costs their number squared


def effective_rank(rows: torch.Tensor) -> torch.Tensor:
    """In how many directions N samples [N, E] spread: (sum of variances)^2 / sum of squared variances along the axes.

    The participation ratio of the covariance's eigenvalues, without computing them: n equally strong directions give n,
    one direction 1, samples that are all the same 0.

    Args:
        rows: [N, E].

    Returns:
        A scalar between 0 and E.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0, 5.0], [-1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, -1.0, 5.0]])
        >>> effective_rank(rows)
        tensor(2.)
    """
    centred = rows.float() - rows.float().mean(0)
    centred = centred - centred.mean(0)  # the first mean is rounded: equal samples must become 0
    gram = centred @ centred.T if len(rows) < rows.shape[-1] else centred.T @ centred
    return gram.diagonal().sum().square() / gram.square().sum().clamp_min(1e-30)


@torch.no_grad()
def collapse_metrics(**views: torch.Tensor) -> dict[str, torch.Tensor]:
    """Effective rank and deviation of each view: in how many directions it spreads, and how far.

    The deviation falls to 0 when a view is the same for everything. The rank ignores size, also that of noise around a
    collapsed point. Where ``torch.distributed`` runs several processes, both are of the samples of all.

    Args:
        **views: [..., E], by name.

    Returns:
        ``<name>_rank``, and ``<name>_std``, the mean over features of their standard deviation over all samples.

    Example:
        >>> sorted(collapse_metrics(embedding=torch.randn(2, 5, 3)))
        ['embedding_rank', 'embedding_std']
    """
    metrics = {}
    for name, view in views.items():
        rows = view.detach().float().flatten(0, -2)
        with torch.autocast(rows.device.type, enabled=False):
            metrics[f"{name}_rank"] = effective_rank(_sampled(rows))
            metrics[f"{name}_std"] = _deviation(rows).mean()
    return metrics


def _sampled(rows: torch.Tensor) -> torch.Tensor:
    """At most ``SAMPLES`` of the rows of all ranks: each sends its part of them only."""
    total = ranks() * len(rows)
    return gather_ranks(rows[:: -(-total // SAMPLES)])


def _deviation(rows: torch.Tensor) -> torch.Tensor:
    """Standard deviation [E] over the rows of all ranks, from each rank's mean and its squares about that."""
    if ranks() == 1:
        return rows.std(0)
    means = gather_ranks(rows.mean(0, keepdim=True))  # [ranks, E]
    within = gather_ranks((rows - rows.mean(0)).square().sum(0, keepdim=True)).sum(0)
    between = len(rows) * (means - means.mean(0)).square().sum(0)
    return ((within + between) / (ranks() * len(rows) - 1)).sqrt()

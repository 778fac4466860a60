"""Is a representation alive? How far it spreads over the samples, and in how many directions, for the metrics of a run."""

from __future__ import annotations

import torch

from .functional import centre
from .ranks import gather_ranks, ranks, sum_ranks

SAMPLES = 512  # rows that the rank is taken over: it costs their number squared
SENT = 64  # of them that ranks send each other


def effective_rank(rows: torch.Tensor) -> torch.Tensor:
    """In how many directions N samples [N, E] spread: (sum of variances)^2 / sum of squared variances along the axes.

    The participation ratio of the covariance's eigenvalues, without computing them: n equally strong directions give n,
    one direction 1, samples that are all the same 0.

    Args:
        rows: [N, E].

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
            rank, variance = _spread(rows)
            metrics[f"{name}_rank"], metrics[f"{name}_std"] = rank, variance.sqrt().mean()
    return metrics


def _spread(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the rows of all ranks: the effective rank of at most ``SAMPLES`` of them, and the variances [E].

    Rows of different ranks meet in inner products only. Those are estimated from the few rows that ranks send each other.
    """
    count = ranks() * len(rows)
    every = -(-count // SAMPLES)
    if ranks() == 1:
        return effective_rank(rows[::every]), rows.var(0)
    rows = centre(rows, count, total=sum_ranks)
    sample = rows[::every]
    sent = sample[:: -(-ranks() * len(sample) // SENT)]
    squares = lambda others: (sample @ others.T).square().sum()
    between = (squares(gather_ranks(sent)) - squares(sent)) * len(sample) / len(sent)
    traces = torch.stack([sample.square().sum(), squares(sample) + between])
    sums = sum_ranks(torch.cat([traces, rows.square().sum(0)]))
    return sums[0].square() / sums[1].clamp_min(1e-30), sums[2:] / (count - 1)

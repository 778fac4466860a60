"""The maths of the losses as pure functions, usable alone. Everything computes in float32, autocast or not."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .ranks import same


def centre(rows: torch.Tensor, count: torch.Tensor | int, keep: torch.Tensor | None = None, total=same) -> torch.Tensor:
    """Columns of [N, E] less their mean; a constant column becomes exactly 0.

    The mean has no gradient here. A loss of sums of products of centred columns needs none: its part adds up to 0.

    Args:
        rows: [N, E].
        count: how many rows count, of all ranks.
        keep: [N, 1], rows where it is 0 count for nothing and become 0.
        total: see :func:`barlow_twins_loss`.
    """
    masked = (lambda rows: rows) if keep is None else (lambda rows: rows * keep)
    rows = masked(rows)
    for _ in range(2):  # the first mean is rounded: a constant column would keep its error
        rows = masked(rows - total(rows.detach().sum(0)) / count)
    return rows


def barlow_twins_loss(
    projected: torch.Tensor,
    target: torch.Tensor,
    redundancy_weight: float = 5e-4,
    keep: torch.Tensor | None = None,
    total: Callable[[torch.Tensor], torch.Tensor] = same,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Barlow Twins between two views of the same N samples.

    C = k'e / (N std(k) std(e)) over centred columns; invariance sum_i (C_ii - 1)^2, redundancy sum_{i != j} C_ij^2.
    A constant column correlates with nothing.

    Args:
        projected: [N, E], k, the view that learns.
        target: [N, E], e; detach it outside if it must not learn.
        redundancy_weight: factor on the second term.
        keep: [N, 1], 1 for samples that count, 0 for others; by default all count. From less than two nothing is learned.
        total: makes sums over the rows sums over those of all ranks; :func:`r2dreamer.losses.ranks.pool` chooses it.

    Returns:
        The pair (invariance, redundancy_weight * redundancy), whose sum is the loss.

    Example:
        >>> view = torch.tensor([[1.0, -1.0], [0.0, 2.0], [-1.0, -1.0]])
        >>> invariance, redundancy = barlow_twins_loss(view, view, redundancy_weight=1.0)
        >>> round(invariance.item(), 4), round(redundancy.item(), 4)  # C = (N - 1)/N on the diagonal, 0 beside it
        (0.2222, 0.0)
    """
    samples = projected.shape[0]
    if samples < 2:
        raise ValueError(f"Barlow Twins correlates over samples and needs at least 2, got {samples}.")
    with torch.autocast(projected.device.type, enabled=False):
        count = total((torch.ones_like(projected[:, 0]) if keep is None else keep).float().sum()).clamp_min(1)
        k, e = (centre(view.float(), count, keep, total) for view in (projected, target))
        # No row may be divided by the deviation: it is of all ranks, and so is its gradient.
        variances = total(torch.cat([k.square().sum(0), e.square().sum(0)])) / (count - 1).clamp_min(1)
        std_k, std_e = variances.clamp_min(1e-16).sqrt().chunk(2)  # the root of 0 has an infinite gradient
        correlation = total(k.T @ e) / (count * std_k.unsqueeze(1) * std_e)  # [E, E]
    diagonal = correlation.diagonal()
    invariance = (diagonal - 1).square().sum()
    redundancy = correlation.square().sum() - diagonal.square().sum()
    return invariance, redundancy_weight * redundancy


def info_nce_loss(
    projected: torch.Tensor,
    target: torch.Tensor,
    *,
    cosine: bool = False,
    temperature: float = 1.0,
    own: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE: each of N samples must find its own target among M.

    Logits k e' / temperature; cross-entropy with each sample's own, mean over rows.

    Args:
        projected: [N, E].
        target: [M, E]; detach it outside if it must not learn.
        cosine: takes unit vectors.
        temperature: divides the logits.
        own: [N], which target is a sample's own; by default the one at its place.

    Returns:
        The loss and the detached share of samples whose own target scores highest.

    Example:
        >>> loss, accuracy = info_nce_loss(9 * torch.eye(3), torch.eye(3))
        >>> accuracy.item()
        1.0
    """
    with torch.autocast(projected.device.type, enabled=False):
        projected, target = projected.float(), target.float()
        if cosine:
            projected, target = (torch.nn.functional.normalize(view, dim=-1) for view in (projected, target))
        logits = projected @ target.T / temperature  # [N, M]
    labels = torch.arange(len(logits), device=logits.device) if own is None else own
    accuracy = (logits.detach().argmax(-1) == labels).float().mean()
    return torch.nn.functional.cross_entropy(logits, labels), accuracy


@torch.no_grad()
def sinkhorn(scores: torch.Tensor, *, eps: float = 0.05, iterations: int = 3) -> torch.Tensor:
    """Scores [K, ...] of samples on K prototypes to assignments [K, ...]: each sample's sum to 1, prototypes are used equally.

    Sinkhorn-Knopp in log space: of exp(scores / eps), rows are scaled to 1/K and columns to 1/N in turn. No gradient.

    Args:
        scores: [K, ...].
        eps: how soft assignments are; the smaller, the harder.
        iterations: number of rounds.

    Example:
        >>> sinkhorn(torch.tensor([[9.0, 9.0], [9.0, 9.0]]))  # both samples like both prototypes equally
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    rows = scores.float().flatten(1) / eps  # [K, N]
    log_plan = rows - rows.logsumexp((0, 1), keepdim=True)
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True) - math.log(log_plan.shape[0])
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) - math.log(log_plan.shape[1])
    return (log_plan.exp() * log_plan.shape[1]).view(scores.shape)


def lambda_return(
    reward: torch.Tensor,
    bootstrap: torch.Tensor,
    last: torch.Tensor | None = None,
    terminal: torch.Tensor | None = None,
    *,
    discount: float = 1 - 1 / 333,
    lmbda: float = 0.95,
) -> torch.Tensor:
    """Lambda-returns R_t = r_{t+1} + g_{t+1} ((1 - c_{t+1}) b_{t+1} + c_{t+1} R_{t+1}), R_{T-1} = b_{T-1}.

    g = discount * (1 - terminal), c = lmbda * (1 - last): a terminal step stops value, the last step of an episode
    (terminal or truncated) stops the mixing. In imagination ``terminal`` is 1 - continue probability and nothing is last.

    Args:
        reward: [B, T, 1]. As all that follow, it belongs to the state at index t.
        bootstrap: [B, T, 1], the value b.
        last: [B, T, 1], bool or float. Default: no step is.
        terminal: [B, T, 1], bool or float. Default: no step is.
        discount: of a step.
        lmbda: of the mixing.

    Returns:
        [B, T-1, 1]; element t looks at reward, flags and bootstrap of t+1.
    """
    reward, bootstrap = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (reward, bootstrap))
    zeros = torch.zeros_like(reward)
    live = discount * (1 - (zeros if terminal is None else terminal.to(reward.dtype)))[:, 1:]
    mix = lmbda * (1 - (zeros if last is None else last.to(reward.dtype)))[:, 1:]
    interim = reward[:, 1:] + live * (1 - mix) * bootstrap[:, 1:]
    decay = live * mix
    if not interim.shape[1]:
        return interim  # a single state has nothing after it
    accumulate = accumulate_steps if reward.device.type == "cpu" else accumulate_spans
    return accumulate(interim, decay, bootstrap[:, -1:])


def accumulate_steps(interim: torch.Tensor, decay: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """R_t = interim_t + decay_t R_{t+1} for interim, decay [B, T-1, 1], whose R_{T-1} is ``last`` [B, 1, 1]."""
    returns = [last[:, 0]]
    for t in reversed(range(interim.shape[1])):
        returns.append(interim[:, t] + decay[:, t] * returns[-1])
    return torch.stack(returns[:0:-1], 1)  # [B, T-1, 1]


def accumulate_spans(interim: torch.Tensor, decay: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The same in log2(T) rounds, for devices where each operation is a launch: sums over 1, 2, 4 ... steps."""
    returns, span = torch.cat([interim, last], 1), 1  # [B, T, 1]
    while span < returns.shape[1]:
        returns = torch.cat([returns[:, :-span] + decay * returns[:, span:], returns[:, -span:]], 1)
        decay = decay[:, :-span] * decay[:, span:]
        span *= 2
    return returns[:, :-1]


def two_hot_nll(logits: torch.Tensor, targets: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [..., n] of logits against the two-hot codes of n targets each, interpolated in raw space, saturating.

    Only two log-probabilities per target are read, so no code of the support's width is ever built, and all targets share
    one logsumexp: several times less memory traffic than TorchRL's ``two_hot_cross_entropy``, which it equals.

    Args:
        logits: [..., bins].
        targets: [..., n].
        support: [bins], ascending values.

    Example:
        >>> two_hot_nll(torch.zeros(1, 3), torch.tensor([[0.25]]), torch.tensor([-1.0, 0.0, 1.0]))  # ln 3
        tensor([[1.0986]])
    """
    if logits.shape[-1] != len(support):
        raise ValueError(
            f"The head writes {logits.shape[-1]} logits and the loss reads them as {len(support)} bins; build both with "
            "the same number (num_reward_bins, num_value_bins)."
        )
    targets = targets.clamp(support[0], support[-1])
    upper = torch.bucketize(targets, support).clamp(1, len(support) - 1)  # [..., n]; NaN goes beyond the last one
    low, high = support[upper - 1], support[upper]
    weight = (targets - low) / (high - low)
    mean_logit = (1 - weight) * logits.gather(-1, upper - 1) + weight * logits.gather(-1, upper)
    return torch.logsumexp(logits, -1, keepdim=True) - mean_logit


def imagination_weight(continuation: torch.Tensor, discount: float = 1 - 1 / 333) -> torch.Tensor:
    """Discounted probability [N, H, 1] that an imagined step happens at all: cumulative product of continue * discount.

    Args:
        continuation: probabilities [N, H, 1] that an episode goes on.
        discount: of a step.
    """
    return (discount * continuation.to(torch.promote_types(continuation.dtype, torch.float32))).cumprod(1)


def categorical_kl(logits: torch.Tensor, other: torch.Tensor, unimix: float = 0.0) -> torch.Tensor:
    """KL [...] in nats of S independent categoricals from others, mixed with ``unimix`` of the uniform, summed over S.

    Args:
        logits: [..., S, K].
        other: [..., S, K].
        unimix: share of the uniform distribution in both.
    """
    return divergence(*(log_mixed(each, unimix) for each in (logits, other)))


def divergence(log_probs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL [...] of log-probabilities [..., S, K] from others, summed over S."""
    return (log_probs.exp() * (log_probs - other)).sum((-1, -2))


def log_mixed(logits: torch.Tensor, unimix: float) -> torch.Tensor:
    """Log-probabilities of logits, mixed with ``unimix`` of the uniform."""
    log_probs = torch.log_softmax(logits.float(), -1)
    return ((1 - unimix) * log_probs.exp() + unimix / logits.shape[-1]).log() if unimix else log_probs


def categorical_entropy(logits: torch.Tensor, unimix: float = 0.0) -> torch.Tensor:
    """Entropy [...] in nats of S independent categoricals, summed over S.

    Args:
        logits: [..., S, K].
        unimix: share of the uniform distribution.
    """
    probs = torch.softmax(logits.float(), -1)
    probs = (1 - unimix) * probs + unimix / logits.shape[-1]
    return -torch.xlogy(probs, probs).sum((-1, -2))

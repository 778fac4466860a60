"""Samples and sums of all ranks, for losses that are statistics of the batch: their gradient goes back to every rank.

Every rank must compute the same from them. Then each knows the gradient of its own part: nothing is sent a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def gather_ranks(rows: torch.Tensor) -> torch.Tensor:
    """Rows [N, E] of this rank to those of all, [ranks * N, E]; unchanged in a single process.

    Every rank must bring equally many rows and compute the same loss of the joined ones. The gradient of this rank's rows
    is then that of the joined batch times the number of ranks: averaged over ranks, as data-parallel training does,
    parameters get the gradient that one process gets from the joined batch.

    Args:
        rows: [N, E], as many on every rank.
    """
    return _Gather.apply(rows) if ranks() > 1 else rows


def sum_ranks(sums: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of what each has summed over its rows; unchanged in a single process.

    Every rank must compute the same loss of it, as with :func:`gather_ranks`.

    Args:
        sums: of this rank's rows, any shape.
    """
    return _Sum.apply(sums) if ranks() > 1 else sums


def same(sums: torch.Tensor) -> torch.Tensor:
    """In the place of :func:`sum_ranks` where the rows of all ranks are at hand."""
    return sums


def pool(*views: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Views [N, E] for a loss of an E x E matrix that is summed over the rows of all ranks, in the fewest bytes.

    Returns rows and the function that makes sums over them those over all ranks: the rows of all, of which sums are
    whole, or this rank's and :func:`sum_ranks`. Two views of ranks * N rows are as large as the sums of float32 over the
    rows where ranks * N * element_size = 4 E. Sums do not grow with the number of ranks.
    """
    rows, features = views[0].shape
    if ranks() * rows * views[0].element_size() < 4 * features:
        return [gather_ranks(view) for view in views], same
    return list(views), sum_ranks


def own_rows(joined: torch.Tensor) -> torch.Tensor:
    """This rank's rows among those that :func:`gather_ranks` joined."""
    return joined.chunk(ranks())[dist.get_rank()] if ranks() > 1 else joined


@torch.no_grad()
def from_first_rank(value: torch.Tensor) -> torch.Tensor:
    """The first rank's value, in place: what was drawn at random becomes the same on every rank."""
    if ranks() > 1:
        dist.broadcast(value, 0)
    return value


def ranks() -> int:
    """How many processes compute the loss together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        joined = rows.new_empty(ranks() * rows.shape[0], *rows.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(joined, rows.contiguous())
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return ranks() * own_rows(gradients[0])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor) -> torch.Tensor:
        joined = sums.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(joined)
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return ranks() * gradients[0]

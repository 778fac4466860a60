"""Samples of all ranks, for losses that are statistics of the batch: their gradient goes back to every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather_ranks(rows: torch.Tensor) -> torch.Tensor:
    """Rows [N, E] of this rank to those of all, [ranks * N, E]; unchanged in a single process.

    Every rank must bring equally many rows. Each then computes the same loss of the joined batch, and the gradient of
    its rows is the sum over what all ranks do with them: averaged over ranks, as data-parallel training does, parameters
    get the gradient that one process gets from the joined batch.
    """
    return _Gather.apply(rows) if ranks() > 1 else rows


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


def _collective(name: str, older: str) -> Any:
    """The function of torch.distributed under its name since torch 2.13 or under its older one."""
    return getattr(dist, name, None) or getattr(dist, older)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        joined = rows.new_empty(ranks() * rows.shape[0], *rows.shape[1:])
        _collective("all_gather_single", "all_gather_into_tensor")(joined, rows.contiguous())
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient,) = gradients
        mine = gradient.new_empty(gradient.shape[0] // ranks(), *gradient.shape[1:])
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(mine, gradient.contiguous())
        return mine

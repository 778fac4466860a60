"""Samples of all ranks, for losses that are statistics of the batch: their gradient goes back to every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_ranks(rows: torch.Tensor) -> torch.Tensor:
    """Rows [N, E] of this rank to those of all, [ranks * N, E]; unchanged in a single process.

    Every rank must bring equally many rows. Each then computes the same loss of the joined batch, and the gradient of
    its rows is the sum over what all ranks do with them: averaged over ranks, as data-parallel training does, parameters
    get the gradient that one process gets from the joined batch.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        ctx.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()  # reduced in place, and another reader may hold it
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]

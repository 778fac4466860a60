"""The optimiser of Dreamer V1 and V2: a learning rate and a gradient norm for each of model, actor and value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class GroupedAdam(torch.optim.Adam):
    """Adam over named groups, each with a learning rate of its own and clipped by the norm of all its gradients.

    Args:
        groups: dicts with ``name`` and ``params``, as the example trainer's ``Learner`` gives them.
        lr: of every group that ``actor_lr`` and ``value_lr`` do not name.
        max_norm: the gradient norm that no group's exceeds.
        warmup_steps: over which the learning rates rise from near 0.

    Example:
        >>> weights = {name: torch.nn.Parameter(torch.ones(2)) for name in ("model", "actor", "value")}
        >>> groups = [{"name": name, "params": [weight]} for name, weight in weights.items()]
        >>> optimizer = GroupedAdam(groups, lr=6e-4, actor_lr=8e-5, value_lr=8e-5)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.0006, 8e-05, 8e-05]
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        actor_lr: float,
        value_lr: float,
        max_norm: float = 100.0,
        eps: float = 1e-5,
        warmup_steps: int = 0,
    ):
        if max_norm <= 0 or warmup_steps < 0:
            raise ValueError(f"max_norm={max_norm} must be positive, and warmup_steps={warmup_steps} not negative.")
        rates = {"actor": actor_lr, "value": value_lr}
        groups = [{**group, "lr": rates.get(group["name"], lr), "updates": 0} for group in groups]
        super().__init__(groups, lr=lr, eps=eps)
        self.max_norm, self.warmup_steps = max_norm, warmup_steps

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self.max_norm)
            group["updates"] += 1
            group["lr"] *= min(1.0, group["updates"] / max(1, self.warmup_steps))
        loss = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss

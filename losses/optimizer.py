"""The optimisers: TorchRL's of Dreamer V3 that knows which tensors are one, and that of Dreamer V1 and V2."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torchrl.trainers.algorithms import DreamerV3Optimizer


class DreamerOptimizer(DreamerV3Optimizer):
    """TorchRL's ``DreamerV3Optimizer``, which can clip several tensors by their joint norm.

    A network may hold one weight matrix in pieces, as the block GRU and the posterior do. Adaptive gradient clipping
    compares the gradient's norm with the weight's, so the pieces must be clipped as the one matrix that they are.

    Args:
        parameters: as in the parent. A group may say ``joint``: tuples of positions in its ``params``, the pieces of one
            tensor each; ``r2dreamer.dreamer.joint_positions`` finds those of an agent.
        lr: the learning rate.
        lr_factors: the learning rate of a group with this ``name`` is ``lr`` times this number.
        options: the parent's.

    Clips gradients in place. ``joint`` describes the model: loading a state keeps what was given here.

    Example:
        >>> left, right = (torch.nn.Parameter(torch.ones(size)) for size in (3, 1))
        >>> group = {"params": [left, right], "joint": [(0, 1)]}
        >>> optimizer = DreamerOptimizer([group], agc=0.5, warmup_steps=0)
        >>> left.grad, right.grad = torch.zeros(3), 10 * torch.ones(1)
        >>> optimizer.step()
        >>> round(right.grad.item(), 3)  # half of the norm of all four ones, which is 2
        1.0
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float = 4e-5,
        lr_factors: Mapping[str, float] | None = None,
        **options: Any,
    ):
        factors = lr_factors or {}
        parameters = list(parameters)
        names = [group.get("name") for group in parameters if isinstance(group, dict)]
        if unknown := [name for name in factors if name not in names]:
            raise ValueError(f"lr_factors names {unknown[0]!r}, but the parameter groups are called {names}.")
        named = lambda group: isinstance(group, dict) and group.get("name") in factors
        parameters = [{**each, "lr": lr * factors[each["name"]]} if named(each) else each for each in parameters]
        super().__init__(parameters, lr=lr, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["joint"] = [list(pieces) for pieces in group.get("joint", ())]
        positions = [position for pieces in group["joint"] for position in pieces]
        if len(set(positions)) < len(positions) or not set(positions) <= set(range(len(group["params"]))):
            raise ValueError(
                f"joint={group['joint']} must be positions in the group's {len(group['params'])} params, each in one "
                "tuple at most; r2dreamer.dreamer.joint_positions finds them."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = evaluated(closure)
        limits = [group["agc"] for group in self.param_groups]
        for group in self.param_groups:
            clip_jointly(group)
            group["agc"] = 0.0  # or the parent would clip each piece again, by its own norm
        try:
            super().step()
        finally:
            for group, limit in zip(self.param_groups, limits, strict=True):
                group["agc"] = limit
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        joint = [group["joint"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, pieces in zip(self.param_groups, joint, strict=True):
            group["joint"] = pieces


def evaluated(closure: Callable[[], torch.Tensor] | None) -> torch.Tensor | None:
    """The loss of a closure; its gradients must be there before they are clipped."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def clip_jointly(group: dict[str, Any]) -> None:
    """Adaptive gradient clipping of a parameter group, in place: g *= min(1, agc * max(|w|, minimum) / |g|)."""
    positions = [position for position, parameter in enumerate(group["params"]) if parameter.grad is not None]
    if not group["agc"] or not positions:
        return
    gradients = [group["params"][position].grad for position in positions]
    parameters = [parameter.detach() for parameter in group["params"]]
    gradient_norms = dict(zip(positions, torch._foreach_norm(gradients, dtype=torch.float32), strict=True))
    parameter_norms = dict(enumerate(torch._foreach_norm(parameters, dtype=torch.float32)))
    for norms in (gradient_norms, parameter_norms):
        for pieces in group["joint"]:
            present = [position for position in pieces if position in norms]
            if present:
                whole = torch.linalg.vector_norm(torch.stack([norms[position] for position in present]))
                norms.update(dict.fromkeys(present, whole))
    limits = [parameter_norms[position] for position in positions]
    limits = torch._foreach_mul(torch._foreach_clamp_min(limits, group["parameter_norm_min"]), group["agc"])
    norms = [gradient_norms[position] for position in positions]
    torch._foreach_mul_(gradients, torch._foreach_div(limits, torch._foreach_maximum(norms, limits)))


class GroupedAdam(torch.optim.Adam):
    """Adam over named groups, each with a learning rate of its own and clipped by the norm of all its gradients.

    Args:
        groups: dicts with ``name`` and ``params``, as the example trainer's ``Learner`` gives them.
        lr: of every group that ``actor_lr`` and ``value_lr`` do not name and that has no ``lr`` of its own.
        actor_lr: of the group ``actor``.
        value_lr: of the group ``value``.
        max_norm: the gradient norm that no group's exceeds.
        eps: Adam's.
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
        groups = [*groups]
        if not all(isinstance(group, dict) and {"name", "params"} <= group.keys() for group in groups):
            raise ValueError('groups must be dicts, {"name": ..., "params": [...]}: each group is clipped by itself.')
        rates = {"actor": actor_lr, "value": value_lr}
        groups = [{"lr": rates.get(group["name"], lr), **group, "updates": 0} for group in groups]
        super().__init__(groups, lr=lr, eps=eps)
        self.max_norm, self.warmup_steps = max_norm, warmup_steps

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = evaluated(closure)
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self.max_norm)
            group["updates"] += 1
            group["lr"] *= min(1.0, group["updates"] / max(1, self.warmup_steps))
        super().step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss

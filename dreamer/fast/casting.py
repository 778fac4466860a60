"""Weights cast once for a whole imagination, in which autocast would cast views of them at every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..networks.layers import BlockLinear, Linear
from ..rssm.imagination import Imagination
from .mixing import Fast, mix_in


class CastOnce(Fast):
    """A layer whose parameters :func:`cast_once` may replace for a while."""


class CastingImagination(Fast):
    def _rollout(self, max_steps, policy, tensordict):
        with cast_once(self.prior, policy):
            return super()._rollout(max_steps, policy, tensordict)


@contextmanager
def cast_once(*modules: nn.Module) -> Iterator[None]:
    """Under autocast and without gradients, layers below ``modules`` hold casts of their float32 parameters."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    modules = [module for module in modules if isinstance(module, nn.Module)]
    layers = dict.fromkeys(layer for module in modules for layer in module.modules() if isinstance(layer, CastOnce))
    kept = {layer: layer.__dict__["_parameters"] for layer in layers}
    try:
        for layer, parameters in kept.items():
            layer.__dict__["_parameters"] = {name: _cast(value) for name, value in parameters.items()}
        yield
    finally:
        for layer, parameters in kept.items():
            layer.__dict__["_parameters"] = parameters


def _cast(value: torch.Tensor | None) -> torch.Tensor | None:
    if value is None or value.dtype != torch.float32 or not torch.is_autocast_enabled(value.device.type):
        return value
    return value.to(torch.get_autocast_dtype(value.device.type))


def cast_weights_once(modules: list[nn.Module]) -> None:
    """Puts the trick onto the layers and the imagination among ``modules``."""
    mix_in(modules, {Linear: CastOnce, BlockLinear: CastOnce, Imagination: CastingImagination})

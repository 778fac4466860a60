"""Weights cast once for a whole loop, in which autocast would cast them at every step.

Uncompiled, autocast remembers its casts of parameters, if not of their views; compiled code casts whenever it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class CastOnce:
    """A layer that reads its parameters through :meth:`read`, for :func:`cast_once`."""

    cast: dict[str, torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor | None:
        """The parameter, in autocast's dtype if it has been cast; itself where gradients or autocast are switched again."""
        value = getattr(self, name)
        if not self.cast or value is None or torch.is_grad_enabled():
            return value
        return self.cast.get(name, value) if torch.is_autocast_enabled(value.device.type) else value


@contextmanager
def cast_once(*modules: nn.Module) -> Iterator[None]:
    """Under autocast and without gradients, the layers below ``modules`` read parameters as they are now, cast here.

    Example:
        >>> from r2dreamer.dreamer.fast.casting import cast_once
        >>> from r2dreamer.dreamer.networks.layers import Linear
        >>> layer = Linear(2, 3)
        >>> with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), cast_once(layer):
        ...     layer.read("weight").dtype, layer(torch.ones(2)).dtype
        (torch.bfloat16, torch.bfloat16)
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    modules = [module for module in modules if isinstance(module, nn.Module)]
    layers = {layer: layer.cast for module in modules for layer in module.modules() if isinstance(layer, CastOnce)}
    try:
        for layer in layers:
            layer.cast = {
                name: value.to(torch.get_autocast_dtype(value.device.type))
                for name, value in layer.named_parameters(recurse=False)
                if value.dtype == torch.float32 and torch.is_autocast_enabled(value.device.type)
            }
        yield
    finally:
        for layer, before in layers.items():
            layer.cast = before

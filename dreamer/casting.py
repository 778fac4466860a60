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
        """The parameter, in autocast's dtype if it has been cast."""
        value = getattr(self, name)
        if self.cast is None or value is None or not torch.is_autocast_enabled(value.device.type):
            return value
        return self.cast[name]


@contextmanager
def cast_once(*modules: nn.Module) -> Iterator[None]:
    """Under autocast and without gradients, the layers below ``modules`` read parameters as they are now, cast here.

    Example:
        >>> from r2dreamer.dreamer.casting import cast_once
        >>> from r2dreamer.dreamer.layers import Linear
        >>> layer = Linear(2, 3)
        >>> with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), cast_once(layer):
        ...     layer.read("weight").dtype, layer(torch.ones(2)).dtype
        (torch.bfloat16, torch.bfloat16)
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, CastOnce)]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        layers = []
    try:
        for layer in layers:
            parameters = dict(layer.named_parameters(recurse=False))
            device = next(iter(parameters.values())).device.type
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                layer.cast = {name: value.to(dtype) for name, value in parameters.items()}
        yield
    finally:
        for layer in layers:
            layer.cast = None

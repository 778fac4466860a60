"""Weight gradients of a recurrence, one product per weight for the whole sequence instead of one per step.

In a loop over T steps autograd multiplies T small matrices into T gradients as large as the weight and adds them up.
Here every step only remembers its input and its output's gradient; the first step, which the backward pass reaches last,
stacks them and multiplies once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Tape:
    """One weight [..., in, out] over one sequence, cast once to the dtype that autocast asks for."""

    def __init__(self, weight: torch.Tensor):
        self.weight, self.steps = weight, 0
        self.inputs: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []

    def matmul(self, value: torch.Tensor) -> torch.Tensor:
        """value [..., in] for a weight of two dimensions, [G, N, in] for a weight [G, in, out]."""
        device = value.device.type
        if self.steps == 0 and torch.is_autocast_enabled(device):
            self.weight = self.weight.to(torch.get_autocast_dtype(device))
        rows = value.to(self.weight.dtype)
        rows = rows.flatten(0, -2) if self.weight.ndim == 2 else rows
        out = _Step.apply(rows, self.weight, self, self.steps)
        self.steps += 1
        return out.unflatten(0, value.shape[:-1]) if self.weight.ndim == 2 else out

    def weight_gradient(self) -> torch.Tensor:
        inputs, gradients = torch.cat(self.inputs, -2), torch.cat(self.gradients, -2)  # [..., T*N, in], [..., T*N, out]
        self.inputs, self.gradients = [], []
        return inputs.mT @ gradients


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: torch.Tensor, weight: torch.Tensor, tape: Tape, step: int) -> torch.Tensor:
        ctx.save_for_backward(value, weight)
        ctx.tape, ctx.step = tape, step
        return value @ weight

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        value, weight = ctx.saved_tensors
        value_gradient = gradient @ weight.mT if ctx.needs_input_grad[0] else None
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            ctx.tape.inputs.append(value)
            ctx.tape.gradients.append(gradient)
            if ctx.step == 0:  # every later step has run: each depends on this one
                weight_gradient = ctx.tape.weight_gradient()
        return value_gradient, weight_gradient, None, None


@contextmanager
def deferred_weight_gradients(*modules: nn.Module) -> Iterator[None]:
    """Inside, every layer below ``modules`` that offers ``taped_weights()`` defers its weight gradients.

    Each step's calls must depend on the step before through the layer's own output, as in a recurrence.
    """
    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "taped_weights")]
    active = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    try:
        for layer in layers if active else ():
            layer.tapes = {name: Tape(weight) for name, weight in layer.taped_weights().items()}
        yield
    finally:
        for layer in layers:
            layer.tapes = {}

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

_recording = 0  # sequences whose weight gradients are being recorded now


def recording() -> bool:
    return _recording > 0


def defers(bias: torch.Tensor) -> bool:
    """On a GPU, where a step costs what it launches; on a CPU it costs its arithmetic, and a bias has hardly any."""
    return bias.device.type != "cpu"


class Tape:
    """One weight [..., in, out] and bias [..., out] over one sequence, cast once to the dtype that autocast asks for.

    The gradient of the bias is deferred where :func:`defers` says so.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self.weight, self.bias, self.steps = weight, bias, 0
        self.defers_bias = bias is not None and defers(bias)
        self.inputs: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []

    def affine(self, value: torch.Tensor) -> torch.Tensor:
        """value [..., in] for a weight of two dimensions, [G, N, in] for a weight [G, in, out] and a bias [G, 1, out]."""
        device = value.device.type
        if self.steps == 0 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            self.weight = self.weight.to(dtype)
            self.bias = self.bias.to(dtype) if self.defers_bias else self.bias
        rows = value.to(self.weight.dtype)
        rows = rows.flatten(0, -2) if self.weight.ndim == 2 else rows
        out = _Step.apply(rows, self.weight, self.bias if self.defers_bias else None, self, self.steps)
        self.steps += 1
        out = out.unflatten(0, value.shape[:-1]) if self.weight.ndim == 2 else out
        return out if self.bias is None or self.defers_bias else out + self.bias.to(out.dtype)

    def weight_gradients(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs, gradients = torch.cat(self.inputs, -2), torch.cat(self.gradients, -2)  # [..., T*N, in], [..., T*N, out]
        self.inputs, self.gradients = [], []
        bias = gradients.sum(-2).view(self.bias.shape) if self.defers_bias else None
        return inputs.mT @ gradients, bias


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tape: Tape, step: int
    ) -> torch.Tensor:
        ctx.save_for_backward(value, weight)
        ctx.tape, ctx.step = tape, step
        if bias is None:
            return value @ weight
        return (torch.addmm if weight.ndim == 2 else torch.baddbmm)(bias, value, weight)

    @staticmethod
    def backward(
        ctx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        value, weight = ctx.saved_tensors
        value_gradient = gradient @ weight.mT if ctx.needs_input_grad[0] else None
        weight_gradient = bias_gradient = None
        if any(ctx.needs_input_grad[1:3]):
            ctx.tape.inputs.append(value)
            ctx.tape.gradients.append(gradient)
            if ctx.step == 0:  # every later step has run: each depends on this one
                weight_gradient, bias_gradient = ctx.tape.weight_gradients()
        return value_gradient, weight_gradient, bias_gradient, None, None


@contextmanager
def deferred_weight_gradients(*modules: nn.Module) -> Iterator[None]:
    """Inside, every layer below ``modules`` that offers ``taped_weights()`` defers its weight gradients.

    Each step's calls must depend on the step before through the layer's own output, as in a recurrence.
    """
    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "taped_weights")]
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    global _recording
    try:
        _recording += 1
        for layer in layers:
            layer.tapes = {name: Tape(*weights) for name, weights in layer.taped_weights().items()}
        yield
    finally:
        _recording -= 1
        for layer in layers:
            layer.tapes = {}

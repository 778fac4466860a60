"""Weight gradients of a recurrence, one product per weight for the whole sequence instead of one per step.

In a loop over T steps autograd multiplies T small matrices into T gradients as large as the weight and adds them up.
Here every step only remembers its input and its output's gradient; the first step, which the backward pass reaches last,
stacks them and multiplies once.

A step may be compiled as one whole: each of its products adds a *sink*, a zero of the output's shape that occupies no
memory, and the sink's gradient is the output's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def defers(bias: torch.Tensor) -> bool:
    """On a GPU, where a step costs what it launches; on a CPU it costs its arithmetic, and a bias has hardly any."""
    return bias.device.type != "cpu"


class Tape:
    """What one sequence remembers of ``deferred``, parameters or what autocast makes of them.

    ``nothing``: what a step's sink is, without gradient. Subclasses say what becomes of the sinks' gradients.
    """

    def __init__(self, deferred: tuple[torch.Tensor, ...], nothing: torch.Tensor):
        self.deferred, self.nothing = deferred, nothing
        self.gradients: dict[int, torch.Tensor] = {}
        self.uses = 0  # steps that used it
        self.used = False  # in the step that is running
        self.sink: torch.Tensor | None = None  # of that step

    def takes(self, rows: int) -> bool:
        """Whether so many rows can use it now; if not, the layer computes as it does without a tape."""
        return not self.used and rows == self.nothing.shape[-2]

    def begin(self) -> None:
        self.used, self.sink = False, _Sink.apply(self, self.uses, *self.deferred)

    def end(self) -> None:
        self.uses += self.used
        self.sink = None  # it knows this tape: held here, only the garbage collector would free either

    def total(self) -> tuple[torch.Tensor, ...]:
        """The gradients of ``deferred``."""
        raise NotImplementedError  # each kind sums its own


class GainTape(Tape):
    """Of one factor [D] for each feature of ``rows`` rows."""

    def __init__(self, gain: torch.Tensor, rows: int):
        self.gain = gain.detach()
        super().__init__((gain,), gain.new_zeros(()).expand(rows, *gain.shape))

    def repeated(self) -> torch.Tensor:
        """The gain of every row, [rows, D]."""
        self.used = True
        return self.gain + self.sink

    def total(self) -> tuple[torch.Tensor]:
        gradients, self.gradients = torch.stack(list(self.gradients.values())), {}
        return (gradients.sum((0, 1)),)


class AffineTape(Tape):
    """Of one weight [..., in, out] and bias [..., out], cast once to the dtype that autocast asks for.

    ``rows``: of a step's input to the weight. The gradient of the bias is deferred where :func:`defers` says so.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int):
        self.defers_bias = bias is not None and defers(bias)
        device = weight.device.type
        self.autocast = torch.is_autocast_enabled(device)
        if self.autocast:
            dtype = torch.get_autocast_dtype(device)
            weight, bias = weight.to(dtype), bias.to(dtype) if self.defers_bias else bias
        self.weight, self.bias = weight.detach(), bias.detach() if self.defers_bias else bias
        self.inputs: dict[int, torch.Tensor] = {}
        self.input: torch.Tensor | None = None
        nothing = self.weight.new_zeros(()).expand(*weight.shape[:-2], rows, weight.shape[-1])
        super().__init__((weight, bias) if self.defers_bias else (weight,), nothing)

    def takes(self, rows: int) -> bool:
        return super().takes(rows) and torch.is_autocast_enabled(self.weight.device.type) == self.autocast

    def affine(self, value: torch.Tensor) -> torch.Tensor:
        """value [..., in] for a weight of two dimensions, [G, N, in] for a weight [G, in, out] and a bias [G, 1, out]."""
        rows = value.to(self.weight.dtype)
        rows = rows.flatten(0, -2) if self.weight.ndim == 2 else rows
        self.input, self.used = rows.detach(), True
        bias = self.bias if self.defers_bias else None
        if torch.compiler.is_compiling():
            out = affine(rows, self.weight, bias) + self.sink
        else:
            out = _Affine.apply(rows, self.weight, bias, self.sink)
        out = out.unflatten(0, value.shape[:-1]) if self.weight.ndim == 2 else out
        return out if self.bias is None or self.defers_bias else out + self.bias.to(out.dtype)

    def end(self) -> None:
        if self.used:
            self.inputs[self.uses], self.input = self.input, None
        super().end()

    def total(self) -> tuple[torch.Tensor, ...]:
        steps = list(self.gradients)  # those that the loss depends on, the last first
        inputs = _joined([self.inputs[step] for step in steps])  # [..., T*N, in]
        gradients = _joined([self.gradients.pop(step) for step in steps])  # [..., T*N, out]
        weight = inputs.mT @ gradients
        return (weight, gradients.sum(-2).view(self.deferred[1].shape)) if self.defers_bias else (weight,)


def _joined(steps: list[torch.Tensor]) -> torch.Tensor:
    """[..., N, D] of each step to [..., T*N, D]. Blocks [G, N, D] are slices of rows [N, G*D], and are joined as those."""
    return torch.cat([step.movedim(-2, 0) for step in steps]).movedim(0, -2)


def affine(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None:
        return rows @ weight
    if weight.ndim == 2:
        return torch.addmm(bias, rows, weight)
    # Compiled, what comes after adds the bias; baddbmm first fills its output with it.
    return rows @ weight + bias if torch.compiler.is_compiling() else torch.baddbmm(bias, rows, weight)


class _Affine(torch.autograd.Function):
    """The product, and all of its weight's gradient that it computes: its own, for the sink."""

    @staticmethod
    def forward(
        ctx, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sink: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return affine(rows, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.mT if ctx.needs_input_grad[0] else None, None, None, gradient


class _Sink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tape: Tape, step: int, *deferred: torch.Tensor) -> torch.Tensor:
        ctx.tape, ctx.step = tape, step
        return tape.nothing.view_as(tape.nothing)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.tape.gradients[ctx.step] = gradient
        if ctx.step:
            return None, None, *(None for _ in ctx.tape.deferred)
        # Every later step has run: each depends on this one, and of what is ready autograd runs the latest made first.
        return None, None, *ctx.tape.total()


@contextmanager
def deferred_weight_gradients(step: Callable, rows: int, *modules: nn.Module) -> Iterator[Callable]:
    """``step``, to be called once for each step of a sequence, in which the layers below ``modules`` that offer
    ``make_tapes(rows)`` defer their weights' gradients wherever they compute ``rows`` rows, for the first time in that step
    and under autocast as it is now.

    Each call must depend on the one before through the layer's own output, as in a recurrence. Gradients are of first order
    only: none passes through them to the weights again.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield step
        return
    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "make_tapes")]
    for layer in layers:
        layer.tapes = layer.make_tapes(rows)
    tapes = [tape for layer in dict.fromkeys(layers) for tape in layer.tapes.values()]

    def recorded(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for tape in tapes:
            tape.begin()
        results = step(*args)
        for tape in tapes:
            tape.end()
        return results

    try:
        yield recorded
    finally:
        for layer in layers:
            layer.tapes = {}

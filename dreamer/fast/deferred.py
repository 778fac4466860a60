"""Weight gradients of a recurrence: one product per weight for the whole sequence instead of one per step.

In a loop over T steps, autograd multiplies T small matrices into T gradients as large as the weight and adds them up.
Here each step only remembers its input and the gradient of its output. The first step, which the backward pass reaches
last, stacks them and multiplies once. On a GPU this saves kernel launches; on a CPU it gains nothing and is left out.

A step may be compiled as one whole. Each product adds a perturbation: a zero of the output's shape that occupies no
memory. The gradient of the perturbation is the gradient of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..networks.layers import BlockLinear, Linear, NormSiLU
from ..rssm.rollout import RSSMRollout
from .mixing import Fast


def on_gpu(tensor: torch.Tensor) -> bool:
    """Where a step costs its kernel launches. On a CPU the bookkeeping costs more than it saves."""
    return tensor.device.type != "cpu"


class Tape:
    """Records what one sequence needs for the gradients of ``deferred``: parameters, or autocast's casts of them.

    zero: the value of each step's perturbation, without gradient.
    """

    def __init__(self, deferred: tuple[torch.Tensor, ...], zero: torch.Tensor):
        self.deferred, self.zero = deferred, zero
        self.gradients: dict[int, torch.Tensor] = {}  # of the perturbations, by step
        self.step = 0  # counts the steps that used the tape
        self.used = False  # in the current step
        self.perturbation: torch.Tensor | None = None  # of the current step

    def takes(self, rows: int) -> bool:
        """Whether the current step can use it for so many rows; if not, the layer computes its plain forward."""
        return not self.used and rows == self.zero.shape[-2]

    def begin(self) -> None:
        self.used, self.perturbation = False, _Perturbation.apply(self, self.step, *self.deferred)

    def end(self) -> None:
        if self.used:
            self.step += 1
        self.perturbation = None  # refers to this tape: kept, it would make a reference cycle

    def total(self) -> tuple[torch.Tensor, ...]:
        """The gradients of ``deferred``."""
        raise NotImplementedError  # each kind of weight sums its own


class GainTape(Tape):
    """Of a gain [D] that multiplies each of ``rows`` rows."""

    def __init__(self, gain: torch.Tensor, rows: int):
        self.gain = gain.detach()
        super().__init__((gain,), gain.new_zeros(()).expand(rows, *gain.shape))

    def repeated(self) -> torch.Tensor:
        """The gain of every row, [rows, D]."""
        self.used = True
        assert self.perturbation is not None  # begin() makes it
        return self.gain + self.perturbation

    def total(self) -> tuple[torch.Tensor]:
        gradients, self.gradients = torch.stack(list(self.gradients.values())), {}
        return (gradients.sum((0, 1)),)


class AffineTape(Tape):
    """Of a weight [..., in, out] and a bias [..., out], cast once to autocast's dtype.

    rows: of a step's input.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int):
        device = weight.device.type
        self.autocast = torch.is_autocast_enabled(device)
        if self.autocast:
            dtype = torch.get_autocast_dtype(device)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.inputs: dict[int, torch.Tensor] = {}
        self.input: torch.Tensor | None = None
        zero = self.weight.new_zeros(()).expand(*weight.shape[:-2], rows, weight.shape[-1])
        super().__init__((weight,) if bias is None else (weight, bias), zero)

    def takes(self, rows: int) -> bool:
        return super().takes(rows) and torch.is_autocast_enabled(self.weight.device.type) == self.autocast

    def affine(self, value: torch.Tensor) -> torch.Tensor:
        """value [..., in] for a weight [in, out]; [G, N, in] for a weight [G, in, out] and a bias [G, 1, out]."""
        rows = value.to(self.weight.dtype)
        rows = rows.flatten(0, -2) if self.weight.ndim == 2 else rows
        self.input, self.used = rows.detach(), True
        assert self.perturbation is not None  # begin() makes it
        if torch.compiler.is_compiling():
            out = affine(rows, self.weight, self.bias) + self.perturbation
        else:
            out = _Affine.apply(rows, self.weight, self.bias, self.perturbation)
        return out.unflatten(0, value.shape[:-1]) if self.weight.ndim == 2 else out

    def end(self) -> None:
        if self.input is not None:
            self.inputs[self.step], self.input = self.input, None
        super().end()

    def total(self) -> tuple[torch.Tensor, ...]:
        steps = list(self.gradients)  # those that the loss depends on, the last first
        inputs = torch.cat([self.inputs[step] for step in steps], -2)  # [..., T*N, in]
        gradients = torch.cat([self.gradients.pop(step) for step in steps], -2)  # [..., T*N, out]
        weight = inputs.mT @ gradients
        return (weight,) if self.bias is None else (weight, gradients.sum(-2).view(self.bias.shape))


def affine(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows @ weight + bias, of one matrix or of a batch of blocks."""
    if bias is None:
        return rows @ weight
    if weight.ndim == 2:
        return torch.addmm(bias, rows, weight)
    # baddbmm first fills its output with the bias; compiled, the addition is fused with what follows.
    return rows @ weight + bias if torch.compiler.is_compiling() else torch.baddbmm(bias, rows, weight)


class _Affine(torch.autograd.Function):
    """The product; in place of the weight's gradient it computes the perturbation's."""

    @staticmethod
    def forward(
        ctx, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, perturbation: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return affine(rows, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.mT if ctx.needs_input_grad[0] else None, None, None, gradient


class _Perturbation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tape: Tape, step: int, *deferred: torch.Tensor) -> torch.Tensor:
        ctx.tape, ctx.step = tape, step
        return tape.zero.view_as(tape.zero)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.tape.gradients[ctx.step] = gradient
        if ctx.step:
            return None, None, *(None for _ in ctx.tape.deferred)
        # Every later step has run: each depends on this one, and autograd runs the ready node made last first.
        return None, None, *ctx.tape.total()


@contextmanager
def deferred_weight_gradients(step: Callable, rows: int, *modules: nn.Module) -> Iterator[Callable]:
    """``step``, to be called once per step of a sequence, with weight gradients below ``modules`` deferred.

    A layer defers where it computes ``rows`` rows, for the first time in a step, under autocast as it is now. Each call
    must depend on the one before through the layer's own output, as in a recurrence. Gradients are of first order only.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield step
        return
    layers = dict.fromkeys(layer for module in modules for layer in module.modules() if isinstance(layer, Deferred))
    for layer in layers:
        layer.tapes = layer.make_tapes(rows)
    tapes = [tape for layer in layers for tape in layer.tapes.values()]

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


class Deferred(Fast):
    """A layer that records on its tapes while a sequence runs, and computes its plain forward otherwise."""

    tapes: Mapping[str, Any] = {}  # each a Tape

    def make_tapes(self, rows: int) -> Mapping[str, Tape]:
        raise NotImplementedError  # each layer knows its weights


class DeferredLinear(Deferred, Linear):
    """A Linear whose weight and bias have one tape."""

    def make_tapes(self, rows: int) -> Mapping[str, AffineTape]:
        return {"weight": AffineTape(self.weight.mT, self.bias, rows)}

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        tape = self.tapes.get("weight")
        if tape is None or not tape.takes(value.numel() // self.in_features):
            return super().forward(value)
        return tape.affine(value)


class DeferredBlockLinear(Deferred, BlockLinear):
    """A BlockLinear with a tape for its blocks, and another for its shared part."""

    def make_tapes(self, rows: int) -> Mapping[str, AffineTape]:
        if not hasattr(self, "shared_weight"):
            return {"weight": AffineTape(self.weight, self.bias.view(self.num_blocks, 1, -1), rows)}
        shared = AffineTape(self.shared_weight.mT, self.bias, rows)
        return {"weight": AffineTape(self.weight, None, rows), "shared": shared}

    def forward(self, value: torch.Tensor, shared: torch.Tensor | None = None) -> torch.Tensor:
        tape = self.tapes.get("weight")
        if tape is None or not tape.takes(value.numel() // (self.num_blocks * self.weight.shape[1])):
            return super().forward(value, shared)
        blocks = value.reshape(-1, self.num_blocks, self.weight.shape[1]).transpose(0, 1)  # [G, N, in/G]
        out = tape.affine(blocks).transpose(0, 1).reshape(*value.shape[:-1], self.bias.shape[0])  # [..., out]
        return out if shared is None else out + self.tapes["shared"].affine(shared)


class DeferredNormSiLU(Deferred, NormSiLU):
    """Compiled only: uncompiled, torch's operation takes one gain for all rows."""

    def make_tapes(self, rows: int) -> Mapping[str, GainTape]:
        return {"weight": GainTape(self.weight, rows)}

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        tape = self.tapes.get("weight")
        if tape is None or not torch.compiler.is_compiling() or not tape.takes(value.numel() // value.shape[-1]):
            return super().forward(value)
        normed = F.rms_norm(value.float(), value.shape[-1:], None, self.eps)
        return F.silu((normed * tape.repeated().view(value.shape)).to(value.dtype))


class DeferredRollout(Fast, RSSMRollout):
    """A rollout whose recurrence defers its weight gradients on a GPU."""

    def unroll(self, step: Callable, state: torch.Tensor, belief: torch.Tensor, *sequences) -> list[torch.Tensor]:
        if not on_gpu(state):
            return super().unroll(step, state, belief, *sequences)
        recurrent = self.rssm_prior.module.core, self.rssm_posterior
        with deferred_weight_gradients(step, state.shape[:-1].numel(), *recurrent) as step:
            return super().unroll(step, state, belief, *sequences)


MIXINS = DeferredLinear, DeferredBlockLinear, DeferredNormSiLU, DeferredRollout

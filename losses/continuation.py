"""The continue head: which of its two forms it writes, a logit or a probability, and that something trains it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import nn

SETTLED = 10  # updates after which every trained head has changed


def continue_name(keys: Any, model: Any, prefix: tuple[str, ...] = ()) -> str | None:
    """Which accepted key a model writes: ``continue_pred``, a logit, ``continuation``, a probability, or neither."""
    if keys.continue_pred == keys.continuation:
        raise ValueError(
            f"continue_pred and continuation both name {keys.continuation!r}; the first is read as a logit, the second as a "
            "probability.\n"
            "Set neither where the head writes 'continue_pred', a logit, or 'continuation', a probability (TorchRL's name for "
            "one). Any other entry: set the one that it is."
        )
    written = [] if model is None else [unravel_key(key) for key in model.out_keys]
    logit, probability = (unravel_key((*prefix, key)) for key in (keys.continue_pred, keys.continuation))
    if logit in written and _ends_in_sigmoid(model, logit):
        _refuse_probability(keys.continue_pred)
    return "continue_pred" if logit in written else "continuation" if probability in written else None


def check_logit(value: torch.Tensor, key: NestedKey) -> None:
    """Refuses what autograd knows to come straight out of a sigmoid."""
    if not torch.compiler.is_compiling() and value.grad_fn is not None and value.grad_fn.name() == "SigmoidBackward0":
        _refuse_probability(key)


def check_probability(value: torch.Tensor) -> None:
    """Refuses what lies outside [0, 1], on a CPU alone."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and ((value < 0) | (value > 1)).any():
        worst = value.flatten()[(value - 0.5).abs().argmax()].item()
        raise ValueError(
            f"continuation holds {worst:.3g}, and it is read as a probability, in [0, 1].\n"
            'Logits have a key of their own: set_keys(continue_pred="...") in place of set_keys(continuation="...").'
        )


def _values(parameters: list[nn.Parameter]) -> torch.Tensor:
    return torch.stack([p.detach().double().sum() for p in parameters])


def _ends_in_sigmoid(model: Any, key: NestedKey) -> bool:
    """Whether the network in ``model`` that writes ``key`` ends in a sigmoid, as far as chains of modules tell."""
    wrappers = [each for each in model.modules() if isinstance(each, TensorDictModule)]
    writers = [each for each in wrappers if [unravel_key(out) for out in each.out_keys] == [key]]
    if not writers:
        return False
    last = writers[-1].module
    while isinstance(last, nn.Module) and (children := [*last.children()]):
        if len(children) > 1 and not isinstance(last, nn.Sequential):
            return False  # only its forward knows which comes last
        last = children[-1]
    return isinstance(last, nn.Sigmoid) or last in (torch.sigmoid, torch.Tensor.sigmoid)


def _refuse_probability(key: NestedKey) -> NoReturn:
    raise ValueError(
        f"continue_pred names {key!r}, which comes out of a sigmoid: a probability, where a logit is read; its sigmoid would "
        "be taken twice.\n"
        'Call set_keys(continuation="...") in place of set_keys(continue_pred="..."), or leave the sigmoid out of the head.'
    )


class UntrainedHead:
    """Finds a continue head that nothing trains while the world model learns: the model loss lacks its key.

    A world model that a fused optimiser moves looks as if it stood still, so beside it nothing is found.

    Args:
        head: the continue model, if there is one.
        world: the modules of the imagined environment.
    """

    def __init__(self, head: nn.Module | None, world: Iterable[object]):
        of_world = {p for module in world if isinstance(module, nn.Module) for p in module.parameters()}
        of_head = set() if head is None else {*head.parameters()} - of_world
        self.world, self.head = ([p for p in each if not p.is_inference()] for each in (of_world, of_head))
        self.versions, self.updates, self.values = None, 0, torch.zeros(0)

    def check(self, training: bool) -> None:
        """Compares how often the parameters were written to: no device is waited for, but before the error."""
        if torch.compiler.is_compiling() or not training or not self.head:
            return
        world, head = (sum(p._version for p in parameters) for parameters in (self.world, self.head))
        if self.versions is None:
            self.versions, self.values = (world, head), _values(self.head)
        elif head != self.versions[1]:
            self.head = []  # it is trained
        elif world != self.versions[0]:
            self.versions, self.updates = (world, head), self.updates + 1
            if self.updates < SETTLED or not any(p.requires_grad for p in self.head):
                return
            now, before = _values(self.head).cpu(), self.values.cpu()
            if not torch.equal(now, before):  # a fused optimiser leaves no other trace
                self.head = []
            else:
                raise ValueError(
                    f"The continue head is not trained: {self.updates} updates changed the world model and left "
                    "continue_model as it was, while imagination ends by what it says.\n"
                    'Call set_keys(continue_pred="its key") on the world-model loss, give TorchRL\'s lambda_continue=1.0, or '
                    "freeze the head with requires_grad_(False)."
                )

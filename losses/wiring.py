"""Wiring: what a loss reads, who should have written it, and what its errors say where something else is there."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.objectives.common import LossModule

NEXT = ("next",)
GUIDE = "examples/guides/migrate_from_torchrl.md"


def read_key(default: NestedKey, writer: str, *, model: str | None = None, prefix: tuple[str, ...] = ()) -> Any:
    """An accepted key: its default, who writes the entry, which module of the loss must declare it, and below what it is."""
    return field(default=default, metadata={"writer": writer, "model": model, "prefix": prefix})


def _about(keys: Any, name: str) -> Mapping[str, Any]:
    about = getattr(type(keys), "__dataclass_fields__", {}).get(name)
    return {} if about is None else about.metadata


def entry(tensordict: TensorDictBase, keys: Any, name: str, prefix: tuple[str, ...] = ()) -> torch.Tensor:
    """The entry that the accepted key ``name`` stands for; an error says who should have written it and what is there."""
    key = unravel_key((*prefix, getattr(keys, name)))
    value = tensordict.get(key, None)
    if value is None:
        raise ValueError(_missing(keys, name, key, tensordict.keys(True, True)))
    return value


def _missing(keys: Any, name: str, key: NestedKey, present: Iterable[NestedKey]) -> str:
    writer = _about(keys, name).get("writer", "a module before this loss")
    prefix = key[:-1] if isinstance(key, tuple) else ()
    beside = [each for each in present if not prefix or (isinstance(each, tuple) and each[0] == prefix[0])]
    claimed = {value for value in vars(keys).values() if isinstance(value, str)}
    free = [each for each in beside if (each[-1] if isinstance(each, tuple) else each) not in claimed]
    return (
        f"{name} is missing: there is no {key!r}, which {writer} should have written.\n"
        f"There is {_listed(beside)}.\n"
        f"If it has another name, call set_keys({name}={_guess(getattr(keys, name), free)}) on the loss."
    )


def _listed(keys: Iterable[NestedKey], most: int = 8) -> str:
    names = sorted({str(key[-1] if isinstance(key, tuple) else key) for key in keys})
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(repr(name) for name in names[:most]) + more) or "nothing"


def _guess(key: NestedKey, present: Iterable[NestedKey]) -> str:
    """The name among those present that is most like the one not found, as a user writes it."""
    names = [each[-1] if isinstance(each, tuple) else each for each in present]
    close = difflib.get_close_matches(key if isinstance(key, str) else key[-1], names, 1)
    return repr(close[0]) if close else '"its name"'


def check_finite(value: torch.Tensor, name: str) -> None:
    """Refuses NaN and Inf. Only on a CPU, where a look at the values is free; a GPU would have to be waited for."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not value.isfinite().all():
        bad = (~value.isfinite()).sum().item()
        raise ValueError(
            f"{name} holds {bad} values that are NaN or Inf, of {value.numel()}. Mend the environment or the replay "
            "they come from; one such value spoils every weight."
        )


def check_scalar(shape: torch.Size, expected: Iterable[int], name: str) -> None:
    """Refuses what would broadcast: a scalar is [..., 1], with the leading dimensions of what it is compared with."""
    expected = [*expected]
    expected[-1] = 1
    if list(shape) != expected:
        logits = f" Logits are written as {name + '_logits'!r}." if [*shape][:-1] == expected[:-1] else ""
        raise ValueError(
            f"{name} has shape {list(shape)}; expected {expected}, one number for each step, or it would broadcast.\n"
            f"Give it that shape (.unsqueeze(-1), .reshape).{logits}"
        )


def holds_probability(model: nn.Module, key: NestedKey) -> bool:
    """Whether the network in ``model`` that writes ``key`` ends in a sigmoid, as far as its modules tell."""
    wrappers = [each for each in model.modules() if isinstance(each, TensorDictModule)]
    writers = [each for each in wrappers if [unravel_key(out) for out in each.out_keys] == [key]]
    if not writers:
        return False
    *_, last = writers[-1].modules()
    return isinstance(last, nn.Sigmoid) or writers[-1].module in (torch.sigmoid, torch.Tensor.sigmoid)


def refuse_probability(name: str, key: NestedKey) -> None:
    raise ValueError(
        f"{name} names {key!r}, which comes out of a sigmoid: a probability, where a logit is read; its sigmoid would be "
        "taken twice.\n"
        f'Call set_keys(continuation="...") in place of set_keys({name}="..."), or leave the sigmoid out of the head.'
    )


def refuse_two_names(keys: Any) -> None:
    """One entry cannot be a logit and a probability."""
    if keys.continue_pred == keys.continuation:
        raise ValueError(
            f"continue_pred and continuation both name {keys.continuation!r}; the first is read as a logit, the second as a "
            "probability.\n"
            "Set neither where the head writes 'continue_pred', a logit, or 'continuation', a probability (TorchRL's name for "
            "one). Any other entry: set the one that it is."
        )


def check_logit(value: torch.Tensor, name: str, key: NestedKey) -> None:
    """Refuses what autograd knows to come straight out of a sigmoid."""
    if torch.compiler.is_compiling() or value.grad_fn is None:
        return
    if value.grad_fn.name() == "SigmoidBackward0":
        refuse_probability(name, key)


def check_probability(value: torch.Tensor, name: str) -> None:
    """Refuses what lies outside [0, 1], on a CPU."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and ((value < 0) | (value > 1)).any():
        worst = value.flatten()[(value - 0.5).abs().argmax()].item()
        raise ValueError(
            f"{name} holds {worst:.3g}, and it is read as a probability, in [0, 1].\n"
            'Logits have a key of their own: set_keys(continue_pred="...") in place of set_keys(continuation="...").'
        )


def require_modules(**models: object) -> None:
    """Refuses classes and bare networks where a module with ``in_keys`` and ``out_keys`` must be."""
    for name, model in models.items():
        if isinstance(model, type):
            raise ValueError(f"{name}={model.__name__} is a class; pass an instance: {name}={model.__name__}(...).")
        if not hasattr(model, "out_keys") or not hasattr(model, "in_keys"):
            raise ValueError(
                f"{name} is a {type(model).__name__}, which has no in_keys and out_keys. Wrap the network: "
                "TensorDictModule(network, in_keys=[...], out_keys=[...])."
            )


def require_instances(**objects: object) -> None:
    for name, given in objects.items():
        if isinstance(given, type):
            raise ValueError(f"{name}={given.__name__} is a class; pass an instance: {name}={given.__name__}(...).")


class DreamerLoss(LossModule):
    """What the losses share: keys are checked as they are set, and arguments of TorchRL's losses refused with our names."""

    renamed: ClassVar[dict[str, str]] = {}  # arguments of TorchRL's losses, and what to say in their place
    twin: ClassVar[str] = ""  # another loss of the same name, and where it is imported from

    def _refuse(self, arguments: Mapping[str, object]) -> None:
        """Raises for arguments that the constructor does not know."""
        for name in arguments:
            mine = type(self).__name__
            if name in self.renamed:
                raise TypeError(
                    f"{name} is an argument of TorchRL's losses, not of r2dreamer.losses.{mine}: {self.renamed[name]}. "
                    f"The names side by side: {GUIDE}.{self.twin and chr(10)}{self.twin}"
                )
            known = [each for cls in type(self).__mro__ for each in inspect.signature(cls.__init__).parameters]
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise TypeError(f"{mine}.__init__() got an unexpected keyword argument {name!r}.{hint}")

    def set_keys(self, **kwargs: NestedKey | None) -> None:
        accepted = self._AcceptedKeys.__dataclass_fields__
        for name, key in kwargs.items():
            if name not in accepted:
                close = difflib.get_close_matches(name, accepted, 1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(accepted)}."
                raise ValueError(f"{name} is not a key of {type(self).__name__}: {hint}")
            if key is not None:
                self._check_key(name, key)
        super().set_keys(**kwargs)

    def _check_key(self, name: str, key: NestedKey) -> None:
        """Refuses a key that nothing can be found under."""
        about = self._AcceptedKeys.__dataclass_fields__[name].metadata
        parts = key if isinstance(key, tuple | list) else (key,)
        if not parts or not all(isinstance(part, str | tuple) for part in parts):
            raise ValueError(f"{name}={key!r} is not a key: give a string, or a tuple of strings for a nested entry.")
        prefix = about.get("prefix", ())
        if prefix and isinstance(key, tuple) and key[0] == prefix[0]:
            short = key[1] if len(key) == 2 else key[1:]
            raise ValueError(
                f"{name}={key!r}: this loss looks below {prefix[0]!r} already. Call set_keys({name}={short!r})."
            )
        model = getattr(self, about["model"], None) if about.get("model") else None
        if model is not None:
            written = [unravel_key(each) for each in (*model.out_keys, *model.in_keys)]
            if unravel_key((*prefix, key)) not in written:
                beside = [each for each in model.out_keys if not prefix or each[0] == prefix[0]]
                close = _guess(key, beside)
                hint = f" Did you mean {close}?" if close != '"its name"' else ""
                raise ValueError(
                    f"{name}={key!r}: {about['model']} writes no {unravel_key((*prefix, key))!r}; "
                    f"it writes {_listed(beside)}.{hint}"
                )

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        pass

    def make_value_estimator(self, value_type: object = None, **hyperparams: object) -> None:
        raise ValueError(
            f"r2dreamer.losses.{type(self).__name__} has no value estimator: its lambda-returns are part of it.\n"
            "Pass DreamerActorLoss(..., discount=..., lmbda=...) in place of make_value_estimator(gamma=..., lmbda=...)."
        )

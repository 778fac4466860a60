"""Wiring: what a loss reads, which module writes it, and what its errors say where something else is there."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import field
from typing import Any, ClassVar, NoReturn, Self

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.objectives.common import LossModule

NEXT = ("next",)
GUIDE = "examples/guides/migrate_from_torchrl.md"
ENVIRONMENT = "the environment, by way of the replay,"
FLAGS = ("done", "terminated", "truncated", "is_init")  # each has a meaning of its own, so none stands for another


def read_key(default: NestedKey, writer: str, *, model: str | None = None, prefix: tuple[str, ...] = ()) -> Any:
    """An accepted key: its default, who writes the entry, which module of the loss must declare it, and what it is nested in."""
    return field(default=default, metadata={"writer": writer, "model": model, "prefix": prefix})


def entry(tensordict: TensorDictBase, keys: Any, name: str, prefix: tuple[str, ...] = ()) -> torch.Tensor:
    """The entry of the accepted key ``name``; the error of a missing one says who writes it and what is there."""
    key = unravel_key((*prefix, getattr(keys, name)))
    value = tensordict.get(key, None)
    if value is None:
        present = [each for each in tensordict.keys(True, True) if not prefix or each[0] == prefix[0]]
        claimed = {*FLAGS, *(value for value in vars(keys).values() if isinstance(value, str))}
        free = [each for each in present if _last(each) not in claimed]
        guess = closest(getattr(keys, name), free) or '"its name"'
        raise ValueError(
            f"{name} is missing: there is no {key!r}, which {writer_of(keys, name)} should have written.\n"
            f"There is {listed(present)}.\n"
            f"If it has another name, call set_keys({name}={guess}) on the loss."
        )
    return value


def writer_of(keys: Any, name: str) -> str:
    """Who writes the entry of the accepted key ``name``, in words."""
    about = getattr(type(keys), "__dataclass_fields__", {}).get(name)
    return "a module before this loss" if about is None else about.metadata.get("writer", "a module before this loss")


def _last(key: Any) -> str:
    return key[-1] if isinstance(key, tuple) else key


def listed(keys: Iterable[NestedKey], most: int = 8) -> str:
    """The last parts of keys, in words, the first ``most`` of them."""
    names = sorted({_last(key) for key in keys})
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(repr(name) for name in names[:most]) + more) or "nothing"


def closest(key: Any, present: Iterable[NestedKey]) -> str | None:
    """The name among those present that is most like the missing one, as a user writes it."""
    close = difflib.get_close_matches(_last(key), [_last(each) for each in present], 1)
    return repr(close[0]) if close else None


def check_finite(value: torch.Tensor, name: str) -> None:
    """Refuses NaN and Inf, on a CPU alone: on a GPU this would wait for the device."""
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


def check_records(reward: torch.Tensor, name: NestedKey) -> None:
    """Refuses a batch without time, whose samples would pass for one sequence."""
    if reward.ndim != 3 or reward.shape[-1] != 1:
        raise ValueError(
            f"{name!r} has shape {list(reward.shape)}; expected [B, T, 1]: sequences of T steps, one number for each step.\n"
            "A reward [B, T] is given as .unsqueeze(-1), a batch [A, B, T] as .flatten(0, 1). Where time is missing, sample "
            "sequences: make_replay, or TorchRL's "
            "SliceSampler and .reshape(-1, T)."
        )


def require_instances(**objects: object) -> None:
    """Refuses a class, or a name, in the place of an instance."""
    for name, given in objects.items():
        if isinstance(given, str):
            raise ValueError(f"{name}={given!r} is text; pass an instance of the class that you mean.")
        if isinstance(given, type):
            raise ValueError(f"{name}={given.__name__} is a class; pass an instance: {name}={given.__name__}(...).")


def require_not_negative(**weights: float) -> None:
    """Refuses negative weights, and NaN."""
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name}={weight} must not be negative; 0 switches the term off.")


def require_modules(**models: object) -> None:
    """Refuses classes and bare networks where a module with ``in_keys`` and ``out_keys`` must be."""
    require_instances(**models)
    for name, model in models.items():
        if not hasattr(model, "out_keys") or not hasattr(model, "in_keys"):
            raise ValueError(
                f"{name} is a {type(model).__name__}, which has no in_keys and out_keys. Wrap the network: "
                "TensorDictModule(network, in_keys=[...], out_keys=[...])."
            )


def unregistered(owner: nn.Module, **parts: Any) -> None:
    """Sets attributes whose parameters must not become the owner's."""
    for name, part in parts.items():
        object.__setattr__(owner, name, part)


@contextmanager
def frozen(*modules: nn.Module | None):
    """Inside, gradients pass through these modules and stop at their parameters."""
    parameters = {p for module in modules if module is not None for p in module.parameters() if p.requires_grad}
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class DreamerLoss(LossModule):
    """What the losses share: ``set_keys`` checks keys, and arguments of TorchRL's losses are refused with our names.

    A subclass says what it reads and writes in ``_reads`` and ``_writes``; ``in_keys`` and ``out_keys`` may be set, too.
    """

    renamed: ClassVar[dict[str, str]] = {}  # arguments of TorchRL's losses, and what to say in their place
    namesake: ClassVar[str] = ""  # another loss of the same name, and where it is imported from
    _in_keys: list[NestedKey] | None = None
    _out_keys: list[NestedKey] | None = None

    in_keys: Any = property(
        lambda self: self._reads() if self._in_keys is None else self._in_keys,
        lambda self, keys: setattr(self, "_in_keys", keys),
    )
    out_keys: Any = property(
        lambda self: self._writes() if self._out_keys is None else self._out_keys,
        lambda self, keys: setattr(self, "_out_keys", keys),
    )
    tensor_keys: Any = property(lambda self: self._tensor_keys)

    @classmethod
    def default_keys(cls) -> Any:
        return cls._AcceptedKeys()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy whose parameters are those of the modules that it reads, as in the original."""
        for part in self.modules():
            if isinstance(part, TensorDictParams):  # which copies itself without the memo
                leaves = {name: copy.deepcopy(leaf, memo) for name, leaf in part.items(True, True)}
                memo[id(part)] = TensorDictParams(TensorDict(leaves, part.batch_size), no_convert=True)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def _refuse(self, arguments: Mapping[str, object]) -> None:
        """Raises for arguments that the constructor does not know."""
        for name in arguments:
            mine = type(self).__name__
            if name in self.renamed:
                namesake = self.namesake and f"\n{self.namesake}"
                raise TypeError(
                    f"{name} is an argument of TorchRL's losses, not of r2dreamer.losses.{mine}: {self.renamed[name]}. "
                    f"The names side by side: {GUIDE}.{namesake}"
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
                self._check_key(name, key, **accepted[name].metadata)
        before = copy.copy(self._tensor_keys)
        try:
            super().set_keys(**kwargs)
            self._read_heads()
        except Exception:  # what is refused changes nothing
            self._tensor_keys = before
            self._read_heads()
            raise

    def _read_heads(self) -> None:
        """Looks up by the present keys what the loss's models write; called by a constructor, and again by ``set_keys``."""

    def _beside_parameters(self, module: nn.Module) -> nn.Module:
        """The module on the device that the loss has moved to."""
        parameter = next(self.parameters(), None)
        return module if parameter is None else module.to(parameter.device)

    def _check_key(self, name: str, key: Any, model: str = "", prefix: tuple[str, ...] = (), writer: str = "") -> None:
        """Refuses a key that nothing can be found under."""
        parts = key if isinstance(key, tuple | list) else (key,)
        if not parts or not all(isinstance(part, str | tuple) for part in parts):
            raise ValueError(f"{name}={key!r} is not a key: give a string, or a tuple of strings for a nested entry.")
        if prefix and isinstance(key, tuple) and key[0] == prefix[0]:
            short = key[1] if len(key) == 2 else key[1:]
            raise ValueError(f"{name}={key!r} is below {prefix[0]!r} already: call set_keys({name}={short!r}).")
        module: Any = getattr(self, model, None) if model else None
        if module is None:
            return
        if unravel_key((*prefix, key)) not in [unravel_key(each) for each in (*module.out_keys, *module.in_keys)]:
            written = [each for each in module.out_keys if not prefix or each[0] == prefix[0]]
            close = closest(key, written)
            raise ValueError(
                f"{name}={key!r}: {model} writes no {unravel_key((*prefix, key))!r}; it writes {listed(written)}."
                + (f" Did you mean {close}?" if close else "")
            )

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        """No value estimator reads the keys."""

    def make_value_estimator(self, value_type: Any = None, **hyperparams: object) -> NoReturn:
        raise ValueError(
            f"r2dreamer.losses.{type(self).__name__} has no value estimator: its lambda-returns are part of it.\n"
            "Pass DreamerActorLoss(..., discount=..., lmbda=...) in place of make_value_estimator(gamma=..., lmbda=...)."
        )

"""Kinds of values: whole numbers, shares, choices; each says what it expects and reads a value as it is used."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from omegaconf import DictConfig, ListConfig, OmegaConf


@dataclass(frozen=True)
class Kind:
    """What values are expected, in words, and the function that returns one as it is used or raises."""

    expected: str
    read: Callable[[object], object]


def whole(least: int = 0, most: int | None = None) -> Kind:
    def read(value: object) -> int:
        if isinstance(value, float) and value.is_integer():  # hydra reads 1e6 as a float
            value = int(value)
        if type(value) is not int or not least <= value <= (2**63 - 1 if most is None else most):
            raise ValueError
        return value

    return Kind(f"a whole number of at least {least}" + ("" if most is None else f" and at most {most:,}"), read)


def number(
    least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None
) -> Kind:
    limits = {"of at least": least, "above": above, "of at most": most, "below": below}
    said = " and ".join(f"{word} {limit:,}" for word, limit in limits.items() if limit is not None)
    said = said.replace("and of", "and")

    def read(value: object) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError
        inside = (least is None or value >= least) and (most is None or value <= most)
        if not (inside and (above is None or value > above) and (below is None or value < below)):
            raise ValueError
        return value

    return Kind(f"a number {said}".strip(), read)


def choice(*values: object) -> Kind:
    def read(value: object) -> object:
        if not any(type(value) is type(each) and value == each for each in values):
            raise ValueError
        return value

    names = [say(each) for each in values]
    return Kind(f"one of {', '.join(names)}" if len(names) > 2 else " or ".join(names), read)


def any_of(*kinds: Kind) -> Kind:
    def read(value: object) -> object:
        for kind in kinds:
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                return kind.read(value)
        raise ValueError

    return Kind(", or ".join(kind.expected for kind in kinds), read)


def maybe(kind: Kind) -> Kind:
    return any_of(kind, Kind("null", choice(None).read))


def list_of(kind: Kind, length: int | None = None) -> Kind:
    def read(value: object) -> list:
        if not isinstance(value, list) or len(value) != (length or len(value)) or not value:
            raise ValueError
        return [kind.read(each) for each in value]

    return Kind(f"a list of {length or 'one or more'}, each {kind.expected}", read)


def _text(value: object) -> str:
    if type(value) not in (str, int, float) or not str(value).strip() or "\0" in str(value):
        raise ValueError
    return str(value)


def one_like(pattern: str, expected: str) -> Kind:
    """A text that the regular expression matches as a whole."""

    def read(value: object) -> str:
        if type(value) is not str or not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Kind(expected, read)


def _section(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError
    return value


def say(value: object) -> str:
    """A value as it is written on a command line, cut short where it is long."""
    plain = OmegaConf.to_container(value, resolve=False) if isinstance(value, DictConfig | ListConfig) else value
    written = plain if isinstance(plain, str) and plain.strip() else json.dumps(plain, default=str)
    return written if len(written) <= 80 else f"{written[:77]}..."


flag, text = choice(True, False), Kind("a text that is not empty", _text)
anything, section = Kind("anything", lambda value: value), Kind("a section", _section)
device = one_like(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda, or cuda:1 for the second GPU")
storage = one_like(r"cpu|memmap|cuda(:\d+)?", "cpu, memmap or cuda")

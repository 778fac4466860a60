"""What a user is told when something is missing, misspelt or broken: one paragraph with the remedy."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np


class WorkerError(RuntimeError):
    """An environment failed while running: names its task, its index among the environments, its seed and traceback."""


def require_linux(what: str, instead: str) -> None:
    """Refuse what other systems lack (/proc, shared memory, locks), and say what can be done there."""
    if not sys.platform.startswith("linux"):
        raise OSError(f"{what} needs Linux, and this system is {sys.platform}. {instead}")


def require_positive(**sizes: int | None) -> None:
    """Refuse sizes that are not positive whole numbers; None means "not given" and passes."""
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def require_one_of(known: Collection[str], **chosen: str) -> None:
    """Refuse a choice that there is not."""
    for name, value in chosen.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}.{nearest(value, known)}")


def unknown_task(task: str, known: Collection[str], suite: str) -> ValueError:
    """The error for a task that `suite` does not have, naming the nearest ones it has."""
    hint = nearest(task, known) or f" Some it has: {', '.join(sorted(known)[:5])}."
    return ValueError(f"{suite} has no task {task!r}.{hint}")


def nearest(name: str, known: Collection[str]) -> str:
    """A sentence that names the nearest of the known names; empty where none is near."""
    # Case must not hide a near miss: "cartpole-v1" is one key away from "CartPole-v1".
    by_lower = {each.lower(): each for each in sorted(known)}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.5)
    return f" The nearest: {', '.join(by_lower[each] for each in close)}." if close else ""


def not_finite(name: str, value: Any, step: int, task: str) -> ValueError:
    """The error for a number that would poison the replay and show up thousands of updates later as a NaN loss."""
    return ValueError(
        f"{_entry(name)} is not finite at step {step} of an episode of task {task!r}: {np.asarray(value).tolist()}. It is "
        "stored as float32, in which numbers above 3.4e38 are infinite. The simulator diverged or the environment has a "
        "bug; smaller actions, another seed or a fixed environment mend it."
    )


def as_promised(name: Any, value: Any, shape: Sequence[int], dtype: np.dtype, step: int, task: str) -> np.ndarray:
    """An entry in the shape and dtype of the specs, in which it is stored; a number may become a narrower one of its kind.

    It refuses what would be broadcast or cut, and what is not finite. Nested names are those below "metrics", which are
    reported and not learned from: they may be infinite.
    """
    array = None if value is None else np.asarray(value)
    if array is None or array.shape != shape or not np.can_cast(array.dtype, dtype, "same_kind"):
        found = "is missing" if array is None else f"is {array.dtype} of shape {list(array.shape)}"
        raise ValueError(
            f"{_entry(name)} {found} at step {step} of an episode of task {task!r}. The environment's specs promise "
            f"{dtype} of shape {list(shape)}: return that at every reset and step, or change the specs."
        )
    if array.dtype != dtype:
        with np.errstate(over="ignore"):
            array = array.astype(dtype)
    if dtype.kind == "f" and isinstance(name, str) and not np.isfinite(array).all():
        raise not_finite(name, value, step, task)
    return array


def _entry(name: str) -> str:
    flags = ("reward", "done", "terminated", "truncated")
    return str(name) if name in flags else f"observation {name!r}"


def require(module: str, extra: str) -> Any:
    """Import an optional dependency, or say which line installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module!r} could not be imported ({error}). It comes with the extra {extra!r}: "
            f'`pip install "torchrl-r2dreamer[{extra}]"`, or from a checkout `pip install -e ".[{extra}]"`.'
        ) from error

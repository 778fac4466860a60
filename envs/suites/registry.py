"""The registry of suites: each file of this package registers its own.

A new suite is one file here, which calls :func:`register`, and one file in ``configs/env``. Suites are found by importing
every module of this package; they import what an extra brings only when a task is made or listed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ..base import errors
from ..base.gl import choose_gl


@dataclass(frozen=True)
class Suite:
    """One suite.

    Attributes:
        name: The value of ``env=``.
        title: What people call it.
        make: Makes one environment, ``make(task, *, seed, ...)``.
        tasks: Lists the names of its tasks, without the extra as far as they are known.
        module: The module that is there when the suite is installed; empty where the user brings the environment.
        extra: The extra of this distribution that installs it; empty where none is needed.
        renders: Whether MuJoCo renders its images.
        scores: Classes that turn returns and metrics into the suite's own scores.
    """

    name: str
    title: str
    make: Callable
    tasks: Callable[[], Collection[str]]
    module: str = "r2dreamer.envs"
    extra: str = ""
    renders: bool = False
    scores: tuple[type, ...] = ()

    @property
    def installed(self) -> bool:
        return not self.module or importlib.util.find_spec(self.module) is not None


_SUITES: dict[str, Suite] = {}


def register(name: str, **suite: Any) -> None:
    """Registers a suite under this value of ``env=``; the keywords are those of :class:`Suite`."""
    _SUITES[name] = Suite(name, **suite)


def suites() -> dict[str, Suite]:
    """Every suite by its name."""
    package = sys.modules[__name__.rpartition(".")[0]]
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(_SUITES)


def targets() -> set[str]:
    """What the suites' configurations may name in ``_target_``: the makers and scores of this package."""
    parts = [part for suite in suites().values() for part in (suite.make, *suite.scores)]
    public = importlib.import_module("r2dreamer.envs")
    return {
        f"{'r2dreamer.envs' if hasattr(public, part.__name__) else part.__module__}.{part.__name__}"
        for part in parts
        if part.__module__.startswith(f"{__package__}.")
    }


def table() -> str:
    """The suites as a table in Markdown."""
    rows = [f"| `env={each.name}` | {each.title} | {each.extra and f'`{each.extra}`'} |" for each in suites().values()]
    return "\n".join(["| | suite | extra |", "|---|---|---|", *rows])


def suites_with(task: str) -> list[str]:
    """The names of the suites that have a task of this name."""
    choose_gl()  # before MuJoCo is imported: it reads the variable only then
    found = []
    for suite in suites().values():
        with contextlib.suppress(Exception):  # an extra is missing, or cannot be imported: no hint from there
            if str(task) in suite.tasks():
                found.append(suite.name)
    return found


def unknown_task(task: str, known: Collection[str], title: str, own: str | None = None) -> ValueError:
    """The error for a task that a suite does not have: it names the suite that has it, or the nearest tasks."""
    elsewhere = " or ".join(f"env={name}" for name in suites_with(task) if name != own)
    if elsewhere:
        return ValueError(f"{title} has no task {task!r}, but another suite has: use {elsewhere} env.task={task}.")
    return errors.unknown_task(task, known, title)

"""DMC-Subtle: what matters in a task of the DeepMind Control suite, made small."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np

from ..base.errors import nearest, unknown_task
from .hooks import beginning, find
from .recompile import (
    KINDS,
    Edit,
    Part,
    adopt,
    compile_edited,
    describe,
    distance,
    domain_of,
    nearest_source,
    sources_of,
)


@dataclass(frozen=True)
class Official:
    """One of the paper's tasks: the stock task it is built on, what shrinks, and to which fraction."""

    stock: tuple[str, str]
    names: dict
    shrink: float
    size: float | None = None  # the radius the stock task itself sets when an episode begins


OFFICIAL = {
    "reacher": Official(("reacher", "hard"), {"geom": ["target"]}, 1 / 3, size=0.015),
    "finger_turn": Official(("finger", "turn_hard"), {"site": ["target"]}, 1 / 2, size=0.03),
    "point_mass": Official(("point_mass", "easy"), {"geom": ["target", "pointmass"]}, 1 / 6),
    "ball_in_cup_catch": Official(("ball_in_cup", "catch"), {"geom": ["ball"], "tendon": ["string"]}, 1 / 12),
    "cartpole_swingup": Official(("cartpole", "swingup"), {"class": ["pole"]}, 1 / 20),
}


@dataclass
class Subtle:
    """What shrinks, and how; the arguments are those of the transform `DMCSubtle`."""

    task: str | None = None
    geoms: str | Sequence[str] = ()
    sites: str | Sequence[str] = ()
    tendons: str | Sequence[str] = ()
    classes: str | Sequence[str] = ()
    shrink: float | str | None = None
    physics: Any = "official"
    xml: str | None = field(default=None, repr=False)
    assets: Mapping[str, str | bytes] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for argument in ("geoms", "sites", "tendons", "classes"):
            given = getattr(self, argument)
            given = given if isinstance(given, str | tuple) else list(given)
            if given in ("", []):
                raise ValueError(f"{argument}={given!r} names nothing; leave it out, or say what shrinks.")
            setattr(self, argument, given)
        if self.task is not None and self.task not in OFFICIAL:
            raise unknown_task(self.task, OFFICIAL, "DMC-Subtle")
        if self.names and (self.task is not None or self.shrink is None):
            raise ValueError(
                f"DMCSubtle names {describe(self.names)} and has task={self.task!r}, shrink={self.shrink!r}. Names go with "
                'a shrink, such as shrink=1/20, and without a task: a task, such as DMCSubtle("reacher"), brings its own '
                "names."
            )
        if self.physics not in ("official", "frozen"):
            raise ValueError(
                f"physics={self.physics!r} must be 'official', where masses and rewards follow the edited XML, or 'frozen', "
                f"where only what is seen shrinks.{nearest(self.physics, ('official', 'frozen'))}"
            )
        self.factor = _fraction(self.shrink)

    @property
    def names(self) -> dict[str, list[str]]:
        """What is named, by kind."""
        given = zip(KINDS, (self.geoms, self.sites, self.tendons, self.classes), strict=True)
        return {kind: [names] if isinstance(names, str) else list(names) for kind, names in given if names}

    def put_on(self, env: Any, task_name: str | None = None) -> None:
        """Shrink in an environment of dm_control. task_name: of the suite, where it is known."""
        begin = beginning(env.task)
        there = find(begin, "begin", Shrunk)
        shrunk = there or Shrunk(begin)
        domain = domain_of(env.physics)
        sources = [(self.xml, self.assets)] if self.xml is not None else sources_of(domain, task_name)
        shrunk.add(self._edit(domain), env.physics, sources)
        if there is None:  # and what is refused changes nothing
            env.task.initialize_episode = shrunk

    def _edit(self, domain: str | None) -> Edit:
        frozen = self.physics == "frozen"
        if self.names:
            assert self.factor is not None  # names go with one
            return Edit(self.names, self.factor, None, frozen)
        tasks: dict[str | None, str] = {official.stock[0]: name for name, official in OFFICIAL.items()}
        task = tasks.get(domain) if self.task is None else self.task
        if task is None or tasks.get(domain) != task:
            whose = f"one of the domain {domain!r}" if domain else "one that is not of the suite"
            meant = f" {task!r}: that is one of {OFFICIAL[task].stock[0]!r}" if task else ""
            raise ValueError(
                f"DMCSubtle was put on an environment, {whose}, for which it has no task{meant}. Its tasks: {', '.join(OFFICIAL)}. "
                'Anywhere else say what shrinks, as in DMCSubtle(geoms="target", shrink=1/4).'
            )
        official = OFFICIAL[task]
        if self.factor is None:
            return Edit(official.names, official.shrink, official.size, frozen)
        return Edit(official.names, self.factor, None, frozen)


# -- what is shrunk, while episodes run -------------------------------------------------------------------------------


class Shrunk:
    """What is shrunk in one environment. It takes the place of its task's `initialize_episode`."""

    def __init__(self, begin: Callable):
        self.begin = begin
        self.parts, self.edits = {}, []

    def __call__(self, physics: Any) -> None:
        parts = [part for part in self.parts.values() if not part.edit.frozen]
        sizes = [part.read(physics.model) for part in parts]
        marks = [np.nextafter(size, np.inf) for size in sizes]  # which no task sets, though it may set what is there
        for part, mark in zip(parts, marks, strict=True):
            part.write(physics.model, mark)
        self.begin(physics)
        for part, size, mark in zip(parts, sizes, marks, strict=True):
            now = part.read(physics.model)  # where it is not the mark, the task set it, to what is big
            part.write(physics.model, np.where(now == mark, size, part.small(now)))
        self.render_small(physics)

    def add(self, edit: Edit, physics: Any, sources: Sequence[tuple[Any, Any]]) -> None:
        if any(part.edit == edit for part in self.parts.values()):
            return  # as when TorchRL puts a clone on the environment, to give a later transform its parent
        source, before = nearest_source(sources, physics.model.ptr, self.edits)
        _, touched = compile_edited(source, [replace(edit, shrink=1.0)]) if self.parts else (None, [])
        others = [self.parts[key].edit for key in touched if key in self.parts]
        if others:
            raise ValueError(
                f"This environment already has {others[0]}, and DMCSubtle would make that {edit}. Build a new "
                "environment for another size."
            )
        # Which numbers are a size shows at any shrink: what is frozen need not compile with the mass of a small one.
        trial = replace(edit, shrink=0.5) if edit.frozen else edit
        after, touched = compile_edited(source, [*self.edits, trial])
        if distance(before, after) == math.inf:
            raise ValueError(f"DMCSubtle cannot make {edit}: the smaller mesh compiles to another number of faces.")
        parts = {}
        for size, index in touched:
            old, new = (getattr(model, size)[index : index + 1] for model in (before, after))
            parts[size, index] = Part(edit, size, index, (old != new) & (old * trial.shrink == new))
        if not edit.frozen:
            adopt(physics, before, after, parts.values())
            self.edits.append(edit)
        self.parts |= parts
        self.render_small(physics)

    def render_small(self, physics: Any) -> None:
        """Have a physics render what is frozen small; it forgets that when it is pickled, so every episode says it."""
        if find(physics.render, "render", SmallRender) is None and any(
            part.edit.frozen for part in self.parts.values()
        ):
            physics.render = SmallRender(physics, self)


class SmallRender:
    """A physics' `render`; what is frozen is small only while it runs."""

    def __init__(self, physics: Any, shrunk: Shrunk):
        self.render, self.physics, self.shrunk = physics.render, physics, shrunk

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.physics.model
        parts = [part for part in self.shrunk.parts.values() if part.edit.frozen]
        sizes = [part.read(model) for part in parts]
        try:
            for part in parts:
                part.shrink(model)
            return self.render(*args, **kwargs)
        finally:
            for part, size in zip(parts, sizes, strict=True):
                part.write(model, size)


# -- what a user is told ----------------------------------------------------------------------------------------------


def _fraction(shrink: float | str | None) -> float | None:
    if shrink is None:
        return None
    try:
        number = float(Fraction(shrink)) if isinstance(shrink, str) else shrink
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if isinstance(number, bool) or not isinstance(number, Real) or not 0 < number <= 1:
        raise ValueError(
            f"shrink={shrink!r} must be a number above 0 and at most 1, or a fraction such as '1/20': sizes are "
            "multiplied by it, so a third of the size is shrink=1/3."
        )
    return float(number)

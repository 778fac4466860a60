"""DMC-Subtle: what matters in a task of the DeepMind Control suite, made small.

`DMCSubtle()` shrinks the paper's things in a DMControlEnv of TorchRL's, `DMCSubtle(geoms="target", shrink=1 / 20)` any
others. The paper's tasks as a suite are in `suites/dmc_subtle.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np

from ..base.errors import nearest, unknown_task
from .hooks import ControlTransform, beginning, find
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

    stock: tuple
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


class DMCSubtle(ControlTransform):
    """Shrinks things in a DeepMind Control environment, however it is rendered; its specs stay as they are.

    The environment keeps its image size: TorchRL's default is 240x320, and the paper's is `RenderPixels(64)`. The transform
    changes the environment itself. Reset the environment next.

    Args:
        task: One of the paper's five; ``None`` is the one of the environment's domain. What shrinks can be named instead.
        geoms: Names in the environment's XML, one or several.
        sites: The same.
        tendons: The same.
        classes: Default classes, with all their geoms and sites.
        shrink: What sizes are multiplied by, a number in (0, 1] or a fraction such as ``"1/20"``. ``None`` is the paper's
            size, also where the environment has an easier task of the same domain, with a bigger target.
        physics: ``"official"`` compiles the edited XML as the paper does: masses, inertias and the rewarded region change
            too. ``"frozen"`` shrinks only what is seen; states and rewards stay the same, to the bit.
        xml: What the environment was compiled from. Not needed for the tasks of the suite.
        assets: The files that the XML includes.

    Example:
        >>> from r2dreamer.envs import DMCSubtle, RenderPixels
        >>> from torchrl.envs import Compose, DMControlEnv, TransformedEnv
        >>> env = DMControlEnv("reacher", "hard", frame_skip=2)
        >>> env = TransformedEnv(env, Compose(DMCSubtle(), RenderPixels(64)))
        >>> env.reset()["pixels"].shape
        torch.Size([3, 64, 64])
        >>> env = TransformedEnv(DMControlEnv("swimmer", "swimmer6"), DMCSubtle(geoms="target", shrink=1 / 4))
    """

    def __init__(
        self, task: str | None=None, *, geoms: str | Sequence[str]=(), sites: str | Sequence[str]=(), tendons: str | Sequence[str]=(), classes: str | Sequence[str]=(), shrink: float | str | None = None, physics: Any="official", xml: str | None=None,
        assets: Mapping[str, str | bytes] | None=None,
    ):  # fmt: skip
        super().__init__()
        if task is not None and task not in OFFICIAL:
            raise unknown_task(task, OFFICIAL, "DMC-Subtle")
        given = {kind: names for kind, names in zip(KINDS, (geoms, sites, tendons, classes), strict=True) if names}
        names = {kind: [names] if isinstance(names, str) else list(names) for kind, names in given.items()}
        if names and (task is not None or shrink is None):
            raise ValueError(
                f"DMCSubtle names {describe(names)} and has task={task!r}, shrink={shrink!r}. Names go with a shrink, such "
                'as shrink=1/20, and without a task: a task, such as DMCSubtle("reacher"), brings its own names.'
            )
        if physics not in ("official", "frozen"):
            raise ValueError(
                f"physics={physics!r} must be 'official', where masses and rewards follow the edited XML, or 'frozen', "
                f"where only what is seen shrinks.{nearest(physics, ('official', 'frozen'))}"
            )
        self.task, self.names, self.shrink, self.physics = task, names, _fraction(shrink), physics
        self.source = None if xml is None else (xml, assets)

    def __repr__(self) -> str:
        what = describe(self.names) or f"task={self.task!r}"
        return f"{type(self).__name__}({what}, shrink={self.shrink}, physics={self.physics!r})"

    def put_on(self, env: Any) -> None:
        """Shrink what is to be shrunk in an environment that holds one of dm_control's."""
        physics, task = self.physics_of(env), env._env.task
        begin = beginning(task)
        there = find(begin, "begin", Shrunk)
        shrunk = there or Shrunk(begin)
        domain = domain_of(physics)
        shrunk.add(self._edit(domain), physics, [self.source] if self.source else sources_of(env, domain))
        if there is None:  # and what is refused changes nothing
            task.initialize_episode = shrunk

    def _edit(self, domain: str | None) -> Edit:
        frozen = self.physics == "frozen"
        if self.names:
            assert self.shrink is not None  # names go with one
            return Edit(self.names, self.shrink, None, frozen)
        tasks = {official.stock[0]: name for name, official in OFFICIAL.items()}
        task = tasks.get(domain) if self.task is None else self.task
        if task is None or tasks.get(domain) != task:
            whose = f"one of the domain {domain!r}" if domain else "one that is not of the suite"
            meant = f" {task!r}: that is one of {OFFICIAL[task].stock[0]!r}" if task else ""
            raise ValueError(
                f"DMCSubtle was put on an environment, {whose}, for which it has no task{meant}. Its tasks: {', '.join(OFFICIAL)}. "
                'Anywhere else say what shrinks, as in DMCSubtle(geoms="target", shrink=1/4).'
            )
        official = OFFICIAL[task]
        if self.shrink is None:
            return Edit(official.names, official.shrink, official.size, frozen)
        return Edit(official.names, self.shrink, None, frozen)


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
        for field, index in touched:
            old, new = (getattr(model, field)[index : index + 1] for model in (before, after))
            parts[field, index] = Part(edit, field, index, (old != new) & (old * trial.shrink == new))
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

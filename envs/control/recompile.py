"""The model of a DeepMind Control environment compiled anew, with some of its sizes smaller.

Which masses are given and which follow from a density stands in the XML and no longer in the compiled model. So the
edited XML is compiled, and what comes out different is carried over into the environment's own model: all the rest,
a target the task has moved or a gravity the user has set, stays.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.errors import nearest

KINDS = {"geom": "geoms", "site": "sites", "tendon": "tendons", "class": "classes"}  # and DMCSubtle's arguments
SIZES = {"geom": "geom_size", "site": "site_size", "tendon": "tendon_width"}  # of a compiled model
# How many numbers say how big a shape is; a plane's third is the spacing of its grid.
NUMBERS = {"PLANE": 2, "SPHERE": 1, "CAPSULE": 2, "CYLINDER": 2, "ELLIPSOID": 3, "BOX": 3}
STATISTICS = ("center", "extent", "meaninertia", "meanmass", "meansize")


@dataclass
class Edit:
    """What one DMCSubtle does: names by kind, the factor, and perhaps the size that it is the factor of."""

    names: dict
    shrink: float
    size: float | None
    frozen: bool

    def __str__(self) -> str:
        how = "frozen" if self.frozen else "official"
        return f"{describe(self.names)} shrunk to {self.shrink:.4g} of the size, physics={how!r}"


@dataclass
class Part:
    """The numbers of one thing's size in a compiled model."""

    edit: Edit
    field: str
    index: int
    numbers: np.ndarray

    def read(self, model: Any) -> np.ndarray:
        return getattr(model, self.field)[self.index : self.index + 1][self.numbers]  # a copy

    def write(self, model: Any, sizes: Any) -> None:
        getattr(model, self.field)[self.index : self.index + 1][self.numbers] = sizes

    def shrink(self, model: Any) -> None:
        self.write(model, self.small(self.read(model)))

    def small(self, sizes: Any) -> np.ndarray:
        return (sizes if self.edit.size is None else np.full_like(sizes, self.edit.size)) * self.edit.shrink


def describe(names: Mapping[str, Sequence[str]]) -> str:
    """What is named, by kind, for a message."""
    return ", ".join(f"{kind} {name!r}" for kind, group in names.items() for name in group)


class _Source(Exception):
    """The (XML, assets) that a physics was about to be compiled from."""


_listening = threading.Lock()


def domain_of(physics: Any) -> str | None:
    modules = [kind.__module__ for kind in type(physics).__mro__]
    return next((module.split(".")[2] for module in modules if module.startswith("dm_control.suite.")), None)


def sources_of(domain: str | None, task_name: str | None) -> list[tuple[Any, Any]]:
    """The (XML, assets) from which a task of the suite may have been compiled; dm_control keeps none of them.

    To begin building the task again, and to listen, works also for the tasks that put their XML together in Python.
    """
    from dm_control import suite
    from dm_control.mujoco.wrapper import MjModel

    tasks = suite.TASKS_BY_DOMAIN.get(domain, ()) if task_name is None else [task_name]
    ordinary, thread, sources = vars(MjModel)["from_xml_string"], threading.get_ident(), {}

    def listen(xml_string, assets: Mapping[str, str | bytes] | None = None) -> Any:
        if threading.get_ident() != thread:
            return ordinary.__func__(MjModel, xml_string, assets=assets)
        raise _Source(xml_string, assets)

    with _listening:
        MjModel.from_xml_string = listen
        try:
            for task in tasks:
                try:
                    suite.load(domain, task, task_kwargs={"random": 0})
                except _Source as source:
                    sources[source.args[0]] = source.args
        finally:
            MjModel.from_xml_string = ordinary
    return list(sources.values())


def nearest_source(
    sources: Sequence[tuple[Any, Any]], model: Any, edits: Sequence[Edit]
) -> tuple[tuple[Any, Any], Any]:
    """The source that compiles to `model`, apart from what a task sets in it, and what the source compiles to."""
    compiled = [compile_edited(source, edits)[0] for source in sources]
    distances = [distance(model, other) for other in compiled]
    if min(distances, default=math.inf) == math.inf:
        raise ValueError(
            "DMCSubtle needs the XML from which this environment's model was compiled, and "
            + ("what it has compiles to another model" if sources else "only for the suite's tasks can it find that")
            + '. Hand it over, as in DMCSubtle(geoms="target", shrink=1/4, xml=text, assets=files), where assets is a '
            "dictionary from the names of included files to their content."
        )
    best = distances.index(min(distances))
    return sources[best], compiled[best]


def compile_edited(source: tuple[Any, Any], edits: Sequence[Edit]) -> tuple[Any, list[tuple[str, int]]]:
    """The model compiled from an edited XML, and the fields and indices of what the last edit touched."""
    mujoco: Any = importlib.import_module("mujoco")  # compiled, without stubs
    xml, assets = source
    with mujoco.MjVfs() as files:
        for name, content in (assets or {}).items():
            files[name] = content if isinstance(content, bytes) else content.encode()
        text = xml if isinstance(xml, str) else xml.decode()
        if "<" not in text:
            raise ValueError(
                f"xml={text!r} is no XML. It must be the text itself, as in xml=Path('model.xml').read_text()."
            )
        spec = mujoco.MjSpec.from_string(text, vfs=files)
        touched = [_shrink_spec(spec, edit) for edit in edits]
        try:
            model = spec.compile(files)
        except ValueError as error:
            if not edits:
                raise
            raise ValueError(
                f"MuJoCo does not compile this environment's model with {', '.join(map(str, edits))}: {' '.join(str(error).split())}. A larger "
                "shrink mends it, and so does physics='frozen' where a mass becomes too small."
            ) from error
    return model, [(SIZES[kind], element.id) for kind, element in (touched or [[]])[-1]]


def _shrink_spec(spec: Any, edit: Edit) -> list:
    """Multiply the sizes that an edit names in a parsed XML; gives the (kind, element) it touched."""
    elements = {"geom": spec.geoms, "site": spec.sites, "tendon": spec.tendons}
    known = {kind: {element.name: [(kind, element)] for element in elements[kind] if element.name} for kind in elements}
    known["class"] = {}
    for kind in ("geom", "site"):
        for element in elements[kind]:
            known["class"].setdefault(element.classname.name, []).append((kind, element))
    touched = []
    for kind, names in edit.names.items():
        for name in names:
            if name not in known[kind]:
                raise _unknown_name(kind, name, known)
            touched += [found for found in known[kind][name] if found not in touched]
    meshes = set()
    for kind, element in touched:
        shape = "" if kind == "tendon" else element.type.name.removeprefix("mjGEOM_")
        if kind == "tendon":
            element.width *= edit.shrink
        elif kind == "geom" and (shape not in NUMBERS or element.meshname):
            meshes.add(_mesh(spec, element, shape, edit, touched))
        else:
            size = np.array(element.size)
            size[: NUMBERS[shape]] *= edit.shrink  # with two end points given, the compiler overwrites the length
            element.size = size
    for name in meshes:
        spec.mesh(name).scale = np.array(spec.mesh(name).scale) * edit.shrink
    return touched


def _mesh(spec: Any, geom: Any, shape: str, edit: Edit, touched: list) -> str:
    """The mesh a geom has its size from; refused where shrinking that shrinks not this geom, or not this alone."""
    others = [other.name for other in spec.geoms if other.meshname == geom.meshname and ("geom", other) not in touched]
    if shape == "MESH" and not edit.frozen and not others:
        return geom.meshname
    reason = "it comes from an asset: a height field, or a mesh that the geom is fitted to"
    if shape == "MESH":
        shared = f"shared with {', '.join(map(repr, others))}, which would have to be named too"
        reason = f"it is that of the mesh {geom.meshname!r}, " + (
            shared if others else "which only physics='official' can shrink"
        )
    raise ValueError(f"DMCSubtle cannot change the size of the geom {geom.name!r}: {reason}.")


def adopt(physics: Any, before: Any, after: Any, parts: Iterable[Part]) -> None:
    """Carry over what differs between two compiled models; sizes shrink from what they are, not from the XML's."""
    model = physics.model.ptr
    old, new, now = _numbers(before), _numbers(after), _numbers(model)
    changed = {name: _differ(old[name], new[name]) for name in old}
    for part in parts:
        changed[part.field][part.index : part.index + 1][part.numbers] = False
    foreign = [name for name, where in changed.items() if _differ(now[name], old[name])[where].any()]
    if foreign:
        raise ValueError(
            f"DMCSubtle would overwrite {', '.join(foreign)} of this environment's model, which are not what its XML "
            "compiles to. Make such changes after it is put on, or use physics='frozen', which needs no change here."
        )
    for name, where in changed.items():
        now[name][where] = new[name][where]
    for name in STATISTICS:
        setattr(model.stat, name, now[name])
    for part in parts:
        part.shrink(model)
    physics._reload_from_data(physics.data)  # computes what depends on the model, and drops the renderer's copy of it


def _numbers(model: Any) -> dict[str, np.ndarray]:
    """The arrays of a compiled model, by name, and copies of its statistics."""
    values = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    return arrays | {name: np.array(getattr(model.stat, name)) for name in STATISTICS}


def _differ(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left != right) & ~((left != left) & (right != right))  # NaN equals NaN


def distance(model: Any, other: Any) -> float:
    """How many numbers differ between two compiled models; infinity for models that are not alike."""
    left, right = _numbers(model), _numbers(other)
    if model.names != other.names or any(left[name].shape != right[name].shape for name in left):
        return math.inf
    return sum(_differ(left[name], right[name]).sum() for name in left)


# -- what a user is told ----------------------------------------------------------------------------------------------


def _unknown_name(kind: str, name: str, known: Mapping[str, Any]) -> ValueError:
    elsewhere = [
        f" There is a {other} of that name: {KINDS[other]}={name!r}." for other in known if name in known[other]
    ]
    return ValueError(
        f"This environment's model has no {kind} called {name!r}.{''.join(elsewhere)}{nearest(name, known[kind])} "
        f"Its {KINDS[kind]}: {', '.join(sorted(known[kind])) or 'none that has a name'}."
    )

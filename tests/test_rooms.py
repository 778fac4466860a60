"""The walls of the house, read from every import statement: wings, rooms inside a wing, and no circle of modules."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("dreamer", "losses", "envs", "examples")
# Rooms of a wing from the ground up: a module imports from its own room and from rooms of earlier groups. A module that
# lies in the wing itself is a room of its own, and "*" are all of those that no group names.
ORDER = {
    "envs": [("base",), ("control",), ("transforms", "replay", "vector"), ("suites",), ("*",)],
    "dreamer": [("sizes",), ("networks",), ("rssm",), ("fast",), ("*",), ("classic",)],
    "losses": [("ranks", "wiring"), ("functional",), ("objectives",), ("*",)],
    "examples": [("settings",), ("cli",), ("training",), ("figures",), ("attacks", "readout", "timing"), ("*",)],
}


def modules():
    """Every module of the wings by its dotted name below r2dreamer, with its file."""
    files = [file for wing in WINGS for file in (ROOT / wing).rglob("*.py")]
    named = {file.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in named.items()}


MODULES = modules()


def imported(name, tree, known=MODULES):
    """The modules of ours that a module imports, wherever in it the statement stands."""
    package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            sources = [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            sources = [(source, [alias.name for alias in node.names])]
        else:
            continue
        for source, names in sources:
            source = source.removeprefix("r2dreamer.")
            below = {f"{source}.{each}" for each in names} & known.keys()
            if source in known and (not below or len(below) < len(names)):
                yield source
            yield from below


def graph():
    return {name: set(imported(name, ast.parse(file.read_text()))) - {name} for name, file in MODULES.items()}


GRAPH = graph()


def room(name):
    wing, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    named = any(first in rooms for rooms in ORDER[wing])
    return first if named or (ROOT / wing / first).is_dir() else "*"


def level(name):
    return next(number for number, rooms in enumerate(ORDER[name.partition(".")[0]]) if room(name) in rooms)


def circles(edges):
    """The groups of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def test_the_reader_sees_imports_in_functions_relative_ones_and_those_of_modules():
    code = (
        "def f():\n    from ..base.errors import require\nfrom ..base import gl\nimport r2dreamer.envs.replay.rings\n"
    )
    seen = set(imported("envs.suites.dmc", ast.parse(code)))
    assert seen == {"envs.base.errors", "envs.base.gl", "envs.replay.rings"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_circle_among_modules():
    assert not circles(GRAPH)


@pytest.mark.parametrize("wing", ["dreamer", "losses", "envs"])
def test_wings_never_import_each_other(wing):
    crossing = {(name, to) for name in GRAPH for to in GRAPH[name] if name.split(".")[0] == wing != to.split(".")[0]}
    assert not crossing


@pytest.mark.parametrize("wing", WINGS)
def test_every_room_has_its_place_in_the_order(wing):
    folders = {folder.name for folder in (ROOT / wing).iterdir() if any(folder.glob("*.py"))}
    assert folders <= {each for rooms in ORDER[wing] for each in rooms}


@pytest.mark.parametrize("wing", WINGS)
def test_inside_a_wing_arrows_point_down(wing):
    inside = [
        (name, to) for name in GRAPH for to in GRAPH[name] if name.startswith(f"{wing}.") and to.startswith(f"{wing}.")
    ]
    wrong = [f"{name} -> {to}" for name, to in inside if room(name) != room(to) and level(to) >= level(name)]
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("wing", WINGS)
def test_nobody_inside_a_wing_imports_what_the_wing_exports(wing):
    """A wing's __init__.py sees all its rooms; one that imports none of ours may be imported for what it sets."""
    wrong = [name for name in GRAPH if name.startswith(f"{wing}.") and wing in GRAPH[name]]
    assert not wrong or not GRAPH[wing], wrong


def test_base_never_imports_suites_and_suites_never_each_other_through_the_registry():
    assert not [to for name in GRAPH if name.startswith("envs.base") for to in GRAPH[name] if "suites" in to]
    assert not [to for to in GRAPH["envs.suites.registry"] if to.startswith("envs.suites")]

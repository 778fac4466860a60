"""What builds an agent, as data: nested dicts with `_target_`, which call functions on a list and no others."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Container, Mapping, Sequence
from types import ModuleType
from typing import Any

PACKAGE = "r2dreamer"
# What a recipe may call. Nothing here imports, opens or calls what a string names.
BUILDERS = """
    build_agent build_classic_agent projection_head classic_decoder ObservationDecoder CategoricalLatent GaussianLatent
    BlockGRU GRUCell NormGRUCell StridedEncoder next_embedding_head belief_prediction_head
""".split()  # noqa: SIM905
BUILDERS = frozenset(f"{PACKAGE}.dreamer.{name}" for name in BUILDERS)
PLAIN = (str, int, float, bool, type(None))


def construct(recipe: Any, trust: Sequence[str] = ()) -> Any:
    """Builds what nested dicts with ``_target_`` (and ``_partial_``) describe, as hydra does, from ``BUILDERS`` alone.

    trust: packages and modules outside of this one whose functions it may call, too.
    """
    if isinstance(recipe, list | tuple):
        return [construct(entry, trust) for entry in recipe]
    if not isinstance(recipe, Mapping):
        if not isinstance(recipe, PLAIN):
            raise ValueError(f"A recipe holds text, numbers, lists and dicts, and this one a {type(recipe).__name__}.")
        return recipe
    arguments = {
        name: construct(entry, trust) for name, entry in recipe.items() if name not in ("_target_", "_partial_")
    }
    if "_target_" not in recipe:
        return arguments
    target = recipe["_target_"]
    check_target(target, BUILDERS, trust)
    function = pkgutil.resolve_name(target)
    return functools.partial(function, **arguments) if recipe.get("_partial_") else function(**arguments)


def check_target(
    target: Any, allowed: Container[str], trust: Sequence[str], where: str = "_target_", remedy: str = "trust=[{!r}]"
) -> None:
    """Refuses ``"module.name"`` or ``"module:name"`` that is neither ``allowed`` nor lies in a trusted module.

    What a trusted module has only imported from elsewhere is not trusted by that, and this package never is as a whole.
    """
    if isinstance(target, str) and target in allowed:
        return
    wrong = f"{where}={target} is not part of what a saved run may call"
    if not isinstance(target, str) or _inside(target, [PACKAGE]):
        raise ValueError(f"{wrong}.")
    module = target.partition(":")[0] if ":" in target else target.rpartition(".")[0]
    if module.rpartition(".")[2][:1].isupper():  # a method, whose class lies in the module
        module = module.rpartition(".")[0]
    if _inside(module, trust):
        try:
            found = pkgutil.resolve_name(target)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{where}={target} cannot be found: {error}.") from error
        if isinstance(found, ModuleType):
            module = found.__name__
        else:
            module = getattr(found, "__module__", None) or type(found).__module__
        if _inside(module, [PACKAGE]):
            raise ValueError(f"{wrong}: it lies in {module}.")
    if not _inside(module, trust):
        ask = f": if {module} is yours, or you have read it, add {remedy.format(module)}" if module else ""
        raise ValueError(f"{wrong}{ask}.")


def _inside(module: str, packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)

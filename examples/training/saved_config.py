"""The configuration that a checkpoint holds is data: it names our own parts, and code of others only where trusted."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from r2dreamer.dreamer.recipe import BUILDERS, PLAIN, check_target
from r2dreamer.envs.suites.registry import targets

from ..settings.renamed import with_new_names

UNUSED = ("collector", "logger")  # of no use without training
LOSSES = """
    BarlowTwins CategoricalKL CopyEvery DetachedDecoder.of DreamerActorLoss DreamerCDP DreamerOptimizer DreamerPro.of DreamerValueLoss
    DynamicsActorLoss GaussianKL GroupedAdam InfoNCE NextEmbedding NoObjective NoTarget Reconstruction SIGReg
    UnitGaussian VICReg
""".split()  # noqa: SIM905
OTHERS = """
    r2dreamer.dreamer.RandomShift torch.nn.Identity torchrl.objectives.SoftUpdate
    torchrl.trainers.algorithms.DreamerV3Optimizer
""".split()  # noqa: SIM905
ALLOWED = {
    "env": targets(),
    "model": BUILDERS,
    "algorithm": {*BUILDERS, *(f"r2dreamer.losses.{name}" for name in LOSSES), *OTHERS},
}


def plain_config(config: Any, where: str | os.PathLike) -> DictConfig:
    """What train.py saves: text, numbers and flags, below names. Nothing that looks anything up as it is read.

    Former names are replaced by those of this version.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where}: its configuration is a {type(config).__name__}, and train.py saves a dict.")
    for key, value in _leaves(config):
        if not isinstance(value, PLAIN) or (isinstance(value, str) and "${" in value):
            raise ValueError(
                f"{where}: {key}={value!r} is no text, number or flag, and train.py saves nothing else in a configuration. "
                "Somebody has edited it."
            )
    return DictConfig(with_new_names(config))


def runnable_config(config: Any, where: str | os.PathLike, trust: Sequence[str] = ()) -> DictConfig:
    """What the tools instantiate an environment and an agent from: every call in it is ours or trusted."""
    if trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a module of the user's may lie
    plain = plain_config(config, where)
    for name in UNUSED:
        plain.pop(name, None)
    used: Any = OmegaConf.to_container(plain)
    for name, section in used.items():
        _check_calls(section, f"{where}: {name}", ALLOWED.get(name, ()), trust)
    return plain


def _check_calls(value: Any, where: str, allowed: Container[str], trust: Sequence[str]) -> None:
    """Refuses whatever the section would call or import, at any depth, and should not."""
    for key, entry in _entries(value):
        _check_calls(entry, f"{where}.{key}", allowed, trust)
    if not isinstance(value, dict) or "_target_" not in value:
        return
    check = lambda key, name, allowed=(): check_target(name, allowed, trust, f"{where}.{key}", "trust={}")
    target = value["_target_"]
    check("_target_", target, allowed)
    if target in allowed and "_args_" in value:
        raise ValueError(f"{where}._args_={value['_args_']} is not written by train.py. Somebody has edited the file.")
    if target == "r2dreamer.envs.make_custom":
        check("factory", value.get("factory"))
    module, colon, _ = str(value.get("task")).partition(":")
    if target == "r2dreamer.envs.make_gym" and colon and module != "r2dreamer.envs":  # Gymnasium imports that module
        check("task", f"{module}:")


def _leaves(value: Any, where: str = "config") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict | list):
        yield where, value
    for key, entry in _entries(value):
        yield from _leaves(entry, f"{where}.{key}")


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()

"""The configuration that a command line stands for, for scripts without one."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from .schema import check


def compose(*overrides: str, name: str = "config") -> DictConfig:
    """What ``python examples/train.py *overrides`` is given; ``name`` is another script's configuration."""
    begun = GlobalHydra.instance().is_initialized()  # inside of a command
    with nullcontext() if begun else hydra.initialize_config_module("r2dreamer.configs", version_base=None):
        return hydra.compose(name, list(overrides))


def configuration(*overrides: str, name: str = "config") -> DictConfig:
    """The same, checked as a command checks it.

    Example:
        >>> configuration("algorithm=dreamer", "algorithm.optimizer.lr=1e-3").algorithm.optimizer.lr
        0.001
    """
    cfg = compose(*overrides, name=name)
    check(cfg, name)
    return cfg


def entries(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry of nested dicts by its whole key, "model.belief" for example; a section before what it holds."""
    for name, value in settings.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from entries(value, f"{prefix}{name}.")

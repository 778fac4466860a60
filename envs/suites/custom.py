"""Anybody's environment on the package's contract: `make_custom("my_module:make_env", seed=0)`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torchrl.envs import EnvBase

from ..base.contract import ContractEnv, apply_contract
from .registry import register


def make_custom(factory: str | Callable, *, seed: int, task: str | None = None, **kwargs: Any) -> ContractEnv:
    """The environment that `factory(**kwargs)` returns: a TorchRL `EnvBase`, seeded.

    A missing ``is_init`` is added; `check_environment` names whatever else the contract lacks.

    Args:
        factory: A callable, or where to import one from, ``"package.module:function"``. Modules beside the script and
            in the working directory are found.
        seed: Given to the environment's ``set_seed``, and to a factory that has an argument `seed` without a value.
        task: A name for messages and metrics; default: the factory's.
        **kwargs: Arguments of the factory.

    Raises:
        ValueError: If the factory cannot be called with these arguments or returns something else.
        ImportError: If its module cannot be found.
    """
    make = factory if callable(factory) else _import(factory)
    if not callable(make):
        raise ValueError(
            f"env.factory={factory!r} is a {type(make).__name__}; it must name a function that returns one."
        )
    try:
        signature = inspect.signature(make)
        if (own := signature.parameters.get("seed")) and (own.default is own.empty or own.default is None):
            kwargs["seed"] = seed
        signature.bind(**kwargs)
    except (TypeError, ValueError) as error:  # ValueError: written in C, whose arguments nobody can tell
        given = ", ".join(f"{name}={value!r}" for name, value in kwargs.items()) or "no arguments"
        raise ValueError(
            f"env.factory={factory!r} cannot be called with {given}: {error}. What it needs is set by +env.make.NAME=VALUE."
        ) from error
    env = make(**kwargs)
    if not isinstance(env, EnvBase):
        raise ValueError(
            f"{factory} returned a {type(env).__name__}, not a TorchRL environment (torchrl.envs.EnvBase). Wrap it: "
            "torchrl.envs.GymWrapper for Gymnasium's, torchrl.envs.DMControlWrapper for dm_control's; or, if it is "
            "registered with Gymnasium, use env=gym env.task=NAME."
        )
    return apply_contract(env, task or factory, seed)


def _import(path: str) -> Any:
    path = str(path)
    module, separator, name = path.partition(":")
    if not (module and separator and name):
        raise ValueError(f'env.factory={path!r} must say "package.module:function", for example "my_module:make_env".')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if module.endswith(".py"):
            raise ImportError(f"env.factory={path!r} must name a module, without .py: {module[:-3]}:{name}.") from error
        if not f"{module}.".startswith(f"{error.name}."):
            raise ImportError(f"env.factory={path!r}: {module} needs {error.name}, which is not installed.") from error
        raise ImportError(
            f"env.factory={path!r}: {error}. The module must lie in the working directory ({os.getcwd()}), in an "
            "installed package, or on PYTHONPATH."
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in dir(found) if each[0] != "_"]  # of a lazy package, too: nothing is imported
            there = getattr(found, "__dict__", {})
            functions = [each for each in public if each not in there or callable(there[each])]
            shown = ", ".join(difflib.get_close_matches(part, public) or functions[:8]) or "no functions"
            holder = getattr(found, "__name__", type(found).__name__)
            raise ValueError(f"env.factory={path!r}: {holder} has no {part!r}. It has: {shown}.")
        found = getattr(found, part)
    return found


register("custom", title="Your own TorchRL environment", make=make_custom, tasks=tuple, module="")

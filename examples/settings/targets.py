"""The classes and functions that sections name in `_target_`: which arguments they take, and of which kind."""

from __future__ import annotations

import inspect
import logging
import types
import typing
from collections.abc import Callable, Collection

import hydra

from .kinds import Kind, any_of, anything, choice, flag, number, say, text, whole

# Arguments that our scripts pass on, by section; elsewhere hydra says what is missing.
PASSED = {"env.make.": {"seed"}, "env.make_evaluation.": {"seed"}, "model.": {"observations", "actions"}}
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it prints what it raises
OURS = ("r2dreamer.", "torchrl.", "torch.nn.")


class SettingError(ValueError):
    """A setting that cannot be used: names its key, its value and what is expected."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


class Target:
    """What a section names in `_target_`, and the arguments it takes.

    arguments: their annotations, by name. required: those without a default.
    open: whether it takes arguments that its signature does not name.
    """

    def __init__(self, key: str, name: object):
        self.name, self.ours = str(name), str(name).startswith(OURS)
        self.arguments, self.required, self.open = {}, [], True
        try:
            self.found = hydra.utils.get_object(self.name)
        except Exception as error:
            cause = error.__cause__ or error
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[-1].rstrip(".")
            message = f"{key}._target_={say(name)} cannot be imported: {reason}. Say package.module.name."
            raise SettingError(f"{key}._target_", message) from error
        if not callable(self.found):
            raise SettingError(f"{key}._target_", f"{key}._target_={self.name} must be a class or a function.")
        for depth, make in enumerate(self.makers()):
            try:
                parameters = inspect.signature(make).parameters.values()
            except (TypeError, ValueError):  # written in C
                return
            try:
                annotations = typing.get_type_hints(make)
            except Exception:  # of names that only a type checker imports
                annotations = {}
            named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
            named = [each for each in named if each.name != "self"]
            self.arguments = {each.name: annotations.get(each.name, object) for each in named} | self.arguments
            if not depth:  # a class may itself give what its base requires
                self.required = [each.name for each in named if each.default is each.empty]
            if all(each.kind is not each.VAR_KEYWORD for each in parameters):
                self.open = False
                return

    def makers(self) -> list[Callable]:
        """The function and, where it may pass arguments on, what it passes them to: a class's constructor and its bases'."""
        owner = getattr(self.found, "__self__", None)  # of a classmethod
        cls = next((each for each in (self.found, owner) if isinstance(each, type)), object)
        constructors = [each.__init__ for each in cls.__mro__[:-1]]
        return constructors if cls is self.found else [self.found, *constructors]

    def require(self, prefix: str, given: Collection[str]) -> None:
        """Refuses a section that lacks an argument which nobody else passes."""
        for name in self.required if prefix in PASSED else ():
            if name not in given and name not in PASSED[prefix]:
                raise SettingError(
                    f"{prefix}{name}", f"{prefix}{name} is missing, which {self.name} needs: add +{prefix}{name}=VALUE."
                )


def annotated(annotation: object) -> Kind:
    """The kind that a type annotation names; anything where it names none that can be told from YAML."""
    simple = {int: whole(-(2**63)), float: number(), bool: flag, str: text, type(None): Kind("null", choice(None).read)}
    if annotation in simple:
        return simple[annotation]
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return choice(*parts)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) and all(part in simple for part in parts):
        return any_of(*(simple[part] for part in parts))
    return anything

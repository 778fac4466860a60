"""The classes and functions that sections name in `_target_`: which arguments they take, and of which kind."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Collection

import hydra

from .kinds import Kind, any_of, anything, choice, flag, number, say, text, whole

# Arguments that our scripts pass on, by section; elsewhere hydra says what is missing.
PASSED = {"env.make.": {"seed"}, "env.make_evaluation.": {"seed"}, "model.": {"observations", "actions"}}
OURS = ("r2dreamer.", "support.", "torchrl.", "torch.nn.")


class SettingError(ValueError):
    """A setting that cannot be used: names its key, its value and what is expected."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


class Target:
    """What a section names in `_target_`, and the arguments it takes."""

    def __init__(self, key: str, name: object):
        self.name, self.ours = str(name), str(name).startswith(OURS)
        try:
            self.found = hydra.utils.get_object(self.name)
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            raise SettingError(
                f"{key}._target_", f"{key}._target_={say(name)} cannot be imported: {reason} Say package.module.name."
            ) from error
        if not callable(self.found):
            raise SettingError(f"{key}._target_", f"{key}._target_={self.name} must be a class or a function.")
        self.arguments, self.required, self.open = (
            {},
            [],
            True,
        )  # open: takes arguments that its signature does not name
        owner = getattr(self.found, "__self__", None)  # of a classmethod, which may pass arguments on
        classes = self.found if isinstance(self.found, type) else owner if isinstance(owner, type) else object
        makers = [each.__init__ for each in classes.__mro__[:-1]]
        for make in makers if classes is self.found else [self.found, *makers]:
            try:
                parameters = inspect.signature(make).parameters
            except (TypeError, ValueError):  # of C
                return
            try:
                types_named = typing.get_type_hints(make)
            except Exception:  # of names that only a type checker imports
                types_named = {}
            self.required += [
                name
                for name, each in parameters.items()
                if each.default is each.empty and each.kind is not each.VAR_POSITIONAL
            ]
            new = {name: types_named.get(name, object) for name in parameters if name not in ("self", "args", "kwargs")}
            self.arguments = new | self.arguments
            if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                self.open = False
                return

    def require(self, prefix: str, given: Collection[str]) -> None:
        """Refuses a section that lacks an argument which nobody else passes."""
        if self.open or prefix not in PASSED:
            return
        for name in self.required:
            if name != "self" and name not in given and name not in PASSED[prefix]:
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

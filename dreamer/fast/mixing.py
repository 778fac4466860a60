"""Puts faster methods before plain ones: a module's class becomes a class of a mixin and the plain class."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping

from torch import nn


class Fast(nn.Module):
    """Base of all mixins. Parameters keep their names; copies and pickles keep the mixins."""

    def __reduce_ex__(self, protocol):
        return _rebuild, type(self).made_of, self.__dict__


@functools.cache
def _mixed(plain: type, *mixins: type) -> type:
    """``plain`` with ``mixins`` before it, the last one first."""
    if not mixins:
        return plain
    name, bases = f"{mixins[-1].__name__}{plain.__name__}", (mixins[-1], _mixed(plain, *mixins[:-1]))
    return types.new_class(name, bases, exec_body=lambda body: body.update(made_of=(plain, *mixins)))


def _rebuild(*made_of: type) -> nn.Module:
    return object.__new__(_mixed(*made_of))


def mix_in(modules: Iterable[nn.Module], mixins: Mapping[type, type]) -> None:
    """Gives a module whose plain class is in ``mixins`` that class's mixin; subclasses of a plain class stay as they are."""
    for module in modules:
        made_of = getattr(type(module), "made_of", (type(module),))
        mixin = mixins.get(made_of[0])
        if mixin is not None and mixin not in made_of:
            module.__class__ = _mixed(*made_of, mixin)

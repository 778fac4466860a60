"""Puts faster methods before plain ones: a module's class becomes a subclass of it."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Sequence

from torch import nn


class Fast(nn.Module):
    """First base of all mixins; the last base is the plain class. Copies and pickles keep the mixins.

    A mixin overrides methods and adds no parameters. Where it cannot help, it calls the method of ``super()``.
    """

    made_of: tuple[type, ...]

    def __reduce_ex__(self, protocol):
        return _rebuild, self.made_of, self.__dict__


@functools.cache
def _mixed(plain: type, *mixins: type) -> type:
    """``plain`` with ``mixins`` before it, the last one first."""
    if not mixins:
        return plain
    bases = (mixins[-1], _mixed(plain, *mixins[:-1]))
    return types.new_class(mixins[-1].__name__, bases, exec_body=lambda body: body.update(made_of=(plain, *mixins)))


def _rebuild(*made_of: type) -> nn.Module:
    return object.__new__(_mixed(*made_of))


def mix_in(modules: Iterable[nn.Module], mixins: Sequence[type]) -> None:
    """Gives each module of a mixin's plain class that mixin; subclasses of a plain class stay as they are."""
    of = {mixin.__bases__[-1]: mixin for mixin in mixins}
    for module in modules:
        made_of = getattr(type(module), "made_of", (type(module),))
        mixin = of.get(made_of[0])
        if mixin is not None and mixin not in made_of:
            module.__class__ = _mixed(*made_of, mixin)

"""torch.compile for parts of a model: each part once per shape, with randomness and loops outside.

A graph of the whole update would unroll the sequence and the imagination, and take minutes to build. The parts take
seconds. No sampling is inside them, so a compiled run draws the same random numbers as an eager one.
"""

from __future__ import annotations

import torch
from torch import nn

RECOMPILE_LIMIT = 64


def compile_parts(*roots: nn.Module, **options) -> None:
    """Compiles in place the methods that classes at and below ``roots`` name in ``compiles``.

    ``compiles = ("forward",)`` makes a class of your own such a part. Of :class:`RSSMRollout` the step is compiled. Copy
    modules before: a copy of a compiled module would run the original.

    Args:
        *roots: modules whose parts are compiled.
        options: for ``torch.compile``.
    """
    options.setdefault("dynamic", False)
    # Dynamo counts compilations by function. All heads share one, in the shapes of records and of imagined steps, and
    # beyond the limit Dynamo leaves the rest uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for module in dict.fromkeys(module for root in roots for module in root.modules()):
        # Asked of the class: an instance of TensorDictModule also has the attributes of what it wraps.
        for name in getattr(type(module), "compiles", ()):
            if name == "forward":
                module.compile(**options)
            else:
                setattr(module, name, torch.compile(getattr(module, name), **options))

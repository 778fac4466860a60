"""torch.compile for the parts where it pays: each part once per shape, randomness and loops stay outside.

Compiling a whole update unrolls the sequence and the imagination into one graph, which takes minutes to build; the parts
take seconds, and since no sampling is inside them a compiled run draws the same random numbers as an eager one.
"""

from __future__ import annotations

import torch
from torch import nn

RECOMPILE_LIMIT = 64


def compile_parts(*roots: nn.Module, **options) -> None:
    """Compiles, in place, the methods that modules below ``roots`` name in ``compiles``; ``options`` go to ``torch.compile``.

    ``compiles = ("forward",)`` in a class of your own makes it such a part. What is compiled of :class:`RSSMRollout` is its
    step: it must be among or below the roots for that to be one whole. A copy of a compiled module would run the original:
    copy before.
    """
    options.setdefault("dynamic", False)
    # Dynamo counts what it compiled by function, and all heads share one, each in the shapes of records and of imagined
    # steps; beyond its limit it leaves the rest uncompiled, with a warning.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for module in dict.fromkeys(module for root in roots for module in root.modules()):
        # Its class's: a TensorDictModule has the attributes of what it wraps as well.
        for name in getattr(type(module), "compiles", ()):
            if name == "forward":
                module.compile(**options)
            else:
                setattr(module, name, torch.compile(getattr(module, name), **options))

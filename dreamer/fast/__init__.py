"""What exists for speed only. Nothing in the model imports it; :func:`speed_up` puts it onto plain layers.

Each trick has a file of its own. It can be left out, timed and deleted by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from . import convolutions, deferred, norms, softmax
from .mixing import mix_in

TRICKS = {
    "deferred": deferred.MIXINS,
    "norms": norms.MIXINS,
    "softmax": softmax.MIXINS,
    "convolutions": convolutions.MIXINS,
}


def speed_up(*roots: nn.Module, tricks: Iterable[str] = tuple(TRICKS)) -> None:
    """Puts ``tricks`` onto the modules at and below ``roots``, in place; what they compute stays the same to rounding.

    Example:
        >>> from r2dreamer.dreamer.networks.layers import normed_linear
        >>> layer = normed_linear(3, 2)
        >>> speed_up(layer, tricks=["norms"])
        >>> type(layer[1]).__name__
        'BlockedNorm'
    """
    tricks = [tricks] if isinstance(tricks, str) else tricks
    unknown = set(tricks) - set(TRICKS)
    if unknown:
        raise ValueError(f"fast names {', '.join(sorted(unknown))}, and the tricks are {', '.join(TRICKS)}.")
    modules = dict.fromkeys(module for root in roots for module in root.modules())
    for name in tricks:
        mix_in(modules, TRICKS[name])

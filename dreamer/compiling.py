"""torch.compile for the parts where it pays: each part once per shape, randomness and loops stay outside.

Compiling a whole update unrolls the sequence and the imagination into one graph, which takes minutes to build; the parts
take seconds, and since no sampling is inside them a compiled run draws the same random numbers as an eager one.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from .classic_networks import ConvDecoder, ConvEncoder, ELUVectorEncoder, GRUCore
from .decoders import ImageDecoder
from .encoders import ImageEncoder, VectorEncoder
from .heads import FeatureMLP, ProjectionHead
from .latents import CategoricalLatent
from .rollout import RSSMRollout
from .rssm import BlockGRU, RSSMPosterior, RSSMPrior

RECOMPILE_LIMIT = 64
WHOLE = (
    *(ImageEncoder, VectorEncoder, ImageDecoder, FeatureMLP, ProjectionHead),
    *(ConvEncoder, ELUVectorEncoder, ConvDecoder),
)


def compile_parts(*roots: nn.Module, **options) -> None:
    """Compiles, in place, every encoder, decoder, recurrent step and head below ``roots``; ``options`` go to ``torch.compile``.

    :class:`RSSMRollout` must be among or below them for its step to be one whole. A copy of a compiled module would run the
    original: copy before.
    """
    options.setdefault("dynamic", False)
    # Dynamo counts what it compiled by function, and all heads share one, each in the shapes of records and of imagined
    # steps; beyond its limit it leaves the rest uncompiled, with a warning.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    compiled = functools.partial(torch.compile, **options)
    for module in dict.fromkeys(module for root in roots for module in root.modules()):
        if isinstance(module, WHOLE):
            module.compile(**options)
        elif isinstance(module, RSSMRollout):
            module.step = compiled(module.step)
        elif isinstance(module, BlockGRU | GRUCore):
            module.advance = compiled(module.advance)
        elif isinstance(module, RSSMPosterior):
            module.logits = compiled(module.logits)
        elif isinstance(module, RSSMPrior):
            module.head.compile(**options)
        elif isinstance(module, CategoricalLatent):
            module.draw = compiled(module.draw)

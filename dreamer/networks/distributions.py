"""Action distributions: a bounded, unsquashed Normal, and one-hot with a uniform mix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributions as D


def unimix_probs(logits: torch.Tensor, unimix: float) -> torch.Tensor:
    """Softmax in float32, mixed with ``unimix`` of the uniform distribution: no class ever has probability 0.

    Args:
        logits: [..., K].
        unimix: share of the uniform distribution.
    """
    probs = torch.softmax(logits.float(), -1)
    return (1 - unimix) * probs + unimix / logits.shape[-1] if unimix else probs


class BoundedNormal(D.Independent):
    """Diagonal Normal whose mean lies in (-1, 1) and std in [0.1, 1]; not squashed: the environment clips.

    Args:
        loc: means [..., A].
        scale: standard deviations [..., A].
    """

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor):
        super().__init__(D.Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> BoundedNormal:
        shape = (*batch_shape, *self.event_shape)
        return type(self)(self.base_dist.loc.expand(shape), self.base_dist.scale.expand(shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> torch.Tensor:
        """Draws as torch does, without its check of the scales, for which a CUDA graph cannot wait."""
        with torch.no_grad():
            return self.rsample(torch.Size(sample_shape))

    @property
    def deterministic_sample(self) -> torch.Tensor:
        return self.mean


class OneHotAction(D.OneHotCategorical):
    """One-hot categorical given by probabilities that already hold their uniform mix; samples are float.

    Args:
        probs: probabilities [..., A].
    """

    def __init__(self, probs: torch.Tensor):
        super().__init__(probs=probs, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> OneHotAction:
        return type(self)(self.probs.expand(*batch_shape, *self.event_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> torch.Tensor:
        """Draws as torch does, without its check of the probabilities (CUDA graphs); NaN stays NaN."""
        probs = self.probs.detach().expand(*sample_shape, *self.probs.shape)
        exponential = torch.empty_like(probs, memory_format=torch.contiguous_format).exponential_()
        index = (probs / exponential).argmax(-1, keepdim=True)
        return torch.zeros_like(exponential).scatter_(-1, index, 1.0) + (probs - probs)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return (value.float() * self.logits).sum(-1)

    @property
    def deterministic_sample(self) -> torch.Tensor:
        return self.mode

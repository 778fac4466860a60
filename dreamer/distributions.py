"""Action distributions: a bounded, unsquashed Normal, and one-hot with a uniform mix."""

from __future__ import annotations

import torch
from torch import distributions as D


class BoundedNormal(D.Independent):
    """Diagonal Normal whose mean lies in (-1, 1) and std in [0.1, 1]; not squashed: the environment clips."""

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor):
        super().__init__(D.Normal(loc, scale, validate_args=False), 1, validate_args=False)

    @property
    def deterministic_sample(self) -> torch.Tensor:
        return self.mean


class OneHotAction(D.OneHotCategorical):
    """One-hot categorical given by probabilities that already hold their uniform mix; samples are float."""

    def __init__(self, probs: torch.Tensor):
        super().__init__(probs=probs, validate_args=False)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return (value.float() * self.logits).sum(-1)

    @property
    def deterministic_sample(self) -> torch.Tensor:
        return self.mode

"""The stochastic latent z_t: S categoricals of K classes, sampled straight-through, or a Gaussian (Dreamer V1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..networks.distributions import unimix_probs


class CategoricalLatent(nn.Module):
    """S independent one-hot categoricals with a uniform mix; what prior and posterior need to know of z_t.

    Flat logits [..., S*K] -> :meth:`logits` [..., S, K] -> :meth:`sample` [..., S*K], one-hot in value, with the
    gradient of the probabilities (straight-through).

    Args:
        num_categoricals: S.
        num_classes: K.
        unimix: share of the uniform distribution.
    """

    compiles = ("draw",)
    categorical = True

    def __init__(self, num_categoricals: int = 32, num_classes: int = 32, unimix: float = 0.01):
        super().__init__()
        if num_categoricals < 1:
            raise ValueError(f"num_categoricals must be positive, got {num_categoricals}.")
        if num_classes < 2:
            raise ValueError(
                f"num_classes={num_classes}: categoricals of a single class are constant and know nothing; give at least "
                "2 (Dreamer V1's sizes, classes=1, belong to its Gaussian state)."
            )
        if not 0 <= unimix < 1:
            raise ValueError(f"unimix must be in [0, 1), got {unimix}.")
        self.num_categoricals, self.num_classes, self.unimix = num_categoricals, num_classes, unimix
        self.size = self.logits_size = num_categoricals * num_classes

    def logits(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.float().unflatten(-1, (self.num_categoricals, self.num_classes))  # [..., S, K]

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return self.draw(logits, self.noise(logits.shape[:-2], logits.device))

    def noise(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """What :meth:`draw` takes for logits [*shape, S, K]: one uniform per categorical, cheaper than Gumbels per class."""
        return torch.rand(*shape, self.num_categoricals, device=device)

    def draw(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """The inverse transform of uniform noise."""
        probs = self.probs(logits)  # [..., S, K]
        index = (probs.detach().cumsum(-1) <= uniform.unsqueeze(-1)).sum(-1, keepdim=True)
        one_hot = torch.zeros_like(probs).scatter_(-1, index.clamp_max(self.num_classes - 1), 1.0)
        # Added in this order the value stays exactly one-hot; the gradient is that of the probabilities.
        return (one_hot + (probs - probs.detach()) if probs.requires_grad else one_hot).flatten(-2)  # [..., S*K]

    def probs(self, logits: torch.Tensor) -> torch.Tensor:
        return unimix_probs(logits, self.unimix)

    def mode(self, logits: torch.Tensor) -> torch.Tensor:
        index = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, index, 1.0).flatten(-2)

    def expected(self, logits: torch.Tensor) -> torch.Tensor:
        """The mean of what is sampled."""
        return self.probs(logits).flatten(-2)


class GaussianLatent(nn.Module):
    """A diagonal Gaussian of S*K dimensions in the place of S categoricals of K classes: the state of Dreamer V1.

    Flat outputs [..., 2*S*K] -> :meth:`logits` [..., S*K, 2], mean and standard deviation (softplus + ``min_std``) ->
    :meth:`sample` [..., S*K], reparameterised.

    Args:
        num_categoricals: S.
        num_classes: K.
        min_std: smallest standard deviation.
    """

    categorical = False

    def __init__(self, num_categoricals: int = 30, num_classes: int = 1, min_std: float = 0.1):
        super().__init__()
        if min_std <= 0:
            raise ValueError(f"min_std={min_std} must be positive: a Gaussian of no width has an infinite divergence.")
        self.size, self.min_std = num_categoricals * num_classes, min_std
        self.logits_size = 2 * self.size

    def logits(self, flat: torch.Tensor) -> torch.Tensor:
        loc, scale = flat.float().chunk(2, -1)
        return torch.stack([loc, torch.nn.functional.softplus(scale) + self.min_std], -1)  # [..., S*K, 2]

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        return self.draw(logits, self.noise(logits.shape[:-2], logits.device))

    def noise(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """What :meth:`draw` takes for logits [*shape, S*K, 2]."""
        return torch.randn(*shape, self.size, device=device)

    def draw(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        loc, scale = logits.unbind(-1)
        return loc + scale * noise

    def mode(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., 0]

    expected = mode


Latent = CategoricalLatent | GaussianLatent

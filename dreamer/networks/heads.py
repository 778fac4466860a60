"""What reads the latents: projection, reward, continue, value and actor heads.

Each function returns a TensorDictModule on the key contract; ``prefix=("next",)`` makes the twin that training reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules import SymExpTwoHot

from ..sizes import Sizes
from .distributions import BoundedNormal, OneHotAction, unimix_probs
from .layers import Linear, mlp


class FeatureMLP(nn.Module):
    """MLP over the concatenated latents [state, belief]; float32 out, whatever autocast computes in.

    Args:
        features: size of state and belief together.
        units: width of the hidden layers.
        layers: number of them.
        out_features: size of the output.
        scale: of the output layer's first weights.
        make_layers: builds the stack: ``mlp`` or ``elu_mlp``.
    """

    compiles = ("forward",)

    num_bins = 1

    def __init__(
        self,
        features: int,
        units: int,
        layers: int,
        out_features: int,
        scale: float = 1.0,
        make_layers: Callable[..., nn.Sequential] = mlp,
    ):
        super().__init__()
        self.layers = make_layers(features, units, layers, out_features, scale=scale)

    @staticmethod
    def keys(name: str) -> list[str]:
        """The keys that a prediction of ``name`` is written to."""
        return [name]

    def forward(self, state: torch.Tensor, belief: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([state, belief.to(state.dtype)], -1)).float()


class TwoHotMLP(FeatureMLP):
    """Logits [..., bins] over symexp-spaced values, and their expectation [..., 1] (exactly 0 at initialisation).

    Args:
        features: size of state and belief together.
        units: width of the hidden layers.
        layers: number of them.
        num_bins: number of values.
    """

    def __init__(self, features: int, units: int, layers: int, num_bins: int = 255):
        super().__init__(features, units, layers, num_bins, scale=0.0)
        self.two_hot, self.num_bins = SymExpTwoHot(num_bins), num_bins

    @staticmethod
    def keys(name: str) -> list[str]:
        return [f"{name}_logits", name]

    def forward(self, state: torch.Tensor, belief: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(state, belief)
        return logits, self.two_hot(logits)


class ProjectionHead(nn.Module):
    """k_t = P(h_t, z_t): one bias-free Linear from the latents to the size of the embedding.

    Args:
        features: size of state and belief together.
        embedding_size: size of the output.
        layers: normed linears before the output; the paper has none.
        units: width of those.
    """

    compiles = ("forward",)

    def __init__(self, features: int, embedding_size: int, *, layers: int = 0, units: int | None = None):
        super().__init__()
        if layers < 0 or (layers and not units):
            raise ValueError(
                f"layers={layers} must not be negative, and with layers give units, their width (it is {units})."
            )
        width = units if layers and units else features
        self.hidden = mlp(features, width, layers)
        self.linear = Linear(width, embedding_size, bias=False)

    def forward(self, state: torch.Tensor, belief: torch.Tensor) -> torch.Tensor:
        return self.linear(self.hidden(torch.cat([state, belief.to(state.dtype)], -1)))


class NormalParameters(nn.Module):
    """Network output [..., 2A] -> mean = tanh(.), std = 0.9 sigmoid(. + 2) + 0.1."""

    keys = ("loc", "scale")

    def forward(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, scale = parameters.chunk(2, -1)
        return torch.tanh(loc), 0.9 * torch.sigmoid(scale + 2) + 0.1


class OneHotParameters(nn.Module):
    """Network output [..., A] -> probabilities with a uniform mix.

    Args:
        unimix: share of the uniform distribution.
    """

    keys = ("probs",)

    def __init__(self, unimix: float = 0.01):
        super().__init__()
        self.unimix = unimix

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return unimix_probs(logits, self.unimix)


Parameters = NormalParameters | OneHotParameters


class ActorNetwork(FeatureMLP):
    """MLP over the latents whose last layer is scaled by 0.01, then the distribution's parameters."""

    def __init__(self, features: int, units: int, layers: int, action_size: int, parameters: Parameters, **options):
        super().__init__(features, units, layers, len(parameters.keys) * action_size, scale=0.01, **options)
        self.to_parameters = parameters

    def forward(self, state: torch.Tensor, belief: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self.to_parameters(super().forward(state, belief))


def latent_head(
    network: nn.Module,
    out_keys: Sequence[str],
    *,
    prefix: tuple[str, ...] = (),
    in_keys: Sequence[NestedKey] = ("state", "belief"),
) -> TensorDictModule:
    """Wraps a network over (state, belief), at the root for imagination or below ``prefix`` for training.

    Args:
        network: called with the entries of ``in_keys``.
        out_keys: names of its outputs.
        prefix: where all entries are nested.
        in_keys: names of its inputs.
    """
    place = lambda key: (*prefix, key) if prefix else key
    return TensorDictModule(network, in_keys=[place(k) for k in in_keys], out_keys=[place(k) for k in out_keys])


def projection_head(sizes: Sizes, *, layers: int = 0, size: int | None = None) -> TensorDictModule:
    """The projection ``("next", "projected_latents")`` as a head of ``build_agent``.

    Args:
        sizes: of the agent.
        layers: as in :class:`ProjectionHead`.
        size: of the projection. Default: that of the embedding.
    """
    network = ProjectionHead(sizes.features, size or sizes.embedding, layers=layers, units=sizes.units)
    return latent_head(network, ["projected_latents"], prefix=("next",))


def probabilistic_head(network: ActorNetwork, distribution: type) -> ProbabilisticTensorDictSequential:
    """A policy over latents: ``network`` writes the distribution's parameters, then an action is drawn."""
    keys: Any = list(network.to_parameters.keys)
    draw = ProbabilisticTensorDictModule(
        in_keys=keys,
        out_keys=["action"],
        distribution_class=distribution,
        default_interaction_type=InteractionType("random"),
    )
    return ProbabilisticTensorDictSequential([latent_head(network, keys), draw])


def actor_head(features: int, units: int, layers: int, action_size: int, *, discrete: bool, unimix: float = 0.01):
    """The policy over latents, state and belief -> action, with ``get_dist`` as TorchRL's losses expect.

    Continuous: :class:`BoundedNormal`; discrete: :class:`OneHotAction`. The output layer is scaled by 0.01, so that an
    untrained policy explores everything.

    Args:
        features: size of state and belief together.
        units: width of the hidden layers.
        layers: number of them.
        action_size: entries of an action.
        discrete: whether an action is a choice, one-hot.
        unimix: share of the uniform distribution among choices.
    """
    parameters = OneHotParameters(unimix) if discrete else NormalParameters()
    network = ActorNetwork(features, units, layers, action_size, parameters)
    return probabilistic_head(network, OneHotAction if discrete else BoundedNormal)

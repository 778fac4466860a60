"""The recurrent state-space model.

    h_t = f(h_{t-1}, z_{t-1}, a_{t-1})      belief, deterministic
    z_t ~ p(z_t | h_t)                      prior, what imagination and the KL use
    z_t ~ q(z_t | h_t, e_t)                 posterior, what an observation tells

Both modules take and return what TorchRL's ``RSSMPriorV3`` and ``RSSMPosteriorV3`` do, so they are interchangeable.
Beyond that they offer their work in two halves: what depends on the recurrence, and what :class:`RSSMRollout` does
once for a whole sequence (projections of actions and embeddings, prior logits).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from ..networks.layers import BlockLinear, Linear, NormSiLU, bounded, mlp, normed_linear, split_linear
from .latents import Latent


def namesake(init: Callable[..., None]) -> Callable[..., None]:
    """For a class whose name TorchRL uses for Dreamer V1: the error of wrong arguments names the right import."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: nn.Module, *args: object, **kwargs: object) -> None:
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError as error:
            name, mine = type(self).__name__, [*signature.parameters][1:]
            unknown = f" (got {', '.join(kwargs.keys() - set(mine))})" if kwargs.keys() - set(mine) else ""
            raise TypeError(
                f"{error}: r2dreamer.dreamer.{name} takes {', '.join(mine)}{unknown}.\n"
                f"TorchRL's {name} is another class (Dreamer V1): from torchrl.modules import {name}."
            ) from None
        init(self, *args, **kwargs)

    return checked


class BlockGRU(nn.Module):
    """Gated recurrent cell with block-diagonal weights: (state, belief, action) -> belief.

    Belief, state and action each pass Linear -> RMSNorm -> SiLU to ``hidden``. Every block sees all three beside its own
    slice of the belief; since the three are the same for every block, that part is one dense Linear, nothing is copied.

    Args:
        state_size: size of the state (stochastic latent).
        action_size: entries of an action.
        belief_size: size of the belief (deterministic latent).
        hidden: width of the three inputs' layers.
        num_blocks: of the block-diagonal weights; divides ``belief_size``.
    """

    compiles = ("advance",)

    def __init__(self, state_size: int, action_size: int, belief_size: int, hidden: int, num_blocks: int = 8):
        super().__init__()
        if belief_size % num_blocks:
            raise ValueError(f"belief_size={belief_size} must be divisible by num_blocks={num_blocks}.")
        self.belief_size, self.action_size, self.num_blocks = belief_size, action_size, num_blocks
        self.belief_in = normed_linear(belief_size, hidden)
        self.state_in = normed_linear(state_size, hidden)
        self.action_in = normed_linear(action_size, hidden)
        self.hidden = BlockLinear(belief_size, belief_size, num_blocks, shared_features=3 * hidden)
        self.norm = NormSiLU(belief_size)
        self.gates = BlockLinear(belief_size, 3 * belief_size, num_blocks)

    def project_action(self, action: torch.Tensor) -> torch.Tensor:
        """The branch of the action [..., A] -> [..., hidden], which no recurrence touches."""
        if action.shape[-1] != self.action_size:
            raise ValueError(
                f"The action has shape {list(action.shape)}; expected {self.action_size} numbers in its last dimension. "
                "A choice is one-hot: categorical_action_encoding=False of TorchRL's environments."
            )
        return self.action_in(bounded(action.float()))

    def advance(self, state: torch.Tensor, belief: torch.Tensor, projected_action: torch.Tensor) -> torch.Tensor:
        shared = torch.cat([self.belief_in(belief), self.state_in(state), projected_action], -1)  # [..., 3*hidden]
        hidden = self.norm(self.hidden(belief, shared))  # [..., D]
        return self.gate(self.gates(hidden), belief)

    def gate(self, gates: torch.Tensor, belief: torch.Tensor) -> torch.Tensor:
        gates = gates.float().unflatten(-1, (self.num_blocks, 3, -1))  # [..., G, 3, D/G]
        reset, candidate, update = (gate.flatten(-2) for gate in gates.unbind(-2))  # each [..., D]
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        return torch.lerp(belief, candidate, update)

    def forward(self, state: torch.Tensor, belief: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.advance(state, belief, self.project_action(action))


def check_core(core: nn.Module, state_size: int, belief_size: int, action_size: int) -> None:
    """Refuses a core that does not map (state, belief, action) to the next belief."""
    name = f"The recurrent core {type(core).__name__} (model.core)"
    with torch.no_grad():
        try:
            belief = core(*(torch.zeros(2, size) for size in (state_size, belief_size, action_size)))
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{name} fails on state [..., {state_size}], belief [..., {belief_size}], action [..., {action_size}]: {error}\n"
                "Its forward takes (state, belief, action) and returns the next belief."
            ) from error
    if not isinstance(belief, torch.Tensor) or belief.shape != (2, belief_size):
        found = f"shape {tuple(belief.shape)}" if isinstance(belief, torch.Tensor) else type(belief).__name__
        raise ValueError(
            f"{name} returns {found} for two rows; it must return the next belief, shape (2, {belief_size})."
        )
    if hasattr(core, "project_action") != hasattr(core, "advance"):
        raise ValueError(f"{name} has only one of project_action and advance, which belong together. Add the other.")


class RSSMPrior(nn.Module):
    """p(z_t | h_t) and the recurrence before it: (state, belief, action) -> (prior logits, state, belief).

    Args:
        core: (state, belief, action) -> belief. ``project_action(action)`` and ``advance(state, belief, projected)``,
            its two halves, are optional: a sequence projects all actions at once.
        latent: the distribution of z_t; offers ``noise`` and ``draw``.
        hidden: width of the MLP from belief to logits.
        layers: number of its hidden layers.
        make_layers: builds it: ``mlp`` or ``elu_mlp``.
        belief_size: of the core's belief; by default ``core.belief_size``.
    """

    compiles = ("predict", "logits")

    @namesake
    def __init__(
        self,
        core: nn.Module,
        latent: Latent,
        hidden: int,
        layers: int = 2,
        make_layers: Callable[..., nn.Sequential] = mlp,
        belief_size: int | None = None,
    ):
        super().__init__()
        self.core, self.latent = core, latent
        self.head = make_layers(belief_size or core.belief_size, hidden, layers, latent.logits_size)

    def project_action(self, action: torch.Tensor) -> torch.Tensor:
        """The action as :meth:`advance` takes it; nothing in it depends on the recurrence."""
        project = getattr(self.core, "project_action", None)
        return action.float() if project is None else project(action)

    def advance(self, state: torch.Tensor, belief: torch.Tensor, projected_action: torch.Tensor) -> torch.Tensor:
        advance = getattr(self.core, "advance", self.core)
        return advance(state, belief, projected_action)

    def logits(self, belief: torch.Tensor) -> torch.Tensor:
        return self.latent.logits(self.head(belief))  # [..., S, K]

    def forward(
        self, state: torch.Tensor, belief: torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.predict(state, belief, action, self.latent.noise(belief.shape[:-1], belief.device))

    def predict(
        self, state: torch.Tensor, belief: torch.Tensor, action: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """:meth:`forward`, its randomness given."""
        belief = self.core(state, belief, action)
        logits = self.logits(belief)
        return logits, self.latent.draw(logits, noise), belief


class RSSMPosterior(nn.Module):
    """q(z_t | h_t, e_t): (belief, embedding) -> (posterior logits, state), one hidden layer.

    The hidden layer's Linear over [belief, embedding] is held as two, so that a sequence projects its embeddings once.

    Args:
        belief_size: size of the belief (deterministic latent).
        embedding_size: size of the embedding.
        latent: the distribution of z_t; offers ``logits`` and ``sample``.
        hidden: width of the hidden layer.
        norm: follows the hidden layer's Linear. Default: RMSNorm and SiLU.
    """

    compiles = ("logits",)

    @namesake
    def __init__(
        self, belief_size: int, embedding_size: int, latent: Latent, hidden: int, norm: nn.Module | None = None
    ):
        super().__init__()
        self.latent = latent
        self.belief_in, self.embedding_in = split_linear(belief_size, embedding_size, hidden)
        self.norm = NormSiLU(hidden) if norm is None else norm
        self.out = Linear(hidden, latent.logits_size)

    def joint_parameters(self) -> tuple[torch.Tensor, ...]:
        return self.belief_in.weight, self.embedding_in.weight

    def project_embedding(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.embedding_in(embedding)  # [..., hidden]

    def logits(self, belief: torch.Tensor, projected_embedding: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.belief_in(belief) + projected_embedding)
        return self.latent.logits(self.out(hidden))  # [..., S, K]

    def forward(self, belief: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits(belief, self.project_embedding(embedding))
        return logits, self.latent.sample(logits)

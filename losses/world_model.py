"""The world-model loss: representation objective + KL + reward + continue.

L = L_objective(k, sg e) + 1.0 max(1, KL(sg q || p)) + 0.1 max(1, KL(q || sg p)) - ln p(r) - ln p(continue)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.objectives.common import LossModule

from .kl import CategoricalKL
from .likelihood import ScalarPrediction
from .representation import BarlowTwins


class R2DreamerWorldModelLoss(LossModule):
    """Trains a world model on records [B, T]; takes the place of TorchRL's ``DreamerV3ModelLoss``, without a decoder.

    Runs ``world_model`` (TorchRL's or ours, anything on the key contract) and returns the pair (losses, posterior):
    scalar ``loss_dynamics``, ``loss_representation``, ``loss_<objective>``, ``loss_reward`` and, if the model predicts
    it, ``loss_continue``, already weighted, plus detached diagnostics; and the records with everything the model wrote,
    still attached to the graph (``detach_output=False``) so that a replay-value loss can train the representation.

    A head that writes ``reward_logits`` is trained two-hot, one that writes only a scalar ``reward`` by
    ``scalar_likelihood``, by default in symlog space.

    Args:
        world_model: encoder, RSSM rollout, projection head, reward head and, optionally, continue head.
        representation: the objective that replaces reconstruction; default :class:`BarlowTwins`.
        kl: the divergence between posterior and prior; default :class:`CategoricalKL`.

    Example:
        >>> from tensordict.nn import TensorDictModule, TensorDictSequential
        >>> def head(key, *layers):
        ...     network = nn.Sequential(nn.Linear(3, 6), *layers)
        ...     return TensorDictModule(network, in_keys=[("next", "position")], out_keys=[("next", key)])
        >>> world_model = TensorDictSequential(  # in earnest: encoder, RSSM rollout, projection, reward head
        ...     head("encoded_latents"), head("projected_latents"), head("reward", nn.Linear(6, 1)),
        ...     *(head(f"{name}_logits", nn.Unflatten(-1, (2, 3))) for name in ("prior", "posterior")))
        >>> records = TensorDict({"next": {"position": torch.randn(5, 7, 3), "reward": torch.zeros(5, 7, 1)}}, [5, 7])
        >>> losses, posterior = R2DreamerWorldModelLoss(world_model)(records)
        >>> sorted(key for key in losses.keys() if key.startswith("loss_"))
        ['loss_barlow', 'loss_dynamics', 'loss_representation', 'loss_reward']
    """

    @dataclass
    class _AcceptedKeys:
        """Entries read below ``"next"``, by the name they have in the key contract."""

        reward: NestedKey = "reward"
        reward_logits: NestedKey = "reward_logits"
        true_reward: NestedKey = "true_reward"
        prior_logits: NestedKey = "prior_logits"
        posterior_logits: NestedKey = "posterior_logits"
        encoded_latents: NestedKey = "encoded_latents"
        projected_latents: NestedKey = "projected_latents"
        continue_pred: NestedKey = "continue_pred"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        # The observation; only TorchRL's DreamerV3Loss asks for it, to list what it needs.
        pixels: NestedKey | list[NestedKey] = "pixels"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    world_model: TensorDictModuleBase
    world_model_params: TensorDictParams
    target_world_model_params: TensorDictParams

    def __init__(
        self,
        world_model: TensorDictModuleBase,
        representation: nn.Module | None = None,
        *,
        kl: nn.Module | None = None,
        reward_weight: float = 1.0,
        continue_weight: float = 1.0,
        num_reward_bins: int = 255,
        scalar_likelihood: nn.Module | None = None,
        detach_output: bool = False,
    ):
        super().__init__()
        self._in_keys = self._out_keys = None
        self.convert_to_functional(world_model, "world_model")
        self.representation = BarlowTwins() if representation is None else representation
        self.kl = CategoricalKL() if kl is None else kl
        self.reward_weight, self.continue_weight = reward_weight, continue_weight
        self.num_reward_bins, self.detach_output = num_reward_bins, detach_output
        self.scalar_likelihood = scalar_likelihood
        self._read_heads()

    def _read_heads(self) -> None:
        written = [unravel_key(key) for key in self.world_model.out_keys]
        self.predicts_continue = self._next(self.tensor_keys.continue_pred) in written
        self.reward_prediction = ScalarPrediction(
            written, self._next(self.tensor_keys.reward_logits), self.num_reward_bins, self.scalar_likelihood
        )

    @staticmethod
    def _next(key: NestedKey) -> NestedKey:
        return unravel_key(("next", key))

    def set_keys(self, **kwargs) -> None:
        super().set_keys(**kwargs)
        self._read_heads()

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        pass

    @property
    def in_keys(self) -> list[NestedKey]:
        if self._in_keys is not None:
            return self._in_keys
        keys = self.tensor_keys
        wanted = [*self.world_model.in_keys, self._next(keys.reward)]
        if self.predicts_continue:
            wanted.append(self._next(keys.terminated))
        return list(dict.fromkeys(unravel_key(key) for key in wanted))

    @in_keys.setter
    def in_keys(self, keys: list[NestedKey]) -> None:
        self._in_keys = keys

    @property
    def out_keys(self) -> list[NestedKey]:
        if self._out_keys is not None:
            return self._out_keys
        terms = [*getattr(self.kl, "terms", ()), *getattr(self.representation, "terms", ()), "reward"]
        names = [f"loss_{name}" for name in terms]
        return names + ["loss_continue"] * self.predicts_continue

    @out_keys.setter
    def out_keys(self, keys: list[NestedKey]) -> None:
        self._out_keys = keys

    def forward(self, tensordict: TensorDictBase) -> tuple[TensorDict, TensorDictBase]:
        keys, at = self.tensor_keys, self._next
        reward = tensordict.get(at(keys.reward))
        # The reward head writes its prediction under the reward's own key: hand the model a shallow copy, without it.
        records = tensordict.select(*tensordict.keys(True, True)).exclude(at(keys.reward))
        with self.world_model_params.to_module(self.world_model):
            posterior = self.world_model(records)
        posterior.set(at(keys.true_reward), reward)

        terms, diagnostics = self.kl(posterior, keys)
        objective_terms, objective_diagnostics = self.representation(posterior, keys)
        terms |= objective_terms
        diagnostics |= objective_diagnostics

        reward_loss = self.reward_prediction(posterior, at(keys.reward_logits), at(keys.reward), reward)
        terms["reward"] = self.reward_weight * reward_loss.mean()
        if self.predicts_continue:
            logit = posterior.get(at(keys.continue_pred)).float()
            alive = 1 - tensordict.get(at(keys.terminated)).float().reshape(logit.shape)
            terms["continue"] = self.continue_weight * F.binary_cross_entropy_with_logits(logit, alive)

        losses = TensorDict({f"loss_{name}": term for name, term in terms.items()}, [])
        losses.update({name: value.detach() for name, value in diagnostics.items()})
        self._clear_weakrefs(tensordict, losses)
        return losses, posterior.detach() if self.detach_output else posterior


def total_loss(losses: TensorDictBase) -> torch.Tensor:
    """The training objective: the sum of all ``loss_*`` entries."""
    return sum(value for key, value in losses.items() if key.startswith("loss_"))

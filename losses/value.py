"""The value loss on imagined rollouts and along replayed sequences.

L = mean[ w_t ( -ln p_v(R_t | z_t) - ln p_v(v_slow(z_t) | z_t) ) ],  v_slow an exponential moving average
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn

from .functional import lambda_return
from .likelihood import ScalarPrediction
from .wiring import (
    ENVIRONMENT,
    NEXT,
    DreamerLoss,
    check_finite,
    check_scalar,
    entry,
    listed,
    read_key,
    require_instances,
    require_modules,
    unregistered,
)

IMAGINED = "the actor loss, into what it imagined,"


class TargetValue(TensorDictModuleBase):
    """The critic of a :class:`DreamerValueLoss` with its target parameters, to be read by other losses."""

    loss: DreamerValueLoss

    def __init__(self, loss: DreamerValueLoss):
        super().__init__()
        unregistered(self, loss=loss)
        self.in_keys: Any = list(loss.value_model.in_keys)
        self.out_keys: Any = list(loss.value_model.out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        with self.loss.target_value_model_params.to_module(self.loss.value_model):
            return self.loss.value_model(tensordict)


class DreamerValueLoss(DreamerLoss):
    """Regresses the critic on lambda-returns and, as a regulariser, on its own slow copy.

    :meth:`forward` takes what :class:`DreamerActorLoss` imagined, :meth:`replay_value_loss` a replayed sequence. The slow
    critic is a target network: attach ``torchrl.objectives.SoftUpdate(loss, tau=0.02)`` and step it with every update.
    A head that writes ``state_value_logits`` is trained two-hot, one that writes only ``state_value`` in symlog space.

    TorchRL's ``torchrl.objectives.DreamerValueLoss`` is another one: Dreamer V1's.

    Args:
        value_model: the critic, latents -> ``state_value`` [..., 1] (and ``state_value_logits`` [..., bins]).
        slow_critic_regularization: weight of the slow critic's term; 0 leaves it out, and the target network as well,
            unless ``bootstrap_target``.
        num_value_bins: of a critic that writes logits.
        bootstrap_target: :attr:`bootstrap_model`, from which returns should be bootstrapped, is the target network.
        scalar_likelihood: of a head without logits.

    Example:
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.objectives import SoftUpdate
        >>> value_model = TensorDictModule(nn.Linear(16, 1), in_keys=["belief"], out_keys=["state_value"])
        >>> loss = DreamerValueLoss(value_model)
        >>> slow_critic = SoftUpdate(loss, tau=0.02)
        >>> imagined = TensorDict({"belief": torch.zeros(5, 3, 16), "lambda_target": torch.ones(5, 3, 1),
        ...                        "discount_weight": torch.ones(5, 3, 1)}, [5, 3])  # as DreamerActorLoss returns it
        >>> losses, _ = loss(imagined)
        >>> losses["loss_value"].backward()
        >>> slow_critic.step()  # after each step of the optimiser
    """

    @dataclass
    class _AcceptedKeys(DreamerLoss._AcceptedKeys):
        """Entries at the root; ``reward``, ``done`` and ``terminated`` of a replayed sequence below ``"next"``."""

        value: NestedKey = read_key("state_value", "value_model", model="value_model")
        value_logits: NestedKey = read_key("state_value_logits", "value_model", model="value_model")
        lambda_target: NestedKey = read_key("lambda_target", IMAGINED)
        discount_weight: NestedKey = read_key("discount_weight", IMAGINED)
        reward: NestedKey = read_key("reward", ENVIRONMENT, prefix=NEXT)
        done: NestedKey = read_key("done", ENVIRONMENT, prefix=NEXT)
        terminated: NestedKey = read_key("terminated", ENVIRONMENT, prefix=NEXT)
        bootstrap: NestedKey = read_key("bootstrap", "you, from the first lambda_target of each imagined state,")

    namesake = "TorchRL's value loss of Dreamer V1 has the same name: from torchrl.objectives import DreamerValueLoss."
    renamed = {
        "value_loss": "a head that writes state_value_logits is trained two-hot, one that writes state_value as a scalar",
        "discount_loss": "the weights come with what the actor loss imagined; leave it out",
        "gamma": "the weights come with what the actor loss imagined: DreamerActorLoss(..., discount=...)",
        "actor_loss": "the weights come with what the actor loss imagined; leave it out",
        "reduction": "the loss is a mean; leave it out",
    }
    value_model: TensorDictModuleBase
    bootstrap_model: TensorDictModuleBase
    value_model_params: TensorDictParams
    target_value_model_params: TensorDictParams

    def __init__(
        self,
        value_model: TensorDictModuleBase,
        *,
        slow_critic_regularization: float = 1.0,
        num_value_bins: int = 255,
        bootstrap_target: bool = False,
        scalar_likelihood: nn.Module | None = None,
        **renamed: object,
    ):
        self._refuse(renamed)
        require_modules(value_model=value_model)
        require_instances(scalar_likelihood=scalar_likelihood)
        super().__init__()
        if slow_critic_regularization < 0:
            raise ValueError(f"slow_critic_regularization must not be negative, got {slow_critic_regularization}.")
        self.slow_critic_regularization, self.num_value_bins = slow_critic_regularization, num_value_bins
        self.scalar_likelihood = scalar_likelihood
        self.has_target = slow_critic_regularization > 0 or bootstrap_target
        self.convert_to_functional(cast(Any, value_model), "value_model", create_target_params=self.has_target)
        unregistered(self, bootstrap_model=TargetValue(self) if bootstrap_target else value_model)
        self._read_heads()

    def _read_heads(self) -> None:
        keys, bins = self.tensor_keys, self.num_value_bins
        prediction = ScalarPrediction(self.value_model, keys.value, keys.value_logits, bins, self.scalar_likelihood)
        self.prediction = self._beside_parameters(prediction)

    def _reads(self) -> list[NestedKey]:
        return [*self.value_model.in_keys, self.tensor_keys.lambda_target, self.tensor_keys.discount_weight]

    def _writes(self) -> list[NestedKey]:
        return ["loss_value"]

    def forward(self, imagined: TensorDictBase) -> tuple[TensorDict, TensorDictBase]:
        """The loss on imagined transitions [N, H], weighted by the probability that they happen."""
        keys = self.tensor_keys
        latents = imagined.select(*self.value_model.in_keys).detach()
        target = entry(imagined, keys, "lambda_target").detach()
        weight = imagined.get(keys.discount_weight, None)
        if weight is None and keys.discount_weight != self._AcceptedKeys.discount_weight:
            weight = entry(imagined, keys, "discount_weight")  # named, so meant: raises
        loss, value = self._loss(latents, target)
        if weight is not None:
            loss = loss * weight.detach().reshape(loss.shape)
        losses = TensorDict({"loss_value": loss.mean(), "value_mean": value.mean()}, [])
        self._clear_weakrefs(imagined, losses)
        return losses, imagined

    def replay_value_loss(
        self, tensordict: TensorDictBase, *, horizon: float = 333.0, lmbda: float = 0.95
    ) -> TensorDict:
        """The same two targets along a replayed sequence [B, T]; unweighted ``loss_replay_value``.

        Reads the posterior latents and ``bootstrap`` (each state's imagined return, [B, T] or [B, T, 1]) at the root and
        ``reward``, ``done``, ``terminated`` below ``"next"``. Terminal stops value, truncation stops the mixing, the last
        step has no successor and is dropped, as is the last of an episode. Gradients flow into the latents.
        """
        if not (horizon >= 1 and 0 <= lmbda <= 1):
            raise ValueError(f"horizon={horizon} must be at least 1 step, and lmbda={lmbda} in [0, 1].")
        keys = self.tensor_keys
        steps = entry(tensordict, keys, "reward", NEXT).shape[:2]
        reward, done, terminated = (
            entry(tensordict, keys, name, NEXT).reshape(*steps, 1).float() for name in ("reward", "done", "terminated")
        )
        check_finite(reward, "reward")
        if reward.shape[1] < 2:
            raise ValueError(
                f"The replayed sequences have shape {list(reward.shape)}; expected [B, T, 1] with T of at least 2: a step's "
                "target comes from the step after it. Sample longer sequences."
            )
        bootstrap = entry(tensordict, keys, "bootstrap").reshape(reward.shape).float()
        with torch.no_grad():
            target = lambda_return(reward, bootstrap, done, terminated, discount=1 - 1 / horizon, lmbda=lmbda)
        latents = tensordict.select(*self.value_model.in_keys, strict=False)
        if missing := [key for key in self.value_model.in_keys if latents.get(key, None) is None]:
            raise ValueError(
                f"{listed(missing)} is missing, which the critic reads: there is {listed(tensordict.keys())} at the root.\n"
                "Set the latents that the world-model loss returned below 'next' at the root."
            )
        latents = TensorDict({key: value[:, :-1] for key, value in latents.items()}, [steps[0], steps[1] - 1])
        loss, _ = self._loss(latents, target)  # [B, T-1]
        return TensorDict({"loss_replay_value": ((1 - done[:, :-1, 0]) * loss).mean()}, [])

    def _loss(self, latents: TensorDictBase, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unreduced loss [N, H] against the target and against the slow critic, and the detached prediction."""
        keys = self.tensor_keys
        predicted = latents.copy()
        with self.value_model_params.to_module(self.value_model):
            self.value_model(predicted)
        if self.slow_critic_regularization:
            slow = latents.detach()
            with torch.no_grad(), self.target_value_model_params.to_module(self.value_model):
                self.value_model(slow)
            slow_value = entry(slow, keys, "value")
            check_scalar(slow_value.shape, slow_value.shape, "state_value")
            target = torch.cat([target, slow_value], -1)
        losses = self.prediction(predicted, keys, "value", target)  # [N, H, 1 or 2]
        loss = losses[..., 0]
        if self.slow_critic_regularization:
            loss = loss + self.slow_critic_regularization * losses[..., 1]
        return loss, entry(predicted, keys, "value").detach()

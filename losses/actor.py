"""The actor loss: REINFORCE on imagined rollouts.

L = -mean[ w_t ( ln pi(a_t | z_t) sg((R_t - v_t) / S) + eta H[pi(. | z_t)] ) ]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import PercentileValueNorm
from torchrl.modules.distributions.utils import has_analytic_entropy, rsample_and_log_prob

from .continuation import UntrainedHead, check_logit, check_probability, continue_name
from .functional import imagination_weight, lambda_return
from .ranks import gather_ranks
from .wiring import (
    NEXT,
    DreamerLoss,
    check_scalar,
    entry,
    read_key,
    require_instances,
    require_modules,
    require_not_negative,
    unregistered,
)

DISCOUNT = 1 - 1 / 333
LATENTS = "the world model (its posterior latents, at the root)"


def _scalar(value: torch.Tensor) -> torch.Tensor:
    """log-probabilities and entropies [N, H] or [N, H, A] (factorised) to [N, H, 1]."""
    return value.unsqueeze(-1) if value.ndim == 2 else value.sum(-1, keepdim=True)


class DreamerActorLoss(DreamerLoss):
    """Imagines from every latent it is given and makes actions that beat the value more likely.

    Returns the pair (losses, imagined): ``loss_actor`` and diagnostics; and the rollout [N, H] with ``lambda_target`` and
    ``discount_weight``, which :class:`DreamerValueLoss` trains on. Start latents are detached and the rollout carries no
    gradients, for continuous and discrete actions alike; only the actor's parameters belong to this loss.

    TorchRL's ``torchrl.objectives.DreamerActorLoss`` is another one: Dreamer V1's.

    Args:
        actor_model: probabilistic module from latents to actions.
        value_model: the critic; read, never trained here.
        model_based_env: anything with TorchRL's ``reset`` and ``rollout``: our ``Imagination`` or a ``DreamerEnv``.
        continue_model: writes ``continue_pred``, a logit, or ``continuation``, a probability (TorchRL's name for one); None
            means imagined episodes never end.
        imagination_horizon: H, imagined steps.
        discount: of a step. ``gamma`` is TorchRL's name for it, and accepted. Say 1 where the continue head is trained with
            ``continue_target_scale``, which holds the discount then.
        lmbda: of the lambda-returns.
        entropy_bonus: eta, the weight of the entropy.
        return_quantiles: S is the range between them, at least 1.
        return_rate: share of the newest batch in the moving average of S.
        gamma: TorchRL's name for ``discount``.

    Reads ``state`` [N, S*K], ``belief`` [N, D].

    Example:
        >>> from r2dreamer.dreamer import ActionSpace, ObservationSpace, build_agent
        >>> agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, discrete=True),
        ...                     belief=16, hidden=8, classes=4, depth=2)
        >>> loss = DreamerActorLoss(agent.actor, agent.value_model, agent.imagination,
        ...                         continue_model=agent.continue_model, imagination_horizon=3)
        >>> latents = TensorDict({"state": torch.zeros(5, 128), "belief": torch.zeros(5, 16)}, [5])  # posterior ones
        >>> losses, imagined = loss(latents)
        >>> losses["loss_actor"].backward()
        >>> imagined["lambda_target"].shape  # for DreamerValueLoss
        torch.Size([5, 3, 1])
    """

    @dataclass
    class _AcceptedKeys(DreamerLoss._AcceptedKeys):
        """Entries at the root, except ``reward``, which is read below ``"next"``."""

        state: NestedKey = read_key("state", LATENTS)
        belief: NestedKey = read_key("belief", LATENTS)
        reward: NestedKey = read_key("reward", "the reward head of model_based_env", prefix=NEXT)
        value: NestedKey = read_key("state_value", "value_model", model="value_model")
        action: NestedKey = read_key("action", "actor_model", model="actor_model")
        continue_pred: NestedKey = read_key("continue_pred", "continue_model", model="continue_model")
        continuation: NestedKey = read_key("continuation", "continue_model", model="continue_model")
        lambda_target: NestedKey = "lambda_target"
        discount_weight: NestedKey = "discount_weight"

    namesake = "TorchRL's actor loss of Dreamer V1 has the same name: from torchrl.objectives import DreamerActorLoss."
    renamed = {
        "continuation_model": "say continue_model=...",
        "discount_loss": "steps are always weighted by how probable they are; leave it out",
        "use_reinforce": "this loss is REINFORCE; through the dynamics goes DynamicsActorLoss(..., dynamics=1.0)",
        "return_normalization": "returns are always normalised here; DynamicsActorLoss leaves them as they are",
        "return_normalization_rate": "say return_rate=...",
        "return_normalization_quantiles": "say return_quantiles=...",
        "return_normalization_min_scale": "it is 1; leave it out",
    }
    actor_model: ProbabilisticTensorDictSequential
    actor_model_params: TensorDictParams
    target_actor_model_params: TensorDictParams
    value_model: TensorDictModuleBase
    model_based_env: Any
    continue_model: TensorDictModuleBase | None

    def __init__(
        self,
        actor_model: ProbabilisticTensorDictSequential,
        value_model: TensorDictModuleBase,
        model_based_env: Any,
        *,
        continue_model: TensorDictModuleBase | None = None,
        imagination_horizon: int = 15,
        discount: float = DISCOUNT,
        lmbda: float = 0.95,
        entropy_bonus: float = 3e-4,
        return_quantiles: tuple[float, float] = (0.05, 0.95),
        return_rate: float = 0.01,
        gamma: float | None = None,
        **renamed: object,
    ):
        self._refuse(renamed)
        require_modules(actor_model=actor_model, value_model=value_model)
        if continue_model is not None:
            require_modules(continue_model=continue_model)
        require_instances(model_based_env=model_based_env)
        if not hasattr(actor_model, "get_dist"):
            raise ValueError(
                f"actor_model is a {type(actor_model).__name__} without get_dist; the order is actor_model, value_model, "
                "model_based_env. Build the actor with ProbabilisticTensorDictSequential."
            )
        if not hasattr(model_based_env, "rollout"):
            raise ValueError(
                f"model_based_env is a {type(model_based_env).__name__}, which has no rollout. Pass agent.imagination, or a "
                "DreamerEnv of TorchRL's."
            )
        if gamma is not None:
            if discount not in (DISCOUNT, gamma):
                raise ValueError(f"gamma={gamma} and discount={discount} name one thing; give discount alone.")
            discount = gamma
        for name, share in {"discount": discount, "lmbda": lmbda}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be in [0, 1].")
        require_not_negative(entropy_bonus=entropy_bonus)
        if not 0 < return_rate <= 1:
            raise ValueError(
                f"return_rate={return_rate} must be in (0, 1]; at 0 the scale of returns would never move."
            )
        super().__init__()
        if imagination_horizon < 1:
            raise ValueError(f"imagination_horizon must be at least 1, got {imagination_horizon}.")
        self.convert_to_functional(actor_model, "actor_model")
        # Their parameters belong to the other losses.
        unregistered(self, value_model=value_model, model_based_env=model_based_env, continue_model=continue_model)
        self.imagination_horizon, self.discount, self.lmbda = imagination_horizon, discount, lmbda
        self.entropy_bonus: float | torch.Tensor = entropy_bonus
        self.return_norm = PercentileValueNorm(quantiles=return_quantiles, rate=return_rate)
        self._untrained = UntrainedHead(continue_model, getattr(model_based_env, "reads", (model_based_env,)))
        self._read_heads()

    def _read_heads(self) -> None:
        self.continue_name = continue_name(self.tensor_keys, self.continue_model) or "continue_pred"

    def _reads(self) -> list[NestedKey]:
        return [self.tensor_keys.state, self.tensor_keys.belief]

    def _writes(self) -> list[NestedKey]:
        return ["loss_actor"]

    def forward(self, tensordict: TensorDictBase) -> tuple[TensorDict, TensorDictBase]:
        self._untrained.check(self.training)
        with torch.no_grad():
            imagined = self._imagine(self._start(tensordict)).detach()
            value, returns, continuation = self._returns(imagined)
            if self.training:
                self.return_norm.update(gather_ranks(returns))
            scale = self.return_norm.scale()
            advantage = (returns - value[:, :-1]) / scale
        policy = self._policy(imagined)
        log_prob = _scalar(policy.log_prob(imagined.get(self.tensor_keys.action)))  # [N, H, 1]
        entropy = _scalar(self._entropy(policy))
        objective = log_prob * advantage + self.entropy_bonus * entropy
        diagnostics = {"return_scale": scale.squeeze(-1).clone(), "advantage_std": advantage.std()}
        return self._results(tensordict, imagined, objective, entropy, returns, continuation, **diagnostics)

    def _results(
        self,
        tensordict: TensorDictBase,
        imagined: TensorDictBase,
        objective: torch.Tensor,
        entropy: torch.Tensor,
        returns: torch.Tensor,
        continuation: torch.Tensor,
        **diagnostics: torch.Tensor,
    ) -> tuple[TensorDict, TensorDictBase]:
        """The loss of an objective [N, H, 1], and what was imagined with the critic's targets and weights."""
        weight = imagination_weight(continuation.detach(), self.discount)[:, :-1]
        imagined.set(self.tensor_keys.lambda_target, returns.detach())
        imagined.set(self.tensor_keys.discount_weight, weight)
        losses = TensorDict(
            {
                "loss_actor": -(weight * objective).mean(),
                "actor_entropy": entropy.detach().mean(),
                "return_mean": returns.detach().mean(),
                **diagnostics,
                "imagined_reward": imagined.get(("next", self.tensor_keys.reward)).mean(),
            }
        )
        self._clear_weakrefs(tensordict, losses)
        return losses, imagined

    def _start(self, tensordict: TensorDictBase) -> TensorDictBase:
        keys = self.tensor_keys
        for name in ("state", "belief"):
            shape = entry(tensordict, keys, name).shape
            if len(shape) != 2:
                raise ValueError(
                    f"{name!r} has shape {list(shape)}; expected [N, features], one start of imagination in each row.\n"
                    "Latents of records [B, T] are given as .flatten(0, 1)."
                )
        return tensordict.select(keys.state, keys.belief).detach()

    @staticmethod
    def _entropy(policy: torch.distributions.Distribution) -> torch.Tensor:
        """In closed form, or by one sample where the distribution has none (a squashed Normal)."""
        return policy.entropy() if has_analytic_entropy(policy) else -rsample_and_log_prob(policy)[1]

    def _policy(self, imagined: TensorDictBase) -> Any:
        with self.actor_model_params.to_module(self.actor_model):
            return self.actor_model.get_dist(imagined.select(*self.actor_model.in_keys, strict=False))

    def _imagine(self, start: TensorDictBase) -> TensorDictBase:
        with self.actor_model_params.to_module(self.actor_model), set_exploration_type(ExplorationType.RANDOM):
            return self.model_based_env.rollout(
                self.imagination_horizon,
                policy=self.actor_model,
                auto_reset=False,
                tensordict=self.model_based_env.reset(start.copy()),
                break_when_any_done=False,
            )

    def _returns(self, imagined: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values [N, H+1, 1], lambda-returns [N, H, 1], and probabilities [N, H+1, 1] that episodes go on."""
        value = self._along(imagined, self.value_model, "value")
        reward = entry(imagined, self.tensor_keys, "reward", NEXT).float()  # [N, H, 1]
        check_scalar(reward.shape, value[:, 1:].shape, "reward")
        reward = torch.cat([torch.zeros_like(reward[:, :1]), reward], 1)
        continuation = torch.ones_like(value)
        if self.continue_model is not None:
            continuation = self._along(imagined, self.continue_model, self.continue_name)
            if self.continue_name == "continue_pred":
                continuation = continuation.sigmoid()
            else:
                check_probability(continuation)
        returns = lambda_return(reward, value, terminal=1 - continuation, discount=self.discount, lmbda=self.lmbda)
        return value, returns, continuation

    def _along(self, imagined: TensorDictBase, model: TensorDictModuleBase, name: str) -> torch.Tensor:
        """A head's prediction at all H+1 imagined states [N, H+1, 1]: the first at the root, the others after it."""
        before, after = cast(TensorDictBase, imagined[:, :1]), cast(TensorDictBase, imagined.get("next"))
        first = entry(model(before.select(*model.in_keys)), self.tensor_keys, name)
        following = entry(model(after.select(*model.in_keys)), self.tensor_keys, name)
        check_scalar(following.shape, (*imagined.shape, 1), str(getattr(self.tensor_keys, name)))
        if name == "continue_pred":
            check_logit(following, self.tensor_keys.continue_pred)
        return torch.cat([first, following], 1).float()

"""The actor loss: REINFORCE on imagined rollouts.

L = -mean[ w_t ( ln pi(a_t | z_t) sg((R_t - v_t) / S) + eta H[pi(. | z_t)] ) ]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import PercentileValueNorm
from torchrl.modules.distributions.utils import has_analytic_entropy, rsample_and_log_prob
from torchrl.objectives.common import LossModule

from .functional import imagination_weight, lambda_return


def _scalar(value: torch.Tensor) -> torch.Tensor:
    """log-probabilities and entropies [N, H] or [N, H, A] (factorised) to [N, H, 1]."""
    return value.unsqueeze(-1) if value.ndim == 2 else value.sum(-1, keepdim=True)


class DreamerActorLoss(LossModule):
    """Imagines from every latent it is given and makes actions that beat the value more likely.

    Returns the pair (losses, imagined): ``loss_actor`` and diagnostics; and the rollout [N, H] with ``lambda_target`` and
    ``discount_weight``, which :class:`DreamerValueLoss` trains on. Start latents are detached and the rollout carries no
    gradients, for continuous and discrete actions alike; only the actor's parameters belong to this loss.

    Args:
        actor_model: probabilistic module from latents to actions.
        value_model: the critic; read, never trained here.
        model_based_env: anything with TorchRL's ``reset`` and ``rollout``: our ``Imagination`` or a ``DreamerEnv``.
        continue_model: writes the logit ``continue_pred``; None means imagined episodes never end.

    Keys: reads ``state`` [N, S*K], ``belief`` [N, D].

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
    class _AcceptedKeys:
        """Entries at the root, except ``reward``, which is read below ``"next"``."""

        state: NestedKey = "state"
        belief: NestedKey = "belief"
        reward: NestedKey = "reward"
        value: NestedKey = "state_value"
        action: NestedKey = "action"
        continue_pred: NestedKey = "continue_pred"
        lambda_target: NestedKey = "lambda_target"
        discount_weight: NestedKey = "discount_weight"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    out_keys = ["loss_actor"]
    actor_model: ProbabilisticTensorDictSequential
    actor_model_params: TensorDictParams
    target_actor_model_params: TensorDictParams

    def __init__(
        self,
        actor_model: ProbabilisticTensorDictSequential,
        value_model: TensorDictModuleBase,
        model_based_env,
        *,
        continue_model: TensorDictModuleBase | None = None,
        imagination_horizon: int = 15,
        discount: float = 1 - 1 / 333,
        lmbda: float = 0.95,
        entropy_bonus: float = 3e-4,
        return_quantiles: tuple[float, float] = (0.05, 0.95),
        return_rate: float = 0.01,
    ):
        super().__init__()
        if imagination_horizon < 1:
            raise ValueError(f"imagination_horizon must be at least 1, got {imagination_horizon}.")
        self.convert_to_functional(actor_model, "actor_model")
        # Not registered: their parameters belong to the other losses.
        self.__dict__.update(value_model=value_model, model_based_env=model_based_env, continue_model=continue_model)
        self.imagination_horizon, self.discount, self.lmbda = imagination_horizon, discount, lmbda
        self.entropy_bonus = entropy_bonus
        self.return_norm = PercentileValueNorm(quantiles=return_quantiles, rate=return_rate)
        self._in_keys = None

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        pass

    @property
    def in_keys(self) -> list[NestedKey]:
        return self._in_keys or [self.tensor_keys.state, self.tensor_keys.belief]

    @in_keys.setter
    def in_keys(self, keys: list[NestedKey]) -> None:
        self._in_keys = keys

    def forward(self, tensordict: TensorDictBase) -> tuple[TensorDict, TensorDictBase]:
        keys = self.tensor_keys
        start = tensordict.select(keys.state, keys.belief).detach()
        imagined = self._imagine(start)
        returns, advantage, weight = self._score(imagined)

        latents = imagined.select(*self.actor_model.in_keys, strict=False)
        with self.actor_model_params.to_module(self.actor_model):
            policy = self.actor_model.get_dist(latents)
        log_prob = _scalar(policy.log_prob(imagined.get(keys.action)))  # [N, H, 1]
        entropy = _scalar(self._entropy(policy))
        loss = -(weight * (log_prob * advantage + self.entropy_bonus * entropy)).mean()

        losses = TensorDict(
            {
                "loss_actor": loss,
                "actor_entropy": entropy.detach().mean(),
                "return_mean": returns.mean(),
                "return_scale": self.return_norm.scale().squeeze(-1).clone(),
                "advantage_std": advantage.std(),
                "imagined_reward": imagined.get(("next", keys.reward)).mean(),
            },
            [],
        )
        self._clear_weakrefs(tensordict, losses)
        return losses, imagined

    @staticmethod
    def _entropy(policy: torch.distributions.Distribution) -> torch.Tensor:
        """In closed form, or by one sample where the distribution has none (a squashed Normal)."""
        return policy.entropy() if has_analytic_entropy(policy) else -rsample_and_log_prob(policy)[1]

    @torch.no_grad()
    def _imagine(self, start: TensorDictBase) -> TensorDictBase:
        with self.actor_model_params.to_module(self.actor_model), set_exploration_type(ExplorationType.RANDOM):
            imagined = self.model_based_env.rollout(
                self.imagination_horizon,
                policy=self.actor_model,
                auto_reset=False,
                tensordict=self.model_based_env.reset(start.copy()),
                break_when_any_done=False,
            )
        return imagined.detach()

    @torch.no_grad()
    def _score(self, imagined: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lambda-returns, normalised advantages and weights of the H imagined steps, all [N, H, 1]."""
        keys = self.tensor_keys
        value = self._along(imagined, self.value_model, keys.value)  # [N, H+1, 1]
        reward = imagined.get(("next", keys.reward)).float()  # [N, H, 1]
        reward = torch.cat([torch.zeros_like(reward[:, :1]), reward], 1)
        if self.continue_model is None:
            continuation = torch.ones_like(value)
        else:
            continuation = self._along(imagined, self.continue_model, keys.continue_pred).sigmoid()
        returns = lambda_return(reward, value, terminal=1 - continuation, discount=self.discount, lmbda=self.lmbda)
        if self.training:
            self.return_norm.update(returns)
        advantage = (returns - value[:, :-1]) / self.return_norm.scale()
        weight = imagination_weight(continuation, self.discount)[:, :-1]
        imagined.set(keys.lambda_target, returns)
        imagined.set(keys.discount_weight, weight)
        return returns, advantage, weight

    def _along(self, imagined: TensorDictBase, model: TensorDictModuleBase, key: NestedKey) -> torch.Tensor:
        """A head's prediction at all H+1 imagined states [N, H+1, 1]: the first at the root, the others after it."""
        first = model(imagined[:, :1].select(*model.in_keys)).get(key)
        following = model(imagined.get("next").select(*model.in_keys)).get(key)
        return torch.cat([first, following], 1).float()

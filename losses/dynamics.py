"""The actor loss of Dreamer V1 and V2: returns differentiated through the dynamics.

L = -mean[ w_t ( rho R_t + (1 - rho) ln pi(a_t | z_t) sg(R_t - v_t) + eta H[pi(. | z_t)] ) ]
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.modules import TanhNormal

from .actor import DreamerActorLoss, _scalar
from .wiring import frozen


class DynamicsActorLoss(DreamerActorLoss):
    """Imagines with gradients and moves the actor up the return itself; takes and returns what its parent does.

    ``model_based_env`` must be differentiable, and the actor's distribution reparameterised. The gradient passes reward,
    value, continuation and dynamics, whose parameters get none, into the actions. Returns are not normalised.

    Args:
        args: as in :class:`DreamerActorLoss`, like all other options.
        dynamics: rho, the share of the gradient through the dynamics: 1 in Dreamer V1; the rest is REINFORCE.
    """

    def __init__(self, *args, dynamics: float = 1.0, **options):
        super().__init__(*args, **options)
        if not 0 <= dynamics <= 1:
            raise ValueError(f"dynamics={dynamics} is a share: it must be in [0, 1].")
        if dynamics and not getattr(self.model_based_env, "differentiable", True):
            world = type(self.model_based_env).__name__
            raise ValueError(
                f"dynamics={dynamics}: the return's gradient must pass the imagined world, and this {world} passes none. "
                "Imagine with Imagination(..., differentiable=True), as build_classic_agent does, or use "
                "DreamerActorLoss."
            )
        self.dynamics = dynamics

    def forward(self, tensordict: TensorDictBase) -> tuple[TensorDict, TensorDictBase]:
        self._untrained.check(self.training)
        start = self._start(tensordict)
        env = self.model_based_env
        read = *getattr(env, "reads", (env,)), self.value_model, self.continue_model
        with torch.set_grad_enabled(self.dynamics > 0 and torch.is_grad_enabled()), frozen(*read):
            imagined = self._imagine(start)
            value, returns, continuation = self._returns(imagined)
        self._check_differentiable(imagined, value)
        objective, fixed = self.dynamics * returns, imagined.detach()
        policy = self._policy(fixed)
        if self.dynamics < 1:
            if isinstance(policy, TanhNormal):
                raise ValueError(
                    f"dynamics={self.dynamics} asks for log-probabilities of actions, which a squashed Normal no longer knows "
                    "where tanh is flat. Use dynamics=1, or a policy that is not squashed (squashed_actions=False)."
                )
            advantage = (returns - value[:, :-1]).detach()
            log_prob = _scalar(policy.log_prob(fixed.get(self.tensor_keys.action)))
            objective = objective + (1 - self.dynamics) * log_prob * advantage
        entropy = _scalar(self._entropy(policy))
        if torch.is_tensor(self.entropy_bonus) or self.entropy_bonus:  # to look into a tensor is to wait for its device
            objective = objective + self.entropy_bonus * entropy
        return self._results(tensordict, fixed, objective, entropy, returns, continuation)

    def _check_differentiable(self, imagined: TensorDictBase, value: torch.Tensor) -> None:
        """Refuses heads that cut the gradient: what is left of it would point elsewhere."""
        if not self.dynamics or not torch.is_grad_enabled():
            return
        reward = imagined.get(("next", self.tensor_keys.reward))
        for name, each in {"reward": reward, "value": value}.items():
            if not each.requires_grad:
                raise ValueError(
                    f"dynamics={self.dynamics}: the imagined {name} passes no gradient to the state that it is predicted from. "
                    "Let the head decode without detach(), or use DreamerActorLoss."
                )

"""Imagination: the policy acts in the prior's world."""

from __future__ import annotations

import warnings

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn

from .casting import cast_once
from .rssm import RSSMPrior


class Imagination(nn.Module):
    """Latent rollouts with the part of TorchRL's ``DreamerEnv`` interface that the losses use.

    :meth:`rollout` starts from [N] latents and returns [N, H] transitions: root ``state``, ``belief``, ``action``, and
    ``("next", ...)`` ``state``, ``belief``, ``reward``. Rewards are predicted once for the whole rollout. Nothing is held:
    the modules stay owned by whoever built them.

    Gradients are off (REINFORCE needs none) unless ``differentiable``: then they pass from states and rewards through the
    dynamics into the actions, whose distribution must be reparameterised; what the policy reads stays detached.
    """

    def __init__(self, prior: RSSMPrior, reward: TensorDictModule, *, differentiable: bool = False):
        super().__init__()
        # Not registered: a loss that holds this object must not own the world model's parameters a second time.
        self.__dict__["prior"], self.__dict__["reward"] = prior, reward
        self.differentiable = differentiable

    @property
    def reads(self) -> tuple[nn.Module, ...]:
        """The modules a gradient through the dynamics passes, which it must not change."""
        return self.prior, self.reward

    def reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict

    def rollout(
        self,
        max_steps: int,
        policy: ProbabilisticTensorDictSequential,
        *,
        tensordict: TensorDictBase,
        **options: object,
    ) -> TensorDict:
        # As a loss calls it; where somebody only looks at a dream, gradients may be on by oversight.
        for_a_loss = options.get("auto_reset") is False and not torch.compiler.is_compiling()
        if for_a_loss and torch.is_grad_enabled() and not self.differentiable:
            warnings.warn(
                "This imagination passes no gradients, which only REINFORCE can do without: DreamerActorLoss of "
                "r2dreamer.losses, or TorchRL's DreamerV3ActorLoss(use_reinforce=True). For TorchRL's DreamerActorLoss "
                "(Dreamer V1), and others that differentiate it, build Imagination(..., differentiable=True).",
                stacklevel=2,
            )
        gradients = torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled())
        with gradients, cast_once(self.prior, policy):
            return self._rollout(max_steps, policy, tensordict)

    def _rollout(
        self, max_steps: int, policy: ProbabilisticTensorDictSequential, tensordict: TensorDictBase
    ) -> TensorDict:
        state, belief = tensordict.get("state"), tensordict.get("belief").float()
        # Under autocast every reader would cast the features anyway: store them once in that dtype.
        device = state.device.type
        store = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else state.dtype
        states, beliefs, actions = [state.to(store)], [belief.to(store)], []
        for _step in range(max_steps):
            latents = TensorDict({"state": states[-1].detach(), "belief": beliefs[-1].detach()}, state.shape[:-1])
            distribution = policy.get_dist(latents)
            action = distribution.rsample() if self.differentiable else distribution.sample()
            _, state, belief = self.prior(states[-1], belief, action)
            states.append(state.to(store))
            beliefs.append(belief.to(store))
            actions.append(action)
        states, beliefs = torch.stack(states, 1), torch.stack(beliefs, 1)  # [N, H+1, S*K], [N, H+1, D]
        following = TensorDict({"state": states[:, 1:], "belief": beliefs[:, 1:]}, [*actions[0].shape[:1], max_steps])
        self.reward(following)
        return TensorDict(
            {
                "state": states[:, :-1],
                "belief": beliefs[:, :-1],
                "action": torch.stack(actions, 1),  # [N, H, A]
                "next": following.select("state", "belief", "reward"),
            },
            following.batch_size,
        )

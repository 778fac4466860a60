"""Imagination: the policy acts in the prior's world, no graph is built."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn

from .rssm import RSSMPrior


class Imagination(nn.Module):
    """Latent rollouts with the part of TorchRL's ``DreamerEnv`` interface that the losses use.

    :meth:`rollout` starts from [N] latents and returns [N, H] transitions: root ``state``, ``belief``, ``action``, and
    ``("next", ...)`` ``state``, ``belief``, ``reward``. Rewards are predicted once for the whole rollout. Nothing here
    carries gradients (REINFORCE needs none), and nothing is held: the modules stay owned by whoever built them.
    """

    def __init__(self, prior: RSSMPrior, reward: TensorDictModule):
        super().__init__()
        # Not registered: a loss that holds this object must not own the world model's parameters a second time.
        self.__dict__["prior"], self.__dict__["reward"] = prior, reward

    def reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict

    @torch.no_grad()
    def rollout(
        self, max_steps: int, policy: ProbabilisticTensorDictSequential, *, tensordict: TensorDictBase, **_: object
    ) -> TensorDict:
        state, belief = tensordict.get("state"), tensordict.get("belief").float()
        # Under autocast every reader would cast the features anyway: store them once in that dtype.
        device = state.device.type
        store = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else state.dtype
        states, beliefs, actions = [state.to(store)], [belief.to(store)], []
        for _step in range(max_steps):
            action = policy.get_dist(
                TensorDict({"state": states[-1], "belief": beliefs[-1]}, state.shape[:-1])
            ).sample()
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

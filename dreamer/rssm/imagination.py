"""Imagination: the policy acts in the prior's world."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import nn
from torchrl.envs.utils import ExplorationType, exploration_type

from .core import RSSMPrior


class Imagination(nn.Module):
    """Latent rollouts with the part of TorchRL's ``DreamerEnv`` interface that the losses use.

    :meth:`rollout` starts from latents [N] and returns [N, H] transitions, as an ``EnvBase`` would: root ``state``, ``belief``,
    ``action``, ``done``, ``terminated``, and ``("next", ...)`` the same with ``reward`` and without ``action``. No imagined
    episode is done. Rewards are predicted once for the whole rollout. Nothing is held: the modules stay owned by whoever
    built them.

    Gradients are off (REINFORCE needs none) unless ``differentiable``: then they pass from states and rewards through the
    dynamics into the actions, whose distribution must be reparameterised; what the policy reads stays detached.

    Args:
        prior: (state, belief, action) -> (prior logits, state, belief).
        reward: latents -> ``reward``.
        differentiable: whether gradients pass through the dynamics.

    Example:
        >>> from r2dreamer.dreamer import ActionSpace, ObservationSpace, build_agent, latent_head
        >>> agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, discrete=True),
        ...                     belief=16, hidden=8, classes=4, depth=2)
        >>> imagination = Imagination(agent.prior, latent_head(agent.reward, ["reward_logits", "reward"]))
        >>> start = TensorDict({"state": torch.zeros(5, 128), "belief": torch.zeros(5, 16)}, [5])
        >>> dream = imagination.rollout(3, agent.actor, tensordict=start)  # agent.imagination is the same
        >>> dream["next", "reward"].shape
        torch.Size([5, 3, 1])
    """

    prior: RSSMPrior
    reward: TensorDictModule

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
        policy: Callable[[TensorDictBase], TensorDictBase],
        *,
        tensordict: TensorDictBase | None = None,
        auto_reset: bool = True,
        break_when_any_done: bool | None = None,
        break_when_all_done: bool | None = None,
        return_contiguous: bool = True,
    ) -> TensorDict:
        """``max_steps`` steps of ``policy`` from the latents in ``tensordict`` (any batch shape).

        The policy acts as it would in an environment: `set_exploration_type` decides between its mode and a sample. The
        flags of ``EnvBase.rollout`` after ``tensordict`` are accepted and change nothing: latents are where it begins,
        nothing is ever done, and what comes back is contiguous.
        """
        given = [] if tensordict is None else list(tensordict.keys())
        if not {"state", "belief"} <= set(given):
            raise ValueError(
                "An imagination begins from latents and cannot reset itself: give rollout(..., tensordict=...) with the "
                f"entries 'state' and 'belief', as agent.policy and agent.rollout write them. It was given {given or None}."
            )
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
        # As a loss calls it; where somebody only looks at a dream, gradients may be on by oversight.
        for_a_loss = not auto_reset and not torch.compiler.is_compiling()
        if for_a_loss and torch.is_grad_enabled() and not self.differentiable:
            warnings.warn(
                "This imagination passes no gradients, which only REINFORCE can do without: DreamerActorLoss of "
                "r2dreamer.losses, or TorchRL's DreamerV3ActorLoss(use_reinforce=True). For TorchRL's DreamerActorLoss "
                "(Dreamer V1), and others that differentiate it, build Imagination(..., differentiable=True).",
                stacklevel=2,
            )
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            imagined = self._rollout(max_steps, policy, tensordict)
        torch.clear_autocast_cache()  # its casts of weights may carry no gradient, which the losses need
        return imagined

    def _act(self, policy: Callable[[TensorDictBase], TensorDictBase], latents: TensorDict) -> torch.Tensor:
        if exploration_type() != ExplorationType.RANDOM or not hasattr(policy, "get_dist"):
            return policy(latents).get("action")
        distribution = policy.get_dist(latents)
        return distribution.rsample() if self.differentiable else distribution.sample()

    def _rollout(
        self, max_steps: int, policy: Callable[[TensorDictBase], TensorDictBase], tensordict: TensorDictBase
    ) -> TensorDict:
        state, belief = tensordict.get("state"), tensordict.get("belief").float()
        # Under autocast every reader would cast the features anyway: store them once in that dtype.
        device = state.device.type
        store = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else state.dtype
        states, beliefs, actions = [state.to(store)], [belief.to(store)], []
        for _step in range(max_steps):
            latents = TensorDict({"state": states[-1].detach(), "belief": beliefs[-1].detach()}, state.shape[:-1])
            action = self._act(policy, latents)
            if action is None:
                raise ValueError(_unnamed("policy", "action", latents.keys()))
            _, state, belief = self.prior(states[-1], belief, action)
            states.append(state.to(store))
            beliefs.append(belief.to(store))
            actions.append(action)
        sequences = states, beliefs, actions
        states, beliefs, action = (torch.stack(each, -2) for each in sequences)  # [N, H+1, S*K], [N, H+1, D], [N, H, A]
        after = {"state": states[..., 1:, :], "belief": beliefs[..., 1:, :]}
        following = TensorDict(after, action.shape[:-1])  # [N, H]
        self.reward(following)
        if "reward" not in following:
            raise ValueError(_unnamed("reward head", "reward", following.keys()))
        never = lambda: {key: torch.zeros_like(action[..., :1], dtype=torch.bool) for key in ("done", "terminated")}
        return TensorDict(
            {
                "state": states[..., :-1, :],
                "belief": beliefs[..., :-1, :],
                "action": action,
                **never(),
                "next": following.select("state", "belief", "reward").update(never()),
            },
            following.batch_size,
        )


def _unnamed(writer: str, name: str, there: Iterable[NestedKey]) -> str:
    return (
        f"The {writer} wrote no {name!r}; there is {', '.join(sorted(map(str, there)))}. An Imagination knows its entries by the "
        f"names state, belief, action and reward: let the {writer} write {name!r}."
    )

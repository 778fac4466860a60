"""A planning-level attack: the gradient of the agent's imagined return, down to the pixels of a patch.

L = w_return R - w_kl KL(patched || clean) - w_action |a_patched - a_clean|^2 + w_tv TV + w_l2 L2   (a: of choices, pi)
R = sum_k w_k r_k + w_{H+1} v_H,  k = 1 .. H,  w_k = prod_{j < k} (discount c_j)

The agent is frozen: gradients flow through it, and none of its parameters gets one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules import SymExpTwoHot

from .continuation import continue_name
from .functional import categorical_kl, lambda_return
from .wiring import NEXT, DreamerLoss, entry, frozen, unregistered

View = tuple[torch.Tensor, torch.Tensor | None]


class PlanningAttackLoss(DreamerLoss):
    """What an adversarial patch minimises: the return that the agent imagines after seeing it in every frame.

    With ``belief="clean"`` actions come from the patched belief, and what they lead to is rolled and scored from the clean
    belief of the same moment: only worse actions lower this return. With ``belief="patched"`` the patched belief is scored
    too, and an agent that merely *believes* it is doomed counts as a success.

    Clean and patched passes draw the same random numbers, so that a patch that changes no pixel has a KL, an action shift and
    a ``return_change`` of exactly 0. Returns scalar ``loss_return``, ``loss_kl``, ``loss_action``, ``loss_tv``, ``loss_l2``,
    already weighted, and detached diagnostics. Only the patch belongs to this module's parameters.

    Args:
        patch: offers ``views(count, (H, W))``, a list of draws; ``paste(pixels, *draw)``; ``total_variation()``, ``l2()``;
            for example the ``AdversarialPatch`` among our environment transforms. The loss is averaged over the draws, the image never is.
        world_model: encoder and RSSM rollout on records [B, T]; what it does beyond that is not used.
        prior_model: one imagined step, (state, belief, action) -> ("next", state), ("next", belief).
        actor_model: latents at the root -> action.
        reward_model: latents -> reward.
        value_model: latents -> value.
        continue_model: latents -> continuation. None: nothing ends.
        belief: "clean" or "patched", as above.
        starts: "all" context states begin an imagination, or only the "last" of each window.
        actions: the actor's "mode" or "sample"; a discrete choice is differentiated straight-through.
        bootstrap: whether the critic's value stands for what follows the last imagined step.
        imagination_horizon: H, imagined steps.
        discount: of a step.
        unimix: of the posterior's categoricals, for the KL.
        w_return: weight of the imagined return.
        w_kl: weight of the KL from the patched to the clean posterior.
        w_action: weight of the change of actions.
        w_tv: weight of the patch's total variation.
        w_l2: weight of its squared size.
        num_reward_bins: of a reward head that writes logits.
        num_value_bins: of a critic that writes logits.

    Reads ``state``, ``belief`` (before the window), ``action``, ``is_init`` and ``("next", "pixels")`` [B, T].

    A step of the search, with the parts of an agent by their names (``examples/training/loading.py`` takes them from one)::

        loss = PlanningAttackLoss(patch, world_model, prior_model, actor, reward_model, value_model)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)  # the patch, and nothing else
        total_loss(loss(records)).backward()
        optimizer.step()
        patch.project_()
    """

    @dataclass
    class _AcceptedKeys(DreamerLoss._AcceptedKeys):
        """``pixels`` and ``posterior_logits`` are read below ``"next"``, the others at the root of imagined steps."""

        state: NestedKey = "state"
        belief: NestedKey = "belief"
        action: NestedKey = "action"
        pixels: NestedKey = "pixels"
        posterior_logits: NestedKey = "posterior_logits"
        reward: NestedKey = "reward"
        reward_logits: NestedKey = "reward_logits"
        value: NestedKey = "state_value"
        value_logits: NestedKey = "state_value_logits"
        continue_pred: NestedKey = "continue_pred"  # a logit
        continuation: NestedKey = "continuation"  # a probability, where the head writes no logit

    patch: Any
    world_model: TensorDictModuleBase
    prior_model: TensorDictModuleBase
    actor_model: ProbabilisticTensorDictSequential
    reward_model: TensorDictModuleBase
    value_model: TensorDictModuleBase
    continue_model: TensorDictModuleBase | None

    def __init__(
        self,
        patch: nn.Module,
        world_model: TensorDictModuleBase,
        prior_model: TensorDictModuleBase,
        actor_model: ProbabilisticTensorDictSequential,
        reward_model: TensorDictModuleBase,
        value_model: TensorDictModuleBase,
        *,
        continue_model: TensorDictModuleBase | None = None,
        belief: str = "clean",
        starts: str = "all",
        actions: str = "mode",
        bootstrap: bool = True,
        imagination_horizon: int = 15,
        discount: float = 1 - 1 / 333,
        unimix: float = 0.01,
        w_return: float = 1.0,
        w_kl: float = 0.0,
        w_action: float = 0.0,
        w_tv: float = 0.01,
        w_l2: float = 0.001,
        num_reward_bins: int = 255,
        num_value_bins: int = 255,
    ):
        super().__init__()
        choices = {
            "belief": (belief, ("clean", "patched")),
            "starts": (starts, ("all", "last")),
            "actions": (actions, ("mode", "sample")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}.")
        if imagination_horizon < 1:
            raise ValueError(f"imagination_horizon must be at least 1, got {imagination_horizon}.")
        if not 0 < discount <= 1:
            raise ValueError(f"discount must be in (0, 1], got {discount}.")
        if not all(getattr(module, "categorical", True) for module in world_model.modules()):
            raise ValueError(
                "The world model has a Gaussian state (Dreamer V1), and this attack takes the KL of categorical ones: use an agent "
                "of another generation."
            )
        self.weights = {"return": w_return, "kl": w_kl, "action": w_action, "tv": w_tv, "l2": w_l2}
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"w_{name}={weight} must not be negative; the loss has the signs already.")
        self.patch = patch
        # None of the agent's parameters belongs to this loss.
        agent = dict(world_model=world_model, prior_model=prior_model, actor_model=actor_model)
        agent |= dict(reward_model=reward_model, value_model=value_model, continue_model=continue_model)
        unregistered(self, **agent)
        self._agent = tuple(agent.values())
        self.belief, self.starts, self.actions, self.bootstrap = belief, starts, actions, bootstrap
        self.imagination_horizon, self.discount, self.unimix = imagination_horizon, discount, unimix
        self.reward_two_hot, self.value_two_hot = SymExpTwoHot(num_reward_bins), SymExpTwoHot(num_value_bins)

    def _reads(self) -> list[NestedKey]:
        return list(self.world_model.in_keys)

    def _writes(self) -> list[NestedKey]:
        return [f"loss_{name}" for name in self.weights]

    def forward(self, tensordict: TensorDictBase, views: Sequence[View] | None = None) -> TensorDict:
        """The loss on records [B, T], averaged over ``views``; default: the patch's own draws."""
        pixels = entry(tensordict, self.tensor_keys, "pixels", NEXT)
        draws = self.patch.views(pixels.shape[0], pixels.shape[-2:]) if views is None else views
        with frozen(*self._agent), self._repeatable(pixels.device) as seed:
            clean, clean_logits = self._filter(tensordict, self._leaf(self._floats(pixels)), seed)
            clean, clean_logits = clean.detach(), clean_logits.detach()
            undisturbed = clean.apply(self._leaf)
            clean_return, clean_action = (each.detach() for each in self._imagine(undisturbed, undisturbed, seed))
            terms = []
            for view in draws:
                seen, logits = self._filter(tensordict, self.patch.paste(pixels, *view), seed)
                scoring = clean if self.belief == "clean" else seen
                returns, action = self._imagine(seen, scoring, seed)
                kl = categorical_kl(logits, clean_logits, self.unimix).mean()
                terms.append(torch.stack([returns.mean(), kl, (action - clean_action).square().sum(-1).mean()]))
            imagined, kl, shift = torch.stack(terms).mean(0)
        weights = self.weights
        losses = TensorDict(
            {
                "loss_return": weights["return"] * imagined,
                "loss_kl": -weights["kl"] * kl,
                "loss_action": -weights["action"] * shift,
                "loss_tv": weights["tv"] * self.patch.total_variation(),
                "loss_l2": weights["l2"] * self.patch.l2(),
                "imagined_return": imagined.detach(),
                "clean_return": clean_return.mean(),
                "return_change": imagined.detach() - clean_return.mean(),
                "kl": kl.detach(),
                "action_shift": shift.detach(),
            }
        )
        self._clear_weakrefs(tensordict, losses)
        return losses

    def saliency(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Mean |d return / d pixel| of the agent undisturbed, over the frames and channels of records [B, T]: [H, W]."""
        pixels = entry(tensordict, self.tensor_keys, "pixels", NEXT)
        with torch.enable_grad(), frozen(*self._agent), self._repeatable(pixels.device) as seed:
            image = self._leaf(self._floats(pixels))
            seen, _ = self._filter(tensordict, image, seed)
            returns, _ = self._imagine(seen, seen, seed)
            (gradient,) = torch.autograd.grad(returns.sum(), image)
        return gradient.abs().flatten(0, -3).mean(0)

    @staticmethod
    @contextmanager
    def _repeatable(device: torch.device) -> Iterator[int]:
        """A seed from the global generators, which afterwards go on as if nothing else had been drawn."""
        seed = int(torch.randint(2**31, ()))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield seed

    @staticmethod
    def _floats(pixels: torch.Tensor) -> torch.Tensor:
        return pixels if pixels.is_floating_point() else pixels / 255

    @staticmethod
    def _leaf(value: torch.Tensor) -> torch.Tensor:
        """A clean input that wants a gradient, which nobody asks for: so the clean pass takes the code of the patched one.

        What a network computes with and without a graph may differ in the last bit, and a sample with it.
        """
        return value.detach().requires_grad_(torch.is_grad_enabled())

    def _filter(self, records: TensorDictBase, pixels: torch.Tensor, seed: int) -> tuple[TensorDict, torch.Tensor]:
        """Posterior latents [N] where imaginations begin, and posterior logits [B, T, S, K]."""
        keys = self.tensor_keys
        torch.manual_seed(seed)
        records = records.select(*self.world_model.in_keys).set(("next", keys.pixels), pixels)
        posterior = self.world_model(records).get("next")
        latents = posterior.select(keys.state, keys.belief)
        latents = latents[:, -1] if self.starts == "last" else latents.flatten(0, 1)
        return latents, posterior.get(keys.posterior_logits).float()

    def _imagine(self, acting: TensorDict, scoring: TensorDict, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns [N] along `scoring` of the actions that `acting` chooses, both latents [N], and the first preferences."""
        preferences, scored = [], []
        for step in range(1, self.imagination_horizon + 1):
            torch.manual_seed(seed + 2 * step)
            action, preference = self._act(acting)
            preferences.append(preference)
            following = self._advance(acting, action, seed + 2 * step + 1)
            if scoring is acting:
                acting = scoring = following
            else:
                acting, scoring = following, self._advance(scoring, action, seed + 2 * step + 1)
            scored.append(scoring)
        return self._score(cast(TensorDict, torch.stack(scored, 1))), preferences[0].float()

    def _act(self, latents: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions [N, A]; and what shows a shift of them before a choice flips: its probabilities, or the actions again."""
        policy = cast(Any, self.actor_model.get_dist(latents.select(*self.actor_model.in_keys, strict=False)))
        if getattr(policy, "probs", None) is None:
            action = policy.rsample() if self.actions == "sample" else policy.deterministic_sample
            return action, action
        choice = policy.sample() if self.actions == "sample" else policy.deterministic_sample
        # One-hot in value, straight-through.
        return choice.float() + (policy.probs - policy.probs.detach()), policy.probs

    def _advance(self, latents: TensorDict, action: torch.Tensor, seed: int) -> TensorDict:
        keys = self.tensor_keys
        torch.manual_seed(seed)
        following = self.prior_model(latents.copy().set(keys.action, action)).get("next")
        return following.select(keys.state, keys.belief)

    def _score(self, scored: TensorDict) -> torch.Tensor:
        """R [N] of H imagined latents [N, H]."""
        keys = self.tensor_keys
        reward = self._predict(self.reward_model, scored, "reward", self.reward_two_hot)
        terminal = torch.zeros_like(reward)  # [N, H, 1]
        if self.continue_model is not None:
            predicted = self.continue_model(scored.select(*self.continue_model.in_keys))
            name = continue_name(keys, self.continue_model) or "continue_pred"
            alive = entry(predicted, keys, name).float()
            terminal = 1 - (alive if name == "continuation" else alive.sigmoid())
        value = torch.zeros_like(reward)
        if self.bootstrap:
            last = self._predict(self.value_model, scored[:, -1:], "value", self.value_two_hot)
            value = torch.cat([value[:, :-1], last], 1)
        # Index 0 is where the imagination began: its reward came before any action.
        reward, value, terminal = (
            torch.cat([torch.zeros_like(each[:, :1]), each], 1) for each in (reward, value, terminal)
        )
        return lambda_return(reward, value, terminal=terminal, discount=self.discount, lmbda=1.0)[:, 0, 0]

    def _predict(
        self, model: TensorDictModuleBase, latents: TensorDict, name: str, two_hot: SymExpTwoHot
    ) -> torch.Tensor:
        """A head's value, decoded here from its logits if it writes them: what heads decode may carry no gradient."""
        written = model(latents.select(*model.in_keys))
        logits = written.get(getattr(self.tensor_keys, f"{name}_logits"), None)
        return entry(written, self.tensor_keys, name).float() if logits is None else two_hot(logits.float())

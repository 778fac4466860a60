"""Occlusion saliency: what hiding a piece of the image does to the policy and to the value.

    S_policy = |mean pi' - mean pi|^2 / 2      S_value = (v' - v)^2 / 2

of each window, spread over its pixels; a pixel's saliency is the mean over the windows that cover it.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch.nn.functional import conv2d, pad

from r2dreamer.dreamer import Agent
from r2dreamer.dreamer.classic.networks import SquashedNormal

CHUNK = 256  # occluded images encoded at once


class OcclusionSaliency:
    """Maps [H, W] of one observation, as the agent receives it with what it remembers.

    Args:
        fill: "blur" or "grey". Latents are the posterior's probabilities: samples change by chance, modes only when they flip.
    """

    def __init__(self, agent: Agent, key: str, *, fill: str = "blur", window: int = 8, stride: int = 4):
        _, height, width = agent.observations.images[key]
        if fill not in ("blur", "grey"):
            raise ValueError(f"occlusion.fill={fill} must be blur or grey.")
        if not 1 <= window <= min(height, width) or not 1 <= stride <= window:
            raise ValueError(
                f"occlusion.window={window}, occlusion.stride={stride}: the window must fit the image of {height}x{width}, "
                "and the stride be at least 1 and at most the window, so that it hides every pixel."
            )
        self.agent, self.key, self.fill, self.window = agent, key, fill, window
        self.encoder = agent.encoder.at_root()
        self.masks = window_masks(height, width, window, stride)  # [P, H, W]

    @torch.no_grad()
    def __call__(self, observed: TensorDictBase) -> dict[str, torch.Tensor]:
        """observed: one observation, unbatched, with the state, belief and action before it, as a policy reads it."""
        image = observed[self.key] / 255
        masks = self.masks.to(image.device)
        shown = blurred(image, self.window / 2) if self.fill == "blur" else torch.full_like(image, 0.5)
        occluded = torch.where(masks.unsqueeze(1), shown, image)  # [P, C, H, W]
        belief = self._belief(observed)
        policy, value = self._judge(observed, belief, image.unsqueeze(0))
        found = [self._judge(observed, belief, part) for part in occluded.split(CHUNK)]
        scores = {
            "policy": (torch.cat([each for each, _ in found]) - policy).square().sum(-1) / 2,
            "value": (torch.cat([each for _, each in found]) - value).square().sum(-1) / 2,
        }
        covered = masks.sum(0).clamp_min(1)
        return {name: (score[:, None, None] * masks).sum(0) / covered for name, score in scores.items()}

    def _belief(self, observed: TensorDictBase) -> torch.Tensor:
        """h_t [1, D], which no image has touched yet."""
        sizes = {**self.agent.latent_sizes, "action": self.agent.actions.size}
        begins = bool(observed["is_init"].any())
        zeros = {name: torch.zeros(size, device=observed[self.key].device) for name, size in sizes.items()}
        before = zeros if begins else {name: observed[name].float() for name in sizes}
        return self.agent.prior(*(before[name].unsqueeze(0) for name in ("state", "belief", "action")))[2]

    def _judge(self, observed: TensorDictBase, belief: torch.Tensor, images: torch.Tensor):
        """Mean of the policy [P, A] and value [P, 1], had the agent seen these images [P, C, H, W]."""
        count = len(images)
        others = {key: observed[key].expand(count, *observed[key].shape) for key in self.encoder.in_keys}
        seen = TensorDict({**others, self.key: images}, [count])
        belief = belief.expand(count, -1)
        logits, _ = self.agent.posterior(belief, self.encoder(seen)["encoded_latents"])
        latents = TensorDict({"state": self.agent.posterior.latent.expected(logits), "belief": belief}, [count])
        policy = self.agent.actor.get_dist(latents)
        action = policy.deterministic_sample if isinstance(policy, SquashedNormal) else policy.mean
        return action, self.agent.value_model(latents.copy())["state_value"]


def window_masks(height: int, width: int, window: int, stride: int) -> torch.Tensor:
    """Squares [P, H, W] that slide over an image and reach its last row and column."""
    places = lambda side: sorted({*range(0, side - window + 1, stride), side - window})
    masks = torch.zeros(len(places(height)) * len(places(width)), height, width, dtype=torch.bool)
    corners = [(y, x) for y in places(height) for x in places(width)]
    for mask, (y, x) in zip(masks, corners, strict=True):
        mask[y : y + window, x : x + window] = True
    return masks


def blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """An image [C, H, W] under a Gaussian, edges continued."""
    radius = max(1, round(2 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=image.device)
    kernel = torch.softmax(-offsets.square() / (2 * sigma**2), 0)
    framed = pad(image.unsqueeze(1), (radius,) * 4, mode="replicate")  # [C, 1, H + 2r, W + 2r]
    return conv2d(conv2d(framed, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).squeeze(1)


def inside_fraction(maps: torch.Tensor, masks: torch.Tensor) -> dict[str, float | None]:
    """How much of the saliency [T, H, W] lies in the object [T, H, W], of frames that show it; beside it the area's share."""
    shows = masks.flatten(1).any(1)
    maps, masks = maps[shows].double(), masks[shows].double()
    total, frames = maps.sum().item(), int(shows.sum())
    return {
        "fraction": (maps * masks).sum().item() / total if total else None,
        "area": masks.mean().item() if frames else None,
        "frames": frames,
    }

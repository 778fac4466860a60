"""Heads that predict embeddings: the present one from the belief alone, or the next one from the latents so far."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import nn

from ..sizes import Sizes
from .heads import latent_head
from .layers import mlp


class CausalPrediction(nn.Module):
    """A causal transformer over records: at each step it predicts the embedding of the next one.

    Its token of step t is made of the projected latents and of the action that leads to step t + 1. A step attends to
    itself and to earlier steps of its own episode. The arguments are those of :func:`next_embedding_head`.
    """

    def __init__(self, embedding_size: int, action_size: int, width: int, layers: int = 2, attention_heads: int = 4):
        super().__init__()
        if width % attention_heads or width % 2:
            raise ValueError(f"width={width} must be even and a multiple of attention_heads={attention_heads}.")
        self.latents, self.action = nn.Linear(embedding_size, width), nn.Linear(action_size, width)
        layer = nn.TransformerEncoderLayer(
            width, attention_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = mlp(width, width, 1, embedding_size)
        self.attention_heads = attention_heads

    def forward(self, projected: torch.Tensor, action: torch.Tensor, is_init: torch.Tensor) -> torch.Tensor:
        """Predictions [B, T, E] of projected latents [B, T, E], actions [B, T, A] and flags [B, T, 1].

        Nothing follows the last step in the window: its prediction lacks an action, and no loss reads it.
        """
        following = torch.cat([action[:, 1:], torch.zeros_like(action[:, :1])], 1)  # a record's action led to it
        tokens = self.latents(projected) + self.action(following.to(projected.dtype))  # [B, T, width]
        tokens = tokens + _positions(tokens.shape[1], tokens.shape[2], tokens.device)
        episode = is_init.reshape(projected.shape[:2]).long().cumsum(1)  # [B, T]
        step = torch.arange(episode.shape[1], device=episode.device)
        unseen = (episode.unsqueeze(-1) != episode.unsqueeze(-2)) | (step.unsqueeze(-1) < step)  # [B, T, T]
        mask = unseen.repeat_interleave(self.attention_heads, 0)  # [B * heads, T, T]
        return self.output(self.transformer(tokens, mask=mask, is_causal=False)).float()


def _positions(length: int, width: int, device: torch.device) -> torch.Tensor:
    """Sines and cosines [T, width] of the step's position in the window."""
    rates = 10_000 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device).unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


def next_embedding_head(
    sizes: Sizes, *, layers: int = 2, attention_heads: int = 4, width: int | None = None
) -> TensorDictModule:
    """NE-Dreamer's prediction ``("next", "predicted_latents")`` as a head of ``build_agent``, behind a projection.

    Args:
        sizes: of the agent.
        layers: of the transformer.
        attention_heads: of each layer.
        width: of a token. Default: ``units`` of the sizes.
    """
    network = CausalPrediction(sizes.embedding, sizes.actions, width or sizes.units, layers, attention_heads)
    inputs = [("next", "projected_latents"), "action", "is_init"]
    return TensorDictModule(network, in_keys=inputs, out_keys=[("next", "predicted_latents")])


def belief_prediction_head(sizes: Sizes, *, layers: int = 1) -> TensorDictModule:
    """Dreamer-CDP's prediction ``("next", "predicted_latents")`` as a head of ``build_agent``: an MLP of the belief alone.

    Args:
        sizes: of the agent.
        layers: hidden layers of the MLP.
    """
    network = mlp(sizes.belief, sizes.embedding, layers, sizes.embedding)
    return latent_head(network, ["predicted_latents"], prefix=("next",), in_keys=["belief"])

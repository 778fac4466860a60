"""The film of what a decoder shows: real above, predicted below, their difference under both."""

from __future__ import annotations

import warnings
from typing import cast

import numpy as np
import torch
from tensordict import TensorDictBase

from r2dreamer.dreamer import Agent, ObservationDecoder

from .evaluation import untouched_generators
from .video import write_video

CONTEXT = 5  # frames that are seen; the following ones are imagined
WINDOWS = 6  # films side by side


@torch.no_grad()
def predict(agent: Agent, records: TensorDictBase, context: int = CONTEXT) -> tuple[torch.Tensor, torch.Tensor]:
    """States and beliefs [B, T] along records: posterior while they are seen, then the prior under the same actions."""
    begun = cast(TensorDictBase, records[:, :context])
    seen = agent.rollout(agent.encoder(begun.copy())).get("next")
    states, beliefs = list(seen.get("state").unbind(1)), list(seen.get("belief").unbind(1))
    for action in records.get("action")[:, context:].unbind(1):
        _, state, belief = agent.prior(states[-1], beliefs[-1], action)
        states.append(state)
        beliefs.append(belief)
    return torch.stack(states, 1), torch.stack(beliefs, 1)


def open_loop(
    agent: Agent, decoder: ObservationDecoder, records: TensorDictBase, context: int = CONTEXT
) -> np.ndarray | None:
    """uint8 frames [T, 3 * H, windows * W, 3] of the first image; None without one, or where every window is cut.

    Only windows in which no episode begins after the context are shown: nothing foretells how the next one begins.
    """
    key = next(iter(decoder.image_channels), None)
    if key is None or records.shape[1] <= context:
        return None
    whole = ~records.get("is_init")[:, context:].flatten(1).any(1)
    records = cast(TensorDictBase, records[whole][:WINDOWS])
    if not len(records):
        return None
    predicted = decoder.decode(*predict(agent, records, context))[key].cpu()
    real = records.get(("next", key)).float().cpu() / 255  # [B, T, C, H, W]
    rows = torch.cat([real, predicted, (predicted - real + 1) / 2], -2)  # [B, T, C, 3H, W]
    film = torch.cat(list(rows), -1)  # [T, C, 3H, B*W]
    # Of stacked frames the newest, in colour or grey.
    film = film[:, -3:] if film.shape[1] % 3 == 0 else film[:, -1:].expand(-1, 3, -1, -1)
    return (film.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def film_open_loop(trainer) -> None:
    """Films sampled windows with the detached decoder or the member's own; without any there is no film.

    Every random generator is left as it was.
    """
    decoder = getattr(trainer.learner.detached_decoder, "decoder", trainer.agent.heads.get("decoder"))
    if decoder is None or not trainer.replay.can_sample():
        return
    with untouched_generators(trainer.cfg.seed):
        film = open_loop(trainer.agent, decoder, trainer.replay.sample(device=trainer.device))
    if film is None and decoder.image_channels:
        warnings.warn(
            f"No open_loop.mp4: in every window of batch_length={trainer.cfg.batch_length} an episode begins after the "
            f"{CONTEXT} frames that are seen, and nothing foretells how; choose a shorter batch_length.",
            stacklevel=2,
        )
    if film is not None:
        write_video(trainer.logdir / "open_loop.mp4", film, fps=10)
        trainer.metrics.video(trainer.frames, "video/open_loop", film, fps=10)

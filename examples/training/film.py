"""Evaluation as the trainer and `evaluate.py` both do it, and the film of an agent whose observations show nothing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torchrl.envs import EnvBase
from tqdm import tqdm

from r2dreamer.dreamer import Agent
from r2dreamer.envs import make_gym, make_vector_env, reseed

from .evaluation import LONGEST_EPISODE, LONGEST_FILM, EvaluationResult, evaluate

SIDE = 192  # about how many pixels the shorter side of a film gets


def evaluate_seeds(
    environments: EnvBase,
    agent: Agent,
    seeds: Sequence[int],
    *,
    seed: int,
    record: bool,
    max_steps: int | None = LONGEST_EPISODE,
    make_environment: Callable[..., EnvBase] | None = None,
) -> EvaluationResult:
    """One episode from each of `seeds` with mode actions; the first one is filmed if `record`.

    Args:
        seed: for the sampling inside the policy.
        max_steps: where an episode is cut off, with a warning; None plays on until it ends.
        make_environment: films the episode where the observations hold no image; None leaves such a film out.
    """
    reseed(environments, seeds)
    actions = []  # of the first environment
    keep = lambda module, inputs, acted: actions.append(acted["action"][0].cpu().clone())
    hook = agent.policy.register_forward_hook(keep)
    image = next(iter(agent.observations.images), None)
    try:
        result = evaluate(
            environments,
            agent.policy,
            episodes=len(seeds),
            max_steps=max_steps,
            record=record,
            pixels_key=image or "pixels",
            seed=seed,
        )
    finally:
        hook.remove()
    if result.cut_off:
        tqdm.write(
            f"WARNING: {result.cut_off} of {len(seeds)} evaluation episodes did not end within max_steps={max_steps} and "
            "were cut off. Give the environment a time limit: torchrl.envs.StepCounter(max_steps=...), or "
            "env.episode_frames=... for env=gym. Or set another eval.max_steps.",
            file=sys.stderr,
        )
    if record and image is None and make_environment is not None:
        result.frames = film(make_environment, seeds[0], actions[: min(result.lengths[0], LONGEST_FILM)])
    return result


def film(make_environment: Callable[..., EnvBase], seed: int, actions: Sequence[torch.Tensor]) -> np.ndarray | None:
    """Plays the actions again, from the same seed, where the task can be seen: uint8 frames [T, H, W, 3].

    None, with a notice, where it cannot.
    """
    # Gymnasium's images have shapes of their own; a square would squeeze them.
    size = None if getattr(make_environment, "func", None) is make_gym else SIDE
    factory = functools.partial(make_environment, from_pixels=True, image_size=size)
    try:
        environment = make_vector_env(factory, [seed], parallel=1)  # a renderer may hang, or end its process
        try:
            now = environment.reset()
            frames = [_shrink(now["pixels"][0])]
            for action in actions:
                now = environment.step(now.set("action", action[None]))["next"]
                frames.append(_shrink(now["pixels"][0]))
        finally:
            environment.close()
    except Exception as error:  # noqa: BLE001 - renderers fail in many ways, and no film is worth a lost run
        print(f"No video: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None
    return np.stack(frames)


def _shrink(pixels: torch.Tensor) -> np.ndarray:
    every = max(1, min(pixels.shape[1:]) // SIDE)
    return pixels[:, ::every, ::every].permute(1, 2, 0).numpy().copy()

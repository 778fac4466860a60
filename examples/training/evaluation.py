"""Plays a policy greedily for some episodes, films them, and leaves everything else as it was."""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import GlobalRNGState
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from r2dreamer.dreamer import Agent
from r2dreamer.envs import VectorEnv, make_gym, make_vector_env

from .episodes import Episode, Scores, reported, summarise
from .files import warn

LONGEST_FILM = 1000  # frames; a game of Atari can last 27,000 steps
LONGEST_EPISODE = 30_000  # steps; of what does not end within them nobody knows whether it ever does


@dataclass
class EvaluationResult:
    """The episodes; `frames` is the first episode of the first environment, uint8 [T, H, W, 3]."""

    episodes: list[Episode] = field(default_factory=list)
    frames: np.ndarray | None = None

    @property
    def returns(self) -> list[float]:
        return [episode.reward for episode in self.episodes]

    @property
    def lengths(self) -> list[int]:
        return [episode.length for episode in self.episodes]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.returns)

    @property
    def std(self) -> float:
        """Over the episodes, as numpy's default: divided by their number."""
        return statistics.pstdev(self.returns)

    def summary(self, scores: Scores | None = None) -> dict[str, float]:
        """The entries of a metrics line."""
        values = summarise(self.episodes, scores) | {"return_std": self.std}
        return {f"eval/{name}": value for name, value in values.items()}


def never() -> bool:
    return False


def evaluate(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    episodes: int,
    max_steps: int | None = None,
    record: bool = False,
    pixels_key: str = "pixels",
    seed: int | None = None,
    stop: Callable[[], bool] = never,
) -> EvaluationResult:
    """Mode actions, no gradient, the undiscounted return of whole episodes.

    Each environment plays its first episode after a reset, however long; taking the episodes that end first would
    prefer the short ones. Of what an environment reports below "metrics" the largest value counts. If `env` holds fewer
    than `episodes` environments they play several rounds.

    Args:
        max_steps: policy steps after which an episode is cut off.
        seed: for the sampling inside the policy (latents); the environments keep their own seeds, set by the caller.
        stop: asked before every step; a yes ends the evaluation, whose result is then worth nothing.
    """
    if episodes < 1:
        raise ValueError(f"episodes={episodes} must be at least 1.")
    result = EvaluationResult()
    greedy = set_exploration_type(ExplorationType.DETERMINISTIC)
    with untouched_generators(seed), _eval_mode(policy), torch.no_grad(), greedy:
        while len(result.episodes) < episodes and not stop():
            filmed = [] if record and not result.episodes else None
            played = _play_round(env, policy, max_steps, pixels_key, filmed, stop)
            result.episodes += played[: episodes - len(result.episodes)]
            if filmed:
                result.frames = np.stack(filmed)
    return result


def _play_round(env, policy, max_steps, pixels_key, filmed, stop):
    """Every environment's first episode after a reset, in their order; `filmed` takes the first one's images."""

    def shoot(observation):
        if filmed is not None and playing[0] and len(filmed) < LONGEST_FILM and pixels_key in observation:
            pixels = observation[pixels_key]
            filmed.append(_to_image(pixels[0] if observation.batch_size else pixels))

    count = env.batch_size.numel()
    env_device = env.device or torch.device("cpu")
    policy_device = next((parameter.device for parameter in policy.parameters()), env_device)
    playing = torch.ones(count, dtype=torch.bool)
    returns = torch.zeros(count, dtype=torch.float64)
    lengths = torch.zeros(count, dtype=torch.int64)
    root = env.reset()
    metrics = reported(root, (count,))
    tracks_init = "is_init" in root
    root.set("is_init", torch.ones_like(root["done"]))
    steps = 0
    while playing.any() and (max_steps is None or steps < max_steps) and not stop():
        shoot(root)
        acted = root.update(policy(root.to(policy_device)).to(env_device))
        carried = acted.copy()
        stepped, root = env.step_and_maybe_reset(acted)
        after = stepped["next"]
        done = after["done"].reshape(count).cpu()
        if done[0]:
            shoot(after)
        returns += torch.where(playing, after["reward"].reshape(count).double().cpu(), 0.0)
        for name, now in reported(after, (count,)).items():
            metrics[name] = torch.where(playing, torch.maximum(metrics[name], now), metrics[name])
        lengths += playing
        playing &= ~done
        steps += 1
        # When one member ends, a ParallelEnv returns only the environments' own entries for all of them: put back
        # what the policy carries. Those of the ended member do not matter, its episode was the one that counts.
        for key, value in carried.items():
            if key not in root:
                root.set(key, value)
        if not tracks_init:
            root.set("is_init", after["done"].clone())
    return [
        Episode(
            returns[index].item(),
            int(lengths[index]),
            {name: each[index].item() for name, each in metrics.items()},
            cut_off=bool(playing[index]),
        )
        for index in range(count)
    ]


def _to_image(pixels: torch.Tensor) -> np.ndarray:
    """[C, H, W] (or already [H, W, C]) to uint8 [H, W, 3]; of stacked frames the newest, opacity left out."""
    image = pixels.detach().cpu()
    if image.shape[-1] not in (1, 3):
        image = image.movedim(0, -1)
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).byte()
    if image.shape[-1] == 4 and (image[..., 3] == 255).all():
        image = image[..., :3]  # red, green, blue, and opaque everywhere
    image = image[..., -3:] if image.shape[-1] % 3 == 0 else image[..., -1:].expand(*image.shape[:2], 3)
    return image.numpy().copy()


@contextlib.contextmanager
def untouched_generators(seed: int | None) -> Iterator[None]:
    """Global random states come back as they were, so that training does not depend on whether it is evaluated."""
    generators = GlobalRNGState()
    before = generators.state_dict()
    try:
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
        yield
    finally:
        generators.load_state_dict(before)


@contextlib.contextmanager
def _eval_mode(policy: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


SIDE = 192  # about how many pixels the shorter side of a film gets


def evaluate_seeds(
    environments: VectorEnv,
    agent: Agent,
    seeds: Sequence[int],
    *,
    seed: int,
    record: bool,
    max_steps: int | None = LONGEST_EPISODE,
    make_environment: Callable[..., EnvBase] | None = None,
    timeout: float = 120.0,
    stop: Callable[[], bool] = never,
) -> EvaluationResult:
    """One episode from each of `seeds` with mode actions; the first one is filmed if `record`.

    More seeds than environments are played in rounds.

    Args:
        seed: for the sampling inside the policy.
        max_steps: where an episode is cut off, with a warning; None plays on until it ends.
        make_environment: films the episode where the observations hold no image; None leaves such a film out.
        timeout: seconds that a step of such a film may take.
        stop: as in `evaluate`.
    """
    actions, count = [], environments.batch_size.numel()  # actions of the first environment, in the first round
    keep = lambda module, inputs, acted: actions.append(acted["action"][0].cpu().clone())
    image = next(iter(agent.observations.images), None)
    how: dict[str, Any] = {"max_steps": max_steps, "pixels_key": image or "pixels", "stop": stop}
    result = EvaluationResult()
    for first in range(0, len(seeds), count):
        mine = list(seeds[first : first + count])
        environments.reseed((mine * count)[:count])  # the last round may have fewer seeds than environments
        how |= {"episodes": len(mine), "seed": seed + first, "record": record and not first}
        with contextlib.nullcontext() if first else agent.policy.register_forward_hook(keep):
            played = evaluate(environments, agent.policy, **how)
        result = EvaluationResult(result.episodes + played.episodes, played.frames if not first else result.frames)
    if stop():
        return result
    if cut_off := sum(episode.cut_off for episode in result.episodes):
        warn(
            f"{cut_off} of {len(seeds)} evaluation episodes did not end within max_steps={max_steps} and were cut "
            "off. To end them give the environment a time limit, torchrl.envs.StepCounter(max_steps=...), or "
            "env.episode_frames=... for env=gym; to see more of them, a larger max_steps (while training, eval.max_steps)."
        )
    if record and image is None and make_environment is not None:
        result.frames = film(make_environment, seeds[0], actions[: min(result.lengths[0], LONGEST_FILM)], timeout)
    return result


def film(
    make_environment: Callable[..., EnvBase], seed: int, actions: Sequence[torch.Tensor], timeout: float = 120.0
) -> np.ndarray | None:
    """Plays the actions again, from the same seed, where the task can be seen: uint8 frames [T, H, W, 3].

    None, with a notice, where it cannot.
    """
    seen: dict[str, Any] = {"from_pixels": True, "image_size": SIDE}
    if getattr(make_environment, "func", None) is make_gym:
        # Its images have shapes of their own, which a square would squeeze; and no other observation is seen.
        seen |= {"image_size": None, "keys": None}
    factory = functools.partial(make_environment, **seen)
    try:
        # In a worker: a renderer may hang, or end its process.
        with contextlib.closing(make_vector_env(factory, [seed], parallel=1, timeout=timeout)) as environment:
            now = environment.reset()
            frames = [_shrink(now["pixels"][0])]
            for action in actions:
                now = environment.step(now.set("action", action[None]))["next"]
                frames.append(_shrink(now["pixels"][0]))
    except Exception as error:  # noqa: BLE001 - renderers fail in many ways, and no film is worth a lost run
        print(f"No video: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None
    return np.stack(frames)


def _shrink(pixels: torch.Tensor) -> np.ndarray:
    every = max(1, min(pixels.shape[1:]) // SIDE)
    return pixels[:, ::every, ::every].permute(1, 2, 0).numpy().copy()

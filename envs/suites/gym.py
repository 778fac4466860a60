"""Any Gymnasium environment on the package's contract: `make_gym("CartPole-v1", seed=0)`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import traceback
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled, DeprecatedEnv, Error

from ..base.check import RESERVED
from ..base.contract import ContractEnv, apply_contract
from ..base.errors import require, require_positive
from ..base.gl import choose_gl, missing_gl
from ..base.images import is_image, to_pixels
from ..base.simulator import Simulator
from .registry import register, unknown_task

OBSERVED = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def make_gym(
    task: str,
    *,
    seed: int,
    from_pixels: bool = False,
    image_size: int | None = 64,
    action_repeat: int = 1,
    time_limit: int | None = None,
    grayscale: bool = False,
    keys: Sequence[str] | None = None,
) -> ContractEnv:
    """One Gymnasium environment, seeded.

    Args:
        task: The name under which Gymnasium knows it.
        seed: Of the episodes.
        from_pixels: Observes only the rendered image, under ``"pixels"``.
        image_size: Images are resized to this square; ``None`` keeps their own size.
        action_repeat: Frames of one step.
        time_limit: Truncates after this many frames, instead of the task's own limit.
        grayscale: One channel instead of three.
        keys: The names to keep of a dict observation; default: all.

    Raises:
        ValueError: For a task, a space or a setting that cannot be used.
        ImportError: If a package that the task needs is missing.
    """
    import_old_gym_quietly()
    require_positive(image_size=image_size, action_repeat=action_repeat, time_limit=time_limit)
    env = _build(task, from_pixels, time_limit)
    return apply_contract(Gym(env, task, from_pixels, image_size, action_repeat, grayscale, keys), task, seed)


class Gym(Simulator):
    """A Gymnasium environment; TorchRL's GymWrapper takes ten times as long for a step.

    It observes its rendering, or any mixture of boxes and discrete spaces as flat images and vectors; one-hot vectors stand
    for discrete ones. Rewards of a repeated action are summed until the episode ends.
    """

    def __init__(
        self, env: Any, task: str, from_pixels: bool, image_size: int | None, repeat: int, grayscale: bool, keys: Any
    ):
        actions, observed = _actions(env.action_space, task), env.observation_space
        if from_pixels:
            choose_gl()
            with _explained(task):
                env.reset(seed=0)  # MuJoCo's tracking camera remembers where it began
                drawn = env.render()
            if not isinstance(drawn, np.ndarray) or not is_image(drawn.shape, drawn.dtype):
                modes = env.metadata.get("render_modes")
                raise ValueError(
                    f"from_pixels=True: {task!r} draws no image ({type(drawn).__name__}; its render modes are {modes}). Leave "
                    "from_pixels out."
                )
            observed = spaces.Box(0, 255, drawn.shape, np.uint8)
        self.leaves: dict[str, tuple[tuple, Any]] = {}
        for name, path, space in _leaves(observed):
            if name in self.leaves:
                raise ValueError(
                    f"{task!r} observes {name!r} twice, once its observation space is flat: rename one of them."
                )
            self.leaves[name] = path, space
        if keys is not None:
            if not keys or {*keys} - self.leaves.keys():
                raise ValueError(
                    f"keys={list(keys)} of {task!r}: it observes {sorted(self.leaves)}; name some of these."
                )
            self.leaves = {key: self.leaves[key] for key in keys}
        for path, space in self.leaves.values():
            if not isinstance(space, OBSERVED):
                raise ValueError(
                    f"The observation space of {task!r} holds {space} at {'/'.join(map(str, path)) or 'its root'}, which is not "
                    "supported. Supported are Box, Discrete, MultiDiscrete, MultiBinary and (nested) Dict of these; wrap the "
                    "environment with gymnasium.wrappers.FlattenObservation, or keep other entries with keys=[...]."
                )
            shape = space.shape or ()
            if len(shape) > 2 and not _is_image(space) and sorted(shape)[-2] >= 32:
                raise ValueError(
                    f"{task!r} observes {space.dtype} of shape {shape} at {'/'.join(map(str, path)) or 'its root'}, which "
                    "looks like an image and is none: images are uint8 of [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels. "
                    "Make it one with a wrapper of Gymnasium's, or a vector with gymnasium.wrappers.FlattenObservation."
                )
        self.image_size, self.grayscale = image_size, grayscale
        shapes = {name: self._convert(space, space.sample()).shape for name, (_, space) in self.leaves.items()}
        super().__init__(observations=shapes, actions=actions)
        self.env, self.repeat, self.from_pixels, self.next_seed = env, repeat, from_pixels, None

    def seed(self, number: int) -> None:
        self.next_seed = number

    def begin(self) -> dict[str, np.ndarray]:
        seed, self.next_seed = self.next_seed, None  # further episodes go on with the same generator
        return self._observe(self.env.reset(seed=seed)[0])

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        space, total = self.env.action_space, 0.0
        action = action + int(space.start) if self.discrete else action.reshape(space.shape).astype(space.dtype)
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, _ = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return self._observe(observation), total, terminated, truncated

    def _observe(self, observation: Any) -> dict[str, np.ndarray]:
        observation = self.env.render() if self.from_pixels else observation
        return {
            name: self._convert(space, reduce(getitem, path, observation))
            for name, (path, space) in self.leaves.items()
        }

    def _convert(self, space: Any, value: Any) -> np.ndarray:
        if _is_image(space):
            return to_pixels(np.asarray(value), self.image_size, self.grayscale)
        if isinstance(space, spaces.Box):
            return np.array(value, np.float32).reshape(-1)  # np.array copies: simulators reuse their buffers
        return np.array(spaces.flatten(space, value), np.float32)  # one-hot

    def close(self, *, raise_if_closed: bool = True) -> None:
        super().close(raise_if_closed=raise_if_closed)
        self.env.close()


def _actions(space: Any, task: str) -> int | tuple[np.ndarray, np.ndarray]:
    """The number of choices of an action space, or the bounds of a float32 vector; any other space is refused."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return space.low.reshape(-1), space.high.reshape(-1)
    raise ValueError(
        f"The action space of {task!r} is {space}, which is not supported. Supported are Discrete and Box of floats; wrap "
        "the environment so that its actions become one of these (MultiDiscrete, for example, becomes one Discrete over "
        "all combinations)."
    )


def _leaves(space: Any, path: tuple = ()) -> Iterator[tuple[str, tuple, Any]]:
    """Yields (name, path, space) of every leaf of a nested dict space."""
    if isinstance(space, spaces.Dict):
        for key, child in space.spaces.items():
            yield from _leaves(child, (*path, key))
    else:
        name = "_".join(map(str, path)) or ("pixels" if _is_image(space) else "observation")
        yield (f"observation_{name}" if name in RESERVED else name), path, space


def _is_image(space: Any) -> bool:
    """Whether it is a photograph: a small grid of codes, or bytes of another range, is a vector."""
    if not isinstance(space, spaces.Box) or not is_image(space.shape, space.dtype):
        return False
    return sorted(space.shape)[-2] >= 8 and int(space.high.max()) == 255


def import_old_gym_quietly() -> None:
    """TorchRL imports the old `gym` where it is installed (Memory Maze needs it), which prints a notice when it is."""
    if importlib.util.find_spec("gym") is not None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
            importlib.import_module("gym")


@contextlib.contextmanager
def _explained(task: str) -> Iterator[None]:
    """What is missing to build or to draw a task, said with its remedy."""
    try:
        yield
    except DependencyNotInstalled as error:
        raise ImportError(f"Gymnasium's task {task!r} needs a package that is missing: {error}") from error
    except (Error, ValueError):
        raise
    except TypeError as error:
        raise ValueError(f"Gymnasium's task {task!r} cannot be made from its name alone: {error}") from error
    except Exception as error:
        files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
        if any("mujoco" in file for file in files):
            raise missing_gl(error) from error
        raise


def _build(task: str, from_pixels: bool, time_limit: int | None) -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame must not open a window to render an array
    kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if from_pixels else {}
    if time_limit is not None:
        kwargs["max_episode_steps"] = time_limit
    if str(task).startswith("ALE/") or "NoFrameskip" in str(task):
        require("ale_py", "atari")  # which registers them
    try:
        with _explained(task):
            return gymnasium.make(task, disable_env_checker=True, **kwargs)
    except DeprecatedEnv as error:
        raise ValueError(f"Gymnasium no longer has {task!r}: {error}") from error
    except Error as error:
        if str(task).rpartition(":")[2] in gymnasium.registry:
            raise ValueError(f"Gymnasium's task {task!r} could not be made: {error}") from error
        raise unknown_task(task, gymnasium.registry, "Gymnasium", own="gym") from error


register(
    "gym",
    title="Gymnasium, any registered task",
    make=make_gym,
    tasks=lambda: gymnasium.registry,
    module="gymnasium",
    extra="gym",
)

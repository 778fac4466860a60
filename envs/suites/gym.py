"""Any Gymnasium environment on the package's contract: `make_gym("CartPole-v1", seed=0)`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..base.contract import ContractEnv, apply_contract
from ..base.errors import require, require_positive
from ..base.gl import choose_gl, missing_gl
from ..base.simulator import Simulator
from .registry import register, unknown_task


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
    gymnasium = require("gymnasium", "gym")
    import_old_gym_quietly()
    require_positive(image_size=image_size, action_repeat=action_repeat, time_limit=time_limit)
    from ._gym_wrappers import ActionRepeat, ContractActions, ContractObservations, Rendered

    env = _build(gymnasium, task, from_pixels, time_limit)
    env = ActionRepeat(ContractActions(env, task), action_repeat)
    if from_pixels:
        choose_gl()
        with _explained(task):
            env = Rendered(env)
    return apply_contract(Gym(ContractObservations(env, image_size, grayscale, keys, task)), task, seed)


class Gym(Simulator):
    """A Gymnasium environment that observes a flat dict; TorchRL's GymWrapper takes ten times as long for a step."""

    def __init__(self, env: Any):
        shapes = {name: space.shape for name, space in env.observation_space.items()}
        space = env.action_space
        super().__init__(observations=shapes, actions=int(space.n) if hasattr(space, "n") else (space.low, space.high))
        self.env, self.next_seed = env, None

    def seed(self, number: int) -> None:
        self.next_seed = number

    def begin(self) -> dict[str, np.ndarray]:
        seed, self.next_seed = self.next_seed, None  # further episodes go on with the same generator
        return self.env.reset(seed=seed)[0]

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        observation, reward, terminated, truncated, _ = self.env.step(action)
        return observation, reward, terminated, truncated

    def close(self, *, raise_if_closed: bool = True) -> None:
        super().close(raise_if_closed=raise_if_closed)
        self.env.close()


def import_old_gym_quietly() -> None:
    """TorchRL imports the old `gym` where it is installed (Memory Maze needs it), which prints a notice when it is."""
    if importlib.util.find_spec("gym") is not None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
            importlib.import_module("gym")


@contextlib.contextmanager
def _explained(task: str) -> Iterator[None]:
    """What is missing to build or to draw a task, said with its remedy."""
    from gymnasium.error import DependencyNotInstalled, Error

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


def _build(gymnasium: Any, task: str, from_pixels: bool, time_limit: int | None) -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame must not open a window to render an array
    kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if from_pixels else {}
    if time_limit is not None:
        kwargs["max_episode_steps"] = time_limit
    if str(task).startswith("ALE/") or "NoFrameskip" in str(task):
        require("ale_py", "atari")  # which registers them
    try:
        with _explained(task):
            return gymnasium.make(task, disable_env_checker=True, **kwargs)
    except gymnasium.error.DeprecatedEnv as error:
        raise ValueError(f"Gymnasium no longer has {task!r}: {error}") from error
    except gymnasium.error.Error as error:  # not registered, or not even a name
        raise unknown_task(task, gymnasium.registry, "Gymnasium", own="gym") from error


register(
    "gym",
    title="Gymnasium, any registered task",
    make=make_gym,
    tasks=lambda: importlib.import_module("gymnasium").registry,
    module="gymnasium",
    extra="gym",
)

"""Any Gymnasium environment on the package's contract: `make_gym("CartPole-v1", seed=0)`."""

import contextlib
import importlib.util
import io
import os

import numpy as np
from torchrl.envs import GymWrapper

from .errors import require, require_positive, unknown_task
from .transforms import ClippedActionScaling, finish


def make_gym(
    task,
    *,
    seed,
    from_pixels=False,
    image_size=64,
    action_repeat=1,
    time_limit=None,
    grayscale=False,
    keys=None,
):
    """One Gymnasium environment, seeded.

    from_pixels: observe the rendered image, and only that, under "pixels".
    image_size: images are resized to this square; None keeps their own size.
    time_limit: truncate after this many environment frames, instead of the task's own limit.
    keys: of a dict observation, the names to keep (default: all).
    """
    gymnasium = require("gymnasium", "gym")
    import_old_gym_quietly()
    require_positive(image_size=image_size, action_repeat=action_repeat, time_limit=time_limit)
    from .gym_wrappers import ActionRepeat, ContractActions, ContractObservations, Rendered

    env = _build(gymnasium, task, from_pixels, time_limit)
    env = ActionRepeat(ContractActions(env, task), action_repeat)
    if from_pixels:
        env = Rendered(env)
    env = ContractObservations(env, image_size, grayscale, keys, task)
    space = env.action_space
    bounded = isinstance(space, gymnasium.spaces.Box) and np.isfinite([space.low, space.high]).all()
    # TorchRL builds specs on the GymWrapper; a box without bounds has no range to scale to and stays as it is.
    return finish(GymWrapper(env), task, seed, *([ClippedActionScaling()] if bounded else []))


def import_old_gym_quietly():
    """TorchRL imports the old `gym` where it is installed (Memory Maze needs it), which prints a notice when it is."""
    if importlib.util.find_spec("gym") is not None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
            importlib.import_module("gym")


def _build(gymnasium, task, from_pixels, time_limit):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame must not open a window to render an array
    kwargs = {"render_mode": "rgb_array"} if from_pixels else {}
    if time_limit is not None:
        kwargs["max_episode_steps"] = time_limit
    try:
        return gymnasium.make(task, disable_env_checker=True, **kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"Gymnasium's task {task!r} needs a package that is missing: {error}") from error
    except gymnasium.error.UnregisteredEnv as error:
        raise unknown_task(task, gymnasium.registry, "Gymnasium") from error

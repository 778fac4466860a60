"""Whether an environment keeps the contract this package's agents rely on, and what to do where it does not."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torchrl.data import Bounded, MultiOneHot, OneHot, Unbounded
from torchrl.envs.utils import check_env_specs

# Names the agent itself writes next to the observation: an observation called so would be overwritten, silently.
RESERVED = (
    "action", "belief", "continue_pred", "done", "encoded_latents", "is_init", "loc", "metrics", "next",
    "posterior_logits", "prior_logits", "probs", "projected_latents", "reward", "reward_logits", "scale", "state",
    "state_value", "state_value_logits", "stream", "terminated", "true_reward", "truncated",
)  # fmt: skip
# An error that only they raised says that the contract is broken. Any other comes from the environment's own code.
LIBRARIES = {"gymnasium", "r2dreamer", "tensordict", "torch", "torchrl", *sys.stdlib_module_names}


def check_environment(env: Any) -> None:
    """Checks one unbatched environment against the contract of keys.

    Args:
        env: The environment.

    Raises:
        ValueError: Names every missing or misshaped key, with the remedy. An error in the environment's own code is
            raised as it is.
    """
    problems = [*_observations(env), *_action(env), *_reward_and_flags(env)]
    if env.batch_size:
        problems.insert(0, f"its batch size is {tuple(env.batch_size)}: hand over a single environment, unbatched")
    if not problems:
        try:
            check_env_specs(env)
        except (AssertionError, RuntimeError, KeyError) as error:
            if not _raised_by_libraries(error):
                error.add_note(f"The environment {env} raised this in its first steps, under random actions.")
                raise
            problems = [f"what it returns is not what its specs announce: {error}"]
    if problems:
        raise ValueError(f"The environment {env} does not keep the contract: " + "; ".join(problems) + ".")


def _raised_by_libraries(error: Exception) -> bool:
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return all(module.partition(".")[0] in LIBRARIES for module in modules)


def _observations(env: Any) -> Iterator[str]:
    # What stands below "metrics" is reported, not observed; a StepCounter's number is its own.
    named = [*env.observation_spec.items(True, True)]
    counted = [key for key, spec in named if key == "step_count" and spec.dtype == torch.int64]
    unseen = lambda key: key in ("is_init", *counted) or (isinstance(key, tuple) and key[0] == "metrics")
    keys = [key for key, _ in named if not unseen(key)]
    if not keys:
        yield "it observes nothing: it needs an image, under 'pixels', or a vector"
    if not _is_flag(env.observation_spec, "is_init"):
        yield "'is_init' is missing: append torchrl.envs.InitTracker()"
    for key, spec in named:
        if isinstance(key, tuple) and key[0] == "metrics" and (spec.shape.numel() != 1 or len(key) > 2):
            yield f"{key!r} has shape {tuple(spec.shape)}: a metric is one number, directly below 'metrics'"
    for key in keys:
        spec = env.observation_spec[key]
        shape = tuple(spec.shape)
        if not isinstance(key, str):
            yield f"observation {key!r} is nested: give it a flat name with torchrl.envs.RenameTransform"
        elif key in RESERVED:
            yield f"observation {key!r} has a name the agent uses: rename it with torchrl.envs.RenameTransform"
        if len(shape) == 3:
            if spec.dtype != torch.uint8:
                yield f"image {key!r} is {spec.dtype}, not uint8: images are stored as bytes, remove ToTensorImage"
            elif shape[0] > 16:
                yield f"image {key!r} has shape {shape}, not [C, H, W]: append PermuteTransform((-1, -3, -2))"
        elif len(shape) != 1:
            yield f"observation {key!r} has shape {shape}: make it a vector [N] (FlattenObservation) or a [C, H, W]"
        elif spec.dtype != torch.float32:
            yield f"vector {key!r} is {spec.dtype}, not float32: append torchrl.envs.DoubleToFloat or a cast"


def _action(env: Any) -> Iterator[str]:
    keys = list(env.full_action_spec.keys(True, True))
    if keys != ["action"]:
        yield f"its action entries are {keys}: exactly one, called 'action', is supported"
        return
    spec = env.full_action_spec["action"]
    if isinstance(spec, MultiOneHot):
        yield "'action' is several choices at once (MultiOneHot): make it one choice over all combinations (OneHot)"
        return
    if isinstance(spec, OneHot) and len(spec.shape) == 1:
        return
    if not isinstance(spec, (Bounded, Unbounded)) or len(spec.shape) != 1:
        yield f"'action' is {type(spec).__name__} of shape {tuple(spec.shape)}: make it OneHot or a float32 vector"
    elif spec.dtype != torch.float32:
        yield f"'action' is {spec.dtype}, not float32: append torchrl.envs.DoubleToFloat"
    elif isinstance(spec, Bounded) and not ((spec.low == -1).all() and (spec.high == 1).all()):
        yield "'action' is not in [-1, 1]: append r2dreamer.envs.ClippedActionScaling()"


def _reward_and_flags(env: Any) -> Iterator[str]:
    reward = env.full_reward_spec.get("reward", None)
    if reward is None:
        yield f"'reward' is missing (it has {list(env.full_reward_spec.keys(True, True))}): rename it"
    elif tuple(reward.shape) != (1,) or reward.dtype != torch.float32:
        yield f"'reward' is {reward.dtype} of shape {tuple(reward.shape)}, not float32 [1]: cast or unsqueeze it"
    for flag in ("done", "terminated", "truncated"):
        if not _is_flag(env.full_done_spec, flag):
            remedy = "append torchrl.envs.StepCounter(max_steps)" if flag == "truncated" else "give it as bool [1]"
            yield f"{flag!r} is missing or not bool [1]: an episode terminates or is truncated, {remedy}"


def _is_flag(specs: Any, name: str) -> bool:
    spec = specs.get(name, None)
    return spec is not None and spec.dtype == torch.bool and tuple(spec.shape) == (1,)

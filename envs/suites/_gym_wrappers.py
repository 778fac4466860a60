"""Gymnasium wrappers behind `make_gym`; imported only when Gymnasium is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from ..base.check import RESERVED
from ..base.images import is_image, to_pixels


class ContractActions(gymnasium.ActionWrapper):
    """Discrete actions counted from 0 and boxes flattened to float32 vectors; any other space is refused."""

    def __init__(self, env: Any, task: str):
        super().__init__(env)
        space = env.action_space
        if isinstance(space, spaces.Discrete):
            self.action_space = spaces.Discrete(int(space.n))
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            low, high = (bound.astype(np.float32).reshape(-1) for bound in (space.low, space.high))
            self.action_space = spaces.Box(low, high, dtype=np.float32)
        else:
            raise ValueError(
                f"The action space of {task!r} is {space}, which is not supported. Supported are Discrete and Box of "
                "floats; wrap the environment so that its actions become one of these (MultiDiscrete, for example, "
                "becomes one Discrete over all combinations)."
            )

    def action(self, action: Any) -> Any:
        space = self.env.action_space
        if isinstance(space, spaces.Discrete):
            return int(action) + int(space.start)
        return action.reshape(space.shape).astype(space.dtype)


class ActionRepeat(gymnasium.Wrapper):
    """Repeat each action, sum the rewards, stop at the end of the episode."""

    # TorchRL's own frame skip repeats what lies below it, the rendering of every frame included.
    def __init__(self, env: Any, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


class Rendered(gymnasium.ObservationWrapper):
    """The rendered image is the observation. As Gymnasium's AddRenderObservation, which resets without a seed."""

    def __init__(self, env: Any):
        super().__init__(env)
        env.reset(seed=0)  # MuJoCo's tracking camera remembers where it began
        shape = env.render().shape
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)

    def observation(self, observation: Any) -> Any:
        return self.env.render()


class ContractObservations(gymnasium.ObservationWrapper):
    """Any mixture of boxes and discrete spaces as a flat dict of uint8 images [C, H, W] and float32 vectors."""

    def __init__(self, env: Any, image_size: int | None, grayscale: bool, keys: Sequence[str] | None, task: str):
        super().__init__(env)
        self.image_size, self.grayscale = image_size, grayscale
        self.leaves = {name: (path, space) for name, path, space in _leaves(env.observation_space, (), task)}
        if keys is not None:
            unknown = [key for key in keys if key not in self.leaves]
            if unknown or not keys:
                raise ValueError(
                    f"keys={list(keys)} of {task!r}: it observes {sorted(self.leaves)}; name some of these."
                )
            self.leaves = {key: self.leaves[key] for key in keys}
        out = {}
        for name, (_, space) in self.leaves.items():
            sample = self._convert(space, np.zeros(space.shape, space.dtype) if _is_image(space) else space.sample())
            bounds = (0, 255) if sample.dtype == np.uint8 else (-np.inf, np.inf)
            out[name] = spaces.Box(*bounds, sample.shape, sample.dtype)
        self.observation_space = spaces.Dict(out)

    def observation(self, observation: Any) -> Any:
        out = {}
        for name, (path, space) in self.leaves.items():
            value = observation
            for key in path:
                value = value[key]
            out[name] = self._convert(space, value)
        return out

    def _convert(self, space: Any, value: Any) -> np.ndarray:
        if _is_image(space):
            return to_pixels(np.asarray(value), self.image_size, self.grayscale)
        if isinstance(space, spaces.Box):
            return np.array(value, np.float32).reshape(-1)  # np.array copies: simulators reuse their buffers
        return np.array(spaces.flatten(space, value), np.float32)  # one-hot


def _is_image(space: Any) -> bool:
    return isinstance(space, spaces.Box) and is_image(space.shape, space.dtype)


def _leaves(space: Any, path: tuple, task: str) -> Iterator[tuple[str, tuple, Any]]:
    """Yield (name, path, space) of every leaf of a nested dict space."""
    if isinstance(space, spaces.Dict):
        for key, child in space.spaces.items():
            yield from _leaves(child, (*path, key), task)
    elif isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        name = "_".join(map(str, path)) or ("pixels" if _is_image(space) else "observation")
        yield (f"observation_{name}" if name in RESERVED else name), path, space
    else:
        raise ValueError(
            f"The observation space of {task!r} holds {space} at {'/'.join(path) or 'its root'}, which is not "
            "supported. Supported are Box, Discrete, MultiDiscrete, MultiBinary and (nested) Dict of these; wrap the "
            "environment with gymnasium.wrappers.FlattenObservation, or keep other entries with keys=[...]."
        )

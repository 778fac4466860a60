"""A simulator that steps in plain Python and numpy, and the same as a TorchRL environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

from .errors import as_promised, not_finite

LARGEST = float(np.finfo(np.float32).max)
UNLIMITED = 1e10  # MuJoCo and others write a large number where an action has no bound


class Simulator(EnvBase):
    """The base of every suite. A subclass defines three methods::

        begin() -> observation                                             # of a new episode
        advance(action) -> (observation, reward, terminated, truncated)
        seed(number)

    An observation is a dict of arrays: uint8 images [C, H, W] and float32 vectors. An action is an int or a float32
    array within the simulator's own bounds. What a suite reports beside the return (a success, an achievement) goes into
    `self.metrics`, by name; an episode counts the largest value it had. All are zero when an episode begins.

    As a TorchRL environment it is stepped alone, with a TensorDict for each step. `VectorEnv` steps many by
    `reset_arrays` and `step_arrays`, without.

    Args:
        observations: The shapes, by name.
        actions: The number of choices, or the bounds (low, high) of a vector, two arrays. Actions come in [-1, 1] and
            are clipped and scaled to the bounds of a dimension that has two, and clipped to one alone: a Gaussian
            policy samples outside now and then, and simulators differ in what they do with that.
        metrics: The names of `self.metrics`.
    """

    task: str
    step_count: int
    metrics: dict[str, float]

    def __init__(
        self,
        *,
        observations: Mapping[str, tuple[int, ...]],
        actions: int | tuple[np.ndarray, np.ndarray],
        metrics: Iterable[str] = (),
    ):
        super().__init__()
        self.metrics = dict.fromkeys(metrics, 0.0)
        self.task, self.step_count = type(self).__name__, 0
        spec = lambda shape: (
            Bounded(0, 255, shape, dtype=torch.uint8) if len(shape) == 3 else Unbounded(torch.Size(shape))
        )
        self.observation_spec = Composite({name: spec(shape) for name, shape in observations.items()})
        kind = lambda shape: np.dtype(np.uint8 if len(shape) == 3 else np.float32)
        self.layout = [(name, tuple(shape), kind(shape)) for name, shape in observations.items()]
        if self.metrics:
            self.observation_spec["metrics"] = Composite({name: Unbounded(1) for name in self.metrics})
        self.discrete = isinstance(actions, (int, np.integer))  # as Gymnasium's Discrete.n is
        if isinstance(actions, (int, np.integer)):
            self.action_spec = OneHot(int(actions), dtype=torch.int64)
        else:
            self.bounds = low, high = [
                _inwards(np.asarray(bound), sign) for sign, bound in zip((1, -1), actions, strict=True)
            ]
            limited = (np.abs([low, high]) < UNLIMITED).all(0)
            low, high = np.where(limited, low, -1), np.where(limited, high, 1)  # what has no bounds stays as it is
            self.scale, self.middle = (high - low) / 2, (high + low) / 2
            shape = torch.Size(low.shape)
            ranged = Bounded(-1, 1, shape, dtype=torch.float32)
            self.action_spec = ranged if limited.all() else Unbounded(shape, dtype=torch.float32)
        self.action_shape = tuple(self.action_spec.shape)
        self.reward_spec = Unbounded(1)
        flag = Categorical(2, shape=torch.Size([1]), dtype=torch.bool)
        self.full_done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone())

    def begin(self) -> dict[str, np.ndarray]:
        raise NotImplementedError  # each suite begins its own episodes

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        raise NotImplementedError  # and says what an action does

    def seed(self, number: int) -> None:
        raise NotImplementedError  # and which generators it has

    def reset_arrays(self) -> dict[str, np.ndarray]:
        """The first observation of a new episode."""
        self.step_count, self.metrics = 0, dict.fromkeys(self.metrics, 0.0)
        return self._checked(self.begin())

    def step_arrays(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        """(observation, reward, terminated, truncated) after one action of an agent: one-hot, or in [-1, 1]."""
        if action.shape != self.action_shape or (action.dtype.kind == "f" and not np.isfinite(action).all()):
            raise ValueError(
                f"The action {action.tolist()} at step {self.step_count} of an episode of task {self.task!r}: expected "
                f"{self.action_shape[0]} finite numbers. NaN comes from a policy that has diverged."
            )
        if self.discrete:
            action = int(action.argmax())
        else:
            action = np.clip(action * self.scale + self.middle, *self.bounds)  # scaling may round beyond a bound
        vars(self)["step_count"] += 1  # the ordinary way to set an attribute of an EnvBase takes 5 us
        observation, reward, terminated, truncated = self.advance(action)
        return self._checked(observation, reward), float(reward), bool(terminated), bool(truncated and not terminated)

    def _checked(self, observation: Mapping[str, np.ndarray], reward: float = 0.0) -> dict[str, np.ndarray]:
        """The observation in the shapes and dtypes of the specs, in which it is stored."""
        checked = {
            name: as_promised(name, observation.get(name), shape, dtype, self.step_count, self.task)
            for name, shape, dtype in self.layout
        }
        if not abs(reward) <= LARGEST:  # nor NaN
            raise not_finite("reward", reward, self.step_count, self.task)
        return checked

    def _set_seed(self, seed: int | None) -> None:
        self.seed(0 if seed is None else seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        return self._tensors(self.reset_arrays(), False, False)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        observation, reward, terminated, truncated = self.step_arrays(tensordict["action"].cpu().numpy())
        return self._tensors(observation, terminated, truncated).set("reward", torch.tensor([reward]))

    def _tensors(self, observation: Mapping[str, np.ndarray], terminated: bool, truncated: bool) -> TensorDict:
        flags = {"done": terminated or truncated, "terminated": terminated, "truncated": truncated}
        observed = {name: torch.from_numpy(np.array(value)) for name, value in observation.items()}  # it may be reused
        tensors = TensorDict(
            observed | {name: torch.tensor([flag]) for name, flag in flags.items()}, device=self.device
        )
        if self.metrics:
            tensors["metrics"] = {name: torch.tensor([float(value)]) for name, value in self.metrics.items()}
        return tensors


def _inwards(bound: np.ndarray, sign: int) -> np.ndarray:
    """A lower (sign 1) or an upper (-1) bound as the nearest float32 that does not lie outside."""
    nearest = bound.astype(np.float32)
    return np.where(nearest * sign < bound * sign, np.nextafter(nearest, np.float32(sign * np.inf)), nearest)

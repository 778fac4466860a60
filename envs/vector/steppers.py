"""Environments stepped one after another in one process, each reading and writing its own rows of shared arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from ..base.contract import ContractEnv, name_task_in_errors
from ..base.errors import as_promised

FLAGS = ("done", "terminated", "truncated")
Layout = dict[Any, tuple[tuple[int, ...], str]]  # field, or (field, key) -> shape and dtype of one row


@dataclass
class SharedArrays:
    """What N environments exchange with the process that batches them.

    Attributes:
        action: ``[N, A]``.
        observations: key -> ``[N, ...]``, after the action.
        first_observations: key -> ``[N, ...]``, where the next episode begins; old where none began.
        reward: ``[N, 1]``.
        flags: done, terminated, truncated -> ``[N, 1]``.
    """

    action: np.ndarray
    observations: dict[Any, np.ndarray]
    first_observations: dict[Any, np.ndarray]
    reward: np.ndarray
    flags: dict[str, np.ndarray]

    @classmethod
    def layout(cls, env: EnvBase) -> Layout:
        """The shapes and dtypes of one environment's rows."""
        dtype = lambda spec: torch.empty(0, dtype=spec.dtype).numpy().dtype.str
        rows: dict[Any, Any] = {"action": env.action_spec, "reward": env.reward_spec}
        rows |= {("flags", name): env.full_done_spec[name] for name in FLAGS}
        for key, spec in env.observation_spec.items(True, True):
            rows |= {("observations", key): spec, ("first_observations", key): spec}
        return {field: (tuple(spec.shape), dtype(spec)) for field, spec in rows.items()}

    @classmethod
    def allocate(cls, layout: Layout, count: int, memory: np.ndarray | None = None) -> SharedArrays:
        """Arrays of new memory, or views of `memory`, which has `size_of(layout, count)` bytes."""
        fields: dict[str, Any] = {"observations": {}, "first_observations": {}, "flags": {}}
        memory, offset = np.zeros(cls.size_of(layout, count), np.uint8) if memory is None else memory, 0
        for field, (shape, dtype) in layout.items():
            array = np.ndarray((count, *shape), dtype, memory, offset)
            offset += _padded(shape, dtype, count)
            if isinstance(field, str):
                fields[field] = array
            else:
                fields[field[0]][field[1]] = array
        return cls(**fields)

    @staticmethod
    def size_of(layout: Layout, count: int) -> int:
        return sum(_padded(shape, dtype, count) for shape, dtype in layout.values())

    def row(self, index: int) -> SharedArrays:
        """The rows of one environment, as views."""
        of = lambda arrays: {key: array[index] for key, array in arrays.items()}
        observations, first = of(self.observations), of(self.first_observations)
        return SharedArrays(self.action[index], observations, first, self.reward[index], of(self.flags))


def _padded(shape: tuple[int, ...], dtype: str, count: int) -> int:
    """The bytes of an array of `count` rows, up to the next multiple of 64."""
    return -(-np.dtype(dtype).itemsize * math.prod((count, *shape)) // 64) * 64


class SimulatorStepper:
    """Steps a bare simulator, without a TensorDict."""

    def __init__(self, env: ContractEnv):
        self.env = env
        self.simulator: Any = env.base_env

    def reset(self, row: SharedArrays) -> None:
        self._write(self.simulator.reset_arrays(), row.first_observations)
        row.first_observations["is_init"][0] = True

    def step(self, row: SharedArrays) -> None:
        observation, row.reward[0], terminated, truncated = self.simulator.step_arrays(row.action)
        self._write(observation, row.observations)
        flags = row.flags
        flags["terminated"][0], flags["truncated"][0], flags["done"][0] = terminated, truncated, terminated or truncated
        if terminated or truncated:
            self.reset(row)

    def _write(self, observation: Mapping[str, np.ndarray], row: dict[Any, np.ndarray]) -> None:
        for name, value in observation.items():
            row[name][...] = value
        for name, value in self.simulator.metrics.items():
            row["metrics", name][0] = value


class EnvStepper:
    """Steps any TorchRL environment."""

    def __init__(self, env: EnvBase):
        self.env, self.steps = env, 0

    def reset(self, row: SharedArrays) -> None:
        self.root, self.steps = self.env.reset(), 0
        self._write(self.root, row.first_observations)

    def step(self, row: SharedArrays) -> None:
        stepped = self.env.step(self.root.set("action", torch.from_numpy(row.action.copy())))
        after, self.steps = stepped["next"], self.steps + 1
        self._write(after, row.observations | {"reward": row.reward} | row.flags)
        if row.flags["done"][0]:
            self.reset(row)
        else:
            self.root = step_mdp(stepped)

    def _write(self, tensors: TensorDictBase, row: dict[Any, np.ndarray]) -> None:
        """Checks and stores: an assignment would broadcast a wrong shape and make a large float64 infinite."""
        task = getattr(self.env, "task", type(self.env).__name__)
        for key, array in row.items():
            tensor = tensors.get(key, None)
            value = None if tensor is None else tensor.numpy(force=True)
            array[...] = as_promised(key, value, array.shape, array.dtype, self.steps, task)


class LocalPool:
    """Environments of this process, by the numbers they have among all.

    Args:
        factory: Makes one environment, ``factory(seed=seed)``.
        seeds: The seed of each number.
        on_turn: Called with the number of an environment before it does something.
    """

    def __init__(
        self,
        factory: Callable[..., EnvBase],
        seeds: Mapping[int, int],
        on_turn: Callable[[int], None] = lambda number: None,
    ):
        self.on_turn = on_turn
        self.steppers: dict[int, SimulatorStepper | EnvStepper] = {}
        for number, seed in seeds.items():
            on_turn(number)
            env = factory(seed=seed)
            # A transform put on top passes unknown attributes on to what is below it, `bare` as well.
            if type(env) is ContractEnv and env.bare:
                self.steppers[number] = SimulatorStepper(env)
            else:
                self.steppers[number] = EnvStepper(env)
        env = next(iter(self.steppers.values())).env
        self.layout, self.specs = SharedArrays.layout(env), env.specs

    def allocate(self) -> SharedArrays:
        arrays = SharedArrays.allocate(self.layout, len(self.steppers))
        self.attach(arrays)
        return arrays

    def attach(self, arrays: SharedArrays) -> None:
        self.rows = {number: arrays.row(number) for number in self.steppers}

    def step(self) -> None:
        for number, stepper in self.steppers.items():
            self.on_turn(number)
            name_task_in_errors(stepper.step, "step", stepper.env, self.rows[number])

    def reset(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.on_turn(number)
            stepper = self.steppers[number]
            name_task_in_errors(stepper.reset, "reset", stepper.env, self.rows[number])

    def seed(self, seeds: Mapping[int, int]) -> None:
        for number, seed in seeds.items():
            self.on_turn(number)
            self.steppers[number].env.set_seed(seed, static_seed=True)

    def close(self) -> None:
        for stepper in self.steppers.values():
            stepper.env.close(raise_if_closed=False)

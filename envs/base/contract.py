"""Transforms every environment of this package carries, and the one that assembles them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import Compose, EnvBase, InitTracker, TransformedEnv
from torchrl.envs.transforms import ActionScaling, Transform

from .errors import not_finite
from .simulator import Simulator


class ClippedActionScaling(ActionScaling):
    """Actions in [-1, 1] scaled to the environment's range; what lies outside is clipped.

    A Gaussian policy without a squashing function samples outside the range now and then, and simulators differ in
    what they do with that: some clip, some integrate it, some raise. The range is the environment's own: another one is
    for TorchRL's ``ActionScaling``, which does not clip.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if other := [name for name in ("loc", "scale") if kwargs.get(name) is not None]:
            raise ValueError(
                f"{' and '.join(other)}: ClippedActionScaling takes the range of the environment's actions."
            )
        if not self.standard_normal:
            raise ValueError("standard_normal=False: actions of ClippedActionScaling lie in [-1, 1], as an agent's do.")

        self.range: tuple[torch.Tensor, ...] = ()

    def _init_from_spec(self, leaf_spec: Any) -> None:
        """Keeps the bounds: scaling may round beyond them."""
        super()._init_from_spec(leaf_spec)
        self.range = leaf_spec.space.low, leaf_spec.space.high

    def _inv_apply_transform(self, action: torch.Tensor) -> torch.Tensor:
        scaled = super()._inv_apply_transform(action.clamp(-1, 1))
        return scaled.clamp(*(bound.to(scaled.device) for bound in self.range)) if self.range else scaled


class FiniteCheck(Transform):
    """Raises a ValueError with the entry, the step and the task when an observation or a reward is NaN or infinite.

    Args:
        task: The name for the message.
        keys: The observations to check.
    """

    def __init__(self, task: str, keys: Iterable[str]):
        super().__init__()
        self.task = task
        self.keys = list(keys)
        self.steps = 0

    def _checked(self, tensordict: TensorDictBase) -> TensorDictBase:
        for name in (*self.keys, "reward"):
            value = tensordict.get(name, None)
            if value is not None and not torch.isfinite(value.float()).all():
                raise not_finite(name, value.numpy(force=True), self.steps, self.task)
        return tensordict

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self.steps += 1
        return self._checked(next_tensordict)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        self.steps = 0
        return self._checked(tensordict_reset)


class ContractEnv(TransformedEnv):
    """A transformed environment whose exceptions carry its task and seed, however deep in a simulator they start."""

    transform: Compose

    def __init__(self, env: EnvBase, transform: Compose, task: object):
        super().__init__(env, transform)
        self.task = str(task)
        self.seed = None

    @property
    def bare(self) -> bool:
        """Whether it is a simulator with no other transform than the one that marks the starts of episodes."""
        return isinstance(self.base_env, Simulator) and all(isinstance(each, InitTracker) for each in self.transform)

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        self.seed = seed
        return super().set_seed(seed, static_seed=static_seed)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return name_task_in_errors(super()._step, "step", self, tensordict)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        return name_task_in_errors(super()._reset, "reset", self, tensordict, **kwargs)


def name_task_in_errors(call: Callable, name: str, env: EnvBase, *args: Any, **kwargs: Any) -> Any:
    """What `call` returns; an exception gets a note with the task and the seed of `env`."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        task, seed = getattr(env, "task", type(env).__name__), getattr(env, "seed", None)
        note = f"This happened in `{name}` of task {task!r}, environment seed {seed}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def apply_contract(env: EnvBase, task: Any, seed: int, *transforms: Transform) -> ContractEnv:
    """Gives an environment, after `transforms`, what the contract asks of every environment, and seeds it."""
    starts = [] if "is_init" in env.observation_spec.keys() else [InitTracker()]
    checks = []
    if isinstance(env, Simulator):  # it checks itself
        env.task = str(task)
    else:
        # Not what stands below "metrics": nobody learns from it, and a suite can have dozens.
        named = [(key, spec) for key, spec in env.observation_spec.items(True, True) if isinstance(key, str)]
        checks = [FiniteCheck(str(task), [key for key, spec in named if spec.dtype.is_floating_point])]
    env = ContractEnv(env, Compose([*transforms, *starts, *checks]), task)
    # static_seed: without it TorchRL draws the seed of a next environment, which nobody here wants.
    env.set_seed(seed, static_seed=True)
    return env

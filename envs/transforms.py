"""Transforms every environment of this package carries, and the one that assembles them."""

from contextlib import contextmanager

import torch
from torchrl.envs import Compose, InitTracker, TransformedEnv
from torchrl.envs.transforms import ActionScaling, Transform


class ClippedActionScaling(ActionScaling):
    """Actions in [-1, 1] scaled to the environment's range; what lies outside is clipped.

    A Gaussian policy without a squashing function samples outside the range now and then, and simulators differ in
    what they do with that: some clip, some integrate it, some raise.
    """

    def _inv_apply_transform(self, action):
        return super()._inv_apply_transform(action.clamp(-1, 1))


class FiniteCheck(Transform):
    """Raise a ValueError naming the entry, the step and the task when an observation or a reward is NaN or infinite.

    One bad number would otherwise poison the replay and show up thousands of updates later as a NaN loss.
    """

    def __init__(self, task, keys):
        super().__init__()
        self.task = task
        self.keys = list(keys)
        self.steps = 0

    def _check(self, tensordict, name):
        value = tensordict.get(name, None)
        if value is not None and not torch.isfinite(value).all():
            what = "reward" if name == "reward" else f"observation {name!r}"
            raise ValueError(
                f"{what} is not finite at step {self.steps} of an episode of task {self.task!r}: {value.tolist()}. "
                "The simulator diverged or the environment has a bug; smaller actions, another seed or a fixed "
                "environment mend it."
            )

    def _step(self, tensordict, next_tensordict):
        self.steps += 1
        for name in self.keys:
            self._check(next_tensordict, name)
        self._check(next_tensordict, "reward")
        return next_tensordict

    def _reset(self, tensordict, tensordict_reset):
        self.steps = 0
        for name in self.keys:
            self._check(tensordict_reset, name)
        return tensordict_reset


class ContractEnv(TransformedEnv):
    """A transformed environment whose exceptions carry its task and seed, however deep in a simulator they start."""

    def __init__(self, env, transform, task):
        super().__init__(env, transform)
        self.task = str(task)
        self.seed = None

    def set_seed(self, seed=None, static_seed=False):
        self.seed = seed
        return super().set_seed(seed, static_seed=static_seed)

    def _step(self, tensordict):
        with self._named("step"):
            return super()._step(tensordict)

    def _reset(self, tensordict=None, **kwargs):
        with self._named("reset"):
            return super()._reset(tensordict, **kwargs)

    @contextmanager
    def _named(self, call):
        try:
            yield
        except Exception as error:
            error.add_note(f"This happened in `{call}` of task {self.task!r}, environment seed {self.seed}.")
            raise


def finish(env, task, seed, *transforms):
    """Give `env`, after `transforms`, what the contract asks of every environment, and seed it."""
    starts = [] if "is_init" in env.observation_spec.keys() else [InitTracker()]
    env = ContractEnv(env, Compose(*transforms, *starts), task)
    entries = env.observation_spec.items(True, True)
    # Not what stands below "metrics": nobody learns from it, and a suite can have dozens.
    floats = [key for key, spec in entries if isinstance(key, str) and spec.dtype.is_floating_point]
    env.append_transform(FiniteCheck(task, floats))
    # static_seed: without it TorchRL draws the seed of a next environment, which nobody here wants.
    env.set_seed(seed, static_seed=True)
    return env

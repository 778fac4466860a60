"""Transforms every environment of this package carries, and the one that assembles them."""

import torch
from torchrl.envs import Compose, InitTracker, TransformedEnv
from torchrl.envs.transforms import ActionScaling, Transform

from .errors import not_finite
from .simulator import Simulator


class ClippedActionScaling(ActionScaling):
    """Actions in [-1, 1] scaled to the environment's range; what lies outside is clipped.

    A Gaussian policy without a squashing function samples outside the range now and then, and simulators differ in
    what they do with that: some clip, some integrate it, some raise.
    """

    def _inv_apply_transform(self, action):
        return super()._inv_apply_transform(action.clamp(-1, 1))


class FiniteCheck(Transform):
    """Raise a ValueError naming the entry, the step and the task when an observation or a reward is NaN or infinite."""

    def __init__(self, task, keys):
        super().__init__()
        self.task = task
        self.keys = list(keys)
        self.steps = 0

    def _check(self, tensordict, name):
        value = tensordict.get(name, None)
        if value is not None and not torch.isfinite(value.float()).all():
            raise not_finite(name, value.numpy(force=True), self.steps, self.task)

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

    @property
    def bare(self):
        """Whether all there is to it is a simulator and that its episodes' starts are marked."""
        return isinstance(self.base_env, Simulator) and all(isinstance(each, InitTracker) for each in self.transform)

    def set_seed(self, seed=None, static_seed=False):
        self.seed = seed
        return super().set_seed(seed, static_seed=static_seed)

    def _step(self, tensordict):
        return with_task(super()._step, "step", self, tensordict)

    def _reset(self, tensordict=None, **kwargs):
        return with_task(super()._reset, "reset", self, tensordict, **kwargs)


def with_task(call, name, env, *args, **kwargs):
    """What `call` returns; an exception carries the task and the seed of `env`."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        task, seed = getattr(env, "task", type(env).__name__), getattr(env, "seed", None)
        note = f"This happened in `{name}` of task {task!r}, environment seed {seed}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def finish(env, task, seed, *transforms):
    """Give `env`, after `transforms`, what the contract asks of every environment, and seed it."""
    starts = [] if "is_init" in env.observation_spec.keys() else [InitTracker()]
    checks = []
    if isinstance(env, Simulator):  # it checks itself
        env.task = str(task)
    else:
        # Not what stands below "metrics": nobody learns from it, and a suite can have dozens.
        entries = env.observation_spec.items(True, True)
        checks = [
            FiniteCheck(task, [key for key, spec in entries if isinstance(key, str) and spec.dtype.is_floating_point])
        ]
    env = ContractEnv(env, Compose(*transforms, *starts, *checks), task)
    # static_seed: without it TorchRL draws the seed of a next environment, which nobody here wants.
    env.set_seed(seed, static_seed=True)
    return env

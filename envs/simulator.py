"""The base of every suite that has no TorchRL wrapper: a simulator that steps in plain Python."""

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase


class Simulator(EnvBase):
    """A simulator as a TorchRL environment; a subclass says how an episode begins and what an action does.

        begin() -> image
        advance(action) -> (image, reward, terminated, truncated)
        seed(number)

    Images are uint8 tensors [C, H, W], an action is an int or a float32 array. What a suite reports beside the return
    (a success, an achievement) goes into `self.metrics`, by name; an episode counts the largest value it had. All are
    zero when an episode begins.

    actions: the number of choices, or the bounds (low, high) of a vector, two arrays.
    """

    def __init__(self, *, pixels, actions, metrics=()):
        super().__init__()
        self.metrics = dict.fromkeys(metrics, 0.0)
        self.discrete = isinstance(actions, int)
        self.observation_spec = Composite(pixels=Bounded(0, 255, tuple(pixels), dtype=torch.uint8))
        if self.metrics:
            self.observation_spec["metrics"] = Composite({name: Unbounded((1,)) for name in self.metrics})
        if self.discrete:
            self.action_spec = OneHot(actions, dtype=torch.int64)
        else:
            low, high = (torch.as_tensor(np.asarray(bound), dtype=torch.float32) for bound in actions)
            self.action_spec = Bounded(low, high, low.shape, dtype=torch.float32)
        self.reward_spec = Unbounded((1,))
        flag = Categorical(2, shape=(1,), dtype=torch.bool)
        self.full_done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone())

    def begin(self):
        raise NotImplementedError  # each suite begins its own episodes

    def advance(self, action):
        raise NotImplementedError  # and says what an action does

    def seed(self, number):
        raise NotImplementedError  # and which generators it has

    def _set_seed(self, seed):
        self.seed(seed)

    def _reset(self, tensordict=None, **kwargs):
        self.metrics = dict.fromkeys(self.metrics, 0.0)
        return self._observe(self.begin(), False, False)

    def _step(self, tensordict):
        action = tensordict["action"]
        image, reward, terminated, truncated = self.advance(int(action.argmax()) if self.discrete else action.numpy())
        return self._observe(image, terminated, truncated and not terminated).set(
            "reward", torch.tensor([float(reward)])
        )

    def _observe(self, image, terminated, truncated):
        flags = {"done": terminated or truncated, "terminated": terminated, "truncated": truncated}
        observed = TensorDict({"pixels": image} | {name: torch.tensor([bool(flag)]) for name, flag in flags.items()})
        if self.metrics:
            observed["metrics"] = {name: torch.tensor([float(value)]) for name, value in self.metrics.items()}
        return observed

"""A simulator of one's own on the base of every suite: what it may hand over."""

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import numpy as np
from gymnasium import spaces

from r2dreamer.envs.base.simulator import Simulator


def test_a_number_of_choices_may_be_numpys():
    corner = Simulator(observations={"place": (1,)}, actions=spaces.Discrete(3).n)
    assert isinstance(spaces.Discrete(3).n, np.integer) and corner.discrete and corner.action_spec.shape == (3,)


class Reusing(Simulator):
    """Observes how many steps it has taken, in one and the same array."""

    def __init__(self):
        super().__init__(observations={"steps": (1,), "pixels": (3, 4, 4)}, actions=2)
        self.shown = {"steps": np.zeros(1, np.float32), "pixels": np.zeros((3, 4, 4), np.uint8)}

    def begin(self):
        for value in self.shown.values():
            value[:] = 0
        return self.shown

    def advance(self, action):
        for value in self.shown.values():
            value += 1
        return self.shown, 1.0, False, False

    def seed(self, number):
        pass


def test_a_simulator_may_reuse_its_arrays():
    rollout = Reusing().rollout(4)
    for steps in (rollout["steps"][:, 0], rollout["pixels"][:, 0, 0, 0]):
        assert steps.tolist() == [0, 1, 2, 3]
    assert rollout["next", "steps"][:, 0].tolist() == [1, 2, 3, 4]

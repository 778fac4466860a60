"""Environments that number their observations, so that one that is lost or given twice shows; "Sleepy" takes 20 ms a step."""

import os
import signal
import time

import gymnasium
import numpy as np
from gymnasium import spaces


class Counted(gymnasium.Env):
    """Observes its name, which comes with its seed, and how many observations it has made. Episodes last 3 to 7 steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, sleeps=0.0, trouble=None):
        self.sleeps, self.trouble = sleeps, trouble

    def _observe(self):
        self.count += 1
        return np.array([self.name, self.count], np.float32)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            super().reset(seed=seed)
            self.name, self.count = seed % 1_000_003, -1
        self.left = int(self.np_random.integers(3, 8))
        return self._observe(), {}

    def step(self, action):
        time.sleep(self.sleeps)
        self.left -= 1
        if self.trouble and self.count > 9:
            if self.trouble == "raise":
                raise ArithmeticError("the simulator broke")
            os.kill(os.getpid(), signal.SIGKILL)
        return self._observe(), float(self.count), False, self.left == 0, {}


gymnasium.register("Counted-v0", Counted)
gymnasium.register("Sleepy-v0", Counted, kwargs={"sleeps": 0.02})
for trouble in ("raise", "kill"):
    gymnasium.register(f"Counted-{trouble}-v0", Counted, kwargs={"trouble": trouble})

"""A TorchRL environment that goes wrong on demand: `env=custom env.factory=faulty:make`.

A file `fault` in the working directory says how and when, "nan 45" for example: a run is resumed only with the
configuration it was started with, and this way a mended environment has the same.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase


def broken(error):
    raise error


HUGE = torch.full((4,), 1e300, dtype=torch.float64)
# What happens at the chosen step, by name. A tensor takes the place of the entry; a function is called.
OBSERVED = {
    "nan": torch.full((4,), torch.nan),
    "huge": HUGE,
    "one": torch.zeros(1),
    "batch": torch.zeros(1, 4),
    "complex": torch.zeros(4, dtype=torch.complex64),
    "missing": None,
}
REWARDED = {"inf_reward": torch.tensor([torch.inf]), "huge_reward": HUGE[:1]}
DONE = {
    "raise": lambda: broken(ArithmeticError("the simulator broke")),
    "eof": lambda: broken(EOFError("the simulator's file ended")),
    "pipe": lambda: broken(BrokenPipeError("the simulator's pipe broke")),
    "memory": lambda: broken(MemoryError("the simulator found no memory")),
    "leave": lambda: sys.exit(3),
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda: time.sleep(600),
    "hang_in_c": lambda: re.match("(a+)+$", "a" * 60 + "b"),  # never gives Python's lock back
}
OTHER = ("build", "reset", "endless")


class Faulty(EnvBase):
    """Observes how far an episode of ten steps is. `fault` comes with the step `at`, counted over all episodes."""

    def __init__(self, fault=None, at=45):
        super().__init__()
        if fault is None and Path("fault").exists():
            fault, at = Path("fault").read_text().split()
            at = int(at)
        if fault not in (None, *OBSERVED, *REWARDED, *DONE, *OTHER):
            raise ValueError(f"fault={fault!r} is none of these.")
        if fault == "build":
            raise ArithmeticError("no simulator here")
        flag = Categorical(2, shape=(1,), dtype=torch.bool)
        self.observation_spec = Composite(position=Unbounded((4,)))
        self.action_spec = Bounded(-1, 1, (1,), dtype=torch.float32)
        self.reward_spec = Unbounded((1,))
        self.full_done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone())
        self.fault, self.at, self.steps, self.total = fault, at, 0, 0

    def _set_seed(self, seed):
        pass

    def _entries(self):
        over = torch.tensor([self.steps >= 10 and self.fault != "endless"])
        flags = {"done": over, "terminated": torch.zeros(1, dtype=torch.bool), "truncated": over}
        position = torch.full((4,), self.steps / 10)
        if self.total == self.at:
            position = OBSERVED.get(self.fault, position)
        observed = {} if position is None else {"position": position}
        return TensorDict(observed | {name: value.clone() for name, value in flags.items()})

    def _reset(self, tensordict=None, **kwargs):
        if self.fault == "reset" and self.total >= self.at:
            raise ArithmeticError("no new episode")
        self.steps = 0
        return self._entries()

    def _step(self, tensordict):
        self.steps, self.total = self.steps + 1, self.total + 1
        now = self.total == self.at
        if now:
            DONE.get(self.fault, lambda: None)()
        reward = REWARDED.get(self.fault) if now else None
        return self._entries().set("reward", torch.ones(1) if reward is None else reward)


make = Faulty

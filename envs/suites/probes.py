"""Probes: tiny image environments that isolate one failure each and whose best return is known.

An agent that fails on one of them says where to look: at its encoder, reward head, value, memory or continue head.

    env = make_probe("delayed_reward", seed=0)
    env.optimum, env.random_return      # the best expected return, and that of uniformly random actions

Episodes end by truncation, and only `ending` is about the continue head. Where nothing is paid before the last step they
terminate: else what an agent imagines beyond an end that it never saw would outweigh it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base.contract import ContractEnv, apply_contract
from ..base.errors import require_positive
from ..base.simulator import Simulator
from .registry import register, unknown_task

TARGET = 2  # side of the small target, in pixels


class Probe(Simulator):
    """One probe: `prepare` begins an episode, `image` shows it, `act` answers a choice with (reward, terminated).

    Args:
        image_size: Side of the square image.
        actions: Number of choices; the image shows them as vertical bands, the first on the left.
        continuous: One action in [-1, 1] instead, whose sign decides between two choices.
    """

    length = 8
    terminates = False  # when the time is over; else an episode is truncated

    def __init__(self, image_size: int = 64, actions: Any = 2, continuous: bool = False):
        super().__init__(
            observations={"pixels": (3, image_size, image_size)},
            actions=(np.full(1, -1), np.full(1, 1)) if continuous else actions,
        )
        self.size, self.actions, self.continuous = image_size, actions, continuous
        self.steps, self.cue = 0, 0
        bands = np.arange(image_size) * actions // image_size
        self.bands = np.zeros((actions, 3, image_size, image_size), np.uint8)
        for choice in range(actions):
            self.bands[choice][:, :, bands == choice] = 255
        self.blank = np.full((3, image_size, image_size), 64, np.uint8)
        self.set_seed(0, static_seed=True)

    def seed(self, number: int) -> None:
        self.random = np.random.default_rng(number)

    def begin(self) -> dict[str, np.ndarray]:
        self.steps = 0
        self.cue = self.draw()
        self.prepare()
        return self.observe()

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        reward, terminated = self.act(int(action[0] > 0) if self.continuous else action)
        self.steps += 1
        over = self.steps >= self.length
        return self.observe(), reward, terminated or (over and self.terminates), over

    def observe(self) -> dict[str, np.ndarray]:
        return {"pixels": self.image().copy()}

    def draw(self) -> int:
        return int(self.random.integers(self.actions))

    def prepare(self) -> None:
        pass

    def image(self) -> np.ndarray:
        return self.blank

    def act(self, choice: int) -> tuple[float, bool]:
        raise NotImplementedError  # each probe says what a choice earns

    def best_choice(self) -> int:
        """What a player who sees everything does now."""
        return self.cue

    @property
    def optimum(self) -> float:
        return 1.0 if self.terminates else float(self.length)

    @property
    def random_return(self) -> float:
        return self.optimum / self.actions


class RewardFromObservation(Probe):
    """The bright band says which action pays now; the next frame shows another one."""

    def image(self) -> np.ndarray:
        return self.bands[self.cue]

    def act(self, choice: int) -> tuple[float, bool]:
        reward = choice == self.cue
        self.cue = self.draw()
        return reward, False


class RewardFromAction(Probe):
    """Nothing to see; the last action pays, always."""

    def prepare(self) -> None:
        self.cue = self.actions - 1

    def act(self, choice: int) -> tuple[float, bool]:
        return choice == self.cue, False


class DelayedReward(Probe):
    """The first action decides what the last step pays. Choice and progress stay in sight: only credit is delayed."""

    terminates = True

    def prepare(self) -> None:
        self.cue = self.actions - 1
        self.chosen = None

    def image(self) -> np.ndarray:
        image = self.blank if self.chosen is None else self.bands[self.chosen] // 2
        image = image.copy()
        image[:, : self.size // 8, : self.size * self.steps // self.length] = 255
        return image

    def act(self, choice: int) -> tuple[float, bool]:
        if self.chosen is None:
            self.chosen = choice
        return self.steps == self.length - 1 and self.chosen == self.cue, False


class RememberFirstFrame(Probe):
    """The first frame shows a band; the last one before the end turns white and asks for it.

    The right choice pays 1, the last band's costs 1 if it is wrong, the others nothing: were all wrong choices equal,
    the cue alone would say nothing about the mean reward, and what is hard would be a parity, not a memory.
    """

    terminates = True

    def image(self) -> np.ndarray:
        if self.steps == 0:
            return self.bands[self.cue]
        return self.blank if self.steps != self.length - 1 else np.full_like(self.blank, 255)

    def act(self, choice: int) -> tuple[float, bool]:
        if self.steps != self.length - 1:
            return 0, False
        return (1 if choice == self.cue else -float(choice == self.actions - 1)), False

    @property
    def random_return(self) -> float:
        return 1 / self.actions**2


class Ending(Probe):
    """The last action pays 1.5 and ends the episode, the others pay 1: who cannot foresee the end leaves at once."""

    length = 16
    leaving_reward = 1.5

    def act(self, choice: int) -> tuple[float, bool]:
        leaves = choice == self.actions - 1
        return (self.leaving_reward if leaves else 1.0), leaves

    def best_choice(self) -> int:
        return self.actions - 1 if self.steps == self.length - 1 else 0

    @property
    def optimum(self) -> float:
        return self.length - 1 + self.leaving_reward

    @property
    def random_return(self) -> float:
        leave = 1 / self.actions
        mean_reward = 1 - leave + leave * self.leaving_reward
        return sum((1 - leave) ** step * mean_reward for step in range(self.length))


class SmallTarget(RewardFromObservation):
    """As RewardFromObservation, but what to see is 2x2 white pixels somewhere in the band, before a busy background.

    The background is one texture of random colours, always the same: 4 of 4096 pixels are all that ever changes.
    """

    def __init__(self, image_size: int = 64, actions: Any = 2, continuous: bool = False):
        self.background = np.random.default_rng(0).integers(0, 128, (3, image_size, image_size), np.uint8)
        super().__init__(image_size, actions, continuous)

    def image(self) -> np.ndarray:
        image = self.background.copy()
        width = self.size // self.actions
        left = self.cue * width + int(self.random.integers(width - TARGET + 1))
        top = int(self.random.integers(self.size - TARGET + 1))
        image[:, top : top + TARGET, left : left + TARGET] = 255
        return image


PROBES = {
    "reward_from_observation": RewardFromObservation,
    "reward_from_action": RewardFromAction,
    "delayed_reward": DelayedReward,
    "remember_first_frame": RememberFirstFrame,
    "ending": Ending,
    "small_target": SmallTarget,
}


def make_probe(
    task: str, *, seed: int, image_size: int = 64, actions: Any = 2, continuous: bool = False, action_repeat: int = 1
) -> ContractEnv:
    """One probe from PROBES, seeded."""
    if task not in PROBES:
        raise unknown_task(task, PROBES, "The probe suite")
    require_positive(image_size=image_size)
    if action_repeat != 1:
        raise ValueError(f"action_repeat={action_repeat} must be 1: in a probe each step has its own right action.")
    if actions not in (2, 3, 4) or (continuous and actions != 2):
        raise ValueError(f"actions={actions!r} must be 2, 3 or 4, and 2 if continuous, where a sign decides.")
    if image_size < 8:
        raise ValueError(f"image_size={image_size} is too small for a probe to show anything: use at least 8.")
    env = PROBES[task](image_size, actions, continuous)
    return apply_contract(env, task, seed)


register("probe", title="Probes: tiny images, known best returns", make=make_probe, tasks=lambda: PROBES)

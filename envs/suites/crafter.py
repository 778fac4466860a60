"""Crafter, a small open world with 22 things to achieve: `make_crafter("reward", seed=0)`, and its score."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..base.contract import ContractEnv, apply_contract
from ..base.errors import require, require_positive
from ..base.images import to_pixels
from ..base.simulator import Simulator
from .registry import register, unknown_task

TASKS = ("reward", "noreward")
ACHIEVEMENT = "achievement_"  # what the names of the metrics begin with
SMALLEST_IMAGE = 18  # the picture is 9 cells wide, and a digit 60% of a cell


def make_crafter(task: str, *, seed: int, image_size: int = 64, action_repeat: int = 1) -> ContractEnv:
    """One of the two tasks, "reward" or "noreward", seeded; every episode is another world.

    Both report the 22 achievements below "metrics", as 1 from the moment they are unlocked in this episode; without
    reward the agent is paid nothing for them. Death terminates, 10,000 frames truncate.

    Args:
        task: ``"reward"`` or ``"noreward"``.
        seed: Of the worlds.
        image_size: Part of the task: the game draws the night's noise, pixel by pixel, from the world's generator.
        action_repeat: Frames of one step.
    """
    require_positive(image_size=image_size, action_repeat=action_repeat)
    if task not in TASKS:
        raise unknown_task(task, TASKS, "Crafter")
    if image_size < SMALLEST_IMAGE:
        raise ValueError(f"image_size={image_size} is too small for Crafter's digits: use at least {SMALLEST_IMAGE}.")
    with contextlib.redirect_stderr(io.StringIO()):  # Crafter tries the old gym, which prints that it is unmaintained
        crafter = require("crafter", "crafter")
    game = functools.partial(crafter.Env, size=(image_size, image_size), reward=task == "reward")
    return apply_contract(Crafter(game, crafter.constants, image_size, action_repeat), task, seed)


class Crafter(Simulator):
    """Upstream's game, made repeatable."""

    def __init__(self, new_game: Callable, constants: Any, image_size: int, action_repeat: int):
        self.names = {name: ACHIEVEMENT + name for name in constants.achievements}
        super().__init__(
            observations={"pixels": (3, image_size, image_size)},
            actions=len(constants.actions),
            metrics=self.names.values(),
        )
        self.new_game, self.repeat = new_game, action_repeat

    def seed(self, number: int) -> None:
        self.game = repeatable(self.new_game(seed=number))

    def begin(self) -> dict[str, np.ndarray]:
        return {"pixels": to_pixels(self.game.reset())}

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        total = 0.0
        for _ in range(self.repeat):
            image, reward, done, info = self.game.step(action)
            total += reward
            if done:
                break
        self.metrics = {self.names[name]: float(count > 0) for name, count in info["achievements"].items()}
        return {"pixels": to_pixels(image)}, total, info["discount"] == 0, done


def repeatable(game: Any) -> Any:
    """The game whose episodes depend on its seed and the actions only; other games of this process stay as they are.

    Upstream keeps the creatures of a region in a set, which iterates in the order of their memory addresses, and draws
    by number which of them vanishes: with one seed, two processes differ from the first such draw among several on.
    """
    balance = game._balance_chunk
    place = lambda creature: tuple(creature.pos)  # of two creatures never the same
    game._balance_chunk = lambda chunk, creatures: balance(chunk, sorted(creatures, key=place))
    return game


def crafter_score(rates: Sequence[float]) -> float:
    """exp(mean(ln(1 + s))) - 1, a geometric mean, of success rates given as fractions and counted in percent."""
    return float(np.expm1(np.log1p(100 * np.asarray(rates)).mean()))


class CrafterScores:
    """Turns the returns and metrics of episodes into ``{"crafter_score": ...}``; no episode gives no score.

    Args:
        cumulative: Counts all episodes so far, as the published scores do. The score of a few episodes is biased: the
            mean of logarithms treats an achievement that none of them unlocked as impossible.
    """

    def __init__(self, cumulative: bool = False):
        self.cumulative = cumulative
        self.load_state_dict({"episodes": 0, "successes": {}})

    def __call__(self, returns: list[float], metrics: dict[str, list[float]]) -> dict[str, float]:
        if not self.cumulative:
            self.load_state_dict({"episodes": 0, "successes": {}})
        self.episodes += len(returns)
        for name, values in metrics.items():
            if name.startswith(ACHIEVEMENT):
                self.successes[name] = self.successes.get(name, 0.0) + sum(values)
        if not self.episodes or not self.successes:
            return {}
        return {"crafter_score": crafter_score([count / self.episodes for count in self.successes.values()])}

    def state_dict(self) -> dict:
        return {"episodes": self.episodes, "successes": dict(self.successes)}

    def load_state_dict(self, state: dict) -> None:
        self.episodes, self.successes = state["episodes"], dict(state["successes"])


register(
    "crafter",
    title="Crafter, an open world with 22 achievements",
    make=make_crafter,
    tasks=lambda: TASKS,
    module="crafter",
    extra="crafter",
    scores=(CrafterScores,),
)

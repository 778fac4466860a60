"""Atari games through the Arcade Learning Environment, as Atari 100k plays them: `make_atari("alien", seed=0)`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from ..base.contract import ContractEnv, apply_contract
from ..base.errors import require, require_one_of, require_positive
from ..base.images import to_pixels
from ..base.simulator import Simulator
from .atari_scores import SCORES, HumanNormalizedScore
from .registry import register, unknown_task

LIVES = ("unused", "discount", "reset")


def make_atari(
    task: str,
    *,
    seed: int,
    image_size: int = 64,
    action_repeat: int = 4,
    lives: str = "unused",
    sticky: float = 0.0,
    noops: int = 30,
    grayscale: bool = False,
    full_actions: bool = False,
    time_limit: int | None = 108_000,
) -> ContractEnv:
    """One game, by its name in snake case ("alien", "bank_heist", ...), seeded; rewards as the game gives them.

    Args:
        task: The game.
        seed: Of the emulator and of the idle frames.
        image_size: Images are resized to this square.
        action_repeat: Frames of one step.
        lives: What a lost life does. ``"unused"``: nothing. ``"discount"``: the episode terminates, and the reset after
            it goes on with the same game. ``"reset"``: the episode terminates and the game begins anew. With the last
            two a return is what one life earned, not the game's score.
        sticky: Probability that the game repeats the previous action instead of the given one. The published curves of
            DreamerV3 used 0.25.
        noops: Each game begins with 0 to this many idle frames. Without them and without sticky actions a game is the
            same for every seed: the emulator has no other randomness.
        grayscale: One channel instead of three.
        full_actions: All 18 actions of the joystick instead of those the game reacts to.
        time_limit: Truncates a game after this many frames, without the idle ones.

    Raises:
        ValueError: For a game or a setting that cannot be used.
        ImportError: Without the extra ``atari``.
    """
    require_positive(image_size=image_size, action_repeat=action_repeat, time_limit=time_limit)
    require_one_of(LIVES, lives=lives)
    if not 0 <= sticky < 1:
        raise ValueError(f"sticky={sticky!r} is a probability: at least 0 and below 1.")
    if isinstance(noops, bool) or not isinstance(noops, int) or noops < 0:
        raise ValueError(f"noops={noops!r} must be a whole number of at least 0.")
    ale_py = require("ale_py", "atari")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale, rom = ale_py.ALEInterface(), _find_rom(task)
    ale.setFloat("repeat_action_probability", sticky)  # before the game is loaded: later it is ignored
    ale.loadROM(rom)
    actions = ale.getLegalActionSet() if full_actions else ale.getMinimalActionSet()
    env = Atari(ale, rom, actions, image_size, action_repeat, lives, noops, grayscale, time_limit)
    return apply_contract(env, task, seed)


def _find_rom(task: str) -> Any:
    from ale_py import ALEInterface, roms

    games = roms.get_all_rom_ids()
    if task not in games:
        raise unknown_task(task, games, "Atari")
    path = roms.get_rom_path(task)
    if path is None or ALEInterface.isSupportedROM(path) is None:  # loading it would end the process
        raise ValueError(f"Atari's {task!r} is for two players only, or not supported by ALE: choose another game.")
    return path


class Atari(Simulator):
    """One game; an image is the brighter of the last two frames, since many games draw things in every other one."""

    def __init__(
        self, ale: Any, rom: Any, actions: Any, image_size: int, action_repeat: int, lives: str, noops: int,
        grayscale: bool, time_limit: int | None,
    ):  # fmt: skip
        channels = 1 if grayscale else 3
        super().__init__(observations={"pixels": (channels, image_size, image_size)}, actions=len(actions))
        self.ale, self.rom, self.actions = ale, rom, actions
        self.size, self.repeat, self.lives, self.noops = image_size, action_repeat, lives, noops
        self.grayscale, self.time_limit = grayscale, time_limit
        self.screens = [ale.getScreenRGB(), ale.getScreenRGB()]  # the last frame but one, the last one

    def seed(self, number: int) -> None:
        self.random = np.random.default_rng(number)
        self.ale.setInt("random_seed", number % 2**31)
        self.ale.loadROM(self.rom)  # takes up the seed
        self.goes_on = False

    def begin(self) -> dict[str, np.ndarray]:
        if not self.goes_on:
            self._begin_game()
        self.goes_on = False  # once: a reset that nobody expects begins a new game
        self.lives_left = self.ale.lives()
        return self.observe()

    def _begin_game(self) -> None:
        self.ale.reset_game()
        for _ in range(self.random.integers(self.noops + 1)):
            self.ale.act(0)
            if self.ale.game_over():
                self.ale.reset_game()
        for screen in self.screens:
            self.ale.getScreenRGB(screen)
        self.frame = 0

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        reward = 0.0
        for _ in range(self.repeat):
            reward += self.ale.act(self.actions[action])
            self.frame += 1
            self.screens.reverse()
            self.ale.getScreenRGB(self.screens[1])
            over, truncated = self.ale.game_over(), self.frame == self.time_limit
            lives_before, self.lives_left = self.lives_left, self.ale.lives()
            died = self.lives_left < lives_before and self.lives != "unused"
            if over or truncated or died:
                break
        self.goes_on = self.lives == "discount" and died and not over and not truncated
        return self.observe(), reward, over or died, truncated

    def observe(self) -> dict[str, np.ndarray]:
        return {"pixels": to_pixels(np.maximum(*self.screens), self.size, self.grayscale)}


def _tasks() -> Collection[str]:
    try:
        from ale_py import roms
    except ImportError:  # without the extra: those of the benchmark
        return SCORES
    return roms.get_all_rom_ids()


register(
    "atari100k",
    title="Atari 100k: games of the Arcade Learning Environment",
    make=make_atari,
    tasks=_tasks,
    module="ale_py",
    extra="atari",
    scores=(HumanNormalizedScore,),
)

"""The DeepMind Control suite as Gymnasium environments, which need no torch.

``gymnasium.make("r2dreamer.envs:DMCSubtle/reacher-v0", shrink=1/8, physics="frozen")`` imports `r2dreamer.envs`, which
registers them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.spaces import Box

from ..base.errors import require_one_of, require_positive
from . import suite
from .distracting import Distracting
from .rendering import check_camera, render_image
from .subtle import OFFICIAL, Subtle

OBSERVATIONS = ("pixels", "state")


class ControlEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One task of the suite. An episode is truncated at dm_control's time limit, most often after 1000 frames.

    Args:
        domain: Of the suite.
        name: Of the domain's task.
        change: A `Subtle` or a `Distracting`.
        observation: "pixels" is the camera image, uint8 [render_size, render_size, 3]; "state" is all that the task
            observes in one float32 vector.
        render_size: Side of the square image, observed and rendered.
        action_repeat: Frames of one step; their rewards are summed.
        camera: Index or name of the camera; ``None`` is the suite's usual one.
        render_mode: "rgb_array" lets `render` return the image.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(
        self, domain: str, name: str, change: Subtle | Distracting, *, observation: str = "pixels", render_size: int = 64,
        action_repeat: int = 2, camera: int | str | None = None, render_mode: str | None = None,
    ):  # fmt: skip
        require_positive(render_size=render_size, action_repeat=action_repeat)
        require_one_of(OBSERVATIONS, observation=observation)
        if render_mode is not None:
            require_one_of(type(self).metadata["render_modes"], render_mode=render_mode)
        self.simulation, self.repeat, self.observation = suite.load(domain, name), action_repeat, observation
        change.put_on(self.simulation, name)
        self.view, self.render_mode = (render_size, suite.usual_camera(domain, camera)), render_mode
        check_camera(self.simulation.physics, self.view[1])
        low, high = suite.bounds(self.simulation)
        self.action_space = Box(low.astype(np.float32), high.astype(np.float32))
        sizes = [int(np.prod(spec.shape)) for spec in self.simulation.observation_spec().values()]
        pixels = observation == "pixels"
        self.observation_space = (
            Box(0, 255, (render_size, render_size, 3), np.uint8) if pixels else Box(-np.inf, np.inf, (sum(sizes),))
        )
        fps = 1 / (self.simulation.control_timestep() * action_repeat)
        self.metadata = type(self).metadata | {"render_fps": round(fps)}
        self.seeded, self.over, self.closed = False, True, False

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """The same seed gives the episodes that TorchRL's DMControlEnv gives after `set_seed`."""
        if self.closed:
            raise ClosedEnvironmentError("This environment is closed. Make a new one with gymnasium.make(...).")
        super().reset(seed=seed)
        if seed is None and not self.seeded:
            seed = int(self.np_random.integers(2**31))
        if seed is not None:
            suite.seed(self.simulation, seed)
        self.seeded, self.over = True, False
        return self._observe(self.simulation.reset()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.over:
            raise ResetNeeded("No episode is under way: call reset() before the first step and after an episode's end.")
        now, reward, terminated, truncated = suite.step(self.simulation, action, self.repeat)
        self.over = terminated or truncated
        return self._observe(now), float(reward), terminated, truncated, {}

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            gymnasium.logger.warn('render() needs render_mode="rgb_array" in gymnasium.make(...).')
            return None
        return render_image(self.simulation.physics, *self.view)

    def close(self) -> None:
        self.over = self.closed = True
        suite.close(self.simulation)

    def _observe(self, now: Any) -> np.ndarray:
        if self.observation == "pixels":
            return render_image(self.simulation.physics, *self.view)
        return np.concatenate(list(suite.vectors(now).values()))


class SubtleEnv(ControlEnv):
    """A task of DMC-Subtle; `shrink` and `physics` are those of `DMCSubtle`, the rest those of `ControlEnv`."""

    def __init__(self, task: str, *, shrink: float | str | None = None, physics: str = "official", **view: Any):
        change = Subtle(task, shrink=shrink, physics=physics)
        super().__init__(*OFFICIAL[task].stock, change, **view)


class DistractingEnv(ControlEnv):
    """A task of Distracting Control; arguments as those of `make_dmc_distracting` and of `ControlEnv`."""

    def __init__(
        self, task: str, *, background: bool = True, colour: bool = True, moving_camera: bool = True,
        difficulty: str = "easy", dynamic: bool = True, split: str = "train",
        background_frames: str | Path | None = None, **view: Any,
    ):  # fmt: skip
        change = Distracting(background, colour, moving_camera, difficulty, dynamic, split, background_frames)
        super().__init__(*suite.domain_and_name(task), change, **view)


def register_environments() -> None:
    """Tells Gymnasium the names of these environments."""
    for task in OFFICIAL:
        gymnasium.register(f"DMCSubtle/{task}-v0", f"{__name__}:SubtleEnv", kwargs={"task": task})
    for task in suite.TASKS:
        gymnasium.register(f"DMCDistracting/{task}-v0", f"{__name__}:DistractingEnv", kwargs={"task": task})

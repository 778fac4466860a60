"""Memory Maze: walk to the sphere of the colour that frames the image, then to the next; who remembers walks less."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..base.contract import ContractEnv, apply_contract
from ..base.errors import require, require_positive
from ..base.gl import choose_gl, missing_gl
from ..base.images import to_pixels
from ..base.simulator import Simulator
from ..control import suite
from ..control.rendering import render_pixels
from .registry import register, unknown_task

TASKS = ("9x9", "11x11", "13x13", "15x15")
CAMERA, COLOR = "walker/egocentric_camera", "target_color"
FRAMED_IMAGE = 64  # smaller ones come from upstream painted over by their frame


def make_memory_maze(task: str, *, seed: int, image_size: int = 64, action_repeat: int = 1) -> ContractEnv:
    """One of the four sizes, seeded; every episode is another maze.

    A target reached pays 1 and is counted below "metrics". Nothing terminates; the sizes, in their order, truncate
    after 1,000, 2,000, 3,000 and 4,000 frames.

    Args:
        task: The size, ``"9x9"`` for example.
        seed: Of the mazes.
        image_size: Images are resized to this square.
        action_repeat: Frames of one step.
    """
    require_positive(image_size=image_size, action_repeat=action_repeat)
    if task not in TASKS:
        raise unknown_task(task, TASKS, "Memory Maze")
    build = getattr(_import_tasks(), f"memory_maze_{task}")
    return apply_contract(MemoryMaze(build, image_size, action_repeat), task, seed)


class MemoryMaze(Simulator):
    """Upstream's `dm_env` task. Seeding builds a new one: the layouts come from a generator that takes no new seed."""

    def __init__(self, build: Callable, image_size: int, action_repeat: int):
        super().__init__(observations={"pixels": (3, image_size, image_size)}, actions=6, metrics=["targets_reached"])
        self.build, self.size, self.repeat = build, image_size, action_repeat
        self.maze: Any = None

    def seed(self, number: int) -> None:
        if self.maze is not None:
            self.maze.close()
        self.maze = self.build(seed=number, camera_resolution=max(self.size, FRAMED_IMAGE), image_only_obs=True)
        speed_up(self.maze.task)

    def begin(self) -> dict[str, np.ndarray]:
        with _without_warnings():  # each episode's "Cannot set velocity on Entity with no free joint"
            return {"pixels": to_pixels(self.maze.reset().observation, self.size)}

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        now, reward, terminated, truncated = suite.step(self.maze, action, self.repeat)
        self.metrics["targets_reached"] += reward  # each pays 1
        return {"pixels": to_pixels(now.observation, self.size)}, reward, terminated, truncated

    def close(self, *, raise_if_closed: bool = True) -> None:
        super().close(raise_if_closed=raise_if_closed)
        if self.maze is not None:
            self.maze.close()
            self.maze = None


def speed_up(task: Any) -> None:
    """Makes one task five times faster, with the same pixels, rewards and draws; other tasks stay as they are."""
    for name, observable in task.observables.items():
        observable.enabled = name in (CAMERA, COLOR)  # all others are computed every step and then dropped
    camera = task.observables[CAMERA]
    camera._callable = lambda physics: _render_in_one_scene(physics, camera, task._walker.egocentric_camera)
    for target in task._targets:
        target._update_activation = _search_only_contacts(target)


def _render_in_one_scene(physics: Any, observable: Any, camera: Any) -> Callable:
    """What renders an episode's images. dm_control makes a scene for each image, which takes as long as drawing it."""
    engine = importlib.import_module("dm_control.mujoco.engine")
    size = {"height": observable.height, "width": observable.width}
    return engine.Camera(physics, camera_id=camera.full_identifier, **size).render


def _search_only_contacts(target: Any) -> Callable:
    """The target's search through the contacts for itself, made only if it is there.

    It is made 50 times a step for each target, and MuJoCo's list of contacts ends a loop over it by a C++ exception,
    which takes 0.1 ms, thirty times what the comparison does.
    """
    search = target._update_activation

    def search_if_touched(physics: Any) -> None:
        if target._geom_id in physics.data.contact.geom:
            search(physics)

    return search_if_touched


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _import_tasks() -> Any:
    choose_gl()  # before dm_control is imported: it reads the variable only then
    chosen = os.environ.get("MUJOCO_GL")
    try:
        mujoco = require("dm_control.mujoco", "memory_maze")
        with contextlib.redirect_stderr(io.StringIO()):  # the old gym prints that it is unmaintained
            tasks = require("memory_maze.tasks", "memory_maze")
    except ImportError:
        raise
    except Exception as error:  # whatever a renderer that is asked for and missing throws: it differs by backend
        raise missing_gl(error) from error
    finally:
        if chosen is None:
            os.environ.pop("MUJOCO_GL", None)  # memory_maze asks for EGL, also where there is a display and no EGL
    render_pixels(mujoco.Physics.from_xml_string("<mujoco/>"), FRAMED_IMAGE, -1)  # what cannot render says so now
    return tasks


register(
    "memory_maze",
    title="Memory Maze, four sizes",
    make=make_memory_maze,
    tasks=lambda: TASKS,
    module="memory_maze",
    extra="memory_maze",
    renders=True,
)

"""Distracting Control (Stone et al. 2021): moving backgrounds, colours that drift, a camera that wanders.

Only images change. Everything is put into MuJoCo's model while it renders and taken out again, so states and rewards are
those of the stock task, to the bit.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import require_one_of
from .hooks import beginning, find
from .recompile import domain_of
from .textures import NUMBERS, Film, Waves, films

SCALES = {"easy": 0.1, "medium": 0.2, "hard": 0.3}
BACKGROUNDS = {"easy": 4, "medium": 8, "hard": None}  # how many there are; None: all of the split
GROUND_ALPHA = {"reacher": 0.0, "walker": 1.0, "cheetah": 1.0}  # others: 0.3, so that the background is seen
SIZE = 128  # of a face of the skybox
SKYBOX, PLANE = 2, 0  # mjTEXTURE_SKYBOX, mjGEOM_PLANE


@dataclass
class Distracting:
    """What distracts, and how much; the arguments are those of the transform `DMCDistracting`."""

    background: bool = True
    colour: bool = True
    camera: bool = True
    difficulty: str = "easy"
    dynamic: bool = True
    split: str = "train"
    frames: str | Path | None = None

    def __post_init__(self) -> None:
        require_one_of(SCALES, difficulty=self.difficulty)
        require_one_of(NUMBERS, split=self.split)
        if not (self.background or self.colour or self.camera):
            raise ValueError(
                "DMCDistracting has nothing to do: background, colour and camera are all False. Switch one on."
            )
        if self.frames is not None:
            films(self.frames, self.split)  # what is missing is said now
            self.frames = str(self.frames)

    def put_on(self, env: Any, task_name: str | None = None) -> None:
        """Distract in an environment of dm_control."""
        begin = beginning(env.task)
        there = find(begin, "begin", Distracted)
        if there is None:
            env.task.initialize_episode = Distracted(begin, env.task, self, env.control_timestep())
            env.task.initialize_episode.distract(env.physics, _numbers(env.task.random))
        elif there.settings != self:  # equal for a clone, by which TorchRL gives a later transform its parent
            raise ValueError(
                f"This environment already has {there.settings}, and DMCDistracting would add {self}. Build a "
                "new environment for other distractions."
            )


class Distracted:
    """The distractions of one environment. It takes the place of its task's `initialize_episode`."""

    def __init__(self, begin: Callable, task: Any, settings: Distracting, timestep: float):
        self.begin, self.task, self.settings, self.timestep = begin, task, settings, timestep

    def __call__(self, physics: Any) -> None:
        numbers = _numbers(self.task.random)  # before the task draws: the order of transforms does not matter
        self.begin(physics)
        self.distract(physics, numbers)

    def distract(self, physics: Any, numbers: list[int]) -> None:
        """Begin a new film; its numbers are its seed. A pickled physics forgets `render`, so every episode sets it."""
        self.numbers, self.step = numbers, math.inf
        if find(physics.render, "render", DistractedRender) is None:
            physics.render = DistractedRender(physics, self)

    def apply(self, physics: Any, camera: int) -> None:
        """Put the distractions of this moment into model and data."""
        step = round(physics.data.time / self.timestep)
        if step < self.step:  # a new episode, or an earlier state of this one
            self.step, kinds = 0, {"background": Background, "colour": Colour, "camera": Camera}
            self.parts = [
                kind(np.random.default_rng([index, *self.numbers]), physics, self.settings)
                for index, (name, kind) in enumerate(kinds.items())
                if getattr(self.settings, name)
            ]
        for part in self.parts if self.settings.dynamic else ():
            part.advance(step - self.step)
        self.step = step
        for part in self.parts:
            part.apply(physics, camera)


class DistractedRender:
    """A physics' `render`; the distractions are there only while it runs."""

    def __init__(self, physics: Any, distracted: Distracted):
        self.render, self.physics, self.distracted = physics.render, physics, distracted

    def __call__(
        self, height: int = 240, width: int = 320, camera_id: int | str = -1, *args: Any, **kwargs: Any
    ) -> Any:
        model, data = self.physics.model, self.physics.data
        camera = model.name2id(camera_id, "camera") if isinstance(camera_id, str) else camera_id
        changed = (model.mat_rgba, model.geom_rgba, data.cam_xpos, data.cam_xmat)
        before = [array.copy() for array in changed]
        try:
            self.distracted.apply(self.physics, camera)
            return self.render(height, width, camera_id, *args, **kwargs)
        finally:
            for array, values in zip(changed, before, strict=True):
                array[:] = values


class Background:
    """A texture on the sky, which is seen through the ground."""

    def __init__(self, random: np.random.Generator, physics: Any, settings: Distracting):
        model = physics.model
        skies = np.flatnonzero((model.tex_type == SKYBOX) & (model.tex_nchannel == 3))
        if not len(skies):
            raise ValueError(
                "DMCDistracting(background=True) needs a skybox, and this model has none. Give its XML a texture of "
                'type="skybox", or use background=False.'
            )
        self.sky = int(skies[0])
        size = min(SIZE, math.isqrt(int(model.tex_width[self.sky]) * int(model.tex_height[self.sky])))
        known: Any = NUMBERS[settings.split] if settings.frames is None else films(settings.frames, settings.split)
        known = known[: BACKGROUNDS[settings.difficulty]]
        chosen = known[random.integers(len(known))]
        self.texture = Waves(chosen, size) if settings.frames is None else Film(chosen, size)
        self.time, self.direction = int(random.integers(1000)), int(random.choice([-1, 1]))
        planes = model.geom_matid[model.geom_type == PLANE]
        self.ground = [index for index in set(planes) if index >= 0 and (model.mat_texid[index] >= 0).any()]
        self.alpha, self.context, self.shown = GROUND_ALPHA.get(domain_of(physics) or "", 0.3), None, None

    def advance(self, steps: int) -> None:
        self.time += steps * self.direction

    def apply(self, physics: Any, camera: int) -> None:
        physics.model.mat_rgba[self.ground, 3] = self.alpha
        context = physics.contexts.mujoco  # a new one begins with the stock texture
        if self.shown != self.time or self.context is None or self.context() is not context:
            self.upload(physics, self.texture.frame(self.time))
            self.context, self.shown = weakref.ref(context), self.time

    def upload(self, physics: Any, image: np.ndarray) -> None:
        from mujoco import mjr_uploadTexture  # pyright: ignore[reportAttributeAccessIssue] - compiled, without types

        model, sky, size = physics.model, self.sky, len(image)
        start = int(model.tex_adr[sky])
        place = model.tex_data[start : start + image.size]
        before, width, height = place.copy(), int(model.tex_width[sky]), int(model.tex_height[sky])
        try:
            place[:] = image.reshape(-1)
            model.tex_width[sky] = model.tex_height[sky] = size  # a square is repeated on all six faces
            with physics.contexts.gl.make_current() as thread:
                thread.call(mjr_uploadTexture, model.ptr, physics.contexts.mujoco.ptr, sky)
        finally:
            place[:] = before
            model.tex_width[sky], model.tex_height[sky] = width, height


class Colour:
    """A random walk of all colours around the stock ones."""

    def __init__(self, random: np.random.Generator, physics: Any, settings: Distracting):
        model, scale = physics.model, SCALES[settings.difficulty]
        # A geom in MuJoCo's default grey shows its material, and would hide it in any other colour.
        self.geoms = (model.geom_matid < 0) | (model.geom_rgba != (0.5, 0.5, 0.5, 1)).any(1)
        stock = np.concatenate([model.mat_rgba, model.geom_rgba[self.geoms]])[:, :3]
        self.low, self.high = (np.clip(stock + delta, 0, 1) - stock for delta in (-scale, scale))
        self.offset, self.random, self.std = random.uniform(self.low, self.high), random, 0.03 * scale

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            step = self.std * self.random.standard_normal(self.offset.shape)
            self.offset = np.clip(self.offset + step, self.low, self.high)

    def apply(self, physics: Any, camera: int) -> None:
        materials, geoms = physics.model.mat_rgba, physics.model.geom_rgba
        materials[:, :3] = np.clip(materials[:, :3] + self.offset[: len(materials)], 0, 1)
        geoms[self.geoms, :3] = np.clip(geoms[self.geoms, :3] + self.offset[len(materials) :], 0, 1)


class Camera:
    """A random walk of the camera's velocity on a sphere around what it looks at, never below that."""

    def __init__(self, random: np.random.Generator, physics: Any, settings: Distracting):
        self.scale, self.random = SCALES[settings.difficulty], random
        self.limit = np.pi / 2 * self.scale  # of the turn to the side and upwards, and of the roll
        self.low = np.array([-self.limit, -self.limit, -0.5 * self.scale, -self.limit])  # the third is the zoom
        self.high = np.array([self.limit, self.limit, 1.5 * self.scale, self.limit])
        self.place = random.uniform(self.low, self.high)
        velocity = random.standard_normal(3)
        velocity *= random.uniform(0, 0.1 * self.scale) / np.linalg.norm(velocity)
        roll = np.pi / 50 * self.scale
        self.velocity = np.append(velocity, random.uniform(-roll, roll))

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            std = np.array([0.025, 0.025, 0.025, np.pi / 300]) * self.scale
            velocity = self.velocity + std * self.random.standard_normal(4)
            velocity[:3] *= min(1, 0.1 * self.scale / np.linalg.norm(velocity[:3]))
            velocity[3] = np.clip(velocity[3], -np.pi / 50 * self.scale, np.pi / 50 * self.scale)
            place = np.clip(self.place + velocity, self.low, self.high)
            self.velocity, self.place = place - self.place, place  # it stops at a limit

    def apply(self, physics: Any, camera: int) -> None:
        if camera < 0:
            return
        model, data = physics.model, physics.data
        axes, radius = data.cam_xmat[camera].reshape(3, 3), np.linalg.norm(model.cam_poscom0[camera])
        centre = data.cam_xpos[camera] - radius * axes[:, 2]  # a camera looks along its negative z axis
        side, up, zoom, roll = self.place
        lowest = -min(self.limit, max(0, math.asin(np.clip(axes[2, 2], -1, 1))))
        up = lowest + (up + self.limit) / (2 * self.limit) * (self.limit - lowest)
        axes = axes @ _turn(1, side) @ _turn(0, -up) @ _turn(2, roll)
        data.cam_xpos[camera] = centre + radius * (1 + zoom) * axes[:, 2]
        data.cam_xmat[camera] = axes.reshape(-1)


def _turn(axis: int, angle: float) -> np.ndarray:
    """The rotation matrix around one of the three axes."""
    one, two = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[one, one] = matrix[two, two] = math.cos(angle)
    matrix[two, one] = math.sin(angle)
    matrix[one, two] = -matrix[two, one]
    return matrix


def _numbers(random: np.random.RandomState) -> list[int]:
    """Where a generator stands; nothing is drawn from it, because the task's own draws would change."""
    state: Any = random.get_state()
    _, words, position, has_gauss, _ = state
    return [position, has_gauss, *words.tolist()]

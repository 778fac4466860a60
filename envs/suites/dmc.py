"""The DeepMind Control suite on the package's contract: `make_dmc("walker_walk", seed=0, from_pixels=True)`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base.contract import ContractEnv, apply_contract
from ..base.errors import require_positive
from ..base.simulator import Simulator
from ..control import suite
from ..control.rendering import render_pixels
from .registry import register, unknown_task


def make_dmc(
    task: str,
    *,
    seed: int,
    from_pixels: bool,
    image_size: int = 64,
    action_repeat: int = 2,
    camera: int | str | None = None,
) -> ContractEnv:
    """One task of the suite, "walker_walk" for example, seeded.

    Args:
        task: Domain and task, joined by an underscore.
        seed: Of the episodes.
        from_pixels: Observes only the camera image, under ``"pixels"``. Otherwise the vectors, and nothing is rendered.
        image_size: Side of the square image.
        action_repeat: Frames of one step.
        camera: Index or name of the camera; ``None`` is the suite's usual one.
    """
    view = {"from_pixels": from_pixels, "image_size": image_size, "camera": camera}
    return apply_contract(
        build_dmc(*suite.domain_and_name(task, unknown_task), action_repeat=action_repeat, **view), task, seed
    )


def build_dmc(
    domain: str, name: str, *, from_pixels: bool, image_size: int, action_repeat: int, camera: int | str | None
) -> Control:
    """The suite's `domain` and `name` as a simulator."""
    require_positive(image_size=image_size, action_repeat=action_repeat)
    view = (image_size, suite.usual_camera(domain, camera)) if from_pixels else None
    return Control(suite.load(domain, name), action_repeat, view)


class Control(Simulator):
    """A dm_control environment; TorchRL's DMControlWrapper takes several times as long for a step without images.

    Args:
        env: The environment.
        action_repeat: Frames of one step.
        view: (size, camera) of the observed image, rendered once after a repeated action; ``None`` observes the vectors.
    """

    def __init__(self, env: Any, action_repeat: int, view: tuple[int, int | str] | None):
        if view:
            # By default it renders into a corner of 640x480, and clears all of it for each image: a tenth of the time.
            room = env.physics.model.vis.global_
            room.offwidth, room.offheight = min(room.offwidth, view[0]), min(room.offheight, view[0])
            render_pixels(env.physics, *view)  # what cannot render says so now, not in mid-run
            shapes = {"pixels": (3, view[0], view[0])}
        else:
            shapes = {name: (int(np.prod(spec.shape)),) for name, spec in env.observation_spec().items()}
        super().__init__(observations=shapes, actions=suite.bounds(env))
        self._env, self.repeat, self.view = env, action_repeat, view

    def seed(self, number: int) -> None:
        suite.seed(self._env, number)

    def begin(self) -> dict[str, np.ndarray]:
        return self.observe(self._env.reset())

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        now, reward, terminated, truncated = suite.step(self._env, action, self.repeat)
        return self.observe(now), reward, terminated, truncated

    def observe(self, now: Any) -> dict[str, np.ndarray]:
        return {"pixels": render_pixels(self._env.physics, *self.view)} if self.view else suite.vectors(now)

    def close(self, *, raise_if_closed: bool = True) -> None:
        super().close(raise_if_closed=raise_if_closed)
        suite.close(self._env)


_control = dict(make=make_dmc, tasks=suite.known_tasks, module="dm_control", extra="dmc")
register("dmc_vision", title="DeepMind Control suite from images", renders=True, **_control)
register("dmc_proprio", title="DeepMind Control suite from vectors", **_control)

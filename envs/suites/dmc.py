"""The DeepMind Control suite on the package's contract: `make_dmc("walker_walk", seed=0, from_pixels=True)`."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

import numpy as np

from ..base.contract import ContractEnv, apply_contract
from ..base.errors import require, require_positive
from ..base.gl import choose_gl, missing_gl
from ..base.simulator import Simulator
from ..transforms.rendering import render_pixels
from .registry import register, unknown_task

CAMERAS = {"quadruped": 2, "fish": 3}  # all others: 0


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
    return apply_contract(build_dmc(*domain_and_name(task), action_repeat=action_repeat, **view), task, seed)


def domain_and_name(task: str) -> tuple[str, str]:
    """The two parts of a task's name; refused where the suite has no such task."""
    tasks = {f"{domain}_{name}": (domain, name) for domain, name in import_suite().ALL_TASKS}
    if task not in tasks:
        raise unknown_task(task, tasks, "The DeepMind Control suite")
    return tasks[task]


def build_dmc(
    domain: str, name: str, *, from_pixels: bool, image_size: int, action_repeat: int, camera: int | str | None
) -> Control:
    """The suite's `domain` and `name` as a simulator."""
    require_positive(image_size=image_size, action_repeat=action_repeat)
    # Some tasks draw their physical constants when they are built. With one fixed draw, train and evaluation
    # environments are the same machine, and seeding an environment again is the same as building it with that seed.
    env = import_suite().load(domain, name, task_kwargs={"random": 0})
    camera = CAMERAS.get(domain, 0) if camera is None else camera
    return Control(env, action_repeat, (image_size, camera) if from_pixels else None)


class Control(Simulator):
    """A dm_control environment; TorchRL's DMControlWrapper takes several times as long for a step without images.

    Args:
        env: The environment.
        action_repeat: Frames of one step.
        view: (size, camera) of the observed image, rendered once after a repeated action; ``None`` observes the vectors.
    """

    def __init__(self, env: Any, action_repeat: int, view: tuple[int, int | str] | None):
        if view:
            render_pixels(env.physics, *view)  # what cannot render says so now, not in mid-run
            shapes = {"pixels": (3, view[0], view[0])}
        else:
            shapes = {name: (int(np.prod(spec.shape)),) for name, spec in env.observation_spec().items()}
        spec = env.action_spec()
        # An actuator without limits has MuJoCo's largest number for them.
        low = np.where(np.abs(spec.minimum) < 1e10, spec.minimum, -np.inf)
        high = np.where(np.abs(spec.maximum) < 1e10, spec.maximum, np.inf)
        super().__init__(observations=shapes, actions=(low, high))
        self._env, self.repeat, self.view = env, action_repeat, view

    def seed(self, number: int) -> None:
        self._env.task._random = np.random.RandomState(number)
        self._env.reset()  # as TorchRL's DMControlEnv does when it is seeded: the same episodes follow

    def begin(self) -> dict[str, np.ndarray]:
        return self.observe(self._env.reset())

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        total = 0.0
        for _ in range(self.repeat):
            now = self._env.step(action)
            total += now.reward
            if now.last():
                break
        return self.observe(now), total, now.last() and now.discount == 0, now.last()

    def observe(self, now: Any) -> dict[str, np.ndarray]:
        if self.view:
            return {"pixels": render_pixels(self._env.physics, *self.view)}
        return {name: np.array(value, np.float32).reshape(-1) for name, value in now.observation.items()}

    def close(self, *, raise_if_closed: bool = True) -> None:
        super().close(raise_if_closed=raise_if_closed)
        self._env.close()


def import_suite() -> Any:
    choose_gl()  # before MuJoCo is imported: it reads the variable only then
    require("dm_control", "dmc")
    try:
        return importlib.import_module("dm_control.suite")
    except ModuleNotFoundError:
        return require("dm_control.suite", "dmc")  # one of its own dependencies is missing
    except Exception as error:  # whatever a renderer that is asked for and missing throws: it differs by backend
        raise missing_gl(error) from error


TASKS = """
    acrobot_swingup acrobot_swingup_sparse ball_in_cup_catch cartpole_balance cartpole_balance_sparse
    cartpole_swingup cartpole_swingup_sparse cartpole_three_poles cartpole_two_poles cheetah_run dog_fetch
    dog_run dog_stand dog_trot dog_walk finger_spin finger_turn_easy finger_turn_hard fish_swim fish_upright
    hopper_hop hopper_stand humanoid_CMU_run humanoid_CMU_stand humanoid_CMU_walk humanoid_run
    humanoid_run_pure_state humanoid_stand humanoid_walk lqr_lqr_2_1 lqr_lqr_6_2 manipulator_bring_ball
    manipulator_bring_peg manipulator_insert_ball manipulator_insert_peg pendulum_swingup point_mass_easy
    point_mass_hard quadruped_escape quadruped_fetch quadruped_run quadruped_walk reacher_easy reacher_hard
    stacker_stack_2 stacker_stack_4 swimmer_swimmer15 swimmer_swimmer6 walker_run walker_stand walker_walk
""".split()  # noqa: SIM905


def known_tasks() -> Collection[str]:
    try:
        return {"_".join(names) for names in importlib.import_module("dm_control.suite").ALL_TASKS}
    except Exception:  # the extra is missing, or MuJoCo finds no OpenGL
        return TASKS


_control = dict(make=make_dmc, tasks=known_tasks, module="dm_control", extra="dmc")
register("dmc_vision", title="DeepMind Control suite from images", renders=True, **_control)
register("dmc_proprio", title="DeepMind Control suite from vectors", **_control)

"""The tasks of the DeepMind Control suite: their names, how one is loaded, seeded and stepped."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from ..base import errors
from ..base.gl import choose_gl, missing_gl

CAMERAS = {"quadruped": 2, "fish": 3}  # all others: 0

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


def import_suite() -> Any:
    choose_gl()  # before MuJoCo is imported: it reads the variable only then
    errors.require("dm_control", "dmc")
    try:
        return importlib.import_module("dm_control.suite")
    except ModuleNotFoundError:
        return errors.require("dm_control.suite", "dmc")  # one of its own dependencies is missing
    except Exception as error:  # whatever a renderer that is asked for and missing throws: it differs by backend
        raise missing_gl(error) from error


def known_tasks() -> Collection[str]:
    """The installed suite's tasks, or those it usually has."""
    choose_gl()  # as above
    try:
        return {"_".join(names) for names in importlib.import_module("dm_control.suite").ALL_TASKS}
    except Exception:  # the extra is missing, or MuJoCo finds no OpenGL
        return TASKS


def domain_and_name(task: str, unknown: Callable[..., ValueError] = errors.unknown_task) -> tuple[str, str]:
    """The two parts of a task's name; refused where the suite has no such task."""
    tasks = {f"{domain}_{name}": (domain, name) for domain, name in import_suite().ALL_TASKS}
    if task not in tasks:
        raise unknown(task, tasks, "The DeepMind Control suite")
    return tasks[task]


def load(domain: str, name: str) -> Any:
    """A task as dm_control's environment.

    Some tasks draw their physical constants when they are built. With one fixed draw, train and evaluation environments
    are the same machine, and seeding an environment again is the same as building it with that seed.
    """
    return import_suite().load(domain, name, task_kwargs={"random": 0})


def usual_camera(domain: str, camera: int | str | None) -> int | str:
    return CAMERAS.get(domain, 0) if camera is None else camera


def bounds(env: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action; an actuator without limits has MuJoCo's largest number for them."""
    spec = env.action_spec()
    low = np.where(np.abs(spec.minimum) < 1e10, spec.minimum, -np.inf)
    return low, np.where(np.abs(spec.maximum) < 1e10, spec.maximum, np.inf)


def seed(env: Any, number: int) -> None:
    """As TorchRL's DMControlEnv does when it is seeded: the same episodes follow."""
    env.task._random = np.random.RandomState(number % 2**32)
    env.reset()


def close(env: Any) -> None:
    """Frees its renderer, which dm_control leaves to the garbage collector."""
    env.close()
    env.physics.free()


def step(env: Any, action: Any, repeat: int) -> tuple[Any, float, bool, bool]:
    """(dm_control's time step, reward, terminated, truncated) after an action that is repeated within its episode."""
    total = 0.0
    for _ in range(repeat):
        now = env.step(action)
        if now.first():  # dm_control begins an episode where none is under way
            raise RuntimeError(
                "No episode is under way: call reset() before the first step and after an episode's end."
            )
        total += now.reward
        if now.last():
            break
    terminated = now.last() and now.discount == 0
    return now, total, terminated, now.last() and not terminated


def vectors(now: Any) -> dict[str, np.ndarray]:
    """What a time step observes, as float32 vectors by name."""
    return {name: np.array(value, np.float32).reshape(-1) for name, value in now.observation.items()}

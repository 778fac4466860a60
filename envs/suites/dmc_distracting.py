"""Distracting Control as a suite: `make_dmc_distracting("walker_walk", seed=0)`, 64x64 pixels, two frames an action."""

from __future__ import annotations

from ..base.contract import ContractEnv, apply_contract
from ..control.distracting import Distracting
from ..control.suite import domain_and_name, known_tasks
from .dmc import build_dmc
from .registry import register, unknown_task


def make_dmc_distracting(
    task: str,
    *,
    seed: int,
    image_size: int = 64,
    action_repeat: int = 2,
    camera: int | str | None = None,
    background: bool = True,
    colour: bool = True,
    moving_camera: bool = True,
    difficulty: str = "easy",
    dynamic: bool = True,
    split: str = "train",
    background_frames: str | None = None,
) -> ContractEnv:
    """One task of the DeepMind Control suite with distractions, seeded.

    `camera` is the one that sees, as in `make_dmc`; `moving_camera` and `background_frames` are `camera` and `frames` of
    `DMCDistracting`.
    """
    view = {"from_pixels": True, "image_size": image_size, "camera": camera}
    axes = {"background": background, "colour": colour, "camera": moving_camera}
    distracting = Distracting(**axes, difficulty=difficulty, dynamic=dynamic, split=split, frames=background_frames)
    env = build_dmc(*domain_and_name(task, unknown_task), action_repeat=action_repeat, **view)
    distracting.put_on(env._env)
    return apply_contract(env, task, seed)


register(
    "dmc_distracting",
    title="DeepMind Control suite with moving backgrounds, colours and camera",
    make=make_dmc_distracting,
    tasks=known_tasks,
    module="dm_control",
    extra="dmc",
    renders=True,
)

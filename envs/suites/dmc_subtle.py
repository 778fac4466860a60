"""DMC-Subtle as a suite: `make_dmc_subtle("reacher", seed=0)` is the paper's task, 64x64 pixels, two frames an action."""

from __future__ import annotations

from ..base.contract import ContractEnv, apply_contract
from ..control.subtle import OFFICIAL, Subtle
from .dmc import build_dmc
from .registry import register, unknown_task


def make_dmc_subtle(
    task: str,
    *,
    seed: int,
    image_size: int = 64,
    action_repeat: int = 2,
    camera: int | str | None = None,
    shrink: float | str | None = None,
    physics: str = "official",
    from_pixels: bool = True,
) -> ContractEnv:
    """One of the five tasks, "reacher" for example, seeded; arguments as those of `make_dmc` and `DMCSubtle`."""
    if task not in OFFICIAL:
        raise unknown_task(task, OFFICIAL, "DMC-Subtle")
    view = {"from_pixels": from_pixels, "image_size": image_size, "camera": camera}
    env = build_dmc(*OFFICIAL[task].stock, action_repeat=action_repeat, **view)
    Subtle(task, shrink=shrink, physics=physics).put_on(env._env, OFFICIAL[task].stock[1])
    return apply_contract(env, task, seed)


register(
    "dmc_subtle",
    title="DMC-Subtle: small targets and bodies",
    make=make_dmc_subtle,
    tasks=lambda: OFFICIAL,
    module="dm_control",
    extra="dmc",
    renders=True,
)

"""DMC-Subtle as a suite: `make_dmc_subtle("reacher", seed=0)` is the paper's task, 64x64 pixels, two frames an action."""

from ..base.contract import apply_contract
from ..transforms.subtle import OFFICIAL, DMCSubtle
from .dmc import build_dmc
from .registry import register, unknown_task


def make_dmc_subtle(
    task, *, seed, image_size=64, action_repeat=2, camera=None, shrink=None, physics="official", from_pixels=True
):
    """One of the five tasks, "reacher" for example, seeded; `shrink` and `physics` as in DMCSubtle."""
    if task not in OFFICIAL:
        raise unknown_task(task, OFFICIAL, "DMC-Subtle")
    view = {"from_pixels": from_pixels, "image_size": image_size, "camera": camera}
    env = build_dmc(*OFFICIAL[task].stock, action_repeat=action_repeat, **view)
    DMCSubtle(task, shrink=shrink, physics=physics).put_on(env)
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

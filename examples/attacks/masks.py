"""Where in an image an object really is: as the simulator says, or by its colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torchrl.envs import EnvBase, TransformedEnv

from r2dreamer.envs.control.subtle import OFFICIAL
from r2dreamer.envs.suites.dmc import Control

Mask = Callable[[torch.Tensor], torch.Tensor]


def object_mask(
    env: EnvBase, task: str, objects: Sequence[str] | None = None, colour: Sequence[int] | None = None
) -> Mask | None:
    """A function from the image [C, H, W] that `env` shows now to the object's mask [H, W]; None where nothing tells.

    Args:
        objects: names of geoms, sites, tendons or bodies; "pole" is "pole_1" and "pole_2", too.
    """
    if colour is not None and objects is not None:
        raise ValueError(f"objects={list(objects)} and colour={list(colour)} both say what the object is: give one.")
    if colour is not None:
        wanted = torch.tensor(list(colour), dtype=torch.uint8).view(-1, 1, 1)
        return lambda pixels: (pixels.cpu() == wanted).all(0)
    base = env
    while isinstance(base, TransformedEnv):
        base = base.base_env
    if not isinstance(base, Control) or base.view is None:
        if objects is not None:
            raise ValueError(
                f"objects={list(objects)}: only environments of the DeepMind Control suite can tell where objects are. "
                "Elsewhere give a colour=[r, g, b] that nothing else has, or neither."
            )
        return None
    given = objects is not None
    if not given:
        official = OFFICIAL.get(task)
        objects = [name for names in official.names.values() for name in names] if official else ["target"]
    model = base._env.physics.model
    wanted, known = _find(model, objects)
    if not wanted:
        if not given:
            return None
        raise ValueError(f"objects={list(objects)} are not among what this model has: {', '.join(sorted(known))}.")

    def mask(pixels: torch.Tensor) -> torch.Tensor:
        size, camera = base.view
        ids = base._env.physics.render(size, size, camera_id=camera, segmentation=True)
        return torch.from_numpy(np.isin(ids[..., 0] * 1000 + ids[..., 1], wanted))

    return mask


def _find(model, objects: Sequence[str]) -> tuple[list[int], set[str]]:
    """The pairs (id, type), each as one number, of what has these names, and all names there are."""
    import mujoco

    types = {"geom": mujoco.mjtObj.mjOBJ_GEOM, "site": mujoco.mjtObj.mjOBJ_SITE, "tendon": mujoco.mjtObj.mjOBJ_TENDON}
    means = lambda name: name is not None and any(name == each or name.startswith(f"{each}_") for each in objects)
    wanted, known = [], set()
    for kind, number in types.items():
        for index in range(getattr(model, f"n{kind}")):
            name = model.id2name(index, kind)
            body = model.id2name(getattr(model, f"{kind}_bodyid")[index], "body") if kind != "tendon" else None
            known |= {name, body} - {None, ""}
            if means(name) or body in objects:
                wanted.append(index * 1000 + int(number))
    return wanted, known

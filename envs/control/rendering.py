"""Camera images of dm_control's physics."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base.gl import missing_gl


def check_camera(physics: Any, camera: int | str | None) -> None:
    """Refuse a camera that a model does not have."""
    cameras = [physics.model.id2name(index, "camera") for index in range(physics.model.ncam)]
    if camera not in cameras and camera not in range(-1, len(cameras)):  # -1 is the free camera
        raise ValueError(f"camera={camera!r} is not among this model's cameras: {dict(enumerate(cameras))}.")


def render_image(physics: Any, size: int, camera: int | str | None) -> np.ndarray:
    """One camera image as a uint8 array [size, size, 3] of its own."""
    check_camera(physics, camera)
    room = physics.model.vis.global_
    if size > min(room.offwidth, room.offheight):
        raise ValueError(
            f"An image of {size}x{size} is larger than this model's offscreen framebuffer, {room.offwidth}x{room.offheight}: "
            f"render at most {min(room.offwidth, room.offheight)}, and enlarge what you get."
        )
    try:
        return physics.render(size, size, camera_id=camera).copy()
    except ValueError:
        raise  # of what is drawn, such as a background's damaged file
    except Exception as error:  # a missing or broken renderer throws whatever its backend throws
        raise missing_gl(error) from error


def render_pixels(physics: Any, size: int, camera: int | str | None) -> np.ndarray:
    """The same as [3, size, size]."""
    return render_image(physics, size, camera).transpose(2, 0, 1).copy()

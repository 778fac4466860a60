"""Which OpenGL MuJoCo renders with, and what a user is told when there is none.

Imports neither TorchRL nor MuJoCo at its top: TorchRL imports MuJoCo, and MuJoCo reads MUJOCO_GL once, on import.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def choose_gl() -> None:
    """On a Linux machine without a display, let MuJoCo render by EGL, unless the user chose something else."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if "MUJOCO_GL" in os.environ or display or not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return  # asking for a missing EGL breaks even tasks that render nothing; dm_control then finds what there is
    os.environ["MUJOCO_GL"] = "egl"


def check_chosen_gl() -> None:
    """Import MuJoCo with the MUJOCO_GL the user chose, so that a missing library is explained and not a stack dump."""
    if "MUJOCO_GL" in os.environ and importlib.util.find_spec("mujoco") is not None:
        try:
            importlib.import_module("mujoco")
        except Exception as error:  # what a missing renderer throws differs by backend
            raise missing_gl(error) from error


def missing_gl(error: Exception) -> ImportError:
    """The error of a machine that cannot render."""
    used = os.environ.get("MUJOCO_GL", "unset")
    return ImportError(
        f"MuJoCo could not render ({type(error).__name__}: {error}); MUJOCO_GL is {used}. Set MUJOCO_GL=egl, or "
        "MUJOCO_GL=osmesa where there is no GPU driver, before Python starts; on Debian and Ubuntu the libraries come "
        "with `apt-get install libegl1 libgl1 libgles2` (libosmesa6 for osmesa)."
    )


def hanging_gl(driver: Path = Path("/proc/driver/nvidia/version")) -> str:
    """What a user is told when rendering never came back."""
    version = driver.read_text().splitlines()[0].strip() if driver.exists() else "the system's OpenGL driver"
    return (
        f"MUJOCO_GL is {os.environ.get('MUJOCO_GL', 'unset')}, {version}. Drivers can hang when "
        "many processes render at once: use fewer (env.num_envs, env.eval_episodes), MUJOCO_GL=osmesa (apt-get install libosmesa6), or "
        "another driver; `r2dreamer doctor` asks the driver by itself."
    )


@contextmanager
def watch(what: str, seconds: float) -> Iterator[None]:
    """Ends the process, with its stack and the remedy, if the block takes longer: an exception cannot stop a driver's call."""

    def give_up() -> None:
        faulthandler.dump_traceback()
        print(
            f"{what} did not come back within {seconds:g} seconds (timeout=...): see the stack above. If it ends in the "
            f"renderer: {hanging_gl()}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

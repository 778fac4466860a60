"""Meta-World's fifty manipulation tasks from one camera image: `make_metaworld("reach", seed=0)`."""

from __future__ import annotations

import importlib
import pickle
import queue
import sys
import threading
import weakref
from collections.abc import Collection
from typing import Any

import numpy as np

from ..base.contract import ContractEnv, apply_contract
from ..base.errors import require, require_positive
from ..base.gl import choose_gl, missing_gl
from ..base.images import to_pixels
from ..base.simulator import Simulator
from .registry import register, unknown_task

CORNER2_POSITION = (0.75, 0.075, 0.7)  # closer to the table than upstream's (1.3, -0.2, 1.1)
# Upstream hung these cameras on their heads. Their images are turned over, not round: upright, and mirrored, as in the
# experiments others report.
UPSIDE_DOWN = ("corner", "corner2", "corner3")


def make_metaworld(
    task: str, *, seed: int, image_size: int = 64, action_repeat: int = 2, camera: str = "corner2"
) -> ContractEnv:
    """One of the MT1 tasks ("reach", "door-open", ...; "reach-v3" works too) with a new goal each episode, seeded.

    The reward is upstream's dense one, summed over repeats. Success, that of any repeat, is reported below "metrics"
    and ends nothing; an episode ends after 500 frames, by truncation.

    Args:
        task: Its name.
        seed: Of the goals.
        image_size: Side of the square image.
        action_repeat: Frames of one step.
        camera: ``"corner2"``, moved closer, or one of upstream's others as it is: corner, corner3, topview,
            behindGripper, gripperPOV.
    """
    require_positive(image_size=image_size, action_repeat=action_repeat)
    choose_gl()
    tasks = require("metaworld", "metaworld").ALL_V3_ENVIRONMENTS
    name = f"{str(task).removesuffix('-v3')}-v3"
    if name not in tasks:
        raise unknown_task(task, [known.removesuffix("-v3") for known in tasks], "Meta-World")
    env = MetaWorld(_build(name, tasks[name], image_size), image_size, action_repeat, camera)
    return apply_contract(env, task, seed)


class MetaWorld(Simulator):
    """One Meta-World task that draws its goals from a generator of its own."""

    def __init__(self, upstream: Any, image_size: int, action_repeat: int, camera: str):
        space = upstream.action_space
        super().__init__(
            observations={"pixels": (3, image_size, image_size)}, actions=(space.low, space.high), metrics=["success"]
        )
        self.upstream, self.repeat, self.flipped = upstream, action_repeat, camera in UPSIDE_DOWN
        cameras = [upstream.model.camera(index).name for index in range(upstream.model.ncam)]
        if camera not in cameras:
            raise ValueError(f"camera={camera!r} is not among Meta-World's cameras: {', '.join(cameras)}.")
        upstream.model.camera("corner2").pos = CORNER2_POSITION
        self.viewer = ThreadViewer(upstream.model, upstream.data, image_size, cameras.index(camera))
        try:
            self.viewer.render()  # what cannot render says so now, not in mid-run
        except Exception as error:  # a missing or broken renderer throws whatever its backend throws
            raise missing_gl(error) from error

    def seed(self, number: int) -> None:
        self.upstream.seed(number)

    def begin(self) -> dict[str, np.ndarray]:
        self.upstream.reset()
        return {"pixels": self.image()}

    def advance(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool]:
        total, success, truncated = 0.0, 0.0, False
        for _ in range(self.repeat):
            _, reward, _, _, info = self.upstream.step(action)
            total += float(reward)
            success = max(success, float(info["success"]))
            # One frame further upstream raises, and 500 need not be a multiple of the repeat.
            truncated = self.upstream.curr_path_length >= self.upstream.max_path_length
            if truncated:
                break
        self.metrics["success"] = success
        return {"pixels": self.image()}, total, False, truncated

    def image(self) -> np.ndarray:
        image = self.viewer.render()
        return to_pixels(np.flipud(image) if self.flipped else image)

    def close(self, *, raise_if_closed: bool = True) -> None:
        super().close(raise_if_closed=raise_if_closed)
        self.viewer.close()


def _build(name: str, task_class: Any, size: int) -> Any:
    """The task as MT1 sets it up, without MT1: that builds it twice and resets it fifty times to draw goals."""
    from metaworld.types import Task

    env = task_class(width=size, height=size)
    goal = {"env_cls": task_class, "rand_vec": None, "partially_observable": False}
    env.set_task(Task(env_name=name, data=pickle.dumps(goal)))
    env._freeze_rand_vec = False  # a new goal each reset
    env.seeded_rand_vec = True  # from the generator that `seed` seeds; without, from numpy's global one
    return env


class ThreadViewer:
    """Renders a MuJoCo model with Gymnasium's viewer, on a thread of its own: uint8 arrays [size, size, 3].

    OpenGL draws into the context that is current on the calling thread. Gymnasium makes a viewer's context current
    once, when the viewer is made; the next viewer takes its place, and from then on the first one draws with its own
    names for textures and buffers into the other's context (Meta-World's issue 448). dm_control, too, trusts that
    nobody else touches its thread. On a thread of its own a viewer neither suffers that nor does it to others.
    """

    def __init__(self, model: Any, data: Any, size: int, camera: int | str | None):
        self.requests, self.images = queue.SimpleQueue(), queue.SimpleQueue()
        arguments = (model, data, size, camera, self.requests, self.images)
        # A daemon: a process that ends does not wait for it, and the context ends with the process.
        self.thread = threading.Thread(target=_render_on_request, args=arguments, name="render", daemon=True)
        self.thread.start()
        weakref.finalize(self, self.requests.put, False).atexit = False  # an environment nobody closed

    def render(self) -> np.ndarray:
        if not self.thread.is_alive():
            raise RuntimeError(
                "This environment's renderer is gone: the environment was closed, or the process was forked after it "
                'was made. Make it in the process that uses it, or start workers with "spawn" or "forkserver".'
            )
        self.requests.put(True)
        image = self.images.get()
        if isinstance(image, Exception):
            raise image
        return image

    def close(self) -> None:
        self.requests.put(False)
        if not sys.is_finalizing():  # at the very end no other thread runs any more
            self.thread.join()


def _render_on_request(
    model: Any, data: Any, size: int, camera: int | str | None, requests: queue.SimpleQueue, images: queue.SimpleQueue
) -> None:
    # The viewer lives in this frame only, so that nobody frees its textures while another context is current.
    viewer: Any = None
    while requests.get():
        try:
            if viewer is None:
                from gymnasium.envs.mujoco.mujoco_rendering import OffScreenViewer

                viewer = OffScreenViewer(model, data, size, size)
            images.put(viewer.render("rgb_array", camera))
        except Exception as error:
            images.put(error)
    if viewer is not None:
        viewer.con.free()  # before its OpenGL context, which it lives in
        viewer.free()


TASKS = """
    assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall
    button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open
    door-unlock drawer-close drawer-open faucet-close faucet-open hammer hand-insert handle-press
    handle-press-side handle-pull handle-pull-side lever-pull peg-insert-side peg-unplug-side pick-out-of-hole
    pick-place pick-place-wall plate-slide plate-slide-back plate-slide-back-side plate-slide-side push
    push-back push-wall reach reach-wall shelf-place soccer stick-pull stick-push sweep sweep-into window-close
    window-open
""".split()  # noqa: SIM905


def _tasks() -> Collection[str]:
    try:
        names = importlib.import_module("metaworld").ALL_V3_ENVIRONMENTS
    except Exception:  # the extra is missing, or MuJoCo finds no OpenGL
        names = [f"{name}-v3" for name in TASKS]
    return {*names, *(name.removesuffix("-v3") for name in names)}


register(
    "metaworld",
    title="Meta-World, 50 manipulation tasks",
    make=make_metaworld,
    tasks=_tasks,
    module="metaworld",
    extra="metaworld",
    renders=True,
)

"""The DeepMind Control suite on the package's contract: `make_dmc("walker_walk", seed=0, from_pixels=True)`."""

import importlib

import numpy as np
import torch
from torchrl.data import Bounded
from torchrl.envs import TransformedEnv
from torchrl.envs.transforms import Transform

from ..base.contract import finish
from ..base.errors import require, require_positive, unknown_task
from ..base.gl import choose_gl, missing_gl
from ..base.simulator import Simulator

CAMERAS = {"quadruped": 2, "fish": 3}  # all others: 0


def make_dmc(task, *, seed, from_pixels, image_size=64, action_repeat=2, camera=None):
    """One task of the suite, "walker_walk" for example, seeded.

    from_pixels: observe the camera image, and only that, under "pixels"; without, the vectors: nothing is rendered.
    camera: index or name of the camera; None is the suite's usual one.
    """
    suite = import_suite()
    tasks = {f"{domain}_{name}": (domain, name) for domain, name in suite.ALL_TASKS}
    if task not in tasks:
        raise unknown_task(task, tasks, "The DeepMind Control suite")
    view = {"from_pixels": from_pixels, "image_size": image_size, "camera": camera}
    return finish(build_dmc(*tasks[task], action_repeat=action_repeat, **view), task, seed)


def build_dmc(domain, name, *, from_pixels, image_size, action_repeat, camera):
    """The suite's `domain` and `name` as a simulator."""
    require_positive(image_size=image_size, action_repeat=action_repeat)
    # Some tasks draw their physical constants when they are built. With one fixed draw, train and evaluation
    # environments are the same machine, and seeding an environment again is the same as building it with that seed.
    env = import_suite().load(domain, name, task_kwargs={"random": 0})
    camera = CAMERAS.get(domain, 0) if camera is None else camera
    return Control(env, action_repeat, (image_size, camera) if from_pixels else None)


class Control(Simulator):
    """A dm_control environment; TorchRL's DMControlWrapper takes several times as long for a step without images.

    view: (size, camera) of the image that is observed, rendered once after a repeated action; without, the vectors are.
    """

    def __init__(self, env, action_repeat, view):
        if view:
            render_pixels(env.physics, *view)  # what cannot render says so now, not in mid-run
            shapes = {"pixels": (3, view[0], view[0])}
        else:
            shapes = {name: (int(np.prod(spec.shape)),) for name, spec in env.observation_spec().items()}
        spec = env.action_spec()
        # An actuator without limits has MuJoCo's largest number for them.
        bounds = (
            np.where(np.abs(bound) < 1e10, bound, sign * np.inf)
            for bound, sign in ((spec.minimum, -1), (spec.maximum, 1))
        )
        super().__init__(observations=shapes, actions=tuple(bounds))
        self._env, self.repeat, self.view = env, action_repeat, view

    def seed(self, number):
        self._env.task._random = np.random.RandomState(number)
        self._env.reset()  # as TorchRL's DMControlEnv does when it is seeded: the same episodes follow

    def begin(self):
        return self.observe(self._env.reset())

    def advance(self, action):
        total = 0.0
        for _ in range(self.repeat):
            now = self._env.step(action)
            total += now.reward
            if now.last():
                break
        return self.observe(now), total, now.last() and now.discount == 0, now.last()

    def observe(self, now):
        if self.view:
            return {"pixels": render_pixels(self._env.physics, *self.view)}
        return {name: np.array(value, np.float32).reshape(-1) for name, value in now.observation.items()}

    def close(self, *, raise_if_closed=True):
        super().close(raise_if_closed=raise_if_closed)
        self._env.close()


class RenderPixels(Transform):
    """The camera image of a DeepMind Control environment of TorchRL's under "pixels", uint8 [3, size, size].

    As a transform it renders once after a repeated action; TorchRL's `from_pixels` renders every frame in between too,
    which takes most of a step's time.
    """

    def __init__(self, size=64, camera=0):
        super().__init__(out_keys=["pixels"])
        self.size, self.camera = size, camera

    def _call(self, next_tensordict):
        env = self.parent
        while isinstance(env, TransformedEnv):
            env = env.base_env
        pixels = render_pixels(env._env.physics, self.size, self.camera)
        return next_tensordict.set("pixels", torch.from_numpy(pixels))

    def _reset(self, tensordict, tensordict_reset):
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec):
        observation_spec["pixels"] = Bounded(0, 255, (3, self.size, self.size), dtype=torch.uint8)
        return observation_spec


def render_pixels(physics, size, camera):
    """One camera image of a dm_control physics as a uint8 array [3, size, size]."""
    cameras = [physics.model.id2name(index, "camera") for index in range(physics.model.ncam)]
    if camera not in cameras and camera not in range(-1, len(cameras)):  # -1 is the free camera
        raise ValueError(f"camera={camera!r} is not among this model's cameras: {dict(enumerate(cameras))}.")
    try:
        image = physics.render(size, size, camera_id=camera)
    except Exception as error:  # a missing or broken renderer throws whatever its backend throws
        raise missing_gl(error) from error
    return image.transpose(2, 0, 1).copy()


def import_suite():
    choose_gl()  # before MuJoCo is imported: it reads the variable only then
    require("dm_control", "dmc")
    try:
        return importlib.import_module("dm_control.suite")
    except ModuleNotFoundError:
        return require("dm_control.suite", "dmc")  # one of its own dependencies is missing
    except Exception as error:  # whatever a renderer that is asked for and missing throws: it differs by backend
        raise missing_gl(error) from error

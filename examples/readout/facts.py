"""What a simulator knows and an image may show: where things are, by name."""

from __future__ import annotations

import numpy as np
from torchrl.envs import EnvBase, TransformedEnv

from r2dreamer.envs.suites.dmc import Control

# Of a domain of dm_control, each fact: the array of MuJoCo's data, the object's name, and which of its numbers.
# Of a body's rotation matrix, xx and xz are the cosine and the sine of its angle in the plane of the image.
PLACES = {
    "reacher": {"target": ("geom_xpos", "target", ["x", "y"]), "finger": ("geom_xpos", "finger", ["x", "y"])},
    "finger": {
        "target": ("site_xpos", "target", ["x", "z"]),
        "fingertip": ("geom_xpos", "fingertip", ["x", "z"]),  # the site "tip" is the spinner's
        "spinner": ("xmat", "spinner", ["xx", "xz"]),
    },
    "point_mass": {"target": ("geom_xpos", "target", ["x", "y"]), "mass": ("geom_xpos", "pointmass", ["x", "y"])},
    "ball_in_cup": {"ball": ("xpos", "ball", ["x", "z"]), "cup": ("xpos", "cup", ["x", "z"])},
    "cartpole": {"pole": ("xmat", "pole_1", ["xx", "xz"]), "cart": ("xpos", "cart", ["x"])},
}


def facts(env: EnvBase) -> dict[str, np.ndarray]:
    """Vectors by name, of the state that `env` is in.

    Of a DeepMind Control task they are places and angles as listed above, or else its vector observations. Another
    environment says them itself, by a method ``facts()`` that returns vectors by name.
    """
    while isinstance(env, TransformedEnv):
        env = env.base_env
    if hasattr(type(env), "facts"):
        known = env.facts()
    elif isinstance(env, Control):
        physics, task = env._env.physics, env._env.task
        places = PLACES.get(type(task).__module__.rpartition(".")[2])
        if places is None:
            known = task.get_observation(physics)
        else:
            known = {name: getattr(physics.named.data, field)[thing, at] for name, (field, thing, at) in places.items()}
    else:
        raise ValueError(
            f"{type(env).__name__} does not say what it knows. Give it a method facts() that returns vectors by name, or "
            "take an environment of the DeepMind Control suite (env=dmc_vision, env=dmc_subtle)."
        )
    return {name: np.asarray(value, np.float32).reshape(-1) for name, value in known.items()}

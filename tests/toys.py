"""An environment that observes a little of everything and goes wrong on demand, and one of every kind we make."""

import functools
import os
import signal
import time

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from r2dreamer.envs import make_dmc, make_gym, make_probe


class Toy(gymnasium.Env):
    """Observes an image, a vector and a choice; the reward counts the steps; goes wrong on demand at its third."""

    action_space = spaces.Discrete(3, start=-1)
    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (20, 30, 3), np.uint8),
            "body": spaces.Dict({"angles": spaces.Box(-9, 9, (2, 2), np.float64), "height": spaces.Box(0, 1, ())}),
            "state": spaces.Discrete(4),
        }
    )

    def __init__(self, trouble=None, action_space=None, observation_space=None):
        self.trouble = trouble
        self.action_space = self.action_space if action_space is None else action_space
        self.observation_space = self.observation_space if observation_space is None else observation_space

    def _observe(self, angle=0.0):
        image = np.full((20, 30, 3), 7, np.uint8)
        body = {"angles": np.full((2, 2), angle), "height": np.float32(self.np_random.random())}
        return {"camera": image[::-1], "body": body, "state": 2}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        self.last_action = action
        now = self.steps == 3
        if now and self.trouble == "raise":
            raise ArithmeticError("the toy broke")
        if now and self.trouble == "hang":
            time.sleep(60)
        if now and self.trouble in ("freeze", "broken"):
            self.render()
        if now and self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        reward = np.inf if now and self.trouble == "reward" else float(self.steps)
        return self._observe(np.nan if now and self.trouble == "nan" else 0.0), reward, self.steps == 5, False, {}

    def render(self):
        if self.trouble == "broken":
            raise ArithmeticError("no picture")
        time.sleep(60)  # as a driver does that hangs


for trouble in ("raise", "hang", "freeze", "broken", "kill", "nan", "reward"):
    gymnasium.register(f"Toy-{trouble}-v0", Toy, kwargs={"trouble": trouble})
gymnasium.register("Toy-v0", Toy)


class Written(Toy):
    metadata = {"render_modes": ["ansi"]}

    def __init__(self, render_mode=None):
        super().__init__()

    def render(self):
        return "a text"


gymnasium.register("Toy-ansi-v0", Written)
for number, space in enumerate((spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2), spaces.Tuple([]), spaces.Text(3))):
    gymnasium.register(f"Toy-space{number}-v0", Toy, kwargs={"action_space": space})
TWICE = spaces.Dict({"body": spaces.Dict({"height": spaces.Discrete(2)}), "body_height": spaces.Discrete(2)})
TEXT = spaces.Dict({"words": spaces.Text(3), "state": spaces.Discrete(4)})
gymnasium.register("Toy-text-v0", Toy, kwargs={"observation_space": TEXT})
gymnasium.register("Toy-twice-v0", Toy, kwargs={"observation_space": TWICE})
gymnasium.register(
    "Toy-box-v0", Toy, kwargs={"action_space": spaces.Box(np.float64([-1, 0]), np.float64([3, 10]), dtype=np.float64)}
)

FACTORIES = {
    "gym state": functools.partial(make_gym, "CartPole-v1"),
    "gym pixels": functools.partial(make_gym, "CartPole-v1", from_pixels=True),
    "gym continuous": functools.partial(make_gym, "Pendulum-v1", action_repeat=2),
    "gym dict": functools.partial(make_gym, "toys:Toy-v0"),
    "dmc proprio": functools.partial(make_dmc, "cartpole_swingup", from_pixels=False),
    "dmc matrices": functools.partial(make_dmc, "manipulator_bring_ball", from_pixels=False),
    "dmc vision": functools.partial(make_dmc, "reacher_easy", from_pixels=True),
    "probe": functools.partial(make_probe, "small_target", continuous=True),
}
every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def trajectory(env, steps=6, seed=0):
    """Observations, rewards and flags under random actions drawn with `seed`."""
    torch.manual_seed(seed)
    return env.rollout(steps, break_when_any_done=False)


def same(left, right):
    return all(torch.equal(left[key], right[key]) for key in left.keys(True, True))

"""The simulators of our environments without TorchRL, as Gymnasium environments: what collecting is measured against."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from torchrl.envs import EnvBase, GymWrapper, TransformedEnv
from torchrl.envs.libs.dm_control import DMControlWrapper

from r2dreamer.envs import RenderPixels, Simulator
from r2dreamer.envs.dmc import render_pixels


def bare(factory: Callable[..., EnvBase], seed: int) -> gymnasium.Env:
    """The simulator inside `factory(seed=seed)`; it makes the same images, repeats actions as often, checks nothing."""
    environment = factory(seed=seed)
    base = environment
    while isinstance(base, TransformedEnv):
        base = base.base_env
    if isinstance(base, Simulator):
        return BareSimulator(environment, base)
    if isinstance(base, DMControlWrapper):
        return BareControl(environment, base)
    if isinstance(base, GymWrapper):
        return base._env
    raise ValueError(f"{type(base).__name__} is not of a suite of this package: what is inside of it is not known.")


class BareSimulator(gymnasium.Env):
    def __init__(self, environment: EnvBase, simulator: Simulator):
        self.environment, self.simulator = environment, simulator
        self.observation_space = Box(0, 255, simulator.observation_spec["pixels"].shape, np.uint8)
        spec = simulator.action_spec
        self.action_space = (
            Discrete(spec.shape[-1]) if simulator.discrete else Box(spec.space.low.numpy(), spec.space.high.numpy())
        )

    def reset(self, *, seed=None, options=None):
        return self.simulator.begin().numpy(), {}

    def step(self, action):
        image, *outcome = self.simulator.advance(action)
        return image.numpy(), *outcome, {}

    def close(self):
        self.environment.close()


class BareControl(gymnasium.Env):
    def __init__(self, environment: TransformedEnv, wrapper: DMControlWrapper):
        self.environment, self.simulator, self.repeat = environment, wrapper._env, wrapper.frame_skip
        renderers = [each for each in environment.transform if isinstance(each, RenderPixels)]
        self.view = (renderers[0].size, renderers[0].camera) if renderers else None
        spec = self.simulator.action_spec()
        self.action_space = Box(spec.minimum.astype(np.float32), spec.maximum.astype(np.float32))
        if self.view:
            self.observation_space = Box(0, 255, (3, self.view[0], self.view[0]), np.uint8)
        else:
            vectors = self.simulator.observation_spec().items()
            self.observation_space = Dict({name: Box(-np.inf, np.inf, vector.shape) for name, vector in vectors})

    def reset(self, *, seed=None, options=None):
        return self.observe(self.simulator.reset()), {}

    def step(self, action):
        reward = 0.0
        for _ in range(self.repeat):
            now = self.simulator.step(action)
            reward += now.reward
            if now.last():
                break
        return self.observe(now), reward, now.last() and now.discount == 0, now.last(), {}

    def observe(self, now):
        if self.view:
            return render_pixels(self.simulator.physics, *self.view).numpy()
        return {name: np.asarray(value, np.float32) for name, value in now.observation.items()}

    def close(self):
        self.environment.close()

"""The simulators of our environments without TorchRL, as Gymnasium environments: what collecting is measured against."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from torchrl.envs import EnvBase

from r2dreamer.envs import Simulator
from r2dreamer.envs.base.contract import ContractEnv


def bare(factory: Callable[..., EnvBase], seed: int) -> gymnasium.Env:
    """The simulator inside `factory(seed=seed)`; it makes the same images, repeats actions as often, checks nothing."""
    environment = factory(seed=seed)
    if not (isinstance(environment, ContractEnv) and environment.bare):
        raise ValueError(f"{environment} is not of a suite of this package: what is inside of it is not known.")
    simulator = environment.base_env
    if isinstance(simulator.__dict__.get("env"), gymnasium.Env):
        return simulator.env
    return BareSimulator(simulator)


class BareSimulator(gymnasium.Env):
    def __init__(self, simulator: Simulator):
        self.simulator = simulator
        observed = {key: spec for key, spec in simulator.observation_spec.items() if key != "metrics"}
        self.observation_space = Dict(
            {
                name: Box(0, 255, spec.shape, np.uint8) if len(spec.shape) == 3 else Box(-np.inf, np.inf, spec.shape)
                for name, spec in observed.items()
            }
        )
        size = simulator.action_spec.shape[-1]
        self.action_space = Discrete(size) if simulator.discrete else Box(*simulator.bounds)

    def reset(self, *, seed=None, options=None):
        return self.simulator.begin(), {}

    def step(self, action):
        observation, reward, terminated, truncated = self.simulator.advance(action)
        return observation, float(reward), bool(terminated), bool(truncated), {}

    def close(self):
        self.simulator.close()

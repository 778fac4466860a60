"""How fast environments are collected from, beside the same simulators stepped without TorchRL."""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import gymnasium
import hydra
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from omegaconf import DictConfig
from torchrl.envs import EnvBase

from r2dreamer.envs import Simulator, VectorCollector, env_seeds, make_vector_env
from r2dreamer.envs.base.contract import ContractEnv

DRAWN = 512  # actions, before anything is timed: what drawing them costs differs between the two


def rate(step: Callable[[], object], seconds: float) -> float:
    """Steps per second."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        count += 1
    return count / (time.perf_counter() - start)


def frames_per_second(cfg: DictConfig, count: int) -> dict[str, float]:
    """Of ``count`` environments under random actions: through the trainer's collector, and of their bare simulators.

    Gymnasium's AsyncVectorEnv steps the simulators, with the same action repeat and images. The two take turns; medians.
    """
    factory, seeds = hydra.utils.instantiate(cfg.env.make), env_seeds(cfg.seed, count, "train")
    frames = count * cfg.env.action_repeat
    environments = make_vector_env(factory, seeds, parallel=cfg.env.parallel, timeout=cfg.timeout)
    actions = itertools.cycle([environments.action_spec.rand() for _ in range(DRAWN)])
    collector = VectorCollector(
        environments,
        lambda root: root.set("action", next(actions)),
        frames_per_batch=count * cfg.collect_steps,
        total_frames=-1,
        trust_policy=True,
    )
    batches = iter(collector)
    found = {"collector": [], "bare": []}
    with contextlib.ExitStack() as after:
        after.callback(collector.shutdown)
        simulators = AsyncVectorEnv(
            [functools.partial(bare, factory, seed) for seed in seeds],
            context="forkserver",
            autoreset_mode=AutoresetMode.SAME_STEP,  # as ours: no step is a mere reset
        )
        after.callback(simulators.close)
        simulators.reset()
        samples = itertools.cycle([simulators.action_space.sample() for _ in range(DRAWN)])
        step = lambda: simulators.step(next(samples))
        for turn in range(cfg.rounds + 1):  # the first turn warms up
            seconds = cfg.seconds if turn else cfg.seconds / 4
            rates = cfg.collect_steps * rate(lambda: next(batches), seconds), rate(step, seconds)
            if turn:
                for name, value in zip(found, rates, strict=True):
                    found[name].append(frames * value)
    rates = {name: statistics.median(values) for name, values in found.items()}
    return rates | {"ratio": statistics.median(a / b for a, b in zip(*found.values(), strict=True))}


def bare(factory: Callable[..., EnvBase], seed: int) -> gymnasium.Env:
    """The simulator inside `factory(seed=seed)`; it makes the same images, repeats actions as often, checks nothing."""
    environment = factory(seed=seed)
    if not (isinstance(environment, ContractEnv) and environment.bare):
        raise ValueError(
            f"{environment} is not of a suite of this package, so there is no bare simulator to compare it with. "
            "`r2dreamer doctor` measures its speed."
        )
    return BareSimulator(environment.base_env)


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

"""How fast environments are collected from, beside the same simulators stepped without TorchRL; one JSON line each.

    python examples/throughput.py env=dmc_vision env.task=walker_walk
    python examples/throughput.py env=crafter counts=[1,4]

`collector`: frames per second through the trainer's collector and environments (in workers where the suite's config says
so); `bare`: the simulators inside of them stepped by Gymnasium's AsyncVectorEnv with the same action repeat and images. Both
play random actions that were drawn before. The two take turns, `rounds` times; medians.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
import hydra
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from omegaconf import DictConfig

from r2dreamer.envs import VectorCollector, env_seeds, make_vector_env
from r2dreamer.examples.cli.script import script
from r2dreamer.examples.timing.bare import bare

DRAWN = 512  # actions, before anything is timed: what drawing them costs differs between the two


def rate(step: Callable[[], object], seconds: float) -> float:
    """Steps per second."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        count += 1
    return count / (time.perf_counter() - start)


def measure(cfg: DictConfig, count: int) -> dict[str, float]:
    factory, seeds = hydra.utils.instantiate(cfg.env.make), env_seeds(cfg.seed, count, "train")
    frames = count * cfg.env.action_repeat
    environments = make_vector_env(factory, seeds, parallel=cfg.env.parallel)
    actions = itertools.cycle([environments.action_spec.rand() for _ in range(DRAWN)])
    collector = VectorCollector(
        environments,
        lambda root: root.set("action", next(actions)),
        frames_per_batch=count * cfg.collect_steps,
        total_frames=-1,
        trust_policy=True,
    )
    batches = iter(collector)
    simulators = AsyncVectorEnv(
        [functools.partial(bare, factory, seed) for seed in seeds],
        context="forkserver",
        autoreset_mode=AutoresetMode.SAME_STEP,  # as ours: no step is a mere reset
    )
    found = {"collector": [], "bare": []}
    try:
        simulators.reset()
        samples = itertools.cycle([simulators.action_space.sample() for _ in range(DRAWN)])
        step = lambda: simulators.step(next(samples))
        for turn in range(cfg.rounds + 1):  # the first turn warms up
            seconds = cfg.seconds if turn else cfg.seconds / 4
            rates = cfg.collect_steps * rate(lambda: next(batches), seconds), rate(step, seconds)
            if turn:
                for name, value in zip(found, rates, strict=True):
                    found[name].append(frames * value)
    finally:
        collector.shutdown()
        simulators.close()
    rates = {name: statistics.median(values) for name, values in found.items()}
    return rates | {"ratio": statistics.median(a / b for a, b in zip(*found.values(), strict=True))}


@script("throughput")
def main(cfg: DictConfig) -> None:
    for count in cfg.counts:
        rates = {name: float(f"{value:.3g}") for name, value in measure(cfg, count).items()}
        line = {"env": cfg.env.suite, "task": cfg.env.task, "environments": count}
        print(json.dumps(line | {"collect_steps": cfg.collect_steps} | rates), flush=True)


if __name__ == "__main__":
    main()

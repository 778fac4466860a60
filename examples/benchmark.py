"""Measures speed on synthetic data of the real shapes and prints one JSON line.

    python examples/benchmark.py model=size12M precision=bf16
    python examples/benchmark.py measure=[environment] env=gym env.task=CartPole-v1 counts=[1,4]
    python examples/benchmark.py compare=algorithm      our own Dreamer with its decoder beside R2-Dreamer
    python examples/benchmark.py compare=torchrl        TorchRL's DreamerV3, which has a decoder, beside both of them
    python examples/benchmark.py compare=algorithm algorithm@other=infonce
    python examples/benchmark.py compare=tricks          what each trick of dreamer/fast gains
    python examples/benchmark.py algorithm=dreamerv2    V1 and V2 have sizes of their own, and are timed alone
    torchrun --nproc-per-node 2 examples/benchmark.py measure=[update] batch_size=32    two processes learn together

`update` is one whole update (all losses, backward, clipping, optimiser, target), `acting` one policy step for all
environments, `replay` sampled steps per second, written back. `environment` is frames per second under random actions, for
each number of environments: `collector` through the trainer's collector, `bare` of the simulators inside of them, stepped by
Gymnasium's AsyncVectorEnv. Medians. What is compared takes turns, one update each, in one process; compare ratios only.
Like for like is `torchrl_over_other`, Dreamer beside Dreamer; `torchrl_over_ours` is R2-Dreamer beside a model with a decoder.

Under torchrun `batch_size` is of all ranks. `sent` holds the bytes that a rank hands to each collective in one update, and
`sent_over_gradients` their sum over 4 bytes for each parameter.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import hydra

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
from r2dreamer.examples.training.malloc import keep_memory  # isort: skip

if __name__ == "__main__":
    keep_memory()  # as the trainer does, whose update is timed here

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from r2dreamer.dreamer import ActionSpace, Agent, ObservationSpace
from r2dreamer.dreamer.fast import TRICKS
from r2dreamer.dreamer.fast.capture import CapturedStep
from r2dreamer.envs.replay.buffer import make_replay
from r2dreamer.examples.cli.script import script
from r2dreamer.examples.timing.environments import frames_per_second
from r2dreamer.examples.timing.peers import torchrl_dreamer
from r2dreamer.examples.timing.traffic import traffic
from r2dreamer.examples.training import setup
from r2dreamer.examples.training.devices import resolve_precision
from r2dreamer.examples.training.learner import Learner, parameter_counts
from r2dreamer.examples.training.ranks import Ranks


def synthetic_records(agent: Agent, batch: int, time_steps: int, device: torch.device) -> TensorDict:
    """[B, T] records of random content; no episode begins or ends in them."""
    example = agent.example_record()
    records = example.expand(batch, time_steps).clone()
    for value in records.values(True, True):
        if value.dtype == torch.uint8:
            value.random_(0, 256)
        elif value.is_floating_point():
            value.uniform_(-1, 1)
    latents = {key: torch.zeros(batch, time_steps, size) for key, size in agent.latent_sizes.items()}
    return records.exclude(("next", "state"), ("next", "belief")).update(latents).to(device)


def alternate(
    steps: Sequence[Callable[[], object]],
    device: torch.device,
    warmup: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, float]]:
    """Each step's times, taken in turns: what slows the machine for a while slows all of them."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(warmup + repeats):
        for step, its in zip(steps, times, strict=True):
            start = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            its.append(clock() - start)
    return [
        {"first_s": its[0], "median_s": statistics.median(its[warmup:]), "min_s": min(its[warmup:])} for its in times
    ]


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Of each later update over each earlier one: other over ours, TorchRL's over ours and over the other."""
    names = {"update": "ours", "other_update": "other", "torchrl_update": "torchrl"}
    return {
        f"{names[slower]}_over_{names[faster]}": seconds[slower] / seconds[faster]
        for faster, slower in itertools.combinations(seconds, 2)
    }


def member(
    cfg: DictConfig,
    algorithm: DictConfig,
    device: torch.device,
    precision: torch.dtype,
    ranks: Ranks | None = None,
    fast: bool | Sequence[str] = True,
) -> tuple[Agent, Learner]:
    """A member of the family at the configured size, with the given tricks of ``dreamer.fast``."""
    torch.manual_seed(cfg.seed)
    agent = setup.make_agent(algorithm, {"fast": fast, **cfg.model}, *spaces(cfg))
    for part in agent.parts().values():
        part.to(device)
    return agent, Learner(agent, algorithm, precision, cfg.compile, cfg.capture, ranks)


def measure_tricks(
    cfg: DictConfig, records: TensorDict, device: torch.device, precision: torch.dtype, warmup: int, repeats: int
) -> dict[str, float]:
    """How many times longer an update takes without each trick, in turns; on a CPU by the processor's time."""
    left_out = {"nothing": TRICKS, **{name: [each for each in TRICKS if each != name] for name in TRICKS}, "all": ()}
    learners = [member(cfg, cfg.algorithm, device, precision, fast=list(tricks))[1] for tricks in left_out.values()]
    steps = [partial(learner.update, records) for learner in learners]
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = dict(zip(left_out, alternate(steps, device, warmup, repeats, clock), strict=True))
    update = times.pop("nothing")
    return {"update": update} | {f"without_{name}": its["median_s"] / update["median_s"] for name, its in times.items()}


def measure_replay(cfg: DictConfig, agent: Agent, device: torch.device, repeats: int) -> dict[str, float]:
    streams, per_stream = cfg.env.num_envs, 4 * (cfg.batch_length + 1)
    record = agent.example_record()
    records = record.expand(streams * per_stream).clone()
    records["stream"] = torch.arange(streams).repeat_interleave(per_stream)
    storage, directory = cfg.replay.place.storage, None
    if storage == "memmap":
        Path(cfg.replay.place.directory).mkdir(parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(dir=cfg.replay.place.directory)  # beside what a run has there
    place = {"storage": storage, "directory": directory and directory.name}
    replay = make_replay(streams * per_stream, streams, cfg.batch_size, cfg.batch_length, **place)
    replay.extend(records)
    shape = cfg.batch_size, cfg.batch_length
    latents = [torch.zeros(*shape, size, device=device) for size in agent.latent_sizes.values()]  # as an update's

    def step() -> None:
        replay.write_back(replay.sample(device=device), *latents)

    seconds = alternate([step], device, warmup=3, repeats=repeats)[0]["median_s"]
    if directory:
        directory.cleanup()
    return {"median_s": seconds, "steps_per_s": cfg.batch_size * cfg.batch_length / seconds}


def spaces(cfg: DictConfig) -> tuple[ObservationSpace, ActionSpace]:
    """Of the configured environment, or by default a 64x64 image and 6 actions, which need no simulator."""
    if cfg.synthetic:
        return ObservationSpace({"pixels": (3, 64, 64)}, {}), ActionSpace(6, discrete=False)
    return setup.spaces(hydra.utils.instantiate(cfg.env.make), cfg.timeout)


def benchmark(total: DictConfig, ranks: Ranks | None = None) -> dict:
    """total: with the batch of all ranks."""
    if total.compare and "update" not in total.measure:
        raise ValueError(f"compare={total.compare} compares updates: add update to measure, or leave compare out.")
    if total.compare == "torchrl" and "encoder_multipliers" not in total.model:
        raise ValueError(
            "compare=torchrl gives TorchRL's DreamerV3 the networks of ours, and those of this algorithm are none of "
            "DreamerV3's. Take another algorithm, such as algorithm=r2dreamer."
        )
    result = {} if set(total.measure) == {"environment"} else measure_agent(total, ranks or Ranks(total.device))
    if "environment" in total.measure:
        result |= {"env": total.env.suite, "task": total.env.task, "collect_steps": total.collect_steps}
        rates = {count: frames_per_second(total, count) for count in total.counts}
        result["environment"] = {
            count: {name: float(f"{value:.3g}") for name, value in each.items()} for count, each in rates.items()
        }
    return result


def measure_agent(total: DictConfig, ranks: Ranks) -> dict:
    """Update, acting and replay, as far as they are asked for; total has the batch of all ranks."""
    cfg, device = ranks.own(total), ranks.device
    precision = resolve_precision(cfg.precision, device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    setup.check_fits(cfg, *spaces(cfg), device, precision)
    agent, learner = member(cfg, cfg.algorithm, device, precision, ranks)
    repeats = cfg.repeats or (5 if device.type == "cpu" else 50)
    warmup = 2 if device.type == "cpu" else 20
    result = {
        "implementation": "r2dreamer",
        "device": str(device),
        "precision": str(precision).removeprefix("torch."),
        "compile": cfg.compile,
        "captured": isinstance(learner.gradients, CapturedStep),
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter_counts(agent, learner).values()),
        "B": total.batch_size,
        "T": cfg.batch_length,
    }
    if "update" in cfg.measure:
        records = synthetic_records(agent, cfg.batch_size, cfg.batch_length, device)
        steps = {"update": lambda: learner.update(records)}
        if ranks.count > 1:
            with traffic() as sent:  # before anything is captured
                learner.update(records)
            over = sum(sent.values()) / (4 * result["parameters"])
            result |= {"ranks": ranks.count, "sent": dict(sent), "sent_over_gradients": over}
        if cfg.compare == "tricks":
            result |= measure_tricks(cfg, records, device, precision, warmup, repeats)
            steps = {}
        elif cfg.compare:
            other, peer = member(cfg, cfg.other, device, precision, ranks)
            result["other"] = cfg.other.representation._target_.removesuffix(".of").rpartition(".")[2]
            result["other_parameters"] = sum(parameter_counts(other, peer).values())
            steps["other_update"] = lambda: peer.update(records)
        if cfg.compare == "torchrl":
            update, parameters = torchrl_dreamer(agent, cfg.model, cfg.algorithm, precision, device, result["captured"])
            result["torchrl_parameters"] = parameters
            steps["torchrl_update"] = lambda: update(records)
        if steps:
            result |= dict(zip(steps, alternate(list(steps.values()), device, warmup, repeats), strict=True))
            result |= ratios({name: result[name]["median_s"] for name in steps})
    if "acting" in cfg.measure:
        seen = [*agent.observations.images, *agent.observations.vectors, *agent.latent_sizes]
        root = agent.example_record()["next"].select(*seen).expand(cfg.env.num_envs).clone().to(device)
        root["is_init"] = torch.zeros(len(root), 1, dtype=torch.bool, device=device)
        root["action"] = torch.zeros(len(root), agent.actions.size, device=device)
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            (result["acting"],) = alternate([lambda: agent.policy(root)], device, 3, 4 * repeats)
    if "replay" in cfg.measure:
        result["replay"] = measure_replay(cfg, agent, device, 4 * repeats)
    return result


@script("benchmark")
def main(cfg: DictConfig) -> None:
    with Ranks.launched(cfg) as ranks:
        print(json.dumps(benchmark(cfg, ranks)))


if __name__ == "__main__":
    # `--compare torchrl` reads as it does elsewhere; for hydra it is an override like any other.
    sys.argv = shlex.split(re.sub(r"--compare[ =]", "compare=", shlex.join(sys.argv)))
    main()

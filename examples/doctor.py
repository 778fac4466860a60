"""Says what works on this machine, and how to mend what does not; exit status 1 if anything does not.

python examples/doctor.py
python examples/doctor.py env=dmc_vision env.task=walker_walk
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch

try:
    import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
except ImportError as error:
    if "MUJOCO_GL" not in os.environ:
        raise
    # To be reported; the rest is examined by a new process, without that renderer.
    os.environ["DOCTOR_FOUND"] = str(error)
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        os.environ.pop(name, None)
    os.execv(sys.executable, [sys.executable, "-m", "r2dreamer.examples.doctor", *sys.argv[1:]])

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from r2dreamer.envs import env_seeds, make_vector_env
from r2dreamer.envs.replay.place import check_memory, free_bytes, record_bytes
from r2dreamer.envs.suites.registry import suites
from r2dreamer.examples.cli.machine import opengl, packages, private_bytes, processor
from r2dreamer.examples.cli.messages import USER_ERRORS, what_is_wrong
from r2dreamer.examples.cli.script import script
from r2dreamer.examples.settings.compose import configuration
from r2dreamer.examples.training.devices import resolve_device, resolve_precision
from r2dreamer.examples.training.setup import check_fits, make_agent, spaces


class Report:
    """Prints what is found as it is found, and remembers what is wrong."""

    def __init__(self):
        self.problems: list[str] = []

    def line(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.line(f"PROBLEM: {text}")


def measure(cfg: DictConfig, count: int) -> tuple[float, int]:
    """Frames/s of `count` environments under random actions, each in a worker, and the bytes that one of them takes.

    One that dies or hangs is an error here.
    """
    factory = hydra.utils.instantiate(cfg.env.make)
    seeds = env_seeds(cfg.seed, count, "eval")
    with closing(make_vector_env(factory, seeds, parallel=True, timeout=cfg.timeout)) as environments:
        root = environments.reset()
        for step in range(cfg.steps + 3):
            if step == 3:
                start = time.perf_counter()
            _, root = environments.step_and_maybe_reset(root.update(environments.rand_action(root)))
        seconds = time.perf_counter() - start
        return cfg.steps * count * cfg.env.action_repeat / seconds, private_bytes(environments.pool.pids()) // count


def examine(cfg: DictConfig, report: Report, thorough: bool) -> None:
    """Builds the configured environment, holds it to the contract, and measures it."""
    name = f"env={cfg.env.suite} env.task={cfg.env.task}"
    try:
        single, alone = measure(cfg, 1)
        report.line(f"{name}: {single:.0f} frames/s, {1000 * cfg.env.action_repeat / single:.2f} ms a step")
        if not thorough:
            return
        observations, actions = spaces(hydra.utils.instantiate(cfg.env.make), cfg.timeout)
        report.line(f"images {observations.images}, vectors {observations.vectors}, {actions}")
        wanted, free = alone * (cfg.env.num_envs + cfg.eval.episodes), free_bytes("cpu")[0]
        if wanted > free:
            report.problem(
                f"{cfg.env.num_envs} environments and {cfg.eval.episodes} to evaluate in take {wanted / 1e9:.3g} GB of memory, "
                f"and {free / 1e9:.3g} GB are free: use fewer, env.num_envs=N env.eval_episodes=M."
            )
        else:
            count = max(4, cfg.env.num_envs)
            together, each = measure(cfg, count)
            report.line(f"{count} of them in parallel: {together:.0f} frames/s, {each / 1e6:.0f} MB each")
        device = resolve_device(cfg.device)
        precision = resolve_precision(cfg.precision, device)
        report.line(f"update: {check_fits(cfg, observations, actions, device, precision)}")
        agent = make_agent(cfg.algorithm, cfg.model, observations, actions)
        size = record_bytes(agent.example_record(), latent_keys=agent.latent_sizes)
        saved_in = cfg.logdir if cfg.checkpoint.replay else None
        report.line(f"replay: {check_memory(size, cfg.replay.capacity, **cfg.replay.place, saved_in=saved_in)}")
    except (*USER_ERRORS, HydraException) as error:
        report.problem(what_is_wrong(error))


@script("doctor")
def main(cfg: DictConfig) -> None:
    report = Report()
    overrides = HydraConfig.get().overrides.task
    asked = any(override.startswith(("env=", "env.", "experiment=")) for override in overrides)

    print("Machine")
    for line in processor():
        report.line(line)
    if "DOCTOR_FOUND" in os.environ:
        report.problem(os.environ["DOCTOR_FOUND"])
    print("Packages")
    lines, problems = packages()
    for line in lines:
        report.line(line)
    for problem in problems:
        report.problem(problem)

    known = suites()
    names = [cfg.env.suite] if asked else [name for name, suite in known.items() if suite.module]
    installed = {name: known[name].installed for name in names if name in known}
    if any(installed.get(name) and known[name].renders for name in names):
        print("Renderer of MuJoCo")
        line, problem = opengl(cfg.timeout)
        report.line(line)
        if problem:
            report.problem(problem)

    print("Environments")
    for name in names:
        if not installed.get(name, True):
            remedy = f'pip install "torchrl-r2dreamer[{known[name].extra}]"'
            if asked:
                report.problem(f"{name} is not installed: {remedy}")
            else:
                report.line(f"{name}: not installed ({remedy})")
        elif asked:
            examine(cfg, report, thorough=True)
        else:
            examine(configuration(f"env={name}", *overrides, name="doctor"), report, thorough=False)

    print(f"{len(report.problems)} problems" if report.problems else "Everything that is installed works.")
    for problem in report.problems:
        print(f"* {problem}")
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()

"""Trainings of a grid as jobs of a cluster: the settings are those of hydra's submitit launchers.

Hydra's own launcher stops waiting at the first lost job, and resubmits a preempted one without a word to its training.
Here submitit is used directly: a preempted training saves before its job is requeued.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from ..cli.children import PARENT
from .run import Run
from .slurm import comes_back, make_watcher

CHOICE = "hydra/launcher"
OPTIONS = ("hydra.launcher.", "hydra.sweep.")
LAUNCHERS = ("submitit_slurm", "submitit_local")
POLL = 2.0  # seconds between two looks at the jobs
EXTRA = "pip install 'torchrl-r2dreamer[cluster]'"


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is of the trainings, and what says where they run: ``hydra/launcher=...`` and its options."""
    where = [each for each in arguments if each.lstrip("+").startswith((f"{CHOICE}=", *OPTIONS))]
    if where and not any(each.startswith(f"{CHOICE}=") for each in where):
        raise ValueError(f"{where[0]} is an option of a launcher: add {CHOICE}={LAUNCHERS[0]}, or leave it out.")
    return [each for each in arguments if each not in where], where


@dataclass
class Training:
    """What a job does. Submitit calls `checkpoint` when the job is about to be preempted or to reach its time limit."""

    run: Run
    command: tuple[str, ...]
    child: int | None = None  # its process

    def __call__(self) -> bool:
        """Whether the run has finished. One that another process trains is left alone."""
        if self.run.finished or self.run.running:
            return self.run.finished
        self.run.logdir.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, PARENT: str(os.getpid())}
        child: subprocess.Popen | None = None
        signals: list[int] = []

        def pass_on(number: int, _: object) -> None:
            signals.append(number)
            if child is not None:
                child.send_signal(number)

        with open(self.run.logdir / "output.txt", "a") as output:
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
            # Of scancel, a requeue, or a preemption without a warning: the training saves and leaves.
            before = signal.signal(signal.SIGTERM, pass_on)
            try:
                child = subprocess.Popen(
                    self.command, env=environment, start_new_session=True, preexec_fn=_ignore_warnings, **streams
                )
                self.child = child.pid
                if signals:  # it came before there was a process to pass it on to
                    child.send_signal(signals[0])
                child.wait()
                self.child = None
                # Slurm sends it several times, to all processes of the job.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                if not self.run.finished and comes_back():
                    sys.exit("The run is cut off; its job comes back.")  # without a result: the job has not ended
            finally:
                signal.signal(signal.SIGTERM, before)
        return self.run.finished

    def checkpoint(self) -> Any:
        """Called from a signal handler, in the middle of `wait`: the training saves and leaves, and the job comes back."""
        import submitit

        if self.child is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended
                os.kill(self.child, signal.SIGTERM)
                os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOWAIT)
        # Slurm requeues with it, and submitit's scontrol has to survive that.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return submitit.helpers.DelayedSubmission(Training(self.run, self.command))


def _ignore_warnings() -> None:
    """Slurm may warn every process of a job; of a training that would be the end."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def make_executor(where: Sequence[str]) -> Any:
    """Submitit's executor with the options of a launcher."""
    try:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    except ImportError as error:
        raise ValueError(f"Jobs on a cluster need the extra `cluster`: {EXTRA}.") from error
    default = ["hydra.job.name=r2dreamer", "hydra.sweep.dir=runs/cluster"]  # where submitit's own files go
    with hydra.initialize_config_module("r2dreamer.configs", version_base=None):
        cfg: Any = hydra.compose("config", [*default, *where], return_hydra_config=True).hydra
    choice = cfg.runtime.choices[CHOICE]
    if choice not in LAUNCHERS:
        raise ValueError(f"{CHOICE}={choice} is not one of {', '.join(LAUNCHERS)}; --jobs N runs N on this machine.")
    launcher: Any = OmegaConf.to_container(cfg.launcher, resolve=True)
    options = {key: value for key, value in launcher.items() if value is not None}
    if options["nodes"] * options["tasks_per_node"] > 1:
        raise ValueError("A run is one process: leave hydra.launcher.nodes and hydra.launcher.tasks_per_node at 1.")
    cluster = choice.removeprefix("submitit_")
    shared = {field.name for field in fields(BaseQueueConf)}
    named = {key if key in shared else f"{cluster}_{key}": value for key, value in options.items() if key != "_target_"}
    at_start = {key: named.pop(key) for key in [f"{cluster}_max_num_timeout"] if key in named}
    try:
        executor = submitit.AutoExecutor(named.pop("submitit_folder"), cluster=cluster, **at_start)
    except RuntimeError as error:
        raise ValueError(f"{CHOICE}={choice} cannot submit jobs from here: {error}") from error
    executor.update_parameters(**named)
    return executor


def submit(runs: Sequence[Run], script: Path, executor: Any) -> Iterator[tuple[Run, bool]]:
    """Every run once its job has ended, and whether it has finished. Jobs outlive this process."""
    from submitit.helpers import as_completed
    from submitit.slurm.slurm import SlurmJob

    SlurmJob.watcher = make_watcher()
    command = (sys.executable, str(script.resolve()))
    jobs = executor.submit_array([Training(run, (*command, *run.overrides, "progress=false")) for run in runs])
    print(f"Submitted {', '.join(job.job_id for job in jobs)}; submitit's files are in {executor.folder}.", flush=True)
    runs_of = dict(zip(jobs, runs, strict=True))
    for job in as_completed(jobs, poll_frequency=POLL):
        error = job.exception()
        if error is not None:
            said = str(error).partition("You can check full logs")[0].rstrip("-\n ")  # submitit's, after the traceback
            print(f"Job {job.job_id}: {said.splitlines()[-1]}", file=sys.stderr)
        yield runs_of[job], runs_of[job].finished

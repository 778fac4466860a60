"""What Slurm says of jobs: whether one comes back, and which have ended. Needs submitit."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any


def make_watcher() -> Any:
    """Tells submitit which jobs have ended, from squeue.

    Submitit's own watcher asks sacct. That fails without accounting, and the wait for a killed job would not end.
    """
    from submitit.slurm.slurm import SlurmInfoWatcher

    class Queue(SlurmInfoWatcher):
        def _make_command(self) -> list[str] | None:
            command = ["squeue", f"--user={os.getuid()}", "--array", "--noheader", "--format=%i"]
            return command if self._registered - self._finished else None

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            listed = set((string if isinstance(string, str) else string.decode()).split())
            return {job: {"State": "RUNNING" if job in listed else "ENDED"} for job in self._registered}

    return Queue()


def comes_back() -> bool:
    """Whether Slurm starts this job again: it has requeued the job, or preempts it and is asked here to requeue it.

    A job that leaves within the grace time of its preemption has to ask: to Slurm it has completed.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return False
    import submitit

    job = submitit.JobEnvironment().job_id
    shown = dict(re.findall(r"(\w+)=(\S+)", _scontrol("show", "job", "--oneliner", job) or ""))
    if int(shown.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        return True
    preempted = shown.get("PreemptTime", "None") != "None"  # scancel sends SIGTERM, too, and leaves no such time
    return preempted and _scontrol("requeue", job) is not None


def _scontrol(*arguments: str) -> str | None:
    """What it says; None if it fails. It gets the signals of the job, too: whoever calls this ignores SIGTERM."""
    try:
        return subprocess.run(
            ["scontrol", *arguments], check=True, stdout=subprocess.PIPE, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None

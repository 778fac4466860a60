"""One training of a grid, and how it stands. A job of a cluster imports this: no torch."""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path

from .files import own_directories


@dataclass(frozen=True)
class Run:
    """One training: its overrides, and what they make of name, directory, length and task."""

    overrides: tuple[str, ...]
    name: str
    logdir: Path
    total_frames: int
    task: str = ""
    bar: float | None = None  # the score that a plan asks for

    @property
    def suite(self) -> str:
        return self.task.partition("-")[0]

    @property
    def variant(self) -> str:
        """The name without its task: what has the same variant and task are the seeds of one thing."""
        return "default" if self.name == self.task else self.name.removeprefix(f"{self.task}-")

    @property
    def saved(self) -> int:
        """The frames of its newest checkpoint."""
        steps = [int(path.name.split("_")[1]) for path in own_directories(self.logdir / "checkpoints")]
        return max(steps, default=0)

    @property
    def finished(self) -> bool:
        """Whether a checkpoint of its last frame is there, and the evaluation that belongs to it; else it is resumed."""
        return self.saved >= self.total_frames and self._evaluated()

    def _evaluated(self) -> bool:
        try:
            with open(self.logdir / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, 2) - 2**18))
                ends = [line for line in file.read().splitlines() if b'"eval/return"' in line]
        except FileNotFoundError:
            return True  # nothing says that it is not
        try:
            return bool(ends) and json.loads(ends[-1])["step"] >= self.total_frames
        except (ValueError, KeyError, TypeError):
            return True  # damaged: said where it is read

    @property
    def running(self) -> bool:
        """Whether a process trains it: that one holds the directory's lock."""
        try:
            with open(self.logdir / ".lock") as lock:  # for reading: NFS gives that the shared kind alone
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

"""What a run says about itself: averages over an interval, `metrics.jsonl`, and the loggers beside it.

`metrics.jsonl` is the record; TensorBoard and W&B are views of it. One JSON object a line, `"step"` in environment
frames. What depends on the machine's speed is named `speed/*` or `time/*`, all else repeats from seed to seed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .files import REMEDY, explained, replace_text, require_room, warn, warn_once
from .video import encode_gif


class Averages:
    """Means of scalar tensors over an interval. Adding never waits for the device: one concatenation and one sum."""

    def __init__(self):
        self._groups: dict[tuple[str, ...], list] = {}  # entry names -> [sums [names], how many were added]

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """values: a dict or TensorDict of one-element tensors (or numbers); each call counts once for its entries."""
        names = tuple(values.keys())
        if not names:
            return
        with torch.no_grad():
            # float64: the mean of a long interval is as good as that of a short one.
            stacked = torch.cat([torch.as_tensor(values[name]).reshape(1) for name in names]).double()
        if names not in self._groups:
            self._groups[names] = [stacked, 1]
            return
        sums, count = self._groups[names]
        self._groups[names] = [sums.to(stacked.device) + stacked, count + 1]

    def pop(self) -> dict[str, float]:
        """The mean of every entry since the last pop."""
        totals: dict[str, list] = {}
        for names, sums, count in self.state_dict():
            for name, value in zip(names, sums, strict=True):
                total = totals.setdefault(name, [0.0, 0])
                total[0] += value
                total[1] += count
        self._groups = {}
        return {name: total / count for name, (total, count) in totals.items()}

    def check_finite(self, step: int, updates: int) -> None:
        """Names the first entry that was NaN or Inf since the last pop. A sum keeps either, so one look does."""
        for names, sums, _ in self.state_dict():
            for name, value in zip(names, sums, strict=True):
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is NaN or Inf at frame {step:,}, update {updates:,}.")

    def state_dict(self) -> list:
        """Plain lists and numbers, for a checkpoint in mid-interval."""
        return [[list(names), sums.tolist(), count] for names, (sums, count) in self._groups.items()]

    def load_state_dict(self, state: list) -> None:
        self._groups = {tuple(names): [torch.tensor(sums, dtype=torch.float64), count] for names, sums, count in state}


def progress(before: Mapping[str, float], now: Mapping[str, float], action_repeat: int) -> dict[str, float]:
    """Counts now, and speeds since `before`; both hold the trainer's counters, the time, and how long it waited."""
    passed = {name: now[name] - before[name] for name in now}
    return {
        "count/policy_steps": now["policy_steps"],
        "count/updates": now["updates"],
        "count/train_ratio": now["replayed_steps"] / now["policy_steps"],
        "speed/fps": passed["policy_steps"] * action_repeat / passed["time"],
        "speed/updates_per_second": passed["updates"] / passed["time"],
        "speed/waiting": passed["waited"] / passed["time"],  # share of the time that collecting kept the learner
    }


def rename_loss(name: str) -> str:
    """The losses' own names, as a run reports them."""
    return f"loss/{name.removeprefix('loss_')}" if name.startswith("loss_") else f"train/{name}"


class MetricsWriter:
    """Appends lines to `<logdir>/metrics.jsonl` and hands the same numbers to the loggers.

    A line is one `write` to a file opened for appending: a killed process leaves whole lines. A line for which the disk
    has no room waits, and is tried again with the next one, or with the checkpoint, which keeps it. A checkpoint keeps
    `position()`; given back as `resume_position`, what was logged after it is moved to `metrics.superseded.jsonl`,
    because the resumed run does those steps again. None is a new run: all that is there is moved.
    """

    def __init__(self, logdir: str | os.PathLike, loggers=(), resume_position: Mapping | None = None):
        self.path = Path(logdir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        position: Mapping[str, Any] = resume_position or {"bytes": 0, "lines": 0, "step": -1}
        with explained(self.path):
            lost = cut_after(self.path, position["bytes"])
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lines, self._step = position["lines"], position["step"]
        self._waiting = [line.encode() for line in position.get("waiting", ())]
        self._failed = set()
        if lost:
            print(f"{self.path} lacks {lost:,} bytes that it had at the checkpoint: it was cut or edited since.")
            self._lines = self.path.read_bytes().count(b"\n")
        self._write_waiting()
        self.loggers = list(loggers)
        for logger in self.loggers:
            with explained(getattr(logger, "directory", logdir)):
                logger.start(self._step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: _plain(value) for name, value in values.items()}
        self._waiting.append(json.dumps({"step": int(step), **numbers}, allow_nan=False).encode() + b"\n")
        self._step = int(step)
        self._write_waiting()
        self._to_loggers("scalars", step, {name: value for name, value in numbers.items() if value is not None})

    def _write_waiting(self) -> None:
        """Writes the lines that wait, oldest first, until the disk has no room for one."""
        while self._waiting:
            line, end = self._waiting[0], os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.ftruncate(self._file, end)  # a full disk takes part of a line
                warn_once(
                    f"{self.path} cannot be written: {error.strerror}. Training goes on, and lines wait. {REMEDY}"
                )
                return
            self._waiting.pop(0)
            self._lines += 1

    def _to_loggers(self, what: str, *arguments) -> None:
        """A logger that cannot write lacks lines, is opened anew when there is room, and ends no run."""
        for logger in self.loggers:
            try:
                if logger in self._failed:
                    if self._waiting:
                        continue
                    getattr(logger, "reopen", lambda step: None)(self._step)
                    self._failed.discard(logger)
                getattr(logger, what)(*arguments)
            except OSError as error:
                self._failed.add(logger)
                where = getattr(logger, "directory", type(logger).__name__)
                warn_once(f"{where} cannot be written ({error}) and lacks lines, which {self.path} has. {REMEDY}")

    def video(self, step: int, name: str, frames, fps: int) -> None:
        """frames: uint8 [T, H, W, 3]."""
        self._to_loggers("video", step, name, frames, fps)

    def position(self) -> dict:
        """Where the file ends now, for a checkpoint. All of it is on disk before the checkpoint is."""
        self._write_waiting()
        os.fsync(self._file)
        self._to_loggers("flush")
        position = {"bytes": os.fstat(self._file).st_size, "lines": self._lines, "step": self._step}
        return position | ({"waiting": [line.decode() for line in self._waiting]} if self._waiting else {})

    def close(self) -> None:
        self._write_waiting()
        self._to_loggers("close")
        os.close(self._file)
        if self._waiting:
            warn(f"{len(self._waiting)} lines were not written to {self.path}. {REMEDY}")


def cut_after(path: Path, end: int) -> int:
    """Moves the lines after byte `end` to `metrics.superseded.jsonl`. Returns how many bytes before `end` were missing.

    Killed anywhere inside, it does the same again: the copy is complete before the file is cut, and is not repeated.
    """
    if not path.exists():
        return end
    content = path.read_bytes()
    start = content.rfind(b"\n", 0, end) + 1  # before `end` where the file was cut or edited: whole lines are kept
    tail = content[start : content.rfind(b"\n") + 1]  # a line cut short by a crash says nothing
    if tail:
        _append_once(path.with_name("metrics.superseded.jsonl"), tail)
    with open(path, "r+b") as file:
        file.truncate(start)
        os.fsync(file.fileno())
    return end - start


def _append_once(path: Path, tail: bytes) -> None:
    before = path.read_bytes() if path.exists() else b""
    if before.endswith(tail):
        return
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(before + tail)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _plain(value):
    """A JSON number; null for NaN and Inf, which JSON cannot say."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(logdir: str | os.PathLike, *, timings: bool = True, containing: str = "") -> Iterator[dict]:
    """The lines of a run, also of one still running; lines that cannot be read are named on stderr and skipped.

    timings=False leaves out what differs between equal runs.

    Args:
        containing: only lines in which this text occurs; skipping the others before parsing makes a long file quick.
    """
    path, wanted, unreadable = Path(logdir) / "metrics.jsonl", containing.encode(), []
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                continue
            if wanted in text or not text.startswith(b"{"):
                try:
                    line = json.loads(text)
                    if type(line["step"]) not in (int, float):
                        raise TypeError
                except (ValueError, KeyError, TypeError, RecursionError):
                    unreadable.append(number)
                    continue
                yield {k: v for k, v in line.items() if timings or not k.startswith(("speed/", "time/"))}
            elif not text.isascii():  # the writer escapes all else
                unreadable.append(number)
    if unreadable:
        shown = ", ".join(map(str, unreadable[:5])) + (" ..." if len(unreadable) > 5 else "")
        warn_once(f"{path}: what cannot be read is skipped, {len(unreadable)} in all: line {shown}.")


class TensorBoardLogger:
    """Event files in `<logdir>/tensorboard`. A resumed run hides what was logged after its checkpoint."""

    def __init__(self, logdir: str | os.PathLike):
        self.directory = Path(logdir) / "tensorboard"

    def start(self, step: int) -> None:
        """Opens the run, which has reached `step`; -1 is a new run."""
        # torchrl.record's TensorboardLogger cannot pass purge_step on.
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.directory), purge_step=step + 1)

    def reopen(self, step: int) -> None:
        """After a failed write, which ends the writer's thread."""
        require_room(self.directory)
        with contextlib.suppress(OSError):
            self.writer.close()
        self.start(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        require_room(self.directory)  # the writer's thread would end with a traceback
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, frames, fps: int) -> None:
        # add_video wants moviepy; a GIF is what it would store, and TensorBoard's own dependency Pillow makes one.
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] - generated

        gif = encode_gif(frames, fps)
        if gif is not None:
            length, height, width, channels = frames.shape
            image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=gif)
            assert self.writer.file_writer is not None  # until it is closed
            self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """A W&B run, continued under the same id when the training is resumed.

    What W&B was sent cannot be taken back, so steps that a resumed run repeats are not sent a second time. W&B writes
    every 15 seconds: after a kill those at its end are in `metrics.jsonl` only.

    Args:
        mode: "online", "offline" (needs no network; `wandb sync` sends it later), "disabled", or None for WANDB_MODE.
    """

    def __init__(self, logdir: str | os.PathLike, project: str = "r2dreamer", mode: str | None = None, **init):
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an extra
        except ImportError as error:
            raise ImportError('logger=wandb needs W&B: pip install "torchrl-r2dreamer[wandb]"') from error
        self.wandb, self.directory = wandb, Path(logdir)
        self.init = {"project": project, "mode": mode, "dir": str(logdir), **init}
        self.state_file = self.directory / "wandb_run.json"

    def start(self, step: int) -> None:
        """Opens the run, which has reached `step`; -1 is a new run."""
        state = {}
        if step >= 0 and self.state_file.exists():
            state = json.loads(self.state_file.read_text())
        self.run_id = state.get("id") or uuid.uuid4().hex[:8]
        self.sent = state.get("step", -1)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.run = self.wandb.init(id=self.run_id, resume="allow", **self.init)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if step > self.sent:
            self.run.log(dict(values), step=step)
            replace_text(self.state_file, json.dumps({"id": self.run_id, "step": step}))

    def video(self, step: int, name: str, frames, fps: int) -> None:
        gif = encode_gif(frames, fps)
        if gif is not None:
            self.scalars(step, {name: self.wandb.Video(io.BytesIO(gif), format="gif")})

    def flush(self) -> None:
        """W&B has no way to ask for it."""

    def close(self) -> None:
        self.run.finish()

"""Where the records of a replay lie: how much room they take there, how much is free, and whose files they are."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from ..base.errors import require_linux

_LOCKS: WeakValueDictionary[Path, Any] = WeakValueDictionary()  # held by the replays of this process


def record_bytes(
    example_record: TensorDictBase,
    latent_keys: Iterable[NestedKey] = ("state", "belief"),
    latent_dtype: torch.dtype = torch.float16,
) -> int:
    """Bytes that one record takes in the replay, given one record ``[]`` or a batch of them ``[M]``."""
    latents = {unravel_key(("next", key)) for key in latent_keys}
    return sum(
        value.numel() // example_record.numel() * (latent_dtype.itemsize if key in latents else value.element_size())
        for key, value in example_record.exclude("stream", "index").items(True, True)
    )


def check_memory(
    bytes_per_record: int,
    capacity: int,
    storage: str = "cpu",
    directory: str | os.PathLike | None = None,
    *,
    saved_in: str | os.PathLike | None = None,
) -> str:
    """One line that says what a replay takes and what is free; raises MemoryError if it does not fit.

    saved_in: where checkpoints keep a copy of it, which takes up to twice as much again; a line warns if that may not fit.
    """
    free, where = free_bytes(storage, directory)
    if folder := folder_of(storage, directory):  # what an earlier run wrote there is written over
        free += sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    total = bytes_per_record * capacity
    line = (
        f"{_readable(bytes_per_record)} a record x {capacity} records = {_readable(total)} on {where}; "
        f"{_readable(free)} free"
    )
    if total > free:
        other = "storage=memmap on a larger disk" if storage == "memmap" else "storage=memmap (files on a disk)"
        raise MemoryError(
            f"the replay does not fit: {line}. Use a smaller replay.capacity (at most {free // bytes_per_record} fit "
            f"now), {other}, or smaller images."
        )
    if saved_in is not None:
        disk, path = free_bytes("memmap", saved_in)
        needed = 2 * total
        if folder and _existing(folder).stat().st_dev == _existing(saved_in).stat().st_dev:
            needed, disk = 3 * total, free
        if needed > disk:
            line += (
                f". WARNING: with its checkpoints it grows to {_readable(needed)} on {path}, where {_readable(disk)} are "
                "free; checkpoint.replay=false leaves it out of them"
            )
    return line


def folder_of(storage: str, directory: str | os.PathLike | None) -> Path | None:
    """Where the files of ``"memmap"`` are; None for memory."""
    if storage != "memmap":
        if storage != "cpu" and not storage.startswith("cuda"):
            raise ValueError(f"replay: storage must be 'cpu', 'cuda' or 'memmap', got {storage!r}.")
        return None
    if directory is None:
        raise ValueError("replay: storage='memmap' needs a directory for its files.")
    return Path(directory)


def locked(folder: Path) -> Any:
    """The lock of a folder of files, to be held: two processes there would write into each other's records."""
    try:
        import fcntl  # noqa: PLC0415
    except ImportError:  # not on this system
        return None
    folder.mkdir(parents=True, exist_ok=True)
    if (lock := _LOCKS.get(folder.resolve())) is not None:  # a replay that takes the place of one of this process
        return lock
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"Another process has the files of its replay in {folder}, and two would overwrite each other's records. Give each a "
            "directory of its own (replay.place.directory=PATH)."
        ) from error
    except OSError:  # a file system without locks
        return None
    _LOCKS[folder.resolve()] = lock
    return lock


def _existing(path: str | os.PathLike) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(storage: str, directory: str | os.PathLike | None = None) -> tuple[int, str]:
    """How much room is left there, and what the place is called."""
    if folder := folder_of(storage, directory):
        path = _existing(folder)
        return shutil.disk_usage(path).free, f"disk ({path})"
    if torch.device(storage).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(storage))[0], storage
    require_linux("Asking how much memory is free", "Plan it with record_bytes(), or use storage='memmap'.")
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit, where it has one
    if limit.exists() and (value := limit.read_text().strip()).isdigit():
        stats = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(stats["inactive_file"])
        available = min(available, int(value) - used)
    return available, "cpu"


def _readable(size: int) -> str:
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"

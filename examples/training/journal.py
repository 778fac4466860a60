"""The replay on disk, as a journal: what a save costs grows with what changed, not with the size of the replay.

Each save appends up to two segment files: the records written since the last one, and the latents written back since
then to older records. Reading the segments in order restores every slot, bit for bit. A slot *lives* in the last
segment that has it; a segment of which less than half lives is rewritten into the next one, so the journal takes at
most about twice the replay's own bytes, at a constant factor of writing.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torchrl.checkpoint import CheckpointError

from r2dreamer.envs.replay.buffer import RecordReplay

OWN_NAME = re.compile(r"\d{8,}-(records|latents)\.bin")
CHUNK = 1024  # records gathered and written at a time


class CheckedFile:
    """A file being written, with its running size and checksum; on the disk when the context ends."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("wb")
        self.size = self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self) -> "CheckedFile":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self.file.close()


def check_file(path: Path, size: int, crc32: int) -> None:
    """Raises CheckpointError unless the file is as it was written."""
    try:
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {size}: truncated")
        found = 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                found = zlib.crc32(block, found)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if found != crc32:
        raise CheckpointError(f"{path} is corrupted: its checksum is {found:08x} instead of {crc32:08x}")


@dataclass(frozen=True)
class Segment:
    """One file of the journal; serial numbers say in which order they apply."""

    serial: int
    kind: str  # "records" or "latents"
    count: int
    size: int
    crc32: int

    @property
    def name(self) -> str:
        return f"{self.serial:08d}-{self.kind}.bin"


class Journal:
    """Segments of one replay in a directory. `append` writes, `commit` makes the new segments count."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.segments: list[Segment] = []  # those that restore the replay as of the last commit
        self._replay: RecordReplay | None = None
        self._times_cleared = -1
        self._owners: dict[str, torch.Tensor] = {}  # per kind and slot, the serial of the segment it lives in

    def append(self, replay: RecordReplay) -> list[Segment]:
        """Writes what changed since the last commit and returns all segments that a reader needs from now on."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._continues(replay):
            self._forget(replay)
            lengths = replay.stream_lengths.unsqueeze(1)
            records = (torch.arange(replay.rings.length) < lengths).flatten()
        else:
            records = replay.changed_records.clone()
        kept = self._compact("records", records, records)
        latents = replay.changed_latents & ~records  # a record written anew brings its latents along
        kept += self._compact("latents", latents, records | latents)
        serial = self._next_serial()
        for kind, mask in (("records", records), ("latents", latents)):
            if mask.any():
                kept.append(self._write(replay, serial, kind, mask.nonzero().squeeze(-1)))
                serial += 1
        self._pending = (records, latents)
        return sorted(kept, key=lambda segment: segment.serial)

    def _compact(self, kind: str, changed: torch.Tensor, superseded: torch.Tensor) -> list[Segment]:
        """Adds what still lives in sparse segments to `changed`; returns the segments that stay."""
        owner = self._owners[kind]
        serials, counts = owner[(owner >= 0) & ~superseded].unique(return_counts=True)
        living = dict(zip(serials.tolist(), counts.tolist(), strict=True))
        segments = [segment for segment in self.segments if segment.kind == kind]
        sparse = [segment.serial for segment in segments if 0 < 2 * living.get(segment.serial, 0) < segment.count]
        if sparse:
            changed |= torch.isin(owner, torch.tensor(sparse)) & ~superseded
        return [segment for segment in segments if 2 * living.get(segment.serial, 0) >= segment.count]

    def _write(self, replay: RecordReplay, serial: int, kind: str, slots: torch.Tensor) -> Segment:
        stored = replay.stored
        keys = list(stored.keys(True, True)) if kind == "records" else replay.latents_in(stored)
        leaves = {key: stored[key] for key in keys}
        header = {
            "count": len(slots),
            "entries": [
                [key if isinstance(key, str) else list(key), str(leaf.dtype), list(leaf.shape[1:])]
                for key, leaf in leaves.items()
            ],
        }
        path = self.directory / Segment(serial, kind, 0, 0, 0).name
        with CheckedFile(path) as file:
            file.write(json.dumps(header).encode() + b"\n")
            file.write(_raw(slots))
            for chunk in slots.split(CHUNK):
                data = replay.read_slots(chunk, keys)
                for key in keys:
                    file.write(_raw(data[key]))
        return Segment(serial, kind, len(slots), file.size, file.crc32)

    def commit(self, replay: RecordReplay, segments: list[Segment]) -> None:
        """The segments that `append` returned are safe on the disk: changes before it need not be saved again."""
        new = {segment.kind: segment.serial for segment in segments if segment not in self.segments}
        records, latents = self._pending
        self._owners["latents"][records] = -1
        if "records" in new:
            self._owners["records"][records] = new["records"]
        if "latents" in new:
            self._owners["latents"][latents] = new["latents"]
        self.segments = segments
        replay.clear_changes()
        self._replay, self._times_cleared = replay, replay.times_cleared

    def restore(self, replay: RecordReplay, segments: Iterable[Segment], rings: dict[str, Any]) -> None:
        """Fills a replay from segments, and continues them; where it cannot, the replay is left empty."""
        before = replay.writer.state_dict()
        try:
            self._fill(replay, list(segments), rings)
        except Exception:
            replay.writer.load_state_dict(before)
            self._forget(replay)
            raise

    def _fill(self, replay: RecordReplay, segments: list[Segment], rings: dict[str, Any]) -> None:
        replay.writer.load_state_dict(rings)  # first: it refuses a replay of another shape
        self._forget(replay)
        self.segments = segments
        for segment in self.segments:
            slots = read_slots(self.directory / segment.name)
            if len(slots) and not 0 <= slots.min() <= slots.max() < len(replay.changed_records):
                raise CheckpointError(f"{segment.name} names slots that this replay does not have")
            self._owners[segment.kind][slots] = segment.serial
            if segment.kind == "records":
                self._owners["latents"][slots] = -1
        found, expected = int((self._owners["records"] >= 0).sum()), len(replay)
        if found != expected:
            raise CheckpointError(f"the journal holds {found} of {expected} records")
        # Latents last: those that live belong to records of an earlier segment.
        for segment in sorted(self.segments, key=lambda segment: segment.kind == "latents"):
            for slots, data in read_segment(self.directory / segment.name):
                living = self._owners[segment.kind][slots] == segment.serial
                if living.any():
                    replay.restore_slots(slots[living], data[living])
        replay.writer.load_state_dict(rings)
        replay.clear_changes()
        self._replay, self._times_cleared = replay, replay.times_cleared

    def names(self) -> set[str]:
        """The segment files that are there."""
        return {path.name for path in self.directory.glob("*.bin") if OWN_NAME.fullmatch(path.name)}

    def discard(self, keep: Iterable[str]) -> None:
        """Deletes the segment files that no checkpoint names."""
        for name in self.names() - set(keep):
            (self.directory / name).unlink(missing_ok=True)

    def _continues(self, replay: RecordReplay) -> bool:
        known = replay is self._replay and replay.times_cleared == self._times_cleared
        # Checkpoints saved without the replay may have rotated those away that had one.
        return known and all((self.directory / segment.name).exists() for segment in self.segments)

    def _forget(self, replay: RecordReplay) -> None:
        self.segments, self._replay = [], None
        self._owners = {kind: torch.full((len(replay.changed_records),), -1) for kind in ("records", "latents")}

    def _next_serial(self) -> int:
        return 1 + max((int(name.split("-")[0]) for name in self.names()), default=0)


def check_segment(directory: Path, segment: Segment) -> None:
    """Raises CheckpointError unless the file is as it was written and holds what the segment says."""
    path = directory / segment.name
    check_file(path, segment.size, segment.crc32)
    with path.open("rb") as file:
        count, entries = _read_header(file)
        entry_bytes = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in entries)
        expected = file.tell() + count * (torch.int64.itemsize + entry_bytes)
    if (count, expected) != (segment.count, segment.size):
        raise CheckpointError(f"{path} is described wrongly: {count} records, {expected} bytes")


def read_slots(path: Path) -> torch.Tensor:
    with path.open("rb") as file:
        return _read(file, torch.int64, [_read_header(file)[0]])


def read_segment(path: Path) -> Iterator[tuple[torch.Tensor, TensorDict]]:
    """Yields (slots, entries) of a segment, a chunk at a time."""
    with path.open("rb") as file:
        count, entries = _read_header(file)
        slots = _read(file, torch.int64, [count])
        for chunk in slots.split(CHUNK):
            data = TensorDict({}, [len(chunk)])
            for key, dtype, shape in entries:
                data[key] = _read(file, dtype, [len(chunk), *shape])
            yield chunk, data


def _read_header(file: Any) -> tuple[int, list[tuple[NestedKey, torch.dtype, list[int]]]]:
    """How many slots, and the key, dtype and shape of every entry."""
    try:
        header = json.loads(file.readline())
        entries = [
            (key if isinstance(key, str) else tuple(key), getattr(torch, dtype.removeprefix("torch.")), shape)
            for key, dtype, shape in header["entries"]
        ]
        sizes = [header["count"], *(size for _, _, shape in entries for size in shape)]
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError(f"sizes {sizes}")
        if not all(isinstance(dtype, torch.dtype) for _, dtype, _ in entries):
            raise ValueError("an unknown dtype")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file.name} does not begin with a header that can be read ({error})") from error
    return header["count"], entries


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _read(file: Any, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    data = torch.empty(shape, dtype=dtype)
    if file.readinto(_raw(data)) != data.nbytes:
        raise CheckpointError(f"{file.name} ends early")
    return data

"""A checkpoint's manifest: its files, their sizes and checksums, and the program that wrote it."""

import importlib.metadata
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torchrl.checkpoint import CheckpointError

from .files import own_directories
from .journal import Segment, check_file

MANIFEST = "manifest.json"
FORMAT = 1
FILE = {"size": int, "crc32": int}
SEGMENT = {entry.name: entry.type for entry in fields(Segment)}
CONTENT = {"format": int, "step": int, "serial": int, "files": dict}


class ForeignCheckpointError(CheckpointError):
    """A whole checkpoint that is not this run's to read or delete: of another format, or a copy under another name."""

    def __init__(self, message: str, serial: int | None = None, readable: bool = False):
        super().__init__(message)
        self.serial, self.readable = serial, readable


def program() -> str:
    """The name and version that a manifest states."""
    try:
        return f"torchrl-r2dreamer {importlib.metadata.version('torchrl-r2dreamer')}"
    except importlib.metadata.PackageNotFoundError:
        return "torchrl-r2dreamer"


def name_of(step: int, serial: int | None = None) -> str:
    """The name of a checkpoint's directory; with the serial number where two have the same step."""
    return f"step_{step:09d}" if serial is None else f"step_{step:09d}_{serial}"


@dataclass
class Survey:
    """The checkpoints in a directory: the readable ones with their manifests, the others with what is wrong."""

    readable: dict[Path, dict[str, Any]] = field(default_factory=dict)  # oldest first
    damaged: dict[Path, CheckpointError] = field(default_factory=dict)
    foreign: dict[Path, ForeignCheckpointError] = field(default_factory=dict)

    @property
    def newest_serial(self) -> int:
        serials = [manifest["serial"] for manifest in self.readable.values()]
        return max([*serials, *(error.serial or 0 for error in self.foreign.values())], default=0)


def survey(root: Path) -> Survey:
    found = Survey()
    for directory in own_directories(root):
        try:
            manifest = read_manifest(directory)
            step, serial = manifest["step"], manifest["serial"]
            if directory.name not in (name_of(step), name_of(step, serial)):
                message = f"{directory} is a copy of {name_of(step)}: a run leaves copies alone, resume=PATH reads one"
                raise ForeignCheckpointError(message, serial, readable=True)
            found.readable[directory] = manifest
        except ForeignCheckpointError as error:
            found.foreign[directory] = error
        except CheckpointError as error:
            found.damaged[directory] = error
    found.readable = dict(sorted(found.readable.items(), key=lambda item: item[1]["serial"]))
    return found


def copies(root: Path) -> list[dict[str, Any]]:
    """The manifests of readable checkpoints under names that are not a run's own."""
    manifests = []
    for path in root.glob(f"*/{MANIFEST}"):
        if not path.parent.name.startswith("."):
            try:
                manifests.append(read_manifest(path.parent))
            except CheckpointError:
                continue
    return manifests


def write_manifest(file: Any, manifest: Mapping[str, Any]) -> None:
    manifest = {"format": FORMAT, "program": program(), **manifest}
    file.write(json.dumps({"crc32": _json_crc32(manifest), "manifest": manifest}).encode())


def read_manifest(directory: Path) -> dict[str, Any]:
    """A manifest in which every entry is what it has to be."""
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        manifest = content["manifest"]
        if content["crc32"] != _json_crc32(manifest):
            raise CheckpointError(f"{path} is corrupted: its checksum is wrong")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated, corrupted or missing ({error})") from error
    if isinstance(manifest, dict) and type(manifest.get("format")) is int and manifest["format"] != FORMAT:
        serial = manifest.get("serial")
        raise ForeignCheckpointError(
            f"{directory} has format {manifest['format']} and was saved by {manifest.get('program', 'another version')}; "
            f"this program, {program()}, reads format {FORMAT}",
            serial if type(serial) is int else None,
        )
    _require(manifest, CONTENT, path, "manifest")
    files, replay = manifest["files"], manifest.get("replay")
    _require(files, dict.fromkeys({"state.pt", *files} & {"state.pt", "rng.pt"}, FILE), path, "files", only=True)
    if replay is not None:
        _require(replay, {"rings": dict, "segments": list}, path, "replay")
        for segment in replay["segments"]:
            _require(segment, SEGMENT, path, "a segment", only=True)
            if segment["kind"] not in ("records", "latents"):
                raise CheckpointError(f"{path} names a segment of the kind {segment['kind']!r}")
    return {**manifest, "replay": replay}


def _require(value: Any, kind: Any, path: Path, name: str, only: bool = False) -> None:
    """Refuses what is not of this kind: a type, numbers not negative; or a dict of kinds, with more keys unless `only`."""
    if isinstance(kind, dict):
        _require(value, dict, path, name)
        if not value.keys() >= kind.keys() or (only and value.keys() != kind.keys()):
            raise CheckpointError(
                f"{path} holds unexpected content: {name} has {sorted(value)}, expected {sorted(kind)}"
            )
        for key, each in kind.items():
            _require(value[key], each, path, f"{name}.{key}", only)
    elif type(value) is not kind or (kind is int and value < 0):
        raise CheckpointError(
            f"{path} holds unexpected content: {name} is {str(value)[:40]!r}, expected {kind.__name__}"
        )


def check_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    for name, file in manifest["files"].items():
        check_file(directory / name, **file)


def _json_crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())

"""Checkpoints that survive a crash at any moment, a full disk, and damaged files.

    <logdir>/checkpoints/step_000012345/manifest.json   sizes and checksums of all that follows; written last
                                        state.pt        the given state, tensors and plain values only
                                        rng.pt          Python's, NumPy's and torch's generators
    <logdir>/checkpoints/journal/*.bin                  the replay (journal.py), shared by the checkpoints

A checkpoint is written beside the others under a temporary name, forced to the disk and renamed: it is there whole or
not at all. Nothing that an older one needs is deleted before. Loading never executes pickled code.
"""

import json
import os
import shutil
import sys
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torchrl.checkpoint import CheckpointError, GlobalRNGState

from r2dreamer.envs.replay import RecordReplay

from .journal import CheckedFile, Journal, Segment, check_file, is_disk_full

MANIFEST = "manifest.json"
FORMAT = 1
PLAIN = (bool, int, float, str, bytes, torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device)


class LoadedCheckpoint:
    """A checkpoint found whole: `.step`, `.state`, and what restores the rest."""

    def __init__(self, path: Path, manifest: dict[str, Any], owner: "Checkpoints"):
        self.path = path
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = _load_tensors(path / "state.pt")
        self._manifest = manifest
        self._owner = owner

    @property
    def has_replay(self) -> bool:
        return self._manifest["replay"] is not None

    def restore_replay(self, replay: RecordReplay) -> bool:
        """Restores slots, cursors and generations; False if the replay was left out of this checkpoint."""
        saved = self._manifest["replay"]
        if saved is None:
            return False
        journal = self._owner.journal
        if self.path.parent.resolve() != self._owner.directory.resolve():
            journal = Journal(self.path.parent / "journal")  # another run's: to be read, not to be continued
        journal.restore(replay, [Segment(**segment) for segment in saved["segments"]], saved["rings"])
        return True

    def restore_rng(self) -> bool:
        """Restores the process's random generators; False if they were left out of this checkpoint."""
        if "rng.pt" not in self._manifest["files"]:
            return False
        state = _load_tensors(self.path / "rng.pt")
        if len(state.get("torch_cuda", [])) != torch.cuda.device_count():
            state.pop("torch_cuda", None)
        GlobalRNGState().load_state_dict(state)
        return True


class Checkpoints:
    """The checkpoints of one run, the newest ``keep`` of them.

    Example:
        >>> checkpoints = Checkpoints(logdir / "checkpoints")  # doctest: +SKIP
        >>> checkpoints.save(step, {"model": model.state_dict(), "counters": {"updates": 7}}, replay)  # doctest: +SKIP
        >>> loaded = checkpoints.load()  # doctest: +SKIP
        >>> model.load_state_dict(loaded.state["model"]), loaded.restore_replay(replay)  # doctest: +SKIP
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {keep}.")
        self.directory = Path(directory)
        self.keep = keep
        self.journal = Journal(self.directory / "journal")
        self._damaged: set[Path] = set()

    def save(self, step: int, state: Mapping[str, Any], replay: RecordReplay | None = None, rng: bool = True) -> Path:
        """Saves a checkpoint; on failure raises CheckpointError, older ones whole and no change forgotten.

        Args:
            state: names to state dicts: nested dicts, lists and tuples of tensors, numbers, strings, None.
            replay: what changed in it since the last save is added to the journal; None leaves it out.
            rng: whether to save the process's random generators.
        """
        check_plain(state)
        known = self._manifests()
        serial = 1 + max((manifest["serial"] for manifest in known.values()), default=0)
        final = self.directory / f"step_{step:09d}"
        if final.exists():
            final = self.directory / f"step_{step:09d}_{serial}"
        temporary = self.directory / f".saving-{serial}"
        published = False
        try:
            self._clean(known)
            temporary.mkdir(parents=True)
            segments = self.journal.append(replay) if replay is not None else []
            files = {"state.pt": _save_tensors(temporary / "state.pt", dict(state))}
            if rng:
                files["rng.pt"] = _save_tensors(temporary / "rng.pt", GlobalRNGState().state_dict())
            saved = None
            if replay is not None:
                saved = {"rings": replay.writer.state_dict(), "segments": [asdict(segment) for segment in segments]}
                _sync_directory(self.journal.directory)
            manifest = {"format": FORMAT, "step": step, "serial": serial, "files": files, "replay": saved}
            with CheckedFile(temporary / MANIFEST) as file:
                file.write(json.dumps({"crc32": _json_crc32(manifest), "manifest": manifest}).encode())
            _sync_directory(temporary)
            os.rename(temporary, final)
            published = True
            _sync_directory(self.directory)
        except OSError as error:
            if not published:
                free = shutil.disk_usage(self.directory).free / 1e6 if self.directory.exists() else 0
                reason = f"the disk is full ({free:.0f} MB free)" if is_disk_full(error) else str(error)
                raise CheckpointError(
                    f"no checkpoint at step {step}: {reason}, in {self.directory}. Earlier checkpoints are intact; "
                    "free some space or set checkpoint.replay=false."
                ) from error
        finally:
            if not published:
                shutil.rmtree(temporary, ignore_errors=True)
                self._clean(known)
        if replay is not None:
            self.journal.commit(replay, segments)
        self._rotate()
        return final

    def load(self, path: str | os.PathLike | None = None, *, replay: bool = True) -> LoadedCheckpoint | None:
        """The newest whole checkpoint; None where this run has none yet; CheckpointError where all are damaged.

        Args:
            path: a run's directory, its ``checkpoints`` directory, or one particular checkpoint. Default: this run's.
            replay: whether the replay is wanted too; without it the journal is not read.
        """
        root = self.directory if path is None else Path(path)
        if (root / MANIFEST).exists():
            manifest = _read_manifest(root)
            _check_files(root, manifest, replay)
            return LoadedCheckpoint(root, manifest, self)
        if (root / "checkpoints").is_dir():
            root = root / "checkpoints"
        found = sorted(root.glob("step_*"))
        if path is not None and not found:
            raise CheckpointError(f"there is no checkpoint at {root}.")
        damaged: list[Path] = []
        readable: dict[Path, dict[str, Any]] = {}
        for directory in found:
            try:
                readable[directory] = _read_manifest(directory)
            except CheckpointError as error:
                damaged.append(directory)
                _warn(directory, error)
        newest_first = sorted(readable, key=lambda directory: readable[directory]["serial"], reverse=True)
        loaded = self._newest_whole({directory: readable[directory] for directory in newest_first}, replay, damaged)
        if loaded is None and replay:  # all share the journal's older segments: one of those may have spoilt them all
            rest = {directory: readable[directory] | {"replay": None} for directory in newest_first}
            loaded = self._newest_whole(rest, False, [])
            if loaded is not None:
                damaged.remove(loaded.path)
                print(f"WARNING: no replay is whole; from {loaded.path.name} goes on what was learnt.", file=sys.stderr)
        if loaded is not None and root.resolve() == self.directory.resolve():  # another run's are not ours to delete
            self._damaged.update(self.directory / directory.name for directory in damaged)
        if loaded is not None:
            return loaded
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {root} is whole (see the warnings above). Start anew with "
                "resume=false and another logdir."
            )
        return None

    def _newest_whole(
        self, manifests: Mapping[Path, dict], replay: bool, damaged: list[Path]
    ) -> LoadedCheckpoint | None:
        """The first of them whose files are as they were written; those before it are added to `damaged`."""
        for directory, manifest in manifests.items():
            try:
                _check_files(directory, manifest, replay)
                return LoadedCheckpoint(directory, manifest, self)
            except CheckpointError as error:
                damaged.append(directory)
                _warn(directory, error)
        return None

    def _manifests(self) -> dict[Path, dict[str, Any]]:
        """The readable checkpoints that were not found damaged, in the order they were saved."""
        manifests = {}
        for directory in self.directory.glob("step_*"):
            if directory not in self._damaged:
                try:
                    manifests[directory] = _read_manifest(directory)
                except CheckpointError:
                    self._damaged.add(directory)
        return dict(sorted(manifests.items(), key=lambda item: item[1]["serial"]))

    def _rotate(self) -> None:
        known = self._manifests()
        for directory in [*list(known)[: -self.keep], *self._damaged]:
            # Renamed first: what is half deleted must not look like a checkpoint.
            doomed = directory.with_name(f".deleted-{directory.name}")
            if directory.exists():
                os.rename(directory, doomed)
            known.pop(directory, None)
        self._damaged.clear()
        self._clean(known)

    def _clean(self, known: Mapping[Path, dict[str, Any]]) -> None:
        """Removes what crashed saves left, and journal segments that none of the `known` checkpoints names."""
        for leftover in [*self.directory.glob(".saving-*"), *self.directory.glob(".deleted-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        saved = [manifest["replay"] for manifest in known.values() if manifest["replay"] is not None]
        self.journal.discard(Segment(**segment).name for replay in saved for segment in replay["segments"])


def check_plain(value: Any, name: str = "state") -> None:
    """Refuses, when saving, what could not be loaded without executing pickled code."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_plain(key, f"{name} key")
            check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{name}[{index}]")
    elif value is not None and type(value) not in PLAIN:
        raise TypeError(
            f"checkpoint: {name} is a {type(value).__name__}; save tensors, numbers, strings, None, and dicts, lists "
            "and tuples of them."
        )


def _save_tensors(path: Path, value: Any) -> dict[str, int]:
    with CheckedFile(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError:
            if file.error is not None:  # torch's writer reports a failed write in words of its own
                raise file.error from None
            raise
    return {"size": file.size, "crc32": file.crc32}


def _load_tensors(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values: {error}") from error


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        manifest = content["manifest"]
        if content["crc32"] != _json_crc32(manifest):
            raise CheckpointError(f"{path} is corrupted: its checksum is wrong")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated, corrupted or missing ({error})") from error
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has the format {manifest['format']}, this program reads {FORMAT}")
    return manifest


def _check_files(directory: Path, manifest: dict[str, Any], replay: bool) -> None:
    for name, file in manifest["files"].items():
        check_file(directory / name, **file)
    if replay and manifest["replay"] is not None:
        for segment in manifest["replay"]["segments"]:
            found = Segment(**segment)
            check_file(directory.parent / "journal" / found.name, found.size, found.crc32)


def _json_crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _warn(directory: Path, error: CheckpointError) -> None:
    print(f"WARNING: checkpoint {directory.name} is damaged, trying an earlier one: {error}", file=sys.stderr)

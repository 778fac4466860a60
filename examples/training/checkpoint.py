"""Checkpoints that survive a crash at any moment, a full disk, and damaged files.

    <logdir>/checkpoints/step_000012345/manifest.json   sizes and checksums of all that follows; written last
                                        state.pt        the given state, tensors and plain values only
                                        rng.pt          Python's, NumPy's and torch's generators
    <logdir>/checkpoints/journal/*.bin                  the replay (journal.py), shared by the checkpoints

A checkpoint is written beside the others under a temporary name, forced to the disk and renamed: it is there whole or
not at all. Nothing that an older one needs is deleted before. Loading never executes pickled code.
"""

import errno
import functools
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torchrl.checkpoint import CheckpointError, GlobalRNGState

from r2dreamer.envs.replay.buffer import RecordReplay

from .files import warn
from .journal import CheckedFile, Journal, Segment, check_segment
from .manifest import MANIFEST, check_files, copies, name_of, read_manifest, survey, write_manifest

PLAIN = (bool, int, float, str, bytes, torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device)


@dataclass(eq=False)
class LoadedCheckpoint:
    """A checkpoint found whole: `.step`, `.state`, and what restores the rest."""

    path: Path
    manifest: dict[str, Any]
    owner: "Checkpoints"
    older: Callable[[], Any]  # finds the checkpoint to take in place of this one
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def has_replay(self) -> bool:
        return self.manifest["replay"] is not None

    @property
    def rings(self) -> dict[str, Any]:
        """How many streams its replay has, of what length, and how many records were written to each."""
        return self.manifest["replay"]["rings"]

    def restore_replay(self, replay: RecordReplay) -> bool:
        """Restores slots, cursors and generations; False if the replay was left out of this checkpoint."""
        saved = self.manifest["replay"]
        if saved is None:
            return False
        journal = self.owner.journal
        if self.path.parent.resolve() != self.owner.directory.resolve():
            journal = Journal(self.path.parent / "journal")  # another run's: to be read, not to be continued
        journal.restore(replay, [Segment(**segment) for segment in saved["segments"]], saved["rings"])
        return True

    def restore_rng(self) -> None:
        """Restores the process's random generators; of what goes on with another number of ranks there are none."""
        if "rng.pt" not in self.manifest["files"]:
            return
        state = _load_tensors(self.path / "rng.pt")
        if len(state.get("torch_cuda", [])) != torch.cuda.device_count():
            state.pop("torch_cuda", None)
        GlobalRNGState().load_state_dict(state)

    def next_older(self, error: Exception, *, replay: bool = False) -> "LoadedCheckpoint":
        """The checkpoint to take in place of this one, which cannot be restored; CheckpointError where none is left.

        Args:
            error: why it cannot be.
            replay: only its replay is at fault; without that it may still do.
        """
        self.owner.reject(self, error, replay)
        return self.older()


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
        self._rejected: dict[Path, tuple] = {}  # what could not be restored: why, and why its replay could not be
        self._spared: set[str] | None = None  # segments that a checkpoint of another format may need

    def save(
        self, step: int, state: Mapping[str, Any], replay: RecordReplay | None = None, *, rotate: bool = True
    ) -> Path:
        """Saves state and random generators; on failure raises CheckpointError, older ones whole and no change forgotten.

        Args:
            state: names to state dicts: nested dicts, lists and tuples of tensors, numbers, strings, None.
            replay: what changed in it since the last save is added to the journal; None leaves it out.
            rotate: False leaves the older ones, until :meth:`rotate` is called.
        """
        check_plain(state)
        known = self._manifests()
        serial = 1 + survey(self.directory).newest_serial
        final = self.directory / name_of(step)
        if final.exists():
            final = self.directory / name_of(step, serial)
        temporary = self.directory / f".saving-{serial}"
        published = False
        try:
            self._clean(known)
            temporary.mkdir(parents=True)
            segments = self.journal.append(replay) if replay is not None else []
            contents = {"state.pt": dict(state), "rng.pt": GlobalRNGState().state_dict()}
            files = {name: _save_tensors(temporary / name, content) for name, content in contents.items()}
            saved = None
            if replay is not None:
                saved = {"rings": replay.writer.state_dict(), "segments": [asdict(segment) for segment in segments]}
                _sync_directory(self.journal.directory)
            with CheckedFile(temporary / MANIFEST) as file:
                write_manifest(file, {"step": step, "serial": serial, "files": files, "replay": saved})
            _sync_directory(temporary)
            os.rename(temporary, final)
            published = True
            _sync_directory(self.directory)
        except OSError as error:
            if not published:
                free = shutil.disk_usage(self.directory).free / 1e6 if self.directory.exists() else 0
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                reason = f"the disk is full ({free:.0f} MB free)" if full else str(error)
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
        if rotate:
            self.rotate()
        return final

    def load(
        self,
        path: str | os.PathLike | None = None,
        *,
        replay: bool = True,
        check_state: Callable[[dict[str, Any], Path], None] = lambda state, path: None,
    ) -> LoadedCheckpoint | None:
        """The newest whole checkpoint; None where this run has none yet; CheckpointError where all are damaged.

        Args:
            path: a run's directory, its ``checkpoints`` directory, or one particular checkpoint. Default: this run's.
            replay: whether the replay is wanted too; without it the journal is not read.
            check_state: raises CheckpointError for a state that is not as expected; an older one is then tried.
        """
        again = functools.partial(self.load, path, replay=replay, check_state=check_state)
        root = self.directory if path is None else Path(path)
        if (root / MANIFEST).exists():
            manifest, damaged = read_manifest(root), {}
            loaded = self._newest_whole({root: manifest}, replay, check_state, again, damaged)
            if loaded is None:
                raise damaged[root]
            return loaded
        if (root / "checkpoints").is_dir():
            root = root / "checkpoints"
        found = survey(root)
        directories = [*found.readable, *found.damaged, *found.foreign]
        if path is not None and not directories:
            raise CheckpointError(
                f"there is no checkpoint at {root}. Give a run's directory, for example runs/quickstart/seed0, or one of its "
                "checkpoints."
            )
        for directory, error in found.damaged.items():
            _warn(directory, error)
        newest = max((manifest["serial"] for manifest in found.readable.values()), default=0)
        for error in found.foreign.values():
            if error.readable:
                warn(f"{error}.")
            elif error.serial is None or error.serial > newest:
                raise CheckpointError(
                    f"{error}. It is left as it is: go on with the program that saved it, from an earlier checkpoint with "
                    "resume=PATH, or start anew in another logdir."
                )
        damaged = dict(found.damaged)
        newest_first = dict(reversed(found.readable.items()))
        loaded = self._newest_whole(newest_first, replay, check_state, again, damaged)
        if loaded is not None and root.resolve() == self.directory.resolve():  # another run's are not ours to delete
            self._damaged.update(self.directory / directory.name for directory in damaged)
        if loaded is None and directories:
            reasons = f" The newest: {next(iter(damaged.values()))}." if damaged else ""
            raise CheckpointError(
                f"none of the {len(directories)} checkpoints in {root} is whole (see the warnings above).{reasons} Start "
                "anew with resume=false and another logdir."
            )
        return loaded

    def _newest_whole(self, manifests, replay, check_state, again, damaged) -> LoadedCheckpoint | None:
        """The first of them that is as it was written; what is wrong with those before it is added to `damaged`."""
        without_replay = None
        for directory, manifest in manifests.items():
            wrong, wrong_replay = self._rejected.get(directory, (None, None))
            try:
                if wrong:
                    raise wrong
                check_files(directory, manifest)
                loaded = LoadedCheckpoint(directory, manifest, self, again, _load_tensors(directory / "state.pt"))
                check_state(loaded.state, directory / "state.pt")
            except CheckpointError as error:
                damaged[directory] = error
                if not wrong:
                    _warn(directory, error)
                continue
            try:
                if wrong_replay:
                    raise wrong_replay
                if replay and loaded.has_replay:
                    for segment in manifest["replay"]["segments"]:
                        check_segment(directory.parent / "journal", Segment(**segment))
                return loaded
            except CheckpointError as error:
                damaged[directory] = error
                if not wrong_replay:
                    _warn(directory, error)
                without_replay, loaded = without_replay or directory, None
        if without_replay is None:
            return None
        # All share the journal's older segments: one of those may have spoilt them all.
        damaged.pop(without_replay)
        warn(f"no replay is whole; from {without_replay.name} goes on what was learnt.")
        state = _load_tensors(without_replay / "state.pt")
        return LoadedCheckpoint(without_replay, manifests[without_replay] | {"replay": None}, self, again, state)

    def reject(self, loaded: LoadedCheckpoint, error: Exception, replay: bool) -> None:
        """What was read as a whole checkpoint cannot be restored: from now on it, or its replay, counts as damaged."""
        reason = CheckpointError(f"{loaded.path} cannot be restored ({type(error).__name__}: {error})")
        reason.__cause__ = error
        _warn(loaded.path, reason)
        wrong, wrong_replay = self._rejected.get(loaded.path, (None, None))
        self._rejected[loaded.path] = (wrong, reason) if replay else (reason, wrong_replay)

    def _manifests(self) -> dict[Path, dict[str, Any]]:
        """The readable checkpoints that were not found damaged, in the order they were saved."""
        found = survey(self.directory)
        self._damaged.update(found.damaged)
        return {directory: found.readable[directory] for directory in found.readable if directory not in self._damaged}

    def rotate(self) -> None:
        """Deletes all but the newest ``keep``, and those that were found damaged."""
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
        if self._spared is None:
            other_format = any(not error.readable for error in survey(self.directory).foreign.values())
            self._spared = self.journal.names() if other_format else set()
        saved = [manifest["replay"] for manifest in [*known.values(), *copies(self.directory)]]
        needed = [Segment(**segment).name for replay in saved if replay is not None for segment in replay["segments"]]
        self.journal.discard({*needed, *self._spared})


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
            torch.save(value, file)  # pyright: ignore[reportArgumentType] - torch needs write() and flush() alone
        except RuntimeError:
            if file.error is not None:  # torch's writer reports a failed write in words of its own
                raise file.error from None
            raise
    return {"size": file.size, "crc32": file.crc32}


def _load_tensors(path: Path) -> dict[str, Any]:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values: {error}") from error
    except Exception as error:  # noqa: BLE001 - what is no archive of torch's fails in many ways
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} in place of a dict")
    return value


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _warn(directory: Path, error: CheckpointError) -> None:
    warn(f"checkpoint {directory.name} is damaged: {error}")

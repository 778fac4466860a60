"""One checkpoint of several ranks: the first rank's in the run's directory, the others' below `ranks/`, all of one step.

<logdir>/checkpoints/            the first rank's: what was learnt, its replay, its generators
<logdir>/ranks/1/checkpoints/    rank 1's replay, generators and episodes under way
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig
from torchrl.checkpoint import CheckpointError

from .checkpoint import Checkpoints, LoadedCheckpoint
from .files import warn
from .manifest import survey
from .ranks import Ranks
from .setup import open_run
from .snapshot import snapshot


def open_together(cfg: DictConfig, ranks: Ranks) -> tuple[Path, TextIO | None, Checkpoints, LoadedCheckpoint | None]:
    """`open_run` on the first rank, and for each other its own checkpoint of the same step.

    A run that goes on with another number of ranks keeps what was learnt. Its replay is left: streams are divided anew.
    """
    logdir, lock = Path(cfg.logdir), None
    saved: LoadedCheckpoint | None = None
    if ranks.first:
        logdir, lock, checkpoints, saved = open_run(cfg)
    ranks.meet()  # the first rank has found the directory in order
    if not ranks.first:
        checkpoints = own_checkpoints(cfg, ranks)
    newest, alone = saved, False
    while True:
        # The first rank's checkpoint, without tensors: enough to find this rank's.
        found = ranks.from_first(None if saved is None else summary(saved) | {"alone": alone})
        if found is None:
            return logdir, lock, checkpoints, None
        if found["ranks"] != ranks.count or found["alone"]:
            break
        if not ranks.first:
            saved = shard(checkpoints, found, ranks.rank)
        ranks.meet()  # a large replay is read to be checked
        lacking = [rank for rank, whole in enumerate(ranks.gather(saved is not None)) if not whole]
        if not lacking:
            break
        if ranks.first:
            assert saved is not None  # or nothing would have been found
            names = ", ".join(map(str, lacking))
            try:
                reason = CheckpointError(f"rank {names} has no whole checkpoint of step {found['step']}")
                saved = saved.next_older(reason)
            except CheckpointError:
                saved, alone = newest, True
    if found["ranks"] != ranks.count or found["alone"]:
        if cfg.checkpoint.exact:
            raise ValueError(
                f"This run was saved by {found['ranks']} rank(s) and is started with {ranks.count}, or one of them lost its part: it "
                "cannot be repeated exactly (checkpoint.exact=true). Start as many, or go on with checkpoint.exact=false."
            )
        if ranks.first and found["alone"]:
            warn("no step is whole on every rank: what was learnt is kept, the replay is collected anew.")
        elif ranks.first:
            warn(
                f"This run was saved by {found['ranks']} rank(s) and goes on with {ranks.count}: what was learnt is kept, "
                "the replay is collected anew."
            )
        state = saved.state if ranks.first and saved is not None else {}
        saved = LoadedCheckpoint(found["path"], found["manifest"], checkpoints, _refuse_older, state)
    assert saved is not None  # every rank has one by now
    if ranks.count > 1:
        learnt = ranks.from_first({name: part for name, part in saved.state.items() if name != "agent"})
        if not ranks.first:
            learnt["trainer"]["returns"]["finished"] = []  # the first rank has them, and reports them once
        saved.state = learnt | saved.state
        saved.older = _refuse_older
    return logdir, lock, checkpoints, saved


class NoMetrics:
    """In the place of the writer where another rank writes."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def video(self, step: int, name: str, frames, fps: int) -> None: ...

    def close(self) -> None: ...


def own_checkpoints(cfg: DictConfig, ranks: Ranks) -> Checkpoints:
    """Of a rank that is not the first. One more than the first rank keeps: it saves later, and may be killed between."""
    directory = Path(cfg.logdir) / "ranks" / str(ranks.rank) / "checkpoints"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{directory} cannot be written ({error}); choose another place with logdir=PATH.") from error
    return Checkpoints(directory, keep=cfg.checkpoint.keep + 1)


def save_together(trainer: Any) -> None:
    """The first rank saves last, so that what it has all have. Raises CheckpointError on every rank where one fails.

    Only when all have saved do the others delete an older one: the newest that all have is never among those.
    """
    ranks, failure = trainer.ranks, None
    replay = trainer.replay if trainer.cfg.checkpoint.replay else None
    state = snapshot(trainer)
    for first in (False, True):
        if ranks.first is first:
            try:
                trainer.checkpoints.save(trainer.frames, state, replay, rotate=ranks.first)
            except CheckpointError as error:
                failure = error if ranks.first else CheckpointError(f"Rank {ranks.rank}: {error}")
        ranks.meet()
        for found in filter(None, ranks.gather(failure)):
            raise found
    if not ranks.first:
        trainer.checkpoints.rotate()


def summary(saved: LoadedCheckpoint) -> dict[str, Any]:
    return {
        "path": saved.path,
        "step": saved.step,
        "count": saved.state["count"],
        "ranks": saved.state.get("ranks", 1),
        "manifest": {"step": saved.step, "replay": None, "files": {}},  # for what goes on without replay
    }


def shard(checkpoints: Checkpoints, found: dict[str, Any], rank: int) -> LoadedCheckpoint | None:
    """This rank's checkpoint of that step, if it is whole."""
    directory = found["path"].parent.parent / "ranks" / str(rank) / "checkpoints"
    for path, manifest in reversed(survey(directory).readable.items()):
        if manifest["step"] == found["step"]:
            try:
                loaded = checkpoints.load(path)
            except CheckpointError:
                continue
            if loaded is not None and loaded.state.get("count") == found["count"]:
                return loaded
    return None


def _refuse_older() -> LoadedCheckpoint:
    raise CheckpointError(
        "a rank's checkpoint cannot be restored (see the warning above). Move the newest directory of the run's "
        "checkpoints away, and the same command goes on from the one before it."
    )

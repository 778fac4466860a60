"""`replay.prefill=PATH`: what another run or another program collected becomes records before the first update."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from r2dreamer.envs.replay.buffer import RecordReplay, make_replay
from r2dreamer.envs.replay.prefill import Prefilled, prefill, refuse_none
from r2dreamer.envs.replay.recorded import recorded_episodes, recorded_task

from .checkpoint import CheckpointError, Checkpoints, LoadedCheckpoint
from .files import warn
from .saved_config import plain_config
from .setup import first_difference
from .shards import shard, summary

SAME = ("env.suite", "env.task", "env.action_repeat", "env.make")  # else its records are of another task


def prefill_replay(trainer: Any) -> None:
    """Fills the trainer's replay, unless a checkpoint has done so; each rank takes its share of the episodes."""
    cfg, ranks, replay, count = trainer.cfg, trainer.ranks, trainer.replay, trainer.count
    scratch = trainer.logdir / f".prefill-{ranks.rank}"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed here
    if cfg.replay.prefill is None:
        return
    if ranks.any(len(replay) > 0):
        if not count.get("prefilled"):
            raise ValueError(
                f"replay.prefill={cfg.replay.prefill} fills the replay of a new run, and the run in logdir={cfg.logdir} goes on "
                "with its own: leave it out, or begin a new run in another logdir."
            )
        before = trainer.saved.state["config"]["replay"]["prefill"]
        if before != cfg.replay.prefill and ranks.first:
            warn(f"replay.prefill={cfg.replay.prefill} is not read: this run goes on with the records of {before}.")
        return  # the checkpoint has them
    where = f"replay.prefill={cfg.replay.prefill}"
    path = Path(cfg.replay.prefill)
    if not path.is_dir():
        raise ValueError(f"{where} is no folder: give a run's, one that TorchRL recorded, or a Minari data set's.")
    task = recorded_task(path)
    if task is not None and cfg.env.suite == "gym" and not same_task(task, cfg.env.task):
        raise ValueError(f"{where} was recorded with {task}, and this run has env.task={cfg.env.task}.")
    names = [*trainer.agent.observations.images, *trainer.agent.observations.vectors]
    scratch.mkdir(exist_ok=True)
    try:
        episodes = recorded_episodes(path, names)
        if episodes is None:
            episodes = run_episodes(path, cfg, scratch, where)
        own = itertools.islice(episodes, ranks.rank, None, ranks.count)
        discrete = trainer.agent.actions.discrete
        record = trainer.agent.example_record()
        found = prefill(replay, own, record, discrete=discrete, where=where, share=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    parts = ranks.gather((len(replay), found.records, found.episodes, found.left_out))
    kept, *sums = (sum(values) for values in zip(*parts, strict=True))
    found = Prefilled(*sums)
    refuse_none(found, where)
    if kept < found.records and ranks.first:
        warn(
            f"replay.capacity={cfg.replay.capacity} holds {kept:,} of the {found.records:,} records of {where}; the oldest of each "
            "environment's part are overwritten. Raise replay.capacity to keep all."
        )
    count["prefilled"] = found.records
    if cfg.replay.prefill_counts and not trainer.saved:
        trainer.ratio.reset(cfg.warmup_steps - found.records)
    trainer.metrics.write(
        trainer.frames,
        {"prefill/records": found.records, "prefill/episodes": found.episodes, "prefill/left_out": found.left_out},
    )
    if cfg.progress and ranks.first:
        lost = f"; {found.left_out} without a beginning left out" if found.left_out else ""
        print(f"Prefilled with {found.records:,} records of {found.episodes:,} episodes from {path}{lost}")


def same_task(recorded: str, wanted: str) -> bool:
    """Whether Gymnasium makes the recorded task from the wanted name, which may begin with a module and lack a version."""
    from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id  # noqa: PLC0415

    space, name, version = parse_env_id(wanted.rpartition(":")[2])
    if version is None:
        version = find_highest_version(space, name)  # None where its module is not imported: any will do
    theirs = parse_env_id(recorded)
    return get_env_id(*theirs) == get_env_id(space, name, theirs[2] if version is None else version)


def run_episodes(path: Path, cfg: DictConfig, scratch: Path, where: str) -> Iterator[TensorDict]:
    """The records of a run's newest checkpoint, or of one particular checkpoint, episode by episode; of all its ranks."""
    try:
        first = Checkpoints(path).load(path)
    except CheckpointError as error:
        raise ValueError(f"{where} holds neither a recording of TorchRL or Minari nor a run: {error}") from error
    assert first is not None  # of a path it would have raised
    if "config" in first.state:
        difference = first_difference(plain_config(first.state["config"], first.path), cfg, SAME)
        if difference:
            key, theirs, ours = difference
            raise ValueError(f"{where} was collected with {key}={theirs}, and this run has {key}={ours}.")
    for number, loaded in enumerate([first, *_other_ranks(first, where)]):
        if not loaded.has_replay:
            raise ValueError(f"{loaded.path} has no replay: it was saved with checkpoint.replay=false.")
        yield from _episodes(_restored(loaded, scratch / str(number)))


def _other_ranks(first: LoadedCheckpoint, where: str) -> list[LoadedCheckpoint]:
    """Of the same step. They lie in the run's directory, wherever in it `where` points."""
    count, path = first.state.get("ranks", 1), first.path.resolve()
    found = [shard(Checkpoints(path), summary(first) | {"path": path}, rank) for rank in range(1, count)]
    if lacking := [str(rank) for rank, loaded in enumerate(found, 1) if loaded is None]:
        raise ValueError(
            f"{where}: {count} ranks saved {path.name}, and rank {', '.join(lacking)} has no whole checkpoint of that step in "
            f"{path.parent.parent / 'ranks'}. Give the directory of a run that has the checkpoints of all its ranks."
        )
    return [loaded for loaded in found if loaded is not None]


def _restored(loaded: LoadedCheckpoint, scratch: Path) -> RecordReplay:
    rings = loaded.rings
    streams, length = len(rings["written"]), rings["length"]
    replay = make_replay(streams * length, streams, 1, 1, storage="memmap", directory=scratch)
    loaded.restore_replay(replay)
    return replay


def _episodes(replay: RecordReplay) -> Iterator[TensorDict]:
    rings = replay.rings
    for stream in range(rings.num_streams):
        written, stored = int(rings.written[stream]), int(rings.stored[stream])
        if not stored:
            continue
        slots = rings.slots(torch.tensor(stream), torch.arange(written - stored, written))  # in order of time
        begins = replay.read_slots(slots, ["is_init"])["is_init"].reshape(-1).nonzero()[:, 0].tolist()
        starts = sorted({0, *begins})
        for start, end in zip(starts, [*starts[1:], stored], strict=True):
            yield replay.read_slots(slots[start:end])

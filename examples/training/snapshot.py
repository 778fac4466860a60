"""What a checkpoint of the trainer holds, beside the replay and the random generators, and how it is put back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchrl.checkpoint import CheckpointError
from torchrl.trainers.algorithms.dreamer_v3 import DreamerV3UpdateRatio

from r2dreamer.dreamer.pretrained import pack

from .checkpoint import LoadedCheckpoint
from .origin import commit, train_command


def _stateful(trainer) -> dict[str, dict]:
    learner = trainer.learner
    return {
        "learner": {"model": learner, "optimizer": learner.optimizer},
        "trainer": {"ratio": trainer.ratio, "averages": trainer.averages, "returns": trainer.returns},
    }


def snapshot(trainer) -> dict:
    groups = _stateful(trainer).items()
    state = {group: {name: part.state_dict() for name, part in parts.items()} for group, parts in groups}
    state |= {"count": dict(trainer.count), "ranks": trainer.ranks.count}
    if not trainer.ranks.first:  # what was learnt is the same on every rank
        return {name: part for name, part in state.items() if name != "learner"}
    config: Any = OmegaConf.to_container(trainer.cfg, resolve=True)
    algorithm, detached = config["algorithm"], getattr(trainer.learner.detached_decoder, "decoder", None)
    more = {} if detached is None else {"detached_decoder": (algorithm["detached_decoder"]["decoder"], detached)}
    return state | {
        # The learner's own tensors, under names for load_pretrained; torch.save writes shared memory once.
        "agent": pack(trainer.agent, algorithm["agent"] | config["model"], more),
        "config": config,
        "metrics": trainer.metrics.position(),
        "origin": {"command": train_command(), "commit": commit()},
    }


def check_state(state: dict, path: Path) -> None:
    """Raises CheckpointError unless the parts that a trainer needs are there, each of the right kind."""
    counts = {"count": ("policy_steps", "updates", "replayed_steps", "restarts"), "metrics": ("bytes", "lines", "step")}
    parts = {"learner": ("model", "optimizer"), "trainer": ("ratio", "averages", "returns"), "config": ()}
    for group, names in (counts | parts).items():
        found = state.get(group)
        if not isinstance(found, dict) or not found.keys() >= set(names):
            raise CheckpointError(f"{path} holds no {group} with {', '.join(names) or 'sections'}")
        for name in counts.get(group, ()):
            if type(found[name]) is not int or found[name] < -1:
                raise CheckpointError(f"{path} holds {group}.{name}={str(found[name])[:40]!r}, expected a whole number")
    try:
        OmegaConf.to_container(OmegaConf.create(state["config"]), resolve=True)
    except OmegaConfBaseException as error:
        raise CheckpointError(f"{path} holds a configuration that cannot be read: {error}") from error


def check_exact(cfg: DictConfig, saved: LoadedCheckpoint) -> None:
    if cfg.checkpoint.exact and not saved.has_replay:
        raise ValueError(
            f"{saved.path} has no replay that can be read, and checkpoint.exact=true promises that a resumed run repeats "
            "the uninterrupted one. Go on without that promise with checkpoint.exact=false."
        )


def restore(trainer) -> None:
    """Puts the run's newest checkpoint back; where its content does not fit, the one before it, as after damage."""
    rate = trainer.ratio.ratio
    while True:
        check_exact(trainer.cfg, trainer.saved)
        whole = trainer.ranks.all(trainer.saved.has_replay)
        try:
            _put_back(trainer)
        except Exception as error:  # noqa: BLE001 - unexpected content fails in as many ways as there are parts
            trainer.saved = trainer.saved.next_older(error)
            continue
        try:
            has_replay = whole and trainer.saved.restore_replay(trainer.replay)
            break
        except Exception as error:  # noqa: BLE001
            trainer.saved = trainer.saved.next_older(error, replay=True)
    trainer.ratio.ratio = rate  # as configured now: a run may go on with another ratio or batch
    if not trainer.cfg.checkpoint.exact:
        trainer.count["restarts"] += 1
    if not has_replay:  # left out of the checkpoint: collect anew, owe nothing for it
        trainer.count["collected_from"] = trainer.count["policy_steps"]
        trainer.ratio = DreamerV3UpdateRatio(rate)


def _put_back(trainer) -> None:
    """All but the replay. What would fail only at the next update or log line fails here."""
    saved, optimizer = trainer.saved, trainer.learner.optimizer
    configured = optimizer.state_dict()["param_groups"]
    for group, parts in _stateful(trainer).items():
        for name, part in parts.items():
            part.load_state_dict(saved.state[group][name])
    trainer.count = {"collected_from": 0, "evaluated": saved.step} | saved.state["count"]  # which older ones lack
    if trainer.frames != saved.step:
        raise ValueError(f"it counts {trainer.frames} frames and is the checkpoint of {saved.step}")
    _check_optimizer(optimizer, configured)
    for number in (trainer.returns.latest, trainer.ratio.state_dict()["previous"] or 0):
        float(number)
    trainer.averages.check_finite(trainer.frames, trainer.count["updates"])
    for part in (trainer.averages, trainer.returns):
        copy.deepcopy(part).pop()
    saved.restore_rng()  # tried here; once more when all else is made


def _check_optimizer(optimizer: torch.optim.Optimizer, configured: list[dict]) -> None:
    """torch takes any state. Numbers stay numbers; every parameter has the same entries, of its own shape."""
    kind = lambda value: float if type(value) in (int, float) else type(value)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        for name, value in settings.items():
            if name != "params" and kind(group.setdefault(name, value)) is not kind(value):
                raise TypeError(f"the optimizer's {name} is a {type(group[name]).__name__}")
    states = [(parameter, state) for parameter, state in optimizer.state.items()]
    for parameter, state in states:
        kinds = [{name: type(value) for name, value in each.items()} for each in (state, states[0][1])]
        shapes = [value.shape for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
        if kinds[0] != kinds[1] or any(shape != parameter.shape for shape in shapes):
            raise ValueError(f"the optimizer's state of a parameter {list(parameter.shape)} does not fit it")

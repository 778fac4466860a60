"""What happens before training: sizes are checked, the run's directory is opened and locked, the agent is built."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torchrl.checkpoint import CheckpointError
from torchrl.envs import EnvBase

from r2dreamer.dreamer import ActionSpace, Agent, ObservationSpace
from r2dreamer.envs import check_environment
from r2dreamer.envs.base.gl import watch

try:
    import fcntl
except ImportError as error:
    raise ImportError(
        f"The example scripts lock a run's directory with fcntl, which {sys.platform} does not have. Run them on Linux (WSL, a "
        "container), or use r2dreamer.dreamer, r2dreamer.losses and r2dreamer.envs in a loop of your own."
    ) from error

from ..settings.compose import compose, entries
from .budget import check_environments, check_update
from .checkpoint import Checkpoints, LoadedCheckpoint
from .devices import resolve_device
from .files import refuse_links, warn
from .manifest import survey
from .metrics import MetricsWriter
from .saved_config import plain_config
from .snapshot import check_exact, check_state

MISSING = object()
# What a saved run and the command that resumes it must agree on; everything else may change in mid-run.
FIXED = (
    "model",
    "env.suite",
    "env.task",
    "env.num_envs",
    "env.action_repeat",
    "env.make",
    "algorithm",
    "replay.capacity",
    "seed",
)
# Optimisers by what took their place: a run that was saved with the one is resumed with the other.
SUCCESSORS = {"torchrl.trainers.algorithms.DreamerV3Optimizer": "r2dreamer.losses.DreamerOptimizer"}
# And what else a finished run must have had to be the one that a command asks for.
TRAINING = (
    *FIXED,
    "total_frames",
    "batch_size",
    "batch_length",
    "train_ratio",
    "warmup_steps",
    "precision",
    "replay.prefill",
    "replay.prefill_counts",
    "collect_steps",
    "collector._target_",
    "eval.episodes",
    "eval.max_steps",
)


def open_run(cfg: DictConfig) -> tuple[Path, TextIO, Checkpoints, LoadedCheckpoint | None]:
    """Makes the run's directory and locks it, finds what to resume, refuses what cannot work."""
    check_plan(cfg)
    say_unread(cfg)
    if cfg.checkpoint.exact and not cfg.checkpoint.replay:
        raise ValueError(
            "checkpoint.exact=true makes a resumed run repeat the uninterrupted one, and needs the replay for that. Add "
            "checkpoint.replay=true, or use checkpoint.exact=false."
        )
    logdir = refuse_links(cfg.logdir)
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        lock = (logdir / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"logdir={logdir} cannot be written ({error}); choose another with logdir=PATH.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
    except OSError as error:
        raise ValueError(
            f"Another process is training in logdir={logdir}; two would spoil each other's metrics and checkpoints. "
            "Wait for it, stop it, or choose another directory with logdir=PATH."
        ) from error

    checkpoints, saved = Checkpoints(logdir / "checkpoints", keep=cfg.checkpoint.keep), None
    if cfg.resume in ("auto", True):
        saved = checkpoints.load(check_state=check_state)
    elif cfg.resume is not False:
        saved = resumed_from(cfg.resume, checkpoints, logdir)
    elif holds_run(checkpoints, logdir):
        raise ValueError(
            f"resume=false, but logdir={logdir} already holds a run, which would be overwritten. Continue it with "
            "resume=auto, choose another directory with logdir=PATH, or delete it."
        )
    if saved is not None:
        check_same_run(plain_config(saved.state["config"], saved.path), cfg, saved.path)
        check_exact(cfg, saved)
        whole = saved.state["count"].get("evaluated", saved.step) >= saved.step  # else its last evaluation was cut off
        if saved.step >= cfg.total_frames and whole and not lacks_curve(logdir, saved, cfg):
            raise ValueError(
                f"{saved.path} has already reached {saved.step} of total_frames={cfg.total_frames} frames. Train on "
                "with a larger total_frames, or begin a new run with another seed or logdir."
            )
    return logdir, lock, checkpoints, saved


def resumed_from(path: str, checkpoints: Checkpoints, logdir: Path) -> LoadedCheckpoint:
    """The checkpoint that resume=PATH names; or the directory's own newest one, if the same command has begun its run."""
    own = None
    if survey(checkpoints.directory).readable:
        with contextlib.suppress(CheckpointError):  # none of them is whole, and none is lost
            own = checkpoints.load(check_state=check_state)
    begun = own if own is not None and own.state["config"].get("resume") == path else None
    try:
        named = checkpoints.load(path, check_state=check_state)
    except CheckpointError:
        if begun is None:
            raise
        named = None  # its run has gone on, and no longer keeps it
    if begun is not None and (named is None or begun.path.resolve() != named.path.resolve()):
        warn(
            f"resume={path} has begun the run in {logdir}, which goes on from its own checkpoint at {begun.step} frames."
        )
        return begun
    if named is None:
        raise ValueError(f"resume={path} holds no checkpoint; give a run's directory or one checkpoint of it.")
    if own is None or own.path.resolve() == named.path.resolve():
        return named
    if logdir.resolve() not in named.path.resolve().parents:
        raise ValueError(
            f"resume={path} begins from another run, but logdir={logdir} already holds one, whose checkpoints would be "
            "overwritten. Continue that one with resume=auto, or choose another directory with logdir=PATH."
        )
    return named


def holds_run(checkpoints: Checkpoints, logdir: Path) -> bool:
    """Whether anything of a run is here; a command that was refused leaves an empty file of metrics at most."""
    found, metrics = survey(checkpoints.directory), logdir / "metrics.jsonl"
    return bool(found.readable or found.damaged or found.foreign) or (metrics.exists() and metrics.stat().st_size > 0)


def lacks_curve(logdir: Path, saved: LoadedCheckpoint, cfg: DictConfig) -> bool:
    """Whether this very run ended between its last checkpoint and its learning curve."""
    metrics, curve = logdir / "metrics.jsonl", logdir / "curve.png"
    if saved.state["config"].get("total_frames") != cfg.total_frames or not metrics.exists():
        return False
    return not curve.exists() or curve.stat().st_mtime < metrics.stat().st_mtime


def check_plan(cfg: DictConfig) -> None:
    """Refuses settings that are each possible and cannot go together."""
    for key, value in cfg.env.make.items():  # frames are counted and scores chosen by what stands below env
        if key in cfg.env and cfg.env[key] != value:
            raise ValueError(
                f"env.make.{key}={value}, but env.{key}={cfg.env[key]}: say env.{key}={value}, which sets both."
            )
    if cfg.replay.place.storage.startswith("cuda"):
        resolve_device(cfg.replay.place.storage, "replay.place.storage")
    batch = cfg.collect_steps * cfg.env.num_envs * cfg.env.action_repeat  # frames
    if batch > cfg.total_frames:
        fit = cfg.total_frames * cfg.collect_steps // batch
        raise ValueError(
            f"collect_steps={cfg.collect_steps} of env.num_envs={cfg.env.num_envs} environments are {batch} frames, more than "
            f"total_frames={cfg.total_frames}. "
            + (f"At most collect_steps={fit} fit." if fit else "Use more frames, or fewer environments.")
        )
    steps = cfg.total_frames // (cfg.env.action_repeat * cfg.env.num_envs)  # of each; an episode has a record more
    if cfg.train_ratio and 2 * steps < cfg.batch_length:
        raise ValueError(
            f"total_frames={cfg.total_frames} are {steps} steps of each of {cfg.env.num_envs} environments, too few for one "
            f"window of batch_length={cfg.batch_length}: nothing would be learnt. Use more frames or shorter windows."
        )
    policy_steps = cfg.total_frames // cfg.env.action_repeat
    if cfg.train_ratio and cfg.warmup_steps >= policy_steps:
        raise ValueError(
            f"warmup_steps={cfg.warmup_steps} is not below the {policy_steps} policy steps of total_frames={cfg.total_frames}: "
            "nothing would be learnt. Use fewer warmup_steps, or more frames."
        )


def say_unread(cfg: DictConfig) -> None:
    """Warns of what a command sets and an experiment overrules: hydra reads experiments last."""
    if not HydraConfig.initialized():
        return
    named: list[str] = list(HydraConfig.get().overrides.task)
    given = {name.lstrip("+"): value for name, _, value in (each.partition("=") for each in named)}
    for name in ("total_frames", "train_ratio"):
        if f"env.{name}" in given and cfg.env[name] != cfg[name]:
            warn(f"env.{name}={given[f'env.{name}']} is not read: {name}={cfg[name]} is. Say {name}=... in its place.")
    if "model" in given:
        chosen = compose(f"model={given['model']}").model
        unlike = [str(key) for key, value in chosen.items() if cfg.model.get(key) != value]
        other = sorted(key for key in unlike if f"model.{key}" not in given)
        if other:
            warn(
                f"model={given['model']} does not set {', '.join(other)}: the experiment does. Say model.{other[0]}=..."
            )


def spaces(make_environment: Callable[..., EnvBase], timeout: float) -> tuple[ObservationSpace, ActionSpace]:
    """What an agent observes and does here. One environment is made, checked against the key contract, and closed."""
    with watch("The first environment, which is made and tried in this process,", timeout):
        environment = make_environment(seed=0)
        check_environment(environment)
    found = ObservationSpace.from_spec(environment.observation_spec), ActionSpace.from_spec(environment.action_spec)
    environment.close()
    return found


def build(
    make_environment: Callable[..., EnvBase],
    cfg: DictConfig,
    device: torch.device,
    precision: torch.dtype | None = None,
) -> tuple[Agent, list[str]]:
    """A new agent for this environment.

    Args:
        precision: in which the agent is to be trained; what does not fit into memory then is refused.
    """
    observations, actions = spaces(make_environment, cfg.timeout)
    if precision is not None:
        check_environments(cfg, observations)
        check_fits(cfg, observations, actions, device, precision)
    torch.manual_seed(cfg.seed)
    random.seed(cfg.seed)  # what draws from these is the user's own
    np.random.seed(cfg.seed % 2**32)
    agent = make_agent(cfg.algorithm, cfg.model, observations, actions)
    for part in agent.parts().values():
        part.to(device)
    return agent, [*observations.images, *observations.vectors]


def check_fits(
    cfg: DictConfig, observations: ObservationSpace, actions: ActionSpace, device: torch.device, precision: torch.dtype
) -> str:
    """What an update takes, in a line; refuses a model or a batch that cannot fit, before one is made."""
    with torch.device("meta"):  # has shapes and no memory
        agent = make_agent(cfg.algorithm, cfg.model, observations, actions)
    return check_update(cfg, agent, device, precision)


def make_agent(algorithm: DictConfig, model: DictConfig, observations: ObservationSpace, actions: ActionSpace) -> Agent:
    """The algorithm's builder with the model's widths."""
    builder = hydra.utils.instantiate(algorithm.agent)
    known = inspect.signature(builder).parameters
    for key, value in model.items():
        if key not in known:
            raise ValueError(
                f"model.{key}={value} means nothing to {algorithm.agent._target_}, which this algorithm builds its agent "
                f"with: leave model=... out, write ~model.{key} where an experiment sets it, or take the algorithm's own "
                "(model=size12M and its like for R2-Dreamer and Dreamer V3, model=dreamerv1, model=dreamerv2)."
            )
    return builder(observations, actions, **hydra.utils.instantiate(model))


def open_metrics(cfg: DictConfig, logdir: Path, saved: LoadedCheckpoint | None) -> MetricsWriter:
    """Goes on where metrics.jsonl ended at the checkpoint; a new file, also when another run is taken further here."""
    position = None
    if saved is not None and saved.path.resolve().is_relative_to(logdir.resolve()):
        position = saved.state["metrics"]
    loggers = [hydra.utils.instantiate(logger, logdir=logdir) for logger in (cfg.logger or {}).values()]
    return MetricsWriter(logdir, loggers=loggers, resume_position=position)


def check_same_run(before: DictConfig, now: DictConfig, path: Path) -> None:
    if found := first_difference(before, now, FIXED):
        key, old, new = found
        raise ValueError(
            f"{path} was trained with {key}={old}, this command says {key}={new}; a run cannot go on with another one. "
            "Repeat the command that trained it, or start afresh in another logdir: add name=MINE, or logdir=PATH, and no resume=PATH."
        )


def first_difference(
    before: DictConfig, now: DictConfig, keys: Sequence[str], overrides: Sequence[str] | None = None
) -> tuple[str, object, object] | None:
    """Below these keys the first value that two configurations differ in: its own key, and both values.

    A key that the older one lacks, because it was added later, has its default there.

    Args:
        overrides: the command that `now` is of. Default: that of this process.
    """
    older, newer = (dict(entries(OmegaConf.to_container(cfg, resolve=True))) for cfg in (before, now))
    below = lambda section: sorted(key for key in {**older, **newer} if f"{key}.".startswith(f"{section}."))
    whole = lambda value: value.get("_target_", value) if isinstance(value, dict) else value  # what a section builds
    for key in itertools.chain.from_iterable(map(below, keys)):
        old, new = older.get(key, MISSING), newer.get(key)
        if isinstance(new, dict) and (old is MISSING or isinstance(old, dict)):
            continue  # the entries of a section say more
        if old is MISSING:
            old = None if new is None else default_of(key, new, overrides)
        if successor(whole(old)) != successor(whole(new)):
            return key, whole(old), whole(new)
    return None


def successor(value: object) -> object:
    return SUCCESSORS.get(value, value) if isinstance(value, str) else value


def default_of(key: str, given: object, overrides: Sequence[str] | None) -> object:
    """What a key would be if the command did not mention it; `given` where there is no command."""
    if overrides is None:
        if not HydraConfig.initialized():
            return given
        overrides = HydraConfig.get().overrides.task
    groups = key.split(".")[1:]  # augmentation=... sets algorithm.augmentation
    named = lambda override: override.lstrip("+").partition("=")[0]
    others = [each for each in overrides if not f"{named(each)}.".startswith(f"{key}.") and named(each) not in groups]
    if len(others) == len(overrides):
        return given
    return OmegaConf.select(OmegaConf.create(OmegaConf.to_container(compose(*others), resolve=True)), key)

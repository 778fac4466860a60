"""A grid of trainings from a command line in hydra's multirun syntax, and how each of them stands."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ..settings.schema import check
from .files import refuse_links, warn
from .run import Run
from .saved_config import plain_config
from .setup import TRAINING, first_difference


def expand(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """`a=1,2 b=range(0,2)` to the four lists of overrides it stands for, the last one varying fastest.

    Example:
        >>> expand(["env=probe", "seed=0,1"])
        [('env=probe', 'seed=0'), ('env=probe', 'seed=1')]
    """
    choices, hydra_here = [], GlobalHydra.instance()
    loader = hydra_here.config_loader() if hydra_here.is_initialized() else None  # knows what glob(...) finds
    for override in OverridesParser.create(loader).parse_overrides(list(arguments)):
        if override.is_interval_sweep():
            raise ValueError(f"{override.input_line} names no values to train with: list them, or give range(...).")
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line])
    return list(itertools.product(*choices))


def check_place(run: Run, cfg: DictConfig) -> None:
    """A run of other settings in this run's place is not taken for it, finished or not."""
    saved = run.logdir / "config.yaml"
    if not run.saved or not saved.exists():
        return
    try:
        content = OmegaConf.to_container(OmegaConf.load(saved))
    except yaml.YAMLError as error:
        raise ValueError(f"{saved} is damaged ({' '.join(str(error).split())}): move {run.logdir} away.") from error
    if not content:
        raise ValueError(f"{saved} is empty, so nothing says what was trained: move {run.logdir} away.")
    keys = TRAINING if run.finished else [key for key in TRAINING if key != "total_frames"]  # more may be asked for
    if found := first_difference(plain_config(content, saved), cfg, keys, run.overrides):
        key, old, new = found
        raise ValueError(
            f"{run.logdir} holds a run of {run.saved} frames with {key}={old}, and {' '.join(run.overrides)} asks for {key}={new}: "
            "move it away, or put the new one elsewhere, for example with 'logdir=runs/other/${name}/seed${seed}'."
        )


def plan(arguments: Sequence[str]) -> list[Run]:
    """The runs of a grid; two of them in one directory are refused, and one where another has been trained."""
    return plan_rows([(arguments, None)])


def plan_rows(rows: Sequence[tuple[Sequence[str], float | None]]) -> list[Run]:
    """The runs of several grids, each with the bar of its runs."""
    runs: dict[Path, Run] = {}
    seeds: dict[tuple[str, int], Run] = {}
    variants: dict[str, tuple[Run, DictConfig]] = {}
    of_variant = [key for key in TRAINING if key != "seed"]
    with hydra.initialize_config_module("r2dreamer.configs", version_base=None):
        for overrides, bar in ((overrides, bar) for arguments, bar in rows for overrides in expand(arguments)):
            cfg = hydra.compose("config", list(overrides))
            check(cfg, "config")
            task = f"{cfg.env.suite}-{cfg.env.task}"
            run = Run(overrides, cfg.name, refuse_links(cfg.logdir), cfg.total_frames, task, bar)
            if run.logdir in runs:
                raise ValueError(
                    f"{' '.join(runs[run.logdir].overrides)} and {' '.join(overrides)} share logdir={run.logdir}: vary "
                    "the seed or an experiment with a name of its own (for a member of the family experiment=ablation_... or "
                    "member_...), or put what you vary into the name, for example 'name=lr-${algorithm.optimizer.lr}'."
                )
            other = seeds.setdefault((cfg.name, cfg.seed), run)
            if other is not run:
                raise ValueError(
                    f"{' '.join(other.overrides)} and {' '.join(overrides)} share name={cfg.name} and seed={cfg.seed}, and a "
                    "mean is over the seeds of one name: put what you vary into the name, for example "
                    "'name=lr-${algorithm.optimizer.lr}'."
                )
            if cfg.name not in variants:
                for name, (_, settings) in variants.items():
                    if not first_difference(settings, cfg, of_variant, overrides):
                        warn(f"name={name} and name={cfg.name} train the same: no setting of theirs differs.")
            first, settings = variants.setdefault(cfg.name, (run, cfg))
            if found := first_difference(settings, cfg, of_variant, overrides):
                key, old, new = found
                raise ValueError(
                    f"{' '.join(first.overrides)} with {key}={old} and {' '.join(overrides)} with {key}={new} share "
                    f"name={cfg.name}, and a mean is over the seeds of one name: give each a name of its own."
                )
            check_place(run, cfg)
            runs[run.logdir] = run
    return list(runs.values())

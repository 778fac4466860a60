"""What do latents know? World models learn from the same recorded episodes; linear readouts then ask them for facts.

python examples/latents.py tasks=[reacher] members=[r2dreamer,dreamer] shrinks=[1,paper] seeds=[0]
python examples/latents.py tasks=[reacher] shrinks=[1,1/2,1/3,1/4,1/6] seeds=[0,1]
python examples/latents.py suite=dmc_distracting tasks=[reacher_easy] members=[r2dreamer,dreamer,dreamerpro]
python examples/latents.py checkpoint=runs/dmc_subtle-reacher/seed0

A readout is a ridge regression to what the simulator knows (a target's place), scored by R2 on held-out episodes; a constant
scores 0. A script plays, so that no policy matters. Sizes (with frozen physics) and distractions change only what is seen, and
held-out episodes have backgrounds of their own. Beside the members stand an untrained model, raw pixels, and the other
facts, which show what one fact gives away about another.
The same command goes on where it was stopped: recordings, trained models and scores that exist are not made again.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from r2dreamer import configs
from r2dreamer.dreamer import Agent
from r2dreamer.envs.base.errors import unknown_task
from r2dreamer.envs.control.subtle import OFFICIAL
from r2dreamer.envs.suites.registry import suites
from r2dreamer.examples.cli.script import script
from r2dreamer.examples.readout.recording import record, recorded
from r2dreamer.examples.readout.report import rank, said, write_results
from r2dreamer.examples.readout.scores import baseline_scores, model_scores, train_world_model, varying
from r2dreamer.examples.settings.compose import configuration
from r2dreamer.examples.training.devices import resolve_device, resolve_precision
from r2dreamer.examples.training.files import make_output, replace, replace_text
from r2dreamer.examples.training.loading import load_trained
from r2dreamer.examples.training.origin import commit
from r2dreamer.examples.training.setup import build

BASELINES, UNTRAINED = "baselines", "untrained"  # stand in a member's place
READ = ("experiment", "env", "model", "algorithm", "batch_size", "timeout")  # of the trainer's settings
HELDOUT = 10_000  # from a seed of training episodes to that of held-out ones


@dataclass(frozen=True)
class Cell:
    """One world model, or the baselines, on one recording."""

    task: str
    level: float | str  # a size, or how difficult distractions are
    member: str
    seed: int

    @property
    def recording(self) -> str:
        return f"{self.task}-{said(self.level)}-seed{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.recording}-{self.member}"


def cells(cfg: DictConfig) -> list[Cell]:
    """In the order in which they are made: a seed after the other, a recording's baselines before its members."""
    known = suites()[cfg.suite].tasks()
    if unknown := [task for task in cfg.tasks if task not in known]:
        raise unknown_task(unknown[0], known, f"suite={cfg.suite}")
    algorithms = [path.stem for path in (Path(configs.__path__[0]) / "algorithm").glob("*.yaml") if path.stem != "base"]
    if unknown := [member for member in cfg.members if member not in algorithms]:
        raise ValueError(
            f"members names {unknown[0]!r}, which is no algorithm. There are: {', '.join(sorted(algorithms))}."
        )
    size = lambda task, shrink: OFFICIAL[task].shrink if shrink == "paper" else float(Fraction(str(shrink)))
    levels = lambda task: (
        cfg.difficulties if cfg.suite == "dmc_distracting" else [size(task, each) for each in cfg.shrinks]
    )
    return [
        Cell(task, level, member, seed)
        for seed, task in itertools.product(cfg.seeds, cfg.tasks)
        for level in dict.fromkeys(levels(task))
        for member in (BASELINES, UNTRAINED, *cfg.members)
    ]


def refuse_unread(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses a setting of the command line that says nothing beside the others."""
    of_grid = ["suite", "tasks", "shrinks", "difficulties", "members", "seeds", "overrides", "updates", "precision"]
    if cfg.checkpoint:
        unread, why = of_grid, f"checkpoint={cfg.checkpoint} asks that agent in its own task, and trains nothing"
    else:
        unread = ["shrinks" if cfg.suite == "dmc_distracting" else "difficulties"]
        why = f"suite={cfg.suite} has none"
    for override in cfg.overrides:
        own = {"precision": "precision", "threads": "threads", "device": "device", "seed": "seeds"}
        own |= {"algorithm": "members", "env": "suite", "env.task": "tasks"}
        own |= {"env.shrink": "shrinks", "env.difficulty": "difficulties"}
        key = override.partition("=")[0].lstrip("+~")
        if name := own.get(key):
            raise ValueError(f"overrides=[{override}] is not read: say {name}=... beside it.")
        if key.partition(".")[0] not in READ:
            raise ValueError(
                f"overrides=[{override}] is not read: a world model alone is trained, and of the trainer's settings it takes those of "
                f"{', '.join(READ)}. Leave it out."
            )
    for override in overrides:
        if override.partition("=")[0] in unread:
            raise ValueError(f"{override} is not read: {why}. Leave it out.")


def composed(cell: Cell, overrides: list[str]) -> DictConfig:
    """The trainer's configuration of a cell."""
    algorithm = "none" if cell.member in (BASELINES, UNTRAINED) else cell.member
    if isinstance(cell.level, float):
        env = ["env=dmc_subtle", f"env.shrink={cell.level}", "env.physics=frozen"]
    else:
        env = ["env=dmc_vision"] if cell.level == "none" else ["env=dmc_distracting", f"env.difficulty={cell.level}"]
    chosen = ["experiment=latents", *env, f"env.task={cell.task}", f"algorithm={algorithm}", f"seed={cell.seed}"]
    return configuration(*chosen, *overrides)


def result_path(cell: Cell, out: Path) -> Path:
    return out / "cells" / f"{cell.name.replace('/', '_')}.json"  # a run's name may have directories


def ask(cell: Cell, run: DictConfig, cfg: DictConfig, out: Path, trained: Agent | None = None) -> dict:
    """The result of a cell, from its file if there is one. trained: the agent of a checkpoint."""
    path = result_path(cell, out)
    if path.exists():
        return json.loads(path.read_text())
    start, losses, episodes = time.time(), {}, cfg.record.episodes
    make, make_evaluation = (hydra.utils.instantiate(run.env[name]) for name in ("make", "make_evaluation"))
    agent, keys = build(make_evaluation, run, resolve_device(cfg.device))

    def play():
        options = {key: value for key, value in cfg.record.items() if key not in ("episodes", "heldout")}
        trained_on = make, cell.seed, episodes
        scored_on = make_evaluation, HELDOUT + cell.seed, cfg.record.heldout
        parts = []
        for made, seed, count in (trained_on, scored_on):
            with closing(made(seed=seed)) as env:
                parts.append(record(env, keys, seed, episodes=count, progress=cfg.progress, **options))
        return torch.cat(parts)

    records = recorded(out / "records" / cell.recording, play)
    if not varying(records):
        raise ValueError(
            f"None of {cell.task}'s facts ({', '.join(records['facts'].keys())}) changes in the recorded episodes, so none "
            "can be asked for: give facts() that change, or record more episodes with record.episodes=N."
        )
    if cell.member == BASELINES:
        scores = baseline_scores(records, keys, episodes)
    else:
        if trained is None and cell.member != UNTRAINED:
            weights = out / "weights" / f"{cell.name}.pt"
            losses = fitted(agent, run, cfg, records[:episodes], weights)
        scores = model_scores(trained or agent, records, episodes)
    result = asdict(cell) | {"minutes": round((time.time() - start) / 60, 2), "scores": scores, "losses": losses}
    result |= {"command": shlex.join(["r2dreamer", "latents", *sys.argv[1:]]), "commit": commit()}
    replace_text(path, json.dumps(result))
    return result


def fitted(agent: Agent, run: DictConfig, cfg: DictConfig, records, path: Path) -> dict[str, float]:
    """Trains the agent's world model, or loads what was trained; the last losses."""
    if not path.exists():
        precision = resolve_precision(cfg.precision, resolve_device(cfg.device))
        amount = {"updates": cfg.updates, "batch_size": run.batch_size, "progress": cfg.progress}
        losses = train_world_model(agent, run.algorithm, records, run.seed, precision=precision, **amount)
        saved = {"weights": agent.world_model.state_dict(), "losses": losses}
        replace(path, lambda partial: torch.save(saved, partial))
    saved = torch.load(path, map_location="cpu", weights_only=True)
    agent.world_model.load_state_dict(saved["weights"])
    return saved["losses"]


def results_in(out: Path, members: Sequence[str]) -> list[dict]:
    """All results of a directory, also those of other commands: by task, size and member."""
    results = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("[!.]*.json"))]
    place = {member: number for number, member in enumerate(members)}
    order = lambda result: (
        result["task"], rank(result["level"]), place.get(result["member"], len(place)), result["seed"]
    )  # fmt: skip
    return sorted(results, key=order)


def claim(out: Path, settings: dict) -> None:
    """A directory holds results of one setting; whatever else is asked for goes elsewhere."""
    path = out / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else settings
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{out} holds results with {name}={before.get(name)}, and this command says {value}. Repeat the former, or "
                "give another directory with out=DIR."
            )
    make_output(out)
    replace_text(path, json.dumps(settings))


@script("latents", foreign=True)
def main(cfg: DictConfig) -> None:
    refuse_unread(cfg, HydraConfig.get().overrides.task if HydraConfig.initialized() else ())
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    given = OmegaConf.to_container(cfg)
    settings = {name: given[name] for name in ("suite", "record", "updates", "overrides", "precision")}
    if cfg.checkpoint:
        trained = load_trained(cfg.checkpoint, resolve_device(cfg.device), cfg.trust)
        run = trained.run
        out = trained.output(cfg.out, "latents")
        settings = {
            "record": settings["record"],
            "checkpoint": f"{trained.path.resolve()}, weights {trained.fingerprint}",
        }
        shrink = run.env.get("shrink") or (OFFICIAL[run.env.task].shrink if run.env.suite == "dmc_subtle" else 1)
        level = run.env.get("difficulty") or float(Fraction(str(shrink)))
        whose = [(BASELINES, None), (UNTRAINED, None), (run.name, trained.agent)]
        parts = [(Cell(run.env.task, level, name, run.seed), run, agent) for name, agent in whose]
    else:
        out = Path(cfg.out or "runs/latents")
        parts = [(cell, composed(cell, list(cfg.overrides)), None) for cell in cells(cfg)]
    claim(out, settings)  # last: a mistake above leaves no directory behind
    for number, (cell, run, trained) in enumerate(parts):
        made = not result_path(cell, out).exists()
        result = ask(cell, run, cfg, out, trained)
        read, scores = next(iter(result["scores"].items()))
        found = ", ".join(f"{fact} {score['r2']:.2f}" for fact, score in scores.items())
        print(f"[{number + 1}/{len(parts)}] {cell.name}, {read}: {found} ({result['minutes']} minutes)", flush=True)
        if made or number == len(parts) - 1:
            written = write_results(results_in(out, [BASELINES, UNTRAINED, *cfg.members]), out)
    print(*written, sep="\n")


if __name__ == "__main__":
    main()

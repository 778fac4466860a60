"""Saves a trained agent alone, as a folder: settings, weights in half precision, and a model card.

python examples/export.py runs/quickstart/seed0 my_agent
python examples/evaluate.py checkpoint=my_agent
python examples/export.py runs/quickstart/seed0 my_agent --push owner/name     # to the Hugging Face Hub, with the extra hub
python examples/export.py runs/quickstart/seed0 my_agent --play                # without the objective's heads: smaller
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
import torch
from omegaconf import OmegaConf

from r2dreamer.dreamer import ModelCard, push_to_hub
from r2dreamer.dreamer.folder import write_folder
from r2dreamer.examples.training.checkpoint import CheckpointError, Checkpoints, LoadedCheckpoint
from r2dreamer.examples.training.metrics import read_metrics
from r2dreamer.examples.training.saved_config import UNUSED, plain_config

PLAYS = "It has no heads of the objective: it acts and imagines, and is not for training on."
HALVED = "Its weights are in half precision; the run's were not, also where its return was measured."
EARLIER = "The return was measured at {:,} frames, the last time before the weights were saved."


def halved(value: Any) -> Any:
    """Nested dicts with every float32 tensor as float16 that fits into one."""
    if isinstance(value, dict):
        return {name: halved(each) for name, each in value.items()}
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    half = value.half()
    return value if half.isinf().any() and not value.isinf().any() else half


def describe(loaded: LoadedCheckpoint, name: str) -> ModelCard:
    """What the run says of its agent: the greedy return is the last one measured up to this checkpoint."""
    config, origin = loaded.state["config"], loaded.state.get("origin", {})
    place, returns, frame = loaded.path.resolve().parent, None, None
    logdir = place.parent
    if place.name == "checkpoints" and (logdir / "metrics.jsonl").exists():  # elsewhere no run stands around it
        for line in read_metrics(logdir, containing='"eval/return"'):
            if line["step"] <= loaded.step and {"eval/return", "eval/return_std"} <= line.keys():
                measured = line["eval/return"], line["eval/return_std"]
                returns, frame = None if None in measured else measured, line["step"]  # NaN is written as null
    limits = [HALVED] if returns is None or frame == loaded.step else [HALVED, EARLIER.format(frame)]
    return ModelCard(
        name=name,
        task=f"{config['env']['suite']}-{config['env']['task']}",
        returns=returns,
        episodes=None if returns is None else config["eval"]["episodes"],
        seed=config["seed"],
        frames=loaded.step,
        limits=limits,
        **origin,
    )


def without_heads(agent: dict[str, Any]) -> dict[str, Any]:
    """What acts and imagines alone."""
    heads = agent["recipe"].get("heads") or {"projection": None}  # as build_agent has it
    weights = {part: value for part, value in agent["weights"].items() if part not in heads}
    return {**agent, "recipe": {**agent["recipe"], "heads": {}}, "weights": weights, "more_heads": {}}


def export(run: Path, out: Path, name: str | None = None, *, play: bool = False) -> Path:
    """Writes what a run's newest checkpoint, or one particular checkpoint, knows of its agent to a directory of its own.

    name: in place of the run's.
    play: leaves out the heads of the objective.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or give another directory.")
    loaded = Checkpoints(run).load(run, replay=False)
    assert loaded is not None  # of a path it would have raised
    if not {"agent", "config"} <= loaded.state.keys():
        raise ValueError(f"{loaded.path} holds {sorted(loaded.state)}; it was not saved by examples/train.py.")
    config: Any = OmegaConf.to_container(plain_config(loaded.state["config"], loaded.path))
    config = {key: value for key, value in config.items() if key not in UNUSED}
    card = describe(loaded, name or config["name"])
    agent = halved(loaded.state["agent"])
    if play:
        agent, card = without_heads(agent), replace(card, limits=[*card.limits, PLAYS])
    config["name"] = card.name
    config["logdir"] = f"runs/{card.name}/seed{config['seed']}"  # where it was trained says nothing elsewhere
    config["replay"]["place"]["directory"] = f"{config['logdir']}/replay"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            whole = Path(folder) / "agent"
            write_folder(whole, agent, card.text(agent), {"frames": loaded.step, "run": config})
            whole.rename(out)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}. Give another directory.") from error
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, help="a run's directory (its newest checkpoint), or one particular checkpoint"
    )
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--name", help="the agent's name, in place of the run's")
    parser.add_argument(
        "--play", action="store_true", help="leaves out the objective's heads, which only training needs"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="uploads the directory to the Hugging Face Hub, too")
    parser.add_argument("--private", action="store_true", help="of a repository that --push makes")
    arguments = parser.parse_args()
    if arguments.private and not arguments.push:
        parser.error("--private is of a repository: add --push OWNER/NAME, or leave it out")
    try:
        out = export(arguments.run, arguments.out, arguments.name, play=arguments.play)
        size = sum(file.stat().st_size for file in out.iterdir())
        print(f"{out}: {size / 1e6:.1f} MB")
        if arguments.push:
            print(push_to_hub(out, arguments.push, private=arguments.private))
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

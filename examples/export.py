"""Saves a trained agent alone: weights in half precision and settings, for evaluate.py and load_pretrained.

python examples/export.py runs/quickstart/seed0 my_agent
python examples/evaluate.py checkpoint=my_agent
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
import torch

from r2dreamer.examples.training.checkpoint import CheckpointError, Checkpoints


def halved(value: Any, done: dict[int, torch.Tensor]) -> Any:
    """Nested dicts and lists with every float32 tensor as float16; what is one tensor stays one."""
    if isinstance(value, dict):
        return {name: halved(each, done) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [halved(each, done) for each in value]
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    key = (value.data_ptr(), value.shape)
    if key not in done:
        half = value.half()
        done[key] = value.clone() if half.isinf().any() and not value.isinf().any() else half
    return done[key]


def export(run: Path, out: Path, name: str | None = None) -> Path:
    """Writes what a run's newest checkpoint, or one particular checkpoint, knows of its agent to a directory of its own.

    name: in place of the run's.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or give another directory.")
    loaded = Checkpoints(run).load(run, replay=False)
    if not {"agent", "config", "learner"} <= loaded.state.keys():
        raise ValueError(f"{loaded.path} holds {sorted(loaded.state)}; it was not saved by examples/train.py.")
    config = loaded.state["config"]
    config["name"] = name or config["name"]
    config["logdir"] = f"runs/{config['name']}/seed{config['seed']}"  # where it was trained says nothing elsewhere
    config["replay"]["place"]["directory"] = f"{config['logdir']}/replay"
    weights = halved({"agent": loaded.state["agent"], "model": loaded.state["learner"]["model"]}, {})
    state = {"agent": weights["agent"], "config": config, "learner": {"model": weights["model"]}}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        Checkpoints(folder).save(loaded.step, state, rng=False).rename(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, help="a run's directory (its newest checkpoint), or one particular checkpoint"
    )
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--name", help="the agent's name, in place of the run's")
    arguments = parser.parse_args()
    try:
        out = export(arguments.run, arguments.out, arguments.name)
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(str(error))
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

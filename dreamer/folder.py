"""An agent as a folder, which holds text and numbers and nothing pickled.

config.yaml         what builds the agent: observations, actions, recipe; and the settings of its run, where known
model.safetensors   its weights: encoder.vector.layers.0.weight, rssm.0.core.belief_in.0.weight, ...
README.md           its model card (card.py)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, CARD = "config.yaml", "model.safetensors", "README.md"
FILES = (CONFIG, WEIGHTS, CARD)
FORMAT = 1
SECTIONS = {"observations": dict, "actions": dict, "recipe": dict}


def write_folder(directory: Path, packed: Mapping[str, Any], card: str, more: Mapping[str, Any]) -> None:
    """Writes what `pack` made of an agent.

    more: further entries of the configuration, plain data.
    """
    heads = packed["more_heads"]
    if taken := {"format", "heads", *SECTIONS} & more.keys():
        raise ValueError(f"more has {', '.join(map(repr, sorted(taken)))}, which are the agent's own: rename them.")
    config = {"format": FORMAT, **{name: packed[name] for name in SECTIONS}}
    config |= {"heads": {name: head["recipe"] for name, head in heads.items()}, **more}
    try:
        config = json.loads(json.dumps(config))  # lists in place of tuples, and every section written out
    except TypeError as error:
        raise ValueError(f"A recipe holds text, numbers, lists and dicts alone ({error}).") from error
    for file in (directory / name for name in FILES):
        if file.is_symlink():
            raise ValueError(f"{file} is a link to {os.readlink(file)}, which would be overwritten: remove the link.")
        if file.exists() and not (directory / WEIGHTS).exists():
            raise ValueError(f"{file} is of something else, and would be overwritten: save to a folder of its own.")
    directory.mkdir(parents=True, exist_ok=True)
    parts = {**packed["weights"], **{name: head["weights"] for name, head in heads.items()}}
    tensors = {f"{part}.{name}": value for part, weights in parts.items() for name, value in weights.items()}
    # Each tensor by itself: the format refuses those that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    partial = directory / f".{WEIGHTS}"
    partial.unlink(missing_ok=True)  # what is left of a failure, or a link
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(directory / WEIGHTS)
    (directory / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    shutil.copymode(directory / CONFIG, directory / WEIGHTS)  # save_file's is for the owner alone
    (directory / CARD).write_text(card, encoding="utf-8")


def read_folder(directory: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """What `unpack` takes, and the whole configuration."""
    config = read_config(directory)
    path = directory / WEIGHTS
    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ValueError(
            f"{path} is no whole file of safetensors ({error}). It is damaged, or something else has that name; nothing in "
            "it was executed."
        ) from error
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        weights.setdefault(part, {})[rest] = value
    heads = {name: {"recipe": recipe, "weights": weights.pop(name, {})} for name, recipe in config["heads"].items()}
    return {**{name: config[name] for name in SECTIONS}, "weights": weights, "more_heads": heads}, config


class _Plain(yaml.SafeLoader):
    """Text, numbers, lists and dicts without aliases: an alias can make a cycle, or a small file an endless one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias in line {self.peek_event().start_mark.line + 1}; a saved agent has none")
        return super().compose_node(parent, index)


def read_config(directory: Path) -> dict[str, Any]:
    """The settings of a saved agent, read as YAML without tags."""
    path = directory / CONFIG
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _Plain)
    except FileNotFoundError:
        raise ValueError(f"{directory} has {WEIGHTS} and no {CONFIG}, which says what agent they are of.") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if isinstance(config, dict) and config.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{path} has format {config['format']}, and this version reads {FORMAT}: use the version that wrote it."
        )
    for name, kind in {"format": int, **SECTIONS}.items():
        if not isinstance(config, dict) or not isinstance(config.get(name), kind):
            raise ValueError(f"{path} describes no agent: it has no {name}. save_pretrained and export write one.")
    if not isinstance(config.setdefault("heads", {}), dict):
        raise ValueError(f"{path} describes no agent: its heads are a {type(config['heads']).__name__}.")
    return config

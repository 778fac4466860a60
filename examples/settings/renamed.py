"""Keys and classes by their former names: a command is told the new one, a saved configuration is read with it."""

from __future__ import annotations

from typing import Any

KEYS = {
    "probe_decoder": "detached_decoder",
    "algorithm.probe": "algorithm.detached_decoder",
    "other.probe": "other.detached_decoder",
}
CLASSES = {"r2dreamer.losses.ProbeDecoder.of": "r2dreamer.losses.DetachedDecoder.of"}


def new_name(key: str) -> str | None:
    """What a key, or the section around it, is called; None if that is no former name."""
    for old, new in KEYS.items():
        if f"{key}.".startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def with_new_names(value: Any, prefix: str = "") -> Any:
    """A plain configuration of an earlier version, under the names of this one."""
    if isinstance(value, dict):
        named = {name: new_name(f"{prefix}{name}") for name in value}
        return {
            new.rpartition(".")[2] if (new := named[name]) else name: with_new_names(entry, f"{prefix}{name}.")
            for name, entry in value.items()
        }
    return CLASSES.get(value, value) if isinstance(value, str) else value

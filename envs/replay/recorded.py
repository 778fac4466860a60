"""Episodes that other programs recorded on disk, as transitions: TorchRL's memory-mapped tensordicts, and Minari's data sets.

Files are read as numbers and text; nothing pickled is loaded, and no name in them is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from ..base.errors import require

PLAIN = ("<class 'tensordict._td.TensorDict'>", "<class 'tensordict.TensorDict'>")
TRAJECTORIES = (("collector", "traj_ids"), "traj_ids")  # keys that TorchRL's collectors number trajectories in


def recorded_episodes(path: Path, keys: Iterable[NestedKey]) -> Iterator[TensorDict] | None:
    """Transitions ``[n]`` of one episode after the other; None where the folder is of neither kind.

    An episode begins with ``is_init``, except one whose beginning was not recorded; its last transition is done.

    Args:
        path: what `TensorDict.memmap`, a memory-mapped storage's or a replay buffer's `dumps` wrote, or a Minari data set.
        keys: of the observations that are wanted.
    """
    keys = [unravel_key(key) for key in keys]
    for folder in (path, path / "storage"):
        if (folder / "meta.json").is_file():
            return _torchrl_episodes(folder, keys)
    for folder in (path, path / "data"):
        if (folder / "metadata.json").is_file():
            return _minari_episodes(folder, keys)
    return None


def recorded_task(path: Path) -> str | None:
    """The Gymnasium task that a Minari data set says it is of."""
    for file in (path / "metadata.json", path / "data" / "metadata.json"):
        if file.is_file() and (told := json.loads(file.read_text()).get("env_spec")):
            return json.loads(told).get("id")
    return None


# TorchRL


def _torchrl_episodes(folder: Path, keys: list[NestedKey]) -> Iterator[TensorDict]:
    data = read_memmap(folder)
    size = folder / "storage_metadata.json"
    if size.is_file():
        data = _in_order(data, json.loads(size.read_text())["len"], folder.parent / "writer" / "metadata.json")
    needed = ["action", ("next", "reward"), *keys, *(unravel_key(("next", key)) for key in keys)]
    known = set(data.keys(True, True))
    if lacking := [key for key in needed if key not in known]:
        raise ValueError(f"{folder} lacks {_names(lacking)}; it holds {_names(known)}.")
    if data.ndim < 1:
        raise ValueError(f"{folder} holds one tensordict without a batch: record transitions [T] or [N, T].")
    number = next((key for key in TRAJECTORIES if key in known), None)
    for row in data.reshape(-1, data.shape[-1]).unbind(0) if data.ndim > 1 else [data]:
        trajectory = torch.zeros(len(row)) if number is None else _column(row, number)
        order = trajectory.argsort(stable=True)  # steps of several environments may take turns
        if number is not None and not torch.equal(order, torch.arange(len(row))):
            row, trajectory = row[order], trajectory[order]
        for start, end, flags in _parts(row, trajectory):
            episode = cast(TensorDict, row[start:end]).select(*needed).clone()
            _refuse_gaps(episode, keys, folder, start)
            episode["next", "reward"] = episode["next", "reward"].reshape(-1, 1)
            for key, value in flags.items():
                episode[key] = value.unsqueeze(-1)
            yield episode


def _column(row: TensorDictBase, key: NestedKey) -> torch.Tensor:
    return cast(Any, row)[key].unsqueeze(-1).flatten(1)[:, 0]  # [T]


def _parts(row: TensorDictBase, trajectory: torch.Tensor) -> Iterator[tuple[int, int, dict[NestedKey, torch.Tensor]]]:
    """Where the episodes of transitions ``[T]`` begin and end, with their flags ``[n]``."""
    given = row.keys(True, True)
    flag = lambda key: _column(row, key).bool() if key in given else None
    terminated, truncated, done = (flag(("next", key)) for key in ("terminated", "truncated", "done"))
    none = torch.zeros(len(row), dtype=torch.bool)
    truncated = none if truncated is None else truncated
    if done is None:
        done = truncated if terminated is None else truncated | terminated
    terminated = done & ~truncated if terminated is None else terminated
    begins = torch.cat([~none[:1], done[:-1] | (trajectory[1:] != trajectory[:-1])])
    is_init = flag("is_init")
    is_init = begins if is_init is None else is_init
    starts = (begins | is_init).nonzero()[:, 0].tolist()
    for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
        last = torch.arange(start, end) == end - 1  # the end of the recording, where not of the episode
        flags: dict[NestedKey, torch.Tensor] = {"is_init": is_init[start:end].clone(), ("next", "done"): last}
        flags["next", "terminated"] = terminated[start:end] & last
        flags["next", "truncated"] = last & (truncated[start:end] | ~terminated[start:end])
        yield start, end, flags


def _refuse_gaps(episode: TensorDictBase, keys: list[NestedKey], folder: Path, start: int) -> None:
    for key in keys:
        after, before = (cast(Any, part)[key] for part in (episode["next"][:-1], episode[1:]))
        broken = after.ne(before).unsqueeze(-1).flatten(1).any(-1)
        if broken.any():
            raise ValueError(
                f"{folder}: the step after step {start + int(broken.nonzero()[0])} does not begin with the {key!r} that it ended "
                "with, and no episode ended there. Record each environment in a row of its own, [N, T], or with the "
                "collector's traj_ids."
            )


def read_memmap(folder: Path) -> TensorDict:
    """A memory-mapped tensordict of plain tensors; what else it holds is left out."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        if meta["_type"] not in PLAIN:
            raise ValueError(f"its type is {meta['_type']}, expected a TensorDict of tensors")
        found = TensorDict({}, batch_size=meta["shape"])
        for key, entry in meta.items():
            if not isinstance(entry, Mapping) or Path(key).name != key:
                continue
            if (folder / key / "meta.json").is_file():
                if json.loads((folder / key / "meta.json").read_text()).get("_type") in PLAIN:
                    found[key] = read_memmap(folder / key)
            elif {"dtype", "shape"} <= entry.keys():
                found[key] = _read_tensor(folder / f"{key}.memmap", entry)
    except (KeyError, TypeError, AttributeError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{path} describes no memory-mapped tensordict that can be read: {error}") from error
    return found


def _read_tensor(path: Path, entry: Mapping[str, Any]) -> torch.Tensor:
    dtype, count = getattr(torch, entry["dtype"].removeprefix("torch.")), math.prod(entry["shape"])
    if path.stat().st_size < count * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes of {count * dtype.itemsize}")
    if not count:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype).reshape(entry["shape"])


def _in_order(data: TensorDict, length: int, writer: Path) -> TensorDict:
    """What a storage has of its `length`, the oldest first: a full one is written round and round."""
    if data.ndim > 1 or length < len(data) or not writer.is_file():
        return data[:length]
    cursor = json.loads(writer.read_text()).get("cursor", 0) % length
    return torch.cat([data[cursor:], data[:cursor]]) if cursor else data


# Minari


def _minari_episodes(folder: Path, keys: list[NestedKey]) -> Iterator[TensorDict]:
    meta = json.loads((folder / "metadata.json").read_text())
    if not {"observation_space", "action_space"} <= meta.keys():  # Minari would make the environment that it names
        raise ValueError(f"{folder} does not say its spaces: write the data set with Minari 0.5 or newer.")
    require("minari", "minari")
    from gymnasium.spaces import Box, Discrete  # noqa: PLC0415
    from minari.dataset.minari_storage import MinariStorage  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    storage = MinariStorage.read(folder)
    space = storage.action_space
    if isinstance(space, Box) and not ((space.low == -1).all() and (space.high == 1).all()):
        raise ValueError(
            f"{folder} has actions between {space.low.min():g} and {space.high.max():g}, and ours are in [-1, 1]. Record it with "
            "gymnasium.wrappers.RescaleAction(env, -1, 1)."
        )
    for episode in storage.get_episodes(range(storage.total_episodes)):
        observations = episode["observations"]
        if not isinstance(observations, Mapping):
            if len(keys) != 1:
                raise ValueError(
                    f"{folder} holds one kind of observation without a name, and {_names(keys)} are wanted."
                )
            observations = {keys[0]: observations}
        if lacking := [key for key in keys if key not in observations]:
            raise ValueError(f"{folder} lacks {_names(lacking)}; it holds {_names(observations)}.")
        seen = {key: torch.from_numpy(np.ascontiguousarray(observations[key])) for key in keys}  # [n + 1, ...]
        actions = torch.from_numpy(np.ascontiguousarray(episode["actions"]))
        if isinstance(space, Discrete):
            actions = torch.nn.functional.one_hot(actions.long() - int(space.start), int(space.n))
        count = len(actions)
        names = {"terminated": "terminations", "truncated": "truncations"}
        flags = {key: torch.tensor(np.asarray(episode[name], bool)) for key, name in names.items()}
        flags["truncated"][-1] |= ~flags["terminated"][-1]  # a recording ends where it was stopped
        flags["done"] = flags["terminated"] | flags["truncated"]
        reward = torch.from_numpy(np.asarray(episode["rewards"], np.float32))
        nxt = {**{key: value[1:] for key, value in seen.items()}, "reward": reward[:, None]}
        nxt |= {key: value[:, None] for key, value in flags.items()}
        root = {**{key: value[:-1] for key, value in seen.items()}, "action": actions}
        yield TensorDict({**root, "is_init": torch.arange(count)[:, None] == 0, "next": nxt}, [count])


def _names(keys: Iterable[NestedKey]) -> str:
    return ", ".join(sorted(repr(key) for key in keys))

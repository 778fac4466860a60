"""Episodes that other programs recorded on disk, as transitions: TorchRL's memory-mapped tensordicts, and Minari's data sets.

Files are read as numbers and text; nothing pickled is loaded, and no name in them is imported.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from ..base.errors import require

PLAIN = ("<class 'tensordict._td.TensorDict'>", "<class 'tensordict.TensorDict'>")
MASKS = (("collector", "mask"), "mask")  # that split_trajectories writes: what is no padding
ENDS = (("next", "terminated"), ("next", "truncated"), ("next", "done"))
TRAJECTORIES = (("collector", "traj_ids"), "traj_ids")  # keys that TorchRL's collectors number trajectories in


def recorded_episodes(path: str | os.PathLike, keys: Iterable[NestedKey]) -> Iterator[TensorDict] | None:
    """Transitions ``[n]`` of one episode after the other; None where the folder is of neither kind.

    An episode begins with ``is_init``, except one whose beginning was not recorded; its last transition is done.

    Args:
        path: what `TensorDict.memmap`, a memory-mapped storage's or a replay buffer's `dumps` wrote, or a Minari data set.
        keys: of the observations that are wanted.
    """
    path, keys = Path(path), [unravel_key(key) for key in ([keys] if isinstance(keys, str) else keys)]
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
    data, overwritten = read_memmap(folder), False
    needed = ["action", ("next", "reward"), *keys, *(unravel_key(("next", key)) for key in keys)]
    known = set(data.keys(True, True))
    if lacking := [key for key in needed if key not in known]:
        raise ValueError(f"{folder} lacks {_names(lacking)}; it holds {_names(known)}.")
    if data.ndim < 1:
        raise ValueError(f"{folder} holds one tensordict without a batch: record transitions [T] or [N, T].")
    size = folder / "storage_metadata.json"
    if size.is_file():
        data, overwritten = _in_order(data, json.loads(size.read_text())["len"], folder, "is_init" in known)
    number = next((key for key in TRAJECTORIES if key in known), None)
    masks = [cast(Any, data)[key] for key in MASKS if key in known and key not in keys]
    mask = next((each for each in masks if each.dtype == torch.bool and each.shape == data.shape), None)
    rows, length = data.reshape(-1, data.shape[-1]), data.shape[-1]
    for row, real in zip(rows, [None] * len(rows) if mask is None else mask.reshape(-1, length), strict=True):
        row = row if real is None else row[real]
        if not len(row):
            continue
        trajectory = torch.zeros(len(row)) if number is None else _column(row, number)
        order = trajectory.argsort(stable=True)  # steps of several environments may take turns
        lost = trajectory[:0] if not overwritten else _under_way(trajectory, _ends(row)[2])
        if number is not None and not torch.equal(order, torch.arange(len(row))):
            row, trajectory = row[order], trajectory[order]
        parts = list(_parts(row, trajectory, lost))
        if len(parts) > 1 and not known & set(ENDS):
            raise ValueError(
                f"{folder} holds {len(parts)} episodes and none of {_names(ENDS)}: it does not say which of them terminate. "
                "Record these flags, too."
            )
        for start, end, flags in parts:
            episode = cast(TensorDict, row[start:end]).select(*needed).clone()
            _refuse_gaps(episode, keys, folder, start)
            episode["next", "reward"] = episode["next", "reward"].reshape(-1, 1)
            for key, value in flags.items():
                episode[key] = value.unsqueeze(-1)
            yield episode


def _under_way(trajectory: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
    """The trajectories that may have begun before the first step: as many as ever ran at once.

    Collectors count trajectories as they begin, so these have the lowest numbers. Where numbers have another meaning, these
    appear first.
    """
    numbers, which = trajectory.unique(return_inverse=True)
    steps = torch.arange(len(which))
    first = torch.full([len(numbers)], len(which)).scatter_reduce(0, which, steps, "amin")
    begun = torch.zeros_like(steps).index_fill(0, first, 1).cumsum(0)
    running = begun - (done.long().cumsum(0) - done.long())
    count = max(1, int(running.max()))
    return torch.cat([numbers[:count], numbers[first.argsort()[:count]]])


def _column(row: TensorDictBase, key: NestedKey) -> torch.Tensor:
    return cast(Any, row)[key].unsqueeze(-1).flatten(1)[:, 0]  # [T]


def _ends(row: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where transitions ``[T]`` are terminated, truncated, done."""
    given = row.keys(True, True)
    terminated, truncated, done = (_column(row, key).bool() if key in given else None for key in ENDS)
    truncated = torch.zeros(len(row), dtype=torch.bool) if truncated is None else truncated
    if done is None:
        done = truncated if terminated is None else truncated | terminated
    return done & ~truncated if terminated is None else terminated, truncated, done


def _parts(
    row: TensorDictBase, trajectory: torch.Tensor, lost: torch.Tensor
) -> Iterator[tuple[int, int, dict[NestedKey, torch.Tensor]]]:
    """Where the episodes of transitions ``[T]`` begin and end, with their flags ``[n]``.

    Args:
        lost: the trajectories whose first step may follow one that is not here.
    """
    terminated, truncated, done = _ends(row)
    first = torch.cat([torch.ones(1, dtype=torch.bool), trajectory[1:] != trajectory[:-1]])  # of each trajectory
    begins = first.clone()
    begins[1:] |= done[:-1]
    if "is_init" in row.keys():
        is_init = _column(row, "is_init").bool()
    else:
        is_init = begins & ~(first & torch.isin(trajectory, lost))
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
        differs = after.ne(before)
        if after.is_floating_point():
            differs &= ~after.isnan()  # that is no gap; `prefill` says what it is
        broken = differs.unsqueeze(-1).flatten(1).any(-1)
        if broken.any():
            raise ValueError(
                f"{folder}: the step after step {start + int(broken.nonzero()[0])} does not begin with the {key!r} that it ended "
                "with, and no episode ended there. Record each environment in a row of its own, [N, T], or with the "
                "collector's traj_ids."
            )


def read_memmap(folder: Path, root: Path | None = None) -> TensorDict:
    """A memory-mapped tensordict of plain tensors; what else it holds is left out. All files lie in `root`, or here."""
    path, root = folder / "meta.json", root or folder
    try:
        meta = json.loads(_inside(path, root).read_text())
        if meta["_type"] not in PLAIN:
            raise ValueError(f"its type is {meta['_type']}, expected a TensorDict of tensors")
        found = TensorDict({}, batch_size=meta["shape"])
        for key, entry in meta.items():
            if not isinstance(entry, Mapping):
                continue
            if key == ".." or Path(key).name != key:
                raise ValueError(f"{key!r} is no name of a file in it")
            if (folder / key / "meta.json").is_file():
                inner = _inside(folder / key / "meta.json", root)
                if json.loads(inner.read_text()).get("_type") in PLAIN:
                    found[key] = read_memmap(folder / key, root)
            elif {"dtype", "shape"} <= entry.keys():
                found[key] = _read_tensor(_inside(folder / f"{key}.memmap", root), entry)
    except (KeyError, TypeError, AttributeError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{path} describes no memory-mapped tensordict that can be read: {error}") from error
    return found


def _inside(path: Path, root: Path) -> Path:
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} is a link to {path.resolve()}, outside of {root}: copy the file there.")
    return path


def _read_tensor(path: Path, entry: Mapping[str, Any]) -> torch.Tensor:
    dtype, count = getattr(torch, entry["dtype"].removeprefix("torch.")), math.prod(entry["shape"])
    if path.stat().st_size < count * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes of {count * dtype.itemsize}")
    if not count:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype).reshape(entry["shape"])


def _in_order(data: TensorDict, length: int, folder: Path, says_beginnings: bool) -> tuple[TensorDict, bool]:
    """What a storage has, the oldest step first, as ``[T]`` or ``[N, T]``; whether it has overwritten older steps.

    A storage counts its items: steps ``[T]`` or rows ``[N, T]``. One of several dimensions has time first, ``[T, N]``, and
    counts all elements. Its writer counts along the first dimension.
    """
    size, width, writer = len(data), math.prod(data.shape[1:]), folder.parent / "writer" / "metadata.json"
    told = json.loads(writer.read_text()) if writer.is_file() else {}
    written = told.get("write_count")
    if data.ndim > 1 and width > 1 and length <= size and length % width == 0 and written is None:
        raise ValueError(f"{folder} does not say whether it holds {length} rows or steps: dump its replay buffer.")
    if written is None:
        turned = data.ndim > 1 and length % width == 0
    else:
        turned = data.ndim > 1 and length == min(written, size) * width
    if data.ndim > 1 and not turned:
        return data[:length], False  # each row stands for itself
    count = length // width
    if count == size and "cursor" not in told and not says_beginnings:
        raise ValueError(f"{folder} is full and does not say where its oldest step is: dump its replay buffer.")
    cursor = told.get("cursor", 0) % size if count == size else 0
    data = torch.cat([data[cursor:], data[:cursor]]) if cursor else data[:count]
    overwritten = count == size and (written is None or written > size)
    return data.reshape(count, width).transpose(0, 1) if turned else data, overwritten


# Minari


def _minari_episodes(folder: Path, keys: list[NestedKey]) -> Iterator[TensorDict]:
    meta = json.loads((folder / "metadata.json").read_text())
    if not {"observation_space", "action_space"} <= meta.keys():  # Minari would make the environment that it names
        raise ValueError(f"{folder} does not say its spaces: write the data set with Minari 0.5 or newer.")
    require("minari", "minari")
    from gymnasium.spaces import Box, Discrete  # noqa: PLC0415
    from minari.dataset.minari_storage import MinariStorage  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    _refuse_links(folder)
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


def _refuse_links(folder: Path) -> None:
    """Neither links in the folder nor HDF5's own may lead outside of it."""
    for path in folder.rglob("*"):
        _inside(path, folder)
    file = folder / "main_data.hdf5"
    if file.is_file():
        import h5py  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

        def elsewhere(name: str, found: Any) -> str | None:
            linked = isinstance(found, h5py.ExternalLink)
            return name if linked or getattr(found, "external", None) or getattr(found, "is_virtual", False) else None

        with h5py.File(file) as opened:
            name = opened.visititems_links(elsewhere) or opened.visititems(elsewhere)
        if name:
            raise ValueError(f"{file} takes {name!r} from another file: copy the data into it.")


def _names(keys: Iterable[NestedKey]) -> str:
    return ", ".join(sorted(repr(key) for key in keys))

"""Replay of records (see `records.py`): windows drawn uniformly, latents written back after each update.

Built of TorchRL's storages, generation-tracking writer and `update_if_present`; `rings.py` says where records lie.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose

from ..base.errors import require_positive
from .place import folder_of, locked
from .rings import RingWriter, StreamRings, WindowSampler


class RecordReplay(TensorDictReplayBuffer):
    """A TorchRL replay buffer of records; `make_replay` builds it.

    `sample()` gives the ``[B, T]`` records to train on, with the latents to start from at the root.

    Example:
        >>> from r2dreamer.envs import RecordBuilder, make_probe
        >>> from torchrl.collectors import Collector
        >>> collector = Collector(make_probe("ending", seed=0), frames_per_batch=60, total_frames=120)
        >>> builder = RecordBuilder(1, ["pixels"], latent_sizes={"state": 12, "belief": 8})
        >>> replay = make_replay(capacity=1000, num_streams=1, batch_size=4, batch_length=5)
        >>> for transitions in collector:
        ...     _ = replay.extend(builder(transitions))
        >>> batch = replay.sample()
        >>> batch["next", "pixels"].shape, batch["belief"].shape
        (torch.Size([4, 5, 3, 64, 64]), torch.Size([4, 5, 8]))
    """

    _storage: LazyTensorStorage  # memory-mapped or not
    _writer: RingWriter
    _transform: Compose
    _batch_size: int

    def __init__(
        self,
        storage: LazyTensorStorage,
        rings: StreamRings,
        batch_size: int,
        batch_length: int,
        latent_keys: Iterable[NestedKey],
        latent_dtype: torch.dtype,
    ):
        self.rings = rings
        self.latent_keys = [unravel_key(key) for key in latent_keys]
        self.latent_dtype = latent_dtype
        slots = rings.num_streams * rings.length
        # What a checkpoint has to save: records written (or truncated), and latents written back, since the last one.
        self.changed_records = torch.zeros(slots, dtype=torch.bool)
        self.changed_latents = torch.zeros(slots, dtype=torch.bool)
        self.times_cleared = 0  # tells a journal whether it was the last to save the changes
        sampler = WindowSampler(rings, batch_length + 1)
        super().__init__(storage=storage, sampler=sampler, writer=RingWriter(rings), batch_size=batch_size)

    def __len__(self) -> int:
        return int(self.rings.stored.sum())

    @property
    def stream_lengths(self) -> torch.Tensor:
        return self.rings.stored  # [num_streams]

    @property
    def stored(self) -> TensorDictBase:
        """All slots written so far, as a view of the storage."""
        return self._storage.get(slice(None))

    def add(self, record: TensorDictBase) -> torch.Tensor:
        return self.extend(record.unsqueeze(0))[0]

    def extend(self, records: TensorDictBase, *, update_priority: bool | None = None) -> torch.Tensor:
        """Appends records, each to its own stream; returns their slots."""
        records = records.copy()
        for key in self.latents_in(records):
            records[key] = records[key].to(self.latent_dtype)
        if self._storage.initialized:
            have, given = (set(td.keys(True, True)) for td in (self.stored, records.exclude("stream", "index")))
            if have != given:
                raise ValueError(
                    f"records with other entries than those stored: {sorted(map(str, have ^ given))}. If the policy "
                    "writes no latents while the replay fills, give RecordBuilder their latent_sizes."
                )
        slots = super().extend(records.exclude("index"), update_priority=False)
        self.changed_records[slots] = True
        return slots

    def sample(
        self, batch_size: int | None = None, return_info: bool = False, *, device: torch.device | str | None = None
    ) -> TensorDict | tuple[TensorDict, dict[str, torch.Tensor]]:
        """Draws B windows of T+1 records; the first one only gives the latents to start from.

        Returns ``[B, T]``: the records, ``"state"`` and ``"belief"`` float32 at the root (those at the *previous*
        record), ``"index"`` and ``"index_generation"`` for `write_back`.
        """
        with self._replay_lock:
            index, _ = self._sampler.sample(self._storage, batch_size or self._batch_size)  # [B, T+1]
            info = {"index": index[:, 1:], "index_generation": self._writer.generations_of(index[:, 1:])}
            stored = self.stored
            latents = self.latents_in(stored)
            batch = _gather(stored.exclude(*latents), index[:, 1:])
            previous = _gather(stored.select(*latents), index[:, :-1])
        if device is not None:
            batch, previous = (td.to(device, non_blocking=True) for td in (batch, previous))
        if latents:
            batch.update(previous["next"].to(torch.float32))
        batch = self._transform(batch) if len(self._transform) else batch
        batch.update(info)
        return (batch, info) if return_info else batch

    def write_back(
        self,
        batch: TensorDictBase,
        state: torch.Tensor | None = None,
        belief: torch.Tensor | None = None,
        **latents: torch.Tensor,
    ) -> int:
        """Stores new posterior latents ``[B, T, ...]`` of a batch's records, unless they were overwritten meanwhile.

        Where windows of a batch overlap the last one counts. Returns how many records were updated.

        Args:
            latents: those that ``latent_keys`` names otherwise.
        """
        values = {
            **latents,
            **{key: value for key, value in (("state", state), ("belief", belief)) if value is not None},
        }
        if set(values) != set(self.latent_keys):
            raise ValueError(f"write_back got {sorted(values)}, and this replay's latent_keys are {self.latent_keys}.")
        steps = batch["index"].shape
        for key, value in values.items():
            if value.shape[: len(steps)] != steps:
                raise ValueError(
                    f"write_back got {key!r} of shape {list(value.shape)}, expected {list(steps)} first: the latents of the "
                    "batch's records, in their order."
                )
        index = batch["index"].reshape(-1).cpu()  # [B*T]
        ordered, order = index.sort(stable=True)
        is_last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])
        rows = order[is_last]
        patch: dict[NestedKey, torch.Tensor] = {
            ("next", key): value.detach().flatten(0, 1).to(self.latent_dtype).to(self._storage.device)[rows]
            for key, value in values.items()
        }
        generation = batch["index_generation"].reshape(-1).cpu()[rows]
        result = self.update_if_present(index=index[rows], generation=generation, patch=patch)
        self.changed_latents[index[rows][result.updated.cpu()]] = True
        return result.updated_count

    def truncate_streams(self) -> None:
        """Marks the newest record of every stream as the end of its episode: the environments are being restarted.

        Otherwise rewards and values would mix across the seam.
        """
        streams = self.rings.stored.nonzero().squeeze(-1)
        if not len(streams):
            return
        slots = self.rings.slots(streams, self.rings.written[streams] - 1)
        done = self.stored["next", "done"]
        slots = slots[~done[slots.to(done.device)].cpu().squeeze(-1)]
        for key in ("done", "truncated"):
            self.stored["next", key][slots.to(done.device)] = True
        self.changed_records[slots] = True

    def read_slots(self, slots: torch.Tensor, keys: Iterable[NestedKey] | None = None) -> TensorDict:
        stored = self.stored if keys is None else self.stored.select(*keys)
        return _gather(stored, slots).cpu()

    def restore_slots(self, slots: torch.Tensor, data: TensorDictBase) -> None:
        """Puts entries read by `read_slots` back, bit for bit; the cursors come with `writer.load_state_dict`."""
        if not self._storage.initialized or set(data.keys(True, True)) == set(self.stored.keys(True, True)):
            self._writer.write_at(slots, data)
        else:
            stored = self.stored
            for key, value in data.items(True, True):
                stored[key][slots.to(value.device)] = value.to(stored[key].device)

    # What a journal saved of the records that were here says nothing of those that are.

    def empty(self, empty_write_count: bool = True) -> None:
        super().empty(empty_write_count)
        self.clear_changes()

    def loads(self, path: str | os.PathLike) -> None:
        super().loads(path)
        self.clear_changes()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.clear_changes()

    def clear_changes(self) -> None:
        self.changed_records.zero_()
        self.changed_latents.zero_()
        self.times_cleared += 1

    def latents_in(self, data: TensorDictBase) -> list[NestedKey]:
        keys = (unravel_key(("next", key)) for key in self.latent_keys)
        return [key for key in keys if key in data.keys(True)]


def _gather(data: TensorDictBase, index: torch.Tensor) -> TensorDict:
    # index_select copies whole records: 5 to 8 times faster here than data[index].
    flat = index.flatten()
    return data.apply(
        lambda leaf: leaf.index_select(0, flat.to(leaf.device)).unflatten(0, index.shape), batch_size=index.shape
    )


def make_replay(
    capacity: int,
    num_streams: int,
    batch_size: int,
    batch_length: int,
    *,
    storage: str = "cpu",
    directory: str | os.PathLike | None = None,
    latent_keys: Iterable[NestedKey] = ("state", "belief"),
    latent_dtype: torch.dtype = torch.float16,
) -> RecordReplay:
    """A replay of ``capacity`` records in ``num_streams`` equal rings, sampled in B windows of T (+ 1) records.

    Args:
        storage: ``"cpu"``, a CUDA device, or ``"memmap"``: files in ``directory``.
        latent_dtype: of the stored latents, where windows begin; beliefs lie in [-1, 1] and states are one-hot or a
            Gaussian's few units, so that float16 is enough.
    """
    require_positive(capacity=capacity, num_streams=num_streams, batch_size=batch_size, batch_length=batch_length)
    length = capacity // num_streams
    if batch_length + 1 > length:
        raise ValueError(
            f"batch longer than any stored stream: a window needs batch_length + 1 = {batch_length + 1} records, but "
            f"{num_streams} streams hold capacity // num_streams = {capacity} // {num_streams} = {length} each. Use a "
            f"batch_length of at most {max(length - 1, 0)}, a capacity of at least "
            f"{num_streams * (batch_length + 1)}, or fewer environments."
        )
    folder, rings = folder_of(storage, directory), StreamRings(num_streams, length)
    if folder:
        # auto_cleanup would catch SIGINT, which belongs to the trainer.
        lock = locked(folder)
        made = LazyMemmapStorage(num_streams * length, scratch_dir=folder, existsok=True, auto_cleanup=False)
        vars(made)["lock"] = lock  # held as long as the storage is
    else:
        made = LazyTensorStorage(num_streams * length, device=torch.device(storage))
    return RecordReplay(made, rings, batch_size, batch_length, latent_keys, latent_dtype)

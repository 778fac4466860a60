"""Rings of slots, one per stream, in a single storage: the bookkeeping, the writer and the window sampler.

Environments finish their episodes at different times, so their streams are ragged: each has its own cursor.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import RandomSampler, RoundRobinWriter, Storage


class StreamRings:
    """Where the records of every stream lie: position p of stream s is in slot ``s * length + p % length``."""

    def __init__(self, num_streams: int, length: int):
        self.num_streams = num_streams
        self.length = length
        self.written = torch.zeros(num_streams, dtype=torch.int64)  # records ever written, per stream

    @property
    def stored(self) -> torch.Tensor:
        return self.written.clamp(max=self.length)  # [num_streams]

    def slots(self, stream: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return stream * self.length + position % self.length


class RingWriter(RoundRobinWriter):
    """Writes each record at the cursor of its own ``"stream"``."""

    def __init__(self, rings: StreamRings):
        super().__init__(track_generations=True)
        self.rings = rings

    def add(self, data: TensorDictBase) -> torch.Tensor:
        return self.extend(data.unsqueeze(0))

    def extend(self, data: TensorDictBase) -> torch.Tensor:
        rings, stream = self.rings, data["stream"].cpu()  # [M]
        counts = torch.bincount(stream, minlength=rings.num_streams)
        if len(counts) > rings.num_streams:
            raise ValueError(f"a record of stream {int(stream.max())} in a replay of {rings.num_streams} streams.")
        order = stream.argsort(stable=True)
        rank = torch.empty_like(stream)  # place of each record among those of its stream
        rank[order] = torch.arange(len(stream)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        slots = rings.slots(stream, rings.written[stream] + rank)
        rings.written += counts
        # Of a batch longer than the ring only the end survives; of two writes to one slot either could win.
        last = rank >= (counts - rings.length)[stream]
        self.write_at(slots[last], data.exclude("stream")[last.to(data.device or "cpu")])
        if not last.all():
            self._bump_generation(slots[~last], data)
            self._write_count += int((~last).sum())
        return slots

    def _empty(self, empty_write_count: bool = True) -> None:
        self.rings.written.zero_()
        super()._empty(empty_write_count=empty_write_count)

    def state_dict(self) -> dict[str, Any]:
        return {"written": self.rings.written.tolist(), "length": self.rings.length}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        rings, written = self.rings, state_dict["written"]
        if len(written) != rings.num_streams or state_dict["length"] != rings.length:
            raise ValueError(
                f"the saved replay has {len(written)} streams of {state_dict['length']} records, this one "
                f"{rings.num_streams} of {rings.length}: use the same number of environments and capacity, or leave "
                "the saved replay out."
            )
        rings.written.copy_(torch.tensor(written))
        self._write_count = int(rings.written.sum())
        # How often a ring has been round is all there is to know about the generations of its slots.
        ahead = rings.written.unsqueeze(1) - 1 - torch.arange(rings.length)  # [num_streams, length]
        self._generation = ahead.div(rings.length, rounding_mode="floor").flatten()
        self._align_generation_device()

    def dumps(self, path: str | os.PathLike) -> None:
        Path(path).mkdir(exist_ok=True)
        (Path(path) / "rings.json").write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | os.PathLike) -> None:
        self.load_state_dict(json.loads((Path(path) / "rings.json").read_text()))


class WindowSampler(RandomSampler):
    """Draws windows of consecutive records of one stream, uniformly over all that are stored.

    A window may cross ends of episodes and the physical end of a ring, never its cursor. Costs O(windows). It has no state
    to save: that is the rings', which the writer saves, and torch's generator's.
    """

    def __init__(self, rings: StreamRings, window: int):
        self.rings = rings
        self.window = window

    def _starts(self) -> torch.Tensor:
        return (self.rings.stored - self.window + 1).clamp(min=0)  # [num_streams]

    def _sampleable_count(self, storage: Storage, batch_size: int) -> int:
        return int(self._starts().sum())

    def sample(self, storage: Storage, batch_size: int) -> tuple[torch.Tensor, dict]:
        starts = self._starts()
        ends = starts.cumsum(0)
        if not ends[-1]:
            raise RuntimeError(
                f"no stream holds {self.window} records yet (the longest: {int(self.rings.stored.max())}); collect "
                "more before sampling (can_sample() tells)."
            )
        draw = torch.randint(int(ends[-1]), (batch_size,), generator=self._rng)
        stream = torch.searchsorted(ends, draw, right=True)  # [B]
        oldest = (self.rings.written - self.rings.stored)[stream]
        first = oldest + draw - (ends - starts)[stream]
        position = first.unsqueeze(1) + torch.arange(self.window)  # [B, T+1]
        return self.rings.slots(stream.unsqueeze(1), position), {}

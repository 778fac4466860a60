"""What a training run does to its replay, without the training; how two replays are compared, and files damaged."""

import zlib

import torch
from counting import CountingStreams

from r2dreamer.envs.replay.buffer import make_replay
from r2dreamer.envs.replay.records import RecordBuilder

STREAMS, BATCH, LENGTH, CAPACITY = 3, 4, 5, 90


class Run:
    """What a training run does to its replay."""

    def __init__(self, capacity=CAPACITY, seed=0, storage="cpu", directory=None):
        self.streams = CountingStreams(STREAMS, 7, seed)
        self.builder = RecordBuilder(STREAMS, ["count", "pixels"])
        self.replay = make_replay(capacity, STREAMS, BATCH, LENGTH, storage=storage, directory=directory)
        self.updates = 0

    def collect(self, steps):
        self.replay.extend(self.builder(self.streams.collect(steps)))

    def restart(self):
        """As a resumed run does: its environments begin anew."""
        self.replay.truncate_streams()
        self.builder.reset()

    def update(self):
        batch = self.replay.sample()
        self.updates += 1
        state = torch.rand(BATCH, LENGTH, 2)
        self.replay.write_back(batch, state, torch.rand(BATCH, LENGTH, 3))
        return batch

    def state(self, **more):
        return {"builder": self.builder.state_dict(), "counters": {"updates": self.updates}, **more}


def stored_slots(replay):
    return (torch.arange(replay.rings.length) < replay.stream_lengths.unsqueeze(1)).flatten().nonzero().squeeze(-1)


def assert_same(one, other):
    assert torch.equal(one.rings.written, other.rings.written)
    slots = stored_slots(one)
    for key, value in one.stored[slots].items(True, True):
        restored = other.stored[key][slots]
        assert restored.dtype == value.dtype and torch.equal(restored, value), key
    every = torch.arange(one.rings.num_streams * one.rings.length)
    assert torch.equal(one.writer.generations_of(every), other.writer.generations_of(every))
    assert one.write_count == other.write_count and len(one) == len(other)


def digest(replay):
    data = replay.stored[stored_slots(replay)]
    value = zlib.crc32(replay.rings.written.numpy().tobytes())
    for key in sorted(data.keys(True, True), key=str):
        value = zlib.crc32(data[key].contiguous().flatten().view(torch.uint8).numpy().tobytes(), value)
    return value


def restored(checkpoints, **arguments):
    run, loaded = Run(**arguments), checkpoints.load()
    assert loaded.restore_replay(run.replay)
    run.builder.load_state_dict(loaded.state["builder"])
    return run, loaded


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[:-3])
    else:
        path.unlink()

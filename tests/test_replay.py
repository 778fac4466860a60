import random
import shutil
import time

import pytest
import torch
from counting import CountingStreams, check_records
from tensordict import TensorDict

from r2dreamer.envs.replay.buffer import make_replay
from r2dreamer.envs.replay.place import check_memory, record_bytes
from r2dreamer.envs.replay.records import RecordBuilder

STREAMS, BATCH, LENGTH = 3, 5, 6


def filled(capacity=120, max_episode=7, batches=60, storage="cpu", directory=None, seed=0, batch_size=BATCH):
    """A replay with ragged streams, round several times, and what was written: per stream, in order."""
    streams = CountingStreams(STREAMS, max_episode, seed)
    builder, draw = RecordBuilder(STREAMS, ["count", "pixels"]), random.Random(seed)
    replay = make_replay(capacity, STREAMS, batch_size, LENGTH, storage=storage, directory=directory)
    written = [[] for _ in range(STREAMS)]
    for _ in range(batches):
        records = builder(streams.collect(draw.choice([1, 2, 3, 8])))
        replay.extend(records)
        for stream, count in zip(records["stream"].tolist(), records["next", "count"].tolist(), strict=True):
            written[stream].append(tuple(count))
    return replay, written, streams, builder


@pytest.mark.parametrize("storage", ["cpu", "memmap"])
@pytest.mark.parametrize("max_episode", [1, 3, 40])
def test_thousands_of_windows_are_consecutive_and_all_in_them_belongs_together(max_episode, storage, tmp_path):
    torch.manual_seed(0)
    replay, written, _, _ = filled(max_episode=max_episode, batches=120, storage=storage, directory=tmp_path)
    assert min(len(rows) for rows in written) > 3 * replay.rings.length, "the rings go round several times"
    assert len(set(map(len, written))) > 1 or max_episode == 1, "the streams are ragged"
    place = [{row: i for i, row in enumerate(rows)} for rows in written]
    for _ in range(400):
        batch = replay.sample()
        check_records(batch)
        for window in batch["next", "count"].tolist():
            stream = window[0][0]
            positions = [place[stream][tuple(row)] for row in window]
            assert positions == list(range(positions[0], positions[0] + LENGTH))
            # The context record is stored as well: nothing before the oldest record is reached.
            assert positions[0] - 1 >= len(written[stream]) - replay.rings.length


def test_windows_do_not_cross_the_cursor_at_any_fill():
    streams, builder = CountingStreams(2, 4), RecordBuilder(2, ["count"])
    replay = make_replay(2 * (LENGTH + 1), 2, 50, LENGTH)  # the smallest: a single window per stream
    total = torch.zeros(2, dtype=torch.int64)
    for _ in range(60):
        records = builder(streams.collect(1))
        replay.extend(records)
        total += torch.bincount(records["stream"], minlength=2)
        assert torch.equal(replay.stream_lengths, total.clamp(max=LENGTH + 1))
        assert len(replay) == int(replay.stream_lengths.sum())
        assert replay.can_sample() == bool((total > LENGTH).any())
        if replay.can_sample():
            check_records(replay.sample())
            batch = replay.sample()
            assert batch.shape == (50, LENGTH) and {"state", "belief"} < set(batch.keys())
            counter = batch["next", "count"][..., 3]
            assert (counter.diff(dim=1) == 1).all()
        else:
            with pytest.raises(RuntimeError, match="no stream holds 7 records yet"):
                replay.sample()


def test_observations_are_stored_once_and_last_ones_too():
    replay, written, streams, _ = filled(capacity=3000, max_episode=9, batches=40)
    stored = replay.stored["next"]
    finished = sum(n + 1 for n in streams.finished_lengths)
    assert len(replay) == sum(map(len, written)) == finished + int(streams.now[:, 2].sum())
    assert int(torch.stack([stored["done"].squeeze(-1), stored["count"][:, 2] > 0]).all(0).sum()) >= 1
    index = torch.cat([s * replay.rings.length + torch.arange(n) for s, n in enumerate(replay.stream_lengths.tolist())])
    assert int(stored["done"][index].sum()) == len(streams.finished_lengths)
    assert stored["pixels"].dtype == torch.uint8 and stored["belief"].dtype == torch.float16
    assert len({tuple(row) for row in stored["count"][index].tolist()}) == len(replay)


def test_window_starts_are_uniform_over_streams_of_unequal_length():
    torch.manual_seed(0)
    replay = make_replay(3 * 40, 3, 3000, LENGTH)
    stream = torch.tensor([0] * 95 + [1] * 10 + [2] * 3)  # full and wrapped; a few; too short
    count = torch.zeros(len(stream), 4, dtype=torch.int64)
    count[:, 3] = torch.arange(len(stream))
    replay.extend(TensorDict({"stream": stream, "next": {"count": count}}, [len(stream)]))
    starts = torch.cat([replay.sample()["next", "count"][:, 0, 3] - 1 for _ in range(10)])
    values, counts = starts.unique(return_counts=True)
    assert values.tolist() == [*range(55, 89), *range(95, 99)]  # 34 of stream 0, 4 of stream 1
    expected = len(starts) / 38
    assert float(((counts - expected) ** 2 / expected).sum()) < 80  # chi-square, 37 degrees of freedom: p < 1e-4


def test_a_window_starts_from_the_latents_of_the_record_before():
    replay, _, _, _ = filled()
    for _ in range(50):
        batch = replay.sample()
        assert batch["state"].dtype == batch["belief"].dtype == torch.float32
        before = replay.rings.slots(batch["index"] // replay.rings.length, batch["index"] - 1)
        for key in ("state", "belief"):
            assert torch.equal(batch[key], replay.stored["next", key][before].float())


def test_latents_written_back_are_read_in_overlapping_windows():
    torch.manual_seed(1)
    replay, _, _, _ = filled(capacity=60)
    current = {}  # slot -> the value last written

    def latents(batch, version):
        value = (version * 13 + batch["index"] % 11).float() % 1000
        return value.unsqueeze(-1).expand(-1, -1, 2), value.unsqueeze(-1).expand(-1, -1, 3)

    overlaps = 0
    for version in range(300):
        batch = replay.sample()
        previous = replay.rings.slots(batch["index"] // replay.rings.length, batch["index"] - 1)
        for slot, state, belief in zip(
            previous.flatten().tolist(), batch["state"].flatten(0, 1), batch["belief"].flatten(0, 1), strict=True
        ):
            if slot in current:
                overlaps += 1
                assert (state == current[slot]).all() and (belief == current[slot]).all()
        state, belief = latents(batch, version)
        assert replay.write_back(batch, state, belief) == len(batch["index"].unique())
        current.update(zip(batch["index"].flatten().tolist(), state[..., 0].flatten().tolist(), strict=True))
    assert overlaps > 5000
    assert sorted(replay.changed_latents.nonzero().squeeze(-1).tolist()) == sorted(current)


def test_of_overlapping_windows_in_one_batch_the_last_writes_state_and_belief():
    replay, _, _, _ = filled(capacity=60, batch_size=64)
    batch = replay.sample()
    row = torch.arange(batch.numel()).reshape(batch.shape).float()
    replay.write_back(batch, row.unsqueeze(-1).expand(-1, -1, 2), row.unsqueeze(-1).expand(-1, -1, 3))
    expected = {slot: i for i, slot in enumerate(batch["index"].flatten().tolist())}
    assert len(expected) < batch.numel()
    for slot, value in expected.items():
        assert (replay.stored["next", "state"][slot] == value).all()
        assert (replay.stored["next", "belief"][slot] == value).all()


@pytest.mark.parametrize("change", [lambda latent: latent.transpose(0, 1), lambda latent: latent[:, :-1]])
def test_latents_in_another_order_or_number_are_refused(change):
    replay, _, _, _ = filled(capacity=60)
    batch = replay.sample()
    with pytest.raises(ValueError, match=rf"'state' of shape .*expected \[{BATCH}, {LENGTH}\] first"):
        replay.write_back(batch, change(torch.ones(BATCH, LENGTH, 2)), torch.ones(BATCH, LENGTH, 3))


def test_latents_of_overwritten_records_are_not_written_back():
    replay, _, streams, builder = filled(capacity=60)
    batch = replay.sample()
    records = builder(streams.collect(10))
    slots = replay.extend(records)
    before = replay.stored.clone()
    stale = torch.isin(batch["index"], slots)
    assert stale.any()
    ones = torch.ones(BATCH, LENGTH, 1)
    updated = replay.write_back(batch, ones.expand(-1, -1, 2) * 7, ones.expand(-1, -1, 3) * 7)
    assert updated == len(batch["index"][~stale].unique())
    assert (replay.stored[slots] == before[slots]).all()
    assert (replay.stored["next", "state"][batch["index"][~stale]] == 7).all()


def test_generations_count_writes_and_are_known_from_the_cursors_alone():
    replay, written, _, _ = filled(capacity=60)
    expected = torch.full((60,), -1)
    for stream, rows in enumerate(written):
        for position in range(len(rows)):
            expected[stream * 20 + position % 20] += 1
    assert torch.equal(replay.writer.generations_of(torch.arange(60)), expected)
    other = make_replay(60, STREAMS, BATCH, LENGTH)
    other.writer.load_state_dict(replay.writer.state_dict())
    assert torch.equal(other.writer.generations_of(torch.arange(60)), expected)
    assert other.write_count == replay.write_count == sum(map(len, written))
    with pytest.raises(ValueError, match="3 streams of 20 records, this one 4 of 20"):
        make_replay(80, 4, BATCH, LENGTH).writer.load_state_dict(replay.writer.state_dict())


def test_a_batch_longer_than_the_ring_leaves_its_end():
    replay = make_replay(2 * 10, 2, 4, LENGTH)
    stream = torch.tensor([0, 1] * 5 + [0] * 20)
    count = torch.arange(30).unsqueeze(1).expand(-1, 4)
    replay.extend(TensorDict({"stream": stream, "next": {"count": count}}, [30]))
    assert sorted(replay.stored["next", "count"][:10, 3].tolist()) == list(range(20, 30))
    assert replay.writer.generations_of(torch.arange(10)).sum() == 25 - 10
    assert replay.write_count == 30 and replay.stream_lengths.tolist() == [10, 5]


def test_restarted_environments_end_the_episodes_in_the_replay():
    replay, written, streams, builder = filled(capacity=300, max_episode=50)
    unfinished = streams.now[:, 2] > 0
    replay.clear_changes()
    ends = int(replay.stored["next", "done"].sum())
    replay.truncate_streams()
    last = replay.rings.slots(torch.arange(STREAMS), replay.rings.written - 1)
    stored = replay.stored["next"]
    assert stored["done"][last].all() and unfinished.any()
    assert stored["truncated"][last][unfinished].all() and not stored["terminated"][last][unfinished].any()
    assert int(stored["done"].sum()) == ends + int(replay.changed_records.sum())
    builder.reset()
    streams.restart()
    records = builder(streams.collect(4))
    check_records(records)
    replay.extend(records)
    assert (replay.sample()["next", "count"][..., 3].diff(dim=1) >= 1).all()


def test_extending_with_other_entries_is_refused():
    replay, _, streams, builder = filled()
    with pytest.raises(ValueError, match="latent_sizes"):
        replay.extend(builder(streams.collect(2)).exclude(("next", "belief")))


def test_extend_leaves_the_given_records_as_they_are():
    replay, _, streams, builder = filled()
    records = builder(streams.collect(2))
    copy = records.clone()
    replay.extend(records)
    assert set(records.keys(True, True)) == set(copy.keys(True, True)) and (records == copy).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 100, "num_streams": 4, "batch_size": 2, "batch_length": 25}, "batch longer.* 26 .*= 25"),
        ({"capacity": 0, "num_streams": 4, "batch_size": 2, "batch_length": 25}, "capacity=0 must be a whole number"),
        (
            {"capacity": 1e6, "num_streams": 4, "batch_size": 2, "batch_length": 25},
            "capacity=1000000.0 must be a whole",
        ),
        ({"capacity": 100, "num_streams": 4, "batch_size": -1, "batch_length": 5}, "batch_size=-1 must be"),
        ({"capacity": 100, "num_streams": 1, "batch_size": 1, "batch_length": 5, "storage": "memmap"}, "directory"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_replay(**arguments)


def test_memory_is_predicted_to_the_byte_and_refused_beyond_what_is_free(tmp_path, monkeypatch):
    streams, builder = CountingStreams(STREAMS, 5), RecordBuilder(STREAMS, ["count", "pixels"])
    records = builder(streams.collect(4))
    replay = make_replay(60, STREAMS, BATCH, LENGTH)
    replay.extend(records)
    size = record_bytes(records)
    assert size == record_bytes(records[0]) == sum(v.nbytes for v in replay._storage._storage.values(True, True)) // 60
    line = check_memory(12_600, 1000)
    assert line.startswith("12.6 kB a record x 1000 records = 12.6 MB on cpu; ") and line.endswith(" free")
    assert "disk" in check_memory(12_600, 1000, "memmap", tmp_path / "not" / "yet")
    assert "WARNING" not in check_memory(12_600, 1000, saved_in=tmp_path)
    _, _, free = shutil.disk_usage(tmp_path)
    line = check_memory(1, int(0.4 * free), "memmap", tmp_path, saved_in=tmp_path)  # fits, three times does not
    assert "WARNING" in line and "checkpoint.replay=false" in line
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "old.memmap").write_bytes(bytes(10**6))  # an earlier run's, which is written over
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=600_000))
    assert "1.2 MB" in check_memory(12_000, 100, "memmap", tmp_path)
    with pytest.raises(MemoryError, match="does not fit"):
        check_memory(12_000, 100, "memmap", tmp_path / "elsewhere")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    line = lambda directory: check_memory(12_000, 100, "memmap", directory, saved_in=tmp_path)
    assert "grows to 3.6 MB" in line(tmp_path / "elsewhere")  # 1.2 MB, and twice that beside it
    assert "WARNING" not in line("/dev/shm/elsewhere")  # another disk: only twice that is written here
    assert "WARNING" not in line(tmp_path)  # a third of it is here already
    with pytest.raises(MemoryError, match=r"smaller replay.capacity .*storage=memmap"):
        check_memory(12_600, 10**12)


def test_an_emptied_replay_holds_only_what_is_written_after():
    replay, _, streams, builder = filled()
    replay.empty()
    assert len(replay) == 0 and not replay.can_sample()
    records = builder(streams.collect(LENGTH + 1))
    for record in records:
        replay.add(record)
    new, drawn = (
        {tuple(count) for count in counts.flatten(0, -2).tolist()}
        for counts in (records["next", "count"], replay.sample(200)["next", "count"])
    )
    assert len(replay) == len(records) and drawn < new


def test_latents_of_other_names_are_written_back_by_their_names():
    replay = make_replay(40, 1, 2, LENGTH, latent_keys=("h", "z"))
    rows = {"pixels": torch.zeros(20, 1), "h": torch.zeros(20, 2), "z": torch.zeros(20, 3)}
    replay.extend(TensorDict({"stream": torch.zeros(20, dtype=torch.int64), "next": rows}, [20]))
    batch = replay.sample()
    replay.write_back(batch, h=torch.ones(2, LENGTH, 2), z=2 * torch.ones(2, LENGTH, 3))
    written = replay.stored[batch["index"].flatten()]["next"]
    assert (written["h"] == 1).all() and (written["z"] == 2).all()
    with pytest.raises(ValueError, match=r"write_back got \['belief', 'state'\], and .* latent_keys are \['h', 'z'\]"):
        replay.write_back(batch, torch.ones(2, LENGTH, 2), torch.ones(2, LENGTH, 3))


def test_sampling_and_writing_back_take_milliseconds_whatever_the_size():
    torch.manual_seed(0)
    replay = make_replay(20_000, 4, 16, 64)
    for _ in range(4):
        replay.extend(
            TensorDict(
                {
                    "stream": torch.arange(4).repeat_interleave(1000),
                    "action": torch.zeros(4000, 6),
                    "is_init": torch.zeros(4000, 1, dtype=torch.bool),
                    "next": {
                        "pixels": torch.zeros(4000, 3, 16, 16, dtype=torch.uint8),
                        "state": torch.zeros(4000, 512),
                        "belief": torch.zeros(4000, 2048),
                    },
                },
                [4000],
            )
        )
    state, belief = torch.zeros(16, 64, 512), torch.ones(16, 64, 2048)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        batch = replay.sample()
        replay.write_back(batch, state, belief)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1

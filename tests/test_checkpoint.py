import errno
import json
import multiprocessing
import os
import random
import signal
import time
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import CountingStreams, check_records

from r2dreamer.envs.records import RecordBuilder
from r2dreamer.envs.replay import make_replay
from support.checkpoint import CheckpointError, Checkpoints
from support.journal import CheckedFile

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

    def update(self):
        batch = self.replay.sample_windows()
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


def disk_usage(directory):
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path):
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    more = {"best": None, "name": "run", "shape": torch.Size([2, 3]), "curve": [1, 2.5, (True, "x")]}
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "more": more}
    Checkpoints(tmp_path).save(7, state)
    loaded = Checkpoints(tmp_path).load()
    assert loaded.step == 7 and not loaded.restore_replay(Run().replay)
    assert loaded.state["more"] == more and isinstance(loaded.state["module"], OrderedDict)
    assert all(torch.equal(value, loaded.state["module"][key]) for key, value in module.state_dict().items())
    torch.optim.Adam(module.parameters()).load_state_dict(loaded.state["optimizer"])


@pytest.mark.parametrize("storage", ["cpu", "memmap"])
def test_replay_is_restored_bit_for_bit_after_every_of_many_saves(tmp_path, storage):
    torch.manual_seed(0)
    draw, run, checkpoints = random.Random(0), Run(storage=storage, directory=tmp_path / "a"), Checkpoints(tmp_path)
    for step in range(40):
        run.collect(draw.choice([1, 2, 9, 30]))
        for _ in range(draw.choice([0, 1, 4])):
            if run.replay.can_sample():
                run.update()
        if step % 7 == 3:
            run.replay.truncate_streams()
            run.builder.reset()
            run.streams.restart()
        checkpoints.save(step, run.state(), run.replay)
        if step % 3 == 0:
            other, loaded = restored(Checkpoints(tmp_path), storage=storage, directory=tmp_path / "b")
            assert loaded.step == step and loaded.state["counters"] == {"updates": run.updates}
            assert_same(run.replay, other.replay)


def test_the_restored_run_continues_as_the_uninterrupted_one(tmp_path):
    torch.manual_seed(0)
    run = Run()
    run.collect(60)
    Checkpoints(tmp_path).save(1, run.state(), run.replay)
    windows = [run.update() for _ in range(20)]
    numbers = (random.random(), np.random.rand(), torch.rand(1))
    expected = run.replay.stored.clone()

    torch.manual_seed(99)
    other, loaded = restored(Checkpoints(tmp_path))
    assert loaded.restore_rng()
    for window in windows:
        again = other.update()
        check_records(again)
        assert (window == again).all()
    assert (random.random(), np.random.rand(), torch.rand(1)) == numbers
    assert (other.replay.stored == expected).all()


def test_pending_actions_are_continued(tmp_path):
    run = Run()
    run.collect(11)
    Checkpoints(tmp_path).save(1, run.state(), run.replay)
    other, _ = restored(Checkpoints(tmp_path))
    transitions = run.streams.collect(9)
    run.replay.extend(run.builder(transitions))
    other.replay.extend(other.builder(transitions))
    assert_same(run.replay, other.replay)


def test_a_save_costs_what_changed(tmp_path):
    run, checkpoints = Run(capacity=6000), Checkpoints(tmp_path)
    run.collect(1500)
    checkpoints.save(1, run.state(), run.replay)
    first = disk_usage(tmp_path / "journal")
    run.collect(10)
    run.update()
    checkpoints.save(2, run.state(), run.replay)
    second = disk_usage(tmp_path / "journal") - first
    checkpoints.save(3, run.state(), run.replay)
    assert 0 < second < first / 50
    assert disk_usage(tmp_path / "journal") == first + second
    other, _ = restored(Checkpoints(tmp_path), capacity=6000)
    assert_same(run.replay, other.replay)


def test_the_journal_stays_bounded_over_many_rounds_and_a_save_stays_proportional(tmp_path, monkeypatch):
    written = 0
    original = CheckedFile.write

    def write(self, data):
        nonlocal written
        written += memoryview(data).nbytes if self.path.parent.name == "journal" else 0
        return original(self, data)

    monkeypatch.setattr(CheckedFile, "write", write)
    run, checkpoints = Run(capacity=300), Checkpoints(tmp_path)
    record = sum(v[0].nbytes for v in run_example().values(True, True))
    live, changed, worst = 0, 0, 0
    for step in range(100):
        run.collect(9)  # about 36 records of 300
        for _ in range(5):
            run.update() if run.replay.can_sample() else None
        changed += int((run.replay.changed_records | run.replay.changed_latents).sum()) * record
        checkpoints.save(step, run.state(), run.replay)
        live = len(run.replay) * record
        worst = max(worst, disk_usage(tmp_path / "journal"))
    assert run.replay.rings.written.min() > 10 * run.replay.rings.length
    assert worst < 4 * live, (worst, live)
    assert written < 2.5 * changed, (written, changed)
    other, _ = restored(Checkpoints(tmp_path), capacity=300)
    assert_same(run.replay, other.replay)


def test_latents_of_overwritten_records_leave_the_journal(tmp_path):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.collect(30)
    checkpoints.save(1, run.state(), run.replay)
    run.update()
    checkpoints.save(2, run.state(), run.replay)
    assert len(list((tmp_path / "journal").glob("*-latents.bin"))) == 1
    run.collect(40)
    for step in (3, 4):
        checkpoints.save(step, run.state(), run.replay)
    assert not list((tmp_path / "journal").glob("*-latents.bin"))


def run_example():
    run = Run()
    run.collect(10)
    return run.replay.stored


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (5, 10, 10, 15, 20):
        checkpoints.save(step, {"step": step})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_000000010_3", "step_000000015", "step_000000020"]
    assert Checkpoints(tmp_path).load(tmp_path / "step_000000015").state == {"step": 15}


def test_a_run_directory_its_checkpoints_and_one_of_them_can_be_loaded(tmp_path):
    run, checkpoints = Run(), Checkpoints(tmp_path / "checkpoints")
    run.collect(20)
    for step in (1, 2):
        checkpoints.save(step, run.state(), run.replay)
    elsewhere = Checkpoints(tmp_path / "other" / "checkpoints")
    assert elsewhere.load() is None
    assert elsewhere.load(tmp_path).step == elsewhere.load(tmp_path / "checkpoints").step == 2
    loaded = elsewhere.load(tmp_path / "checkpoints" / "step_000000001")
    assert loaded.step == 1
    other = Run()
    loaded.restore_replay(other.replay)
    assert_same(run.replay, other.replay)
    elsewhere.save(3, run.state(), other.replay)  # a run of its own from here on
    third, _ = restored(elsewhere)
    assert_same(run.replay, third.replay)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        elsewhere.load(tmp_path / "nothing")
    damage(tmp_path / "checkpoints" / "step_000000002" / "state.pt", "flip")
    assert elsewhere.load(tmp_path).step == 1
    elsewhere.save(4, {})
    assert (tmp_path / "checkpoints" / "step_000000002").exists(), "damaged, but another run's"


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[:-3])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("kind", ["manifest.json", "state.pt", "rng.pt", "records", "latents"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, kind, how):
    torch.manual_seed(0)
    run, checkpoints = Run(capacity=3000), Checkpoints(tmp_path)
    run.collect(300)
    checkpoints.save(1, run.state(), run.replay)
    before = digest(run.replay)
    run.collect(3)
    run.update()
    newest = checkpoints.save(2, run.state(), run.replay)
    path = newest / kind if "." in kind else sorted((tmp_path / "journal").glob(f"*-{kind}.bin"))[-1]
    damage(path, how)
    fresh = Checkpoints(tmp_path)
    other, loaded = restored(fresh, capacity=3000)
    warning = capsys.readouterr().err
    assert loaded.step == 1 and digest(other.replay) == before
    assert "WARNING: checkpoint step_000000002 is damaged" in warning and path.name in warning
    # The damaged one neither counts nor stays.
    other.collect(2)
    fresh.save(2, other.state(), other.replay)
    third, loaded = restored(Checkpoints(tmp_path), capacity=3000)
    assert loaded.step == 2 and digest(third.replay) == digest(other.replay)
    assert len(list(tmp_path.glob("step_*"))) == 2 and "WARNING" not in capsys.readouterr().err


def test_when_all_are_damaged_the_error_says_so(tmp_path):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.collect(20)
    checkpoints.save(1, run.state(), run.replay)
    checkpoints.save(2, run.state(), run.replay)
    damage(next((tmp_path / "journal").glob("*.bin")), "flip")  # shared by both
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints .* is whole"):
        Checkpoints(tmp_path).load()
    assert Checkpoints(tmp_path).load(replay=False).step == 2
    damage(tmp_path / "step_000000002" / "state.pt", "truncate")
    with pytest.raises(CheckpointError, match=r"state\.pt has .* truncated"):
        Checkpoints(tmp_path).load(tmp_path / "step_000000002")


def test_a_full_disk_leaves_the_previous_checkpoint_and_forgets_no_change(tmp_path, monkeypatch):
    torch.manual_seed(0)
    run, checkpoints = Run(capacity=600), Checkpoints(tmp_path)
    run.collect(100)
    checkpoints.save(1, run.state(), run.replay)
    before, files = digest(run.replay), sorted(tmp_path.rglob("*"))
    open_file = CheckedFile.__init__
    run.collect(20)
    run.update()
    weights = {"weights": torch.zeros(1000)}
    failed, room, saved = set(), 0, False
    while not saved:  # with ever more room, until it suffices
        left, seen = room, len(failed)
        room += 300

        class Full:
            def __init__(self, file):
                self.file = file

            def write(self, data):
                nonlocal left
                left -= memoryview(data).nbytes
                if left < 0:
                    failed.add(Path(self.file.name).name)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self.file.write(data)

            def __getattr__(self, name):
                return getattr(self.file, name)

        def open_full(self, path, full=Full):
            open_file(self, path)
            self.file = full(self.file)

        monkeypatch.setattr(CheckedFile, "__init__", open_full)
        try:
            checkpoints.save(2, run.state(**weights), run.replay)
            saved = True
        except CheckpointError as error:
            assert "no checkpoint at step 2: the disk is full" in str(error)
        monkeypatch.setattr(CheckedFile, "__init__", open_file)
        if not saved:
            assert sorted(tmp_path.rglob("*")) == files
        if len(failed) > seen:
            other, loaded = restored(Checkpoints(tmp_path), capacity=600)
            assert loaded.step == 1 and digest(other.replay) == before
    assert len(failed) == 5, failed  # two segments, state, generators, manifest
    other, loaded = restored(Checkpoints(tmp_path), capacity=600)
    assert loaded.step == 2
    assert_same(run.replay, other.replay)


def test_checkpoints_without_the_replay(tmp_path):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.collect(20)
    checkpoints.save(1, run.state(), run.replay)
    for step in (2, 3):
        checkpoints.save(step, run.state(), None, rng=False)
    loaded = Checkpoints(tmp_path).load()
    assert not loaded.restore_replay(Run().replay) and not loaded.restore_rng()
    assert not list((tmp_path / "journal").iterdir())
    run.collect(1)
    checkpoints.save(4, run.state(), run.replay)
    assert_same(run.replay, restored(Checkpoints(tmp_path))[0].replay)


def test_another_shape_of_replay_is_refused(tmp_path):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.collect(20)
    checkpoints.save(1, run.state(), run.replay)
    with pytest.raises(ValueError, match="3 streams of 30 records, this one 3 of 40"):
        checkpoints.load().restore_replay(Run(capacity=120).replay)


@pytest.mark.parametrize("value", [np.float32(1), {1, 2}, np.zeros(2), object()])
def test_state_that_needs_pickled_code_is_refused_when_saving(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a"):
        Checkpoints(tmp_path).save(1, {"a": [0, value]})
    assert not list(tmp_path.iterdir())


def test_loading_executes_no_pickled_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"a": 1})
    torch.save({"a": Evil()}, path / "state.pt")
    content = (path / "state.pt").read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    manifest["files"]["state.pt"] = {"size": len(content), "crc32": zlib.crc32(content)}
    crc32 = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps({"crc32": crc32, "manifest": manifest}))
    with pytest.raises(CheckpointError):
        checkpoints.load()
    assert not (tmp_path / "executed").exists()


def save_for_ever(directory, ready):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run, checkpoints, step = Run(capacity=300), Checkpoints(directory), 0
    loaded = checkpoints.load()
    if loaded is not None:
        loaded.restore_replay(run.replay)
        run.builder.reset()
        run.streams.restart()
        step = loaded.step
    while True:
        step += 1
        run.collect(random.randint(1, 12))
        for _ in range(3):
            run.update() if run.replay.can_sample() else None
        padding = torch.full((200_000,), float(step))
        checkpoints.save(step, run.state(digest=digest(run.replay), padding=padding, step=step), run.replay)
        with open(f"{directory}/saved", "a") as file:
            file.write(f"{step}\n")
        ready.set()


def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path, capsys):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchrl.data", "torchrl.envs", "r2dreamer.envs.replay"])
    draw, interrupted, newest = random.Random(0), 0, 0
    for _ in range(10):
        ready = context.Event()
        process = context.Process(target=save_for_ever, args=(str(tmp_path), ready), daemon=True)
        process.start()
        assert ready.wait(60)
        time.sleep(draw.uniform(0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        completed = int((tmp_path / "saved").read_text().split()[-1])
        interrupted += bool(list(tmp_path.glob(".*-*")))
        run, loaded = restored(Checkpoints(tmp_path), capacity=300)
        assert loaded.step in (completed, completed + 1) and loaded.step > newest
        assert loaded.state["step"] == loaded.step and (loaded.state["padding"] == loaded.step).all()
        assert digest(run.replay) == loaded.state["digest"]
        newest = loaded.step
    assert interrupted >= 3, "the kills have to hit saves"
    assert "WARNING" not in capsys.readouterr().err

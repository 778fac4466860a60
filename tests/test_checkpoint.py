"""What is loaded is what was saved, to the bit, at the cost of what changed."""

import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import check_records
from saving import Run, assert_same, damage, restored

from r2dreamer.examples.training.checkpoint import CheckpointError, Checkpoints
from r2dreamer.examples.training.journal import CheckedFile


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
    loaded.restore_rng()
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


def test_checkpoints_without_the_replay(tmp_path):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.collect(20)
    checkpoints.save(1, run.state(), run.replay)
    for step in (2, 3):
        checkpoints.save(step, run.state(), None)
    loaded = Checkpoints(tmp_path).load()
    assert not loaded.restore_replay(Run().replay)
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

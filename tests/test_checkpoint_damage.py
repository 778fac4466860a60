"""Files that are damaged or hostile, a full disk, a process killed while saving: a whole checkpoint is always left."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from saving import Run, assert_same, damage, digest, restored

from r2dreamer.examples.training.checkpoint import CheckpointError, Checkpoints
from r2dreamer.examples.training.journal import CheckedFile


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
    other.restart()
    other.collect(2)
    fresh.save(2, other.state(), other.replay)
    third, loaded = restored(Checkpoints(tmp_path), capacity=3000)
    assert loaded.step == 2 and digest(third.replay) == digest(other.replay)
    assert len(list(tmp_path.glob("step_*"))) == 2 and "WARNING" not in capsys.readouterr().err


def test_a_damaged_segment_that_all_checkpoints_share_costs_the_replay_and_not_what_was_learnt(tmp_path, capsys):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.collect(20)
    checkpoints.save(1, run.state(), run.replay)
    checkpoints.save(2, run.state(), run.replay)
    damage(next((tmp_path / "journal").glob("*.bin")), "flip")
    fresh = Checkpoints(tmp_path)
    loaded = fresh.load()
    assert (loaded.step, loaded.has_replay, loaded.restore_replay(Run().replay)) == (2, False, False)
    assert "from step_000000002 goes on what was learnt" in capsys.readouterr().err
    other = Run()
    other.collect(30)
    fresh.save(3, other.state(), other.replay)  # whole again: nothing of the damaged journal is continued
    again, loaded = restored(Checkpoints(tmp_path))
    assert loaded.step == 3 and digest(again.replay) == digest(other.replay)
    assert "WARNING" not in capsys.readouterr().err


def test_when_all_are_damaged_the_error_says_so(tmp_path):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.collect(20)
    for step in (1, 2):
        checkpoints.save(step, run.state(), run.replay)
        damage(tmp_path / f"step_00000000{step}" / "state.pt", "truncate")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints .* is whole"):
        Checkpoints(tmp_path).load()
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
    context.set_forkserver_preload(["torch", "torchrl.data", "torchrl.envs", "r2dreamer.envs.replay.buffer"])
    draw, interrupted, newest, kills = random.Random(0), 0, 0, 0
    while kills < 10 or (interrupted < 3 and kills < 60):  # how much of its time is saving depends on the machine
        kills += 1
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

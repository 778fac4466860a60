"""Checkpoints whose checksums are right and whose content is not what was expected: an older one is taken."""

import json
import random
import shutil
import zlib

import pytest
from launcher import CARTPOLE, config, train_here

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from saving import Run, digest

from r2dreamer.examples import train
from r2dreamer.examples.training.checkpoint import CheckpointError, Checkpoints
from r2dreamer.examples.training.snapshot import check_state, restore

JUNK = [None, -1, 10**30, 3.5, True, "x", "${oops}", [], [1, "a"], {}, {"a": 1}, float("nan")]
TENSORS = [torch.zeros(2, 2), b"bytes"]


def read_manifest(directory):
    return json.loads((directory / "manifest.json").read_text())["manifest"]


def write_manifest(directory, manifest):
    """With checksums that are right."""
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        for name, file in manifest["files"].items():
            if isinstance(file, dict) and (directory / name).is_file():
                file["crc32"], file["size"] = (
                    zlib.crc32((directory / name).read_bytes()),
                    (directory / name).stat().st_size,
                )
    crc32 = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    (directory / "manifest.json").write_text(json.dumps({"crc32": crc32, "manifest": manifest}))


def places(value, place=()):
    """Every path into nested dicts and lists."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if type(value) in (list, tuple) else ()
    return [place, *(each for key, child in children for each in places(child, (*place, key)))]


def changed(value, place, new):
    """`value` with `new` at this place; without the place if `new` is `places`."""
    if not place:
        return {} if new is places else new
    key, *rest = place
    copied = dict(value) if isinstance(value, dict) else list(value)
    if not rest and new is places:
        del copied[key]
    else:
        copied[key] = changed(value[key], rest, new)
    return tuple(copied) if type(value) is tuple else copied


def test_a_manifest_of_any_content_is_damage_and_no_traceback(tmp_path):
    draw, run, checkpoints = random.Random(0), Run(), Checkpoints(tmp_path)
    run.collect(20)
    checkpoints.save(1, run.state(), run.replay)
    before = digest(run.replay)
    run.collect(3)
    newest = checkpoints.save(2, run.state(), run.replay)
    whole = read_manifest(newest)
    for place in places(whole):
        for new in (*draw.sample(JUNK, 5), places):
            broken = changed(whole, place, new)
            crc32 = zlib.crc32(json.dumps(broken, sort_keys=True).encode())
            (newest / "manifest.json").write_text(json.dumps({"crc32": crc32, "manifest": broken}))
            other, what = Run(), f"{place} = {new}"
            try:
                loaded = Checkpoints(tmp_path).load()
            except CheckpointError as error:  # another format is named, not passed over
                assert place == ("format",) and "reads format 1" in str(error), what
                continue
            try:
                loaded.restore_replay(other.replay)
                loaded.restore_rng()
            except (CheckpointError, ValueError, TypeError, KeyError, RuntimeError) as error:
                assert place[:1] == ("replay",), what  # whether it fits, only the replay can say
                loaded = loaded.next_older(error, replay=True)
                loaded.restore_replay(other.replay)
            same = broken == whole or place in ((), ("program",), ("files", "rng.pt"), ("replay",))
            assert loaded.step == 1 or same, what
            assert not loaded.has_replay or loaded.step == 2 or digest(other.replay) == before, what


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 100 frames with two checkpoints, and a trainer that has resumed it."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = [*CARTPOLE, "env.parallel=false"]
    train_here(folder, *overrides, "total_frames=100")
    trainer = train.Trainer(config(*overrides, f"logdir={folder}"))
    yield trainer
    trainer.close()


def test_a_state_of_any_content_falls_back_like_a_damaged_one(trained, tmp_path, capsys):
    draw = random.Random(0)
    directory = tmp_path / "checkpoints"
    shutil.copytree(trained.checkpoints.directory, directory)
    older, newest = sorted(directory.glob("step_*"))
    groups, whole = {}, {name: torch.load(newest / name, weights_only=True) for name in ("state.pt", "rng.pt")}
    for name, state in whole.items():
        for place in places(state):
            groups.setdefault((name, *place[:2]), []).append(place)
    fallen = 0
    for (name, *group), members in groups.items():
        if group[:1] in (["agent"], ["config"]):  # not read by a trainer; refused where it differs from the command's
            continue
        for place in draw.sample(members, min(3, len(members))):
            new = draw.choice([*JUNK, *TENSORS, places])
            torch.save(changed(whole[name], place, new), newest / name)
            write_manifest(newest, read_manifest(newest))
            trained.checkpoints = Checkpoints(directory)
            trained.saved = trained.checkpoints.load(check_state=check_state)
            restore(trained)
            trained.saved.restore_rng()
            trained.ratio.reset(trained.count["policy_steps"] - 8)
            trained.update()
            trained.log_line = trained.averages.pop() | trained.returns.pop()
            fallen += trained.saved.path == older
            assert f"checkpoint {newest.name} is damaged" in capsys.readouterr().err or trained.saved.path == newest
        torch.save(whole[name], newest / name)
    assert fallen > 30
    torch.save({**whole["state.pt"], "count": []}, newest / "state.pt")
    torch.save([], older / "state.pt")
    for each in (older, newest):
        write_manifest(each, read_manifest(each))
    with pytest.raises(
        CheckpointError, match="none of the 2 checkpoints .* is whole.* holds no count with policy_steps"
    ):
        Checkpoints(directory).load(check_state=check_state)


def test_a_copy_of_a_users_is_neither_deleted_nor_resumed_and_keeps_its_replay(tmp_path, capsys):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.collect(20)
    first = checkpoints.save(1, run.state(), run.replay)
    before = digest(run.replay)
    for name in ("step_best", "step_000000001_2", "step_000000001.bak"):  # the second looks like one of our own
        shutil.copytree(first, tmp_path / name)
    (tmp_path / "step_notes.txt").write_text("mine")
    for step in range(2, 6):
        run.collect(60)  # every slot is written anew
        checkpoints.save(step, run.state(), run.replay)
    left = {path.name for path in tmp_path.glob("step_*")}
    mine = {"step_best", "step_000000001_2", "step_000000001.bak", "step_notes.txt"}
    assert left == {*mine, "step_000000004", "step_000000005"}
    other, loaded = Run(), Checkpoints(tmp_path).load()
    assert loaded.step == 5 and "step_000000001_2 is a copy of step_000000001" in capsys.readouterr().err
    loaded = Checkpoints(tmp_path).load(tmp_path / "step_best")
    assert loaded.restore_replay(other.replay) and digest(other.replay) == before
    for copy in mine:
        path = tmp_path / copy
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    segments = len(list((tmp_path / "journal").glob("*.bin")))
    checkpoints.save(6, run.state(), run.replay)
    assert len(list((tmp_path / "journal").glob("*.bin"))) < segments


def test_a_checkpoint_of_another_format_is_named_with_its_program_and_never_deleted(tmp_path, capsys):
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.collect(20)
    older = checkpoints.save(1, run.state(), run.replay)
    newest = checkpoints.save(2, run.state(), run.replay)
    manifest = {**read_manifest(newest), "format": 2, "program": "torchrl-r2dreamer 9.0", "files": ["other"]}
    write_manifest(newest, manifest)
    segments = {path.name for path in (tmp_path / "journal").iterdir()}
    with pytest.raises(CheckpointError, match=r"format 2 .* 9\.0; this program, torchrl-r2dreamer .*, reads format 1"):
        Checkpoints(tmp_path).load()
    again = Checkpoints(tmp_path)
    assert again.load(older).step == 1  # asked for by name
    for step in range(3, 8):
        run.collect(60)
        again.save(step, run.state(), run.replay)
    assert newest.is_dir() and segments <= {path.name for path in (tmp_path / "journal").iterdir()}
    assert Checkpoints(tmp_path).load().step == 7 and "WARNING" not in capsys.readouterr().err


@pytest.mark.parametrize("how", ["empty", "loads", "load_state_dict"])
def test_a_checkpoint_after_another_replay_took_this_ones_place_holds_the_other(tmp_path, how):
    run, other, checkpoints = Run(), Run(seed=1), Checkpoints(tmp_path / "checkpoints")
    run.collect(20), other.collect(20)
    checkpoints.save(1, run.state(), run.replay)
    if how == "empty":
        run.replay.empty()
        run.collect(8)
    elif how == "loads":
        other.replay.dumps(tmp_path / "other")
        run.replay.loads(tmp_path / "other")
    else:
        run.replay.load_state_dict(other.replay.state_dict())
    checkpoints.save(2, run.state(), run.replay)
    restored = Run()
    assert Checkpoints(tmp_path / "checkpoints").load().restore_replay(restored.replay)
    assert digest(restored.replay) == digest(run.replay if how == "empty" else other.replay)

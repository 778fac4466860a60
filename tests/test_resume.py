"""A run that was killed or left goes on as if nothing had happened; real processes where that is the point."""

import os
import signal
import time

import pytest
from launcher import CARTPOLE, config, count_lines, lines, steps, train_here, wait_for

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from hydra import initialize_config_module
from omegaconf import OmegaConf

from r2dreamer.examples import train
from r2dreamer.examples.training.checkpoint import Checkpoints
from r2dreamer.examples.training.setup import FIXED, first_difference

EXACT = [*CARTPOLE, "checkpoint.exact=true", "algorithm.optimizer.lr=1e-2", "algorithm.optimizer.warmup_steps=1"]


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = server.run(folder, *EXACT, "logdir=log")
    assert run.status == 0, run.stderr
    return lines(folder / "log")


def before_the_first_checkpoint(run, logdir):
    wait_for(run, lambda: count_lines(logdir) >= 2)
    assert not (logdir / "checkpoints" / "step_000000052").exists()


def just_after_a_checkpoint(run, logdir):
    wait_for(run, lambda: any((logdir / "checkpoints").glob("step_*")))


def between_two_checkpoints(run, logdir):
    wait_for(run, lambda: 80 in steps(logdir, "count/updates") if count_lines(logdir) else False)


def while_saving(run, logdir):
    """Stopped first, and only killed when it is certain that the save is under way."""
    directory = logdir / "checkpoints"
    wait_for(run, lambda: any(directory.glob("step_*")))
    while True:
        wait_for(run, lambda: any(directory.glob(".saving-*")))
        os.kill(run.pid, signal.SIGSTOP)
        time.sleep(0.01)
        if any(directory.glob(".saving-*")):
            return
        os.kill(run.pid, signal.SIGCONT)


def after_the_last_regular_checkpoint(run, logdir):
    wait_for(run, lambda: count_lines(logdir) and 160 in steps(logdir, "eval/return"))


MOMENTS = [
    between_two_checkpoints,
    while_saving,
    *(
        pytest.param(moment, marks=pytest.mark.slow)
        for moment in (before_the_first_checkpoint, just_after_a_checkpoint, after_the_last_regular_checkpoint)
    ),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_run_killed_and_resumed_logs_what_the_uninterrupted_one_did(server, uninterrupted, tmp_path, moment):
    command, logdir = [*EXACT, "logdir=log"], tmp_path / "log"
    run = server.start(tmp_path, *command)
    moment(run, logdir)
    run.kill()
    assert run.status == -signal.SIGKILL and count_lines(logdir) < len(uninterrupted)
    if moment is while_saving:
        assert any((logdir / "checkpoints").glob(".saving-*"))
    with_timings = lines(logdir, timings=True)[:2]
    resumed = server.run(tmp_path, *command)
    assert resumed.status == 0, resumed.stderr
    assert lines(logdir) == uninterrupted
    from_the_start = lines(logdir, timings=True)[:2] != with_timings
    assert from_the_start == (moment is before_the_first_checkpoint)
    assert not any((logdir / "checkpoints").glob(".*"))


def test_a_run_killed_again_and_again_without_exact_neither_loses_nor_doubles_a_line(server, tmp_path):
    command, logdir = [*CARTPOLE, "logdir=log"], tmp_path / "log"
    for step in (80, 160):
        run = server.start(tmp_path, *command)
        wait_for(run, lambda step=step: count_lines(logdir) and step in steps(logdir, "count/updates"))
        run.kill()
    assert server.run(tmp_path, *command).status == 0
    assert steps(logdir, "count/updates") == [40, 80, 120, 160, 200]
    assert steps(logdir, "eval/return") == [0, 80, 160, 200]


def fifty_updates(trainer):
    losses = []
    for _ in range(50):
        batch = trainer.replay.sample()
        found, latents = trainer.learner.update(batch)
        trainer.replay.write_back(batch, latents["state"], latents["belief"])
        losses.append(torch.stack([found[name].reshape(()) for name in sorted(found.keys())]))
    return torch.stack(losses)


def gone_on(trainer, *overrides):
    """The run that resumes a finished one, after it has made the same fifty updates, bit for bit."""
    saved_at = trainer.frames  # the run has saved at its end; nothing has happened since
    Checkpoints(trainer.logdir / "checkpoints").load().restore_rng()
    expected = fifty_updates(trainer)
    restored = train.Trainer(config(*overrides, "total_frames=200", f"logdir={trainer.logdir}"))
    assert restored.frames == saved_at
    restored.saved.restore_replay(restored.replay)  # a resumed run ends the episodes it cannot continue
    restored.saved.restore_rng()
    found = fifty_updates(restored)
    restored.close()
    assert expected.isfinite().all() and not torch.equal(expected[0], expected[1])
    assert torch.equal(found, expected)
    return restored


@pytest.mark.parametrize("exact", [True, False])
def test_the_restored_learner_makes_the_same_fifty_updates_bit_for_bit(tmp_path, exact):
    overrides = [*CARTPOLE, f"checkpoint.exact={exact}", "total_frames=100", "eval.every=100"]
    gone_on(train_here(tmp_path, *overrides), *overrides)


@pytest.mark.parametrize(("warmup", "length", "begins"), [(40, 5, 40), (4, 30, 62)])  # a window takes longer to fill
def test_without_the_replay_a_resumed_run_collects_first_and_owes_nothing_for_it(tmp_path, warmup, length, begins):
    overrides = [*CARTPOLE, "checkpoint.replay=false", f"warmup_steps={warmup}", f"batch_length={length}"]
    overrides += [f"train_ratio={3 * length}"]  # an update a policy step
    before = train_here(tmp_path, *overrides, "total_frames=120").count["updates"]
    after = train.Trainer(config(*overrides, "total_frames=240", f"logdir={tmp_path}"))
    seen = []
    update = after.update
    after.update = lambda: (update(), seen.append((after.frames, after.count["updates"])))
    after.run()
    after.close()
    assert len(after.replay) <= 240 - 120 + 40  # nothing of what came before, and the records of ended episodes
    assert seen[0][0] >= 120 + warmup and seen[0][1] - before <= 4  # four steps are taken at once
    assert seen[-1][0] == 240 and before + 120 - begins - 4 <= seen[-1][1] <= before + 121 - warmup
    assert max(b - a for (_, a), (_, b) in zip(seen, seen[1:], strict=False)) <= 4


def test_a_run_stopped_while_it_collects_anew_goes_on_collecting(tmp_path):
    train_here(tmp_path, *CARTPOLE, "checkpoint.replay=false", "total_frames=100")
    overrides = [*CARTPOLE, "warmup_steps=60"]
    before = train_here(tmp_path, *overrides, "total_frames=116").count
    assert before["collected_from"] == 100
    after = train.Trainer(config(*overrides, "total_frames=200", f"logdir={tmp_path}"))
    seen = []
    update = after.update
    after.update = lambda: (update(), seen.append(after.frames))
    after.run()
    after.close()
    assert seen[0] == 160 and after.count["updates"] > before["updates"]


def test_a_resumed_run_trains_at_the_ratio_of_its_own_command(tmp_path):
    before = train_here(tmp_path, *CARTPOLE, "train_ratio=7.5", "total_frames=100").count
    after = train_here(
        tmp_path, *CARTPOLE, "train_ratio=24", "batch_size=2", "batch_length=4", "total_frames=200"
    ).count
    assert after["updates"] - before["updates"] == pytest.approx(100 * 24 / (2 * 4), abs=4)
    replayed = before["updates"] * 3 * 5 + (after["updates"] - before["updates"]) * 2 * 4
    assert lines(tmp_path, '"count/updates"')[-1]["count/train_ratio"] == replayed / after["policy_steps"]


def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_resumed(server, tmp_path):
    logdir = tmp_path / "log"
    assert server.run(tmp_path, *CARTPOLE, "logdir=log", "total_frames=100").status == 0
    newest = max((logdir / "checkpoints").glob("step_*"))
    with open(newest / "state.pt", "r+b") as file:
        file.truncate(1000)
    run = server.run(tmp_path, *CARTPOLE, "logdir=log")
    assert run.status == 0 and f"checkpoint {newest.name} is damaged" in run.stderr
    assert steps(logdir, "count/updates") == [40, 80, 120, 160, 200]


def test_a_replay_that_no_checkpoint_can_read_is_collected_anew_unless_the_run_must_repeat(server, tmp_path):
    logdir = tmp_path / "log"
    assert server.run(tmp_path, *CARTPOLE, "logdir=log", "total_frames=100").status == 0
    oldest = min((logdir / "checkpoints" / "journal").glob("*-records.bin"))  # what every later save builds on
    with open(oldest, "r+b") as file:
        file.truncate(1000)
    exact = server.run(tmp_path / "exact", *CARTPOLE, f"logdir={logdir}", "checkpoint.exact=true")
    assert exact.status == 1 and "checkpoint.exact=false" in exact.stderr, exact.stderr
    run = server.run(tmp_path, *CARTPOLE, "logdir=log")
    assert run.status == 0 and "no replay is whole; from step_000000100 goes on" in run.stderr, run.stderr
    assert steps(logdir, "count/updates") == [40, 80, 100, 120, 160, 200]  # 100 is where its first part ended


def test_ctrl_c_leaves_an_exact_run_where_it_will_repeat_from(server, uninterrupted, tmp_path):
    run = server.start(tmp_path, *EXACT, "logdir=log")
    wait_for(run, lambda: count_lines(tmp_path / "log") >= 3)
    run.send(signal.SIGTERM)
    assert run.wait() == 0, run.stderr
    assert server.run(tmp_path, *EXACT, "logdir=log").status == 0
    assert lines(tmp_path / "log") == uninterrupted


def test_a_run_killed_between_its_last_save_and_its_curve_finishes_when_repeated_and_with_its_own_seed_only(
    server, tmp_path
):
    command, logdir = [*CARTPOLE, "logdir=log", "total_frames=60"], tmp_path / "log"
    assert server.run(tmp_path, *command).status == 0
    logged = lines(logdir)
    (logdir / "curve.png").unlink()
    again = server.run(tmp_path, *command)
    assert again.status == 0 and "finished at 60 frames" in again.stdout, again.stderr
    assert (logdir / "curve.png").exists() and lines(logdir) == logged
    once_more = server.run(tmp_path, *command)
    assert once_more.status == 1 and "has already reached 60" in once_more.stderr
    # Nor does another seed continue it.
    other = server.run(tmp_path, *command, "seed=5", "total_frames=100")
    assert other.status == 1 and "trained with seed=0, this command says seed=5" in " ".join(other.stderr.split())


def test_a_refusal_names_the_key_that_differs():
    before = config(*CARTPOLE)
    for override, found in (
        ("algorithm.optimizer.lr=1e-3", ("algorithm.optimizer.lr", 4e-5, 1e-3)),
        ("algorithm.kl.free_nats=2", ("algorithm.kl.free_nats", 1.0, 2)),
        ("augmentation=random_shift", ("algorithm.augmentation._target_", "torch.nn.Identity", None)),
        ("seed=5", ("seed", 0, 5)),
        ("batch_size=2", None),
    ):
        difference = first_difference(before, config(*CARTPOLE, override), FIXED)
        assert (difference or (None,))[0] == (found or (None,))[0], difference
        if found and found[2]:
            assert difference == found


def test_a_key_that_an_earlier_version_lacked_had_its_default():
    overrides = [*CARTPOLE, "algorithm.kl.free_nats=2"]
    now = config(*overrides)
    for key in ("algorithm.optimizer.eps", "model.depth", "algorithm.kl", "algorithm.kl.free_nats"):
        before = config(*overrides)
        section, _, name = key.rpartition(".")
        OmegaConf.set_struct(before, False)
        del OmegaConf.select(before, section)[name]
        given = next((each.partition("=")[2] for each in overrides if each.startswith(key)), None)
        assert first_difference(before, now, FIXED) is None  # without a command
        difference = first_difference(before, now, FIXED, overrides)
        with initialize_config_module("r2dreamer.configs", version_base=None):  # as in a command
            assert first_difference(before, now, FIXED, overrides) == difference
        assert (difference is None) == (given is None), difference
        expected = ("model.depth", 16, 2) if key == "model.depth" else ("algorithm.kl.free_nats", 1.0, 2)
        assert given is None or difference == expected

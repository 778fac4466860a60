"""Where a run ends or begins badly: a dead evaluation, rotated checkpoints, refused commands, late signals, shared files."""

import random
import signal
import subprocess

import numpy as np
import pytest
import torch
from launcher import CARTPOLE, config, lines, steps, train_here, wait_for
from torchrl.checkpoint import CheckpointError

from r2dreamer.envs import WorkerError, make_replay
from r2dreamer.examples import train
from r2dreamer.examples.cli.children import Children
from r2dreamer.examples.training import devices
from r2dreamer.examples.training.checkpoint import Checkpoints
from r2dreamer.examples.training.ranks import is_lost_connection
from r2dreamer.examples.training.run import Run


def run_of(logdir, frames):
    return Run((), "tiny", logdir, frames)


@pytest.mark.parametrize("dies_at", [80, 200])
def test_an_evaluation_that_died_is_made_by_the_same_command(tmp_path, monkeypatch, dies_at):
    whole = train.evaluate_seeds

    def dying(*args, **kwargs):
        if trainer.frames >= dies_at:
            raise WorkerError("evaluation environment 1 has died")
        return whole(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate_seeds", dying)
    trainer = train.Trainer(config(*CARTPOLE, f"logdir={tmp_path}"))
    with pytest.raises(WorkerError, match="has died"):
        train.train(trainer)
    assert dies_at not in steps(tmp_path, "eval/return") and run_of(tmp_path, 200).saved == dies_at
    assert not run_of(tmp_path, 200).finished
    monkeypatch.setattr(train, "evaluate_seeds", whole)
    train_here(tmp_path, *CARTPOLE)
    assert steps(tmp_path, "eval/return") == [0, 80, 160, 200] and run_of(tmp_path, 200).finished
    with pytest.raises(ValueError, match="has already reached 200"):
        train_here(tmp_path, *CARTPOLE)


@pytest.mark.parametrize("stops_at", [80, 200])
def test_an_interrupt_leaves_an_evaluation_at_once_and_the_same_command_makes_it(tmp_path, monkeypatch, stops_at):
    whole, left = train.evaluate_seeds, []

    def interrupted(*args, **kwargs):
        trainer.interrupt.requested = trainer.frames >= stops_at
        result = whole(*args, **kwargs)
        if trainer.interrupt.requested:
            left.extend(result.lengths)
        return result

    monkeypatch.setattr(train, "evaluate_seeds", interrupted)
    trainer = train.Trainer(config(*CARTPOLE, f"logdir={tmp_path}"))
    train.train(trainer)
    assert trainer.left and not any(left)
    assert stops_at not in steps(tmp_path, "eval/return") and run_of(tmp_path, 200).saved == stops_at
    assert not run_of(tmp_path, 200).finished
    monkeypatch.setattr(train, "evaluate_seeds", whole)
    train_here(tmp_path, *CARTPOLE)
    assert steps(tmp_path, "eval/return") == [0, 80, 160, 200] and run_of(tmp_path, 200).finished


def test_owed_updates_are_left_when_asked_and_made_later(tmp_path):
    source, new = tmp_path / "source", tmp_path / "new"
    train_here(source, *CARTPOLE)
    prefilled = [*CARTPOLE, f"replay.prefill={source}", "replay.prefill_counts=true", "train_ratio=30", f"logdir={new}"]
    trainer = train.Trainer(config(*prefilled))
    update, seen = trainer.learner.update, []

    def counted(batch):
        seen.append(batch)
        trainer.interrupt.requested = len(seen) >= 60
        return update(batch)

    trainer.learner.update = counted
    trainer.run()
    trainer.close()
    assert len(seen) == 99 and trainer.left and run_of(new, 200).saved == trainer.frames < 40
    resumed = train.Trainer(config(*prefilled))
    owed = resumed.ratio(resumed.count["policy_steps"])
    resumed.close()
    assert owed == pytest.approx(2 * (resumed.count["prefilled"] + resumed.frames - 20) - 99, abs=2)


def test_a_checkpoint_that_is_rotated_away_is_needed_once(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    train_here(old, *CARTPOLE, "total_frames=100")
    named = min((old / "checkpoints").glob("step_*"))
    command = [*CARTPOLE, f"resume={named}", "total_frames=160"]
    train_here(new, *command)
    for file in named.iterdir():
        file.unlink()
    named.rmdir()
    assert train_here(new, *command[:-1], "total_frames=200").frames == 200
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        train_here(tmp_path / "other", *command)


def test_a_refused_command_leaves_the_configuration_of_the_run(tmp_path):
    train_here(tmp_path, *CARTPOLE, "total_frames=100", "checkpoint.replay=false")
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match="is no folder"):
        train_here(tmp_path, *CARTPOLE, f"replay.prefill={tmp_path / 'typo'}")
    assert (tmp_path / "config.yaml").read_text() == before


def test_resume_false_refuses_a_run_and_nothing_else(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        train_here(tmp_path, *CARTPOLE, "resume=false", f"replay.prefill={tmp_path / 'typo'}")
    train_here(tmp_path, *CARTPOLE, "resume=false", "total_frames=100")
    (tmp_path / "metrics.jsonl").unlink()  # as where checkpoints alone were copied
    with pytest.raises(ValueError, match="resume=false, but .* already holds a run"):
        train_here(tmp_path, *CARTPOLE, "resume=false", "total_frames=100")


def test_a_run_that_learns_nothing_says_so(tmp_path, capsys):
    ending = ["env.num_envs=8", "total_frames=320", "batch_length=64", "warmup_steps=100"]
    trainer = train_here(tmp_path, *CARTPOLE, *ending)
    said = " ".join(capsys.readouterr().err.split())
    assert trainer.count["updates"] == 0 and "Nothing was learnt: no environment collected a window of" in said
    assert lines(tmp_path)[-1]["step"] == 320


@pytest.mark.parametrize("rank_saves", [True, False])
def test_what_all_ranks_have_is_deleted_only_after_a_save_of_all(tmp_path, rank_saves):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"count": {}}, rotate=False)
    if rank_saves:
        checkpoints.rotate()
    kept = [path.name[-1] for path in sorted(tmp_path.glob("step_*"))]
    assert kept == (["3", "4"] if rank_saves else ["1", "2", "3", "4"])


def test_two_processes_with_one_folder_of_records(server, tmp_path):
    place = ["replay.place.storage=memmap", f"replay.place.directory={tmp_path / 'records'}"]
    first = server.start(tmp_path, *CARTPOLE, *place, "total_frames=4000", "logdir=a")
    wait_for(first, lambda: (tmp_path / "a" / "metrics.jsonl").exists() and steps(tmp_path / "a", "loss/reward"))
    second = server.run(tmp_path, *CARTPOLE, *place, "logdir=b", "seed=1")
    said = " ".join(second.stderr.split())
    assert second.status == 1 and "Another process has the files of its replay in" in said, said
    first.send(signal.SIGTERM)
    assert first.wait() == 0, first.stderr
    assert server.run(tmp_path, *CARTPOLE, *place, "logdir=b", "seed=1").status == 0
    replay = make_replay(100, 1, 2, 5, storage="memmap", directory=tmp_path / "records")
    replay = make_replay(100, 1, 2, 5, storage="memmap", directory=tmp_path / "records")  # as in a notebook, once more
    assert len(replay) == 0


def test_a_signal_that_comes_while_a_child_is_started_reaches_it(monkeypatch):
    popen = subprocess.Popen

    def started(*args, **kwargs):
        child = popen(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)
        return child

    monkeypatch.setattr(subprocess, "Popen", started)
    with Children() as children:
        assert children.run(["sleep", "60"]) == -signal.SIGTERM
        assert children.stopped and children.run(["sleep", "60"]) is None


def test_a_grid_of_one_process_ends_with_the_run_that_is_interrupted(server, tmp_path):
    run = server.start(tmp_path, "-m", *CARTPOLE, "seed=0,1", "total_frames=4000", "logdir=log/${seed}")
    wait_for(
        run,
        lambda: (tmp_path / "log" / "0" / "metrics.jsonl").exists() and steps(tmp_path / "log" / "0", "loss/reward"),
    )
    run.send(signal.SIGTERM)
    assert run.wait() == 0, run.stderr
    assert "The runs after it are not begun." in run.stdout and not (tmp_path / "log" / "1").exists()


def test_an_error_of_a_simulator_is_no_lost_rank():
    words = "its traceback: ConnectionResetError: [Errno 104] Connection reset by peer"
    assert is_lost_connection(RuntimeError(words)) and not is_lost_connection(WorkerError(words))


@pytest.mark.parametrize("native", [True, False])
def test_precision_auto_is_what_a_gpu_computes_itself(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    expected = torch.bfloat16 if native else torch.float32
    assert devices.resolve_precision("auto", torch.device("cuda")) is expected


def test_what_a_users_own_code_draws_repeats_with_the_seed(tmp_path):
    drawn = []
    for name in ("a", "b"):
        trainer = train.Trainer(config(*CARTPOLE, f"logdir={tmp_path / name}"))
        trainer.close()
        drawn.append((random.random(), np.random.random()))
    assert drawn[0] == drawn[1]


def test_what_an_experiment_overrules_is_said(server, tmp_path):
    small = [each for each in CARTPOLE if not each.startswith(("env=", "model."))]
    command = [
        "experiment=quickstart",
        *small,
        "model=size1M",
        "model.hidden=8",
        "env.total_frames=5000",
        "total_frames=60",
    ]
    run = server.run(tmp_path, *command, "logdir=log")
    said = " ".join(run.stderr.split())
    assert run.status == 0 and "env.total_frames=5000 is not read: total_frames=60 is." in said, said
    assert (
        "model=size1M does not set belief, classes, depth, vector_frequencies: the experiment does. Say model.belief="
        in said
    )

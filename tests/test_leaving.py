"""How a run ends before its time: Ctrl-C, a closed terminal, a loss that is no number, a full disk, workers that die."""

import errno
import os
import signal
import sys
import time

import pytest
from launcher import CARTPOLE, TINY, config, count_lines, steps, train_here, wait_for

import r2dreamer.envs  # isort: skip  # before TorchRL
from r2dreamer.examples import train
from r2dreamer.examples.cli.output import Output
from r2dreamer.examples.cli.script import Interrupt
from r2dreamer.examples.training import checkpoint as checkpoint_module
from r2dreamer.examples.training.checkpoint import Checkpoints


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["ctrl_c", "closed_terminal"])
def test_ctrl_c_and_a_closed_terminal_save_and_leave_with_status_0(server, tmp_path, number):
    logdir, command = tmp_path / "log", [*CARTPOLE, "env.parallel=true", "logdir=log", "checkpoint.every=1000000"]
    run = server.start(tmp_path, *command)
    wait_for(run, lambda: count_lines(logdir) >= 2)
    run.send(number)  # to its workers, too
    assert run.wait() == 0, run.stderr
    assert "interrupted, resume with the same command" in run.stdout and "Traceback" not in run.stderr
    saved = Checkpoints(logdir / "checkpoints").load()
    assert 40 <= saved.step < 200
    if number == signal.SIGHUP:
        return  # what was saved is resumed as after Ctrl-C
    resumed = server.run(tmp_path, *command)
    assert resumed.status == 0 and "finished at 200 frames" in resumed.stdout
    assert steps(logdir, "count/updates") == [40, 80, 120, 160, 200]


def test_output_that_nobody_reads_any_more_ends_the_run_as_ctrl_c_does(server, tmp_path):
    overrides = [*CARTPOLE, "env.parallel=false", "progress=true", "total_frames=1000000", "checkpoint.every=1000000"]
    for name in ("stdout", "stderr"):
        os.mkfifo(tmp_path / name)
    run = server.start(tmp_path, *overrides, "replay.capacity=100000")
    with open(tmp_path / "stdout", "rb"), open(tmp_path / "stderr", "rb") as printed:
        seen = b""
        while b"/1000000" not in seen:  # the progress bar
            assert run.poll() is None, seen
            seen += printed.read1()
    assert run.wait() == 0
    assert 0 < Checkpoints(tmp_path / "runs/tiny/seed0/checkpoints").load().step < 1000000


def test_a_stream_whose_reader_has_gone_drops_what_is_written():
    read, write = os.pipe()
    called = []
    with open(write, "w") as stream:
        output = Output(stream, lambda: called.append(1))
        output.write("one\n")
        output.flush()
        os.close(read)
        for _ in range(3):
            assert output.write("two\n") == 4
            output.flush()
        assert called == [1] and output.fileno() == write


def test_only_ctrl_c_after_another_signal_leaves_at_once():
    before = signal.getsignal(signal.SIGHUP)
    with Interrupt() as interrupt:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):  # as when a session is closed
            signal.raise_signal(number)
            assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGHUP) is before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:  # under nohup
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("how", [[], ["collector=async", "env.parallel=true"]], ids=["sync", "async"])
def test_ctrl_c_twice_leaves_at_once(server, tmp_path, how):
    slow = [
        *how,
        "collect_steps=100000",
        "total_frames=1000000",
        "replay.capacity=1000000",
    ]  # minutes for a single step
    run = server.start(tmp_path, *CARTPOLE, *slow, "logdir=log")
    wait_for(run, lambda: count_lines(tmp_path / "log") >= 1)
    while "Press Ctrl-C again" not in run.stderr:
        time.sleep(0.5)  # the first evaluation may still be ending
        run.send(signal.SIGINT)
        time.sleep(0.2)
    run.send(signal.SIGINT)
    assert run.wait(timeout=30) == 130
    assert "Traceback" not in run.stderr and not any((tmp_path / "log" / "checkpoints").glob("step_*"))


def main_fails(capsys, *overrides):
    """Runs main in this process; returns what it says when it ends with status 1."""
    with pytest.raises(SystemExit) as ended:
        train.main(config(*overrides))
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_a_loss_that_turns_nan_is_named_and_the_last_checkpoint_stays(tmp_path, monkeypatch, capsys):
    computed, calls = train.Learner.losses, []

    def spoilt(self, batch):
        losses, latents = computed(self, batch)
        calls.append(1)
        if len(calls) == 25:
            losses["loss_reward"] = losses["loss_reward"] * float("nan")
        return losses, latents

    with monkeypatch.context() as patched:
        patched.setattr(train.Learner, "losses", spoilt)
        message = main_fails(capsys, *CARTPOLE, f"logdir={tmp_path}")
    assert "loss_reward is NaN or Inf at frame" in message and "Traceback" not in message
    saved = Checkpoints(tmp_path / "checkpoints").load()
    assert saved is not None and all(value.isfinite().all() for value in saved.state["learner"]["model"].values())
    assert train_here(tmp_path, *CARTPOLE).frames == 200


def test_a_diverging_learning_rate_ends_the_run_with_status_1(server, tmp_path):
    run = server.run(tmp_path, *CARTPOLE, "algorithm.optimizer.lr=1e30", "algorithm.optimizer.warmup_steps=0")
    assert run.status == 1 and "NaN or Inf at frame" in run.stderr and "Traceback" not in run.stderr


def fill_the_disk(monkeypatch, *saves):
    """The saves with these numbers, counted from 1, find no space left."""
    write, count = checkpoint_module._save_tensors, []

    def full(path, value):
        if path.name == "state.pt":
            count.append(1)
        if len(count) in saves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, value)

    monkeypatch.setattr(checkpoint_module, "_save_tensors", full)


def test_a_full_disk_is_told_and_the_next_checkpoint_tries_again(tmp_path, monkeypatch, capsys):
    fill_the_disk(monkeypatch, 2)
    at_warning = []
    monkeypatch.setattr(
        train, "warn", lambda text: at_warning.append((text, Checkpoints(tmp_path / "checkpoints").load().step))
    )
    train_here(tmp_path, *CARTPOLE)
    (message, previous), *more = at_warning
    assert "the disk is full" in message and "Training goes on" in message and not more
    assert 50 <= previous < 100  # whole, and found
    assert Checkpoints(tmp_path / "checkpoints").load().step == 200
    assert steps(tmp_path, "count/updates") == [40, 80, 120, 160, 200]


def test_a_full_disk_at_the_very_end_is_an_error(tmp_path, monkeypatch, capsys):
    fill_the_disk(monkeypatch, 4)
    message = main_fails(capsys, *CARTPOLE, f"logdir={tmp_path}")
    assert "the disk is full" in message and "Earlier checkpoints are intact" in " ".join(message.split())
    assert 150 <= Checkpoints(tmp_path / "checkpoints").load().step < 200


MORTAL = """
import os, pathlib, signal
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv

class Mortal(PendulumEnv):
    def step(self, action):
        if pathlib.Path(__file__).with_name("deadly").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)

gymnasium.register("Mortal-v0", Mortal, max_episode_steps=20)
"""


@pytest.mark.parametrize("exact", [False, True])
def test_a_worker_that_dies_is_named_and_what_was_learned_is_saved(tmp_path, monkeypatch, capsys, exact):
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(tmp_path)
    task = ["env=gym", "env.task=mortal:Mortal-v0", *TINY, "env.parallel=true"]
    overrides = [*task, f"checkpoint.exact={exact}", f"logdir={tmp_path / 'log'}"]
    collect = train.Trainer.collect

    def deadly(self, transitions):
        collect(self, transitions)
        if self.frames == 120:
            (tmp_path / "deadly").touch()

    with monkeypatch.context() as patched:
        patched.setattr(train.Trainer, "collect", deadly)
        message = main_fails(capsys, *overrides)
    assert "WorkerError" in message and "'mortal:Mortal-v0'" in message and "killed by SIGKILL" in message
    restarts = 2 if exact else 0  # at the checkpoints of 52 and 100 frames
    seeds = r2dreamer.envs.env_seeds(0, 2, "train", restarts)
    assert any(f"seed {seed}" in message for seed in seeds)
    assert Checkpoints(tmp_path / "log" / "checkpoints").load().step == (100 if exact else 120)
    (tmp_path / "deadly").unlink()
    assert train_here(tmp_path / "log", *overrides[:-1]).frames == 200
    assert steps(tmp_path / "log", "count/updates") == [40, 80, 120, 160, 200]


def test_a_simulator_that_fails_in_this_process_leaves_what_was_learned(tmp_path, monkeypatch, capsys):
    (tmp_path / "mortal.py").write_text(MORTAL.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise OSError('gone')"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mortal", raising=False)
    collect = train.Trainer.collect

    def deadly(self, transitions):
        collect(self, transitions)
        if self.frames == 120:
            (tmp_path / "deadly").touch()

    monkeypatch.setattr(train.Trainer, "collect", deadly)
    task = ["env=gym", "env.task=mortal:Mortal-v0", *TINY, "env.parallel=false"]
    message = main_fails(capsys, *task, f"logdir={tmp_path / 'log'}")
    assert "gone" in message and "'mortal:Mortal-v0', environment seed" in " ".join(message.split())
    assert Checkpoints(tmp_path / "log" / "checkpoints").load().step == 120


def test_a_worker_that_dies_between_two_steps_is_named_too(tmp_path, monkeypatch, capsys):
    collect = train.Trainer.collect

    def deadly(self, transitions):
        collect(self, transitions)
        if self.frames == 40:
            process = self.collection.collector.env.pool.workers[-1].process
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    monkeypatch.setattr(train.Trainer, "collect", deadly)
    message = main_fails(capsys, *CARTPOLE, "env.parallel=true", f"logdir={tmp_path}")
    assert "WorkerError" in message and "'CartPole-v1'" in message

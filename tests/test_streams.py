"""collector=sync and collector=async: who waits for whom, with which weights, and what it survives."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from launcher import CARTPOLE, config, count_lines, steps, train_here, wait_for

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
from test_collecting import follows

from r2dreamer.examples import train
from r2dreamer.examples.training.checkpoint import Checkpoints
from r2dreamer.examples.training.collecting import Alternating, Overlapping
from r2dreamer.examples.training.metrics import read_metrics

ASYNC = [*CARTPOLE, "collector=async", "env.parallel=true"]


class Batches:
    """A collector that hands out what its policy's weight was when a batch began; each takes `seconds`."""

    def __init__(self, policy, seconds=0.0, fails_at=None):
        self.policy, self.seconds, self.fails_at, self.seeds = policy, seconds, fails_at, []

    def __iter__(self):
        number = 0
        while True:
            weight = self.policy.weight.item()
            time.sleep(self.seconds)
            if number == self.fails_at:
                raise ValueError("the simulator broke")
            yield number, weight
            number += 1

    def restart(self, seeds):
        self.seeds.append(seeds)

    def shutdown(self):
        self.seconds = 0.0


def stream_of(kind, **options):
    policy = torch.nn.Linear(1, 1, bias=False)
    policy.weight.data.zero_()
    stream = kind(policy)
    stream.collector = Batches(stream.policy, **options)
    stream.batches = iter(stream.collector)
    return policy, stream


def test_sync_collects_with_the_weights_of_now():
    policy, stream = stream_of(Alternating)
    for update in range(4):
        assert stream.next(update) == (update, update) and stream.lag == 0
        policy.weight.data += 1


def test_async_collects_with_the_weights_of_the_batch_before_and_says_so():
    policy, stream = stream_of(Overlapping)
    try:
        assert stream.next(0) == (0, 0) and stream.lag == 0
        policy.weight.data += 3  # three updates
        assert stream.next(3) == (1, 0) and stream.lag == 3
        policy.weight.data += 2
        assert stream.next(5) == (2, 3) and stream.lag == 2
    finally:
        stream.close()


def test_async_collects_while_the_learner_learns():
    waited = {}
    for kind in (Alternating, Overlapping):
        _, stream = stream_of(kind, seconds=0.05)
        for update in range(6):
            stream.next(update)
            time.sleep(0.06)  # learning
        waited[kind] = stream.waited
        stream.close()
    assert waited[Alternating] > 0.29  # all six
    assert 0.04 < waited[Overlapping] < waited[Alternating] / 2  # the first


def test_after_a_pause_nothing_runs_and_after_a_restart_the_batch_in_hand_is_dropped():
    _, stream = stream_of(Overlapping, seconds=0.05)
    try:
        stream.next(0)
        stream.pause()
        assert stream.begun[0].done()
        assert stream.next(0)[0] == 1  # a pause loses nothing
        stream.restart([5])
        assert stream.collector.seeds == [[5]]
        assert stream.next(0)[0] == 3
    finally:
        stream.close()


def test_what_breaks_in_the_thread_is_raised_where_the_batch_is_asked_for():
    _, stream = stream_of(Overlapping, fails_at=1)
    try:
        stream.next(0)
        with pytest.raises(ValueError, match="the simulator broke"):
            stream.next(0)
        stream.pause()
    finally:
        stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("collect")]


def test_async_trains_to_the_end_at_its_train_ratio(tmp_path):
    overrides = [*ASYNC, f"logdir={tmp_path}"]
    trainer = train.Trainer(config(*overrides))
    try:
        trainer.run()
    finally:
        trainer.close()
    lines = [line for line in read_metrics(tmp_path, timings=True) if "count/updates" in line]
    assert lines[-1]["step"] == 200
    first = config(*overrides).warmup_steps
    assert lines[-1]["count/updates"] == pytest.approx((200 - first) * 5 / 15, abs=2)
    assert max(line["count/policy_lag"] for line in lines) > 0
    assert all(0 <= line["speed/waiting"] <= 1 for line in lines)
    resumed = train.Trainer(config(*overrides, "total_frames=260"))
    try:
        resumed.run()
    finally:
        resumed.close()
    assert resumed.frames == 260


def test_async_steps_are_one_filtered_stream_while_the_learner_learns(tmp_path):
    """The latents a thread collects follow from each other, though the learner's modules change and are recorded on."""
    trainer = train.Trainer(config(*ASYNC, f"logdir={tmp_path}", "algorithm.optimizer.lr=0.0"))
    batches, collect = [], trainer.collect

    def keep(transitions):
        batches.append(transitions.clone())
        collect(transitions)

    trainer.collect = keep
    try:
        trainer.run()
    finally:
        trainer.close()
    ours, learned = (
        {value.data_ptr() for value in policy.parameters()}
        for policy in (trainer.collection.policy, trainer.agent.policy)
    )
    assert ours and not ours & learned
    # Up to the first save or evaluation no stream is interrupted, and lr 0 leaves the weights what they were.
    follows(trainer.agent, torch.cat(batches, 1))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [(["checkpoint.exact=true"], "collector=sync"), (["env.parallel=false"], "env.parallel=true")],
)
def test_what_async_cannot_do_is_refused(tmp_path, overrides, said):
    with pytest.raises(ValueError, match=said):
        train.Trainer(config(*ASYNC, *overrides, f"logdir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()


def test_async_survives_ctrl_c_and_kills_and_logs_every_line_once(server, tmp_path):
    command, logdir = [*ASYNC, "logdir=log"], tmp_path / "log"
    for step, number in ((80, signal.SIGINT), (160, signal.SIGKILL)):
        run = server.start(tmp_path, *command)
        wait_for(run, lambda step=step: count_lines(logdir) and step in steps(logdir, "count/updates"))
        run.send(number)
        assert run.wait() == (0 if number == signal.SIGINT else -number), run.stderr
    assert server.run(tmp_path, *command).status == 0
    assert steps(logdir, "count/updates") == [40, 80, 120, 160, 200]
    assert steps(logdir, "eval/return") == [0, 80, 160, 200]


def test_a_worker_that_dies_under_async_is_named_and_what_was_learned_is_saved(tmp_path, monkeypatch, capsys):
    collect = train.Trainer.collect

    def deadly(self, transitions):
        collect(self, transitions)
        if self.frames == 120:
            os.kill(self.collection.collector.env.pool.workers[-1].process.pid, signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(train.Trainer, "collect", deadly)
        with pytest.raises(SystemExit):
            train.main(config(*ASYNC, f"logdir={tmp_path}"))
    said = capsys.readouterr().err
    assert "WorkerError" in said and "'CartPole-v1'" in said and "killed by SIGKILL" in said
    assert Checkpoints(tmp_path / "checkpoints").load().step in (120, 124)  # one batch may have been there already
    assert train_here(tmp_path, *ASYNC).frames == 200


def test_sync_logs_how_long_it_waits_and_no_lag(tmp_path):
    trainer = train.Trainer(config(*CARTPOLE, f"logdir={tmp_path}"))
    try:
        trainer.run()
    finally:
        trainer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "count/updates" in line]
    assert all(line["count/policy_lag"] == 0 and 0 < line["speed/waiting"] < 1 for line in logged)

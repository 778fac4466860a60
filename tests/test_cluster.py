"""Runs of a grid as jobs: submitit's local executor runs a stand-in for the trainer as Slurm would."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from r2dreamer.examples import compare
from r2dreamer.examples.training import cluster
from r2dreamer.examples.training.grid import plan
from r2dreamer.examples.training.run import Run

pytest.importorskip("submitit")

# Saves and leaves on SIGTERM; the second time it finishes.
TRAINER = """
import os, signal, sys, time
from pathlib import Path
logdir = Path(next(each for each in sys.argv if each.startswith("logdir=")).partition("=")[2])
started = logdir / "started"
before = started.read_text() if started.exists() else ""
def save(*_):
    (logdir / "checkpoints" / "step_000000001").mkdir(parents=True)
    sys.exit()
signal.signal(signal.SIGTERM, save)
(logdir / "pid").write_text(str(os.getpid()))
started.write_text(before + f"{os.getppid()} ")
if "wait" in sys.argv and not before:
    time.sleep(60)
(logdir / "checkpoints" / "step_000000100").mkdir(parents=True)
"""


def local(tmp_path):
    return ["hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/jobs", "hydra.launcher.timeout_min=2"]


@pytest.fixture
def trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    return script


def a_run(tmp_path, name, *more):
    return Run((f"logdir={tmp_path / name}", *more), name, tmp_path / name, 100)


def signal_once_started(started, number):
    """Sent to the job, which is the trainer's parent. A warning goes to all its processes, as Slurm may send it."""

    def send():
        while not started.exists() or not started.read_text():
            time.sleep(0.05)
        if number == signal.SIGUSR2:
            os.kill(int((started.parent / "pid").read_text()), number)
            time.sleep(0.5)
        os.kill(int(started.read_text()), number)

    threading.Thread(target=send, daemon=True).start()


def test_a_preempted_run_saves_and_its_job_comes_back_to_finish_it(tmp_path, trainer):
    runs = [a_run(tmp_path, "short"), a_run(tmp_path, "long", "wait")]
    started = tmp_path / "long" / "started"

    signal_once_started(started, signal.SIGUSR2)
    ended = dict(cluster.submit(runs, trainer, cluster.make_executor(local(tmp_path))))
    assert ended == dict.fromkeys(runs, True)
    assert len(started.read_text().split()) == 2
    assert (tmp_path / "long" / "checkpoints" / "step_000000001").is_dir()  # it saved before it came back
    assert len((tmp_path / "short" / "started").read_text().split()) == 1


def test_a_cancelled_job_lets_its_run_save(tmp_path, trainer):
    run = a_run(tmp_path, "long", "wait")
    signal_once_started(tmp_path / "long" / "started", signal.SIGTERM)
    assert not cluster.Training(run, (sys.executable, str(trainer), *run.overrides))()
    assert (run.logdir / "checkpoints" / "step_000000001").is_dir()


# What `scontrol show job --oneliner` of Slurm 22.05 prints after a SIGTERM, shortened.
SHOWN = "JobId=5 JobName=r2dreamer JobState={} Reason=None Requeue=1 Restarts={} BatchFlag=1 PreemptEligibleTime=2026-11-29T14:42:34 {}"
PREEMPTED = "PreemptTime=2026-11-29T14:42:39 SuspendTime=None"
NOT_PREEMPTED = "PreemptTime=None SuspendTime=None"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Inside a job of Slurm, with a stand-in for scontrol; called with what that one shows, gives what it was asked."""

    def of(shown, requeues=True):
        asked = tmp_path / "asked"
        asked.touch()
        scontrol = tmp_path / "bin" / "scontrol"
        scontrol.parent.mkdir()
        scontrol.write_text(
            f"#!/bin/sh\nkill -TERM $$\necho $* >> {asked}\n"  # as Slurm does: to all processes of the job
            f"case $1 in show) echo '{shown}';; requeue) {'true' if requeues else 'false'};; esac\n"
        )
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
        return asked

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    return of


@pytest.mark.parametrize(
    ("shown", "restarted", "back", "asks"),
    [
        (SHOWN.format("RUNNING", 0, PREEMPTED), 0, True, True),  # preempted, within its grace time
        (SHOWN.format("COMPLETING", 0, PREEMPTED), 0, True, True),  # preempted by PreemptMode=CANCEL
        (SHOWN.format("COMPLETING", 1, "SuspendTime=None"), 0, True, False),  # PreemptMode=REQUEUE, scontrol requeue
        (SHOWN.format("COMPLETING", 0, NOT_PREEMPTED), 0, False, False),  # scancel
        (SHOWN.format("COMPLETING", 1, NOT_PREEMPTED), 1, False, False),  # scancel of a job that has come back before
        (SHOWN.format("RUNNING", 0, NOT_PREEMPTED), 0, False, False),  # a training that failed
        ("", 0, False, False),
    ],
)
def test_slurm_starts_a_job_again_after_a_preemption_or_a_requeue_alone(
    slurm, monkeypatch, tmp_path, trainer, shown, restarted, back, asks
):
    asked = slurm(shown)
    if restarted:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarted))
    run = a_run(tmp_path, "long", "wait")
    signal_once_started(run.logdir / "started", signal.SIGTERM)
    training = cluster.Training(run, (sys.executable, str(trainer), *run.overrides))
    if back:
        with pytest.raises(SystemExit, match="its job comes back"):  # no result: to submitit the job goes on
            training()
    else:
        assert training() is False
    assert (run.logdir / "checkpoints" / "step_000000001").is_dir()
    assert asked.read_text().splitlines() == ["show job --oneliner 5", *["requeue 5"] * asks]


def test_a_job_that_may_not_be_requeued_ends(slurm, tmp_path, trainer):
    asked = slurm(SHOWN.format("RUNNING", 0, PREEMPTED), requeues=False)
    run = a_run(tmp_path, "long", "wait")
    signal_once_started(run.logdir / "started", signal.SIGTERM)
    assert cluster.Training(run, (sys.executable, str(trainer), *run.overrides))() is False
    assert "requeue 5" in asked.read_text()


def test_a_job_that_is_ended_before_its_training_runs_ends_it(tmp_path, trainer, monkeypatch):
    begin, before = subprocess.Popen, signal.getsignal(signal.SIGTERM)

    def ended_meanwhile(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", ended_meanwhile)
    run = a_run(tmp_path, "long", "wait")
    assert cluster.Training(run, (sys.executable, str(trainer), *run.overrides))() is False
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_has_ended_once_squeue_does_not_list_it(tmp_path, monkeypatch):
    from r2dreamer.examples.training.slurm import make_watcher

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    squeue = tmp_path / "squeue"

    def says(text, status=0):
        squeue.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {status}\n")
        squeue.chmod(0o755)
        time.sleep(0.002)  # submitit asks at most once a millisecond

    queue = make_watcher()
    says("7_0\\n7_1\\n8\\n")
    assert not queue.is_done("7_0", mode="force") and not queue.is_done("7_1", mode="force")
    says("", status=1)  # Slurm does not answer for a while
    assert not queue.is_done("7_0", mode="force")
    says("7_1\\n")
    assert queue.is_done("7_0", mode="force") and not queue.is_done("7_1", mode="force")
    assert queue.is_done("7_0", mode="force")


class Failed:
    """A job whose Training raised: submitit shows the traceback, then where its files are."""

    job_id = "5_0"
    done = staticmethod(lambda: True)

    def exception(self):
        dashes = "-" * 22
        trace = "Traceback (most recent call last):\n  ...\nValueError: no such disk\n"
        files = "You can check full logs with 'job.stderr(0)' and 'job.stdout(0)'or at paths:\n  - 5.err\n  - 5.out"
        return RuntimeError(f"Job (task=0) failed during processing with trace:\n{dashes}\n{trace}\n{dashes}\n{files}")


def test_a_job_that_failed_is_named_with_its_error(tmp_path, trainer, capsys):
    executor = SimpleNamespace(submit_array=lambda calls: [Failed() for _ in calls], folder=tmp_path)
    (ended,) = cluster.submit([a_run(tmp_path, "x")], trainer, executor)
    assert not ended[1] and capsys.readouterr().err == "Job 5_0: ValueError: no such disk\n"


def test_a_job_leaves_alone_what_has_finished_or_is_trained(tmp_path, trainer):
    command = lambda run: (sys.executable, str(trainer), *run.overrides)
    finished, running = a_run(tmp_path, "finished"), a_run(tmp_path, "running")
    assert cluster.Training(finished, command(finished))()
    before = (finished.logdir / "started").read_text()
    assert cluster.Training(finished, command(finished))() and (finished.logdir / "started").read_text() == before
    running.logdir.mkdir()
    with open(running.logdir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not cluster.Training(running, command(running))()
    assert not (running.logdir / "started").exists()


def test_options_of_the_launcher_reach_submitit(tmp_path):
    executor = cluster.make_executor([*local(tmp_path), "hydra.launcher.cpus_per_task=3"])
    parameters = executor._executor.parameters
    assert parameters["cpus_per_task"] == 3 and parameters["timeout_min"] == 2 and parameters["name"] == "r2dreamer"


def test_the_options_of_the_guide_are_launcher_options_and_leave_a_grid(monkeypatch):
    page = (Path(compare.__file__).parent / "guides" / "scale.md").read_text()
    (block,) = re.findall(r"r2dreamer compare (env=.*?)```", page, re.DOTALL)
    own, where = cluster.split(block.replace("\\\n", " ").split())
    assert len(plan(own)) == 6 and len(where) == 6
    made = {}
    monkeypatch.setattr("submitit.AutoExecutor", lambda folder, **first: made.update(first) or Executor(made))
    cluster.make_executor(where)
    expected = {
        "cluster": "slurm",
        "slurm_max_num_timeout": 20,
        "timeout_min": 600,
        "gpus_per_node": 1,
        "cpus_per_task": 18,
    }
    assert expected.items() <= made.items() and made["slurm_partition"] == "gpu" and made["slurm_signal_delay_s"] == 120


class Executor:
    def __init__(self, made):
        self.update_parameters = made.update


def test_where_jobs_run_is_no_setting_of_a_run():
    options = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.sweep.dir=elsewhere"]
    assert cluster.split(["seed=0,1", *options]) == (["seed=0,1"], options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hydra.launcher.partition=gpu"], "add hydra/launcher=submitit_slurm"),
        (["hydra/launcher=basic"], "hydra/launcher=basic is not one of submitit_slurm, submitit_local"),
        (["hydra/launcher=submitit_slurm"], "cannot submit jobs from here"),
        (["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"], "A run is one process"),
        (["hydra/launcher=submitit_local", "hydra.launcher.partitio=gpu"], "no such key"),
        (["hydra/launcher=submitit_local", "--jobs", "2"], "--jobs 2 is of this machine"),
    ],
)
def test_mistakes_are_said_in_one_paragraph(monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    command = ["compare", "env=gym", "env.task=CartPole-v1", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("PATH", "")  # no Slurm
    with pytest.raises(SystemExit) as left:
        compare.main()
    assert said in left.value.code


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"extra `cluster`: pip install 'torchrl-r2dreamer\[cluster\]'"):
        cluster.make_executor(["hydra/launcher=submitit_slurm"])

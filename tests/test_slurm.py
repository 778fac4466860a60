"""Jobs of a real Slurm: its daemons run on this machine while these tests do. One node, and a partition for each kind of preemption."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cluster import TRAINER, a_run

from r2dreamer.examples.training import cluster

pytest.importorskip("submitit")
DAEMONS = {
    name: shutil.which(name, path=f"{os.defpath}:/usr/sbin:/usr/local/sbin")
    for name in ("munged", "slurmctld", "slurmd")
}
MISSING = [name for name, path in DAEMONS.items() if path is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here: {', '.join(MISSING)} not found"),
]

PREEMPTED = ("requeue", "requeue_grace", "cancel", "cancel_grace")  # partitions
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=15
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=requeue Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE
PartitionName=requeue_grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=cancel Nodes=ALL PriorityTier=1 PreemptMode=CANCEL
PartitionName=cancel_grace Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=30
PartitionName=first Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.2)


def queue():
    """The state of each job."""
    shown = subprocess.run(["squeue", "-h", "-o", "%i %T"], check=True, stdout=subprocess.PIPE, text=True)
    return dict(line.split() for line in shown.stdout.splitlines())


@pytest.fixture(scope="module")
def slurm():
    with tempfile.TemporaryDirectory(prefix="slurm") as name, pytest.MonkeyPatch.context() as patch:
        folder, host = Path(name), socket.gethostname().partition(".")[0]
        for each in ("state", "spool"):
            (folder / each).mkdir()
        user = pwd.getpwuid(os.getuid()).pw_name
        configuration = CONFIGURATION.format(host=host, ports=free_ports(2), user=user, folder=folder)
        (folder / "slurm.conf").write_text(configuration)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        of_munge = {"socket": "munge.socket", "key-file": "key", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{option}={folder / file}" for option, file in {**of_munge, "seed-file": "seed"}.items()]
        commands = [
            [DAEMONS["munged"], "--foreground", "--force", *options],
            [DAEMONS["slurmctld"], "-D", "-c"],
            [DAEMONS["slurmd"], "-D", "-N", host],
        ]
        daemons = []
        try:
            for command in commands:
                with open(folder / "daemons.log", "a") as log:
                    daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
                if not daemons[1:]:
                    wait_until((folder / "munge.socket").exists, "the start of munged")
            idle = lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout
            wait_until(idle, "the start of Slurm", 60)
            yield
            subprocess.run(["scancel", "--user", user])
            wait_until(lambda: not queue(), "the end of all jobs")
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()
            print((folder / "daemons.log").read_text()[-5000:])  # shown if a test fails


@pytest.fixture(scope="module")
def ended(slurm, tmp_path_factory):
    """What became of runs, which trained at the same time, each with a fate of its own."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "trainer.py"
    script.write_text(TRAINER)
    results, fates = {}, (*PREEMPTED, "cancelled", "killed", "requeued", "limit")

    def start(fate):
        options = [f"partition={fate if fate in PREEMPTED else 'first'}", "cpus_per_task=1", f"name={fate}"]
        if fate == "limit":  # the warning comes at the next of Slurm's half minutes
            options += ["timeout_min=1", "signal_delay_s=50", "max_num_timeout=1"]
        where = ["hydra/launcher=submitit_slurm", f"hydra.sweep.dir={folder}/jobs"]
        executor = cluster.make_executor([*where, *(f"hydra.launcher.{option}" for option in options)])
        run = a_run(folder, fate, "wait")
        wait = lambda: results.update({fate: dict(cluster.submit([run], script, executor))[run]})
        threading.Thread(target=wait, daemon=True, name=fate).start()

    for fate in fates:
        start(fate)
    starts = lambda fate: (
        (folder / fate / "started").read_text().split() if (folder / fate / "started").exists() else []
    )
    wait_until(lambda: all(starts(fate) for fate in fates), "the start of all runs")
    number = lambda fate: subprocess.check_output(["squeue", "-h", "-n", fate, "-o", "%i"], text=True).strip()
    subprocess.run(["scancel", number("cancelled")], check=True)
    subprocess.run(["scontrol", "requeue", number("requeued")], check=True)
    for pid in (starts("killed")[0], (folder / "killed" / "pid").read_text()):  # the job and its training
        os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["sbatch", "-p", "first", "-n", "15", "-o", "/dev/null", "--wrap", "sleep 1"], check=True)
    with contextlib.suppress(AssertionError):  # each test says what it lacks
        wait_until(lambda: len(results) == len(fates), "the end of all runs", 180)
    saved = lambda fate: (folder / fate / "checkpoints" / "step_000000001").is_dir()
    queued = subprocess.check_output(["squeue", "-h", "-o", "%j"], text=True).split()
    return {
        fate: SimpleNamespace(
            finished=results.get(fate), starts=len(starts(fate)), saved=saved(fate), queued=fate in queued
        )
        for fate in fates
    }


@pytest.mark.parametrize("fate", [*PREEMPTED, "requeued", "limit"])
def test_a_run_that_slurm_interrupts_saves_and_its_job_comes_back_to_finish_it(ended, fate):
    assert ended[fate] == SimpleNamespace(finished=True, starts=2, saved=True, queued=False)


def test_a_run_that_scancel_ends_saves_and_does_not_come_back(ended):
    assert ended["cancelled"] == SimpleNamespace(finished=False, starts=1, saved=True, queued=False)


def test_nobody_waits_for_a_job_that_was_killed(ended):
    assert ended["killed"] == SimpleNamespace(finished=False, starts=1, saved=False, queued=False)

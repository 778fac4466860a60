"""Runs the examples as real processes that can be killed, and their parts in this one, all at tiny sizes.

Importing torch, TorchRL and MuJoCo takes seconds of CPU, so a server process imports them once; every run is forked
from it and is otherwise what `python examples/train.py ...` starts.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
TESTS = Path(__file__).parent
SCRIPTS = ("attack", "benchmark", "compare", "curves", "doctor", "evaluate", "saliency", "train")

# Sizes all differ; an update takes about 20 ms.
TINY = """
name=tiny logger=none progress=false precision=fp32 threads=1 device=cpu model.belief=16 model.hidden=8 model.classes=4
model.categoricals=3 model.depth=2 algorithm.actor.imagination_horizon=3 batch_size=3 batch_length=5 warmup_steps=20
train_ratio=5 total_frames=200 env.num_envs=2 env.eval_episodes=2 replay.capacity=1000 log_every=40 eval.every=80
eval.video=false checkpoint.every=50 collect_steps=2
""".split()  # noqa: SIM905
CARTPOLE = ["env=gym", "env.task=CartPole-v1", *TINY]
PENDULUM = ["env=gym", "env.task=Pendulum-v1", *TINY, "env.episode_frames=20"]


def config(*overrides, name="config"):
    from hydra import compose, initialize_config_module

    with initialize_config_module("r2dreamer.configs", version_base=None):
        return compose(name, list(overrides))


def train_here(logdir, *overrides):
    """In this process; returns the finished trainer."""
    from r2dreamer.examples import train

    trainer = train.Trainer(config(*overrides, f"logdir={logdir}"))
    try:
        trainer.run()
    finally:
        trainer.close()
    return trainer


def lines(logdir, containing="", timings=False):
    from r2dreamer.examples.training.metrics import read_metrics

    return list(read_metrics(logdir, timings=timings, containing=containing))


def steps(logdir, key):
    return [line["step"] for line in lines(logdir, f'"{key}"')]


def count_lines(logdir):
    file = logdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(run, condition):
    while not condition():
        assert run.poll() is None, f"ended with {run.status} too early: {run.stderr}"
        time.sleep(0.002)


class Run:
    """A forked process; its output is in the files `stdout` and `stderr` of its folder."""

    def __init__(self, server, pid, folder):
        self.server, self.pid, self.folder, self.status = server, pid, folder, None

    def poll(self):
        """The exit status, negative for a signal; None while it runs."""
        if self.status is None:
            self.status = self.server.ask(poll=self.pid)
        return self.status

    def wait(self, timeout=600):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s: {self.stderr}"
            time.sleep(0.02)
        return self.status

    def send(self, number):
        """To the process and those it started, as a terminal sends Ctrl-C."""
        os.killpg(self.pid, number)

    def kill(self):
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        assert self.wait() is not None

    @property
    def stdout(self):
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self):
        return (self.folder / "stderr").read_text()


class Server:
    """Has everything imported, and forks runs."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
        environment["PYTHONWARNINGS"] = "ignore:pkg_resources is deprecated"  # pygame's, with setuptools before 81
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import launcher; launcher.serve()"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder, *overrides, script="train", without=None, call=None, environment=None):
        """Starts `python examples/{script}.py *overrides` in `folder`; without: a package that is not installed.

        call: a function to call in place of the script, "module:name", with the overrides. environment: more variables.
        """
        folder.mkdir(parents=True, exist_ok=True)
        request = {"fork": list(overrides), "folder": str(folder), "script": script, "without": without}
        request |= {"call": call, "environment": environment or {}}
        return Run(self, self.ask(**request), folder)

    def run(self, folder, *overrides, timeout=600, **more):
        run = self.start(folder, *overrides, **more)
        run.wait(timeout)
        return run

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve():
    for script in SCRIPTS:
        import_module(f"r2dreamer.examples.{script}")
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _become(request)
                return
        print(json.dumps(answer), flush=True)


def _become(request):
    os.setsid()
    os.chdir(request["folder"])
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["without"]:
        for name in [name for name in sys.modules if name.split(".")[0] == request["without"]]:
            del sys.modules[name]
        sys.modules[request["without"]] = None  # as if it were not there
    os.environ |= request["environment"]
    if request["call"]:
        module, _, name = request["call"].partition(":")
        getattr(import_module(module), name)(*request["fork"])
        return
    sys.argv = [f"{request['script']}.py", *request["fork"]]
    sys.modules["r2dreamer.examples." + request["script"]].main()

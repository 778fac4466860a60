"""Worker processes that say how they ended, and the ParallelEnv that listens; `make_vector_env` puts them together."""

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import torch
from torchrl.envs import ParallelEnv

from .errors import WorkerError
from .gl import hanging_gl


def start_fork_server():
    """Start the clean process from which workers are forked, with everything slow already imported."""
    multiprocessing.set_forkserver_preload(["r2dreamer.envs"])
    # TorchRL imports MuJoCo, which opens the EGL display at once if MUJOCO_GL says so: a GL driver does not survive
    # being forked. The server therefore does not know of MUJOCO_GL; each worker is told.
    gl = os.environ.pop("MUJOCO_GL", None)
    try:
        forkserver.ensure_running()
    finally:
        if gl is not None:
            os.environ["MUJOCO_GL"] = gl


class Worker:
    """Builds the environment of one worker and leaves word, in a file, of how the worker ended."""

    def __init__(self, factory, reports):
        self.factory, self.reports, self.parent = factory, reports, os.getpid()
        self.gl = os.environ.get("MUJOCO_GL")
        self.task = getattr(factory, "keywords", {}).get("task") or next(iter(getattr(factory, "args", ())), None)

    def report(self, index):
        return Path(self.reports, f"{index}.traceback")

    def ready(self, index):
        return Path(self.reports, f"{index}.ready")

    def __call__(self, seed, index):
        if os.getpid() != self.parent:  # TorchRL also builds one in the parent, to read its specs
            if self.gl is not None:
                os.environ["MUJOCO_GL"] = self.gl
            file = open(self.report(index), "w", buffering=1)  # noqa: SIM115 - for the life of the worker
            faulthandler.enable(file)
            faulthandler.register(signal.SIGUSR1, file)
            sys.stderr = _Tee(sys.stderr, file)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which closes its workers
        env = self.factory(seed=seed)
        if os.getpid() != self.parent:
            self.ready(index).touch()
        return env


class _Tee:
    """A stream that writes to two."""

    def __init__(self, *streams):
        self.streams = streams

    def write(self, text):
        for stream in self.streams:
            stream.write(text)
        return len(text)

    def flush(self):
        for stream in self.streams:
            stream.flush()

    def __getattr__(self, name):
        return getattr(self.streams[0], name)


class WatchedParallelEnv(ParallelEnv):
    """A ParallelEnv that says which environment failed and why, and sleeps while it waits."""

    def watch(self, worker, seeds, timeout, reports):
        self.__dict__.update(_worker=worker, _env_seeds=seeds, _patience=timeout, _reports=reports)

    def _start_workers(self):
        watchdog = threading.Timer(self._patience, self._kill_unready)
        watchdog.daemon = True
        watchdog.start()
        try:
            super()._start_workers()
        except (EOFError, OSError) as error:  # the pipe of a worker that ended before it was ready
            unready = [index for index in range(self.num_workers) if not self._worker.ready(index).exists()]
            wrote = [index for index in unready if self._worker.report(index).exists()]
            failed = self._error((wrote or unready or [0])[0], "ended or hung while it was built")
            if not wrote:
                failed.add_note(
                    "In a script of your own, what it runs must stand below `if __name__ == '__main__':`, "
                    "because every worker imports that script first."
                )
            raise failed from error
        finally:
            watchdog.cancel()

    def _kill_unready(self):
        for process in self._workers:
            self._ask_for_stack(process)
        for process in self._workers:
            process.kill()

    def _cleanup_failed_worker_startup(self):
        for process in self._workers:  # TorchRL would first wait for each to answer
            process.kill()
            process.join()
        super()._cleanup_failed_worker_startup()

    def _wait_for_workers(self, workers_range):
        # TorchRL's own version spins, and so takes a core from the workers it is waiting for.
        flags, waiting = self._shm_done_flags, set(workers_range)
        deadline, polls = time.monotonic() + self._patience, 0
        while waiting:
            waiting = {index for index in waiting if not flags[index]}
            polls += 1
            if polls % 500 == 0:
                self._check_alive(waiting, deadline)
            if waiting:
                time.sleep(2e-5)
        for index in workers_range:
            flags[index] = 0

    def _check_alive(self, waiting, deadline):
        for index in waiting:
            process = self._workers[index]
            if not process.is_alive() and not self._shm_done_flags[index]:
                self._fail(index, f"ended ({_describe_exit(process.exitcode)})")
            if time.monotonic() > deadline:
                self._ask_for_stack(process)
                self._fail(index, f"did not answer within {self._patience:g} seconds")

    def _require_all_alive(self):
        """A worker that died between two calls: TorchRL would notice first, and name neither its task nor its seed."""
        if not self.is_closed:
            for index, process in enumerate(self._workers):
                if not process.is_alive():
                    self._fail(index, f"ended ({_describe_exit(process.exitcode)})")

    def step_and_maybe_reset(self, tensordict):
        self._require_all_alive()
        return super().step_and_maybe_reset(tensordict)

    def _step(self, tensordict):
        self._require_all_alive()
        return super()._step(tensordict)

    def _reset(self, tensordict=None, **kwargs):
        self._require_all_alive()
        return super()._reset(tensordict, **kwargs)

    def reseed_workers(self, seeds):
        try:
            for channel, seed in zip(self.parent_channels, seeds, strict=True):
                channel.send(("seed", (seed, True)))
            for index, channel in enumerate(self.parent_channels):
                if not channel.poll(self._patience):
                    self._ask_for_stack(self._workers[index])
                    self._fail(index, f"did not answer within {self._patience:g} seconds")
                channel.recv()
        except (EOFError, OSError):
            for index, process in enumerate(self._workers):
                process.join(0.5)
                if not process.is_alive():
                    self._fail(index, f"ended ({_describe_exit(process.exitcode)})")
            raise
        self.__dict__["_env_seeds"] = seeds

    @staticmethod
    def _ask_for_stack(process):
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.2)

    def _fail(self, index, what):
        error = self._error(index, what)
        for process in self._workers:
            process.kill()
        for process in self._workers:
            process.join()
        for channel in self.parent_channels:
            channel.close()
        self.is_closed = True
        raise error

    def _error(self, index, what):
        report = self._worker.report(index)
        text = report.read_text().strip() if report.exists() else ""
        error = WorkerError(
            f"The worker of environment {index} (task {self._worker.task!r}, seed {self._env_seeds[index]}) {what}. "
            + (f"Its traceback:\n{text}" if text else "It left no traceback.")
        )
        # A stack as faulthandler dumps it of a process that hangs, not the traceback of one that failed in rendering.
        if re.search(r"line \d+ in render$", text, re.MULTILINE):
            error.add_note(hanging_gl())
        return error

    def close(self, *, raise_if_closed=False):
        threads = torch.get_num_threads()
        super().close(raise_if_closed=raise_if_closed)
        torch.set_num_threads(threads)


def _describe_exit(code):
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; running out of memory is the usual cause" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"exit code {code}"

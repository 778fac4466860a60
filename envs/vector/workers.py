"""A pool of worker processes that step environments.

The rows of all environments lie in one piece of shared memory (`steppers.SharedArrays`). A pipe carries only one letter and,
where needed, numbers or seeds. A worker that dies or hangs becomes a `WorkerError` that names the environment it was at.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import mmap
import multiprocessing
import os
import pickle
import re
import select
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
import torch
from torchrl.envs import EnvBase

from ..base.errors import WorkerError
from ..base.gl import hanging_gl
from .steppers import LocalPool, SharedArrays

STEP, RESET, SEED, CLOSE = b"s", b"r", b"n", b"c"  # requests; numbers or seeds may follow
DONE, FAILED = b"d", b"f"  # replies
NUMBER = 8  # bytes, of which a worker keeps the number of the environment it is at, in front of its report


def start_fork_server() -> None:
    """Start the clean process from which workers are forked, with everything slow already imported."""
    multiprocessing.set_forkserver_preload(["r2dreamer.envs.vector.workers"])
    # TorchRL imports MuJoCo, which opens the EGL display at once if MUJOCO_GL says so: a GL driver does not survive
    # being forked. The server therefore does not know of MUJOCO_GL; each worker is told.
    gl = os.environ.pop("MUJOCO_GL", None)
    try:
        with ignored(signal.SIGHUP, signal.SIGTERM):
            forkserver.ensure_running()
    finally:
        if gl is not None:
            os.environ["MUJOCO_GL"] = gl


@contextlib.contextmanager
def ignored(*numbers: signal.Signals) -> Iterator[None]:
    """Processes started in here, and theirs, ignore these signals: what a closed terminal or Slurm sends is for the trainer."""
    if threading.current_thread() is not threading.main_thread():  # which alone can set signals
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- in the worker ----------------------------------------------------------------------------------------------------


class SharedFile:
    """A file in memory without a name; a process that is started with it as an argument inherits it.

    It ends with the last process that has it, however that process ends.
    """

    def __init__(self, descriptor: int | None = None):
        self.descriptor = os.memfd_create("r2dreamer") if descriptor is None else descriptor
        self.close = weakref.finalize(self, os.close, self.descriptor)

    def __reduce__(self) -> tuple:
        return _inherit, (reduction.DupFd(self.descriptor),)

    def map(self, size: int) -> np.ndarray:
        return np.frombuffer(mmap.mmap(self.descriptor, size), np.uint8)


def _inherit(handle: Any) -> SharedFile:
    return SharedFile(handle.detach())


@dataclass
class WorkerTask:
    """What a worker builds, the memory of its rows, and the file for its turn and its traceback."""

    factory: Callable[..., EnvBase]
    seeds: dict[int, int]  # number of the environment -> seed
    memory: SharedFile
    report: SharedFile
    gl: str | None


class TrainerGone(Exception):
    """The trainer closed its end of the pipe; an environment's own EOFError is an error like any other."""


def exit_with_trainer(life: Connection) -> None:
    """Has the system end this process, also in a step that hangs, when the trainer's end of this pipe closes."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends the process
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if life.poll():  # it had been closed before
        os._exit(0)


def run_worker(task: WorkerTask, channel: Connection, life: Connection) -> None:
    """The main function of a worker process."""
    exit_with_trainer(life)
    if task.gl is not None:
        os.environ["MUJOCO_GL"] = task.gl
    turn = task.report.map(NUMBER).view(np.int64)
    turn[0] = next(iter(task.seeds))
    file = os.fdopen(task.report.descriptor, "a", buffering=1, closefd=False)
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which closes its workers
    signal.signal(signal.SIGTERM, lambda *_: None)  # as Slurm sends it to all; programs that a simulator starts heed it
    torch.set_num_threads(1)

    def on_turn(number: int) -> None:
        turn[0] = number

    def exchange(call: Callable, *message: bytes) -> Any:
        try:
            return call(*message)
        except (EOFError, OSError) as error:
            raise TrainerGone from error

    reply, receive = partial(exchange, channel.send_bytes), partial(exchange, channel.recv_bytes)

    try:
        pool = LocalPool(task.factory, task.seeds, on_turn)
        reply(DONE + pickle.dumps((pool.layout, pool.specs)))
        layout, count = pickle.loads(receive())
        pool.attach(SharedArrays.allocate(layout, count, task.memory.map(SharedArrays.size_of(layout, count))))
        reply(DONE)
        while (request := receive()) != CLOSE:
            if request == STEP:
                pool.step()
            elif request[:1] == RESET:
                pool.reset(json.loads(request[1:]))
            else:
                pool.seed({int(number): seed for number, seed in json.loads(request[1:]).items()})
            reply(DONE)
        pool.close()
    except TrainerGone:
        os._exit(0)
    except BaseException:
        file.write(traceback.format_exc())
        with contextlib.suppress(OSError):
            channel.send_bytes(FAILED)
        os._exit(1)  # a broken simulator may hang when it is taken down


# -- in the trainer's process ----------------------------------------------------------------------------------------


class WorkerPool:
    """Processes that share the environments between them, with the methods of a `LocalPool`.

    Args:
        factory: Makes one environment, ``factory(seed=seed)``.
        seeds: One seed for each environment.
        count: The number of processes.
        timeout: Seconds to wait for a reply.
    """

    def __init__(self, factory: Callable[..., EnvBase], seeds: Sequence[int], count: int, timeout: float):
        start_fork_server()
        self.task = getattr(factory, "keywords", {}).get("task") or next(iter(getattr(factory, "args", ())), None)
        self.seeds, self.timeout = dict(enumerate(seeds)), timeout
        self.memory = SharedFile()
        numbers = [list(range(len(seeds)))[first::count] for first in range(count)]
        self.workers = [Worker(factory, {number: seeds[number] for number in mine}, self.memory) for mine in numbers]
        self.poller = select.poll()
        for worker in self.workers:
            self.poller.register(worker.channel, select.POLLIN)
        self.layout, self.specs = pickle.loads(self._receive(self.workers)[0])
        for worker in self.workers:
            worker.built = True

    def allocate(self) -> SharedArrays:
        """The rows of all environments, in memory that the workers share."""
        count = len(self.seeds)
        size = SharedArrays.size_of(self.layout, count)
        try:
            os.posix_fallocate(self.memory.descriptor, 0, size)
        except OSError as error:
            self.kill()
            raise OSError(f"No memory for the {size:,} bytes that environments and trainer share: {error}.") from error
        for worker in self.workers:
            self._send(worker, pickle.dumps((self.layout, count)))
        self._receive(self.workers)
        return SharedArrays.allocate(self.layout, count, self.memory.map(size))

    def step(self) -> None:
        for worker in self.workers:
            self._send(worker, STEP)
        self._receive(self.workers)

    def reset(self, numbers: Collection[int]) -> None:
        self._request(RESET, {worker: [n for n in worker.numbers if n in numbers] for worker in self.workers})

    def seed(self, seeds: Mapping[int, int]) -> None:
        shares = {worker: {n: seeds[n] for n in worker.numbers if n in seeds} for worker in self.workers}
        self._request(SEED, shares)
        self.seeds |= seeds

    def _request(self, request: bytes, shares: Mapping[Worker, Any]) -> None:
        busy = [worker for worker, share in shares.items() if share]
        for worker in busy:
            self._send(worker, request + json.dumps(shares[worker]).encode())
        self._receive(busy)

    def _send(self, worker: Worker, message: bytes) -> None:
        try:
            worker.channel.send_bytes(message)
        except OSError:  # it ended between two calls
            self._fail(worker)

    def _receive(self, workers: Sequence[Worker]) -> list[bytes]:
        """The replies of these workers; waits until the timeout."""
        waiting = {worker.channel.fileno(): worker for worker in workers}
        replies, deadline = {}, time.monotonic() + self.timeout
        while waiting:
            for descriptor, _ in self.poller.poll(1000 * max(0, deadline - time.monotonic())):
                worker = waiting.pop(descriptor, None)
                if worker is None:
                    continue
                try:
                    reply = worker.channel.recv_bytes()
                except (EOFError, OSError):
                    reply = FAILED
                if reply[:1] == FAILED:
                    self._fail(worker)
                replies[worker] = reply[1:]
            if waiting and time.monotonic() > deadline:
                self._fail(next(iter(waiting.values())), hangs=True)
        return [replies[worker] for worker in workers]

    def _fail(self, worker: Worker, hangs: bool = False) -> NoReturn:
        what = f"did not answer within {self.timeout:g} seconds"
        if hangs:
            worker.dump_stack()
        else:
            worker.process.join(5)
            what = f"ended ({_describe_exit(worker.process.exitcode)})"
        started, text = worker.turn[0] >= 0, worker.traceback()
        number = int(worker.turn[0]) if started else worker.numbers[0]
        if not worker.built:
            what += " while it was built"
        error = WorkerError(
            f"The worker of environment {number} (task {self.task!r}, seed {self.seeds[number]}) {what}. "
            + (f"Its traceback:\n{text}" if text else "It left no traceback.")
        )
        if not started:
            error.add_note(
                "In a script of your own, what it runs must stand below `if __name__ == '__main__':`, because every worker "
                "imports that script first."
            )
        # A stack as faulthandler dumps it of a process that hangs, not the traceback of one that failed in rendering.
        if re.search(r"line \d+ in render$", text, re.MULTILINE):
            error.add_note(f"It hung in the renderer: {hanging_gl()}")
        self.kill()
        raise error

    def pids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self.workers]

    def kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()

    def close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.channel.send_bytes(CLOSE)
        deadline = time.monotonic() + 5
        for worker in self.workers:
            worker.process.join(max(0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.channel.close()
            worker.life.close()
            worker.report.close()
        self.memory.close()


class Worker:
    """One worker process as the trainer sees it."""

    def __init__(self, factory: Callable[..., EnvBase], seeds: dict[int, int], memory: SharedFile):
        self.numbers, self.built = list(seeds), False
        self.report = SharedFile()
        os.write(self.report.descriptor, np.int64(-1).tobytes())  # until it has started
        self.turn = self.report.map(NUMBER).view(np.int64)
        # A forked copy of a process with torch threads and a GL context can hang; spawning imports torch once for each
        # worker, which takes seconds of CPU. The fork server imports it once and forks from a clean process.
        context = multiprocessing.get_context("forkserver")
        self.channel, theirs = context.Pipe()
        task = WorkerTask(factory, seeds, memory, self.report, os.environ.get("MUJOCO_GL"))
        life, self.life = context.Pipe(duplex=False)
        self.process = context.Process(target=run_worker, args=(task, theirs, life), daemon=True)
        self.process.start()
        weakref.finalize(self, self.process.kill)  # multiprocessing would end it with SIGTERM, and wait
        theirs.close()  # only then does a worker's end close the pipe here
        life.close()

    def traceback(self) -> str:
        size = os.fstat(self.report.descriptor).st_size
        return os.pread(self.report.descriptor, size, NUMBER).decode(errors="replace").strip()

    def dump_stack(self) -> None:
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; running out of memory is the usual cause" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"exit code {code}"

"""Worker processes that step environments and say how they ended, and the parent's end, which listens.

The rows of all environments lie in one piece of shared memory (`players.Arrays`); through a pipe go only a letter and,
where needed, numbers or seeds. A worker that dies or hangs becomes a `WorkerError` that names the environment it was at.
"""

import contextlib
import faulthandler
import fcntl
import json
import multiprocessing
import os
import pickle
import re
import select
import shutil
import signal
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch

from ..base.errors import WorkerError
from ..base.gl import hanging_gl
from .players import Arrays, Squad

STEP, BEGIN, SEED, CLOSE = b"s", b"b", b"n", b"c"  # what a worker is asked; numbers or seeds may follow
DONE, FAILED = b"d", b"f"  # what it answers
FOLDER = "r2dreamer-workers-"


def start_fork_server():
    """Start the clean process from which workers are forked, with everything slow already imported."""
    multiprocessing.set_forkserver_preload(["r2dreamer.envs.vector.workers"])
    # TorchRL imports MuJoCo, which opens the EGL display at once if MUJOCO_GL says so: a GL driver does not survive
    # being forked. The server therefore does not know of MUJOCO_GL; each worker is told.
    gl = os.environ.pop("MUJOCO_GL", None)
    try:
        with hang_up_ignored():
            forkserver.ensure_running()
    finally:
        if gl is not None:
            os.environ["MUJOCO_GL"] = gl


@contextlib.contextmanager
def hang_up_ignored():
    """Processes started in here, and theirs, ignore what a closed terminal sends to all: that is for the trainer."""
    if threading.current_thread() is not threading.main_thread():  # which alone can set signals
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


# -- in the worker ----------------------------------------------------------------------------------------------------


@dataclass
class Post:
    """What a worker builds, and the files in which it leaves word: which environment it is at, and how it ended."""

    factory: object
    seeds: dict  # number of the environment -> seed
    progress: Path
    report: Path
    gl: str | None


class Gone(Exception):
    """The trainer is; an EOFError of the environment's own is an error like any other."""


def end_with_trainer(life):
    """Has the system end this process, also in a step that hangs, when the trainer's end of this pipe is closed."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends the process
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if life.poll():  # it had been closed before
        os._exit(0)


def work(post, channel, life):
    """The life of a worker."""
    end_with_trainer(life)
    if post.gl is not None:
        os.environ["MUJOCO_GL"] = post.gl
    file = post.report.open("w", buffering=1)
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which closes its workers
    torch.set_num_threads(1)
    progress = np.memmap(post.progress, np.int64, "r+")

    def at(number):
        progress[0] = number

    def exchange(call, *message):
        try:
            return call(*message)
        except (EOFError, OSError) as error:
            raise Gone from error

    answer, ask = partial(exchange, channel.send_bytes), partial(exchange, channel.recv_bytes)

    try:
        squad = Squad(post.factory, post.seeds, at)
        answer(DONE + pickle.dumps(squad.describe()))
        memory, layout, count = pickle.loads(ask())
        squad.attach(Arrays.allocate(layout, count, np.memmap(memory, np.uint8, "r+")))
        answer(DONE)
        while (asked := ask()) != CLOSE:
            if asked == STEP:
                squad.step()
            elif asked[:1] == BEGIN:
                squad.begin(json.loads(asked[1:]))
            else:
                squad.seed({int(number): seed for number, seed in json.loads(asked[1:]).items()})
            answer(DONE)
        squad.close()
    except Gone:
        os._exit(0)
    except BaseException:
        file.write(traceback.format_exc())
        with contextlib.suppress(OSError):
            channel.send_bytes(FAILED)
        os._exit(1)  # a broken simulator may hang when it is taken down


# -- in the process that listens --------------------------------------------------------------------------------------


class Workers:
    """`count` processes that share the environments between them. Offers what a `Squad` does."""

    def __init__(self, factory, seeds, count, timeout):
        start_fork_server()
        self.task = getattr(factory, "keywords", {}).get("task") or next(iter(getattr(factory, "args", ())), None)
        self.seeds, self.patience = dict(enumerate(seeds)), timeout
        remove_leftovers()
        self.folder = tempfile.TemporaryDirectory(prefix=FOLDER)
        self.lock = lock(self.folder.name)
        numbers = [list(range(len(seeds)))[first::count] for first in range(count)]
        self.crew = [Member(factory, {number: seeds[number] for number in mine}, self.folder.name) for mine in numbers]
        self.listening = select.poll()
        for member in self.crew:
            self.listening.register(member.channel, select.POLLIN)
        self.layout, self.specs = pickle.loads(self._hear(self.crew)[0])
        for member in self.crew:
            member.built = True

    def allocate(self):
        """The rows of all environments, in memory that the workers share."""
        path = shared_file(Arrays.size_of(self.layout, len(self.seeds)), self.folder.name)
        for member in self.crew:
            self._tell(member, pickle.dumps((path, self.layout, len(self.seeds))))
        self._hear(self.crew)
        arrays = Arrays.allocate(self.layout, len(self.seeds), np.memmap(path, np.uint8, "r+"))
        os.unlink(path)  # it lives on as long as somebody has it mapped
        return arrays

    def step(self):
        for member in self.crew:
            self._tell(member, STEP)
        self._hear(self.crew)

    def begin(self, numbers):
        self._ask(BEGIN, {member: [n for n in member.numbers if n in numbers] for member in self.crew})

    def seed(self, seeds):
        self._ask(SEED, {m: {n: seeds[n] for n in m.numbers if n in seeds} for m in self.crew})
        self.seeds |= seeds

    def _ask(self, what, shares):
        asked = [member for member, share in shares.items() if share]
        for member in asked:
            self._tell(member, what + json.dumps(shares[member]).encode())
        self._hear(asked)

    def _tell(self, member, message):
        try:
            member.channel.send_bytes(message)
        except OSError:  # it ended between two calls
            self._fail(member)

    def _hear(self, members):
        """The answers of all of them; waits as long as patience lasts."""
        waiting = {member.channel.fileno(): member for member in members}
        answers, deadline = {}, time.monotonic() + self.patience
        while waiting:
            for descriptor, _ in self.listening.poll(1000 * max(0, deadline - time.monotonic())):
                member = waiting.pop(descriptor, None)
                if member is None:
                    continue
                try:
                    answer = member.channel.recv_bytes()
                except (EOFError, OSError):
                    answer = FAILED
                if answer[:1] == FAILED:
                    self._fail(member)
                answers[member] = answer[1:]
            if waiting and time.monotonic() > deadline:
                self._fail(next(iter(waiting.values())), hangs=True)
        return [answers[member] for member in members]

    def _fail(self, member, hangs=False):
        what = f"did not answer within {self.patience:g} seconds"
        if hangs:
            member.dump_stack()
        else:
            member.process.join(5)
            what = f"ended ({_describe_exit(member.process.exitcode)})"
        number = int(member.progress[0])
        text = member.report.read_text().strip() if member.report.exists() else ""
        if not member.built:
            what += " while it was built"
        error = WorkerError(
            f"The worker of environment {number} (task {self.task!r}, seed {self.seeds[number]}) {what}. "
            + (f"Its traceback:\n{text}" if text else "It left no traceback.")
        )
        if not member.report.exists():
            error.add_note(
                "In a script of your own, what it runs must stand below `if __name__ == '__main__':`, because every worker "
                "imports that script first."
            )
        # A stack as faulthandler dumps it of a process that hangs, not the traceback of one that failed in rendering.
        if re.search(r"line \d+ in render$", text, re.MULTILINE):
            error.add_note(f"It hung in the renderer: {hanging_gl()}")
        self.kill()
        raise error

    def pids(self):
        return [member.process.pid for member in self.crew]

    def kill(self):
        for member in self.crew:
            member.process.kill()

    def close(self):
        for member in self.crew:
            with contextlib.suppress(OSError):
                member.channel.send_bytes(CLOSE)
        deadline = time.monotonic() + 5
        for member in self.crew:
            member.process.join(max(0, deadline - time.monotonic()))
            member.process.kill()
            member.process.join()
            member.channel.close()
            member.life.close()
        self.folder.cleanup()
        os.close(self.lock)


class Member:
    """One worker as it is seen from outside."""

    def __init__(self, factory, seeds, folder):
        self.numbers, self.built = list(seeds), False
        self.report, progress = (Path(folder, f"{self.numbers[0]}.{what}") for what in ("traceback", "progress"))
        progress.write_bytes(np.int64(self.numbers[0]).tobytes())
        self.progress = np.memmap(progress, np.int64, "r")
        # A forked copy of a process with torch threads and a GL context can hang; spawning imports torch once for each
        # worker, which takes seconds of CPU. The fork server imports it once and forks from a clean process.
        context = multiprocessing.get_context("forkserver")
        self.channel, theirs = context.Pipe()
        post = Post(factory, seeds, progress, self.report, os.environ.get("MUJOCO_GL"))
        life, self.life = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(post, theirs, life), daemon=True)
        self.process.start()
        theirs.close()  # only then is a worker's end heard here
        life.close()

    def dump_stack(self):
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)


def shared_file(size, folder):
    """A file of `size` bytes, in memory where there is room; `remove_leftovers` finds it by the name of the folder."""
    for path in (f"/dev/shm/{Path(folder).name}", f"{folder}/shared"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
                return path
            except OSError:
                os.unlink(path)
            finally:
                os.close(descriptor)
    raise OSError(
        f"No room for {size:,} bytes that environments and trainer share, neither in /dev/shm nor in {folder}."
    )


def lock(folder):
    """A descriptor that holds the folder's lock, or None where another process holds it. The system lets go of it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)


def remove_leftovers():
    """Removes what killed processes left: folders of workers that nobody holds the lock of."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if time.time() - folder.stat().st_mtime < 60:
                continue  # its owner may be about to lock it
            held = lock(folder)
            if held is not None:
                Path("/dev/shm", folder.name).unlink(missing_ok=True)
                shutil.rmtree(folder)
                os.close(held)


def _describe_exit(code):
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; running out of memory is the usual cause" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"exit code {code}"

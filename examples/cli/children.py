"""Trainings as child processes: they are stopped with the program that started them, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .torchrun import launched

PARENT = "R2DREAMER_PARENT"  # environment variable: the process whose end is a child's end


class Children:
    """Processes that run now. Ctrl-C, SIGTERM and SIGHUP make them save and leave; Ctrl-C again makes them leave at once.

    Each is a session of its own, so that a terminal's Ctrl-C reaches it once, from here.
    """

    def __init__(self):
        self.stopped = False
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.RLock()  # the handler runs in the main thread, wherever that is

    def run(self, command: Sequence[str], **options: Any) -> int | None:
        """Its status; None if it is not started any more."""
        environment = {**os.environ, PARENT: str(os.getpid())}
        with self._lock:
            if self.stopped:
                return None
            child = subprocess.Popen(command, env=environment, start_new_session=True, **options)
            self._running.add(child)
            if self.stopped:  # by a signal that came while it was started
                child.send_signal(signal.SIGTERM)
        status = child.wait()
        with self._lock:
            self._running.discard(child)
        return status

    def __enter__(self) -> Children:
        self._before = take_signals(self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        again = self.stopped and number == signal.SIGINT
        if self.stopped and not again:
            return
        self.stopped = True
        for child in list(self._running):
            child.send_signal(signal.SIGINT if again else signal.SIGTERM)


def take_signals(handler: Callable) -> dict[int, Any]:
    """Handles Ctrl-C, SIGTERM and SIGHUP, which under nohup stays ignored; the handlers before."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def leave_with_parent() -> None:
    """Sends this process SIGTERM when the one that it was started for has ended, even by SIGKILL."""
    parent = int(os.environ.pop(PARENT, 0)) or (os.getppid() if launched() else 0)  # torchrun gives each rank a session
    if parent:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    print(f"The program that started this run, process {parent}, has ended.", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)

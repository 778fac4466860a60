"""What all tests share: how threads wait, and one process with everything imported, from which runs are forked."""

import fcntl
import os
import signal
from unittest import mock

import pytest

pytest.register_assert_rewrite("launcher", "saving", "subtle_oracle", "toys")  # whose asserts, too, say what differs

from launcher import Server  # noqa: E402

import r2dreamer.examples  # noqa: E402, F401 - sets how threads wait, before torch is imported

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by what the tests start
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test marked `alone` measures time or has deadlines: no other worker runs a test beside it."""
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        try:
            return (yield)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: processes forked meanwhile hold the file, too


@pytest.fixture(autouse=True)
def environment_of_its_own():
    """What a script sets for its workers ends with its test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.close()

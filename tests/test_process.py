"""What the example scripts change in their own process, and what importing their helpers leaves alone."""

import functools
import os
import subprocess
import sys

import pytest
from launcher import EXAMPLES

from r2dreamer.envs import count_workers, make_gym, make_vector_env
from r2dreamer.envs.replay.place import free_bytes
from r2dreamer.examples.cli.main import main
from r2dreamer.examples.cli.output import guarded_output

MAPPED = """
import ctypes, sys
import r2dreamer.examples
from r2dreamer.examples.training.malloc import keep_memory
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks a b c".split()]
libc.mallinfo2.restype = Counts
before = libc.mallinfo2().hblks
libc.malloc(1 << 26)
print(libc.mallinfo2().hblks - before)
"""


def python(code, **environment):
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("before", "environment", "mapped"),
    [("", {}, 1), ("keep_memory()", {}, 0), ("keep_memory()", {"R2DREAMER_MALLOC": "system"}, 1)],
)
def test_only_who_asks_keeps_large_blocks_on_the_heap(before, environment, mapped):
    code = MAPPED.format(before=before)
    assert python(code, **environment) == [str(mapped)]


@pytest.mark.parametrize("script", ["train", "benchmark"])
def test_a_script_that_trains_asks_before_torch_is_imported(script):
    code = f"""
import runpy, sys
import r2dreamer.examples.training.malloc
r2dreamer.examples.training.malloc.keep_memory = lambda: sys.exit(print("asked", "torch" in sys.modules))
runpy.run_path({str(EXAMPLES / script)!r} + ".py", run_name="__main__")
"""
    assert python(code) == ["asked", "False"]


def test_what_needs_linux_says_so_elsewhere(monkeypatch, capsys):
    from r2dreamer.examples.cli.script import friendly_errors

    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="in workers needs Linux, and this system is darwin.*parallel=False"):
        make_vector_env(functools.partial(make_gym, "CartPole-v1"), [2, 4], parallel=True)
    assert count_workers("auto", 5) == 0
    with pytest.raises(OSError, match="needs Linux.*storage='memmap'"):
        free_bytes("cpu")
    with pytest.raises(SystemExit):
        friendly_errors(lambda cfg: None)(None)
    assert "This script needs Linux" in capsys.readouterr().err


def test_without_fcntl_the_environments_import_and_the_trainer_says_what_is_missing():
    code = """
import sys
sys.modules["fcntl"] = None
import r2dreamer.envs
try:
    import r2dreamer.examples.training.setup
except ImportError as error:
    print(error)
"""
    assert "which linux does not have. Run them on Linux (WSL," in " ".join(python(code))


def test_a_process_without_standard_output_prints_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with guarded_output(pytest.fail):
        print("nobody reads this", flush=True)


def test_ctrl_c_while_a_command_is_imported_leaves_without_a_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("runpy.run_module", interrupted)
    monkeypatch.setattr(sys, "argv", ["r2dreamer", "curves", "run"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130 and capsys.readouterr().err == "Left at once.\n"

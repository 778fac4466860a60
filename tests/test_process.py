"""What the example scripts change in their own process, and what importing their helpers leaves alone."""

import os
import subprocess
import sys

import pytest
from launcher import EXAMPLES

MAPPED = """
import ctypes, sys
sys.path.insert(0, {examples!r})
import support
from support.memory import keep_memory
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
    code = MAPPED.format(examples=str(EXAMPLES), before=before)
    assert python(code, **environment) == [str(mapped)]


@pytest.mark.parametrize("script", ["train", "benchmark"])
def test_a_script_that_trains_asks_before_torch_is_imported(script):
    code = f"""
import runpy, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import support.memory
support.memory.keep_memory = lambda: sys.exit(print("asked", "torch" in sys.modules))
runpy.run_path({str(EXAMPLES / script)!r} + ".py", run_name="__main__")
"""
    assert python(code) == ["asked", "False"]

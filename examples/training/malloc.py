"""How a training process allocates memory."""

import contextlib
import ctypes
import os

SWITCH = "R2DREAMER_MALLOC"  # "system": allocate as any other program
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h; other systems have no mallopt


def keep_memory() -> None:
    """Keeps freed memory in this process, in huge pages; call it before torch is imported, and in a trainer only.

    An update frees and allocates the same gigabytes again and again. By default each large tensor is mapped afresh, page by
    page, every page zeroed. Kept on the heap they make an update on a CPU up to a fifth faster. The price: the process never
    gives memory back to the system. ``R2DREAMER_MALLOC=system`` in the environment switches this off.
    """
    if os.environ.get(SWITCH) == "system":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)

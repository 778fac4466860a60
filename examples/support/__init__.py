"""What the example scripts share. Import it before torch: see below."""

import contextlib
import ctypes
import os

# How long an OpenMP thread spins before it sleeps. GNU's default suits an idle machine and is up to ten times slower on
# one that does anything else (rendering workers, another run); this is as fast on an idle one. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# An update frees and allocates the same gigabytes again and again. By default each large tensor is mapped afresh, page by
# page, every page zeroed; kept on the heap, in huge pages, they make an update on a CPU up to a fifth faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h; other systems have no mallopt
with contextlib.suppress(AttributeError, OSError):
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_MMAP_MAX, 0)

"""The example scripts, and what they share. Import it before torch: see below."""

import os

# How long an OpenMP thread spins before it sleeps. GNU's default suits an idle machine and is up to ten times slower on
# one that does anything else (rendering workers, another run); this is as fast on an idle one. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

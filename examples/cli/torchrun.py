"""Which of the processes that `torchrun` starts this one is, and which of them speaks; a process alone is the first of one."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

GRACE = 1.0  # seconds that the other ranks give the first one to report an error that all of them have


def launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def place() -> tuple[int, int, int]:
    """How many ranks there are, which one this is, and which one on its machine."""
    return tuple(int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")) if launched() else (1, 0, 0)


class Board:
    """A few words between ranks, kept by torchrun's own process: they outlive a rank."""

    def __init__(self):
        import torch.distributed as dist

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        self.prefix = f"r2dreamer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def count(self, name: str, more: int = 1) -> int:
        return self.store.add(f"{self.prefix}/{name}", more)

    def missing(self, name: str, wait: float) -> list[int]:
        """The ranks that do not count themselves under this name within so many seconds."""
        ranks, rank, _ = place()
        self.count(f"{name}/{rank}")
        deadline = time.monotonic() + wait
        while True:
            missing = [other for other in range(ranks) if not self.count(f"{name}/{other}", 0)]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)


def complain(text: str) -> None:
    """Writes an error to stderr. Of several ranks the one that fails first speaks, and the others leave silently."""
    ranks, rank, _ = place()
    if ranks == 1:
        print(text, end="", file=sys.stderr)
        return
    if rank:
        time.sleep(GRACE)
        text = f"\nRank {rank}: {text.lstrip()}"
    with contextlib.suppress(RuntimeError):  # torchrun has ended
        if Board().count("failed") > 1:
            return
    print(text, end="", file=sys.__stderr__, flush=True)


@contextlib.contextmanager
def quiet_but_first() -> Iterator[None]:
    """All but the first rank print nothing; their errors go by `complain`."""
    if place()[1] == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield

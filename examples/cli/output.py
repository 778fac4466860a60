"""Output that may lose its reader: a closed terminal, or a pipe into a program that has ended."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class Output:
    """A text stream; once nobody reads it any more, what is written is dropped, and `lost` is called."""

    def __init__(self, stream: TextIO | None, lost: Callable[[], None]):
        self.stream, self.lost = stream, lost

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, name: str, *arguments: Any) -> None:
        if self.stream is None:  # the process began without it
            return
        try:
            getattr(self.stream, name)(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            with contextlib.suppress(OSError):  # what is still buffered has to go somewhere
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)
            self.lost()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def guarded_output(lost: Callable[[], None]) -> Iterator[None]:
    """Standard output and standard error as `Output`."""
    output, errors = (Output(stream, lost) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            yield
        finally:
            output.flush()
            errors.flush()

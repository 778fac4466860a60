"""What every example script is wrapped in: its configuration, Ctrl-C, and errors a user can read."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import ClassVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, InstantiationException
from omegaconf import DictConfig, OmegaConf

from r2dreamer.envs import WorkerError
from r2dreamer.envs.errors import require_linux
from r2dreamer.envs.workers import hang_up_ignored

from .checkpoint import CheckpointError
from .children import leave_with_parent
from .output import guarded_output

USER_ERRORS = (ValueError, ImportError, MemoryError, OSError, FloatingPointError, CheckpointError, WorkerError)


def script(config_name: str, foreign: bool = False) -> Callable:
    """Makes `main(cfg)` a command line: hydra's overrides of this configuration, errors as paragraphs.

    foreign: it opens runs that others may have made, perhaps from inside of one: no module is searched for there.
    """

    def decorate(main: Callable) -> Callable:
        run = hydra.main(version_base=None, config_path="pkg://r2dreamer.configs", config_name=config_name)

        @functools.wraps(main)
        def command(cfg: DictConfig | None = None) -> None:
            if foreign:
                os.environ["PYTHONSAFEPATH"] = "1"  # for the workers, too
            elif os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # a _target_ may be a module of the user's
            leave_with_parent()
            with hang_up_ignored():  # Python's own helper process, which TorchRL starts
                resource_tracker.ensure_running()
            try:
                with guarded_output(Interrupt.output_lost):
                    run(friendly_errors(main))(cfg)
            except SystemExit as left:
                if isinstance(left.__context__, ConfigCompositionException):  # hydra has said what is wrong
                    suggest(config_name, left.__context__)
                raise

        return command

    return decorate


def suggest(config_name: str, error: ConfigCompositionException) -> None:
    """Names the key that a misspelt one is nearest to."""
    if sized := re.search(r"In 'algorithm/(\w+)': Could not override 'model@", str(error)):
        name = sized[1]
        print(
            f"{name} has sizes of its own and cannot be a second member; run it alone, algorithm={name}.",
            file=sys.stderr,
        )
        return
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if not unknown:
        return
    wrong = unknown[1]
    known = keys_of(config_name, [each for each in sys.argv[1:] if wrong not in each])
    # A key of the right section first, then one of that name in any section.
    near = difflib.get_close_matches(wrong, known, n=2, cutoff=0.75)
    last = wrong.rpartition(".")[2]
    near += [key for key in known if key.rpartition(".")[2] == last]
    if near:
        print(f"Did you mean {' or '.join(dict.fromkeys(near))}?", file=sys.stderr)


def keys_of(config_name: str, overrides: list[str]) -> list[str]:
    """All keys that can be given, "model.belief" for example."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("r2dreamer.configs", version_base=None):
        try:
            cfg = hydra.compose(config_name, overrides)
        except Exception:  # another override is wrong, too
            cfg = hydra.compose(config_name)
    found, waiting = [], [("", OmegaConf.to_container(cfg, resolve=False))]
    while waiting:
        prefix, section = waiting.pop()
        for name, value in section.items():
            found.append(prefix + str(name))
            if isinstance(value, dict):
                waiting.append((f"{prefix}{name}.", value))
    return found


def leave_at_once() -> None:
    print("Left at once, without saving.", file=sys.stderr)
    sys.exit(130)


def friendly_errors(main: Callable) -> Callable:
    """A user's mistake ends the program with one paragraph and status 1; HYDRA_FULL_ERROR=1 brings the traceback."""

    @functools.wraps(main)
    def wrapped(cfg: DictConfig) -> None:
        try:
            require_linux("This script", "Run it in WSL or a container, or use the packages in a loop of your own.")
            main(cfg)
        except KeyboardInterrupt:
            leave_at_once()
        except (*USER_ERRORS, InstantiationException) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            cause = error
            while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
                cause = cause.__cause__
            paragraph = " ".join([f"{type(cause).__name__}: {cause}", *getattr(cause, "__notes__", [])])
            if "\n" not in paragraph:  # a worker's traceback keeps its lines
                paragraph = textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False)
            print(f"\n{paragraph}\n(HYDRA_FULL_ERROR=1 shows the traceback.)", file=sys.stderr)
            sys.exit(1)
        except RuntimeError as error:
            # What a KeyboardInterrupt becomes on its way out of tensordict's `with params.to_module(...)`.
            if isinstance(error.__context__, KeyboardInterrupt):
                leave_at_once()
            raise

    return wrapped


class Interrupt:
    """Ctrl-C, SIGTERM, SIGHUP or output that nobody reads: finish the step, save, leave with status 0.

    Ctrl-C after any of them: leave now, with status 130.
    """

    active: ClassVar[Interrupt | None] = None

    def __init__(self):
        self.requested = False

    def __enter__(self) -> Interrupt:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup a run outlives its terminal
            numbers.append(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        Interrupt.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Interrupt.active = None
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @classmethod
    def output_lost(cls) -> None:
        if cls.active is not None:
            cls.active.requested = True

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            with contextlib.suppress(OSError):  # unbuffered: the signal may have come in the middle of a print
                message = b"\nInterrupted: finishing this step, then leaving. Press Ctrl-C again to leave at once.\n"
                os.write(sys.__stderr__.fileno(), message)

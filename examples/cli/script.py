"""What every example script is wrapped in: its configuration, Ctrl-C, and errors a user can read."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import ClassVar

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from r2dreamer.envs.base.errors import require_linux
from r2dreamer.envs.vector.workers import ignored

from ..settings.schema import check
from ..settings.targets import SettingError
from .children import leave_with_parent, take_signals
from .messages import (
    USER_ERRORS,
    HeldBack,
    cannot_compose,
    default_of,
    own_traceback,
    paragraph,
    wants_traceback,
    what_is_wrong,
)
from .output import guarded_output
from .torchrun import complain, launched, place, quiet_but_first


def script(config_name: str, foreign: bool = False) -> Callable[[Callable], Callable[..., None]]:
    """Makes `main(cfg)` a command line: hydra's overrides of this configuration, checked; errors as paragraphs.

    Args:
        foreign: it opens runs that others may have made, perhaps from inside of one: no module is searched for there.
    """

    def decorate(main: Callable) -> Callable[..., None]:
        @functools.wraps(main)
        def command(cfg: DictConfig | None = None) -> None:
            if foreign:
                os.environ["PYTHONSAFEPATH"] = "1"  # for the workers, too
            else:
                search_here()
            leave_with_parent()
            with ignored(signal.SIGHUP):  # Python's own helper process, which TorchRL starts
                resource_tracker.ensure_running()
            with guarded_output(Interrupt.output_lost), quiet_but_first():
                compose(main, config_name, cfg)

        return command

    return decorate


def search_here() -> None:
    """A _target_ may be a module in the user's working directory."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def compose(main: Callable, config_name: str, cfg: DictConfig | None) -> None:
    """Hydra's part: the configuration from the command line, then `main`."""
    held = HeldBack(sys.stderr)
    run = hydra.main(version_base=None, config_path="pkg://r2dreamer.configs", config_name=config_name)
    try:
        with contextlib.redirect_stderr(held):
            run(friendly_errors(checked(main, config_name, held)))(cfg)
    except SystemExit as left:
        error = left.__context__
        if held.text and error is None:  # of argparse, after its usage
            held.text = f"{held.text.splitlines()[-1]}\nSettings are given as key=value; --help says more.\n"
        elif held.text and isinstance(error, Exception) and not wants_traceback():
            held.text = paragraph(cannot_compose(error, config_name))
        if place()[1] and held.text:  # printed only if the first rank can compose it
            complain(held.text)
        raise
    finally:
        held.release()


def checked(main: Callable, config_name: str, held: HeldBack) -> Callable:
    """`main`, once every setting is found to be of its kind."""

    @functools.wraps(main)
    def wrapped(cfg: DictConfig) -> None:
        held.release()
        try:
            check(cfg, config_name)
        except SettingError as error:
            others = [each for each in sys.argv[1:] if each.partition("=")[0].lstrip("+") != error.key]
            default = None if len(others) == len(sys.argv) - 1 else default_of(error.key, config_name, others)
            if default is not None:
                error.add_note(f"Without it {error.key}={default} is used.")
            raise
        with contextlib.redirect_stderr(held.stream):
            main(cfg)

    return wrapped


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
        except (*USER_ERRORS, HydraException, OmegaConfBaseException) as error:
            if wants_traceback():
                raise
            complain(paragraph(what_is_wrong(error)))
            sys.exit(1)
        except Exception as error:
            # What a KeyboardInterrupt becomes on its way out of tensordict's `with params.to_module(...)`.
            if isinstance(error, RuntimeError) and isinstance(error.__context__, KeyboardInterrupt):
                leave_at_once()
            if wants_traceback():
                raise
            said = f"{type(error).__name__} ended the program; the last lines of its traceback say where it was raised."
            complain(f"\n{said}\n{own_traceback(error)}")
            sys.exit(1)

    return wrapped


class Interrupt:
    """Ctrl-C, SIGTERM, SIGHUP or output that nobody reads: finish the step, save, leave with status 0.

    Ctrl-C after any of them: leave now, with status 130.
    """

    active: ClassVar[Interrupt | None] = None

    def __init__(self):
        self.requested = False

    def __enter__(self) -> Interrupt:
        self.previous = take_signals(self._handle)
        Interrupt.active = self
        return self

    def __exit__(self, kind: object, error: object, *_: object) -> None:
        Interrupt.active = None
        if error is not None and launched():
            # torchrun sends it once a rank has failed: the others still say which.
            self.previous[signal.SIGTERM] = signal.SIG_IGN
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
            if place()[1]:
                return
            with contextlib.suppress(OSError):  # unbuffered: the signal may have come in the middle of a print
                message = b"\nInterrupted: finishing this step, then leaving. Press Ctrl-C again to leave at once.\n"
                os.write(sys.__stderr__.fileno(), message)

"""What a user is told who said something wrong: a paragraph in place of frames of hydra's."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterable
from typing import TextIO

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchrl.checkpoint import CheckpointError

from r2dreamer.envs import WorkerError

from ..settings.compose import compose, entries
from ..settings.kinds import say
from ..settings.renamed import new_name
from ..settings.targets import SettingError

USER_ERRORS = (ValueError, ImportError, MemoryError, OSError, FloatingPointError, CheckpointError, WorkerError)


def what_is_wrong(error: Exception) -> str:
    """One sentence or a few of an error that is the user's to mend."""
    where, cause = "", error
    while isinstance(cause, InstantiationException):
        if (key := re.search(r"full_key: (\S+)", str(cause))) and not where:
            where = f" (in {key[1]})"
        if cause.__cause__ is None:
            break
        cause = cause.__cause__
    text = str(cause)
    if isinstance(cause, OmegaConfBaseException | InstantiationException):
        text = " ".join(line.strip() for line in text.splitlines() if "object_type=" not in line)
    elif isinstance(cause, WorkerError):
        text = without_traceback(text)
    kind = "" if isinstance(cause, SettingError) else f"{type(cause).__name__}: "
    return " ".join([f"{kind}{text}{where}", *getattr(cause, "__notes__", [])])


def without_traceback(text: str) -> str:
    """What a worker says that could not build its environment, if the reason is the user's to mend; else all of it."""
    head, built, traceback = text.partition(" while it was built. Its traceback:\n")
    last = [line for line in traceback.splitlines() if line and not line[0].isspace()][-1:]
    if built and last and last[0].partition(":")[0].rpartition(".")[2] in [each.__name__ for each in USER_ERRORS]:
        return f"{head} while it was built. {last[0]}"
    return text


def cannot_compose(error: Exception, config_name: str) -> str:
    """Why the command line makes no configuration, and what was probably meant."""
    text, cause = str(error), "" if isinstance(error, SettingError) else str(error.__cause__ or "")
    if " ".join(cause.split()) not in text:
        text = f"{text}\n{cause}".strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read ({lines[-2] if 'See http' in lines[-1] else lines[-1]}). Say key=value, in quotes if it holds brackets, spaces or ${{...}}."
    if sized := re.search(r"In 'algorithm/(\w+)': Could not override 'model@", text):
        return f"{sized[1]} has sizes of its own and cannot be a second member; run it alone, algorithm={sized[1]}."
    if isinstance(error, MissingConfigException):
        options = textwrap.shorten(", ".join(error.options or ["none"]), 350, placeholder=" ...")
        wrong = (error.missing_cfg_file or "").rpartition("/")[2]
        return f"{lines[0]}. {did_you_mean(wrong, error.options or [])}There are: {options}."
    if unknown := re.search(r"Could not override '([^']+)'", text):
        if new := new_name(unknown[1]):
            return f"{unknown[1]} is the former name of {new}. Say {new}=VALUE."
        found = nearest(unknown[1], config_name)
        hint = f"Did you mean {' or '.join(found)}?" if found else "Leave it out; --cfg job lists every key."
        return f"Could not override '{unknown[1]}': there is no such key. {hint}"
    choices = groups() if "Config group override" in text else {}  # hydra does not say which
    for override in sys.argv[1:]:
        group, _, value = override.partition("=")
        if group in choices and value not in choices[group]:
            options = textwrap.shorten(", ".join(choices[group]), 350, placeholder=" ...")
            return f"{override} must name one of {options}. {did_you_mean(value, choices[group])}Its keys are set by {group}.KEY=VALUE."
    return " ".join(lines[:4])


def did_you_mean(wrong: str, options: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, options, 1)
    return f"Did you mean {close[0]}? " if close else ""


def composed(config_name: str, overrides: list[str]) -> DictConfig:
    """The configuration with as many of these overrides as make one."""
    GlobalHydra.instance().clear()
    try:
        return compose(*overrides, name=config_name)
    except Exception:  # another override is wrong, too
        return compose(name=config_name)


def groups() -> dict[str, list[str]]:
    """The choices of every group."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("r2dreamer.configs", version_base=None):
        loader = GlobalHydra.instance().config_loader()
        return {name: loader.get_group_options(name) for name in loader.list_groups("") if name != "hydra"}


def default_of(key: str, config_name: str, overrides: list[str]) -> str | None:
    """What a key is without the override that set it; None if it is nothing."""
    try:
        value = OmegaConf.select(composed(config_name, overrides), key)
    except OmegaConfBaseException:
        return None
    return None if value is None or isinstance(value, DictConfig) else say(value)


def nearest(wrong: str, config_name: str) -> list[str]:
    """The keys that a misspelt one may stand for: of the right section first, then of that name in any section."""
    cfg = composed(config_name, [each for each in sys.argv[1:] if wrong not in each])
    known = [key for key, _ in entries(OmegaConf.to_container(cfg, resolve=False))]
    near = difflib.get_close_matches(wrong, known, n=2, cutoff=0.75)
    last = wrong.rpartition(".")[2]
    return list(dict.fromkeys([*near, *(key for key in known if key.rpartition(".")[2] == last)]))[:4]


def wants_traceback() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def own_traceback(error: BaseException) -> str:
    """The traceback without hydra's frames, of an error that may come from the user's own code."""
    shown = traceback.TracebackException.from_exception(error)
    waiting = [shown]
    while waiting:
        each = waiting.pop()
        frames = [frame for frame in each.stack if f"{os.sep}hydra{os.sep}" not in frame.filename]
        each.stack = traceback.StackSummary.from_list(frames)
        waiting += filter(None, (each.__cause__, each.__context__))
    return "".join(shown.format())


def paragraph(text: str) -> str:
    if "\n" not in text:  # a worker's traceback keeps its lines
        text = textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)
    return f"\n{text}\n(HYDRA_FULL_ERROR=1 shows the traceback.)\n"


class HeldBack(io.TextIOBase):
    """Holds back what hydra prints while it composes the configuration; once released, it lets everything through."""

    def __init__(self, stream: TextIO):
        self.stream, self.text, self.released = stream, "", False

    def write(self, text: str) -> int:
        if self.released:
            return self.stream.write(text)
        self.text += text
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def release(self) -> None:
        self.released, held, self.text = True, self.text, ""
        self.stream.write(held)

"""Which suite has which tasks, for those who named the wrong one; only what is installed is asked."""

import contextlib
import importlib

from .gl import choose_gl


def suites_with(task):
    """The values of `env=` whose suites have a task of this name."""
    choose_gl()  # before MuJoCo is imported: it reads the variable only then
    found = []
    for suite, tasks in SUITES.items():
        with contextlib.suppress(Exception):  # an extra is missing, or cannot be imported: no hint from there
            if str(task).removesuffix("-v3") in tasks() or str(task) in tasks():
                found.append(suite)
    return found


def _dmc():
    return {"_".join(names) for names in importlib.import_module("dm_control.suite").ALL_TASKS}


def _atari():
    try:
        return importlib.import_module("ale_py.roms").get_all_rom_ids()
    except ImportError:  # the extra is missing: those of the benchmark
        return importlib.import_module("r2dreamer.envs.atari_scores").SCORES


def _metaworld():
    return {name.removesuffix("-v3") for name in importlib.import_module("metaworld").ALL_V3_ENVIRONMENTS}


SUITES = {
    "dmc_vision": _dmc,
    "dmc_proprio": _dmc,
    "dmc_subtle": lambda: importlib.import_module("r2dreamer.envs.subtle").OFFICIAL,
    "metaworld": _metaworld,
    "atari100k": _atari,
    "crafter": lambda: importlib.import_module("r2dreamer.envs.crafter").TASKS,
    "memory_maze": lambda: importlib.import_module("r2dreamer.envs.memory_maze").TASKS,
    "gym": lambda: importlib.import_module("gymnasium").registry,
    "probe": lambda: importlib.import_module("r2dreamer.envs.probes").PROBES,
}

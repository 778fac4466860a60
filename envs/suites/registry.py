"""Which suite has which tasks, for those who named the wrong one: as installed, or as written here where it is not."""

import contextlib
import importlib

from ..base.gl import choose_gl


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
    try:
        return {"_".join(names) for names in importlib.import_module("dm_control.suite").ALL_TASKS}
    except Exception:  # the extra is missing, or MuJoCo finds no OpenGL
        return DMC


def _atari():
    try:
        return importlib.import_module("ale_py.roms").get_all_rom_ids()
    except ImportError:  # the extra is missing: those of the benchmark
        return importlib.import_module("r2dreamer.envs.suites.registry.atari_scores").SCORES


def _metaworld():
    try:
        return {name.removesuffix("-v3") for name in importlib.import_module("metaworld").ALL_V3_ENVIRONMENTS}
    except Exception:
        return METAWORLD


DMC = """
    acrobot_swingup acrobot_swingup_sparse ball_in_cup_catch cartpole_balance cartpole_balance_sparse
    cartpole_swingup cartpole_swingup_sparse cartpole_three_poles cartpole_two_poles cheetah_run dog_fetch
    dog_run dog_stand dog_trot dog_walk finger_spin finger_turn_easy finger_turn_hard fish_swim fish_upright
    hopper_hop hopper_stand humanoid_CMU_run humanoid_CMU_stand humanoid_CMU_walk humanoid_run
    humanoid_run_pure_state humanoid_stand humanoid_walk lqr_lqr_2_1 lqr_lqr_6_2 manipulator_bring_ball
    manipulator_bring_peg manipulator_insert_ball manipulator_insert_peg pendulum_swingup point_mass_easy
    point_mass_hard quadruped_escape quadruped_fetch quadruped_run quadruped_walk reacher_easy reacher_hard
    stacker_stack_2 stacker_stack_4 swimmer_swimmer15 swimmer_swimmer6 walker_run walker_stand walker_walk
""".split()  # noqa: SIM905
METAWORLD = """
    assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall
    button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open
    door-unlock drawer-close drawer-open faucet-close faucet-open hammer hand-insert handle-press
    handle-press-side handle-pull handle-pull-side lever-pull peg-insert-side peg-unplug-side pick-out-of-hole
    pick-place pick-place-wall plate-slide plate-slide-back plate-slide-back-side plate-slide-side push
    push-back push-wall reach reach-wall shelf-place soccer stick-pull stick-push sweep sweep-into window-close
    window-open
""".split()  # noqa: SIM905
SUITES = {
    "dmc_vision": _dmc,
    "dmc_proprio": _dmc,
    "dmc_subtle": lambda: importlib.import_module("r2dreamer.envs.transforms.subtle").OFFICIAL,
    "metaworld": _metaworld,
    "atari100k": _atari,
    "crafter": lambda: importlib.import_module("r2dreamer.envs.suites.registry.crafter").TASKS,
    "memory_maze": lambda: importlib.import_module("r2dreamer.envs.suites.registry.memory_maze").TASKS,
    "gym": lambda: importlib.import_module("gymnasium").registry,
    "probe": lambda: importlib.import_module("r2dreamer.envs.suites.registry.probes").PROBES,
}

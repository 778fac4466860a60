"""The registry of suites: who asks about suites is told by it, and a new suite is one Python file and one yaml."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import EXAMPLES, TINY, config

from r2dreamer.envs import make_probe
from r2dreamer.envs.suites.registry import suites, suites_with, table, targets

CONFIGS = EXAMPLES.parent / "configs" / "env"
SUITE = """
import numpy as np
from r2dreamer.envs.base.contract import apply_contract
from r2dreamer.envs.base.simulator import Simulator
from r2dreamer.envs.suites.registry import register, unknown_task

class Corridor(Simulator):
    def __init__(self):
        super().__init__(observations={"place": (1,)}, actions=2)

    def seed(self, number):
        pass

    def begin(self):
        self.place = 0
        return {"place": np.array([0], np.float32)}

    def advance(self, action):
        self.place += 2 * action - 1
        end = abs(self.place) == 3
        return {"place": np.array([self.place], np.float32)}, float(self.place == 3), end, False

def make_corridor(task, *, seed):
    if task != "short":
        raise unknown_task(task, ["short"], "The corridor")
    return apply_contract(Corridor(), task, seed)

register("corridor", title="A corridor", make=make_corridor, tasks=lambda: ["short"], extra="corridor")
"""
YAML = """
suite: corridor
task: short
action_repeat: 1
total_frames: 100
train_ratio: 5
num_envs: 1
eval_episodes: 1
scores: null
parallel: false
train_scores: null
make:
  _target_: r2dreamer.envs.suites.corridor.make_corridor
  _partial_: true
  task: ${env.task}
make_evaluation: ${env.make}
"""
# The folder stands for envs/suites and configs/env of a checkout: files in them are all that is added.
COMMAND = """
import runpy, sys
import r2dreamer.envs.suites
r2dreamer.envs.suites.__path__.append(sys.argv[1])
script = sys.argv[2]
sys.argv = [script, *sys.argv[3:]]
runpy.run_module(f"r2dreamer.examples.{script}", run_name="__main__")
"""


@pytest.fixture(scope="module")
def corridor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corridor")
    (folder / "suites").mkdir()
    (folder / "configs" / "env").mkdir(parents=True)
    (folder / "suites" / "corridor.py").write_text(SUITE)
    (folder / "configs" / "env" / "corridor.yaml").write_text(YAML)
    return folder


def run(folder, script, *overrides):
    command = [sys.executable, "-c", COMMAND, str(folder / "suites"), script, *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_new_suite_is_one_python_file_and_one_yaml_and_trains(corridor):
    configs = ["--config-dir", str(corridor / "configs"), "env=corridor"]
    tiny = [each for each in TINY if not each.startswith("env.num_envs")]
    done = run(corridor, "train", *configs, *tiny, "total_frames=120", "logdir=log")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (corridor / "log" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/barlow" in line for line in lines) and any("eval/return" in line for line in lines)
    done = run(corridor, "evaluate", "checkpoint=log", "episodes=1", "device=cpu")
    assert done.returncode == 0, done.stderr  # also what a saved run may name is told by the registry


def test_doctor_and_the_hint_know_a_new_suite(corridor):
    code = """
import sys
import r2dreamer.envs.suites
r2dreamer.envs.suites.__path__.append(sys.argv[1])
from r2dreamer.envs.suites.registry import suites, suites_with, table
print(suites_with("short"), "`env=corridor` | A corridor" in table(), suites()["corridor"].installed)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(corridor / "suites")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "['corridor'] True True"


def test_every_environment_of_the_configs_is_a_registered_suite_and_named_in_the_table():
    files = {file.stem for file in CONFIGS.glob("*.yaml")}
    assert set(suites()) == files and all(f"`env={name}`" in table() for name in files)
    for name in files - {"custom"}:
        cfg = config(f"env={name}")
        assert cfg.env.suite == name and cfg.env.task in suites()[name].tasks()
        assert cfg.env.make._target_ in targets()


def test_every_file_of_the_suites_that_makes_environments_registers():
    folder = Path(suites.__code__.co_filename).parent
    makers = {suite.make.__module__.rpartition(".")[2] for suite in suites().values()}
    written = {file.stem for file in folder.glob("*.py") if "\ndef make_" in file.read_text()}
    assert makers == written


def test_a_suite_whose_extra_is_missing_keeps_the_registry_working(monkeypatch):
    for module in ("gymnasium", "dm_control", "dm_control.suite", "metaworld", "ale_py", "crafter", "memory_maze"):
        monkeypatch.setitem(sys.modules, module, None)
    assert suites_with("walker_walk") == ["dmc_vision", "dmc_proprio", "dmc_distracting"] and suites_with(
        "door-open-v3"
    ) == ["metaworld"]
    with pytest.raises(ValueError, match="use env=atari100k env.task=alien"):
        make_probe("alien", seed=0)

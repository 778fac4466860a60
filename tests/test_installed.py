"""What an installed copy needs: every name in the packaged configurations, and a run from an empty directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import CARTPOLE

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import r2dreamer.configs

ROOT = Path(__file__).parent.parent
CONFIGS = Path(r2dreamer.configs.__file__).parent


def targets(section):
    """Every `_target_`, at any depth."""
    if isinstance(section, dict):
        for key, value in section.items():
            if key == "_target_":
                yield value
            yield from targets(value)
    elif isinstance(section, list):
        for value in section:
            yield from targets(value)


def test_every_name_in_the_packaged_configurations_is_of_an_installed_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "examples")]
    )
    found = {}
    for file in sorted(CONFIGS.rglob("*.yaml")):
        section = OmegaConf.load(file)
        if isinstance(section, DictConfig):
            found |= dict.fromkeys(targets(OmegaConf.to_container(section)), file.name)
    assert {"r2dreamer.examples.training.metrics.WandbLogger", "torchrl.objectives.SoftUpdate"} <= found.keys()
    for name, file in found.items():
        assert name.split(".")[0] in ("r2dreamer", "torchrl", "torch"), f"{file}: {name}"
        assert callable(get_object(name)), f"{file}: {name}"


@pytest.mark.parametrize("command", ["-m r2dreamer.examples.train", "-m r2dreamer.examples.cli.main train"])
def test_a_run_with_workers_begins_in_an_empty_directory(tmp_path, command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    overrides = [*CARTPOLE, "env.parallel=true", "total_frames=40", "eval.every=1000", "logdir=run"]
    arguments = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    run = subprocess.run([sys.executable, *command.split(), *overrides], **arguments)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists() and [path.name for path in tmp_path.iterdir()] == ["run"]

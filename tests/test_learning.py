"""R2-Dreamer learns from 64x64 pixels on a CPU: every probe to 90 % of its known optimum."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from launcher import EXAMPLES, config

from r2dreamer.envs import PROBES, make_probe
from r2dreamer.examples.training.metrics import read_metrics


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All probes, as many at once as there are cores; the longest first. Each is the command a user would type."""
    folder = tmp_path_factory.mktemp("probes")
    frames = config("experiment=probe").env.frames

    def train(task):
        overrides = [f"env.task={task}", f"logdir={folder / task}", "progress=false"]
        command = [sys.executable, str(EXAMPLES / "train.py"), "experiment=probe", *overrides]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        return [line["eval/return"] for line in read_metrics(folder / task) if "eval/return" in line]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {task: pool.submit(train, task) for task in sorted(PROBES, key=frames.get, reverse=True)}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task", PROBES)
def test_the_probe_is_learnt(runs, task):
    probe = make_probe(task, seed=0)
    returns = runs[task].result()
    assert returns[0] < 0.9 * probe.optimum, "the untrained agent must not pass"
    assert returns[-1] >= 0.9 * probe.optimum, f"{returns} of {probe.optimum} (random {probe.random_return})"

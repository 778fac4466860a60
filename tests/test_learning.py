"""R2-Dreamer learns from 64x64 pixels on a CPU: every probe to 90 % of its known optimum."""

import pytest
from launcher import lines

from r2dreamer.envs import PROBES, make_probe

QUICK = "reward_from_action"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "task", [QUICK, *(pytest.param(task, marks=pytest.mark.slow) for task in PROBES if task != QUICK)]
)
def test_the_probe_is_learnt(server, tmp_path, task):
    command = ["experiment=probe", f"env.task={task}", "logdir=log", "progress=false"]
    run = server.run(tmp_path, *command, timeout=1800)
    assert run.status == 0, run.stderr[-3000:]
    probe = make_probe(task, seed=0)
    returns = [line["eval/return"] for line in lines(tmp_path / "log", '"eval/return"')]
    assert returns[0] < 0.9 * probe.optimum, "the untrained agent must not pass"
    assert returns[-1] >= 0.9 * probe.optimum, f"{returns} of {probe.optimum} (random {probe.random_return})"

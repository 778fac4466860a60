"""R2-Dreamer learns from 64x64 pixels on a CPU: the probes to 90 % of their known optimum."""

import pytest
from hydra import compose, initialize_config_module
from train import Trainer

from r2dreamer.envs import PROBES, make_probe
from support.metrics import read_metrics

# Known failures of this configuration, measured at seed 0 after about 600 updates; they wait for a mend, not for luck.
OPEN = {"remember_first_frame": "0.53 of 1.0, as at random", "small_target": "4.2 of 8.0, as at random"}


def tasks():
    for task in PROBES:
        yield pytest.param(task, marks=pytest.mark.xfail(task in OPEN, reason=OPEN.get(task, ""), run=False))


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("task", tasks())
def test_the_probe_is_learnt(task, tmp_path):
    with initialize_config_module("r2dreamer.configs", version_base=None):
        cfg = compose("config", ["experiment=probe", f"env.task={task}", f"logdir={tmp_path}", "progress=false"])
    trainer = Trainer(cfg)
    try:
        trainer.run()
    finally:
        trainer.close()
    probe = make_probe(task, seed=0)
    returns = [line["eval/return"] for line in read_metrics(tmp_path) if "eval/return" in line]
    assert returns[0] < 0.9 * probe.optimum, "the untrained agent must not pass"
    assert returns[-1] >= 0.9 * probe.optimum, f"{returns} of {probe.optimum} (random {probe.random_return})"

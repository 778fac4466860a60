"""R2-Dreamer learns from 64x64 pixels on a CPU: every probe to 90 % of its known optimum."""

import pytest
from hydra import compose, initialize_config_module
from train import Trainer

from r2dreamer.envs import PROBES, make_probe
from support.metrics import read_metrics


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("task", PROBES)
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

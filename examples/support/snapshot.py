"""What a checkpoint of the trainer holds, beside the replay and the random generators, and how it is put back."""

from __future__ import annotations

from omegaconf import OmegaConf
from torchrl.trainers.algorithms.dreamer_v3 import DreamerV3UpdateRatio

from r2dreamer.dreamer.pretrained import pack


def _stateful(trainer) -> dict[str, dict]:
    learner = trainer.learner
    return {
        "learner": {"model": learner, "optimizer": learner.optimizer, "scaler": learner.scaler},
        "trainer": {"ratio": trainer.ratio, "averages": trainer.averages, "returns": trainer.returns},
    }


def snapshot(trainer) -> dict:
    groups = _stateful(trainer).items()
    state = {group: {name: part.state_dict() for name, part in parts.items()} for group, parts in groups}
    config = OmegaConf.to_container(trainer.cfg, resolve=True)
    algorithm, probe = config["algorithm"], getattr(trainer.learner.probe, "decoder", None)
    more = {} if probe is None else {"probe": (algorithm["probe"]["decoder"], probe)}
    return state | {
        # The learner's own tensors, under names for load_pretrained; torch.save writes shared memory once.
        "agent": pack(trainer.agent, algorithm["agent"] | config["model"], more),
        "count": dict(trainer.count),
        "config": config,
        "metrics": trainer.metrics.position(),
    }


def restore(trainer) -> None:
    saved, cfg, rate = trainer.saved, trainer.cfg, trainer.ratio.ratio
    for group, parts in _stateful(trainer).items():
        for name, part in parts.items():
            part.load_state_dict(saved.state[group][name])
    trainer.ratio.ratio = rate  # as configured now: a run may go on with another ratio or batch
    trainer.count = dict(saved.state["count"])
    if not cfg.checkpoint.exact:
        trainer.count["restarts"] += 1
    if not saved.restore_replay(trainer.replay):  # left out of the checkpoint: collect anew, owe nothing for it
        trainer.first_update = trainer.count["policy_steps"] + cfg.warmup_steps
        trainer.ratio = DreamerV3UpdateRatio(rate)

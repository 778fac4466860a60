"""Every member of the family trains from the one script, by its name alone, and logs whether it collapses."""

import pytest
from launcher import PENDULUM, TINY, config, lines, train_here

OBJECTIVES = {
    "r2dreamer": {"barlow"},
    "dreamer": {"reconstruction"},
    "infonce": {"infonce"},
    "vicreg": {"vicreg"},
    "dreamerpro": {"swapped", "temporal", "norm"},
    "none": set(),
}
MEMBERS = list(OBJECTIVES)
SHARED = {"dynamics", "representation", "reward", "continue", "actor", "value", "replay_value"}
ONCE = ["eval.every=1000000", "env.eval_episodes=1", "checkpoint.every=1000000"]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("task", [["experiment=quickstart"], ["experiment=probe", "env.task=small_target"]], ids=str)
def test_every_member_trains(tmp_path, name, task):
    trainer = train_here(tmp_path, *task, *TINY, *ONCE, f"algorithm={name}", "total_frames=80", "log_every=80")
    assert trainer.count["updates"] >= 10
    (logged,) = lines(tmp_path, '"count/updates"')
    losses = {key.removeprefix("loss/") for key in logged if key.startswith("loss/")}
    assert losses == SHARED | OBJECTIVES[name]
    for view in ("embedding", "state"):
        assert logged[f"train/{view}_rank"] > 0 and logged[f"train/{view}_std"] > 0


def test_the_augmentation_is_an_independent_switch(tmp_path):
    pixels = ["env=probe", "env.task=ending", *TINY, *ONCE, "total_frames=40", "log_every=40"]
    losses = []
    for name, overrides in (("without", []), ("with", ["augmentation=random_shift"])):
        train_here(tmp_path / name, *pixels, *overrides, "algorithm=dreamer")
        losses.append(lines(tmp_path / name, '"count/updates"')[-1]["loss/reconstruction"])
    assert losses[0] != losses[1]


def test_members_build_only_what_they_need():
    heads = {name: set(config(f"algorithm={name}").algorithm.agent["heads"]) for name in OBJECTIVES}
    projection = {"projection"}
    assert heads == {
        "r2dreamer": projection,
        "infonce": projection,
        "vicreg": projection,
        "dreamer": {"decoder"},
        "dreamerpro": set(),
        "none": set(),
    }


def test_a_continuous_member_with_decoder_in_mixed_precision(tmp_path):
    trainer = train_here(tmp_path, *PENDULUM, *ONCE, "algorithm=dreamer", "precision=bf16", "total_frames=80")
    assert trainer.count["updates"] >= 10 and "reconstruction_observation" in str(lines(tmp_path)[-2])

"""examples/attack.py and examples/saliency.py from a checkpoint alone: what they write, refuse, and keep when stopped."""

import json
import signal

import numpy as np
import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import hydra
import torch
from hydra.errors import InstantiationException
from launcher import TINY, config, wait_for
from torchrl.checkpoint import CheckpointError

from r2dreamer.dreamer import load_pretrained
from r2dreamer.envs import AdversarialPatch
from r2dreamer.examples import attack, evaluate, saliency
from r2dreamer.examples.attacks.occlusion import OcclusionSaliency
from r2dreamer.examples.export import export
from r2dreamer.examples.settings.schema import check
from r2dreamer.examples.training.checkpoint import Checkpoints
from r2dreamer.examples.training.learner import Learner
from r2dreamer.examples.training.loading import load_trained

SEEING = [
    "env=probe",
    "env.task=small_target",
    *TINY,
    "env.make.image_size=16",
    "total_frames=120",
    "checkpoint.every=60",
]
QUICK = ["progress=false", "precision=fp32", "device=cpu", "attack.patch.patch_hw=[4,6]", "collect.episodes=4"]
QUICK += [
    "collect.context=3",
    "optimize.steps=4",
    "optimize.eval_every=2",
    "optimize.batch_size=3",
    "evaluate.episodes=3",
]
QUICK += ["optimize.eval_windows=5", "attack.loss.imagination_horizon=3"]


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    run = server.run(folder, *SEEING, "logdir=log")
    assert run.status == 0, run.stderr
    return folder / "log"


@pytest.fixture(scope="module")
def opened(trained):
    return load_trained(str(trained), torch.device("cpu"))


def test_one_command_attacks_a_checkpoint_and_reports_every_condition(server, trained, tmp_path):
    earlier = min((trained / "checkpoints").glob("step_*"))
    run = server.run(tmp_path, f"checkpoint={trained}", f"other={earlier}", "beside=patched", *QUICK, script="attack")
    assert run.status == 0, run.stderr
    out = trained / "attack"
    found = json.loads((out / "metrics.json").read_text())
    conditions = found["conditions"]
    unoptimised = ["grey", "black", "white", "noise", "shuffled", "other agent"]
    assert list(conditions) == ["clean", "optimized", *unoptimised, "patched belief"]
    for name, line in conditions.items():
        assert len(line["returns"]) == 3 and line["mean"] == pytest.approx(np.mean(line["returns"]))
        if name != "clean":
            assert line["change"]["mean"] == pytest.approx(line["mean"] - conditions["clean"]["mean"])
            assert set(line["imagined"]) == {"clean", "patched"} and line["imagined"]["patched"]["kl"] > 0
    assert found["other"] == {"name": "tiny", "seed": 0, "frames": int(earlier.name.removeprefix("step_"))}
    assert found["agent"] == {"name": "tiny", "seed": 0, "frames": 120} and found["config"]["optimize"]["steps"] == 4
    assert [point["step"] for point in found["searches"]["optimized"]["curve"]] == [0, 2, 4]
    assert (out / "table.md").read_text().splitlines()[0] in run.stdout and found["verdict"] in run.stdout
    patches = [AdversarialPatch.load(out / f"{name}.npz") for name in ("patch", "patch_patched_belief")]
    assert all(patch.patch_hw == (4, 6) and patch.content().shape == (4, 6, 3) for patch in patches)
    assert not torch.equal(patches[0].delta, patches[1].delta)
    for picture in ("patch.png", "curve.png", "frames.png", "attack.mp4"):
        assert (out / picture).stat().st_size > 500, picture
    again = ["video=false", f"out={tmp_path}/again", f"other={out}/patch_patched_belief.npz"]
    run = server.run(tmp_path, f"checkpoint={earlier.parent}", *again, *QUICK, script="attack")
    assert run.status == 0, run.stderr
    repeated = json.loads((tmp_path / "again" / "metrics.json").read_text())
    for name in ("clean", "optimized", "noise"):  # a seed repeats, and files that stand for agents do too
        assert repeated["conditions"][name]["returns"] == conditions[name]["returns"]
    assert repeated["conditions"]["other agent"]["imagined"] == conditions["patched belief"]["imagined"]
    assert not (tmp_path / "again" / "attack.mp4").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["attack.patch.eot_translations=4", "precision=bf16", "attack.patch.placement=random", "attack.patch.onset=2"],
        ["attack=perturb", "precision=bf16", "attack.patch.placement=saliency", "attack.allowed=[0,0,9,16]"],
    ],
)
def test_other_placements_and_precisions_run(server, trained, tmp_path, settings):
    run = server.run(tmp_path, f"checkpoint={trained}", "out=out", "video=false", *QUICK, *settings, script="attack")
    assert run.status == 0, run.stderr
    patch = AdversarialPatch.load(tmp_path / "out" / "patch.npz")
    if patch.placement == "saliency":
        assert patch.heat.shape == (16, 16) and patch.heat.max() > 0 and patch.found[0] <= 5
    else:
        assert patch.placement == "random" and patch.onset == 2
    assert "no patch of another agent was given" in run.stdout


def test_ctrl_c_keeps_the_best_patch_so_far(server, trained, tmp_path):
    endless = ["progress=true", "optimize.steps=100000"]
    run = server.start(tmp_path, f"checkpoint={trained}", "out=out", *QUICK, *endless, script="attack")
    bar = tmp_path / "stderr"
    try:
        wait_for(run, lambda: bar.exists() and "at=" in bar.read_text())  # a patch has been scored
        run.send(signal.SIGINT)
        assert run.wait() == 0, run.stderr
    finally:
        run.kill()
    assert "is the best patch so far, that of step" in run.stdout and "Traceback" not in run.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["searches"]["optimized"]
    best = min(found["curve"], key=lambda point: point["loss"])
    assert found["best_step"] == best["step"] and len(found["curve"]) >= 2
    assert AdversarialPatch.load(tmp_path / "out" / "patch.npz").patch_hw == (4, 6)
    again = server.run(tmp_path, f"checkpoint={trained}", "out=out", *QUICK, script="attack")
    assert again.status == 1 and "out holds an attack already" in again.stderr


@pytest.mark.parametrize("script", ["attack", "saliency"])
def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_computed(server, trained, tmp_path, script):
    quick = [*QUICK, "progress=true"] if script == "attack" else ["max_steps=3"]
    run = server.run(tmp_path, f"checkpoint={trained}", "out=stdout/x", *quick, script=script)
    assert run.status == 1 and "stdout/x cannot be written: Not a directory. Give another place" in run.stderr
    assert "%" not in run.stderr  # no bar of progress


@pytest.fixture(scope="module")
def damaged(server, trained, tmp_path_factory):
    """Checkpoints that cannot be attacked, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("damaged")
    blind = server.run(folder, "env=gym", "env.task=Pendulum-v1", *TINY, "total_frames=40", "logdir=blind")
    assert blind.status == 0, blind.stderr
    state = Checkpoints(trained / "checkpoints").load(replay=False).state
    family = {**state, "agent": {**state["agent"], "weights": {"encoder": {"policy.weight": torch.zeros(3)}}}}
    Checkpoints(folder / "weights" / "checkpoints").save(1, family)
    config = {name: value for name, value in state["config"].items() if name != "algorithm"}
    Checkpoints(folder / "config" / "checkpoints").save(1, {**state, "config": config})
    Checkpoints(folder / "corrupt" / "checkpoints").save(1, state)
    (file,) = folder.glob("corrupt/checkpoints/step_*/state.pt")
    file.write_bytes(file.read_bytes()[:-9])
    return folder


@pytest.mark.parametrize(
    "checkpoint, error, says",
    [
        (None, ValueError, "checkpoint=DIR is missing"),
        ("blind", ValueError, r"of an agent that sees no images \(observation\)"),
        ("weights", ValueError, "holds no world model, actor and critic of the family"),
        ("config", ValueError, "holds no world model, actor and critic of the family"),
        ("corrupt", CheckpointError, "is whole"),
        ("nowhere", CheckpointError, "there is no checkpoint at"),
    ],
)
def test_checkpoints_that_cannot_be_attacked_are_refused(damaged, checkpoint, error, says):
    with pytest.raises(error, match=says):
        load_trained(checkpoint and str(damaged / checkpoint), torch.device("cpu"))


@pytest.mark.parametrize("generation", ["dreamerv1", "dreamerv2"])
def test_agents_of_the_first_two_generations_are_not_attacked_but_looked_into(server, tmp_path, generation):
    small = {"units": 8, "classes": 1 if generation == "dreamerv1" else 4}
    sizes = [f"model.{name}={size}" for name, size in small.items()]
    seeing = [each for each in SEEING if each != "env.make.image_size=16"]  # four stages need 64 pixels
    made = server.run(tmp_path, *seeing, f"algorithm={generation}", *sizes, "total_frames=40", "logdir=log")
    assert made.status == 0, made.stderr
    run = server.run(tmp_path, *QUICK, "checkpoint=log", script="attack")
    assert run.status == 1 and "another family (Dreamer V1 or V2" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr
    options = [
        "checkpoint=log",
        "episodes=1",
        "occlusion.window=16",
        "occlusion.stride=16",
        "progress=false",
        "device=cpu",
        "out=looked",
    ]
    run = server.run(tmp_path, *options, script="saliency")
    assert run.status == 0, run.stderr


@pytest.mark.parametrize("script", ["attack", "saliency"])
def test_a_user_reads_why_in_one_paragraph(server, damaged, tmp_path, script):
    run = server.run(tmp_path, f"checkpoint={damaged / 'blind'}", script=script)
    assert run.status == 1 and "an agent that sees no images" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr and "\n\n" not in run.stderr.strip()


@pytest.mark.parametrize(
    "setting, says",
    [
        ("attack.patch.patch_hw=[17,4]", "larger than the images"),
        ("pixels_key=camera", "pixels_key=camera is not among the images"),
        ("beside=both", "beside=both must be one of"),
        ("collect.episodes=1", "collect.episodes=1"),
        ("collect.held_out=1.0", "collect.held_out=1.0"),
        ("optimize.steps=0", "steps=0"),
        ("attack.loss.belief=both", "attack.loss.belief=both"),
        ("attack.allowed=[0,0,4,4]", "allowed is a mask for placement='saliency'"),
        ("evaluate.episodes=1", "evaluate.episodes=1"),  # has no interval to judge by
        ("collect.context=99", "fewer than context=99"),
    ],
)
def test_settings_of_an_attack_that_make_no_sense_are_refused(opened, setting, says):
    cfg, device = config(*QUICK, setting, name="attack"), torch.device("cpu")
    with pytest.raises((ValueError, InstantiationException), match=says):  # the script shows what caused the latter
        check(cfg, "attack")
        attack.Attack(opened, cfg, device)


def test_a_patch_that_cannot_be_compared_is_no_control(opened, tmp_path):
    path = AdversarialPatch((4, 5)).save(tmp_path / "patch.npz")
    cfg, device = config(*QUICK, f"other={path}", name="attack"), torch.device("cpu")
    mine = attack.Attack(opened, cfg, device)
    with pytest.raises(ValueError, match="cannot be compared with"):
        attack.prepare_other(cfg, mine)
    cfg.other = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        attack.prepare_other(cfg, mine)
    exported = export(opened.directory, tmp_path / "exported")  # in half precision
    for same in (opened.directory, exported):
        cfg.other = str(same)
        with pytest.raises(ValueError, match="is the agent that is attacked"):
            attack.prepare_other(cfg, mine)


@pytest.mark.parametrize(
    "setting, says",
    [
        ({"window": 17}, "the window must fit the image"),
        ({"stride": 0}, "the stride be at least 1"),
        ({"fill": "red"}, "occlusion.fill=red must be blur or grey"),
    ],
)
def test_occlusions_that_make_no_sense_are_refused(opened, setting, says):
    with pytest.raises(ValueError, match=says):
        OcclusionSaliency(opened.agent, "pixels", **setting)


@pytest.mark.parametrize("name", ["planning", "perturb"])
def test_every_configuration_builds(opened, name):
    cfg = config(f"attack={name}", name="attack")
    patch = hydra.utils.instantiate(cfg.attack.patch, _convert_="all")
    loss = opened.attack_loss(patch, key="pixels", **cfg.attack.loss)
    assert patch.patch_hw == (16, 16) and loss.weights == {"return": 1, "kl": 0, "action": 0, "tv": 0.01, "l2": 0.001}
    assert (patch.mode == name) == (name == "perturb")


def test_saliency_of_a_checkpoint_alone(server, trained, tmp_path):
    run = server.run(tmp_path, f"checkpoint={trained}", "progress=false", "occlusion.window=4", script="saliency")
    assert run.status == 0, run.stderr
    out = trained / "saliency"
    assert "nothing says where it is" in run.stdout
    found = json.loads((out / "saliency.json").read_text())
    assert found["frames"] == 8 and "policy" not in found and found["algorithm"]["representation"]
    assert (out / "saliency.mp4").stat().st_size > 500 and (out / "saliency.png").stat().st_size > 500
    colour = ["colour=[255,255,255]", "episodes=2", "max_steps=5", "video=false", f"out={tmp_path}/coloured"]
    run = server.run(tmp_path, f"checkpoint={trained}", "progress=false", *colour, script="saliency")
    assert run.status == 0, run.stderr
    found = json.loads((tmp_path / "coloured" / "saliency.json").read_text())
    assert found["frames"] == 10 and len(found["returns"]) == 2
    for name in ("policy", "value"):
        assert found[name]["area"] == pytest.approx(4 / 256) and found[name]["frames"] == 10
        assert 0 < found[name]["fraction"] < 1 and f"{name}: {found[name]['fraction']:.4f}" in run.stdout


def test_the_agent_of_a_checkpoint_is_the_trained_one(trained, opened, tmp_path):
    found = opened
    state = Checkpoints(trained / "checkpoints").load(replay=False).state["learner"]["model"]
    name = next(name for name in state if name.endswith("convolutions.0.weight") or "convolutions" in name)
    weights = [parameter for _, parameter in found.agent.encoder.named_parameters()]
    assert any(torch.equal(state[name], parameter) for parameter in weights)
    assert found.step == 120 and found.directory == trained and found.pixels_key() == "pixels"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_trained(str(tmp_path), torch.device("cpu"))


def test_reading_a_run_makes_no_learner_and_no_optimiser(trained, tmp_path, monkeypatch, capsys):
    def forbidden(*_, **__):
        raise AssertionError("weights are read without one")

    for part in (Learner, torch.optim.Optimizer):
        monkeypatch.setattr(part, "__init__", forbidden)
    found, same = load_trained(str(trained), torch.device("cpu")).agent, load_pretrained(trained)
    for name, part in found.parts().items():
        for one, other in zip(part.parameters(), same.parts()[name].parameters(), strict=True):
            assert torch.equal(one, other) and not one.requires_grad
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    out = [f"checkpoint={trained}", f"out={tmp_path}/out", "video=false", "episodes=1"]
    evaluate.main(config(*out, name="evaluate"))
    saliency.main(config(*out, "progress=false", "max_steps=2", name="saliency"))
    assert "over 1 episodes" in capsys.readouterr().out

"""examples/evaluate.py repeats the trainer's own numbers, films them, and says what it cannot evaluate."""

import contextlib
import functools
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from launcher import PENDULUM, TINY, config, lines, train_here
from omegaconf import OmegaConf

import r2dreamer.envs  # isort: skip  # before TorchRL
import torch

from r2dreamer.dreamer.pretrained import load_pretrained, save_pretrained
from r2dreamer.examples import evaluate
from r2dreamer.examples import export as export_script
from r2dreamer.examples.export import export
from r2dreamer.examples.training import learner
from r2dreamer.examples.training.checkpoint import Checkpoints
from r2dreamer.examples.training.episodes import Episode
from r2dreamer.examples.training.evaluation import EvaluationResult, film
from r2dreamer.examples.training.loading import Trained, load_trained
from r2dreamer.examples.training.manifest import write_manifest


def blind(seed):
    """An environment that knows nothing of pixels."""


def test_what_observes_no_image_is_filmed_from_its_actions(capsys):
    factory = functools.partial(r2dreamer.envs.make_gym, task="Pendulum-v1", time_limit=9)
    actions = list(factory(seed=3).rollout(9)["action"])
    frames = film(factory, 3, actions)
    assert frames.shape == (10, 250, 250, 3) and (frames[0] != frames[-1]).any()
    assert (frames == film(factory, 3, actions)).all() and (frames[0] != film(factory, 5, actions)[0]).any()
    keys = functools.partial(factory, keys=["observation"])  # of another view than a film's
    assert (frames == film(keys, 3, actions)).all()
    assert film(blind, 3, actions) is None
    assert "No video: WorkerError" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    faster = ["algorithm.optimizer.lr=1e-2", "algorithm.optimizer.warmup_steps=1", "env.eval_episodes=3"]
    run = server.run(folder, *PENDULUM, *faster, "logdir=log")
    assert run.status == 0, run.stderr
    return folder / "log"


def returns(output):
    return [float(line.split()[3].rstrip(",")) for line in output.splitlines() if line.startswith("episode")]


def test_evaluate_repeats_the_trainers_own_numbers_and_films(server, trained, tmp_path):
    run = server.run(tmp_path, f"checkpoint={trained}", script="evaluate")
    assert run.status == 0, run.stderr
    first, *_, last = lines(trained, '"eval/return"')
    assert first["eval/return"] != last["eval/return"]  # so that untrained weights would show
    found = torch.tensor(returns(run.stdout), dtype=torch.float64)
    assert len(found) == 3
    assert found.mean().item() == pytest.approx(last["eval/return"], rel=1e-5)
    assert found.std(correction=0).item() == pytest.approx(last["eval/return_std"], rel=1e-4)
    assert f"{last['eval/return']:.6g} +- {last['eval/return_std']:.4g} over 3 episodes" in run.stdout
    assert (trained / "eval.mp4").stat().st_size > 1000


def test_evaluate_compiles_what_a_compiled_run_does(trained, monkeypatch):
    """Then it repeats such a run's returns to the digit: dmc_small_vectors on walker_walk, 488.513 (456 without)."""
    compiled = []
    for module in (evaluate, learner):
        monkeypatch.setattr(module, "compile_parts", lambda *roots: compiled.append([type(root) for root in roots]))
    for how in ("null", "parts"):
        evaluate.main(config(f"checkpoint={trained}", "video=false", "episodes=1", f"compile={how}", name="evaluate"))
        assert len(compiled) == (how == "parts")
    agent, cfg = load_trained(trained, torch.device("cpu"), images=False).agent, config(*PENDULUM)
    for part in agent.parts().values():
        part.requires_grad_()
    learner.Learner(agent, cfg.algorithm, torch.float32, "parts")
    played, (*trains, last) = compiled
    assert played == trains and last is learner.Learner


def test_a_film_that_no_encoder_can_write_is_not_said_to_be_there(tmp_path, monkeypatch, capsys):
    settings = {
        "seed": 0,
        "name": "mine",
        "threads": None,
        "timeout": 120,
        "eval": {"episodes": 1},
        "env": {"parallel": False, "scores": None},
    }
    agent = Trained(None, OmegaConf.create(settings), tmp_path, 7, None)
    result = EvaluationResult([Episode(1.0, 2, {})], torch.zeros(2, 4, 4, 3, dtype=torch.uint8).numpy())
    for name, made in {"load_trained": agent, "evaluate_seeds": result, "write_video": None}.items():
        monkeypatch.setattr(evaluate, name, lambda *_, made=made, **__: made)
    monkeypatch.setattr(Trained, "environments", lambda *_: io.StringIO())  # to be closed
    evaluate.main.__wrapped__(config(f"checkpoint={tmp_path}", name="evaluate"))
    said = capsys.readouterr().out
    assert "mine at 7 frames: 1 +- 0" in said and "video" not in said


def test_a_trained_agents_simulators_get_the_time_that_its_run_gave_them():
    run = OmegaConf.create({"timeout": 77, "env": {"parallel": 1}})
    factory = functools.partial(r2dreamer.envs.make_gym, task="Pendulum-v1")
    with contextlib.closing(Trained(None, run, None, 0, factory).environments([1])) as environments:
        assert environments.pool.timeout == 77


def test_evaluate_takes_one_checkpoint_other_seeds_and_more_episodes(server, trained, tmp_path):
    earlier = min((trained / "checkpoints").glob("step_*"))
    more = ["episodes=5", "seed=7", "video=false"]
    one = server.run(tmp_path / "one", f"checkpoint={earlier}", *more, script="evaluate")
    assert one.status == 0 and len(set(returns(one.stdout))) == 5  # in rounds of 3, as the run's own evaluations
    fewer = server.run(tmp_path / "three", f"checkpoint={earlier}", *more, "episodes=3", script="evaluate")
    assert returns(fewer.stdout) == returns(one.stdout)[:3]
    assert f"at {int(earlier.name.removeprefix('step_'))} frames" in one.stdout
    newest = server.run(tmp_path / "two", f"checkpoint={trained}/checkpoints", *more, script="evaluate")
    assert newest.status == 0 and returns(newest.stdout) != returns(one.stdout)
    assert not any(tmp_path.rglob("*.mp4"))


def test_an_exported_agent_plays_as_its_run_does_and_holds_nothing_else(server, trained, tmp_path):
    out = export(trained, tmp_path / "exported", name="mine")
    played = [server.run(tmp_path, f"checkpoint={path}", "video=false", script="evaluate") for path in (trained, out)]
    assert "mine at 200 frames" in played[1].stdout
    assert returns(played[1].stdout) == pytest.approx(returns(played[0].stdout), rel=0.02)
    assert {path.name for path in out.iterdir()} == {"config.yaml", "model.safetensors", "README.md"}
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert str(trained.parent) not in str(saved) and saved["run"]["logdir"] == "runs/mine/seed0"
    assert not {"logger", "collector"} & saved["run"].keys() and saved["frames"] == 200
    before = min(path.stat().st_size for path in trained.glob("checkpoints/*/state.pt"))
    assert (out / "model.safetensors").stat().st_size < before / 2
    assert load_pretrained(out).actions.size == 1
    last, card = lines(trained, '"eval/return"')[-1], (out / "README.md").read_text()
    assert f"greedy return | {last['eval/return']:.4g} ± {last['eval/return_std']:.3g} |" in card
    assert "episodes of that return | 3 |" in card and "r2dreamer train env=gym env.task=Pendulum-v1" in card
    assert "logdir" not in card and "commit | not stated" not in card
    with pytest.raises(ValueError, match="exported is there already"):
        export(trained, out)
    with pytest.raises(OSError, match=r"README.md/mine cannot be written: .* Give another directory"):
        export(trained, out / "README.md" / "mine")


def test_the_card_states_the_return_of_its_own_run_or_none(trained, tmp_path, monkeypatch):
    said = lambda checkpoint, name: (export(checkpoint, tmp_path / name) / "README.md").read_text()
    run = shutil.copytree(trained, tmp_path / "run")
    newest = max((run / "checkpoints").glob("step_*"))
    monkeypatch.chdir(newest.parent)
    last = lines(run, '"eval/return"')[-1]["eval/return"]
    assert f"{last:.4g} ±" in said(Path(newest.name), "here")
    assert Trained(None, None, Path(newest.name), 200, None).directory == run  # where a tool writes, too
    assert "was measured at" not in said(newest, "measured")
    earlier = min(newest.parent.glob("step_*"))  # between two evaluations
    assert "measured at 80 frames, the last time before" in said(earlier, "earlier"), earlier
    copy = shutil.copytree(newest, run / "kept" / newest.name)
    assert "greedy return | not measured" in said(copy, "elsewhere")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 200, "eval/return": null, "eval/return_std": null}\n')
    assert "greedy return | not measured" in said(run, "diverged")
    monkeypatch.setattr(sys, "argv", ["export.py", str(run), str(tmp_path / "public"), "--private"])
    with pytest.raises(SystemExit):
        export_script.main()
    assert not (tmp_path / "public").exists()


def test_an_agent_exported_to_play_has_no_heads_of_the_objective_and_acts_alike(server, trained, tmp_path):
    whole, player = export(trained, tmp_path / "whole"), export(trained, tmp_path / "player", play=True)
    assert load_pretrained(whole).heads and not load_pretrained(player).heads
    assert (player / "model.safetensors").stat().st_size < (whole / "model.safetensors").stat().st_size
    played = [server.run(tmp_path, f"checkpoint={path}", "video=false", script="evaluate") for path in (whole, player)]
    assert returns(played[0].stdout) == returns(played[1].stdout) != []


def test_an_agent_without_its_run_is_not_evaluated(trained, tmp_path):
    save_pretrained(load_pretrained(trained), None, tmp_path / "alone")
    with pytest.raises(ValueError, match="alone holds an agent and not the environment"):
        load_trained(str(tmp_path / "alone"), torch.device("cpu"))


@pytest.mark.parametrize(
    "what, says",
    [
        ("nothing", "checkpoint=DIR is missing"),
        ("elsewhere", "nowhere. Give a run's directory, for example runs/quickstart/seed0, or one of its checkpoints"),
        ("corrupt", "state.pt"),
        ("format", "has format 99"),
        ("foreign", "was not saved by examples/train.py"),
        ("episodes", "episodes=0 must be a whole number of at least 1"),
    ],
)
def test_evaluate_refuses(server, trained, tmp_path, what, says):
    path = tmp_path / "checkpoints" / "step_000000001"
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"weights": torch.zeros(3)})
    if what == "corrupt":
        (path / "state.pt").write_bytes(b"nothing")
    if what == "format":
        manifest = json.loads((path / "manifest.json").read_text())["manifest"]
        with open(path / "manifest.json", "wb") as file:
            write_manifest(file, manifest | {"format": 99})
    arguments = {
        "nothing": [],
        "elsewhere": [f"checkpoint={tmp_path}/nowhere"],
        "episodes": [f"checkpoint={trained}", "episodes=0"],
    }.get(what, [f"checkpoint={path}"])
    run = server.run(tmp_path / "run", *arguments, script="evaluate")
    assert run.status == 1
    said = run.stderr.strip().rpartition("\n\n")[2]  # after the warning that names what is damaged
    assert "Traceback" not in run.stderr and says in " ".join(said.split())


def test_an_environment_that_never_ends_is_cut_off_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fault").write_text("endless 0")
    task = ["env=custom", "env.factory=faulty:make", *TINY, "env.parallel=false", "total_frames=40"]
    train_here(tmp_path / "log", *task, "eval.max_steps=12")
    assert [line["eval/length"] for line in lines(tmp_path / "log", '"eval/length"')] == [12, 12]
    assert "2 of 2 evaluation episodes did not end within max_steps=12" in capsys.readouterr().err
    for more, steps in ([], 12), (["max_steps=7"], 7):
        evaluate.main(config(f"checkpoint={tmp_path}/log", "video=false", "trust=faulty", *more, name="evaluate"))
        said = capsys.readouterr()
        assert f"{steps} steps" in said.out and f"did not end within max_steps={steps}" in said.err

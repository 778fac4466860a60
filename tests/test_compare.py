"""The grid of ablations: what it runs, what it refuses, and the intervals it draws."""

import itertools
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hydra.utils import instantiate
from launcher import CARTPOLE, EXAMPLES, config, count_lines, wait_for
from omegaconf import OmegaConf

from r2dreamer.examples import compare
from r2dreamer.examples.cli.children import Children
from r2dreamer.examples.figures.bootstrap import bootstrap_band, bootstrap_difference
from r2dreamer.examples.figures.curves import draw_runs
from r2dreamer.examples.training.checkpoint import Checkpoints
from r2dreamer.examples.training.grid import Run, expand, plan, plan_rows

ABLATIONS = sorted(path.stem for path in (EXAMPLES.parent / "configs" / "experiment").glob("ablation_*.yaml"))


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_what_its_name_says_and_nothing_else(name):
    changed = {
        "baseline": set(),
        "augmentation": {"algorithm.augmentation"},
        "half_batch": {"batch_size"},
        "dreamerpro": {"algorithm.agent", "algorithm.representation"},
        "dreamerpro_no_augmentation": {"algorithm.agent", "algorithm.representation"},
        "dreamer": {"algorithm.agent", "algorithm.representation"},
        "dreamer_no_reconstruction": {"algorithm.agent", "algorithm.representation"},
        "infonce": {"algorithm.representation"},
        "target_not_detached": {"algorithm.representation"},
        "alpha_tenth": {"algorithm.representation"},
        "alpha_tenfold": {"algorithm.representation"},
        "weight_tenth": {"algorithm.representation"},
        "weight_tenfold": {"algorithm.representation"},
        "projector_one_layer": {"algorithm.agent"},
        "projector_two_layers": {"algorithm.agent"},
    }[name.removeprefix("ablation_")]
    here, before = (config(*overrides) for overrides in ([f"experiment={name}"], []))
    assert here.name == before.name + "-" + name.removeprefix("ablation_")
    flat = lambda cfg: {**cfg, **{f"algorithm.{key}": value for key, value in cfg.algorithm.items()}}
    here, before = flat(here), flat(before)
    found = {key for key in {*here, *before} - {"algorithm", "name", "logdir", "replay"} if here[key] != before[key]}
    assert found == changed
    assert config(f"experiment=[quickstart,{name}]").env.task == "CartPole-v1"


@pytest.mark.parametrize("experiment", ["quickstart", "quickstart_pixels", "probe"])
def test_the_weights_ablations_multiply_what_an_experiment_has(experiment):
    weight = lambda *more: instantiate(config(f"experiment={[experiment, *more]}").algorithm.representation).weight
    for name, factor in (("tenfold", 10), ("tenth", 0.1)):
        assert weight(f"ablation_weight_{name}") == pytest.approx(factor * weight())


def test_commas_and_ranges_multiply():
    assert expand(["experiment=[probe,a],[probe,b]", "seed=range(0,2)", "env.task=ending"]) == [
        (f"experiment=[probe,{which}]", f"seed={seed}", "env.task=ending")
        for which, seed in itertools.product("ab", (0, 1))
    ]


def test_runs_that_would_share_a_directory_are_refused():
    names = [run.logdir.as_posix() for run in plan([*CARTPOLE, "seed=3,4"])]
    assert names == ["runs/tiny/seed3", "runs/tiny/seed4"]
    with pytest.raises(ValueError, match="share logdir=runs/tiny/seed0.*name of its own"):
        plan([*CARTPOLE, "algorithm.optimizer.lr=1e-3,1e-4"])
    with pytest.raises(ValueError, match="share name=tiny and seed=0, and a mean is over the seeds of one name"):
        plan([*CARTPOLE, "algorithm.optimizer.lr=1e-3,1e-4", "logdir='runs/${algorithm.optimizer.lr}/seed${seed}'"])


def test_seeds_of_one_name_have_one_task_and_the_same_settings():
    for other in ("env.task=Acrobot-v1", "batch_size=4", "total_frames=100"):
        with pytest.raises(ValueError, match=f"with {other} share name=tiny, and a mean is over the seeds of one name"):
            plan_rows([([*CARTPOLE, "seed=0"], None), ([*CARTPOLE, other, "seed=1"], None)])


def test_variants_that_train_the_same_are_pointed_at(capsys):
    plan([*CARTPOLE, "name=a,b", "seed=0,1"])
    assert capsys.readouterr().err == "WARNING: name=a and name=b train the same: no setting of theirs differs.\n"
    plan_rows([([*CARTPOLE, *each], None) for each in (["name=a"], ["name=b", "batch_size=4"])])
    assert not capsys.readouterr().err


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    overrides = [*CARTPOLE, f"logdir={tmp_path}", "total_frames=100"]
    (tmp_path / "checkpoints" / "step_000000050").mkdir(parents=True)
    saved = tmp_path / "config.yaml"
    OmegaConf.save(config(*overrides), saved, resolve=True)
    assert [run.saved for run in plan([*overrides, "total_frames=200"])] == [50]
    with pytest.raises(ValueError, match="holds a run of 50 frames with batch_size=3, and .* asks for batch_size=4"):
        plan([*overrides, "batch_size=4"])
    for text, says in (("a: [", "is damaged .*: move"), ("", "is empty, so nothing says what was trained: move")):
        saved.write_text(text)
        with pytest.raises(ValueError, match=says):
            plan(overrides)


def test_options_are_found_by_a_pattern_and_values_of_an_interval_are_asked_for():
    runs = plan(["env=probe", "env.task=ending", "experiment=glob(ablation_weight*)"])
    assert sorted(run.variant for run in runs) == ["weight_tenfold", "weight_tenth"]
    with pytest.raises(ValueError, match=r"seed=interval\(0,3\) names no values to train with"):
        plan([*CARTPOLE, "seed=interval(0,3)"])


def test_files_of_something_else_and_places_that_cannot_be_written_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("of a user")
    (tmp_path / "folder.png").mkdir()
    for out, says in (
        ("README.png", "would overwrite README.md"),
        ("README.md/x.png", "README.md cannot be written"),
        ("folder.png", "folder.png, which is a directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare.py", *CARTPOLE[:3], "--out", out, *CARTPOLE[3:]])
        with pytest.raises(SystemExit, match=says):
            compare.main()
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "folder.png"}


def test_a_reader_that_has_left_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", *CARTPOLE, "--status"])
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as left:
            compare.main()
    assert left.value.code is None


def test_bootstrap_intervals_are_those_of_all_resamples():
    values = np.array([[3.0, 0.0], [10.0, 1.0], [4.0, 0.0]])
    low, high = bootstrap_band(values)
    means = np.array([values[list(chosen)].mean(0) for chosen in itertools.product(range(3), repeat=3)])
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5], axis=0, method="inverted_cdf"))
    single = bootstrap_band(np.array([[5.0, 7.0]]))
    np.testing.assert_array_equal(single, [[5.0, 7.0], [5.0, 7.0]])
    low, high = bootstrap_difference(np.array([5.0, 6.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    assert 2.0 <= low < 4.0 < high <= 6.0


def test_one_command_trains_draws_and_goes_on(server, tmp_path):
    variants = "experiment=ablation_baseline,ablation_projector_one_layer"
    short = [each for each in CARTPOLE if not each.startswith("name=")]
    command = [*short, variants, "total_frames=40", "eval.every=40"]
    for finished_before in (0, 2):
        done = server.run(tmp_path, *command, "--jobs", "2", script="compare")
        assert done.status == 0, done.stderr
        assert done.stdout.startswith(f"2 runs, {finished_before} of them finished before.")
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    names = ["gym-CartPole-v1-baseline", "gym-CartPole-v1-projector_one_layer"]
    assert list(numbers) == names and (tmp_path / "comparison.png").stat().st_size > 1000
    assert "finished at 40 frames" in (tmp_path / "runs" / names[1] / "seed0" / "output.txt").read_text()
    assert (tmp_path / "comparison.md").read_text().startswith("|  | gym-CartPole-v1 |")
    assert numbers[names[1]]["difference_from"] == names[0] and len(numbers[names[1]]["final"]) == 1
    assert "difference" not in numbers[names[0]] and "interval" not in numbers[names[1]]  # one seed has none
    assert f"{names[0]}: {numbers[names[0]]['mean']:.4g} of one seed" in done.stdout
    for wrong, reason in (
        ([*command, "--key", "eval/retrun"], "No finished run has eval/retrun. Did you mean eval/return"),
        ([*command, "algorithm.optimizer.lr=1e-9"], "run of 40 frames with algorithm.optimizer.lr="),
        ([*command, "batch_size=2"], "run of 40 frames with batch_size=3, and .* asks for batch_size=2"),
        ([*command, "eval.episodes=3"], "run of 40 frames with eval.episodes="),
        ([*command, "collector=async"], "run of 40 frames with collector._target_="),
        (
            [*command, "algorithm.kl._target_=nope.Nope"],
            r"\Aalgorithm.kl._target_=nope.Nope cannot be imported: No module named 'nope'. Say package.module.name.\Z",
        ),
    ):
        refused = server.run(tmp_path, *wrong, script="compare")
        assert refused.status == 1 and re.search(reason, refused.stderr.strip()), refused.stderr


def test_differences_are_to_the_first_variant_or_none(tmp_path):
    runs = [Run((), name, tmp_path / name / str(seed), 10) for name in ("first", "second") for seed in (0, 1)]
    for run in runs:
        run.logdir.mkdir(parents=True)
        score = int(run.logdir.name) + (5 if run.name == "second" else 0)
        (run.logdir / "metrics.jsonl").write_text(f'{{"step": 10, "eval/return": {score}}}\n')
    assert compare.summarise(runs, "eval/return")["second"]["difference"] == 5
    unfinished = compare.summarise(runs[2:], "eval/return", runs)
    assert list(unfinished) == ["second"] and "difference" not in unfinished["second"]
    for run in runs[:2]:
        (run.logdir / "metrics.jsonl").write_text("")
    alone = compare.summarise(runs, "eval/return")
    assert list(alone) == ["second"] and "difference" not in alone["second"]


def test_tasks_are_columns_and_panels_and_variants_differ_within_their_task(tmp_path):
    """One variant has no run of the second task; what is first there is what its others are compared to."""
    grid = {("a", "gym-x"): 3.0, ("b", "gym-x"): 5.0, ("b", "gym-y"): 70.0, ("c", "gym-y"): 10.0}
    runs = [Run((), f"{task}-{variant}", tmp_path / task / variant, 10, task) for variant, task in grid]
    for run, score in zip(runs, grid.values(), strict=True):
        run.logdir.mkdir(parents=True)
        (run.logdir / "metrics.jsonl").write_text(f'{{"step": 10, "eval/return": {score}}}\n')
    summary = compare.summarise(runs, "eval/return")
    assert [numbers.get("difference") for numbers in summary.values()] == [None, 2, None, -60]
    assert compare.table(runs, summary).splitlines() == [
        "|  | gym-x | gym-y |",
        "| --- | --- | --- |",
        "| a | **3** (3) |  |",
        "| b | **5** (5) | **70** (70) |",
        "| c |  | **10** (10) |",
    ]
    columns = [[getattr(run, name) for run in runs] for name in ("logdir", "variant", "task")]
    for panels, width in ((columns[2], 1344), (None, 960)):  # in 150ths of an inch: 1.4 times as wide for two
        drawn = draw_runs(*columns[:2], tmp_path / "panels.png", panels=panels)
        assert drawn.read_bytes()[16:20] == width.to_bytes(4, "big")


def test_runs_without_a_name_are_one_variant_of_several_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = plan(["env=dmc_proprio", "env.task=walker_walk,cheetah_run", "seed=0,1"])
    summary = {run.name: {"mean": 1.0, "final": [1.0]} for run in runs}
    assert compare.table(runs, summary).splitlines()[2:] == ["| default | **1** (1) | **1** (1) |"]


def test_a_run_that_fails_is_named(server, tmp_path):
    done = server.run(tmp_path, *CARTPOLE, "env.task=nope", script="compare")  # which only the environment can tell
    assert done.status == 1 and "has no task 'nope'" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Not finished: env=gym")
    assert not (tmp_path / "comparison.png").exists()


def test_finished_is_what_has_a_checkpoint_of_its_last_frame(tmp_path):
    (run,) = plan([*CARTPOLE, f"logdir={tmp_path}"])
    for step, finished in ((150, False), (200, True)):
        (tmp_path / "checkpoints" / f"step_{step:09d}").mkdir(parents=True)
        assert run.finished == finished


def test_a_misspelt_key_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py", "model.believe=3"])
    with pytest.raises(SystemExit, match="model.believe"):
        compare.main()


def test_a_copy_of_a_users_is_no_checkpoint(tmp_path):
    (run,) = plan([*CARTPOLE, f"logdir={tmp_path}"])
    for name in ("step_best", "step_000000200.bak", "step_000000150"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert not run.finished


CHILD = """
import os, signal, sys
def say(word):
    os.write(1, word.encode() + b" ")  # one call: two trainings write one file, and a handler may interrupt another
def leave(number, frame):
    say(signal.Signals(number).name)
    if number == signal.SIGINT:
        sys.exit(130)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, leave)
say("ready")
while True:
    signal.pause()
"""


def test_a_signal_reaches_every_training_once_and_no_other_one_begins(tmp_path):
    out = tmp_path / "out"
    with Children() as children, out.open("w") as file, ThreadPoolExecutor(2) as pool:
        before = [pool.submit(children.run, [sys.executable, "-c", CHILD], stdout=file) for _ in range(2)]
        wait_until(lambda: out.read_text().count("ready") == 2)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # asked already
        wait_until(lambda: out.read_text().count("SIGTERM") == 2)
        signal.raise_signal(signal.SIGINT)
        assert [each.result(timeout=30) for each in before] == [130, 130]
        assert children.run([sys.executable, "-c", "print('late')"], stdout=file) is None
    assert sorted(out.read_text().split()) == ["SIGINT"] * 2 + ["SIGTERM"] * 2 + ["ready"] * 2


def wait_until(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_training_saves_and_leaves_when_its_comparison_is_stopped_or_killed(server, tmp_path):
    endless = ["total_frames=1000000", "checkpoint.every=1000000", "replay.capacity=100000", "env.parallel=false"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        folder = tmp_path / number.name
        comparison = server.start(folder, *CARTPOLE, *endless, "seed=0", "--jobs", "2", script="compare")
        logdir = folder / "runs/tiny/seed0"
        wait_for(comparison, lambda logdir=logdir: count_lines(logdir) >= 2)
        comparison.send(number)  # its training is a session of its own
        assert comparison.wait(timeout=120) == (1 if number == signal.SIGTERM else -number), comparison.stderr
        wait_until(lambda logdir=logdir: "interrupted" in (logdir / "output.txt").read_text())
        assert 0 < Checkpoints(logdir / "checkpoints").load().step < 1000000
        assert ("the same command goes on" in comparison.stderr) == (number == signal.SIGTERM)
        assert "Traceback" not in comparison.stderr

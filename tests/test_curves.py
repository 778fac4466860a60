"""Learning curves are drawn from any run, with the published one where there is one."""

import json
import sys

import numpy as np
import pytest

from r2dreamer.examples import curves
from r2dreamer.examples.figures.curves import _common_grid, draw_curve, draw_runs, published_curve, read_curve


def make_run(directory, steps, offset=0.0):
    directory.mkdir(parents=True)
    lines = [{"step": 0, "eval/return": 1.0 + offset}]
    lines += [{"step": step, "train/return": step / 100, "eval/return": step / 90 + offset} for step in steps]
    lines += [{"step": steps[-1] + 1, "eval/return": None}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    matplotlib = pytest.importorskip("matplotlib.figure")
    figures, save = [], matplotlib.Figure.savefig

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(matplotlib.Figure, "savefig", keep)
    return figures


def labels(figure):
    return figure.axes[0].get_legend_handles_labels()[1]


def test_published_rows_are_those_of_the_source():
    curve = published_curve("dmc_vision", "walker_walk")
    assert curve["seeds"] == 10 and len(curve["frames"]) == 20
    assert (np.diff(curve["frames"]) > 0).all() and curve["frames"][-1] == 1_000_000
    assert curve["mean"][-1] == pytest.approx(960.4, abs=0.05) and (curve["std"] >= 0).all()
    assert published_curve("dmc_proprio", "walker_walk")["frames"][-1] == 500_000
    assert published_curve("gym", "CartPole-v1") is None
    assert published_curve("atari100k", "alien")["frames"][-1] == 400_000


def test_curve_with_the_published_one(tmp_path, drawn):
    run = make_run(tmp_path / "run", range(10_000, 100_001, 10_000))
    assert draw_curve(run, "dmc_vision", "walker_walk", tmp_path / "curve.png").stat().st_size > 5000
    (figure,) = drawn
    assert labels(figure) == [
        "DreamerV3 (published, 10 seeds, mean and std)",
        "training episodes",
        "evaluation (mode actions)",
    ]
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [50_000, 100_000, 150_000]
    assert len(figure.axes[0].get_lines()[2].get_xdata()) == 11  # null is not a point


def test_a_published_curve_is_of_returns_alone(tmp_path, drawn):
    run, published = (
        make_run(tmp_path / "run", range(25_000, 100_001, 25_000)),
        {"walk": ("dmc_proprio", "walker_walk")},
    )
    for key, lines in {"eval/return": 2, "train/return": 2, "eval/length": 1}.items():
        with open(run / "metrics.jsonl", "a") as metrics:
            metrics.writelines(f'{{"step": {step}, "{key}": 1.0}}\n' for step in range(25_000, 100_001, 25_000))
        draw_runs([run], ["ours"], tmp_path / "runs.png", key=key, panels=["walk"], published=published)
        assert len(drawn[-1].axes[0].get_lines()) == lines, key


def test_a_published_atari_curve_says_that_it_was_played_with_sticky_actions(tmp_path, drawn):
    run = make_run(tmp_path / "run", [20_000, 40_000])
    assert draw_curve(run, "atari100k", "alien", tmp_path / "curve.png").exists()
    assert draw_runs([run], ["ours"], tmp_path / "runs.png", published={"": ("atari100k", "alien")}).exists()
    expected = "DreamerV3 (published, 5 seeds, mean and std),\nwith sticky actions (env.sticky=0.25)"
    assert all(expected in labels(figure) for figure in drawn)


def test_curve_without_a_published_one(tmp_path, drawn):
    run = make_run(tmp_path / "run", [500])
    assert draw_curve(run, "gym", "CartPole-v1", tmp_path / "new" / "curve.png").exists()
    assert labels(drawn[0]) == ["training episodes", "evaluation (mode actions)"]


def test_seeds_share_a_label(tmp_path, drawn):
    runs = [make_run(tmp_path / str(seed), range(90, 991, 90), offset=seed) for seed in (0, 2, 4)]
    assert draw_runs(runs, ["ours", "ours", "other"], tmp_path / "runs.png", title="CartPole-v1")
    assert labels(drawn[0]) == ["ours (2 seeds)", "other"]
    assert drawn[0].legends[0].get_title().get_text() == "mean and range"
    mean = drawn[0].axes[0].get_lines()[0]
    assert mean.get_ydata()[1] == pytest.approx(90 / 90 + 1.0)
    with pytest.raises(ValueError, match="3 logdirs with 1 labels"):
        draw_runs(runs, ["ours"], tmp_path / "runs.png")


def test_runs_are_compared_only_where_all_have_values():
    frames, values = _common_grid(
        [(np.array([0.0, 10, 20]), np.array([0.0, 10, 20])), (np.array([5.0, 15]), np.ones(2))]
    )
    assert frames.tolist() == [5, 10, 15]
    assert values.tolist() == [[5, 10, 15], [1, 1, 1]]


def test_a_mean_that_ends_early_or_cannot_be_formed_is_said(tmp_path, drawn, capsys):
    runs = [make_run(tmp_path / name, steps) for name, steps in (("long", range(90, 991, 90)), ("begun", [1]))]
    (runs[1] / "metrics.jsonl").write_text('{"step": 0, "eval/return": 2, "train/return": 1}\n')
    draw_runs(runs, ["mine", "mine"], tmp_path / "runs.png")
    assert "'mine' is drawn up to frame 0," in capsys.readouterr().out
    (line,) = drawn[0].axes[0].get_lines()
    assert line.get_xydata().tolist() == [[0, 1.5]] and line.get_marker() == "o"  # a line of one point is not seen
    draw_runs(runs, ["mine", "mine"], tmp_path / "runs.png", key="train/return")
    assert "'mine' have no frames in common" in capsys.readouterr().out and not drawn[1].axes[0].get_lines()


def test_nothing_to_draw_or_to_draw_with_is_a_notice(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/a": 2}\n')
    assert len(read_curve(tmp_path, "eval/return")[0]) == 0
    assert draw_curve(tmp_path, "gym", "x", tmp_path / "curve.png") is None
    assert "no returns yet" in capsys.readouterr().out
    run = make_run(tmp_path / "run", [500])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_curve(run, "gym", "x", tmp_path / "curve.png") is None
    assert draw_runs([run], ["x"], tmp_path / "curve.png") is None
    said = capsys.readouterr().out
    assert 'pip install "torchrl-r2dreamer[plot]"' in said and "learning curve" not in said  # patches are drawn, too


def test_the_command_draws_the_seeds_of_a_folder_together(tmp_path, drawn, monkeypatch, capsys):
    runs = [str(make_run(tmp_path / "mine" / f"seed{seed}", range(90, 991, 90), offset=seed)) for seed in (0, 2)]
    monkeypatch.setattr(sys, "argv", ["curves.py", *runs, "--out", str(tmp_path / "runs.png")])
    curves.main()
    assert labels(drawn[0]) == ["mine (2 seeds)"] and "runs.png" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["curves.py", runs[0], str(tmp_path)])
    with pytest.raises(SystemExit, match="No metrics.jsonl in"):
        curves.main()


def test_folders_of_one_name_are_two_experiments_and_a_run_named_twice_is_one_seed(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / which / "mine" / "seed0", [90, 180], offset=i) for i, which in enumerate("ab")]
    more = [f"{runs[0]}/", "--out", "runs.png", str(make_run(tmp_path / "other" / "seed0", [90, 180]))]
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, runs), *more])
    curves.main()
    assert labels(drawn[0]) == ["a/mine", "b/mine", "other"]


def test_a_key_that_no_run_holds_leaves_the_picture_as_it_is(tmp_path, drawn, monkeypatch):
    run, out = make_run(tmp_path / "mine" / "seed0", [90]), tmp_path / "runs.png"
    out.write_text("drawn before")
    arguments = ["curves.py", str(run), "--out", str(out), "--key"]
    monkeypatch.setattr(sys, "argv", [*arguments, "eval/retrun"])
    with pytest.raises(SystemExit, match="no run holds eval/retrun. Did you mean eval/return"):
        curves.main()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="mine/seed0 has no entries yet"):
        curves.main()
    assert out.read_text() == "drawn before" and not drawn


def test_the_command_draws_what_can_be_read_and_names_the_rest(tmp_path, drawn, monkeypatch, capsys):
    run = make_run(tmp_path / "mine" / "seed0", range(90, 991, 90))
    content = bytearray((run / "metrics.jsonl").read_bytes())
    content[content.index(b"\n") + 30] = 0xFF
    (run / "metrics.jsonl").write_bytes(content + b'{"step": 2000, "eval/return": "many"}\n')
    monkeypatch.setattr(sys, "argv", ["curves.py", str(run), "--out", str(tmp_path / "runs.png")])
    curves.main()
    assert "line 2." in capsys.readouterr().err
    assert drawn[0].axes[0].get_lines()[0].get_xdata().tolist() == [0, *range(180, 991, 90)]

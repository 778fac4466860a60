"""Loggers and videos: TensorBoard and W&B show each step once, and no missing program ends a run."""

import sys

import pytest
import torch

from r2dreamer.examples.training.metrics import (
    MetricsWriter,
    TensorBoardLogger,
    WandbLogger,
)
from r2dreamer.examples.training.video import encode_gif, write_video


def test_loggers_get_finite_numbers_and_frames(tmp_path):
    class Recorder:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *arguments: self.calls.append((name, *arguments))

    recorder = Recorder()
    writer = MetricsWriter(tmp_path, loggers=[recorder])
    writer.write(5, {"a": torch.tensor(2.0), "b": float("nan")})
    writer.position()
    writer.video(5, "eval/video", "frames", 30)
    writer.close()
    assert recorder.calls == [
        ("start", -1),
        ("scalars", 5, {"a": 2.0}),
        ("flush",),
        ("video", 5, "eval/video", "frames", 30),
        ("close",),
    ]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(tmp_path, loggers=[TensorBoardLogger(tmp_path)])
    writer.write(1, {"a": 1.0})
    position = writer.position()
    writer.write(2, {"a": -2.0})
    writer.write(9, {"a": -9.0})
    writer.close()
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001.before"))  # files are read in the order of their times
    writer = MetricsWriter(tmp_path, loggers=[TensorBoardLogger(tmp_path)], resume_position=position)
    writer.write(2, {"a": 2.0})
    writer.video(2, "eval/video", torch.zeros(4, 8, 6, 3, dtype=torch.uint8).numpy(), fps=30)
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(1, 1.0), (2, 2.0)]
    (image,) = events.Images("eval/video")
    assert (image.height, image.width) == (8, 6) and image.encoded_image_string.startswith(b"GIF")


def test_wandb_absent_names_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'pip install "torchrl-r2dreamer\[wandb\]"'):
        WandbLogger(tmp_path)


def test_wandb_continues_its_run_and_sends_no_step_twice(tmp_path, monkeypatch):
    class Run:
        def __init__(self):
            self.rows = []

        def log(self, values, step):
            self.rows.append((step, values))

        def finish(self):
            pass

    runs = []

    class Wandb:
        @staticmethod
        def init(**keywords):
            runs.append((keywords, Run()))
            return runs[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    writer = MetricsWriter(tmp_path, loggers=[WandbLogger(tmp_path, mode="offline")])
    writer.write(1, {"a": 1.0})
    position = writer.position()
    writer.write(2, {"a": 2.0})
    writer = MetricsWriter(tmp_path, loggers=[WandbLogger(tmp_path, mode="offline")], resume_position=position)
    writer.write(2, {"a": 2.5})
    writer.write(3, {"a": 3.0})
    MetricsWriter(tmp_path, loggers=[WandbLogger(tmp_path)])
    (before, first), (after, second), (fresh, _) = runs
    assert before["mode"] == "offline" and before["resume"] == "allow" and before["id"] == after["id"] != fresh["id"]
    assert first.rows == [(1, {"a": 1.0}), (2, {"a": 2.0})]
    assert second.rows == [(3, {"a": 3.0})]


def test_videos_fall_back_and_never_raise(tmp_path, monkeypatch, capsys):
    frames = torch.randint(0, 255, (5, 33, 20, 3), dtype=torch.uint8).numpy()
    assert encode_gif(frames, fps=30).startswith(b"GIF89a")
    path = write_video(tmp_path / "eval.mp4", frames, fps=30)
    assert path.stat().st_size > 500 and list(tmp_path.iterdir()) == [path]
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert write_video(tmp_path / "eval.mp4", frames, fps=30) == tmp_path / "eval.gif"
        patch.setitem(sys.modules, "PIL", None)
        assert write_video(tmp_path / "eval.mp4", frames, fps=30) is None
    assert "pip install" in capsys.readouterr().out
    assert write_video(tmp_path / "eval.mp4", frames[:0], fps=30) is None
    assert "No video" in capsys.readouterr().out
    for name in ("lr0.01", "lr0.03"):  # a name with a dot is no ending
        assert write_video(tmp_path / name, frames, fps=30) == tmp_path / f"{name}.mp4"
    assert write_video(tmp_path / "eval.WebM", frames, fps=30) == path
    (tmp_path / "there.mp4").mkdir()
    capsys.readouterr()
    assert write_video(tmp_path / "there.mp4", frames, fps=30) is None
    assert write_video(path / "x.mp4", frames, fps=30) is None
    assert capsys.readouterr().out.count("\n") == 2

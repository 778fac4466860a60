"""metrics.jsonl survives kills, and a resumed run neither loses nor doubles a line."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from r2dreamer.examples.training.files import replace_text
from r2dreamer.examples.training.metrics import (
    Averages,
    MetricsWriter,
    TensorBoardLogger,
    cut_after,
    read_metrics,
)

EXAMPLES = Path(__file__).parent.parent / "examples"


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# Averages


def test_mean_of_each_entry_over_the_updates_that_had_it():
    averages = Averages()
    averages.add(TensorDict({"loss_a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor([4.0])}))
    averages.add({"loss_a": torch.tensor(2.0), "b": torch.tensor(0.0)})
    averages.add({"loss_a": torch.tensor(6.0)})
    assert averages.pop() == {"loss_a": 3.0, "b": 2.0}
    assert averages.pop() == {}


def test_a_checkpoint_in_mid_interval_continues_to_the_same_bits():
    values = torch.randn(7, generator=torch.Generator().manual_seed(0))
    whole, parts = Averages(), Averages()
    for index, value in enumerate(values):
        whole.add({"loss": value})
        parts.add({"loss": value})
        if index == 3:
            state = json.loads(json.dumps(parts.state_dict()))
            parts = Averages()
            parts.load_state_dict(state)
    assert whole.pop() == parts.pop()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_names_the_first_loss_that_is_not_finite_even_if_later_ones_are(bad):
    averages = Averages()
    averages.check_finite(0, 0)
    averages.add({"loss_a": torch.tensor(1.0), "loss_b": torch.tensor(bad), "loss_c": torch.tensor(bad)})
    averages.add({"loss_a": torch.tensor(1.0), "loss_b": torch.tensor(1.0), "loss_c": torch.tensor(1.0)})
    with pytest.raises(FloatingPointError, match="loss_b is NaN or Inf at frame 1,000, update 20"):
        averages.check_finite(1000, 20)


def test_refuses_what_is_not_a_scalar():
    with pytest.raises(RuntimeError):
        Averages().add({"loss": torch.zeros(2)})


# metrics.jsonl


def test_lines_are_json_with_null_for_nan(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(
        10, {"eval/return": torch.tensor(0.1, dtype=torch.float64), "loss/a": float("nan"), "count/updates": 3}
    )
    writer.write(20, {"loss/a": float("inf")})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 10, "eval/return": 0.1, "loss/a": null, "count/updates": 3}',
        '{"step": 20, "loss/a": null}',
    ]


def test_resume_moves_the_lines_after_the_checkpoint_aside(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.write(step, {"a": step})
    position = json.loads(json.dumps(writer.position()))
    assert position["lines"] == 2 and position["step"] == 2
    for step in (3, 4):
        writer.write(step, {"a": step})
    writer = MetricsWriter(tmp_path, resume_position=position)
    for step in (3, 4, 5):
        writer.write(step, {"a": step})
    assert writer.position()["lines"] == 5
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert steps(tmp_path / "metrics.superseded.jsonl") == [3, 4]


def test_a_new_run_in_an_old_directory_begins_an_empty_file(tmp_path):
    MetricsWriter(tmp_path).write(7, {"a": 1})
    writer = MetricsWriter(tmp_path)
    assert writer.position() == {"bytes": 0, "lines": 0, "step": -1}
    assert steps(tmp_path / "metrics.superseded.jsonl") == [7]


def test_cutting_is_safe_to_repeat_wherever_it_was_killed(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    content = b"".join(b'{"step": %d}\n' % step for step in range(9))
    end = len(content) // 3

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    # Each of these is a moment after which nothing else happens: before the copy is in place, and before the cut.
    for function in ("replace", "fsync"):
        path.write_bytes(content)
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(f"r2dreamer.examples.training.metrics.os.{function}", die)
                with pytest.raises(Killed):
                    cut_after(path, end)
        assert path.read_bytes() == content
        assert cut_after(path, end) == 0
        assert path.read_bytes() == content[:end]
        assert (tmp_path / "metrics.superseded.jsonl").read_bytes() == content[end:]
        (tmp_path / "metrics.superseded.jsonl").unlink()

    # The copy is complete, the file not yet cut.
    path.write_bytes(content)
    (tmp_path / "metrics.superseded.jsonl").write_bytes(b'{"step": -5}\n' + content[end:])
    cut_after(path, end)
    assert (tmp_path / "metrics.superseded.jsonl").read_bytes() == b'{"step": -5}\n' + content[end:]


def test_a_torn_last_line_is_dropped(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"a": 1})
    position = writer.position()
    writer.write(2, {"a": 2})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "a"')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    MetricsWriter(tmp_path, resume_position=position).write(2, {"a": 2})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert steps(tmp_path / "metrics.superseded.jsonl") == [2]


def test_a_file_shorter_than_the_checkpoint_says_is_reported_and_continued(tmp_path, capsys):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"a": step})
    position = writer.position()
    os.truncate(tmp_path / "metrics.jsonl", position["bytes"] - 4)
    writer = MetricsWriter(tmp_path, resume_position=position)
    assert "lacks" in capsys.readouterr().out
    writer.write(4, {"a": 4})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 4]
    assert writer.position()["lines"] == 3


class Board(TensorBoardLogger):
    """Its disk can be full."""

    full = False

    def scalars(self, step, values):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().scalars(step, values)


def fill(patch):
    """The disk has room for five bytes, and for no line."""
    real = os.write

    def write(file, data):
        on_disk = os.readlink(f"/proc/self/fd/{file}").endswith(".jsonl")
        return real(file, data[:5] if on_disk else data)

    patch.setattr("r2dreamer.examples.training.metrics.os.write", write)


def test_lines_wait_while_the_disk_is_full_with_one_warning_and_no_half_line(tmp_path, monkeypatch, capsys):
    board, path = Board(tmp_path), tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path, [board])
    writer.write(1, {"a": 1})
    with monkeypatch.context() as patch:
        fill(patch)
        board.full = True
        writer.write(2, {"a": 2})
        writer.write(3, {"a": 3})
        assert steps(path) == [1]
        told = capsys.readouterr().err
        assert told.count(f"{path} cannot be written: No space left") == 1 and "logdir=PATH" in told
        assert told.count(f"{tmp_path / 'tensorboard'} cannot be written") == 1
        position = writer.position()  # of a checkpoint, for which there is room again
        assert (position["lines"], position["step"]) == (1, 3)
        with monkeypatch.context() as full:
            full.setattr(
                "r2dreamer.examples.training.files.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0)
            )
            with pytest.raises(OSError, match="No space"):  # before TensorBoard's thread meets it
                TensorBoardLogger.scalars(board, 3, {"a": 3})
    board.full = False
    writer.write(4, {"a": 4})
    writer.close()
    assert steps(path) == [1, 2, 3, 4] and capsys.readouterr().err == ""
    # Killed after that checkpoint: the lines that waited come with it.
    MetricsWriter(tmp_path, resume_position=position).close()
    assert steps(path) == [1, 2, 3]


def test_a_line_that_was_never_written_is_told_at_the_end(tmp_path, monkeypatch, capsys):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"a": 1})
    fill(monkeypatch)
    writer.write(2, {"a": 2})
    writer.close()
    assert "1 lines were not written to" in capsys.readouterr().err


def test_a_disk_that_is_full_from_the_start_is_named_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("old: 1")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(OSError, match=f"^{path} cannot be written: No space left.*logdir=PATH"):
            replace_text(path, "new: 1")
    assert path.read_text() == "old: 1"
    monkeypatch.setattr(TensorBoardLogger, "start", full)
    with pytest.raises(OSError, match=f"{tmp_path}/tensorboard cannot be written: No space left.*logdir=PATH"):
        MetricsWriter(tmp_path, [TensorBoardLogger(tmp_path)])


def test_kill_9_leaves_whole_lines(tmp_path):
    code = (
        "from r2dreamer.examples.training.metrics import MetricsWriter\n"
        f"writer = MetricsWriter({str(tmp_path)!r})\n"
        "for step in range(10**9): writer.write(step, {f'loss/{i}': i / 3 for i in range(40)})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_bytes().endswith(b"\n")
    logged = steps(path)
    assert logged == list(range(len(logged))) and len(logged) > 100


def test_lines_that_cannot_be_read_are_named_once_and_skipped(tmp_path, capsys):
    good = [b'{"step": %d, "a": 1, "name": "\\u00e9"}\n' % step for step in range(7)]
    bad = [b"\xff" + good[1][1:], good[2][:10] + b"\xff" + good[2][11:], b"[1]\n", b'{"a": 1}\n', b"\n"]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([good[0], *bad, *good[1:3]]))
    for containing in ("", '"a"', '"nothing"'):
        assert [line["step"] for line in read_metrics(tmp_path, containing=containing)] == (
            [0, 1, 2] if containing[1:2] != "n" else []
        )
    warning = capsys.readouterr().err
    assert "metrics.jsonl: what cannot be read is skipped, 5 in all: line 2, 3, 4, 5, 6." in warning
    list(read_metrics(tmp_path))
    assert capsys.readouterr().err == ""


def test_reading_without_timings(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"a": 1, "speed/fps": 3.0, "time/eval": 2.0})
    writer.write(2, {"b": 1})
    assert list(read_metrics(tmp_path, timings=False)) == [{"step": 1, "a": 1}, {"step": 2, "b": 1}]
    assert [line["step"] for line in read_metrics(tmp_path, containing='"b"')] == [2]

"""Fault injection: tiny runs are killed, their files damaged, their disk filled, their environments spoilt.

python tests/faults.py --out examples/results/faults.md

Each row says what went wrong, how the run ended, and what the same command did afterwards. A row fails where anything
that was saved is lost. Rows that a folder already holds are not made again; Linux only, and filling a disk needs root.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from launcher import CARTPOLE, TINY, Server, count_lines, lines, steps  # noqa: E402

from r2dreamer.examples.training.checkpoint import Checkpoints  # noqa: E402

TIMEOUT = 600  # seconds for one run
FAULTS = (
    "raise", "reset", "build", "eof", "memory", "leave", "exit", "kill", "segfault", "hang", "hang_in_c",
    "nan", "huge", "inf_reward", "huge_reward", "one", "batch", "complex", "missing", "endless", "pipe",
)  # fmt: skip
IN_WORKERS = ("eof", "pipe", "leave", "exit", "kill", "segfault", "hang", "hang_in_c")  # would end the trainer itself


class Rows:
    """The table, kept as it grows."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "rows.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def run(self, name, check, *arguments):
        """check(folder, *arguments) returns (how it ended, what came after), or fails an assertion."""
        if any(row["fault"] == name for row in self.rows):
            return
        folder, start = self.folder / re.sub(r"\W+", "_", name), time.monotonic()
        if os.path.ismount(folder / "disk"):  # this script was killed
            subprocess.run(["umount", "-l", str(folder / "disk")], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            (ended, after), passed = check(folder, *arguments), True
        except AssertionError as error:
            ended, after, passed = str(error) or "an assertion failed", "", False
        row = {"fault": name, "ended": ended, "after": after, "passed": passed}
        row["seconds"] = round(time.monotonic() - start)
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def last_words(run):
    """How the error begins with which a run ended, or its first warning."""
    error = re.search(r"^\w+Error: .*(\n[^(\n].*)*", run.stderr, re.MULTILINE)
    warning = re.search(r"^WARNING: .*", run.stderr, re.MULTILINE)
    found = error or warning
    said = " ".join(found[0].split()) if found else (run.stderr.strip().splitlines() or ["nothing"])[-1]
    return re.sub(r"\S*/", "", said)[:150]


def saved_step(logdir):
    """Of the newest checkpoint, whose checksums are right, and which is the newest that was published."""
    found = Checkpoints(logdir / "checkpoints").load()
    published = [int(path.name.split("_")[1]) for path in (logdir / "checkpoints").glob("step_*")]
    assert (found.step if found else None) == max(published, default=None), "the newest checkpoint is not whole"
    return found.step if found else 0


def members(session):
    """The processes of a run that are left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition, what, timeout=TIMEOUT):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} after {timeout} s"
        time.sleep(0.01)


def finish(server, folder, command, frames):
    """The same command goes on to the end; every line of metrics.jsonl is there once."""
    run = server.run(folder, *command, f"total_frames={frames}", timeout=TIMEOUT)
    assert run.status == 0, f"the next start ended with {run.status}: {last_words(run)}"
    assert f"finished at {frames} frames" in run.stdout, run.stdout
    logged = steps(folder / "log", "count/updates")
    assert logged == list(range(40, frames + 1, 40)), f"lines are missing or doubled: {logged}"
    return run


def kill(folder, server, previous, rng):
    """One run, killed again and again: each folder goes on where the one before it was killed."""
    log, before = folder / "log", 0
    if previous is not None:
        shutil.move(previous / "log", log)
        before = saved_step(log)
    at = count_lines(log) + rng.randrange(6)
    workers = rng.random() < 0.25  # they take seconds to start
    run = server.start(folder, *CARTPOLE, "logdir=log", "total_frames=1000000", f"env.parallel={workers}".lower())
    wait_until(lambda: count_lines(log) >= at or run.poll() is not None, "no progress")
    time.sleep(rng.uniform(0, 2))
    assert run.poll() is None, f"ended with {run.status}: {last_words(run)}"
    run.kill()
    wait_until(lambda: not members(run.pid), "workers are left", 60)
    reached, saved = max((line["step"] for line in lines(log)), default=0) if count_lines(log) else 0, saved_step(log)
    assert saved >= before, f"the checkpoint of {before} is gone, the newest is {saved}"
    assert reached - saved < 100, f"{reached} frames were logged, and only {saved} saved"
    where = f"killed after the line of frame {reached}" if reached else "killed before its first line"
    return where + (", with workers" if workers else ""), f"frame {saved} is saved, whole; no process is left"


def finish_killed(folder, server, previous):
    shutil.move(previous / "log", folder / "log")
    frames = (max(line["step"] for line in lines(folder / "log")) // 40 + 2) * 40
    finish(server, folder, [*CARTPOLE, "logdir=log"], frames)
    return f"finishes at frame {frames}", "every line of metrics.jsonl is there, once"


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def newest(log):
    return max((log / "checkpoints").glob("step_*"))


def segments(log):
    return sorted((log / "checkpoints" / "journal").glob("*.bin"))


def spoil_line(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] = 0xFF
    path.write_bytes(content)


DAMAGE = {
    "one bit of the newest state.pt": lambda log, rng: flip(newest(log) / "state.pt", rng),
    "the newest state.pt cut in half": lambda log, rng: os.truncate(
        newest(log) / "state.pt", (newest(log) / "state.pt").stat().st_size // 2
    ),
    "the newest state.pt empty": lambda log, rng: os.truncate(newest(log) / "state.pt", 0),
    "the newest state.pt gone": lambda log, rng: (newest(log) / "state.pt").unlink(),
    "one bit of the newest manifest.json": lambda log, rng: flip(newest(log) / "manifest.json", rng),
    "the newest manifest.json cut": lambda log, rng: os.truncate(newest(log) / "manifest.json", 100),
    "noise for the newest rng.pt": lambda log, rng: (newest(log) / "rng.pt").write_bytes(rng.randbytes(5000)),
    "one bit of the newest journal segment": lambda log, rng: flip(segments(log)[-1], rng),
    "the oldest journal segment gone": lambda log, rng: segments(log)[0].unlink(),
    "a byte of metrics.jsonl that is no text": lambda log, rng: spoil_line(log / "metrics.jsonl"),
}


def damage(folder, server, trained, spoil, rng):
    shutil.copytree(trained / "log", folder / "log")
    spoil(folder / "log", rng)
    before = Checkpoints(folder / "log" / "checkpoints").load().step
    run = server.run(folder, *CARTPOLE, "logdir=log", "total_frames=240", timeout=TIMEOUT)
    assert run.status == 0, f"ended with {run.status}: {last_words(run)}"
    assert "finished at 240 frames" in run.stdout and "Traceback" not in run.stderr, last_words(run)
    assert saved_step(folder / "log") == 240
    return last_words(run), f"goes on from frame {before}, and finishes"


class Disk:
    """A small disk of its own, in memory."""

    def __init__(self, folder):
        self.folder, self.ballast = folder, folder / "ballast"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)], capture_output=True)
        assert done.returncode == 0, f"not tried: no disk could be mounted ({done.stderr.decode().strip()})"

    def fill(self):
        with self.ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self):
        self.ballast.unlink()

    def close(self):
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def full_disk(folder, server, moment):
    disk = Disk(folder / "disk")
    try:
        return full_at(moment, disk, server, folder)
    finally:
        disk.close()


def full_at(moment, disk, server, folder):
    (folder / "log").symlink_to(disk.folder / "log")  # what a run prints goes to another disk
    (disk.folder / "log").mkdir()
    command = [*CARTPOLE, f"logdir={disk.folder / 'log'}", "logger=tensorboard"]
    frames = 400
    if moment == "from the start":
        disk.fill()
    run = server.start(folder, *command, f"total_frames={frames}")
    if moment != "from the start":
        wait_until(lambda: count_lines(folder / "log") >= 4 or run.poll() is not None, "no progress")
        disk.fill()
    if moment == "for a while":
        told = lambda: "lines wait" in run.stderr and "no checkpoint" in run.stderr
        wait_until(lambda: told() or run.poll() is not None, "no warning")
        disk.free()
        wait_until(lambda: run.poll() is not None, "does not end")
        assert run.status == 0, f"ended with {run.status}: {last_words(run)}"
    else:
        wait_until(lambda: run.poll() is not None, "does not end")
        assert run.status == 1, f"ended with {run.status}"
        disk.free()
    assert "Traceback" not in run.stderr, f"a traceback: {run.stderr[-300:]}"
    said, ended = " ".join(run.stderr.split()), last_words(run)
    assert str(disk.folder) in said and "ree some space" in said, f"names no path or no remedy: {said[:200]}"
    assert run.stderr.count("metrics.jsonl cannot be written") <= 1, "more than one warning"
    finish(server, folder, command, frames if moment != "for a while" else frames + 40)
    return ended, "with room again the command finishes, with every line"


def spoilt_environment(folder, server, fault):
    (folder / "fault").write_text(f"{fault} 45")
    command = ["env=custom", "env.factory=faulty:make", *TINY, "logdir=log", "env.parallel=false", "eval.max_steps=20"]
    workers = ["env.parallel=true", "timeout=60"] if fault in IN_WORKERS else []
    run = server.run(folder, *command, *workers, timeout=TIMEOUT)
    said = last_words(run)
    if fault == "endless":
        assert run.status == 0 and "did not end within max_steps=20" in run.stderr, said
    else:
        assert run.status == 1, f"ended with {run.status}: {said}"
        assert fault == "build" or "seed" in run.stderr, f"names no seed: {said}"
    wait_until(lambda: not members(run.pid), "workers are left", 60)
    saved = saved_step(folder / "log")
    assert saved >= 50 or fault == "build", f"only frame {saved} is saved"
    (folder / "fault").unlink()
    finish(server, folder, command, 240)
    return said, f"frame {saved} is saved; mended, it finishes"


def report(rows, options):
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    passed, minutes = sum(row["passed"] for row in rows), sum(row["seconds"] for row in rows) / 60
    counts = " ".join(
        f"--{name} {getattr(options, name)}" for name in ("kills", "files", "disks", "environments", "seed")
    )
    head = [
        "# Fault injection",
        "",
        f"{passed} of {len(rows)} checks found all that was saved. Tiny runs of a few seconds; each row says how the run",
        "ended, and what the same command did afterwards.",
        "",
        f"- command: `python tests/faults.py {counts}`",
        f"- machine: {len(os.sched_getaffinity(0))} cores of {cpu[1] if cpu else platform.processor()}, no GPU",
        f"- commit: {commit}, {minutes:.0f} minutes",
        "",
        "| fault | how it ended | afterwards | |",
        "| --- | --- | --- | --- |",
    ]
    cell = lambda text: text.replace("|", "\\|").replace("\n", " ")
    table = [
        f"| {cell(row['fault'])} | {cell(row['ended'])} | {cell(row['after'])} | {'ok' if row['passed'] else 'FAILED'} |"
        for row in rows
    ]
    return "\n".join([*head, *table]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--files", type=int, default=len(DAMAGE))
    parser.add_argument("--disks", type=int, default=3)
    parser.add_argument("--environments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("faults"), help="runs, and the rows that are done")
    parser.add_argument("--out", type=Path, help="where the table is written; default: table.md in the folder")
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    rng, rows, server = random.Random(options.seed), Rows(options.folder), Server()
    try:
        previous = None
        for number in range(1, options.kills + 1):
            rows.run(f"kill -9, {number}", kill, server, previous, random.Random(rng.random()))
            previous = options.folder / f"kill_9_{number}"
        if previous is not None:
            rows.run(f"the run killed {options.kills} times", finish_killed, server, previous)
        trained = options.folder / "trained"
        if options.files and not (trained / "log" / "curve.png").exists():
            server.run(trained, *CARTPOLE, "logdir=log", "total_frames=160", timeout=TIMEOUT)
        for name in list(DAMAGE)[: options.files]:
            rows.run(name, damage, server, trained, DAMAGE[name], random.Random(rng.random()))
        for moment in ("from the start", "for a while", "until the end")[: options.disks]:
            rows.run(f"a full disk {moment}", full_disk, server, moment)
        for fault in FAULTS[: options.environments]:
            rows.run(f"environment: {fault}", spoilt_environment, server, fault)
    finally:
        server.close()
    text = report(rows.rows, options)
    (options.out or options.folder / "table.md").write_text(text)
    return 0 if all(row["passed"] for row in rows.rows) else 1


if __name__ == "__main__":
    sys.exit(main())

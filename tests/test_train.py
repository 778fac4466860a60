"""The example itself: it runs, repeats, resumes after a kill, stops cleanly; real processes where that is the point."""

import errno
import functools
import os
import signal
import subprocess
import sys
import time

import pytest
from launcher import CARTPOLE, EXAMPLES, TINY, Server, config

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
import train

from support import checkpoint as checkpoint_module
from support.checkpoint import Checkpoints
from support.film import film
from support.metrics import read_metrics

PENDULUM = ["env=gym", "env.task=Pendulum-v1", *TINY, "env.episode_frames=20"]
EXACT = [*CARTPOLE, "checkpoint.exact=true", "algorithm.optimizer.lr=1e-2", "algorithm.optimizer.warmup_steps=1"]


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def train_here(logdir, *overrides):
    """In this process; returns the finished trainer."""
    trainer = train.Trainer(config(*overrides, f"logdir={logdir}"))
    try:
        trainer.run()
    finally:
        trainer.close()
    return trainer


def lines(logdir, containing="", timings=False):
    return list(read_metrics(logdir, timings=timings, containing=containing))


def steps(logdir, key):
    return [line["step"] for line in lines(logdir, f'"{key}"')]


def wait_for(run, condition):
    while not condition():
        assert run.poll() is None, f"ended with {run.status} too early: {run.stderr}"
        time.sleep(0.002)


def count_lines(logdir):
    file = logdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


# It runs.


def test_the_command_trains_from_nothing_to_a_curve(tmp_path):
    command = [sys.executable, EXAMPLES / "train.py", *CARTPOLE, "env.action_repeat=2", "logger=tensorboard"]
    command += ["eval.video=true", "progress=true"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    logdir = tmp_path / "runs" / "tiny" / "seed0"
    for name in ("config.yaml", "metrics.jsonl", "curve.png", "eval.mp4", "tensorboard", "checkpoints/step_000000200"):
        assert (logdir / name).exists(), name
    assert done.stdout.splitlines()[-1].startswith("tiny seed 0: finished at 200 frames, eval return ")
    assert "Replay: " in done.stdout and "200/200" in done.stderr

    logged = lines(logdir, '"count/updates"', timings=True)
    expected = {"step", "train/return", "train/length", "train/episodes", "count/policy_steps", "count/updates"}
    expected |= {"count/train_ratio", "speed/fps", "speed/updates_per_second", "train/kl"}
    losses = ("barlow", "dynamics", "representation", "reward", "continue", "actor", "value", "replay_value")
    expected |= {f"loss/{name}" for name in losses}
    assert expected <= {name for line in logged for name in line}
    assert all(line["step"] == 2 * line["count/policy_steps"] for line in logged)  # the action repeat
    assert logged[-1]["step"] == 200
    evaluated = lines(logdir, '"eval/return"')
    assert [line["step"] for line in evaluated] == [0, 80, 160, 200]
    assert {"eval/return", "eval/return_std", "eval/length"} <= evaluated[0].keys()


def test_the_train_ratio_is_kept_once_past_the_warmup(tmp_path):
    ratio, replayed_per_update = 7.5, 3 * 5
    train_here(tmp_path, *CARTPOLE, f"train_ratio={ratio}", "total_frames=300", "eval.every=300")
    logged = lines(tmp_path, '"count/updates"')
    first, last = logged[0], logged[-1]
    updates, policy_steps = (last[key] - first[key] for key in ("count/updates", "count/policy_steps"))
    assert updates * replayed_per_update / policy_steps == pytest.approx(ratio, rel=0.02)
    assert last["count/updates"] == pytest.approx(
        (last["count/policy_steps"] - 20) * ratio / replayed_per_update, rel=0.02
    )
    assert last["count/train_ratio"] == last["count/updates"] * replayed_per_update / last["count/policy_steps"]


CAMERA = """
import gymnasium
import numpy as np
from gymnasium import spaces

class CameraAndSpeed(gymnasium.Env):
    observation_space = spaces.Dict(
        camera=spaces.Box(0, 255, (40, 48, 3), np.uint8), speed=spaces.Box(-1, 1, (4,)), gear=spaces.Discrete(3)
    )
    action_space = spaces.Box(-2, 3, (2, 3))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.see(), {}

    def see(self):
        image = self.np_random.integers(0, 256, (40, 48, 3), np.uint8)
        return {"camera": image, "speed": np.zeros(4, np.float32), "gear": self.steps % 3}

    def step(self, action):
        self.steps += 1
        return self.see(), float(action.sum()), self.steps >= 7, False, {}

gymnasium.register("CameraAndSpeed-v0", CameraAndSpeed)
"""


def test_a_dict_of_image_vector_and_choice_with_a_box_of_actions(tmp_path, monkeypatch):
    (tmp_path / "camera_and_speed.py").write_text(CAMERA)
    monkeypatch.syspath_prepend(tmp_path)
    task = "env.task=camera_and_speed:CameraAndSpeed-v0"
    trainer = train_here(tmp_path / "log", "env=gym", *TINY, task, "total_frames=60", "eval.video=true")
    assert trainer.agent.observations.images == {"camera": (3, 64, 64)}
    assert trainer.agent.observations.vectors == {"speed": 4, "gear": 3}
    assert (trainer.agent.actions.size, trainer.agent.actions.discrete) == (6, False)
    assert trainer.count["updates"] > 10 and (tmp_path / "log" / "eval.mp4").exists()  # the film shows the camera


SHORT = ["env.action_repeat=25", "total_frames=1500"]  # episodes of 40 steps


@pytest.mark.parametrize(
    "overrides",
    [
        ["env=gym", "env.task=CartPole-v1", *TINY, "env.from_pixels=true", "total_frames=60"],
        [*PENDULUM, "total_frames=60"],
        ["env=dmc_proprio", "env.task=walker_walk", *TINY, *SHORT, "env.parallel=true"],
        ["env=dmc_vision", "env.task=cartpole_swingup", *TINY, *SHORT, "env.parallel=false"],
        ["env=probe", "env.task=ending", *TINY, "total_frames=60"],
        [*CARTPOLE, "replay.place.storage=memmap", "total_frames=60"],
        [*CARTPOLE, "precision=bf16", "total_frames=60"],
    ],
    ids=["gym pixels", "continuous actions", "dmc_proprio in workers", "dmc_vision", "probe", "memmap", "bf16"],
)
def test_it_runs_on(tmp_path, overrides):
    once = ["eval.every=1000000", "env.eval_episodes=1", "checkpoint.every=1000000"]
    trainer = train_here(tmp_path, *overrides, *once)
    assert trainer.count["updates"] >= 2
    assert steps(tmp_path, "eval/return") == [0, trainer.frames]


# It repeats, killed or not.


def test_two_runs_with_one_seed_are_identical_and_with_another_not(tmp_path):
    few = [*PENDULUM, "total_frames=80"]
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        train_here(tmp_path / name, *few, f"seed={seed}")
    assert lines(tmp_path / "one") == lines(tmp_path / "two") != lines(tmp_path / "other")


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = server.run(folder, *EXACT, "logdir=log")
    assert run.status == 0, run.stderr
    return lines(folder / "log")


def before_the_first_checkpoint(run, logdir):
    wait_for(run, lambda: count_lines(logdir) >= 2)
    assert not (logdir / "checkpoints" / "step_000000052").exists()


def just_after_a_checkpoint(run, logdir):
    wait_for(run, lambda: any((logdir / "checkpoints").glob("step_*")))


def between_two_checkpoints(run, logdir):
    wait_for(run, lambda: 80 in steps(logdir, "count/updates") if count_lines(logdir) else False)


def while_saving(run, logdir):
    """Stopped first, and only killed when it is certain that the save is under way."""
    directory = logdir / "checkpoints"
    wait_for(run, lambda: any(directory.glob("step_*")))
    while True:
        wait_for(run, lambda: any(directory.glob(".saving-*")))
        run.send(signal.SIGSTOP)
        time.sleep(0.01)
        if any(directory.glob(".saving-*")):
            return
        run.send(signal.SIGCONT)


def after_the_last_regular_checkpoint(run, logdir):
    wait_for(run, lambda: count_lines(logdir) and 160 in steps(logdir, "eval/return"))


MOMENTS = [
    before_the_first_checkpoint,
    just_after_a_checkpoint,
    between_two_checkpoints,
    while_saving,
    after_the_last_regular_checkpoint,
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_run_killed_and_resumed_logs_what_the_uninterrupted_one_did(server, uninterrupted, tmp_path, moment):
    command, logdir = [*EXACT, "logdir=log"], tmp_path / "log"
    run = server.start(tmp_path, *command)
    moment(run, logdir)
    run.kill()
    assert run.status == -signal.SIGKILL and count_lines(logdir) < len(uninterrupted)
    if moment is while_saving:
        assert any((logdir / "checkpoints").glob(".saving-*"))
    with_timings = lines(logdir, timings=True)[:2]
    resumed = server.run(tmp_path, *command)
    assert resumed.status == 0, resumed.stderr
    assert lines(logdir) == uninterrupted
    from_the_start = lines(logdir, timings=True)[:2] != with_timings
    assert from_the_start == (moment is before_the_first_checkpoint)
    assert not any((logdir / "checkpoints").glob(".*"))


def test_a_run_killed_again_and_again_without_exact_neither_loses_nor_doubles_a_line(server, tmp_path):
    command, logdir = [*CARTPOLE, "logdir=log"], tmp_path / "log"
    for step in (80, 160):
        run = server.start(tmp_path, *command)
        wait_for(run, lambda step=step: count_lines(logdir) and step in steps(logdir, "count/updates"))
        run.kill()
    assert server.run(tmp_path, *command).status == 0
    assert steps(logdir, "count/updates") == [40, 80, 120, 160, 200]
    assert steps(logdir, "eval/return") == [0, 80, 160, 200]


def fifty_updates(trainer):
    losses = []
    for _ in range(50):
        batch = trainer.replay.sample_windows()
        found, latents = trainer.learner.update(batch)
        trainer.replay.write_back(batch, latents["state"], latents["belief"])
        losses.append(torch.stack([found[name].reshape(()) for name in sorted(found.keys())]))
    return torch.stack(losses)


@pytest.mark.parametrize("exact", [True, False])
def test_the_restored_learner_makes_the_same_fifty_updates_bit_for_bit(tmp_path, exact):
    overrides = [*CARTPOLE, f"checkpoint.exact={exact}", "total_frames=100", "eval.every=100"]
    trainer = train_here(tmp_path, *overrides)
    saved_at = trainer.frames
    trainer.save = None  # the run has saved at its end; nothing has happened since
    Checkpoints(tmp_path / "checkpoints").load().restore_rng()
    expected = fifty_updates(trainer)

    restored = train.Trainer(config(*overrides, "total_frames=200", f"logdir={tmp_path}"))
    assert restored.frames == saved_at
    restored.saved.restore_replay(restored.replay)  # a resumed run ends the episodes it cannot continue
    restored.saved.restore_rng()
    found = fifty_updates(restored)
    restored.close()
    assert expected.isfinite().all() and not torch.equal(expected[0], expected[1])
    assert torch.equal(found, expected)


def test_without_the_replay_a_resumed_run_collects_first_and_owes_nothing_for_it(tmp_path):
    overrides = [*CARTPOLE, "checkpoint.replay=false", "warmup_steps=40", "train_ratio=15"]
    before = train_here(tmp_path, *overrides, "total_frames=120").count["updates"]
    after = train.Trainer(config(*overrides, "total_frames=240", f"logdir={tmp_path}"))
    seen = []
    update = after.update
    after.update = lambda: (update(), seen.append((after.frames, after.count["updates"])))
    after.run()
    after.close()
    assert len(after.replay) <= 240 - 120 + 40  # nothing of what came before, and the records of ended episodes
    assert seen[0][0] >= 120 + 40 and seen[0][1] - before <= 4  # one update a policy step; four steps are taken at once
    assert seen[-1] == (240, before + 240 - 120 - 40)


def test_a_resumed_run_trains_at_the_ratio_of_its_own_command(tmp_path):
    before = train_here(tmp_path, *CARTPOLE, "train_ratio=7.5", "total_frames=100").count
    after = train_here(
        tmp_path, *CARTPOLE, "train_ratio=24", "batch_size=2", "batch_length=4", "total_frames=200"
    ).count
    assert after["updates"] - before["updates"] == pytest.approx(100 * 24 / (2 * 4), abs=4)
    replayed = before["updates"] * 3 * 5 + (after["updates"] - before["updates"]) * 2 * 4
    assert lines(tmp_path, '"count/updates"')[-1]["count/train_ratio"] == replayed / after["policy_steps"]


def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_resumed(server, tmp_path):
    logdir = tmp_path / "log"
    assert server.run(tmp_path, *CARTPOLE, "logdir=log", "total_frames=100").status == 0
    newest = max((logdir / "checkpoints").glob("step_*"))
    with open(newest / "state.pt", "r+b") as file:
        file.truncate(1000)
    run = server.run(tmp_path, *CARTPOLE, "logdir=log")
    assert run.status == 0 and f"checkpoint {newest.name} is damaged" in run.stderr
    assert steps(logdir, "count/updates") == [40, 80, 120, 160, 200]


# It stops cleanly.


def test_ctrl_c_saves_and_leaves_with_status_0(server, tmp_path):
    logdir, command = tmp_path / "log", [*CARTPOLE, "env.parallel=true", "logdir=log", "checkpoint.every=1000000"]
    run = server.start(tmp_path, *command)
    wait_for(run, lambda: count_lines(logdir) >= 2)
    run.send(signal.SIGINT)
    assert run.wait() == 0, run.stderr
    assert "interrupted, resume with the same command" in run.stdout and "Traceback" not in run.stderr
    saved = Checkpoints(logdir / "checkpoints").load()
    assert 40 <= saved.step < 200
    resumed = server.run(tmp_path, *command)
    assert resumed.status == 0 and "finished at 200 frames" in resumed.stdout
    assert steps(logdir, "count/updates") == [40, 80, 120, 160, 200]


def test_ctrl_c_leaves_an_exact_run_where_it_will_repeat_from(server, uninterrupted, tmp_path):
    run = server.start(tmp_path, *EXACT, "logdir=log")
    wait_for(run, lambda: count_lines(tmp_path / "log") >= 3)
    run.send(signal.SIGTERM)
    assert run.wait() == 0, run.stderr
    assert server.run(tmp_path, *EXACT, "logdir=log").status == 0
    assert lines(tmp_path / "log") == uninterrupted


def test_ctrl_c_twice_leaves_at_once(server, tmp_path):
    slow = ["collect_steps=100000", "total_frames=1000000", "replay.capacity=1000000"]  # minutes for a single step
    run = server.start(tmp_path, *CARTPOLE, *slow, "logdir=log")
    wait_for(run, lambda: count_lines(tmp_path / "log") >= 1)
    while "Press Ctrl-C again" not in run.stderr:
        time.sleep(0.5)  # the first evaluation may still be ending
        run.send(signal.SIGINT)
        time.sleep(0.2)
    run.send(signal.SIGINT)
    assert run.wait(timeout=20) == 130
    assert "Traceback" not in run.stderr and not any((tmp_path / "log" / "checkpoints").glob("step_*"))


def main_fails(capsys, *overrides):
    """Runs main in this process; returns what it says when it ends with status 1."""
    with pytest.raises(SystemExit) as ended:
        train.main(config(*overrides))
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_a_loss_that_turns_nan_is_named_and_the_last_checkpoint_stays(tmp_path, monkeypatch, capsys):
    computed, calls = train.Learner.losses, []

    def spoilt(self, batch):
        losses, latents = computed(self, batch)
        calls.append(1)
        if len(calls) == 25:
            losses["loss_reward"] = losses["loss_reward"] * float("nan")
        return losses, latents

    with monkeypatch.context() as patched:
        patched.setattr(train.Learner, "losses", spoilt)
        message = main_fails(capsys, *CARTPOLE, f"logdir={tmp_path}")
    assert "loss_reward is NaN or Inf at frame" in message and "Traceback" not in message
    saved = Checkpoints(tmp_path / "checkpoints").load()
    assert saved is not None and all(value.isfinite().all() for value in saved.state["learner"]["model"].values())
    assert train_here(tmp_path, *CARTPOLE).frames == 200


def test_a_diverging_learning_rate_ends_the_run_with_status_1(server, tmp_path):
    run = server.run(tmp_path, *CARTPOLE, "algorithm.optimizer.lr=1e30", "algorithm.optimizer.warmup_steps=0")
    assert run.status == 1 and "NaN or Inf at frame" in run.stderr and "Traceback" not in run.stderr


def fill_the_disk(monkeypatch, *saves):
    """The saves with these numbers, counted from 1, find no space left."""
    write, count = checkpoint_module._save_tensors, []

    def full(path, value):
        if path.name == "state.pt":
            count.append(1)
        if len(count) in saves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, value)

    monkeypatch.setattr(checkpoint_module, "_save_tensors", full)


def test_a_full_disk_is_told_and_the_next_checkpoint_tries_again(tmp_path, monkeypatch, capsys):
    fill_the_disk(monkeypatch, 2)
    at_warning = []
    monkeypatch.setattr(
        train.tqdm,
        "write",
        lambda text, file: at_warning.append((text, Checkpoints(tmp_path / "checkpoints").load().step)),
    )
    train_here(tmp_path, *CARTPOLE)
    (message, previous), *more = at_warning
    assert "the disk is full" in message and "Training goes on" in message and not more
    assert 50 <= previous < 100  # whole, and found
    assert Checkpoints(tmp_path / "checkpoints").load().step == 200
    assert steps(tmp_path, "count/updates") == [40, 80, 120, 160, 200]


def test_a_full_disk_at_the_very_end_is_an_error(tmp_path, monkeypatch, capsys):
    fill_the_disk(monkeypatch, 4)
    message = main_fails(capsys, *CARTPOLE, f"logdir={tmp_path}")
    assert "the disk is full" in message and "Earlier checkpoints are intact" in message
    assert 150 <= Checkpoints(tmp_path / "checkpoints").load().step < 200


MORTAL = """
import os, pathlib, signal
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv

class Mortal(PendulumEnv):
    def step(self, action):
        if pathlib.Path(__file__).with_name("deadly").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)

gymnasium.register("Mortal-v0", Mortal, max_episode_steps=20)
"""


@pytest.mark.parametrize("exact", [False, True])
def test_a_worker_that_dies_is_named_and_what_was_learned_is_saved(tmp_path, monkeypatch, capsys, exact):
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(tmp_path)
    task = ["env=gym", "env.task=mortal:Mortal-v0", *TINY, "env.parallel=true"]
    overrides = [*task, f"checkpoint.exact={exact}", f"logdir={tmp_path / 'log'}"]
    collect = train.Trainer.collect

    def deadly(self, transitions):
        collect(self, transitions)
        if self.frames == 120:
            (tmp_path / "deadly").touch()

    with monkeypatch.context() as patched:
        patched.setattr(train.Trainer, "collect", deadly)
        message = main_fails(capsys, *overrides)
    assert "WorkerError" in message and "'mortal:Mortal-v0'" in message and "killed by SIGKILL" in message
    restarts = 2 if exact else 0  # at the checkpoints of 52 and 100 frames
    seeds = r2dreamer.envs.env_seeds(0, 2, "train", restarts)
    assert any(f"seed {seed}" in message for seed in seeds)
    assert Checkpoints(tmp_path / "log" / "checkpoints").load().step == (100 if exact else 120)
    (tmp_path / "deadly").unlink()
    assert train_here(tmp_path / "log", *overrides[:-1]).frames == 200
    assert steps(tmp_path / "log", "count/updates") == [40, 80, 120, 160, 200]


def test_a_worker_that_dies_between_two_steps_is_named_too(tmp_path, monkeypatch, capsys):
    collect = train.Trainer.collect

    def deadly(self, transitions):
        collect(self, transitions)
        if self.frames == 40:
            os.kill(self.environments._workers[1].pid, signal.SIGKILL)
            self.environments._workers[1].join()

    monkeypatch.setattr(train.Trainer, "collect", deadly)
    message = main_fails(capsys, *CARTPOLE, "env.parallel=true", f"logdir={tmp_path}")
    assert "WorkerError" in message and "'CartPole-v1'" in message


# examples/evaluate.py


def test_what_observes_no_image_is_filmed_from_its_actions(capsys):
    factory = functools.partial(r2dreamer.envs.make_gym, task="Pendulum-v1", time_limit=9)
    actions = list(factory(seed=3).rollout(9)["action"])
    frames = film(factory, 3, actions)
    assert frames.shape == (10, 250, 250, 3) and (frames[0] != frames[-1]).any()
    assert (frames == film(factory, 3, actions)).all() and (frames[0] != film(factory, 5, actions)[0]).any()
    assert film(lambda seed: None, 3, actions) is None  # an environment that knows nothing of pixels
    assert capsys.readouterr().out.startswith("No video: TypeError")


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


def test_evaluate_takes_one_checkpoint_other_seeds_and_more_episodes(server, trained, tmp_path):
    earlier = min((trained / "checkpoints").glob("step_*"))
    more = ["episodes=5", "seed=7", "video=false"]
    one = server.run(tmp_path / "one", f"checkpoint={earlier}", *more, script="evaluate")
    assert one.status == 0 and len(returns(one.stdout)) == 5
    assert f"at {int(earlier.name.removeprefix('step_'))} frames" in one.stdout
    newest = server.run(tmp_path / "two", f"checkpoint={trained}/checkpoints", *more, script="evaluate")
    assert newest.status == 0 and returns(newest.stdout) != returns(one.stdout)
    assert not any(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize(
    "what, says",
    [
        ("nothing", "checkpoint=DIR is missing"),
        ("elsewhere", "there is no checkpoint at"),
        ("corrupt", "state.pt"),
        ("format", "has the format 99"),
        ("foreign", "was not saved by examples/train.py"),
        ("episodes", "episodes=0 must be at least 1"),
    ],
)
def test_evaluate_refuses(server, trained, tmp_path, what, says):
    path = tmp_path / "checkpoints" / "step_000000001"
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"weights": torch.zeros(3)})
    if what == "corrupt":
        (path / "state.pt").write_bytes(b"nothing")
    if what == "format":
        manifest = (path / "manifest.json").read_text()
        monkey = checkpoint_module.json.loads(manifest)
        monkey["manifest"]["format"] = 99
        monkey["crc32"] = checkpoint_module._json_crc32(monkey["manifest"])
        (path / "manifest.json").write_text(checkpoint_module.json.dumps(monkey))
    arguments = {
        "nothing": [],
        "elsewhere": [f"checkpoint={tmp_path}/nowhere"],
        "episodes": [f"checkpoint={trained}", "episodes=0"],
    }.get(what, [f"checkpoint={path}"])
    run = server.run(tmp_path / "run", *arguments, script="evaluate")
    assert run.status == 1 and says in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr and "\n\n" not in run.stderr.strip()

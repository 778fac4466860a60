"""What a user gets wrong ends with status 1 and one readable paragraph, before anything heavy starts."""

import fcntl

import pytest
import torch
from launcher import CARTPOLE, TINY
from tensordict import TensorDict

from r2dreamer.examples.cli.script import friendly_errors
from r2dreamer.examples.training.metrics import read_metrics

WORLD = """
import gymnasium
import numpy as np
from gymnasium import spaces

class World(gymnasium.Env):
    observation_space = spaces.Dict(camera=spaces.Box(0, 255, (24, 24, 3), np.uint8), speed=spaces.Box(-1, 1, (2,)))
    action_space = spaces.Discrete(2)
    spoilt = None

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.see(), {}

    def see(self):
        speed = np.full(2, np.nan if self.spoilt == "speed" and self.steps == 4 else 0, np.float32)
        return {"camera": np.zeros((24, 24, 3), np.uint8), "speed": speed}

    def step(self, action):
        self.steps += 1
        reward = float("inf") if self.spoilt == "reward" and self.steps == 4 else 1.0
        return self.see(), reward, False, self.steps == 9, {}

class NaNSpeed(World):
    spoilt = "speed"

class InfiniteReward(World):
    spoilt = "reward"

class Faulty(World):
    def step(self, action):
        return super().step(action) if self.steps < 7 else {}["speed"]

class TwoHands(World):
    action_space = spaces.MultiDiscrete([2, 3])

class Graph(World):
    observation_space = spaces.Dict(graph=spaces.Graph(spaces.Box(0, 1, (2,)), None))

for name in ("World", "NaNSpeed", "InfiniteReward", "Faulty", "TwoHands", "Graph"):
    gymnasium.register(f"{name}-v0", globals()[name])
"""


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory):
    """A run of 60 frames, whose directory each test gets a copy of by name only: none of them may change it."""
    folder = tmp_path_factory.mktemp("finished")
    run = server.run(folder, *CARTPOLE, "total_frames=60", "logdir=log")
    assert run.status == 0, run.stderr
    return folder / "log"


def refused(server, folder, *overrides, **more):
    """What the refused command says, on one line."""
    folder.mkdir(exist_ok=True)
    (folder / "world.py").write_text(WORLD)  # the server looks for modules where a run starts, too
    run = server.run(folder, *overrides, **more)
    assert run.status == 1, run.stdout + run.stderr
    paragraph = run.stderr.strip()
    paragraph, _, hint = paragraph.partition("\n\nSet the environment variable HYDRA_FULL_ERROR")  # Hydra's own
    assert "Traceback" not in paragraph and len(paragraph) < 1200, paragraph
    assert hint or "\n\n" not in paragraph
    suggestion = hint.partition("stack trace.")[2]
    return " ".join((paragraph + suggestion).split())


def task(name):
    return ["env=gym", f"env.task=world:{name}-v0", *TINY]


COMMANDS = {
    "misspelt key": ([*CARTPOLE, "train_ratoi=3"], ["Could not override 'train_ratoi'", "Did you mean train_ratio"]),
    "misspelt nested key": (
        [*CARTPOLE, "model.believe=3"],
        ["Could not override 'model.believe'", "Did you mean model.belief"],
    ),
    "unknown env group": (
        ["env=atari", *TINY],
        ["env/atari", "Did you mean atari100k?", "dmc_proprio", "gym", "probe"],
    ),
    "a run for resume": ([*CARTPOLE, "checkpoint=log"], ["must be a section, of which", "say resume=PATH"]),
    "a former group": (
        [*CARTPOLE, "probe_decoder=observation"],
        ["probe_decoder is the former name of detached_decoder"],
    ),
    "a former key": (
        [*CARTPOLE, "algorithm.probe.weight=2"],
        ["algorithm.probe.weight is the former name of algorithm.detached_decoder.weight"],
    ),
    "one setting said in two places": (
        [*CARTPOLE, "env.make.action_repeat=2"],
        ["env.make.action_repeat=2, but env.action_repeat=1", "env.action_repeat=2, which sets both"],
    ),
    "a task that is no name": (["env=gym", "env.task=not/a/task", *TINY], ["not/a/task"]),
    "unknown model": ([*CARTPOLE, "model=size13M"], ["size13M", "size12M"]),
    "unknown gym task": (["env=gym", "env.task=cartpole-v1", *TINY], ["'cartpole-v1'", "CartPole-v1"]),
    "unknown dmc task": (["env=dmc_proprio", "env.task=walker_wlak", *TINY], ["'walker_wlak'", "walker_walk"]),
    "unknown probe": (["env=probe", "env.task=endnig", *TINY], ["'endnig'", "ending"]),
    "batch longer than a stream": (
        [*CARTPOLE, "batch_length=600", "total_frames=2000"],
        ["batch longer than any stored stream", "batch_length of at most 499", "capacity of at least 1202"],
    ),
    "image and stride": (
        ["env=gym", "env.task=CartPole-v1", "env.from_pixels=true", "env.make.image_size=60", *TINY],
        ["Images of 60x60", "divisible by the encoder's stride 16"],
    ),
    "unsupported actions": (task("TwoHands"), ["MultiDiscrete", "Supported are Discrete and Box"]),
    "unsupported observations": (task("Graph"), ["Graph", "not supported"]),
    "no CUDA": ([*CARTPOLE, "device=cuda:99"], ["device=cuda:99"]),
    "no such device": ([*CARTPOLE, "device=gpu"], ["device=gpu", "cpu"]),
    "precision": ([*CARTPOLE, "precision=fp8"], ["precision=fp8", "bf16, fp32"]),
    "resume elsewhere": ([*CARTPOLE, "resume=/nowhere/at/all"], ["/nowhere/at/all", "no checkpoint"]),
    "resume misspelt": ([*CARTPOLE, "resume=atuo"], ["atuo", "no checkpoint"]),
    "a negative multiplier": (
        [*CARTPOLE, "model.encoder_multipliers=[2,-3]"],
        ["model.encoder_multipliers=[2, -3]", "whole"],
    ),
    "threads=-1": ([*CARTPOLE, "threads=-1"], ["threads=-1 must be"]),
    "seed=1.5": ([*CARTPOLE, "seed=1.5"], ["seed=1.5 must be"]),
    "timeout=0": ([*CARTPOLE, "timeout=0"], ["timeout=0 must be"]),
    "batch_length=1": ([*CARTPOLE, "batch_length=1"], ["batch_length=1 must be a whole number of at least 2"]),
    "discount=1": ([*CARTPOLE, "algorithm.actor.discount=1"], ["algorithm.actor.discount=1 must be"]),
    "too short to learn": ([*CARTPOLE, "batch_length=30", "total_frames=20"], ["total_frames=20", "batch_length=30"]),
    "exact without its replay": (
        [*CARTPOLE, "checkpoint.exact=true", "checkpoint.replay=false"],
        ["checkpoint.exact=true", "checkpoint.replay=true"],
    ),
    "batch_size=0": ([*CARTPOLE, "batch_size=0"], ["batch_size=0 must be"]),
    "batch_length=-5": ([*CARTPOLE, "batch_length=-5"], ["batch_length=-5 must be"]),
    "belief=-1": ([*CARTPOLE, "model.belief=-1"], ["model.belief=-1 must be"]),
    "hidden=0": ([*CARTPOLE, "model.hidden=0"], ["model.hidden=0 must be"]),
    "layers=-1": ([*CARTPOLE, "model.actor_layers=-1"], ["model.actor_layers=-1 must"]),
    "bins=0": ([*CARTPOLE, "model.num_bins=0"], ["model.num_bins=0 must"]),
    "belief and blocks": ([*CARTPOLE, "model.belief=20"], ["belief_size=20", "num_blocks=8"]),
    "total_frames=0": ([*CARTPOLE, "total_frames=0"], ["total_frames=0 must be"]),
    "num_envs=0": ([*CARTPOLE, "env.num_envs=0"], ["env.num_envs=0 must be"]),
    "episodes=0": ([*CARTPOLE, "eval.episodes=0"], ["eval.episodes=0 must be"]),
    "keep=0": ([*CARTPOLE, "checkpoint.keep=0"], ["checkpoint.keep=0 must be"]),
    "ray": ([*CARTPOLE, "collector=ray", "collector.address=ray://node:1"], ["must be local, auto or HOST:PORT"]),
    "train_ratio=-1": ([*CARTPOLE, "train_ratio=-1"], ["train_ratio=-1 must be a number of at least 0"]),
    "horizon=0": (
        [*CARTPOLE, "algorithm.actor.imagination_horizon=0"],
        ["imagination_horizon=0 must be a whole number of at least 1"],
    ),
    "text for a number": ([*CARTPOLE, "batch_size=many"], ["batch_size=many must be"]),
    "half a batch": ([*CARTPOLE, "batch_size=2.5"], ["batch_size=2.5 must be"]),
    "replay that does not fit": ([*CARTPOLE, "replay.capacity=100000000000000"], ["does not fit", "replay.capacity"]),
    "negative seed": ([*CARTPOLE, "seed=-1"], ["seed=-1 must"]),
    "no width": ([*CARTPOLE, "model.hidden=null"], ["model.hidden=null", "must be given"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_refused_before_anything_starts(server, tmp_path, name):
    command, words = COMMANDS[name]
    message = refused(server, tmp_path, *command, "logdir=log")
    for word in words:
        assert word in message, message
    assert not (tmp_path / "log" / "metrics.jsonl").exists() and not (tmp_path / "log" / "checkpoints").exists()


def test_a_directory_that_another_run_holds(server, tmp_path):
    (tmp_path / "log").mkdir()
    with (tmp_path / "log" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Another process is training in logdir=log" in refused(server, tmp_path, *CARTPOLE, "logdir=log")


def test_a_directory_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").touch()  # a test may run as root, whom no permission stops
    message = refused(server, tmp_path, *CARTPOLE, "logdir=file/log")
    assert "logdir=file/log cannot be written" in message and "logdir=PATH" in message


@pytest.mark.parametrize(
    "module, extra, command",
    [
        ("dm_control", "dmc", ["env=dmc_proprio", *TINY]),
        ("wandb", "wandb", [*CARTPOLE, "logger=wandb"]),
    ],
)
def test_a_missing_extra_names_the_line_that_installs_it(server, tmp_path, module, extra, command):
    message = refused(server, tmp_path, *command, "logdir=log", without=module)
    assert f'pip install "torchrl-r2dreamer[{extra}]"' in message


@pytest.mark.parametrize(
    "module, task, suite", [("dm_control", "walker_walk", "dmc_vision"), ("metaworld", "hammer", "metaworld")]
)
def test_a_task_of_a_suite_that_is_not_installed_is_sent_there_all_the_same(server, tmp_path, module, task, suite):
    message = refused(server, tmp_path, *CARTPOLE, f"env.task={task}", "logdir=log", without=module)
    assert "another suite has" in message and f"env={suite}" in message, message


@pytest.mark.parametrize(
    "name, words",
    [
        ("NaNSpeed", ["observation 'speed' is not finite", "step 4", "world:NaNSpeed-v0", "seed"]),
        ("InfiniteReward", ["reward is not finite", "step 4", "world:InfiniteReward-v0", "seed"]),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_and_is_named(server, tmp_path, name, words):
    message = refused(server, tmp_path, *task(name), "logdir=log")
    for word in words:
        assert word in message, message


def test_an_error_of_the_users_own_environment_is_shown_as_it_was_raised(server, tmp_path):
    (tmp_path / "world.py").write_text(WORLD)
    run = server.run(tmp_path, *task("Faulty"), "env.parallel=false", "logdir=log")
    said, _, shown = run.stderr.strip().partition("\nTraceback")
    assert run.status == 1 and said.rpartition("\n")[2].startswith("KeyError ended the program; ")
    assert (
        "hydra" not in shown
        and 'else {}["speed"]' in shown
        and "KeyError: 'speed'\nThis happened in `step` of task" in shown
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ("model.belief=24", ["model.belief=16", "model.belief=24"]),
        ("model=size1M", ["model."]),
        ("env.task=Acrobot-v1", ["env.task=CartPole-v1", "env.task=Acrobot-v1"]),
        ("env=dmc_proprio", ["env.suite=gym", "env.suite=dmc_proprio"]),
        ("env.num_envs=3", ["env.num_envs=2", "env.num_envs=3"]),
        ("env.from_pixels=true", ["from_pixels=False", "from_pixels=True"]),
        ("replay.capacity=2000", ["replay.capacity=1000", "replay.capacity=2000"]),
    ],
)
def test_a_run_is_not_resumed_as_another_one(server, finished, tmp_path, change, words):
    group = change.split("=")[0]
    overrides = [*CARTPOLE, "total_frames=120"]
    if group in ("env", "model"):  # another group: without what was said about the entries of this one
        tasks = "env.task" if group == "env" else "model."
        overrides = [item for item in overrides if not item.startswith((f"{group}=", tasks))]
    overrides.append(change)
    saved = (finished / "config.yaml").read_bytes(), (finished / "metrics.jsonl").read_bytes()
    message = refused(server, tmp_path, *overrides, f"logdir={finished}")
    for word in [*words, "start afresh in another logdir"]:
        assert word in message, message
    assert saved == ((finished / "config.yaml").read_bytes(), (finished / "metrics.jsonl").read_bytes())


def test_a_run_is_not_continued_elsewhere_as_another_one(server, finished, tmp_path):
    where = ["total_frames=120", f"resume={finished}", "logdir=log"]
    message = refused(server, tmp_path, *CARTPOLE, *where, "model.belief=24")
    assert str(finished) in message and "model.belief=24" in message
    assert not (tmp_path / "log" / "config.yaml").exists()


def test_a_run_that_began_from_another_one_goes_on_by_the_same_command(server, finished, tmp_path):
    command = [*CARTPOLE, f"resume={finished}", "logdir=log"]
    first = server.run(tmp_path, *command, "total_frames=100")
    assert first.status == 0, first.stderr
    again = server.run(tmp_path, *command, "total_frames=140")
    assert again.status == 0, again.stderr
    assert "goes on from its own checkpoint at 100 frames" in again.stderr
    steps = [line["step"] for line in read_metrics(tmp_path / "log")]
    assert steps == sorted(steps) and steps[-1] == 140


def test_a_run_does_not_take_the_place_of_another_one(server, finished, tmp_path):
    mine = [*CARTPOLE, "logdir=log", "total_frames=100"]
    assert server.run(tmp_path, *mine).status == 0
    before = sorted(path.name for path in (tmp_path / "log" / "checkpoints").iterdir())
    message = refused(server, tmp_path, *CARTPOLE, "logdir=log", "total_frames=140", f"resume={finished}")
    assert "already holds one, whose checkpoints would be overwritten" in message and "resume=auto" in message
    assert sorted(path.name for path in (tmp_path / "log" / "checkpoints").iterdir()) == before


def test_an_unknown_storage(server, tmp_path):
    assert "memmap" in refused(server, tmp_path, *CARTPOLE, "logdir=log", "replay.place.storage=tape")


def test_a_finished_run_is_not_resumed(server, finished, tmp_path):
    message = refused(server, tmp_path, *CARTPOLE, "total_frames=60", f"logdir={finished}")
    assert "has already reached 60 of total_frames=60" in message and "larger total_frames" in message


def test_a_run_is_not_overwritten(server, finished, tmp_path):
    before = list(read_metrics(finished))
    message = refused(server, tmp_path, *CARTPOLE, "total_frames=120", f"logdir={finished}", "resume=false")
    assert "already holds a run" in message and "resume=auto" in message
    assert list(read_metrics(finished)) == before


def test_ctrl_c_in_the_middle_of_a_model_leaves_as_anywhere_else():
    module = torch.nn.Linear(1, 1)

    @friendly_errors
    def main(cfg):
        with TensorDict.from_module(module).to_module(module):
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        main(None)
    assert left.value.code == 130

"""Several environments at once, in one process or in workers: seeds, equal results, and the name of what fails."""

import errno
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faulty import Faulty
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, RewardSum, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import RandomPolicy
from toys import FACTORIES, every_factory, same, trajectory

from r2dreamer.envs import WorkerError, count_workers, env_seeds, make_custom, make_gym, make_vector_env
from r2dreamer.envs.base.gl import hanging_gl


def test_train_and_eval_seeds_never_meet():
    train, evaluation = set(), set()
    for run in range(20):
        for generation in range(3):
            mine = env_seeds(run, 16, "train", generation)
            assert len(set(mine)) == 16 and mine[:4] == env_seeds(run, 4, "train", generation)
            train.update(mine)
            evaluation.update(env_seeds(run, 16, "eval", generation))
    assert not train & evaluation and max(train | evaluation) < 2**31
    assert len(train) == 20 * 3 * 16


def test_set_seed_keeps_training_and_evaluation_apart():
    train, evaluation = (
        make_vector_env(FACTORIES["gym state"], env_seeds(0, 3, split), parallel=False) for split in ("train", "eval")
    )
    seen = {}
    for env in (train, evaluation):
        for seed in range(30):
            env.set_seed(seed)
            assert len(set(env.seeds)) == 3
            seen.setdefault(id(env), set()).update(env.seeds)
    assert not seen[id(train)] & seen[id(evaluation)] and len(seen[id(train)]) == 90
    train.set_seed(7)
    new = make_vector_env(FACTORIES["gym state"], env_seeds(7, 3, "train"), parallel=False)
    assert same(trajectory(train), trajectory(new))


@every_factory
def test_a_reseeded_environment_is_as_good_as_new(factory):
    old = make_vector_env(factory, [1, 2], parallel=False)
    trajectory(old, 3)
    old.reseed([8, 9])
    new = make_vector_env(factory, [8, 9], parallel=False)
    assert new.batch_size == (2,)
    assert same(trajectory(old), trajectory(new))


@every_factory
def test_it_gives_what_the_environments_give_alone(factory):
    """TorchRL's SerialEnv, which steps each environment by itself, is the oracle; episodes end and begin on the way."""
    vector = make_vector_env(factory, [1, 2, 3], parallel=False)
    check_env_specs(vector)
    vector.reseed([1, 2, 3])
    alone = SerialEnv(3, factory, create_env_kwargs=[{"seed": seed} for seed in (1, 2, 3)])
    for steps in (12, 3):  # the second rollout resets what the first one left in mid-episode
        one, other = trajectory(vector, steps), trajectory(alone, steps)
        assert set(one.keys(True, True)) == set(other.keys(True, True)) and same(one, other)


@pytest.mark.parametrize("workers", [True, "auto", 1, 2])
@pytest.mark.parametrize("name", ["gym dict", "dmc vision", "probe"])
def test_workers_give_what_one_process_gives_also_after_reseeding(name, workers):
    serial = make_vector_env(FACTORIES[name], [1, 2, 5], parallel=False)
    threads = torch.get_num_threads()
    parallel = make_vector_env(FACTORIES[name], [1, 2, 5], parallel=workers)
    named = {True: 3, "auto": min(3, len(os.sched_getaffinity(0)))}
    expected = workers if type(workers) is int else named[workers]
    assert len(parallel.pool.workers) == expected
    assert same(trajectory(serial), trajectory(parallel))
    for env in (serial, parallel):
        env.reseed([6, 7, 9])
    assert same(trajectory(serial), trajectory(parallel))
    processes = [worker.process for worker in parallel.pool.workers]
    parallel.close()
    assert not any(process.is_alive() for process in processes)
    assert torch.get_num_threads() == threads


def own_environment(seed):
    """TorchRL's own wrapper and a transform that nobody here knows."""
    return make_custom(
        lambda: TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=False), RewardSum()), seed=seed
    )


def test_an_environment_of_somebody_elses_is_stepped_as_it_is():
    vector = make_vector_env(own_environment, [3, 4], parallel=True)
    alone = SerialEnv(2, own_environment, create_env_kwargs=[{"seed": 3}, {"seed": 4}])
    one, other = trajectory(vector, 60), trajectory(alone, 60)
    vector.close()
    assert one["next", "done"].any() and same(one, other)
    assert one["next", "episode_reward"].max() > 5


def limited(seed):
    """One of ours with a transform on top, which must not be passed over."""
    return TransformedEnv(FACTORIES["gym state"](seed=seed), StepCounter(max_steps=3))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_transform_on_top_of_an_environment_of_ours_is_stepped_too(parallel):
    vector = make_vector_env(limited, [3, 4], parallel=parallel)
    alone = SerialEnv(2, limited, create_env_kwargs=[{"seed": 3}, {"seed": 4}])
    one, other = trajectory(vector, 9), trajectory(alone, 9)
    vector.close()
    assert same(one, other) and one["next", "truncated"].squeeze(-1).sum(1).tolist() == [3, 3]


def test_some_can_be_reset_while_others_go_on():
    env = make_vector_env(FACTORIES["gym state"], [1, 2, 3], parallel=False)
    root = env.rollout(4)[:, -1]["next"].exclude("reward")
    root["_reset"] = torch.tensor([[False], [True], [False]])
    before = root["observation"].clone()
    after = env.reset(root)
    moved = (after["observation"] != before).any(-1)
    assert moved.tolist() == [False, True, False] and after["is_init"].flatten().tolist() == [False, True, False]
    assert after["observation"][1].abs().max() < 0.05  # where CartPole begins
    stepped = env.step(after.set("action", env.rand_action()["action"]))
    assert not stepped["next", "is_init"].any()


def test_an_episode_that_ended_begins_once():
    """The next episode begins with the step that ended the last one; resetting it then must not skip it."""
    firsts, factory = [], FACTORIES["gym state"]
    for env in (make_vector_env(factory, [1, 1], parallel=False), SerialEnv(2, functools.partial(factory, seed=1))):
        root = env.reset()
        while not root["done"].all():
            root = env.step(root.set("action", torch.tensor([[1, 0], [1, 0]])))["next"].exclude("reward")
        firsts.append([env.reset()["observation"] for _ in range(3)])
    assert all(torch.equal(one, other) for one, other in zip(*firsts, strict=True))
    assert not torch.equal(firsts[0][0], firsts[0][1])


def test_transforms_and_torchrls_collector_go_on_top():
    env = TransformedEnv(make_vector_env(FACTORIES["gym state"], [1, 2], parallel=False), RewardSum())
    check_env_specs(env)
    collector = Collector(env, RandomPolicy(env.full_action_spec), frames_per_batch=80, total_frames=80)
    (batch,) = collector
    collector.shutdown()
    ends = batch["next", "done"].squeeze(-1)
    assert ends.any()
    assert (batch["next", "episode_reward"].squeeze(-1)[ends] > 5).all()
    assert torch.equal(batch["is_init"][:, 1:], batch["next", "done"][:, :-1])


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("raise", "the toy broke"),
        ("hang", r"did not answer within 2 seconds.*in step"),
        ("kill", "killed by SIGKILL"),
        ("nan", "observation 'body_angles' is not finite at step 3"),
    ],
)
def test_a_worker_that_fails_is_named_with_its_seed_and_traceback(trouble, said):
    task = f"toys:Toy-{trouble}-v0"
    env = make_vector_env(functools.partial(make_gym, task), [40, 42], parallel=True, timeout=2)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=f"(?s)environment [01] .*{task}.*seed 4[02].*{said}"):
        env.rollout(5)
    assert time.monotonic() - started < 6
    env.close()


def test_a_worker_that_hangs_in_the_renderer_is_answered_with_the_driver_and_the_way_out(tmp_path):
    env = make_vector_env(functools.partial(make_gym, "toys:Toy-freeze-v0"), [40], parallel=True, timeout=2)
    with pytest.raises(WorkerError, match="did not answer") as caught:
        env.rollout(5)
    env.close()
    assert "MUJOCO_GL" in caught.value.__notes__[0] and "env.num_envs" in caught.value.__notes__[0]
    env = make_vector_env(functools.partial(make_gym, "toys:Toy-broken-v0"), [40], parallel=True)
    with pytest.raises(WorkerError, match="in render\n") as caught:
        env.rollout(5)
    env.close()
    assert not hasattr(caught.value, "__notes__")  # it failed in rendering, but did not hang
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14\nGCC version:\n")
    assert "550.54.14." in hanging_gl(version) and "GCC" not in hanging_gl(version)


def test_one_failing_worker_among_healthy_ones_is_the_one_named():
    env = make_vector_env(FACTORIES["gym state"], [4, 5, 6], parallel=3)
    env.reset()
    os.kill(env.pool.workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="environment 1 .*CartPole-v1.*seed 5.*SIGKILL"):
        env.rollout(2)
    env = make_vector_env(FACTORIES["gym state"], [4, 5, 6], parallel=3)
    os.kill(env.pool.workers[2].process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="environment 2 .*seed 6"):
        env.reseed([1, 2, 3])


def builds_only_here(task, parent, trouble, seed):
    """A factory that works in the process that made it and fails in every worker."""
    if os.getpid() != parent:
        if trouble == "hang":
            time.sleep(60)
        raise RuntimeError("no simulator here")
    return make_gym(task, seed=seed)


@pytest.mark.parametrize(("trouble", "said"), [("raise", "no simulator here"), ("hang", "in builds_only_here")])
def test_a_worker_that_cannot_be_built_is_named_too(trouble, said):
    factory = functools.partial(builds_only_here, "CartPole-v1", os.getpid(), trouble)
    with pytest.raises(WorkerError, match=f"(?s)environment 0 .*CartPole-v1.*seed 12.*{said}"):
        make_vector_env(factory, [12], parallel=True, timeout=3)


def test_an_exception_without_workers_carries_task_and_seed():
    env = make_vector_env(functools.partial(make_gym, "Toy-raise-v0"), [40, 42], parallel=False)
    with pytest.raises(ArithmeticError) as caught:
        env.rollout(5)
    assert "Toy-raise-v0" in caught.value.__notes__[0] and "seed 40" in caught.value.__notes__[0]


def test_how_many_workers_a_setting_makes():
    assert [count_workers(parallel, 5) for parallel in (False, True, 2, 99)] == [0, 5, 2, 5]
    assert count_workers("auto", 1) == 0 and count_workers("auto", 99) == len(os.sched_getaffinity(0))
    for wrong in ("yes", 0, -1, 1.5, None):
        with pytest.raises(ValueError, match="true, false, auto or a number of workers"):
            count_workers(wrong, 3)


KILLED = """
import functools, os
from faulty import Faulty
from r2dreamer.envs import make_custom, make_vector_env

def factory(seed):
    return make_custom(functools.partial(Faulty, "hang_in_c", at=2), seed=seed)

if __name__ == "__main__":
    env = make_vector_env(factory, [1, 2], parallel=True)
    print(*env.pool.pids(), flush=True)
    env.rollout(5)
"""


def is_running(pid):
    path = Path(f"/proc/{pid}/stat")
    try:
        return path.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_in_a_hanging_step_end_with_their_trainer_and_leave_no_file(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    here = tmp_path / "here"
    here.mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(here)}
    command = [sys.executable, str(tmp_path / "killed.py")]
    trainer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    pids = trainer.stdout.readline().split()
    time.sleep(0.5)  # into the step that hangs
    assert all(is_running(pid) for pid in pids)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)
    assert not list(here.rglob("*r2dreamer*"))


TERMINATED = """
import functools, os, signal, time
from multiprocessing import forkserver
from faulty import Faulty
from r2dreamer.envs import make_custom, make_vector_env

def factory(seed):
    return make_custom(Faulty, seed=seed)

if __name__ == "__main__":
    env = make_vector_env(factory, [1, 2], parallel=True)
    for pid in [*env.pool.pids(), forkserver._forkserver._forkserver_pid]:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.5)
    print(*env.rollout(5).shape, flush=True)
"""


def test_a_sigterm_to_all_processes_is_for_the_trainer_and_leaves_the_workers(tmp_path):
    """So Slurm and systemd send it. The script does not close its environments: its end is theirs."""
    (tmp_path / "terminated.py").write_text(TERMINATED)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tmp_path / "terminated.py")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["2", "5"] and done.returncode == 0, done.stderr


def test_too_little_memory_to_share_is_said_and_no_worker_is_left(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No memory for the .* bytes that environments and trainer share"):
        make_vector_env(FACTORIES["gym state"], [1], parallel=True)
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def made_to_end(trouble, seed):
    return make_custom(functools.partial(Faulty, trouble, at=2), seed=seed, task="mine")


@pytest.mark.parametrize(("trouble", "said"), [("eof", "the simulator's file ended"), ("leave", "SystemExit: 3")])
def test_an_environment_that_ends_like_a_pipe_or_a_program_is_named_with_its_traceback(trouble, said):
    env = make_vector_env(functools.partial(made_to_end, trouble), [40], parallel=True)
    with pytest.raises(WorkerError, match=f"(?s)environment 0 .*seed 40.*{said}"):
        env.rollout(5)
    env.close()

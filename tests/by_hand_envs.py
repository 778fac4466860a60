"""Measures pieces of envs/ beside what TorchRL or dm_control offer: `python tests/by_hand_envs.py NAME`, or all of them.

Ratios are medians of alternating rounds, of the processor's time where one process does all the work. The numbers stand in
examples/results/by_hand.md.
"""

import importlib
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from r2dreamer.envs.base import gl  # isort: skip

gl.choose_gl()

# ruff: noqa: E402
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import Compose, DMControlEnv, DMControlWrapper, GymEnv, InitTracker, ParallelEnv, TransformedEnv
from torchrl.modules import RandomPolicy

from r2dreamer.envs import RenderPixels, make_dmc, make_gym, make_replay, make_vector_env


def ratio(ours, theirs, rounds=5, clock=time.process_time):
    """How many times as long theirs takes; each is called once before."""
    ours(), theirs()
    found = []
    for _ in range(rounds):
        spent = []
        for call in (ours, theirs):
            start = clock()
            call()
            spent.append(clock() - start)
        found.append(spent[1] / spent[0])
    return f"{statistics.median(found):.2f}x (rounds {min(found):.2f} to {max(found):.2f})"


def stepping(env, steps):
    root = env.reset()

    def run():
        nonlocal root
        for _ in range(steps):
            _, root = env.step_and_maybe_reset(env.rand_action(root))

    return run


def workers():
    for name, factory in (
        ("CartPole-v1", partial(make_gym, "CartPole-v1")),
        ("cartpole_swingup from vectors", partial(make_dmc, "cartpole_swingup", from_pixels=False)),
        ("cartpole_swingup from images", partial(make_dmc, "cartpole_swingup", from_pixels=True)),
    ):
        seeds = [0, 2, 4, 6]
        ours = make_vector_env(factory, seeds, parallel=True)
        theirs = ParallelEnv(4, [partial(factory, seed=seed) for seed in seeds], mp_start_method="spawn")
        found = ratio(stepping(ours, 100), stepping(theirs, 100), clock=time.perf_counter)
        print(f"workers: ParallelEnv's step of 4 x {name}: {found} ours")
        ours.close()
        theirs.close()


def simulator():
    env = make_gym("CartPole-v1", seed=0)
    theirs = TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=False), InitTracker())
    pool, action = make_vector_env(partial(make_gym, "CartPole-v1"), [0], parallel=False), torch.tensor([[1, 0]])
    print(f"simulator: GymEnv's step of CartPole-v1: {ratio(stepping(env, 300), stepping(theirs, 300))} ours alone")

    def arrays():
        for _ in range(300):
            pool.step_arrays(action)

    pool.reset()
    print(f"simulator: GymEnv's step of CartPole-v1: {ratio(arrays, stepping(theirs, 300))} ours in a VectorEnv")


def rendering():
    from dm_control import suite

    size = {"width": 64, "height": 64, "camera_id": 0}
    for repeat in (1, 2, 4):
        task = ("cartpole", "swingup")
        loaded, images = suite.load(*task), {"from_pixels": True, "pixels_only": True}
        theirs = DMControlWrapper(loaded, frame_skip=repeat, render_kwargs=size, **images)
        ours = TransformedEnv(DMControlEnv(*task, frame_skip=repeat), Compose(RenderPixels(64)))
        print(
            f"rendering: a step of from_pixels, frame_skip={repeat}: {ratio(stepping(ours, 50), stepping(theirs, 50))}"
        )


def xml():
    from dm_control import suite
    from dm_control.mujoco.wrapper.core import MjModel

    from r2dreamer.envs.control.recompile import distance

    found, wrong, raised = 0, [], []
    for domain, task in suite.ALL_TASKS:
        model = suite.load(domain, task, task_kwargs={"random": 0}).physics.model.ptr
        try:
            source = importlib.import_module(f"dm_control.suite.{domain}").get_model_and_assets()
        except Exception as error:
            raised.append(f"{domain}_{task} ({type(error).__name__})")
            continue
        other = MjModel.from_xml_string(*source).ptr
        if distance(model, other) == float("inf"):
            wrong.append(f"{domain}_{task}")
        else:
            found += 1
    print(f"xml: get_model_and_assets() gives the model of {found} of {len(suite.ALL_TASKS)} tasks")
    print(f"xml: another model for {', '.join(wrong)}; nothing without arguments for {', '.join(raised)}")


def records(count, streams, bytes_each):
    return TensorDict(
        {
            "stream": torch.arange(streams).repeat_interleave(count // streams),
            "action": torch.zeros(count, 2),
            "is_init": torch.zeros(count, 1, dtype=torch.bool),
            "next": {
                "pixels": torch.zeros(count, bytes_each, dtype=torch.uint8),
                "done": torch.zeros(count, 1, dtype=torch.bool),
                "state": torch.zeros(count, 64),
                "belief": torch.zeros(count, 64),
            },
        },
        [count],
    )


def sampling():
    for size in (10_000, 100_000):
        data, new = records(size, 16, 64), records(16, 16, 64)
        ours = make_replay(size, 16, 16, 64)
        sampler = SliceSampler(slice_len=65, traj_key="stream")
        theirs = TensorDictReplayBuffer(storage=LazyTensorStorage(size), sampler=sampler, batch_size=16 * 65)
        ours.extend(data)
        theirs.extend(data)

        def use(replay, new=new):
            for _ in range(10):
                replay.extend(new)
                replay.sample()

        print(
            f"sampling: a step's records and 16 x 64 from {size}: {ratio(partial(use, ours), partial(use, theirs), 3)}"
        )


def saving():
    from r2dreamer.examples.training.journal import Journal

    size, new = 20_000, records(512, 16, 64 * 64 * 3)
    with tempfile.TemporaryDirectory() as folder:
        replay = make_replay(size, 16, 16, 64, storage="memmap", directory=f"{folder}/replay")
        for _ in range(size // 512):
            replay.extend(new)
        Path(folder, "journal").mkdir()
        journal = Journal(Path(folder, "journal"))
        written = lambda: sum(file.stat().st_size for file in Path(folder, "journal").rglob("*") if file.is_file())

        def ours():
            replay.extend(new)
            journal.commit(replay, journal.append(replay))

        def theirs():
            replay.extend(new)
            replay._storage.dumps(f"{folder}/dump")

        ours()
        before = written()
        ours()
        dumped = lambda: sum(file.stat().st_size for file in Path(folder, "dump").rglob("*") if file.is_file())
        found = ratio(ours, theirs, 3, clock=time.perf_counter)
        print(f"saving: TensorStorageCheckpointer's save after 512 new of {size} records: {found} ours")
        print(
            f"saving: bytes a save writes: ours {written() - before >> 20} MiB in several, theirs {dumped() >> 20} MiB in each"
        )


def starting():
    env = make_gym("CartPole-v1", seed=0)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000), batch_size=8)
    collector = Collector(
        env, RandomPolicy(env.full_action_spec), frames_per_batch=16, total_frames=-1, replay_buffer=replay
    )
    collector.start()
    while not len(replay):
        time.sleep(0.01)
    before, updates = len(replay), 5
    time.sleep(0.2 * updates)  # five updates of 0.2 s
    print(
        f"starting: Collector.start() collects {len(replay) - before} frames during 5 updates; a train ratio asks for 16"
    )
    collector.shutdown()


ALL = {
    "workers": workers,
    "simulator": simulator,
    "rendering": rendering,
    "xml": xml,
    "sampling": sampling,
    "saving": saving,
    "starting": starting,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ALL:
        ALL[name]()

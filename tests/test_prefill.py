"""Episodes from elsewhere become records as collected ones do: of another run, of TorchRL's recordings, of Minari."""

import json
import shutil
import zlib
from types import SimpleNamespace

import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import gymnasium
import numpy as np
import torch
from agents import tiny_agent
from counting import CountingStreams, check_records
from launcher import CARTPOLE, PENDULUM, config, lines, train_here
from tensordict import TensorDict
from torchrl.collectors.utils import split_trajectories
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

from r2dreamer.envs import RecordBuilder, make_replay, prefill, recorded_episodes
from r2dreamer.envs.replay.recorded import recorded_task
from r2dreamer.examples.training.manifest import read_manifest, write_manifest
from r2dreamer.examples.training.prefill import prefill_replay, run_episodes, same_task
from r2dreamer.examples.training.shards import NoMetrics
from r2dreamer.losses import R2DreamerWorldModelLoss, total_loss

STREAMS, LENGTH = 3, 6
UNIT = 2.0**-14  # actions of the counting streams in units that keep them in [-1, 1], and exact
KEYS = ["count", "pixels"]


def collected(batches=12, steps=8, seed=0):
    """[N, T] transitions with the number of every trajectory."""
    streams = CountingStreams(STREAMS, 7, seed)
    data = torch.cat([streams.collect(steps).clone() for _ in range(batches)], 1).exclude("state", "belief")
    data["action"] = data["action"] * UNIT
    data["collector", "traj_ids"] = data["count"][..., 1] + 1000 * data["count"][..., 0]
    return data


def example():
    flags = {key: torch.zeros(1, dtype=torch.bool) for key in ("done", "terminated", "truncated")}
    seen = {"count": torch.zeros(4, dtype=torch.int64), "pixels": torch.zeros(1, 2, 2, dtype=torch.uint8)}
    latents = {"state": torch.zeros(2), "belief": torch.zeros(3)}
    nxt = {**seen, **latents, **flags, "reward": torch.zeros(1)}
    return TensorDict({"action": torch.zeros(2), "is_init": torch.zeros(1, dtype=torch.bool), "next": nxt}, [])


def rows(data, folder):
    data.exclude("collector").memmap(folder)


def turns(data, folder):
    """The environments' steps one after the other, as a flat storage takes them; numbers tell them apart."""
    data.transpose(0, 1).reshape(-1).memmap(folder)


def chunks(data, folder):
    torch.cat([part.reshape(-1) for part in data.split(5, 1)]).memmap(folder)


def storage(data, folder):
    made = LazyMemmapStorage(10_000)
    made.set(range(data.numel()), data.transpose(0, 1).reshape(-1))
    folder.mkdir()
    made.dumps(folder)


def padded(data, folder):
    """A row for each trajectory, as long as the longest, with zeros after its end."""
    split_trajectories(data, trajectory_key=("collector", "traj_ids")).memmap(folder)


def padded_alone(data, folder):
    split = split_trajectories(data, trajectory_key=("collector", "traj_ids"))
    split["mask"] = split["collector", "mask"]
    split.exclude("collector").memmap(folder)


def batches(data, folder):
    """Rows, in a buffer that has place for more."""
    filled(data.exclude("collector"), folder, 10)


def grid(data, folder):
    """Time first and environments second, with place for more steps."""
    filled(data.exclude("collector"), folder, 10_000, ndim=2)


def filled(data, folder, size, ndim=1, steps=None):
    made = TensorDictReplayBuffer(storage=LazyMemmapStorage(size, ndim=ndim), batch_size=1)
    for part in data.split(steps or data.shape[-1], -1):
        made.extend(part)
    made.dumps(folder)


def buffer(data, folder):
    """Written round: the oldest steps are gone, with an episode's beginning, and the cursor stands in the middle."""
    steps = data[0].exclude("collector")
    steps = steps[: 1 + int((~steps["next", "done"][:, 0]).nonzero()[-1])]  # stopped within an episode
    size = next(size for size in range(100, 120) if not steps["is_init"][-size])
    made = TensorDictReplayBuffer(storage=LazyMemmapStorage(size), batch_size=1)
    for part in steps.split(8):
        made.extend(part)
    made.dumps(folder)


def in_order(replay):
    """All records, one stream after the other."""
    rings = replay.rings
    slots = [rings.slots(torch.tensor(s), torch.arange(int(n))) for s, n in enumerate(rings.written)]
    return replay.read_slots(torch.cat(slots))


@pytest.mark.parametrize("record", [rows, turns, chunks, storage, padded, padded_alone, batches, grid, buffer])
def test_no_window_crosses_a_seam_and_all_in_it_belongs_together(record, tmp_path):
    torch.manual_seed(0)
    data = collected(batches=20) if record is buffer else collected()
    record(data, tmp_path / "recorded")
    replay = make_replay(600, 2, 5, LENGTH)
    found = prefill(replay, recorded_episodes(tmp_path / "recorded", KEYS), example(), discrete=False, where="it")
    assert found.left_out == (1 if record is buffer else 0)
    assert found.records == len(replay) and abs(int(replay.stream_lengths.diff())) <= 8
    if record is not buffer:
        written = set(map(tuple, in_order(replay)["next", "count"].tolist()))
        assert written >= set(map(tuple, data["count"].reshape(-1, 4).tolist())) and len(written) == len(replay)
        assert found.episodes == len(data["collector", "traj_ids"].unique())
        assert found.records == data.numel() + found.episodes  # with the last observation of each
        ended, keys = data["next"][data["next", "done"][..., 0]], ("count", "terminated", "truncated")
        flags = lambda part: {str(row) for row in zip(*(part[key].tolist() for key in keys), strict=True)}
        assert flags(ended) <= flags(in_order(replay)["next"])
    for _ in range(200):
        batch = replay.sample()
        batch["action"] = batch["action"] / UNIT
        check_records(batch)
        count, first = batch["next", "count"], batch["is_init"][..., 0]
        follows = (count[:, 1:] - count[:, :-1] == torch.tensor([0, 0, 1, 1])).all(-1)
        assert torch.equal(follows, ~first[:, 1:])  # the next of its episode, or the first of another
        assert torch.equal(batch["next", "done"][:, :-1, 0], first[:, 1:])


@pytest.mark.parametrize("times", ["once", "round"])
@pytest.mark.parametrize("kind", ["one", "turns", "chunks", "grid"])
def test_a_full_ring_without_is_init_has_overwritten_what_came_before_its_oldest_steps(kind, times, tmp_path):
    data = collected(batches=20 if times == "round" else 5).exclude("is_init")
    stream, _, step, now = data["count"].unbind(-1)
    data["collector", "traj_ids"] = (
        now - step
    ) * STREAMS + stream  # in the order of their beginnings, as collectors count
    if kind == "one":
        flat = data[0].exclude("collector")
    elif kind == "turns":
        flat = data.transpose(0, 1).reshape(-1)
    else:
        flat = torch.cat([part.reshape(-1) for part in data.split(5, 1)])
    if kind == "grid":
        filled(data.exclude("collector"), tmp_path / "it", 40 * STREAMS, ndim=2, steps=8)
    else:
        filled(flat, tmp_path / "it", 40 if kind == "one" else 40 * STREAMS, steps=8)
    episodes = list(recorded_episodes(tmp_path / "it", KEYS))
    assert sum(map(len, episodes)) == 40 * (1 if kind == "one" else STREAMS)
    begins = [bool(each["is_init"][0]) for each in episodes]
    assert all(int(each["count"][0, 2]) == 0 for each, whole in zip(episodes, begins, strict=True) if whole)
    assert all(begins) == (times == "once") and begins.count(False) <= 2 * STREAMS
    assert begins.count(True) > STREAMS


def test_a_storage_that_does_not_tell_its_order_is_refused(tmp_path):
    data = collected(batches=5).exclude("collector", "is_init")
    for name, part, size, ndim in (("full", data[0], 40, 1), ("rows", data.transpose(0, 1)[:12], 120, 2)):
        made = LazyMemmapStorage(size, ndim=ndim)
        made.set(range(len(part)), part)
        (tmp_path / name).mkdir()
        made.dumps(tmp_path / name)
    for name, says in {"full": "does not say where its oldest step is", "rows": "36 rows or steps"}.items():
        with pytest.raises(ValueError, match=says):
            list(recorded_episodes(tmp_path / name, KEYS))


def test_a_recording_without_flags_of_its_own_ends_where_it_was_stopped(tmp_path):
    data = collected()[:1, :20].exclude("is_init", ("next", "terminated"), ("next", "truncated"))
    data["next", "done"][:] = False
    data = data[:, : int(data["count"][0, :, 1].eq(0).sum())]  # its first episode
    rows(data, tmp_path / "recorded")
    (episode,) = recorded_episodes(tmp_path / "recorded", KEYS)
    flags = [episode["next", key].flatten().tolist() for key in ("done", "truncated", "terminated")]
    assert flags == [[False] * (len(episode) - 1) + [True]] * 2 + [[False] * len(episode)]
    assert episode["is_init"].flatten().tolist() == [True] + [False] * (len(episode) - 1)


def test_prefilled_data_give_the_loss_of_the_same_data_collected(tmp_path):
    agent, generator = tiny_agent(), torch.Generator().manual_seed(0)
    episodes, steps = 5, 12
    seen = {
        "pixels": torch.randint(0, 256, (episodes, steps + 1, 3, 16, 16), dtype=torch.uint8, generator=generator),
        "speed": torch.randn(episodes, steps + 1, 6, generator=generator),
    }
    number = torch.arange(steps)[:, None].expand(episodes, steps, 1)
    done = number == steps - 1
    nxt = {key: value[:, 1:] for key, value in seen.items()} | {
        "done": done,
        "terminated": done,
        "truncated": ~done & done,
    }
    nxt["reward"] = torch.randn(episodes, steps, 1, generator=generator)
    root = {key: value[:, :-1] for key, value in seen.items()} | {"is_init": number == 0}
    root["action"] = torch.rand(episodes, steps, 2, generator=generator) * 2 - 1
    data = TensorDict({**root, "next": nxt}, [episodes, steps]).reshape(-1)
    data.memmap(tmp_path / "recorded")
    replays = [make_replay(200, 1, 3, 5) for _ in range(2)]
    replays[0].extend(RecordBuilder(1, ["pixels", "speed"], latent_sizes=agent.latent_sizes)(data))
    recorded = recorded_episodes(tmp_path / "recorded", ["pixels", "speed"])
    prefill(replays[1], recorded, agent.example_record(), discrete=False, where="it")
    losses = []
    for replay in replays:
        torch.manual_seed(1)
        batch = replay.sample(16)
        losses.append(total_loss(R2DreamerWorldModelLoss(agent.world_model)(batch)[0]))
    assert torch.equal(*losses) and losses[0] > 0


def spoilt(change):
    data = collected()[0].exclude("collector")
    change(data)
    return data


SPOILT = {
    "no reward": (lambda data: data["next"].pop("reward"), r"lacks \('next', 'reward'\)"),
    "no observation": (lambda data: data.pop("pixels"), "lacks 'pixels'"),
    "another shape": (
        lambda data: data.set("action", torch.zeros(len(data), 3)),
        r"shape \[3\] and torch.float32.* needs \[2\]",
    ),
    "another dtype": (lambda data: both(data, "pixels", torch.Tensor.float), r"and torch.float32, .* torch.uint8"),
    "another range": (lambda data: data.set("action", data["action"] / UNIT), r"actions between .* in \[-1, 1\]"),
    "not a number": (lambda data: data["next", "reward"].fill_(float("nan")), "NaN or infinity in .*reward"),
    "a gap": (lambda data: data["count"][3:].add_(100), "does not begin with the 'count'"),
    "no beginning": (lambda data: data["is_init"].zero_(), r"no episode from its beginning on \(\d+ without\)"),
}


def both(data, key, change):
    data[key], data["next", key] = change(data[key]), change(data["next", key])


@pytest.mark.parametrize("what", SPOILT)
def test_what_differs_from_this_run_is_refused(what, tmp_path):
    change, says = SPOILT[what]
    spoilt(change).memmap(tmp_path / "recorded")
    with pytest.raises(ValueError, match=says) as refused:
        episodes = recorded_episodes(tmp_path / "recorded", KEYS)
        prefill(make_replay(600, 2, 5, LENGTH), episodes, example(), discrete=False, where="it")
    assert len(str(refused.value)) < 480


@pytest.mark.parametrize("choice, fits", [([0.0, 1.0], True), ([0.5, 0.5], False), ([1.0, 1.0], False)])
def test_choices_are_one_hot(choice, fits):
    episode = example().unsqueeze(0).repeat(4).exclude(("next", "state"), ("next", "belief"))
    episode["is_init"][0], episode["action"][1:] = True, torch.tensor(choice)
    fill = lambda: prefill(make_replay(60, 1, 2, 2), [episode], example(), discrete=True, where="it")
    if fits:
        assert fill().records == 4
    else:
        with pytest.raises(ValueError, match="not one choice each"):
            fill()


def test_a_damaged_or_hostile_recording_is_refused(tmp_path):
    collected()[0].exclude("collector").memmap(tmp_path / "short")
    file = tmp_path / "short" / "action.memmap"
    file.write_bytes(file.read_bytes()[:-4])
    collected()[0].memmap(tmp_path / "typed")
    meta = json.loads((tmp_path / "typed" / "meta.json").read_text())
    (tmp_path / "typed" / "meta.json").write_text(json.dumps(meta | {"_type": "<class 'os.system'>"}))
    for name, says in {"short": "action.memmap has", "typed": "its type is <class 'os.system'>"}.items():
        with pytest.raises(ValueError, match=says):
            list(recorded_episodes(tmp_path / name, KEYS))
    assert recorded_episodes(tmp_path, KEYS) is None


def outside(folder, name):
    """A file in the recording is a link to one outside of it."""
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def renamed(folder, name):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {name: meta["action"]}))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda folder: renamed(folder, ".."), r"'\.\.' is no name of a file"),
        (lambda folder: renamed(folder, "."), r"'\.' is no name of a file"),
        (lambda folder: renamed(folder, "../action"), "no name of a file"),
        (lambda folder: outside(folder, "action.memmap"), "action.memmap is a link to .*elsewhere, outside"),
        (lambda folder: outside(folder, "next"), "meta.json is a link to .*elsewhere/meta.json, outside"),
    ],
)
def test_nothing_outside_of_a_recording_is_read(change, says, tmp_path):
    collected()[0].memmap(tmp_path / "it")
    (tmp_path / "by_link").symlink_to(tmp_path / "it")  # the user's own link to the whole is followed
    assert list(recorded_episodes(tmp_path / "by_link", KEYS))
    change(tmp_path / "it")
    with pytest.raises(ValueError, match=says):
        list(recorded_episodes(tmp_path / "it", KEYS))


# Runs


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with one environment, so that its records have one order."""
    folder = tmp_path_factory.mktemp("source")
    trainer = train_here(folder, *CARTPOLE, "total_frames=100", "eval.every=1000", "env.num_envs=1")
    return folder, trainer


def begun(folder, *overrides):
    return train_here(folder, *CARTPOLE, "eval.every=1000", "env.num_envs=1", *overrides)


def test_a_run_begins_with_the_records_of_another_and_resumes_without_doing_it_twice(source, tmp_path):
    folder, before = source
    asked = [f"replay.prefill={folder}", "total_frames=40"]
    trainer = begun(tmp_path, *asked)
    prefilled = trainer.count["prefilled"]
    given = before.replay.stored
    assert prefilled == len(given)
    for key, value in given.items(True, True):
        if key not in (("next", "state"), ("next", "belief"), ("next", "done"), ("next", "truncated")):
            assert torch.equal(value, trainer.replay.stored[key][:prefilled]), key
    assert trainer.replay.stored["next", "done"][prefilled - 1]
    assert trainer.frames == 40 and trainer.count["policy_steps"] == 40
    assert trainer.count["updates"] == 1 + (40 - 20) * 5 // 15  # nothing is owed for what was prefilled
    (line,) = lines(tmp_path, '"prefill/records"')
    assert line["prefill/records"] == prefilled and line["step"] == 0
    own = len(trainer.replay) - prefilled
    resumed = begun(tmp_path, asked[0], "total_frames=80")
    assert len(lines(tmp_path, '"prefill/records"')) == 1
    assert len(resumed.replay) - prefilled >= own + 40 and resumed.count["prefilled"] == prefilled
    again = begun(tmp_path / "elsewhere", asked[0], f"resume={tmp_path}", "total_frames=120")
    assert again.count["prefilled"] == prefilled and again.frames == 120


def test_a_replay_that_was_not_saved_is_prefilled_again(source, tmp_path):
    asked = [f"replay.prefill={source[0]}", "checkpoint.replay=false"]
    first = begun(tmp_path, *asked, "total_frames=40")
    second = begun(tmp_path, *asked, "total_frames=80")
    assert second.count["prefilled"] == first.count["prefilled"] > 0
    assert len(second.replay) > second.count["prefilled"]


def test_updates_are_owed_for_prefilled_records_where_that_is_asked_for(source, tmp_path):
    trainer = begun(tmp_path, f"replay.prefill={source[0]}", "replay.prefill_counts=true", "total_frames=40")
    assert trainer.count["updates"] == (trainer.count["prefilled"] + 40 - 20) * 5 // 15


def test_runs_of_another_task_and_folders_of_nothing_are_refused(source, tmp_path):
    (tmp_path / "empty").mkdir()
    refused = {
        f"replay.prefill={tmp_path}/nowhere": "nowhere is no folder",
        f"replay.prefill={tmp_path}/empty": "holds neither a recording of TorchRL or Minari nor a run",
    }
    for number, (asked, says) in enumerate(refused.items()):
        with pytest.raises(ValueError, match=says):
            begun(tmp_path / str(number), asked)
    with pytest.raises(
        ValueError, match="was collected with env.task=CartPole-v1, and this run has env.task=Pendulum-v1"
    ):
        train_here(tmp_path / "other", *PENDULUM, f"replay.prefill={source[0]}")
    begun(tmp_path / "own", "total_frames=40")
    with pytest.raises(ValueError, match="goes on with its own"):
        begun(tmp_path / "own", "total_frames=80", f"replay.prefill={source[0]}")


def of_two_ranks(source, run):
    """The directory of a run as two ranks leave it, made of one process's run; and the names of their checkpoints."""
    names = []
    for log in (run, run / "ranks" / "1"):
        shutil.copytree(source / "checkpoints", log / "checkpoints")
        path = max((log / "checkpoints").glob("step_*"))
        state, manifest = torch.load(path / "state.pt", weights_only=True), read_manifest(path)
        torch.save({**{key: state[key] for key in ("count", "config")}, "ranks": 2}, path / "state.pt")
        data = (path / "state.pt").read_bytes()
        manifest["files"]["state.pt"] = {"size": len(data), "crc32": zlib.crc32(data)}
        with (path / "manifest.json").open("wb") as file:
            write_manifest(file, manifest)
        names.append(path)
    return names


def test_each_way_to_name_a_run_of_two_ranks_gives_the_records_of_both(source, tmp_path):
    checkpoint, other = of_two_ranks(source[0], tmp_path / "run")
    count, cfg = len(source[1].replay), config(*CARTPOLE, "env.num_envs=1")
    read = lambda path, name: sum(map(len, run_episodes(path, cfg, tmp_path / name, "it")))
    for number, path in enumerate((tmp_path / "run", checkpoint.parent, checkpoint)):
        assert read(path, f"scratch{number}") == 2 * count, path
    shutil.rmtree(other)
    for number, path in enumerate((tmp_path / "run", checkpoint)):
        with pytest.raises(ValueError, match="2 ranks saved .* rank 1 has no whole checkpoint of that step"):
            read(path, f"without{number}")


class SecondOfTwo:
    """What `Ranks` gives the second of two ranks, where the first finds what `others` says."""

    rank, count, first, others = 1, 2, False, (9, 1, 0)
    any = staticmethod(bool)

    def gather(self, value):
        return [self.others, value]


def test_a_rank_without_a_share_goes_on_and_none_at_all_is_refused(tmp_path):
    spoilt(lambda data: None)[:3].memmap(tmp_path / "recorded")  # one episode for two ranks
    agent = SimpleNamespace(
        observations=SimpleNamespace(images=["pixels"], vectors=["count"]),
        actions=SimpleNamespace(discrete=False),
        example_record=example,
    )
    cfg = config(*PENDULUM, f"replay.prefill={tmp_path / 'recorded'}")
    trainer = SimpleNamespace(cfg=cfg, ranks=SecondOfTwo(), replay=make_replay(600, 2, 5, LENGTH), count={})
    trainer.agent, trainer.logdir, trainer.frames, trainer.metrics = agent, tmp_path, 0, NoMetrics()
    prefill_replay(trainer)
    assert trainer.count["prefilled"] == 9 and not len(trainer.replay)
    trainer.ranks.others = (0, 0, 1)
    with pytest.raises(ValueError, match=r"no episode from its beginning on \(1 without\)"):
        prefill_replay(trainer)


# Minari


@pytest.mark.parametrize(
    "recorded, wanted, same",
    [
        ("CartPole-v1", "CartPole-v1", True),
        ("CartPole-v1", "CartPole", True),
        ("CartPole-v0", "CartPole", False),
        ("CartPole-v0", "CartPole-v1", False),
        ("Far/Away-v3", "no_such_module:Far/Away-v3", True),
        ("Far/Away-v3", "no_such_module:Far/Away", True),
        ("Far/Away-v3", "no_such_module:Far/Home-v3", False),
        ("Far/Away-v3", "no_such_module:Away-v3", False),
    ],
)
def test_a_recorded_task_is_that_which_the_wanted_name_makes(recorded, wanted, same):
    assert same_task(recorded, wanted) == same


def minari_data(folder, task, episodes=4, **options):
    """A data set as Minari writes it, whose own collector would need jax; and its episodes."""
    storages = pytest.importorskip("minari.dataset.minari_storage", reason="the extra minari is not installed")
    from minari.data_collector import EpisodeBuffer

    env, found = gymnasium.make(task, **options), []
    folder.mkdir(parents=True)
    made = storages.MinariStorage.new(folder, env.observation_space, env.action_space, env.spec)
    env.action_space.seed(0)
    for seed in range(episodes):
        observations, steps = [env.reset(seed=seed)[0]], []
        while not steps or not any(steps[-1][2:]):
            action = env.action_space.sample()
            observation, *rest, _ = env.step(action)
            observations.append(observation)
            steps.append((action, *rest))
        action, reward, terminated, truncated = (list(each) for each in zip(*steps, strict=True))
        found.append(EpisodeBuffer(None, seed, None, observations, action, reward, terminated, truncated, {}))
    made.update_episodes(found)
    return found


def test_a_data_set_of_minari_becomes_records(tmp_path):
    folder = tmp_path / "cartpole" / "data"
    episodes = minari_data(folder, "CartPole-v1", max_episode_steps=12)
    assert {each.terminations[-1] for each in episodes} == {True, False}
    agent, discrete = tiny_agent(discrete=True, images=False), {"discrete": True, "where": "it"}
    replay, record = make_replay(200, 1, 2, 4), agent.example_record()
    with pytest.raises(ValueError, match=r"shape \[4\] .* needs \[6\]"):
        prefill(replay, recorded_episodes(folder, ["speed"]), record, **discrete)
    record["next", "speed"] = torch.zeros(4)
    found = prefill(replay, recorded_episodes(folder.parent, ["speed"]), record, **discrete)
    assert found.episodes == 4 and found.records == sum(len(each.observations) for each in episodes) == len(replay)
    stored, joined = in_order(replay), lambda each: torch.tensor(np.concatenate(list(each)))
    assert torch.equal(stored["next", "speed"], joined(each.observations for each in episodes))
    choices = joined([-1, *each.actions] for each in episodes)
    assert torch.equal(torch.where(stored["is_init"][:, 0], -1, stored["action"].argmax(-1)), choices)
    assert stored["next", "reward"][:, 0].tolist() == joined([0.0, *each.rewards] for each in episodes).tolist()
    for key, name in {"terminated": "terminations", "truncated": "truncations"}.items():
        ends = joined([False, *getattr(each, name)] for each in episodes)
        assert torch.equal(stored["next", key][:, 0], ends)
    assert stored["next", "done"].sum() == 4
    assert recorded_task(folder.parent) == "CartPole-v1"
    with pytest.raises(ValueError, match="was recorded with CartPole-v1, and this run has env.task=Pendulum-v1"):
        train_here(tmp_path / "other", *PENDULUM, f"replay.prefill={folder}")


def test_an_action_range_of_minari_that_is_not_ours_is_refused(tmp_path):
    minari_data(tmp_path / "data", "Pendulum-v1", episodes=1, max_episode_steps=5)
    with pytest.raises(ValueError, match=r"actions between -2 and 2.*RescaleAction"):
        list(recorded_episodes(tmp_path, ["observation"]))
    meta = tmp_path / "data" / "metadata.json"
    told = json.loads(meta.read_text())
    meta.write_text(json.dumps({key: value for key, value in told.items() if key != "action_space"}))
    with pytest.raises(ValueError, match="does not say its spaces"):
        list(recorded_episodes(tmp_path, ["observation"]))


def test_a_data_set_of_minari_that_takes_data_from_other_files_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py", reason="the extra minari is not installed")
    for name in ("linked", "hdf5"):
        minari_data(tmp_path / name, "CartPole-v1", episodes=1)
        assert len(list(recorded_episodes(tmp_path / name, ["speed"]))) == 1
    outside(tmp_path / "linked", "main_data.hdf5")
    with h5py.File(tmp_path / "hdf5" / "main_data.hdf5", "a") as file:
        del file["episode_0"]["rewards"]
        file["episode_0"]["rewards"] = h5py.ExternalLink(tmp_path / "elsewhere", "/episode_0/rewards")
    for name, says in {"linked": "is a link to .*elsewhere, outside", "hdf5": "takes 'episode_0/rewards' from"}.items():
        with pytest.raises(ValueError, match=says):
            list(recorded_episodes(tmp_path / name, ["speed"]))

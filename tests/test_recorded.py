"""Recordings of TorchRL become records as collected episodes do; what differs or is damaged is refused."""

import json

import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from agents import tiny_agent
from counting import CountingStreams, check_records
from tensordict import TensorDict
from torchrl.collectors.utils import split_trajectories
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

from r2dreamer.envs import RecordBuilder, make_replay, prefill, recorded_episodes
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
    "no ends": (
        lambda data: [data["next"].pop(key) for key in ("done", "terminated", "truncated")],
        r"holds \d+ episodes and none of .* does not say which of them terminate",
    ),
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


def test_an_observation_that_is_not_a_number_is_no_gap(tmp_path):
    spoilt(lambda data: both(data, "count", lambda value: torch.full(value.shape, torch.nan))).memmap(
        tmp_path / "recorded"
    )
    needed = example()
    needed["next", "count"] = torch.zeros(4)
    with pytest.raises(ValueError, match="NaN or infinity in .*count"):
        episodes = recorded_episodes(tmp_path / "recorded", KEYS)
        prefill(make_replay(600, 2, 5, LENGTH), episodes, needed, discrete=False, where="it")


def test_one_rollout_in_place_of_a_list_and_paths_and_keys_as_text(tmp_path):
    collected()[0].exclude("collector").memmap(tmp_path / "recorded")
    episodes = list(recorded_episodes(str(tmp_path / "recorded"), "pixels"))
    assert len(episodes) > 1
    with pytest.raises(
        ValueError, match=r"episodes is one TensorDict; give a list of episodes, for example \[rollout\]"
    ):
        prefill(make_replay(60, 1, 2, 2), episodes[0], example(), discrete=True, where="it")


def test_a_path_without_a_recording_and_choices_that_are_numbers_are_refused(tmp_path):
    replay = make_replay(60, 1, 2, 2)
    with pytest.raises(ValueError, match="nowhere is no recording"):
        prefill(replay, recorded_episodes(tmp_path / "no", KEYS), example(), discrete=True, where="nowhere")
    episode = example().unsqueeze(0).repeat(4).exclude(("next", "state"), ("next", "belief"))
    episode["is_init"][0], episode["action"] = True, torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="recorded one-hot"):
        prefill(replay, [episode], example(), discrete=True, where="it")


def test_an_episode_under_way_is_not_gone_on_with():
    episode = example().unsqueeze(0).repeat(4).exclude(("next", "state"), ("next", "belief"))
    episode["is_init"][0], episode["action"][1:] = True, torch.tensor([0.0, 1.0])
    replay = make_replay(60, 1, 2, 2)
    fill = lambda: prefill(replay, [episode], example(), discrete=True, where="it")
    fill()
    replay.stored["next", "done"][3] = False  # as if these had been collected
    with pytest.raises(ValueError, match="it would go on with an episode that is under way"):
        fill()
    replay.truncate_streams()
    assert fill().records == 4


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

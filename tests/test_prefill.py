"""A run begins with episodes from elsewhere: of another run, or of Minari. TorchRL's own are in test_recorded."""

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
from launcher import CARTPOLE, PENDULUM, config, lines, train_here
from test_recorded import LENGTH, example, in_order, outside, spoilt

from r2dreamer.envs import make_replay, prefill, recorded_episodes
from r2dreamer.envs.replay.recorded import recorded_task
from r2dreamer.examples.training.manifest import read_manifest, write_manifest
from r2dreamer.examples.training.prefill import prefill_replay, run_episodes, same_task
from r2dreamer.examples.training.shards import NoMetrics

# Runs


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with one environment, so that its records have one order."""
    folder = tmp_path_factory.mktemp("source")
    trainer = train_here(folder, *CARTPOLE, "total_frames=100", "eval.every=1000", "env.num_envs=1")
    return folder, trainer


def begun(folder, *overrides):
    return train_here(folder, *CARTPOLE, "eval.every=1000", "env.num_envs=1", *overrides)


def test_a_run_begins_with_the_records_of_another_and_resumes_without_doing_it_twice(source, tmp_path, capsys):
    folder, before = source
    asked = [f"replay.prefill={folder}", "total_frames=40"]
    (tmp_path / ".prefill-0" / "0").mkdir(parents=True)  # as a killed process leaves it
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
    assert not list(tmp_path.glob(".prefill*"))
    own = len(trainer.replay) - prefilled
    resumed = begun(tmp_path, asked[0], "total_frames=80")
    assert len(lines(tmp_path, '"prefill/records"')) == 1
    assert len(resumed.replay) - prefilled >= own + 40 and resumed.count["prefilled"] == prefilled
    assert "is not read" not in capsys.readouterr().err
    again = begun(tmp_path / "elsewhere", "replay.prefill=another", f"resume={tmp_path}", "total_frames=120")
    assert again.count["prefilled"] == prefilled and again.frames == 120
    assert "replay.prefill=another is not read" in capsys.readouterr().err


def test_actions_of_another_run_are_kept_as_its_policy_drew_them(tmp_path):
    overrides = [*PENDULUM, "eval.every=1000", "env.num_envs=1"]
    before = train_here(tmp_path / "source", *overrides, "total_frames=60").replay.stored["action"]
    assert before.abs().max() > 1  # the environment clipped them
    trainer = train_here(tmp_path / "run", *overrides, f"replay.prefill={tmp_path / 'source'}", "total_frames=40")
    assert torch.equal(trainer.replay.stored["action"][: len(before)], before)


def test_a_replay_that_was_not_saved_is_prefilled_again(source, tmp_path):
    asked = [f"replay.prefill={source[0]}", "checkpoint.replay=false"]
    first = begun(tmp_path, *asked, "total_frames=40")
    second = begun(tmp_path, *asked, "total_frames=80")
    assert second.count["prefilled"] == first.count["prefilled"] > 0
    assert len(second.replay) > second.count["prefilled"]


def test_updates_are_owed_for_prefilled_records_where_that_is_asked_for(source, tmp_path):
    trainer = begun(tmp_path, f"replay.prefill={source[0]}", "replay.prefill_counts=true", "total_frames=40")
    assert trainer.count["updates"] == (trainer.count["prefilled"] + 40 - 20) * 5 // 15


def test_records_that_the_replay_cannot_hold_are_told(source, tmp_path, capsys):
    trainer = begun(tmp_path, f"replay.prefill={source[0]}", "replay.capacity=40", "total_frames=24")
    told = capsys.readouterr().err
    assert f"replay.capacity=40 holds 40 of the {trainer.count['prefilled']} records" in told


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

    rank, count, first, others = 1, 2, False, (9, 9, 1, 0)
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
    trainer.ranks.others = (0, 0, 0, 1)
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

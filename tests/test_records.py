import random
from collections import Counter

import pytest
import torch
from counting import CountingEnv, CountingStreams, action_after, check_records, latents_of
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import InitTracker, SerialEnv, TransformedEnv

from r2dreamer.envs.replay.records import RecordBuilder


def rows(records, stream):
    return [tuple(row) for row in records["next", "count"][records["stream"] == stream].tolist()]


@pytest.mark.parametrize("max_episode", [1, 2, 7, 40])
def test_every_observation_becomes_one_record_in_order_for_any_partition_into_batches(max_episode):
    streams, builder, draw = CountingStreams(3, max_episode), RecordBuilder(3, ["count", "pixels"]), random.Random(0)
    seen = {stream: [] for stream in range(3)}
    for _ in range(40):
        records = builder(streams.collect(draw.choice([1, 1, 2, 5, 13])))
        check_records(records)
        for stream in range(3):
            seen[stream] += rows(records, stream)
    for stream, history in enumerate(streams.history):
        # The newest observation waits for its transition.
        assert history[: len(seen[stream])] == seen[stream] and len(seen[stream]) == len(history) - 1
    finished = Counter(row[:2] for rows in seen.values() for row in rows if row[1] < streams.now[row[0], 1])
    assert sorted(finished.values()) == sorted(n + 1 for n in streams.finished_lengths)


def test_flags_and_latents_belong_to_their_observation():
    streams, builder = CountingStreams(4, 6), RecordBuilder(4, ["count"])
    streams_of = torch.cat([builder(streams.collect(7)) for _ in range(20)])
    nxt = streams_of["next"]
    done = nxt["done"][:, 0]
    state, belief = latents_of(nxt["count"])
    assert torch.equal(nxt["state"], torch.where(done.unsqueeze(-1), 0.0, state))
    assert torch.equal(nxt["belief"], torch.where(done.unsqueeze(-1), 0.0, belief))
    ends = {(row[0], row[1]): row[2] for history in streams.history for row in history}
    for row, is_end in zip(nxt["count"].tolist(), done.tolist(), strict=True):
        finished = streams.now[row[0], 1] > row[1]
        assert is_end == (finished and ends[row[0], row[1]] == row[2])
    assert torch.equal(nxt["truncated"][done], nxt["count"][done][:, 1:2] % 2 == 1)


def test_records_share_no_memory_with_the_collector():
    streams, builder = CountingStreams(2, 5), RecordBuilder(2, ["count", "pixels"])
    first = builder(streams.collect(4))
    copy = first.clone()
    transitions = streams.collect(4)
    assert (first == copy).all()
    transitions["action"].fill_(-1)
    transitions["next", "reward"].fill_(-1)
    assert (first == copy).all()


def test_pending_actions_survive_a_state_dict_round_trip_and_the_memory_of_the_collector():
    streams, builder = CountingStreams(3, 50), RecordBuilder(3, ["count"])
    builder(streams.collect(5))
    other = RecordBuilder(3, ["count"])
    other.load_state_dict(builder.state_dict())
    transitions = streams.collect(5)
    expected, restored = builder(transitions), other(transitions)
    assert (expected == restored).all()
    check_records(restored)


def test_reset_forgets_pending_and_an_observation_without_predecessor_is_refused():
    streams, builder = CountingStreams(2, 1000), RecordBuilder(2, ["count"])
    builder(streams.collect(3))
    builder.reset()
    with pytest.raises(ValueError, match=r"stream 0, step 0.*InitTracker"):
        builder(streams.collect(3))
    builder.reset()
    streams.restart()
    check_records(builder(streams.collect(3)))


def test_a_batch_given_twice_or_left_out_or_after_a_reset_is_refused():
    for max_episode in (5, 1000):
        streams, builder = CountingStreams(3, max_episode), RecordBuilder(3, ["count"])
        first = streams.collect(4)
        builder(first)
        with pytest.raises(ValueError, match="stream [012].*once and in order"):
            builder(first)
        left_out, following = streams.collect(4).clone(), streams.collect(4)
        with pytest.raises(ValueError, match="stream [012].*once and in order"):
            builder(following)
        builder(left_out), builder(following)  # what is refused changes nothing
        streams.restart()
        begun = streams.collect(4)
        with pytest.raises(ValueError, match=r"the environments were reset.*reset\(\) of this builder"):
            builder(begun)
        builder.reset()
        check_records(builder(begun))


def test_an_observation_that_is_not_a_number_at_the_border_of_batches_is_no_gap():
    streams, builder = CountingStreams(1, 1000), RecordBuilder(1, ["count"])
    both = streams.collect(8).clone()
    for holder in (both, both["next"]):
        holder["count"] = holder["count"].float()
    both["next", "count"][:, 3] = both["count"][:, 4] = torch.nan
    builder(both[:, :4])
    assert builder(both[:, 4:])["next", "count"][0].isnan().all()


def test_wrong_number_of_streams_is_refused():
    with pytest.raises(ValueError, match=r"\[3, k\], got \[2, 4\]"):
        RecordBuilder(3, ["count"])(CountingStreams(2, 5).collect(4))


def test_entries_that_are_missing_are_named():
    transitions = CountingStreams(2, 5).collect(4)
    with pytest.raises(ValueError, match="lack 'is_init'.*(?s:.*)InitTracker"):
        RecordBuilder(2, ["count"])(transitions.exclude("is_init"))
    with pytest.raises(ValueError, match=r"lack 'c', .*\('next', 't'\).*(?s:.*)a list of keys"):
        RecordBuilder(2, "count")(transitions)


def test_latents_that_no_policy_wrote_are_zeros_of_known_width():
    streams = CountingStreams(2, 5)
    builder = RecordBuilder(2, ["count"], latent_sizes={"state": 2, "belief": 3})
    records = builder(streams.collect(4).exclude("state", "belief"))
    assert records["next", "state"].shape[1:] == (2,) and not records["next", "belief"].any()
    without = RecordBuilder(2, ["count"])(CountingStreams(2, 5).collect(4).exclude("state"))
    assert ("next", "state") not in without.keys(True) and ("next", "belief") in without.keys(True)


def test_a_real_collector_over_serial_environments():
    def env(stream):
        return lambda: CountingEnv(stream)

    class Policy(torch.nn.Module):
        def forward(self, count):
            return action_after(count), *latents_of(count)

    policy = TensorDictModule(Policy(), in_keys=["count"], out_keys=["action", "state", "belief"])
    environment = TransformedEnv(SerialEnv(3, [env(stream) for stream in range(3)]), InitTracker())
    collector = Collector(environment, policy, frames_per_batch=3 * 4, total_frames=3 * 4 * 12)
    builder = RecordBuilder(3, ["count"])
    seen = {stream: [] for stream in range(3)}
    for transitions in collector:
        records = builder(transitions)
        check_records(records)
        done = records["next", "done"][:, 0]
        state, _ = latents_of(records["next", "count"])
        assert torch.equal(records["next", "state"], torch.where(done.unsqueeze(-1), 0.0, state))
        for stream in range(3):
            seen[stream] += rows(records, stream)
    collector.shutdown()
    for stream in range(3):
        expected, counter = [], 0
        for episode in range(60):
            for step in range(2 + episode % 5):
                expected.append((stream, episode, step, counter))
                counter += 1
        offset = seen[stream][0][1]  # collectors may reset more than once before they start
        assert offset == 0, "the collector skipped an episode"
        assert seen[stream] == expected[: len(seen[stream])] and len(seen[stream]) > 48

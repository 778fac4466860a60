"""The policy in TorchRL's Collector: latents are carried from step to step and forgotten at episode ends."""

import functools

import pytest
import torch
from agents import tiny_agent
from launcher import config
from torchrl.collectors import Collector
from torchrl.envs import ParallelEnv, StepCounter, TransformedEnv

from r2dreamer.dreamer import ActionSpace, ObservationSpace, build_agent
from r2dreamer.envs import VectorCollector, make_gym, make_vector_env
from r2dreamer.envs.base.check import RESERVED
from r2dreamer.envs.replay.buffer import make_replay
from r2dreamer.envs.replay.records import RecordBuilder
from r2dreamer.examples.train import Trainer

SEEDS = [2, 4, 6]
WIDTHS = dict(belief=16, hidden=8, classes=4, depth=2, categoricals=3)


def parallel_env(factory, seeds, *, parallel):
    return ParallelEnv(
        len(seeds), factory, create_env_kwargs=[{"seed": seed} for seed in seeds], mp_start_method="fork"
    )


def collect(*, parallel, batches=2, collector=Collector, **devices):
    environment = make_vector_env(functools.partial(make_gym, "CartPole-v1"), SEEDS, parallel=parallel)
    torch.manual_seed(0)
    agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, True), **WIDTHS)
    own = {} if collector is VectorCollector else {"auto_register_policy_transforms": True}
    collector = collector(
        environment, agent.policy, frames_per_batch=len(SEEDS) * 30, total_frames=-1, **own, **devices
    )
    torch.manual_seed(1)
    stream = iter(collector)
    transitions = torch.cat([next(stream).clone() for _ in range(batches)], 1)
    collector.shutdown()
    return agent, transitions


def follows(agent, steps):
    """Every belief of [N, T] steps comes from the latents and the action of the step before."""
    for t in range(1, steps.shape[1]):
        keep = (~steps["is_init"][:, t]).float()
        previous = (steps[key][:, t - 1].float() * keep for key in ("state", "belief", "action"))
        belief = agent.prior(*previous)[2]
        torch.testing.assert_close(steps["belief"][:, t], belief.detach())


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    "devices", [{}, {"policy_device": "cpu"}, {"policy_device": "cpu", "storing_device": "cpu", "env_device": "cpu"}]
)
def test_every_belief_follows_from_the_step_before(parallel, devices):
    """Batched environments may return only their own entries, and with a policy_device TorchRL's collector copies only
    some of the policy's. Either way latents can get lost between two steps without a word.
    """
    agent, steps = collect(parallel=parallel, **devices)
    assert steps["next", "done"].any() and steps["is_init"][:, 1:].any()
    follows(agent, steps)


def test_in_torchrls_parallel_env_they_are_carried_as_well(monkeypatch):
    monkeypatch.setitem(globals(), "make_vector_env", parallel_env)
    agent, steps = collect(parallel=True)
    assert steps["is_init"][:, 1:].any()
    follows(agent, steps)


def test_records_of_random_actions_hold_no_latents_and_the_policy_begins_from_none():
    agent, steps = collect(parallel=False, init_random_frames=len(SEEDS) * 30)
    random, acted = steps[:, :30], steps[:, 30:]
    records = RecordBuilder(len(SEEDS), ["observation"])(random)
    for key in ("state", "belief"):
        assert records["next", key].abs().max() < 1e-9
        steps[key][:, :30] = 0
    assert not acted["is_init"][:, 0].all()  # in mid-episode
    follows(agent, steps[:, 29:])


def test_workers_one_process_and_both_collectors_give_the_same_steps():
    _, expected = collect(parallel=False)
    for parallel in (False, True):
        for collector in (Collector, VectorCollector):
            agent, steps = collect(parallel=parallel, collector=collector)
            for key in (
                "observation",
                "is_init",
                "action",
                "belief",
                "state",
                ("next", "observation"),
                ("next", "done"),
            ):
                assert torch.equal(steps[key], expected[key]), (parallel, collector, key)
    assert "encoded_latents" in steps.keys()


def test_a_collector_that_was_reset_gives_what_a_new_one_does():
    factory, batches = functools.partial(make_gym, "CartPole-v1"), []
    for resets in (0, 1):
        environment = make_vector_env(factory, SEEDS, parallel=False)
        torch.manual_seed(0)
        agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, True), **WIDTHS)
        collector = VectorCollector(environment, agent.policy, frames_per_batch=len(SEEDS) * 9, total_frames=-1)
        stream = iter(collector)
        for _ in range(resets):
            next(stream)
        environment.reseed(SEEDS)
        collector.reset()
        torch.manual_seed(1)
        batches.append(next(stream))
        collector.shutdown()
    for key in ("observation", "is_init", "action", "state", ("next", "is_init")):
        assert torch.equal(*(batch[key] for batch in batches)), key
    assert not batches[0]["is_init"][:, 1:].all()


def test_a_batch_holds_of_the_policys_entries_what_is_to_be_kept():
    environment = make_vector_env(functools.partial(make_gym, "CartPole-v1"), SEEDS, parallel=False)
    agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, True), **WIDTHS)
    collector = VectorCollector(environment, agent.policy, keep=["belief"], frames_per_batch=6, total_frames=-1)
    steps = next(iter(collector))
    collector.shutdown()
    flags = {"done", "terminated", "truncated"}
    assert set(steps.keys()) == {"observation", "is_init", "action", "next", "belief"} | flags
    assert set(steps["next"].keys()) == {"observation", "is_init", "reward"} | flags


@pytest.mark.parametrize(
    ("wrap", "arguments", "said"),
    [
        (
            lambda env: TransformedEnv(env, StepCounter(max_steps=5)),
            {},
            "got TransformedEnv.*Put them into the factory",
        ),
        (lambda env: env, {"init_random_frames": 90}, "does not know init_random_frames.*torchrl.collectors.Collector"),
        (lambda env: env, {"max_frames_per_traj": 5}, "does not know max_frames_per_traj"),
        (lambda env: env, {"reset_at_each_iter": True, "split_trajs": True}, "reset_at_each_iter, split_trajs"),
    ],
)
def test_what_the_short_way_would_pass_over_is_refused(wrap, arguments, said):
    environment = make_vector_env(functools.partial(make_gym, "CartPole-v1"), SEEDS, parallel=False)
    policy = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, True), **WIDTHS).policy
    with pytest.raises(ValueError, match=said):
        VectorCollector(wrap(environment), policy, frames_per_batch=6, total_frames=-1, **arguments)


def test_collected_records_train_and_take_their_latents_back():
    agent, steps = collect(parallel=False)
    records = RecordBuilder(len(SEEDS), ["observation"])(steps)
    replay = make_replay(600, len(SEEDS), batch_size=5, batch_length=7)
    replay.extend(records)
    batch = replay.sample()
    assert batch.shape == (5, 7)
    posterior = agent.world_model(batch.copy())
    assert replay.write_back(batch, posterior["next", "state"], posterior["next", "belief"]) > 0


def test_the_policy_needs_only_observation_and_is_init():
    assert tiny_agent().policy.in_keys == ["pixels", "speed", "is_init"]


def test_the_trainers_own_collector_carries_the_latents(tmp_path):
    """With the devices, parallel environments and batches the trainer sets: what is collected is one filtered stream."""
    overrides = ["experiment=quickstart", f"logdir={tmp_path}", "progress=false", "logger=none", "env.eval_episodes=1"]
    trainer = Trainer(config(*overrides))
    try:
        steps = torch.cat([next(trainer.collection.batches).clone() for _ in range(12)], 1)
    finally:
        trainer.close()
    assert steps["is_init"][:, 1:].any()
    follows(trainer.agent, steps)


@pytest.mark.parametrize("discrete", [False, True])
def test_no_observation_may_be_called_what_the_agent_writes(discrete):
    agent = tiny_agent(discrete=discrete)
    written = [*agent.policy.out_keys, *agent.world_model.out_keys, *agent.value_model.out_keys]
    assert {key if isinstance(key, str) else key[-1] for key in written} <= set(RESERVED)

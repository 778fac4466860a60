"""A script of a user's own trains an agent of his own, with our learner, replay, checkpoints and metrics."""

import textwrap

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch

from r2dreamer.examples.training.checkpoint import Checkpoints
from r2dreamer.examples.training.metrics import read_metrics

SCRIPT = """
from functools import partial

from r2dreamer.envs import VectorCollector, make_gym, make_vector_env  # before TorchRL, which imports MuJoCo
from r2dreamer.dreamer import ActionSpace, ObservationSpace, build_agent, projection_head
from r2dreamer.envs.replay.records import RecordBuilder
from r2dreamer.envs.replay.buffer import make_replay
from r2dreamer.examples.settings.compose import configuration
from r2dreamer.examples.training.checkpoint import Checkpoints
from r2dreamer.examples.training.learner import Learner
from r2dreamer.examples.training.metrics import Averages, MetricsWriter

ENVIRONMENTS, STEPS = 2, 8  # in each batch of the collector

make = partial(make_gym, task="CartPole-v1")
one = make(seed=0)
observations, actions = ObservationSpace.from_spec(one.observation_spec), ActionSpace.from_spec(one.action_spec)
heads = {"projection": partial(projection_head, layers=1)}
agent = build_agent(observations, actions, belief=32, hidden=16, classes=4, categoricals=4, depth=2, heads=heads)
learner = Learner(agent, configuration("algorithm.optimizer.lr=1e-3", "algorithm.optimizer.warmup_steps=1").algorithm)

replay = make_replay(capacity=1000, num_streams=ENVIRONMENTS, batch_size=4, batch_length=8)
records = RecordBuilder(ENVIRONMENTS, list(observations.vectors), latent_sizes=agent.latent_sizes)
checkpoints, metrics, averages = Checkpoints("run/checkpoints"), MetricsWriter("run"), Averages()
environments = make_vector_env(make, seeds=range(ENVIRONMENTS), parallel=False)
batch = {"frames_per_batch": ENVIRONMENTS * STEPS, "total_frames": 640}
for count, transitions in enumerate(VectorCollector(environments, agent.policy, keep=agent.latent_sizes, **batch), 1):
    replay.extend(records(transitions))
    if replay.can_sample():
        sampled = replay.sample()
        losses, latents = learner.update(sampled)
        replay.write_back(sampled, latents["state"], latents["belief"])
        averages.add(losses)
    if count % 10 == 0:
        metrics.write(count * transitions.numel(), averages.pop())
        checkpoints.save(count * transitions.numel(), {"learner": learner.state_dict()}, replay)
metrics.close()
"""


def test_a_script_of_forty_lines_trains_saves_and_logs(tmp_path, monkeypatch):
    assert len(SCRIPT.strip().splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "own_loop"}
    torch.manual_seed(0)
    exec(compile(textwrap.dedent(SCRIPT), "own_loop.py", "exec"), names)
    lines = list(read_metrics("run"))
    assert [line["step"] for line in lines] == [160, 320, 480, 640]
    assert lines[-1]["loss_reward"] < lines[0]["loss_reward"]  # every reward is 1
    assert {"loss_dynamics", "loss_barlow", "loss_actor", "loss_value"} <= lines[-1].keys()
    loaded = Checkpoints("run/checkpoints").load()
    assert loaded.step == 640 and loaded.has_replay
    for name, value in names["learner"].state_dict().items():
        assert torch.equal(loaded.state["learner"][name], value)

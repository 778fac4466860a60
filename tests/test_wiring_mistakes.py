"""The wiring mistakes of a first user: each is an error of at most four lines that names the key and the remedy."""

import functools
import re
from contextlib import contextmanager

import pytest
import torch
from agents import tiny_agent
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import ParallelEnv, TransformedEnv

from r2dreamer.dreamer import ActionSpace, ObservationSpace, build_agent
from r2dreamer.envs import make_gym


@contextmanager
def refused(*said, error=ValueError):
    """What is done inside is refused, in at most four lines that say all of this."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert len(message.splitlines()) <= 4 and max(map(len, message.splitlines())) <= 400, message
    for part in said:
        assert re.search(re.escape(part), message), f"{part!r} is not in:\n{message}"


# --- The policy ---


def cartpole_agent():
    torch.manual_seed(0)
    sizes = dict(belief=16, hidden=8, classes=4, depth=2, categoricals=3)
    return build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, True), **sizes)


CARTPOLE = functools.partial(make_gym, "CartPole-v1", seed=0)
NO_MEMORY = ("no memory", "'state' and 'belief'", "auto_register_policy_transforms=True", "agent.primer()")


def test_a_policy_in_a_parallel_env_without_registration():
    env, agent = ParallelEnv(2, CARTPOLE), cartpole_agent()
    with refused(*NO_MEMORY):
        env.rollout(3, agent.policy, break_when_any_done=False)
    remedied = TransformedEnv(env, agent.primer())
    with torch.no_grad():
        steps = remedied.rollout(12, agent.policy, break_when_any_done=False)
    for t in range(1, 12):
        previous = (steps[key][:, t - 1].float() * ~steps["is_init"][:, t] for key in ("state", "belief", "action"))
        torch.testing.assert_close(steps["belief"][:, t], agent.prior(*previous)[2].detach())
    remedied.close()


def test_a_policy_in_a_collector_without_registration():
    env, agent = ParallelEnv(2, CARTPOLE), cartpole_agent()
    collector = Collector(env, agent.policy, frames_per_batch=8, total_frames=8)
    with refused(*NO_MEMORY):
        next(iter(collector))
    collector.shutdown()


def test_a_policy_called_by_hand_without_what_it_returned():
    agent = tiny_agent(images=False)
    seen = {"speed": torch.ones(2, 6), "is_init": torch.zeros(2, 1, dtype=torch.bool)}
    with refused(*NO_MEMORY):
        agent.policy(TensorDict(seen, [2]))
    seen["is_init"] = torch.tensor([[True], [False]])  # one of the two is in mid-episode
    with refused(*NO_MEMORY):
        agent.policy(TensorDict(seen, [2]))
    step = agent.policy(TensorDict(seen | {"is_init": torch.ones(2, 1, dtype=torch.bool)}, [2]))
    agent.policy(step.set("is_init", torch.zeros(2, 1, dtype=torch.bool)))


def test_an_environment_without_is_init():
    agent = tiny_agent(images=False)
    with refused("'is_init' is missing", "InitTracker"):
        agent.policy(TensorDict({"speed": torch.ones(2, 6)}, [2]))

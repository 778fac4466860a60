"""The agents below examples/results/agents open as they are, are small, and play as well as is said of them."""

import pytest
import torch
from launcher import EXAMPLES
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

import r2dreamer.envs  # isort: skip  # before TorchRL
from r2dreamer.dreamer.pretrained import load_pretrained
from r2dreamer.examples.training.evaluation import evaluate_seeds
from r2dreamer.examples.training.loading import load_trained

AGENTS = EXAMPLES / "results" / "agents"
# By name the least greedy return of two episodes.
BOUNDS = {
    "ball_in_cup_catch": 500,
    "ball_in_cup_catch_pixels": 750,
    "cartpole_swingup": 800,
    "cartpole_swingup_pixels": 450,
    "reacher_easy": 900,
    "walker_stand_pixels": 750,
    "walker_walk": 400,
}


def test_every_shipped_agent_has_a_bound_and_all_are_small():
    assert {path.name for path in AGENTS.iterdir() if path.is_dir()} == set(BOUNDS)
    sizes = [sum(file.stat().st_size for file in (AGENTS / name).glob("*.*")) for name in BOUNDS]
    assert max(sizes) < 3e6 and sum(sizes) < 20e6


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("pixels")) for name in BOUNDS]
)
def test_a_shipped_agent_plays_as_well_as_is_said(name):
    trained = load_trained(AGENTS / name, torch.device("cpu"), images=False)
    assert trained.run.env.task == name.removesuffix("_pixels")
    seeds = r2dreamer.envs.env_seeds(7, 2, "eval")
    environments = r2dreamer.envs.make_vector_env(trained.make_environment, seeds, parallel=False)
    try:
        result = evaluate_seeds(environments, trained.agent, seeds, seed=7, record=False)
    finally:
        environments.close()
    assert result.mean > BOUNDS[name]


# What they did, with two observations of seed 0, in the format that they were first shipped in: the last action, the sum of
# the beliefs, and the sum of the value's logits.
DID = {
    "cartpole_swingup": ([0.994856595993042], -0.18994009494781494, 110.37357330322266),
    "walker_walk": (
        [0.7292386889457703, -0.925512969493866, 0.5837076306343079, 0.38917800784111023, -0.691834568977356]
        + [0.12811781466007233],
        -4.362112998962402,
        108.06866455078125,
    ),
}


@pytest.mark.parametrize("name", DID)
def test_a_shipped_agent_does_what_it_did_before_its_format_changed(name):
    agent, generator = load_pretrained(AGENTS / name), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    seen = {key: torch.randn(1, size, generator=generator) for key, size in agent.observations.vectors.items()}
    step = TensorDict(seen, [1])
    for begins in (True, False):
        step["is_init"] = torch.full((1, 1), begins)
        with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
            step = agent.policy(step)
    _, logits = agent.value(step["state"], step["belief"])
    action, belief, value = DID[name]
    assert step["action"].flatten().tolist() == pytest.approx(action, abs=1e-3)
    assert (step["belief"].sum().item(), logits.sum().item()) == pytest.approx((belief, value), abs=1e-2)


def test_a_shipped_agent_opens_without_its_environment():
    agent = load_pretrained(AGENTS / "walker_walk")
    assert agent.actions.size == 6 and not agent.actions.discrete

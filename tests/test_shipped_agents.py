"""The agents below examples/results/agents open as they are, are small, and play as well as is said of them."""

import pytest
import torch
from launcher import EXAMPLES

import r2dreamer.envs  # isort: skip  # before TorchRL
from r2dreamer.dreamer.pretrained import load_pretrained
from r2dreamer.examples.training.evaluation import evaluate_seeds
from r2dreamer.examples.training.loading import load_trained

AGENTS = EXAMPLES / "results" / "agents"
# By name the least greedy return of two episodes.
BOUNDS = {
    "cartpole_swingup": 800,
    "walker_walk": 400,
}


def test_every_shipped_agent_has_a_bound_and_all_are_small():
    assert {path.name for path in AGENTS.iterdir() if path.is_dir()} == set(BOUNDS)
    sizes = [sum(file.stat().st_size for file in (AGENTS / name).glob("*.*")) for name in BOUNDS]
    assert max(sizes) < 3e6 and sum(sizes) < 20e6


@pytest.mark.parametrize("name", BOUNDS)
def test_a_shipped_agent_plays_as_well_as_is_said(name):
    trained = load_trained(AGENTS / name, torch.device("cpu"), images=False)
    assert trained.run.env.task == name
    seeds = r2dreamer.envs.env_seeds(7, 2, "eval")
    environments = r2dreamer.envs.make_vector_env(trained.make_environment, seeds, parallel=False)
    try:
        result = evaluate_seeds(environments, trained.agent, seeds, seed=7, record=False)
    finally:
        environments.close()
    assert result.mean > BOUNDS[name]


def test_a_shipped_agent_opens_without_its_environment():
    agent = load_pretrained(AGENTS / "walker_walk")
    assert agent.actions.size == 6 and not agent.actions.discrete

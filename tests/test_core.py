"""A recurrent core of one's own: it trains and acts, and one that does not fit is refused."""

import pytest
import torch
from agents import BATCH, TIME, tiny_agent, tiny_records


class PlainGRU(torch.nn.Module):
    def __init__(self, state_size, action_size, belief_size, hidden):
        super().__init__()
        self.cell = torch.nn.GRUCell(state_size + action_size, belief_size)

    def forward(self, state, belief, action):
        value = torch.cat([state, action], -1)
        return self.cell(value.flatten(0, -2), belief.flatten(0, -2)).view(belief.shape)


def test_a_core_of_ones_own_trains_and_acts():
    agent = tiny_agent(core=PlainGRU)
    records = agent.world_model(tiny_records(agent))
    records["next", "posterior_logits"].sin().sum().backward()
    assert agent.prior.core.cell.weight_hh.grad.abs().max() > 0
    first = records[:, 0]
    expected = agent.prior.core(first["state"], first["belief"], first["action"])
    torch.testing.assert_close(records["next", "belief"][:, 0], expected)
    start = records["next"].select("state", "belief").detach().flatten(0, 1)
    assert agent.imagination.rollout(2, agent.actor, tensordict=start)["next", "reward"].shape == (BATCH * TIME, 2, 1)


@pytest.mark.parametrize(
    "core, said",
    [
        (lambda *sizes: torch.nn.Identity(), "Identity .* fails on .* takes \\(state, belief, action\\)"),
        (lambda state, action, belief, hidden: PlainGRU(state, action, belief + 1, hidden), "PlainGRU .* fails on"),
        (
            lambda state, action: Pair(),
            "cannot be built from the sizes of state, action, belief and hidden layers: .* 4",
        ),
        (lambda *sizes: Swapped(), "Swapped .* fails on .* GRUCell"),
        (lambda *sizes: Pair(), "Pair .* returns tuple .* must return the next belief"),
    ],
)
def test_a_core_with_another_signature_is_refused(core, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        tiny_agent(core=core)


class Swapped(torch.nn.Module):
    def forward(self, state, belief, action):
        return torch.nn.GRUCell(state.shape[-1], belief.shape[-1])(state[None, None], belief)  # raises a ValueError


class Pair(torch.nn.Module):
    def forward(self, state, belief, action):
        return state, belief

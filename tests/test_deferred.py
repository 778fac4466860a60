"""Weight gradients once per sequence are those of the plain loop: deferred, compiled, frozen, or not deferred after all."""

import pytest
import torch
from agents import BELIEF, TIME, rssm_modules, tiny_agent, tiny_records

from r2dreamer.dreamer import Linear, RSSMRollout
from r2dreamer.dreamer.fast import speed_up


def deferring_rollout(*modules):
    rollout = RSSMRollout(*modules)
    speed_up(rollout, tricks=["deferred"])
    return rollout


def rollout_gradients(agent, loss, *, deferred, autocast=False, times=1):
    """Of prior and posterior by name, zeros where there is none; the same records and draws every time."""
    torch.manual_seed(7)
    modules = torch.nn.ModuleList(rssm_modules(agent))
    rollout = deferring_rollout(*modules) if deferred else RSSMRollout(*modules)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = rollout(agent.encoder(tiny_records(agent)))["next"]
    modules.zero_grad()
    for left in reversed(range(times)):
        loss(out).backward(retain_graph=left > 0)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in modules.named_parameters()}


ROLLOUT_LOSSES = {
    "everything": lambda out: sum(
        out[key].float().sin().mean() for key in ("prior_logits", "posterior_logits", "state", "belief")
    ),
    "one belief in the middle": lambda out: out["belief"][:, 2].sin().sum(),
    "the first logits": lambda out: out["posterior_logits"][:, 0].sin().sum(),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("r2dreamer.dreamer.fast.deferred.on_gpu", lambda tensor: True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("loss", ROLLOUT_LOSSES)
def test_deferred_weight_gradients_are_those_of_the_plain_loop(loss, times, autocast):
    agent, how = tiny_agent(), dict(times=times, autocast=autocast)
    expected = rollout_gradients(agent, ROLLOUT_LOSSES[loss], deferred=False, **how)
    actual = rollout_gradients(agent, ROLLOUT_LOSSES[loss], deferred=True, **how)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0
    for name, gradient in actual.items():
        error = (gradient - expected[name]).norm()  # bf16: the plain loop rounds each step's gradient, ours their sum
        assert error <= (0.02 if autocast else 1e-5) * expected[name].norm(), name


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_step_defers_the_same_gradients(autocast, monkeypatch):
    """In two compilations, the first step's and the others'; no weight is reached by the steps themselves."""
    agent, loss = tiny_agent(), ROLLOUT_LOSSES["everything"]
    expected = rollout_gradients(agent, loss, deferred=False, autocast=autocast)
    seen = []
    torch._dynamo.reset()  # compilations are counted by function
    compiled = torch.compile(RSSMRollout.step, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(RSSMRollout, "step", lambda self, *args: seen.append(compiled(self, *args)) or seen[-1])
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        actual = rollout_gradients(agent, loss, deferred=True, autocast=autocast)
    for name, gradient in actual.items():
        error = (gradient - expected[name]).norm()
        assert error <= (0.03 if autocast else 1e-5) * expected[name].norm(), name
    reached = {id(node.variable) for node, _ in seen[2][0].grad_fn.next_functions if hasattr(node, "variable")}
    named = [each for part in (agent.prior, agent.posterior) for each in part.named_parameters()]
    assert not reached & {id(p) for _, p in named}


class OddCore(torch.nn.Module):
    """Uses one layer twice in a step, one on rows of its own, one on another number of rows, one from the second step on."""

    def __init__(self, core):
        super().__init__()
        self.core, self.belief_size, self.calls = core, core.belief_size, 0
        self.twice, self.one_row, self.late = (Linear(BELIEF, BELIEF) for _ in range(3))
        self.heads = Linear(BELIEF // 4, BELIEF // 4)

    def project_action(self, action):
        return self.core.project_action(action)

    def advance(self, state, belief, action):
        belief = self.twice(torch.tanh(self.twice(belief)))
        belief = belief + self.heads(belief.unflatten(-1, (4, -1))).flatten(-2) + self.one_row(belief[:1])
        self.calls += 1
        belief = self.late(belief) if self.calls % TIME != 1 else belief
        return self.core.advance(state, belief, action)


def test_layers_that_cannot_defer_compute_as_ever():
    agent, loss = tiny_agent(), ROLLOUT_LOSSES["everything"]
    agent.prior.core = OddCore(agent.prior.core)
    expected, actual = (rollout_gradients(agent, loss, deferred=deferred) for deferred in (False, True))
    for name, gradient in actual.items():
        assert expected[name].abs().max() > 0 or "bias" in name, name
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_a_gradient_for_the_input_alone_leaves_nothing_behind():
    """Weights that need no gradient this time must not find this pass's pieces in their next one."""
    agent = tiny_agent()
    records = tiny_records(agent)
    belief = records["belief"].requires_grad_()
    out = deferring_rollout(*rssm_modules(agent))(agent.encoder(records))["next"]
    loss = out["belief"].sin().sum()
    weight = agent.prior.core.gates.weight
    torch.autograd.grad(loss, belief, retain_graph=True)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert first.abs().max() > 0
    torch.testing.assert_close(first, second)


def test_biases_learn_where_weights_are_frozen():
    agent, how = tiny_agent(), dict(times=1)
    weights = [p for name, p in agent.prior.named_parameters() if "weight" in name]
    for weight in weights:
        weight.requires_grad_(False)
    loss = ROLLOUT_LOSSES["everything"]
    expected, actual = (rollout_gradients(agent, loss, deferred=deferred, **how) for deferred in (False, True))
    assert sum(gradient.abs().max() > 0 for name, gradient in expected.items() if "bias" in name) > 3
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)

"""An update as a CUDA graph: nothing in it may wait for the device, and it computes what the update computes."""

import contextlib

import pytest
import torch
from agents import tiny_agent, tiny_records
from hydra import compose, initialize_config_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from train import Learner

from r2dreamer.dreamer import ActionSpace, ObservationSpace
from r2dreamer.dreamer.distributions import BoundedNormal, OneHotAction
from support.capture import captured
from support.setup import make_agent

MEMBERS = ["r2dreamer", "dreamer", "infonce", "dreamerpro", "none", "vicreg", "dreamerv1", "dreamerv2"]
SMALL = {"belief": 16, "hidden": 8, "depth": 2, "categoricals": 4, "classes": 4}
LOOKS = ("_local_scalar_dense", "nonzero", "multinomial", "normal.Tensor_Tensor", "is_nonzero")


COPIES = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class Looks(TorchDispatchMode):
    """Collects what reads a value of the device."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if any(look in name for look in LOOKS) or (isinstance(result, torch.Tensor) and result.device.type == "cpu"):
            self.found.add(name)
        return result


class Copies(TorchFunctionMode):
    """Collects what brings a value of the host to the device."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in COPIES and result.device.type == "meta":
            self.found.add(function.__name__)
        return result


def make(member, device, discrete, capture=False, precision=torch.float32):
    classic = member in ("dreamerv1", "dreamerv2")
    with initialize_config_module("r2dreamer.configs", version_base=None):
        cfg = compose("config", [f"algorithm={member}", f"model={member if classic else 'size1M'}"])
    cfg.model.update(SMALL)
    cfg.algorithm.actor.imagination_horizon = 2
    torch.manual_seed(0)
    observations = ObservationSpace({"pixels": (3, 64, 64)}, {"speed": 3})
    agent = make_agent(cfg.algorithm, cfg.model, observations, ActionSpace(3, discrete=discrete))
    for part in agent.parts().values():
        part.to(device)
    torch.manual_seed(1)
    records = agent.example_record().expand(4, 6).clone()
    for value in records.values(True, True):
        if value.is_floating_point():
            value.normal_()
    latents = {key: torch.zeros(4, 6, size) for key, size in agent.latent_sizes.items()}
    records = records.exclude(("next", "state"), ("next", "belief")).update(latents)
    return Learner(agent, cfg.algorithm, precision, capture=capture), records.to(device)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("member", MEMBERS)
def test_no_update_waits_for_its_device(member, discrete, monkeypatch):
    """On tensors that have no values: whatever wants to know one, as the host must not while a graph is recorded, fails."""
    monkeypatch.setattr(torch.Tensor, "is_set_to", lambda one, other: False)  # does not exist there
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    # TorchRL asks, before it looks at the bounds of a squashed Normal.
    module = "torchrl.modules.distributions.continuous.safe_is_current_stream_capturing"
    monkeypatch.setattr(module, lambda: True)
    learner, records = make(member, torch.device("meta"), discrete)
    with Looks() as looks, Copies() as copies:
        losses, _ = learner.losses_and_gradients(records)
    assert not looks.found and not copies.found
    assert any(key.startswith("loss_") for key in losses.keys())
    assert any(parameter.grad is not None for parameter in learner.parameters())


def test_what_looks_or_copies_is_noticed():
    zeros = torch.zeros(2, device="meta")
    with Looks() as looks, Copies() as copies:
        zeros.new_tensor([1.0])
        torch.as_tensor(1.0, device="meta")
        torch.distributions.Normal(zeros, 1 + zeros, validate_args=False).sample()
    assert looks.found == {"aten.normal.Tensor_Tensor"} and copies.found == {"new_tensor", "as_tensor"}


@pytest.mark.parametrize("shape", [(7, 3), (5, 4, 6), (1000, 18)])
def test_actions_are_drawn_as_torch_draws_them(shape):
    probs, loc, scale = torch.randn(shape).softmax(-1), torch.randn(shape), torch.rand(shape) + 0.1
    pairs = [
        (OneHotAction(probs), torch.distributions.OneHotCategorical(probs=probs)),
        (BoundedNormal(loc, scale), torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)),
    ]
    for ours, theirs in pairs:
        drawn = []
        for distribution in (ours, theirs):
            torch.manual_seed(3)
            drawn.append((distribution.sample(), torch.rand(1)))
        assert torch.equal(drawn[0][0], drawn[1][0]) and drawn[0][1] == drawn[1][1]
        assert not drawn[0][0].requires_grad and ours.sample((2,)).shape == (2, *shape)


def test_graphs_are_for_gpus():
    step, cpu = (lambda batch: batch), torch.device("cpu")
    assert captured(step, cpu) is step and captured(step, cpu, False) is step
    with pytest.raises(ValueError, match="capture=true .* on cpu.*capture=auto"):
        captured(step, cpu, True)
    with pytest.raises(ValueError, match="capture=sometimes is not one of auto, true, false"):
        captured(step, cpu, "sometimes")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs, and there is no CUDA device")
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("member", MEMBERS)
def test_captured_updates_equal_eager_ones(member, discrete):
    lines = []
    for capture in (False, True):
        learner, records = make(member, torch.device("cuda"), discrete, capture)
        torch.manual_seed(2)
        losses = [learner.update(records)[0].to("cpu") for _ in range(6)]
        lines.append((losses, torch.rand(1, device="cuda").item()))
    for eager, graph in zip(lines[0][0], lines[1][0], strict=True):
        for key in eager.keys():
            torch.testing.assert_close(eager[key], graph[key], rtol=1e-2, atol=1e-3, msg=f"{key}: {eager} {graph}")
    assert lines[0][1] == lines[1][1]  # as many random numbers were drawn


def test_a_falling_entropy_bonus_stays_where_a_graph_reads_it():
    with initialize_config_module("r2dreamer.configs", version_base=None):
        algorithm = compose("config", ["algorithm.final_entropy_fraction=0.5"]).algorithm
    learner = Learner(tiny_agent(), algorithm, torch.float32)
    bonus = learner.actor_loss.entropy_bonus
    learner.update(tiny_records(tiny_agent()))
    learner.anneal(1.0)
    assert learner.actor_loss.entropy_bonus is bonus and bonus.item() == pytest.approx(0.5 * 3e-4)

"""An update as a CUDA graph: nothing in it may wait for the device, and it computes what the update computes."""

import contextlib
import subprocess
import sys

import pytest
import torch
from agents import tiny_agent, tiny_records
from hydra import compose, initialize_config_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from r2dreamer.dreamer import ActionSpace, ObservationSpace
from r2dreamer.dreamer.fast.capture import captured
from r2dreamer.dreamer.networks.distributions import BoundedNormal, OneHotAction
from r2dreamer.dreamer.rssm.latents import CategoricalLatent
from r2dreamer.examples.training.learner import Learner
from r2dreamer.examples.training.metrics import Averages
from r2dreamer.examples.training.setup import make_agent

MEMBERS = [
    "r2dreamer",
    "dreamer",
    "infonce",
    "dreamerpro",
    "none",
    "vicreg",
    "nedreamer",
    "dreamercdp",
    "sigreg",
    "dreamerv1",
    "dreamerv2",
]
KINDS = ["continuous", "discrete"]
SMALL = {"belief": 16, "hidden": 8, "depth": 2, "categoricals": 4, "classes": 4}
LOOKS = ("_local_scalar_dense", "nonzero", "multinomial", "normal.Tensor_Tensor", "is_nonzero")


COPIES = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class Looks(TorchDispatchMode):
    """Collects what reads a value of the device, and what meets a tensor of the host."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        on_host = [each for each in (*args, result) if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
        if on_host or any(look in name for look in LOOKS):
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


def make(member, device, discrete, capture=False, precision=torch.float32, compile=None, extra=()):
    """A learner that learns fast, and three different batches."""
    classic = member in ("dreamerv1", "dreamerv2")
    with initialize_config_module("r2dreamer.configs", version_base=None):
        cfg = compose("config", [f"algorithm={member}", f"model={member if classic else 'size1M'}", *extra])
    cfg.model.update(SMALL)
    cfg.algorithm.actor.imagination_horizon = 2
    cfg.algorithm.optimizer.update(lr=1e-3, warmup_steps=0)
    torch.manual_seed(0)
    observations = ObservationSpace({"pixels": (3, 64, 64)}, {"speed": 3})
    agent = make_agent(cfg.algorithm, cfg.model, observations, ActionSpace(3, discrete=discrete))
    for part in agent.parts().values():
        part.to(device)
    torch.manual_seed(1)
    batches = []
    for _ in range(3):
        records = agent.example_record().expand(4, 6).clone()
        for value in records.values(True, True):
            if value.is_floating_point():
                value.normal_()
            elif value.dtype == torch.uint8:
                value.random_(256)
        latents = {key: torch.zeros(4, 6, size) for key, size in agent.latent_sizes.items()}
        batches.append(records.exclude(("next", "state"), ("next", "belief")).update(latents).to(device))
    return Learner(agent, cfg.algorithm, precision, compile, capture), batches


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
    learner, (records, *_) = make(member, torch.device("meta"), discrete)
    with Looks() as looks:
        with Copies() as copies:
            losses, _ = learner.losses_and_gradients(records)
            if not member.startswith("dreamerv"):  # torch's Adam counts its steps on the host
                learner.optimizer.step()
            learner.slow_critic.step()
            learner.world_model_loss.representation.after_update()
        Averages().add(losses)
    assert not looks.found and not copies.found
    assert any(key.startswith("loss_") for key in losses.keys())
    assert any(parameter.grad is not None for parameter in learner.parameters())


def test_what_looks_or_copies_is_noticed():
    zeros = torch.zeros(2, device="meta")
    with Looks() as looks, Copies() as copies:
        zeros.new_tensor([1.0])
        torch.as_tensor(1.0, device="meta")
        torch.distributions.Normal(zeros, 1 + zeros, validate_args=False).sample()
        forgotten = torch.ones(2)
        zeros.copy_(forgotten)
    assert {"aten.normal.Tensor_Tensor", "aten.copy_.default"} <= looks.found
    assert copies.found == {"new_tensor", "as_tensor"}


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


def test_distributions_of_actions_expand_as_torchs_do():
    probs, loc, scale = torch.rand(4, 1, 3).softmax(-1), torch.randn(4, 1, 3), torch.rand(4, 1, 3) + 0.1
    pairs = [
        (OneHotAction(probs), torch.distributions.OneHotCategorical(probs=probs)),
        (BoundedNormal(loc, scale), torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)),
    ]
    for ours, theirs in pairs:
        wide, other = ours.expand((4, 5)), theirs.expand((4, 5))
        assert type(wide) is type(ours) and wide.batch_shape == (4, 5) and wide.event_shape == (3,)
        value = other.sample()
        torch.testing.assert_close(wide.log_prob(value), other.log_prob(value))
        assert wide.sample((2,)).shape == (2, 4, 5, 3) and wide.deterministic_sample.shape == (4, 5, 3)


def test_graphs_are_for_gpus():
    step, cpu = (lambda batch: batch), torch.device("cpu")
    assert captured(step, cpu) is step and captured(step, cpu, False) is step
    with pytest.raises(ValueError, match="capture=true .* on cpu.*capture=auto"):
        captured(step, cpu, True)
    with pytest.raises(ValueError, match="capture=sometimes is not one of auto, true, false"):
        captured(step, cpu, "sometimes")


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
EXTRAS = ["augmentation=random_shift", "detached_decoder=observation"]
VARIANTS = {
    **{f"{member} {kind}": dict(member=member, discrete=kind == "discrete") for member in MEMBERS for kind in KINDS},
    "augmented, probed": dict(member="r2dreamer", discrete=False, extra=EXTRAS),
    "bfloat16": dict(member="r2dreamer", discrete=False, precision=torch.bfloat16),
    "compiled": dict(member="r2dreamer", discrete=False, compile="parts"),
}


def seven_updates(capture, **variant):
    learner, batches = make(device=torch.device("cuda"), capture=capture, **variant)
    before = [parameter.detach().clone() for parameter in learner.parameters()]
    torch.manual_seed(2)
    losses = [learner.update(batches[i % 3])[0].to("cpu") for i in range(7)]
    moved = [not torch.equal(p, q) for p, q in zip(before, learner.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    return losses, [p.detach().cpu() for p in learner.parameters()], torch.rand(1, device="cuda").item()


@pytest.fixture
def repeatable(monkeypatch):
    """The same sums in the same order each time: what rounding decides, an optimiser that normalises makes large."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@on_a_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_updates_equal_eager_ones(variant, repeatable):
    """To rounding, but for V1, whose squashed Normal TorchRL composes otherwise while a graph is recorded."""
    exact = dict(rtol=1e-4, atol=1e-5) if variant in [f"{m} {k}" for m in MEMBERS[:-2] for k in KINDS] else {}
    loose = dict(rtol=1e-2, atol=1e-2)
    eager, parameters, drawn = seven_updates(False, **VARIANTS[variant])
    graph, others, drawn_too = seven_updates(True, **VARIANTS[variant])
    for one, other in zip(eager, graph, strict=True):
        for key in one.keys():
            torch.testing.assert_close(one[key], other[key], **(exact or loose), msg=key)
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other, **(exact or loose))
    assert drawn == drawn_too  # as many random numbers were used


@on_a_gpu
def test_a_graph_takes_batches_of_its_own_shape_only():
    learner, batches = make("r2dreamer", torch.device("cuda"), False, True)
    for records in batches:
        learner.update(records)
    with pytest.raises(ValueError, match="captured update takes .* capture=false"):
        learner.update(batches[0][:2])


WAITS = """
import r2dreamer.examples, torch
from tensordict import TensorDict
from r2dreamer.dreamer.fast.capture import captured

def step(batch):
    return batch, TensorDict(total=batch["value"] + batch["value"].sum().item())

graph = captured(step, torch.device("cuda"))
for _ in range(3):
    graph(TensorDict(value=torch.ones(2, device="cuda")))
"""


@on_a_gpu
def test_a_step_that_waits_is_told_so(request):
    """In a process of its own: after a recording that failed, the device draws no more random numbers in this one."""
    examples = request.config.rootpath / "examples"
    run = subprocess.run([sys.executable, "-c", WAITS], cwd=examples, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "capture=false trains without it" in run.stderr


@pytest.mark.parametrize("other", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize("member", [m for m in MEMBERS if m not in ("dreamerpro", "dreamerv1")])
def test_losses_and_gradients_are_those_of_a_cpu(member, other, monkeypatch):
    """Without samples, which a GPU draws otherwise; another seed on a CPU shows that none is left.

    DreamerPro and V1 draw in other places, too.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(CategoricalLatent, "draw", lambda self, logits, _: CategoricalLatent.mode(self, logits))
    monkeypatch.setattr(BoundedNormal, "rsample", lambda self, *_: self.mean)
    fixed = lambda drawn: torch.arange(drawn.numel(), device=drawn.device).float().sin().view_as(drawn)
    monkeypatch.setattr("r2dreamer.losses.objectives.sigreg.from_first_rank", fixed)
    found = []
    for seed, name in enumerate(["cpu", other]):
        learner, (records, *_) = make(member, torch.device(name), False)
        torch.manual_seed(seed)
        losses, _ = learner.losses_and_gradients(records)
        found.append((losses.to("cpu"), [p.grad.cpu() for p in learner.parameters() if p.grad is not None]))
    for key in found[0][0].keys():
        torch.testing.assert_close(found[0][0][key], found[1][0][key], rtol=1e-3, atol=1e-3, msg=key)
    ours, theirs = (torch.cat([gradient.flatten() for gradient in each[1]]) for each in found)
    assert (ours - theirs).norm() < 1e-2 * ours.norm()


@pytest.mark.parametrize("bonus", [3e-4, 2])
def test_a_falling_entropy_bonus_stays_where_a_graph_reads_it(bonus):
    options = ["algorithm.final_entropy_fraction=0.5", f"algorithm.actor.entropy_bonus={bonus}"]
    with initialize_config_module("r2dreamer.configs", version_base=None):
        algorithm = compose("config", options).algorithm
    learner = Learner(tiny_agent(), algorithm, torch.float32)
    read = learner.actor_loss.entropy_bonus
    learner.update(tiny_records(tiny_agent()))
    learner.anneal(0.5)
    assert learner.actor_loss.entropy_bonus is read and read.item() == pytest.approx(0.75 * bonus)


def test_actions_of_broken_probabilities_are_broken():
    probs = torch.tensor([[0.5, 0.5], [0.5, float("nan")]])
    drawn = OneHotAction(probs).sample()
    assert drawn[0].sum() == 1 and drawn[1].isnan().any()

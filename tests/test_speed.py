"""The fast paths give what the plain ones give: compiled parts, blocked norms, the benchmark's own synthetic update."""

import itertools
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from agents import tiny_agent, tiny_records
from hydra import compose, initialize_config_module
from launcher import config
from tensordict.nn import TensorDictModuleBase

from r2dreamer.dreamer import ObservationSpace, TwoHotMLP, compile_parts
from r2dreamer.dreamer.fast import deferred, norms
from r2dreamer.dreamer.fast.mixing import Fast
from r2dreamer.dreamer.fast.norms import BLOCK, BlockedNormSiLU
from r2dreamer.dreamer.networks.layers import NormSiLU
from r2dreamer.envs import make_gym
from r2dreamer.examples import benchmark
from r2dreamer.examples.timing.environments import bare
from r2dreamer.examples.training.learner import Learner
from r2dreamer.examples.training.setup import make_agent

CLASSIC_WIDTHS = dict(belief=16, hidden=12, units=10, depth=2, categoricals=7, classes=4)


def learner(
    compile=None, precision=torch.float32, num_bins=255, member="r2dreamer", fast=True, images=False, **overrides
):
    with initialize_config_module("r2dreamer.configs", version_base=None):
        cfg = compose("config", [f"algorithm={member}"])
    cfg.algorithm.actor.imagination_horizon = 3
    cfg.algorithm.optimizer.update(overrides)
    agent = tiny_agent(images=images, num_bins=num_bins, fast=fast)
    if member != "r2dreamer":
        cfg.model.update(CLASSIC_WIDTHS)
        agent = make_agent(cfg.algorithm, {**cfg.model, "fast": fast}, agent.observations, agent.actions)
    return Learner(agent, cfg.algorithm, precision, compile)


def three_updates(made):
    records = tiny_records(tiny_agent(images=False))
    torch.manual_seed(0)
    losses = [made.update(records)[0] for _ in range(3)]
    return losses, [p.detach().clone() for p in made.parameters()]


@pytest.mark.parametrize("member", ["r2dreamer", pytest.param("dreamerv1", marks=pytest.mark.slow)])
def test_updates_with_compiled_parts_equal_eager_ones(member):
    """Sampling stays outside the compiled parts, so even the random draws are the same."""
    options = dict(member=member, lr=1e-3, warmup_steps=0)
    eager, eager_parameters = three_updates(learner(**options))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # which would leave parts eager
        compiled, compiled_parameters = three_updates(learner("parts", **options))
    for one, other in zip(eager, compiled, strict=True):
        assert set(one.keys()) == set(other.keys())
        for key in one.keys():
            torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4, msg=key)
    moved = [not torch.equal(p, q) for p, q in zip(eager_parameters, learner(**options).parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    for one, other in zip(eager_parameters, compiled_parameters, strict=True):
        assert (one - other).abs().mean() < 1e-4


@pytest.mark.parametrize("member", ["r2dreamer", "dreamerv2"])
def test_each_update_is_the_same_without_what_exists_for_speed(member, monkeypatch):
    """From the same weights: losses to 1e-6, gradients to rounding."""
    monkeypatch.setattr(norms, "BLOCK", 16)  # tiny images are large enough then
    monkeypatch.setattr(deferred, "on_gpu", lambda tensor: True)
    images = member == "r2dreamer"
    options = dict(member=member, images=images, lr=1e-3, warmup_steps=0)
    fast, plain = learner(**options), learner(fast=False, **options)
    within = lambda agent: [module for part in agent.parts().values() for module in part.modules()]
    assert any(isinstance(module, Fast) for module in within(tiny_agent()))
    assert not any(isinstance(module, Fast) for module in within(tiny_agent(fast=False)))
    records, found = tiny_records(tiny_agent(images=images)), []
    for update in range(6):
        plain.load_state_dict(fast.state_dict())
        for made in (plain, fast):
            torch.manual_seed(update)
            losses, _ = made.update(records)
            found.append((losses, [p.grad.clone() for p in made.parameters() if p.grad is not None]))
        (ours, gradients), (theirs, others) = found[-2:]
        assert set(ours.keys()) == set(theirs.keys()) and len(gradients) == len(others)
        for key in ours.keys():
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-6, msg=key)
        for one, other in zip(gradients, others, strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7


def test_an_agent_learns_without_what_exists_for_speed():
    made, records = learner(fast=False, lr=1e-3, warmup_steps=0), tiny_records(tiny_agent(images=False))
    losses = [made.update(records)[0] for _ in range(40)]
    assert losses[-1]["loss_barlow"] < losses[0]["loss_barlow"]
    assert losses[-1]["loss_reward"] < losses[0]["loss_reward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blocked_norm_equals_the_composed_one(dtype):
    features = 24
    value = torch.randn(2 * BLOCK // features + 5, features).to(dtype).requires_grad_()
    layer = NormSiLU(features)
    torch.nn.init.normal_(layer.weight)
    gradient = torch.randn_like(value)
    blocked = BlockedNormSiLU.apply(value, layer.weight, layer.eps)
    normed = F.rms_norm(value.float(), (features,), layer.weight, layer.eps)
    composed = F.silu(normed).to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(blocked, composed, **tolerance)
    both = [torch.autograd.grad(out, [value, layer.weight], gradient) for out in (blocked, composed)]
    torch.testing.assert_close(both[0][0], both[1][0], **tolerance)
    relative = (both[0][1] - both[1][1]).norm() / both[1][1].norm()
    assert relative < (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize(
    "member, objective", [("r2dreamer", "barlow"), *((f"dreamerv{i}", "reconstruction") for i in (1, 2))]
)
def test_updates_in_bfloat16_learn(member, objective):
    made = learner(precision=torch.bfloat16, member=member, lr=1e-3, warmup_steps=0)
    records = tiny_records(tiny_agent(images=False))
    losses = [made.update(records)[0] for _ in range(40)]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in made.parameters())
    assert losses[-1][f"loss_{objective}"] < losses[0][f"loss_{objective}"]


def test_the_same_parameters_get_a_gradient_in_bfloat16():
    """Imagination casts weights without a gradient; autocast must not hand those casts to the losses."""
    reached = []
    for precision in (torch.float32, torch.bfloat16):
        made = learner(precision=precision, lr=1e-3, warmup_steps=0)
        for _ in range(3):  # at first, layers before a zero output layer get none
            made.update(tiny_records(tiny_agent(images=False)))
        reached.append({name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()})
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert reached[0] == reached[1] == trained


def test_heads_and_losses_share_their_bins():
    made = learner(num_bins=51)
    assert len(made.world_model_loss.reward_prediction.likelihood.two_hot.bins) == 51
    for _ in range(2):
        made.update(tiny_records(tiny_agent(images=False, num_bins=51)))


@pytest.mark.parametrize("member", ["r2dreamer", "dreamer", "dreamerv1", "dreamerv2"])
def test_every_part_is_compiled(member):
    agent = tiny_agent()
    if member != "r2dreamer":
        with initialize_config_module("r2dreamer.configs", version_base=None):
            cfg = compose("config", [f"algorithm={member}"])
        agent = make_agent(
            cfg.algorithm, cfg.model, ObservationSpace({"pixels": (3, 64, 64)}, {"speed": 6}), agent.actions
        )
    compile_parts(agent.rollout, *agent.parts().values())
    parts = [agent.encoder.image, agent.encoder.vector]
    parts += [agent.reward, agent.value, agent.actor[0].module, agent.continue_, agent.heads.get("projection")]
    decoder = agent.heads.get("decoder")
    parts += [decoder.image, decoder.vector] if decoder else []
    assert all(part is None or getattr(part, "module", part)._compiled_call_impl is not None for part in parts)
    every = [module for part in (agent.rollout, *agent.parts().values()) for module in part.modules()]
    wrappers = [module for module in every if isinstance(module, TensorDictModuleBase)]
    assert wrappers and all(module._compiled_call_impl is None for module in wrappers)
    is_compiled = lambda method: hasattr(method, "_torchdynamo_orig_callable")
    methods = [
        agent.prior.core.advance,
        agent.prior.predict,
        agent.prior.logits,
        agent.posterior.logits,
        agent.rollout.step,
    ]
    assert all(map(is_compiled, methods))
    if member in ("r2dreamer", "dreamer"):
        assert is_compiled(agent.prior.latent.draw)


@pytest.mark.parametrize("gradients", [False, True], ids=["imagined", "trained"])
def test_a_compiled_head_expects_exactly_zero_before_it_has_learnt(gradients):
    """Reward and value begin at 0, not at what rounding leaves of bins from -4.9e8 to 4.9e8; fused products round less."""
    head = TwoHotMLP(12, 8, 1)
    plain = (torch.zeros(16, 255).softmax(-1) * head.two_hot.bins).sum(-1)
    assert plain.abs().max() > 1e-3  # summed from end to end
    compile_parts(head)
    with torch.set_grad_enabled(gradients):
        logits, expected = head(torch.randn(16, 7), torch.randn(16, 5))
    assert head._compiled_call_impl is not None and expected.shape == (16, 1)
    assert (logits == 0).all() and (expected == 0).all()


def test_the_losses_of_a_compiled_learner_are_compiled():
    made = learner("parts")
    assert hasattr(made.world_model_loss.kl.compare, "_torchdynamo_orig_callable")
    for prediction in (made.world_model_loss.reward_prediction, made.value_loss.prediction):
        assert prediction.likelihood._compiled_call_impl is not None


def test_the_benchmark_prints_one_json_line_with_torchrl_beside_us(request, tmp_path):
    script = request.config.rootpath / "examples" / "benchmark.py"
    small = ["model=size1M", "model.belief=16", "model.hidden=8", "batch_size=2", "batch_length=3", "repeats=1"]
    command = [sys.executable, str(script), *small, "precision=fp32", "--compare", "torchrl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = {
        name: result[name]["median_s"] for name in ("update", "other_update", "torchrl_update", "acting", "replay")
    }
    assert min(seconds.values()) > 0
    assert result["torchrl_over_ours"] == seconds["torchrl_update"] / seconds["update"]
    # Like for like: both have a decoder.
    assert result["torchrl_over_other"] == seconds["torchrl_update"] / seconds["other_update"]
    assert result["other_over_ours"] == seconds["other_update"] / seconds["update"]
    assert result["other"] == "Reconstruction" and result["other_parameters"] != result["parameters"]


@pytest.mark.parametrize("compare", ["torchrl", "algorithm"])
def test_the_benchmark_measures_turn_by_turn(monkeypatch, compare):
    turns = []
    theirs = lambda *_: (lambda records: turns.append("torchrl"), 7)
    ours = lambda learner, records: turns.append(type(learner.world_model_loss.representation).__name__)
    monkeypatch.setattr(benchmark, "torchrl_dreamer", theirs)
    monkeypatch.setattr(Learner, "update", ours)
    with initialize_config_module("r2dreamer.configs", version_base=None):
        small = ["model=size1M", "model.belief=16", "model.hidden=8", "batch_size=2", "batch_length=3"]
        cfg = compose("benchmark", [*small, "repeats=2", "device=cpu", "measure=[update]", f"compare={compare}"])
    result = benchmark.benchmark(cfg)
    round_ = ["BarlowTwins", "Reconstruction", *["torchrl"] * (compare == "torchrl")]
    assert turns == round_ * 4  # two to warm up, two that count
    assert ("torchrl_over_other" in result) == (compare == "torchrl") and "other_over_ours" in result


def test_the_benchmark_measures_beside_tricks_and_on_the_disk_it_is_given(tmp_path):
    small = ["model=size1M", "model.belief=16", "model.hidden=8", "batch_size=2", "batch_length=3"]
    (tmp_path / "step").write_text("of a run")
    place = ["replay.place.storage=memmap", f"replay.place.directory={tmp_path}"]
    with initialize_config_module("r2dreamer.configs", version_base=None):
        cfg = compose(
            "benchmark", [*small, *place, "repeats=1", "device=cpu", "measure=[update,acting,replay]", "compare=tricks"]
        )
    result = benchmark.benchmark(cfg)
    assert {"update", "acting", "replay", "without_norms"} <= result.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_the_benchmark_says_whom_it_cannot_compare(server, tmp_path):
    done = server.run(tmp_path, "compare=algorithm", "algorithm@other=dreamerv2", script="benchmark")
    assert done.status == 1 and "Traceback" not in done.stderr
    assert "dreamerv2 has sizes of its own" in done.stderr and "algorithm=dreamerv2" in done.stderr
    with pytest.raises(ValueError, match="compare=algorithm compares updates: add update to measure"):
        benchmark.benchmark(config("compare=algorithm", "measure=[acting]", name="benchmark"))
    with pytest.raises(ValueError, match="those of this algorithm are none of DreamerV3's"):
        benchmark.benchmark(config("compare=torchrl", "algorithm=dreamerv2", name="benchmark"))


@pytest.mark.parametrize(
    "environment",
    ["env=gym env.task=CartPole-v1", "env=probe env.task=ending", "env=probe env.task=ending env.make.continuous=true"],
)
def test_the_benchmark_steps_the_same_simulators_with_and_without_torchrl(server, tmp_path, environment):
    short = ["measure=[environment]", "counts=[2]", "seconds=0.1", "rounds=1"]
    done = server.run(tmp_path, *environment.split(), *short, script="benchmark")
    assert done.status == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])["environment"]["2"]
    assert result["collector"] > 0 and result["bare"] > 0
    assert result["ratio"] == pytest.approx(result["collector"] / result["bare"], rel=0.02)


def test_a_bare_simulator_repeats_actions_and_draws_as_the_environment_does():
    repeated = bare(partial(make_gym, "Pendulum-v1", action_repeat=4), 0)
    repeated.reset()
    steps = next(step for step in itertools.count(1) if repeated.step(repeated.action_space.sample())[3])
    assert steps == 50  # of 200
    drawn = bare(partial(make_gym, "CartPole-v1", from_pixels=True, image_size=32), 0)
    assert drawn.reset()[0]["pixels"].shape == (3, 32, 32)

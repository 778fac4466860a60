"""Dreamer V1 and V2: their parts against independent arithmetic, and the way the actor's gradient takes."""

from functools import partial

import numpy as np
import pytest
import torch
from agents import TIME, tiny_records
from hydra.utils import instantiate
from launcher import CARTPOLE, config, train_here
from tensordict import TensorDict
from test_deferred import ROLLOUT_LOSSES, rollout_gradients
from test_losses import has_gradient
from test_resume import gone_on
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from r2dreamer.dreamer import (
    ActionSpace,
    CategoricalLatent,
    GaussianLatent,
    GRUCell,
    NormGRUCell,
    ObservationSpace,
    build_classic_agent,
    classic_decoder,
)
from r2dreamer.dreamer.classic.networks import ConvDecoder, ConvEncoder, ExplorationNoise, StraightThroughAction
from r2dreamer.losses import (
    CategoricalKL,
    CopyEvery,
    DreamerValueLoss,
    DynamicsActorLoss,
    GaussianKL,
    GroupedAdam,
    R2DreamerWorldModelLoss,
    Reconstruction,
    UnitGaussian,
    total_loss,
)

V1 = dict(latent=GaussianLatent, cell=GRUCell, squashed_actions=True)
V2 = dict(latent=partial(CategoricalLatent, unimix=0.0), cell=NormGRUCell, squashed_actions=False, continue_layers=1)
GENERATIONS = {"v1": (V1, GaussianKL(free_nats=0.0)), "v2": (V2, CategoricalKL(0.8, 0.2, 0.0, 0.0))}
every_generation = pytest.mark.parametrize("generation", GENERATIONS)


def made(generation, *, images=False, discrete=False, noise=0.0, **changed):
    torch.manual_seed(0)
    observations = ObservationSpace({"pixels": (3, 64, 64)} if images else {}, {"speed": 6})
    layers = dict(vector_layers=1, reward_layers=1, actor_layers=1, value_layers=1)
    widths = dict(belief=16, hidden=12, units=10, depth=2, categoricals=7, classes=4)
    options = {**GENERATIONS[generation][0], "noise": noise, "heads": {"decoder": classic_decoder}, **changed}
    return build_classic_agent(observations, ActionSpace(2, discrete), **{**widths, **layers, **options})


def model_loss(agent, generation):
    kl = GENERATIONS[generation][1]
    return R2DreamerWorldModelLoss(agent.world_model, Reconstruction(0.5), kl=kl, scalar_likelihood=UnitGaussian())


def actor_loss(agent, **options):
    options = {"imagination_horizon": 3, "discount": 0.9, "lmbda": 0.8, "entropy_bonus": 0.0, **options}
    return DynamicsActorLoss(
        agent.actor, agent.value_model, agent.imagination, continue_model=agent.continue_model, **options
    )


def start_of(agent, count=6):
    generator = torch.Generator().manual_seed(3)
    state = torch.rand(count, agent.sizes.state, generator=generator)
    return TensorDict({"state": state, "belief": torch.rand(count, agent.sizes.belief, generator=generator)}, [count])


@pytest.mark.parametrize(
    ("name", "prior", "posterior", "of_each", "loss"),
    [
        # Two steps of one categorical: (1/2, 1/2) from (1/4, 3/4) and from (1/3, 2/3). KL: ln(4/3)/2 and ln(9/8)/2.
        ("dreamerv2", [[1 / 4, 3 / 4], [1 / 3, 2 / 3]], [[1 / 2, 1 / 2]] * 2, (0.143841, 0.058892), 0.101366),
        # Two steps of one Gaussian of variance 1, 1 and 0.4 away. KL: 1/2 and 0.08.
        ("dreamerv1", [[1.0, 1.0], [0.4, 1.0]], [[0.0, 1.0]] * 2, (0.5, 0.08), 0.29),
    ],
)
def test_the_first_generations_clip_the_mean_divergence(name, prior, posterior, of_each, loss):
    """As their official code does; clipped step by step, the second step would have no gradient and the loss be more."""
    prior, posterior = (torch.tensor([side])[:, :, None] for side in (prior, posterior))  # [1, 2, 1, 2]
    if name == "dreamerv2":
        prior, posterior = prior.log(), posterior.log()
    prior.requires_grad_()
    posterior.requires_grad_()
    records = TensorDict({"next": {"prior_logits": prior, "posterior_logits": posterior}}, [1, 2])
    keys = R2DreamerWorldModelLoss.default_keys()
    kl = instantiate(config(f"algorithm={name}").algorithm.kl)
    assert sum(of_each) / 2 == pytest.approx(loss, abs=1e-6)
    free = (loss + of_each[1]) / 2  # more than the second divergence, less than their mean
    for kl.free_nats, expected in ((0.0, loss), (free, loss), (2 * loss, 2 * loss)):
        terms, _ = kl(records, keys)
        total = sum(terms.values())
        assert total.item() == pytest.approx(expected, rel=1e-5)
        gradients = torch.autograd.grad(total, [prior, posterior])
        for gradient in gradients:
            assert (gradient[..., 0] != 0).tolist() == [[[expected == loss]] * 2]


def test_the_gaussian_kl_is_torchs_and_sleeps_below_the_free_nats():
    generator = torch.Generator().manual_seed(1)
    sides = {
        f"{side}_logits": torch.stack(
            [torch.randn(3, 5, 4, generator=generator), torch.rand(3, 5, 4, generator=generator) + 0.1], -1
        )
        for side in ("prior", "posterior")
    }
    sides = {name: value.requires_grad_() for name, value in sides.items()}
    records, keys = TensorDict({"next": dict(sides)}, [3, 5]), R2DreamerWorldModelLoss.default_keys()
    q, p = (torch.distributions.Normal(*sides[f"{side}_logits"].unbind(-1)) for side in ("posterior", "prior"))
    of_each = torch.distributions.kl_divergence(q, p).sum(-1)
    expected, between = of_each.mean(), of_each.median().item()
    assert of_each.min() < between < expected  # clipped at every step it would be more than the mean
    terms, diagnostics = GaussianKL(weight=0.5, free_nats=between)(records, keys)
    torch.testing.assert_close(terms["kl"], 0.5 * expected)
    torch.testing.assert_close(diagnostics["kl"], expected.detach())
    terms["kl"].backward()
    assert all((value.grad[..., 0] != 0).all() for value in sides.values())
    for value in sides.values():
        value.grad = None
    terms, _ = GaussianKL(weight=0.5, free_nats=1e3)(records, keys)
    assert terms["kl"] == 500
    terms["kl"].backward()
    assert all(value.grad.abs().sum() == 0 for value in sides.values())


def test_the_gaussian_latent_follows_its_mean_and_spread_and_passes_gradients():
    latent = GaussianLatent(2, 3, min_std=0.2)
    flat = torch.randn(latent.logits_size, requires_grad=True)
    parameters = latent.logits(flat)
    assert latent.size == 6 and parameters.shape == (6, 2)
    loc, scale = parameters.unbind(-1)
    torch.testing.assert_close(scale, flat[6:].exp().log1p() + 0.2)
    samples = latent.sample(parameters.expand(20000, 6, 2))
    torch.testing.assert_close(samples.mean(0), loc, atol=0.05, rtol=0)
    torch.testing.assert_close(samples.std(0), scale, rtol=0.05, atol=0)
    (gradient,) = torch.autograd.grad(latent.sample(parameters).sum(), flat)
    torch.testing.assert_close(gradient[:6], torch.ones(6))
    assert (gradient[6:] != 0).all() and torch.equal(latent.mode(parameters), loc)
    with pytest.raises(ValueError, match="min_std=0"):
        GaussianLatent(min_std=0)


def test_the_normed_gru_cell_equals_naive_loops():
    cell = NormGRUCell(3, 4)
    nn.init.normal_(cell.norm.weight), nn.init.normal_(cell.norm.bias)
    value, belief = torch.randn(5, 3), torch.randn(5, 4)
    array = lambda tensor: tensor.detach().double().numpy()
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for row in range(5):
        joint = np.concatenate([array(value[row]), array(belief[row])])
        gates = np.array(
            [sum(w * x for w, x in zip(weights, joint, strict=True)) for weights in array(cell.linear.weight)]
        )
        gates = (gates - gates.mean()) / np.sqrt(gates.var() + cell.norm.eps)
        gates = gates * array(cell.norm.weight) + array(cell.norm.bias)
        for i in range(4):
            candidate = np.tanh(sigmoid(gates[i]) * gates[4 + i])
            update = sigmoid(gates[8 + i] - 1)
            expected = update * candidate + (1 - update) * belief[row, i].item()
            assert cell(value, belief)[row, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@every_generation
def test_the_sequence_pass_equals_single_steps(generation):
    agent = made(generation)
    records = agent.encoder(tiny_records(agent))
    out = agent.rollout(records.copy())["next"]
    for t in range(TIME):
        keep = (~records["is_init"][:, t]).float()
        state = (out["state"][:, t - 1] if t else records["state"][:, 0]) * keep
        belief = (out["belief"][:, t - 1] if t else records["belief"][:, 0]) * keep
        prior_logits, _, belief = agent.prior(state, belief, records["action"][:, t] * keep)
        torch.testing.assert_close(out["belief"][:, t], belief)
        torch.testing.assert_close(out["prior_logits"][:, t], prior_logits)


@pytest.mark.parametrize("autocast", [False, True])
@every_generation
def test_gradients_of_the_sequence_pass_are_the_plain_loops(generation, autocast):
    agent, loss = made(generation), ROLLOUT_LOSSES["everything"]
    expected, actual = (
        rollout_gradients(agent, loss, deferred=deferred, autocast=autocast) for deferred in (False, True)
    )
    for name, gradient in actual.items():
        error = (gradient - expected[name]).norm()
        assert error <= (0.02 if autocast else 1e-5) * expected[name].norm() + 1e-9, name


def test_the_gru_stays_in_float32_under_autocast():
    core, seen = made("v1").prior.core, []
    core.cell.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        belief = core(torch.randn(2, 28), torch.randn(2, 16), torch.randn(2, 2))
    value, before = seen[0]
    assert value.dtype == before.dtype == torch.float32
    assert torch.equal(belief, core.cell(value, before))  # to the last bit of 24, where bfloat16 has 8


@every_generation
def test_the_world_model_learns_from_all_its_losses(generation):
    agent = made(generation, images=True)
    loss = model_loss(agent, generation)
    records = tiny_records(agent)
    losses, posterior = loss(records)
    assert {key for key in losses.keys() if key.startswith("loss_")} == set(loss.out_keys)
    error = (posterior["next", "reward"] - records["next", "reward"]).square().mean() / 2
    torch.testing.assert_close(losses["loss_reward"], error)  # a Gaussian of variance 1, in the reward's own units
    assert ("loss_continue" in losses.keys()) == (generation == "v2")
    total_loss(losses).backward()
    for part in (agent.encoder, agent.prior, agent.posterior, agent.heads["decoder"], agent.reward):
        assert has_gradient(part) == {True}
    assert has_gradient(agent.actor) == has_gradient(agent.value) == {False}


def test_every_group_has_its_own_rate_and_norm():
    torch.manual_seed(0)
    start = {name: torch.randn(3) for name in ("model", "actor", "value")}
    rates, sizes = {"model": 0.1, "actor": 0.01, "value": 0.02}, {"model": 50.0, "actor": 0.5, "value": 9.0}
    weights = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    groups = [{"name": name, "params": [weight]} for name, weight in weights.items()]
    ours = GroupedAdam(groups, lr=0.1, actor_lr=0.01, value_lr=0.02, max_norm=2.0, eps=1.0, warmup_steps=2)
    plain = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: torch.optim.Adam([weight], lr=0.0, eps=1.0) for name, weight in plain.items()}
    for step in range(3):
        for name in start:
            gradient = sizes[name] * torch.ones(3) / 3**0.5
            weights[name].grad = gradient.clone()
            plain[name].grad = gradient * min(1.0, 2.0 / sizes[name])
            theirs[name].param_groups[0]["lr"] = rates[name] * min(1.0, (step + 1) / 2)
            theirs[name].step()
        ours.step()
        for name in start:
            torch.testing.assert_close(weights[name], plain[name], rtol=1e-4, atol=1e-6)
    assert [group["lr"] for group in ours.param_groups] == list(rates.values())


def test_a_groups_own_rate_is_kept():
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"name": "model", "params": [one], "lr": 1e-2}, {"name": "actor", "params": [two]}]
    rates = {"lr": 6e-4, "actor_lr": 8e-5, "value_lr": 8e-5}
    assert [group["lr"] for group in GroupedAdam(groups, **rates).param_groups] == [1e-2, 8e-5]
    for bad in ([{"params": [one]}], [one, two]):
        with pytest.raises(ValueError, match="groups must be dicts"):
            GroupedAdam(bad, **rates)


def test_gradients_of_a_closure_are_clipped():
    weight = nn.Parameter(torch.ones(4))
    group = {"name": "model", "params": [weight]}
    optimizer = GroupedAdam([group], lr=1e-3, actor_lr=1e-3, value_lr=1e-3, max_norm=2.0)

    def closure():
        optimizer.zero_grad()
        loss = 30 * weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 120
    assert weight.grad.norm().item() == pytest.approx(2.0, rel=1e-4)


def test_images_are_encoded_and_drawn_in_the_published_shapes():
    encoder, decoder = ConvEncoder((3, 64, 64), depth=32), ConvDecoder(230, (3, 64, 64), depth=32)
    assert encoder.out_features == 1024
    images = torch.randint(256, (2, 5, 3, 64, 64), dtype=torch.uint8)
    assert encoder(images).shape == (2, 5, 1024)
    torch.testing.assert_close(encoder(images.double() / 255), encoder(images))
    assert decoder(torch.randn(2, 5, 30), torch.randn(2, 5, 200)).shape == (2, 5, 3, 64, 64)
    with pytest.raises(ValueError, match="40x64 are too small"):
        ConvEncoder((3, 40, 64))
    with pytest.raises(ValueError, match="not 32x32"):
        ConvDecoder(9, (3, 32, 32))


def test_noise_is_for_exploring_only():
    agent = made("v1", noise=0.3)
    step = TensorDict({"speed": torch.randn(4000, 6), "is_init": torch.ones(4000, 1, dtype=torch.bool)}, [4000])
    actor_only = made("v1").policy
    actions = {}
    for kind in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        for name, policy in (("noisy", agent.policy), ("plain", actor_only)):
            torch.manual_seed(0)
            with torch.no_grad(), set_exploration_type(kind):
                actions[kind, name] = policy(step.copy())["action"]
    assert torch.equal(*(actions[ExplorationType.DETERMINISTIC, name] for name in ("noisy", "plain")))
    assert actions[ExplorationType.RANDOM, "noisy"].abs().max() == 1
    assert not torch.equal(*(actions[ExplorationType.RANDOM, name] for name in ("noisy", "plain")))
    noise = ExplorationNoise(0.3, discrete=False)
    # Where nobody has said, the actor beside it samples.
    assert not torch.equal(noise(TensorDict({"action": torch.zeros(3, 2)}, [3]))["action"], torch.zeros(3, 2))
    with set_exploration_type(ExplorationType.RANDOM):
        moved = noise(TensorDict({"action": torch.zeros(20000, 2)}, [20000]))["action"]
        chosen = TensorDict({"action": torch.eye(4)[:1].expand(20000, 4)}, [20000])
        other = ExplorationNoise(0.4, discrete=True)(chosen)["action"]
    assert moved.std().item() == pytest.approx(0.3, rel=0.03)
    assert (other.sum(-1) == 1).all() and other[:, 0].mean().item() == pytest.approx(0.6 + 0.4 / 4, abs=0.02)
    with pytest.raises(ValueError, match="noise=1.5"):
        ExplorationNoise(1.5, discrete=True)


def test_choices_pass_the_gradient_of_their_probabilities():
    logits = torch.randn(5, 3, requires_grad=True)
    probs, weight = logits.softmax(-1), torch.randn(5, 3)
    action = StraightThroughAction(probs).rsample()
    assert ((action == 0) | (action - 1).abs().lt(1e-6)).logical_or(action.abs().lt(1e-6)).all()
    gradients = [torch.autograd.grad((value * weight).sum(), logits, retain_graph=True)[0] for value in (action, probs)]
    torch.testing.assert_close(*gradients)


def test_bad_arguments_are_refused():
    agent = made("v2")
    for build, names in (
        (lambda: actor_loss(agent, dynamics=1.5), "dynamics=1.5"),
        (lambda: CopyEvery(DreamerValueLoss(agent.value_model), rate=0.0), "rate=0.0"),
        (lambda: GroupedAdam([], lr=1, actor_lr=1, value_lr=1, max_norm=0), "max_norm=0"),
    ):
        with pytest.raises(ValueError, match=names):
            build()


def test_a_model_of_another_generation_is_refused_by_its_first_strange_key(tmp_path):
    with pytest.raises(ValueError, match=r"model\.\w+=.* means nothing to r2dreamer.dreamer.build_classic_agent"):
        train_here(tmp_path, *CARTPOLE, "algorithm=dreamerv2", "model=size1M")


def test_dreamer_v2_is_resumed_bit_for_bit(tmp_path):
    few = [*CARTPOLE, "algorithm=dreamerv2", "model.units=8", "algorithm.slow_critic_rate=0.05", "total_frames=100"]
    trainer = train_here(tmp_path, *few)
    restored = gone_on(trainer, *few)
    assert restored.learner.slow_critic.updates == trainer.learner.slow_critic.updates > 50

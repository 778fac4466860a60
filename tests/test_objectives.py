"""Each representation objective against an independent oracle, and the routes its gradient takes and does not take."""

import pathlib

import numpy as np
import pytest
import torch
from agents import BATCH, TIME, tiny_agent, tiny_records
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

from r2dreamer.dreamer import ObservationDecoder, ProjectionHead, latent_head, projection_head
from r2dreamer.losses import (
    BarlowTwins,
    InfoNCE,
    NoObjective,
    Objective,
    R2DreamerWorldModelLoss,
    Reconstruction,
    VICReg,
    collapse_metrics,
    effective_rank,
    info_nce_loss,
)

RECORDED = pathlib.Path(__file__).parent / "data" / "loss_values.npz"
KEYS = R2DreamerWorldModelLoss.default_keys()
DECODER = {"decoder": ObservationDecoder}


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def has_gradient(module):
    return {p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()}


def views(seed=0, samples=(3, 5), features=4):
    generator = torch.Generator().manual_seed(seed)
    k, e = (torch.randn(*samples, features, generator=generator).requires_grad_() for _ in range(2))
    return k, e, TensorDict({"next": {"projected_latents": k, "encoded_latents": e}}, samples)


def test_infonce_equals_the_official_values_and_gradient():
    recorded = {name: torch.from_numpy(value) for name, value in np.load(RECORDED).items()}
    projected = recorded["barlow_projected"].clone().requires_grad_()
    loss, _ = info_nce_loss(projected, recorded["barlow_target"])
    assert relative(loss, recorded["infonce_loss"]) < 1e-5
    loss.backward()
    assert relative(projected.grad, recorded["infonce_grad_projected"]) < 1e-5


@pytest.mark.parametrize("cosine, temperature", [(False, 1.0), (False, 3.0), (True, 0.2)])
def test_infonce_equals_naive_loops(cosine, temperature):
    k, e, pair = views()
    terms, diagnostics = InfoNCE(0.5, cosine=cosine, temperature=temperature)(pair, KEYS)
    rows, targets = (view.detach().double().flatten(0, 1).numpy() for view in (k, e))
    loss, right = 0.0, 0
    for n, row in enumerate(rows):
        scores = []
        for target in targets:
            score = sum(a * b for a, b in zip(row, target, strict=True))
            if cosine:
                score /= sum(a * a for a in row) ** 0.5 * sum(b * b for b in target) ** 0.5
            scores.append(score / temperature)
        loss -= scores[n] - np.log(sum(np.exp(score) for score in scores))
        right += scores[n] == max(scores)
    assert terms["infonce"].item() == pytest.approx(0.5 * loss / len(rows), rel=1e-5)
    assert diagnostics["infonce_accuracy"].item() == pytest.approx(right / len(rows))


def test_infonce_leaves_its_target_alone():
    k, e, pair = views()
    InfoNCE()(pair, KEYS)[0]["infonce"].backward()
    assert k.grad.abs().sum() > 0 and e.grad is None


def test_vicreg_equals_naive_loops_and_teaches_both_views():
    k, e, pair = views()
    with torch.no_grad():
        e *= 0.3  # below the hinge
    terms, _ = VICReg(0.5, variance=2.0, covariance=0.3)(pair, KEYS)
    rows = [view.detach().double().flatten(0, 1).numpy() for view in (k, e)]
    samples, features = rows[0].shape
    invariance = sum((rows[0][n, i] - rows[1][n, i]) ** 2 for n in range(samples) for i in range(features))
    invariance /= samples * features
    variance = covariance = 0.0
    for view in rows:
        mean = [sum(view[n, i] for n in range(samples)) / samples for i in range(features)]
        for i in range(features):
            for j in range(features):
                value = sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in view) / (samples - 1)
                if i == j:
                    variance += max(0.0, 1 - (value + 1e-4) ** 0.5) / features
                else:
                    covariance += value**2 / features
    expected = 0.5 * (invariance + 2.0 * variance + 0.3 * covariance)
    assert terms["vicreg"].item() == pytest.approx(expected, rel=1e-5)
    terms["vicreg"].backward()
    assert k.grad.abs().sum() > 0 and e.grad.abs().sum() > 0


def test_one_sample_is_refused_where_it_would_be_nan():
    one = TensorDict(
        {"next": {"projected_latents": torch.ones(1, 1, 4), "encoded_latents": torch.ones(1, 1, 4)}}, [1, 1]
    )
    for objective in (VICReg(), BarlowTwins()):
        with pytest.raises(ValueError, match="needs at least 2, got 1"):
            objective(one, KEYS)


def test_vicreg_of_constant_views_has_a_finite_gradient_that_does_not_vanish_for_good():
    k, e, pair = views()
    with torch.no_grad():
        k.fill_(0.5), e.fill_(0.5)
    VICReg()(pair, KEYS)[0]["vicreg"].backward()
    assert k.grad.isfinite().all() and e.grad.isfinite().all()


def test_reconstruction_equals_naive_loops():
    agent = tiny_agent(heads=DECODER)
    losses, posterior = R2DreamerWorldModelLoss(agent.world_model, Reconstruction(weight=0.3))(tiny_records(agent))
    after = posterior["next"].detach().double()
    drawn, seen = after["reconstruction", "pixels"].numpy(), after["pixels"].numpy() / 255
    total = 0.0
    for b in range(BATCH):
        for t in range(TIME):
            for row in np.ndindex(seen.shape[2:]):
                total += (drawn[b, t][row] - seen[b, t][row]) ** 2
            for i, speed in enumerate(after["speed"][b, t].tolist()):
                code = np.sign(speed) * np.log(1 + abs(speed))
                total += (after["reconstruction", "speed"][b, t, i].item() - code) ** 2
    assert losses["loss_reconstruction"].item() == pytest.approx(0.3 * total / (BATCH * TIME), rel=1e-5)
    parts = losses["reconstruction_pixels"] + losses["reconstruction_speed"]
    torch.testing.assert_close(losses["loss_reconstruction"].detach(), 0.3 * parts)


def test_reconstruction_teaches_decoder_posterior_and_encoder_and_no_head():
    agent = tiny_agent(heads=DECODER)
    loss = R2DreamerWorldModelLoss(agent.world_model, Reconstruction())
    assert "loss_reconstruction" in loss.out_keys and "loss_barlow" not in loss.out_keys
    loss(tiny_records(agent))[0]["loss_reconstruction"].backward()
    for part in (agent.heads["decoder"], agent.posterior, agent.encoder, agent.prior.core):
        assert has_gradient(part) == {True}
    for part in (agent.prior.head, agent.reward, agent.continue_, agent.value, agent.actor):
        assert has_gradient(part) == {False}


def test_no_objective_adds_no_term_and_needs_no_head():
    agent = tiny_agent(heads={})
    loss = R2DreamerWorldModelLoss(agent.world_model, NoObjective())
    losses, _ = loss(tiny_records(agent))
    names = {"loss_dynamics", "loss_representation", "loss_reward", "loss_continue"}
    assert {key for key in losses.keys() if key.startswith("loss_")} == names == set(loss.out_keys)
    assert agent.heads == {} and "projection" not in agent.parameter_counts()


def test_a_deeper_projector_is_a_head_of_another_config_and_learns():
    agent = tiny_agent(heads={"projection": lambda sizes: projection_head(sizes, layers=2)})
    R2DreamerWorldModelLoss(agent.world_model)(tiny_records(agent))[0]["loss_barlow"].backward()
    assert has_gradient(agent.heads["projection"]) == {True}
    assert len(list(agent.heads["projection"].parameters())) == 2 * 3 + 1


def test_bad_arguments_are_refused_at_construction():
    with pytest.raises(ValueError, match="weight=-1.0 of BarlowTwins"):
        BarlowTwins(weight=-1.0)
    with pytest.raises(ValueError, match="temperature=0"):
        InfoNCE(temperature=0)
    with pytest.raises(ValueError, match="layers=-1"):
        tiny_agent(heads={"projection": lambda sizes: projection_head(sizes, layers=-1)})


def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues():
    generator = torch.Generator().manual_seed(2)
    for samples, features in ((40, 6), (6, 40)):
        rows = torch.randn(samples, features, generator=generator) * torch.rand(features, generator=generator) + 3
        values = np.linalg.eigvalsh(np.cov(rows.double().numpy().T))
        assert effective_rank(rows).item() == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)


def test_collapse_shows_in_rank_and_spread():
    alive = torch.randn(9, 11, 6)
    one_direction = alive[..., :1] * torch.randn(6)
    metrics = collapse_metrics(alive=alive, line=one_direction, point=torch.full_like(alive, 0.3))
    assert metrics["alive_rank"] > 4 and metrics["alive_std"].item() == pytest.approx(1, abs=0.1)
    assert metrics["line_rank"].item() == pytest.approx(1, abs=1e-4)
    assert metrics["point_rank"].item() == metrics["point_std"].item() == pytest.approx(0, abs=1e-6)
    noisy = collapse_metrics(view=0.3 + 1e-3 * torch.randn(9, 11, 6))
    assert noisy["view_std"] < 2e-3 and noisy["view_rank"] > 4  # noise has directions, too


class Own(Objective):
    """An objective of a user's own: of terms and diagnostics that a test gives."""

    terms = ("own",)

    def __init__(self, results, reads=()):
        super().__init__()
        self.results, self.reads = results, reads

    def forward(self, tensordict, keys):
        return self.results


ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (({"reward": ONE}, {}), "'reward'.*writes itself"),
        (({"own": ONE, "dynamics": ONE}, {}), "'dynamics'.*writes itself"),
        (({"own": ONE}, {"kl": ONE}), "'kl'.*writes itself"),
        (({"own": ONE}, {"loss_own": ONE}), "'loss_own'.*are summed"),
        (({"own": torch.ones(3, 5)}, {}), r"'own' of shape \[3, 5\].*mean"),
        (({"own": ONE}, {"seen": torch.ones(3, 5)}), r"diagnostic 'seen' of shape \[3, 5\].*mean"),
        (({"own": ONE}, {"seen": 1.0}), "diagnostic 'seen' as a float; expected a tensor"),
        (({"owned": ONE}, {}), r"the terms \['owned'\], and its `terms` are \('own',\)"),
        (ONE, "returned a Tensor; expected two dicts"),
    ],
)
def test_what_an_objective_of_ones_own_returns_replaces_nothing_and_is_a_number(results, said):
    agent = tiny_agent(images=False)
    with pytest.raises(ValueError, match=f"Own.*{said}"):
        R2DreamerWorldModelLoss(agent.world_model, Own(results))(tiny_records(agent))
    losses, _ = R2DreamerWorldModelLoss(agent.world_model, Own(({"own": ONE}, {"seen": ONE})))(tiny_records(agent))
    assert losses["loss_own"] == losses["seen"] == 1
    model = TensorDictSequential(*[each for each in agent.world_model.module if "continue" not in str(each.out_keys)])
    for name, results in (("own", [{"own": ONE}, TensorDict()]), ("continue", ({"continue": ONE}, {}))):
        own = Own(results)
        own.terms = (name,)  # "continue": the model has no such head
        R2DreamerWorldModelLoss(model, own)(tiny_records(agent))


def test_what_an_objective_reads_is_asked_for_by_name_where_a_head_has_another_one():
    network = lambda sizes: latent_head(ProjectionHead(sizes.features, sizes.embedding), ["view"], prefix=("next",))
    agent = tiny_agent(images=False, heads={"projection": network})
    loss = R2DreamerWorldModelLoss(agent.world_model, Own(({"own": ONE}, {}), ("projected_latents",)))
    with pytest.raises(ValueError, match=r"projected_latents is missing(?s:.*)set_keys\(projected_latents="):
        loss(tiny_records(agent))
    loss.set_keys(projected_latents="view")
    assert loss(tiny_records(agent))[0]["loss_own"] == 1


@pytest.mark.parametrize("reads", [("projected_latent",), "encoded_latents"])
def test_what_an_objective_reads_are_accepted_keys(reads):
    with pytest.raises(ValueError, match="Own.reads=.*expected a tuple.*(?s:.*)'projected_latents'"):
        R2DreamerWorldModelLoss(tiny_agent(images=False).world_model, Own(ONE, reads))

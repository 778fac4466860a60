"""NE-Dreamer, Dreamer-CDP and SIGReg against naive loops in float64, and the routes their gradients take and do not take."""

import cmath
import math

import numpy as np
import pytest
import torch
from agents import tiny_agent, tiny_records
from launcher import config
from tensordict import TensorDict
from torch import nn

from r2dreamer.dreamer import ActionSpace, ObservationSpace, belief_prediction_head, build_agent, next_embedding_head
from r2dreamer.dreamer.networks.heads import projection_head
from r2dreamer.dreamer.networks.prediction import CausalPrediction
from r2dreamer.examples.train import Learner
from r2dreamer.losses import DreamerCDP, NextEmbedding, R2DreamerWorldModelLoss, SIGReg

KEYS = R2DreamerWorldModelLoss.default_keys()
NEXT_HEADS = {"projection": projection_head, "prediction": next_embedding_head}
BELIEF_HEAD = {"prediction": belief_prediction_head}
BATCH, TIME, FEATURES = 3, 5, 4


def views(seed=0):
    """Predictions, embeddings and records in which episodes begin at the second window's third step."""
    generator = torch.Generator().manual_seed(seed)
    k, e = (torch.randn(BATCH, TIME, FEATURES, generator=generator).requires_grad_() for _ in range(2))
    is_init = torch.zeros(BATCH, TIME, 1, dtype=torch.bool)
    is_init[0, 0] = is_init[1, 2] = True
    written = {"predicted_latents": k, "projected_latents": k, "encoded_latents": e}
    return k, e, TensorDict({"is_init": is_init, "next": written}, [BATCH, TIME])


def doubles(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


def test_next_embedding_equals_naive_loops_over_the_pairs_of_one_episode():
    k, e, records = views()
    terms, diagnostics = NextEmbedding(0.5, redundancy_weight=0.1, factor=3.0)(records, KEYS)
    predicted, embedding = doubles(k, e)
    pairs = [
        (predicted[b, t], embedding[b, t + 1])
        for b in range(BATCH)
        for t in range(TIME - 1)
        if not records["is_init"][b, t + 1]
    ]
    assert len(pairs) == BATCH * (TIME - 1) - 1

    def unit(side, i):
        values = [pair[side][i] for pair in pairs]
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return [(value - mean) / std for value in values]

    invariance = redundancy = 0.0
    for i in range(FEATURES):
        for j in range(FEATURES):
            c = sum(a * b for a, b in zip(unit(0, i), unit(1, j), strict=True)) / len(pairs)
            if i == j:
                invariance += (c - 1) ** 2
            else:
                redundancy += 0.1 * c**2
    assert terms["next_embedding"].item() == pytest.approx(1.5 * (invariance + redundancy), rel=1e-5)
    assert diagnostics["next_invariance"].item() == pytest.approx(invariance, rel=1e-5)


def test_flags_may_lack_their_last_dimension():
    _, _, records = views()
    head = CausalPrediction(FEATURES, 2, width=8)
    inputs = records["next", "projected_latents"], torch.randn(BATCH, TIME, 2)
    expected = NextEmbedding()(records, KEYS)[0]["next_embedding"], head(*inputs, records["is_init"])
    flags = records["is_init"].squeeze(-1)
    found = NextEmbedding()(records.set("is_init", flags), KEYS)[0]["next_embedding"], head(*inputs, flags)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("pairs", [0, 1])
def test_without_two_pairs_of_one_episode_nothing_is_learned(pairs):
    k, e, records = views()
    records["is_init"][:] = True
    records["is_init"][0, 1 : pairs + 1] = False
    terms, _ = NextEmbedding()(records, KEYS)
    terms["next_embedding"].backward()
    assert terms["next_embedding"].item() == FEATURES and not k.grad.any()


def test_next_embedding_teaches_the_predictions_that_have_a_next_step_in_their_episode():
    k, e, records = views()
    NextEmbedding()(records, KEYS)[0]["next_embedding"].backward()
    assert e.grad is None
    learns = k.grad.abs().sum(-1) > 0
    expected = torch.ones(BATCH, TIME, dtype=torch.bool)
    expected[:, -1] = expected[1, 1] = False
    assert torch.equal(learns, expected)


def test_a_prediction_sees_its_episode_so_far_and_the_action_that_leads_on():
    torch.manual_seed(0)
    head = CausalPrediction(FEATURES, 2, width=8, layers=2, attention_heads=2)
    k, action = torch.randn(1, TIME, FEATURES).requires_grad_(), torch.randn(1, TIME, 2).requires_grad_()
    is_init = torch.zeros(1, TIME, 1, dtype=torch.bool)
    is_init[0, 2] = True
    for t, steps, actions in ((1, {0, 1}, {1, 2}), (3, {2, 3}, {3, 4}), (4, {2, 3, 4}, {3, 4})):
        predicted = head(k, action, is_init)[0, t].square().sum()
        gradients = torch.autograd.grad(predicted, (k, action))
        seen = [{s for s in range(TIME) if gradient[0, s].abs().sum() > 0} for gradient in gradients]
        assert seen == [steps, actions]
    with torch.no_grad():  # where PyTorch takes a fused path
        torch.testing.assert_close(head.eval()(k, action, is_init), head.train()(k, action, is_init))


def test_cdp_equals_naive_loops():
    k, e, records = views()
    terms, diagnostics = DreamerCDP(0.5, factor=10.0)(records, KEYS)
    total = 0.0
    for predicted, embedding in zip(*(view.reshape(-1, FEATURES) for view in doubles(k, e)), strict=True):
        dot, one, two = (sum(a * b for a, b in pair) for pair in _products(predicted, embedding))
        total += dot / math.sqrt(one * two)
    mean = total / (BATCH * TIME)
    assert terms["cdp"].item() == pytest.approx(5 * (1 - mean), rel=1e-5)
    assert diagnostics["cdp_cosine"].item() == pytest.approx(mean, rel=1e-5)
    terms["cdp"].backward()
    assert k.grad.abs().sum() > 0 and e.grad is None


def _products(one, two):
    return zip(one, two, strict=True), zip(one, one, strict=True), zip(two, two, strict=True)


def test_sigreg_equals_naive_loops():
    k, e, records = views()
    torch.manual_seed(5)
    terms, diagnostics = SIGReg(0.5, gaussian=0.2, directions=7)(records, KEYS)
    torch.manual_seed(5)
    (drawn,) = doubles(torch.randn(7, FEATURES))
    projected, embedding = (view.reshape(-1, FEATURES) for view in doubles(k, e))
    samples, statistic = len(embedding), 0.0
    for direction in drawn:
        direction = direction / math.sqrt(sum(each**2 for each in direction))
        heights = []
        points = np.linspace(-5, 5, 17)
        for t in points:
            found = sum(cmath.exp(1j * t * float(row @ direction)) for row in embedding) / samples
            heights.append(abs(found - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2))
        area = sum((a + b) / 2 * (points[1] - points[0]) for a, b in zip(heights, heights[1:], strict=False))
        statistic += samples * area / len(drawn)
    agreement = ((projected - embedding) ** 2).mean()
    assert diagnostics["sigreg_statistic"].item() == pytest.approx(statistic, rel=1e-4)
    assert terms["sigreg"].item() == pytest.approx(0.5 * (agreement + 0.2 * statistic), rel=1e-4)
    terms["sigreg"].backward()
    assert k.grad.abs().sum() > 0 and e.grad.abs().sum() > 0


def test_sigreg_tells_a_normal_distribution_from_a_collapsed_and_from_a_narrow_one():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(8, 64, FEATURES, generator=generator)

    def statistic(e):
        records = TensorDict({"next": {"projected_latents": e, "encoded_latents": e}}, e.shape[:2])
        return SIGReg(directions=64)(records, KEYS)[1]["sigreg_statistic"].item()

    assert 20 * statistic(normal) < statistic(0.3 * normal) < statistic(0 * normal)


def gradients(heads, objective, **shape):
    """Which parts of an agent learn from the objective's term alone."""
    agent = tiny_agent(heads=heads)
    losses, _ = R2DreamerWorldModelLoss(agent.world_model, objective)(tiny_records(agent, **shape))
    losses[f"loss_{objective.terms[0]}"].backward()
    modules = agent.parts() | {"posterior": agent.posterior, "core": agent.prior.core, "prior": agent.prior.head}
    del modules["rssm"]
    return {
        name for name, part in modules.items() if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }


def test_the_routes_of_next_embedding_through_an_agent():
    learns = gradients(NEXT_HEADS, NextEmbedding())
    assert learns == {"encoder", "posterior", "core", "projection", "prediction"}


def test_the_routes_of_cdp_through_an_agent():
    assert gradients(BELIEF_HEAD, DreamerCDP()) == {"encoder", "posterior", "core", "prediction"}
    # The first belief knows no observation of the window: nothing but the target holds the encoder's output.
    assert gradients(BELIEF_HEAD, DreamerCDP(), time=1) == {"core", "prediction"}


def test_the_routes_of_sigreg_through_an_agent():
    learns = gradients({"projection": projection_head}, SIGReg())
    assert learns == {"encoder", "posterior", "core", "projection"}


def test_what_makes_no_sense_is_refused_at_construction():
    with pytest.raises(ValueError, match="directions=0"):
        SIGReg(directions=0)
    with pytest.raises(ValueError, match="width=6 must be even and a multiple of attention_heads=4"):
        CausalPrediction(FEATURES, 2, width=6)
    for objective in (NextEmbedding(), DreamerCDP()):
        with pytest.raises(ValueError, match=r"lacks \('next', 'predicted_latents'\), from a prediction head"):
            R2DreamerWorldModelLoss(tiny_agent(heads={}).world_model, objective)


def test_parts_have_learning_rates_of_their_own_and_unknown_parts_are_refused():
    sizes = dict(belief=16, hidden=8, classes=4, depth=2)
    agent = build_agent(ObservationSpace({}, {"speed": 4}), ActionSpace(2, True), heads=BELIEF_HEAD, **sizes)
    cfg = config("algorithm=dreamercdp", "algorithm.optimizer.lr=1e-3")
    optimizer = Learner(agent, cfg.algorithm, torch.float32).optimizer
    rates = {group["name"]: pytest.approx(group["lr"]) for group in optimizer.param_groups}
    assert rates == {
        "model": 1e-3, "actor": 1e-3, "value": 1e-3, "encoder": 1.5e-4, "rssm": 1e-2, "prediction": 1e-2,
    }  # fmt: skip
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in nn.ModuleList(agent.parts().values()).parameters() if p.requires_grad]
    assert {id(p) for p in grouped} == {id(p) for p in trained} and len(grouped) == len(trained)
    cfg.algorithm.optimizer.lr_factors = {"encodr": 2.0}
    with pytest.raises(ValueError, match=r"lr_factors names encodr; the agent has encoder, rssm"):
        Learner(agent, cfg.algorithm, torch.float32)

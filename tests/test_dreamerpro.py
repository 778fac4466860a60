"""DreamerPro against naive loops and recorded values; who gets a gradient, who follows, what a checkpoint keeps."""

import pathlib
from copy import deepcopy

import numpy as np
import pytest
import torch
from agents import BATCH, TIME, tiny_agent, tiny_records
from launcher import CARTPOLE, train_here
from test_resume import gone_on
from torch import nn

from r2dreamer.dreamer import RandomShift
from r2dreamer.examples.training.learner import parameter_counts
from r2dreamer.losses import DreamerActorLoss, DreamerPro, DreamerValueLoss, R2DreamerWorldModelLoss, sinkhorn

RECORDED = pathlib.Path(__file__).parent / "data" / "loss_values.npz"
SMALL = dict(prototypes=6, size=3, temperature=0.3)


def made(**options):
    agent = tiny_agent(heads={})
    objective = DreamerPro.of(agent, **{**SMALL, **options})
    return agent, objective, R2DreamerWorldModelLoss(agent.world_model, objective)


def test_a_copied_loss_teaches_the_modules_that_its_copy_reads():
    agent, _, loss = made()
    ids = lambda tensors: {id(tensor) for tensor in tensors}
    weights = lambda part: ids(p for p in part.world_model_params.values(True, True) if p.requires_grad)
    value = DreamerValueLoss(agent.value_model)
    actor = DreamerActorLoss(agent.actor, agent.value_model, agent.imagination, imagination_horizon=3)
    copied, critic, policy = deepcopy(torch.nn.ModuleList([loss, value, actor]))
    assert ids(copied.representation.encoder.parameters()) <= weights(copied) and not weights(copied) & weights(loss)
    assert ids(policy.model_based_env.prior.parameters()) <= weights(copied)
    critics = ids(critic.value_model_params.values(True, True))
    assert ids(policy.value_model.parameters()) <= critics >= ids(critic.bootstrap_model.parameters())
    for one, other in ((loss, copied), (value, critic), (actor, policy)):
        assert list(one.state_dict()) == list(other.state_dict())
    records, out = tiny_records(agent), []
    for each in (loss, copied):
        torch.manual_seed(0)
        out.append(each(records.clone())[0])
    assert (out[0] == out[1]).all()


def gradient_sum(module):
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)


def test_sinkhorn_equals_the_official_values():
    recorded = {name: torch.from_numpy(value) for name, value in np.load(RECORDED).items()}
    plan = sinkhorn(recorded["sinkhorn_scores"])
    torch.testing.assert_close(plan, recorded["sinkhorn_out"], rtol=1e-5, atol=1e-7)


def naive_sinkhorn(scores, eps, iterations):
    plan = np.exp(scores / eps)
    plan /= plan.sum()
    rows, columns = plan.shape
    for _ in range(iterations):
        for k in range(rows):
            plan[k] /= plan[k].sum() * rows
        for n in range(columns):
            plan[:, n] /= plan[:, n].sum() * columns
    return plan * columns


def test_sinkhorn_equals_naive_loops():
    scores = torch.randn(4, 9, requires_grad=True)
    plan = sinkhorn(scores, eps=0.3, iterations=5)
    expected = naive_sinkhorn(scores.detach().double().numpy(), 0.3, 5)
    torch.testing.assert_close(plan.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-7)
    assert not plan.requires_grad
    torch.testing.assert_close(plan.sum(0), torch.ones(9))


def naive_terms(objective, embedding, slow, latents):
    """The three terms in float64 from [2B, T, n] embeddings and latents, sample by sample."""
    array = lambda tensor: tensor.detach().double().numpy()
    apply = lambda layer, rows: rows @ array(layer.weight).T + array(layer.bias)
    unit = lambda row: row / np.sqrt((row**2).sum())
    slow = apply(objective.slow_projection, array(slow))
    projected = [
        apply(objective.embedding_projection, array(embedding)),
        apply(objective.latent_projection, array(latents)),
    ]
    prototypes = [unit(row) for row in array(objective.prototypes)]
    places = [(b, t) for b in range(BATCH) for t in range(1, TIME)]
    targets = []
    for first in (0, BATCH):
        scores = np.array([[unit(slow[first + b, t]) @ c for b, t in places] for c in prototypes])
        targets.append(naive_sinkhorn(scores, objective.sinkhorn_eps, objective.sinkhorn_iterations))

    def cross_entropy(values, sequence, step, target):
        logits = np.array([unit(values[sequence, step]) @ c for c in prototypes]) / objective.temperature
        return -target @ (logits - np.log(np.exp(logits).sum()))

    swapped = temporal = 0.0
    for copy, first in enumerate((0, BATCH)):
        for n, (b, t) in enumerate(places):
            swapped += cross_entropy(projected[0], first + b, t, targets[1 - copy][:, n]) / (2 * len(places))
            temporal += cross_entropy(projected[1], first + b, t, targets[copy][:, n]) / (2 * len(places))
    norm = sum(((np.sqrt((values**2).sum(-1)) - 1) ** 2).mean() for values in projected)
    return {"swapped": swapped, "temporal": temporal, "norm": norm}


class Alternately(nn.Module):
    """Leaves the first copy as it is and inverts the second one: whose assignment is predicted makes a difference."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, records):
        self.calls += 1
        return records if self.calls % 2 else inverted(records)


def inverted(records):
    other = records.clone()
    other["next", "pixels"] = 255 - other["next", "pixels"]
    other["next", "speed"] = -other["next", "speed"]
    return other


def test_the_terms_equal_naive_loops():
    agent, objective, _ = made(weight=0.5, augmentation=Alternately())
    with torch.no_grad():
        for parameter in objective.slow_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    records = tiny_records(agent)
    torch.manual_seed(3)
    terms, _ = objective(records.copy(), R2DreamerWorldModelLoss.default_keys())
    torch.manual_seed(3)
    copies = torch.cat([records, inverted(records)])
    slow = objective.slow_encoder(copies.copy())["next", "encoded_latents"]
    after = agent.rollout(agent.encoder(copies))["next"]
    expected = naive_terms(objective, after["encoded_latents"], slow, torch.cat([after["state"], after["belief"]], -1))
    assert terms.keys() == expected.keys() == set(objective.terms)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(0.5 * value, rel=1e-4), name


def test_it_teaches_encoder_latents_and_projections_but_neither_targets_nor_frozen_prototypes():
    agent, objective, loss = made(frozen_updates=2, augmentation=RandomShift(pad=2))
    records = tiny_records(agent)
    for update in range(3):
        loss.zero_grad()
        losses, _ = loss(records)
        assert {f"loss_{name}" for name in objective.terms} <= set(losses.keys()) & set(loss.out_keys)
        sum(losses[f"loss_{name}"] for name in objective.terms).backward()
        for part in (agent.encoder, agent.posterior, agent.prior.core, objective.embedding_projection):
            assert gradient_sum(part) > 0
        assert gradient_sum(objective.latent_projection) > 0
        assert gradient_sum(agent.reward) == gradient_sum(agent.prior.head) == 0
        for slow in (objective.slow_encoder, objective.slow_projection):
            assert all(p.grad is None and not p.requires_grad for p in slow.parameters())
        assert (objective.prototypes.grad.abs().sum() > 0) == (update == 2)
        objective.after_update()


def test_each_term_takes_its_own_way():
    routes = {"swapped": (True, False), "temporal": (False, True), "norm": (True, True)}
    for term, (embedding, latents) in routes.items():
        _, objective, loss = made()
        loss(tiny_records(tiny_agent()))[0][f"loss_{term}"].backward()
        assert (gradient_sum(objective.embedding_projection) > 0) == embedding, term
        assert (gradient_sum(objective.latent_projection) > 0) == latents, term


def test_the_slow_encoder_first_copies_and_then_follows_and_the_prototypes_stay_unit_vectors():
    agent, objective, _ = made(ema_rate=0.25)
    pairs = list(zip(objective.slow_encoder.parameters(), agent.encoder.parameters(), strict=True))
    pairs += zip(objective.slow_projection.parameters(), objective.embedding_projection.parameters(), strict=True)
    with torch.no_grad():
        for _, fast in pairs:
            fast.add_(1)
        objective.prototypes.mul_(3)
    objective.after_update()
    assert all(torch.equal(slow, fast) for slow, fast in pairs)
    torch.testing.assert_close(objective.prototypes.norm(dim=-1), torch.ones(6))
    with torch.no_grad():
        for _, fast in pairs:
            fast.add_(1)
    objective.after_update()
    for slow, fast in pairs:
        torch.testing.assert_close(fast - slow, torch.full_like(slow, 0.75), rtol=1e-4, atol=1e-4)


def test_the_world_models_parameters_are_not_owned_twice():
    agent, objective, loss = made()
    own = {id(p) for p in objective.parameters()}
    assert not own & {id(p) for part in agent.parts().values() for p in part.parameters()}
    trained = [p for p in loss.parameters() if p.requires_grad]
    assert len(trained) == len({id(p) for p in trained})
    assert any(p is objective.prototypes for p in trained)


def test_bad_arguments_are_refused():
    wrong = dict(prototypes=0, temperature=0.0, sinkhorn_iterations=0, ema_rate=0.0, frozen_updates=-1)
    for options in (
        *({name: value} for name, value in wrong.items()),
        dict(dropped_steps=-1),
        dict(dropped_steps=TIME),
    ):
        with pytest.raises(ValueError, match="|".join([*options, "batch_length"])):
            _, _, loss = made(**options)
            loss(tiny_records(tiny_agent()))


def test_a_run_trains_saves_its_slow_networks_and_goes_on_bit_for_bit(tmp_path):
    few = [*CARTPOLE, "algorithm=dreamerpro", "algorithm.representation.prototypes=50", "total_frames=60"]
    few += ["algorithm.optimizer.lr=1e-2", "algorithm.optimizer.warmup_steps=1"]
    trainer = train_here(tmp_path, *few)
    objective = trainer.learner.world_model_loss.representation
    assert objective.updates == trainer.count["updates"] > 5
    embedding, latents = trainer.agent.encoder.out_features, sum(trainer.agent.latent_sizes.values())
    projections = (embedding + 1 + latents + 1) * 32
    counts = parameter_counts(trainer.agent, trainer.learner)
    assert counts == trainer.agent.parameter_counts() | {"objective": 50 * 32 + projections}
    slow, fast = (next(iter(each.parameters())) for each in (objective.slow_encoder, trainer.agent.encoder))
    assert not torch.equal(slow, fast)
    gone_on(trainer, *few)

"""Objectives over two processes: losses and gradients, averaged, are those of the joined batch, in few bytes."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from agents import tiny_agent
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import PercentileValueNorm

from r2dreamer.envs import make_replay
from r2dreamer.examples.timing.traffic import traffic
from r2dreamer.examples.training.ranks import Ranks
from r2dreamer.losses import (
    BarlowTwins,
    CategoricalKL,
    DreamerActorLoss,
    DreamerCDP,
    DreamerPro,
    GaussianKL,
    InfoNCE,
    NextEmbedding,
    R2DreamerWorldModelLoss,
    SIGReg,
    VICReg,
    collapse_metrics,
    gather_ranks,
)

SAMPLES, FEATURES = 12, 3
EMBEDDING, WIDE = 4, 20  # fewer features than samples: sums are sent; more: rows
OBJECTIVES = {
    "barlow": lambda: BarlowTwins(weight=0.5, redundancy_weight=0.1),
    "barlow, attached": lambda: BarlowTwins(weight=0.5, redundancy_weight=0.1, detach_target=False),
    "infonce": lambda: InfoNCE(temperature=0.5),
    "vicreg": lambda: VICReg(covariance=0.3),
    "next embedding": lambda: NextEmbedding(redundancy_weight=0.1),
    "cdp": lambda: DreamerCDP(factor=1.0),
    "sigreg": lambda: SIGReg(directions=6),
}
BOTH_LEARN = ("barlow, attached", "vicreg", "sigreg")
MATRICES = ("barlow", "barlow, attached", "vicreg", "next embedding")
CASES = [*((which, EMBEDDING) for which in OBJECTIVES), *((which, WIDE) for which in MATRICES)]


def loss_and_gradients(rows, which, features=EMBEDDING, rank=0):
    """Of a projection and an encoder on these rows [N, 3], shaped as sequences of three; ranks draw random numbers apart."""
    torch.manual_seed(0)
    projection, encoder = (nn.Linear(FEATURES, features) for _ in range(2))
    k, e = (network(rows).unflatten(0, (-1, 3)) for network in (projection, encoder))
    is_init = (rows[:, :1] > 0.5).unflatten(0, (-1, 3))
    written = {"projected_latents": k, "predicted_latents": k, "encoded_latents": e}
    views = TensorDict({"is_init": is_init, "next": written}, k.shape[:2])
    torch.manual_seed(7 + rank)
    terms, _ = OBJECTIVES[which]()(views, R2DreamerWorldModelLoss.default_keys())
    (loss,) = terms.values()
    loss.backward()
    parameters = [*projection.parameters(), *encoder.parameters()]
    return loss.detach(), [parameter.grad for parameter in parameters if parameter.grad is not None]


def dreamerpro_loss_and_gradients(rows):
    """The mean over the rows of terms of which only the assignment is a statistic of the batch."""
    torch.manual_seed(0)
    encoder = TensorDictModule(nn.Linear(FEATURES, EMBEDDING), ["x"], ["e"])
    rollout = TensorDictModule(lambda e: (e.sin(), e.cos()), ["e"], [("next", "state"), ("next", "belief")])
    options = dict(prototypes=5, size=3, frozen_updates=0, dropped_steps=0)
    objective = DreamerPro(encoder, rollout, EMBEDDING, 2 * EMBEDDING, **options)
    rows = rows.unflatten(0, (2, -1))
    terms, _ = objective(TensorDict({"x": rows}, rows.shape[:2]), R2DreamerWorldModelLoss.default_keys())
    sum(terms.values()).backward()
    parameters = [*encoder.parameters(), *objective.parameters()]
    return sum(terms.values()).detach(), [each.grad for each in parameters if each.grad is not None]


DIVERGENCES = {"V1": GaussianKL(), "V2": CategoricalKL(average_first=True)}


def kl_and_gradients(rows, which):
    """Of rows [N, 3] and what lies near or far from them; only the mean of all is above the free nats."""
    weight = torch.full((2, FEATURES), 0.1, requires_grad=True)
    posterior, prior = (side * weight[0] for side in (rows, -rows))
    if which == "V1":
        posterior, prior = (torch.stack([each, weight[1].exp().expand_as(each)], -1) for each in (posterior, prior))
    else:
        posterior, prior = ((each * 10 + weight[1]).unsqueeze(-2) for each in (posterior, prior))
    logits = TensorDict({"posterior_logits": posterior, "prior_logits": prior}, rows.shape[:1]).unsqueeze(0)
    terms, _ = DIVERGENCES[which](TensorDict({"next": logits}, [1]), R2DreamerWorldModelLoss.default_keys())
    sum(terms.values()).backward()
    return sum(terms.values()).detach(), [weight.grad]


def near_and_far():
    """The first rank's rows are near, the second's far."""
    return joined_batch() * torch.tensor([0.1, 12.0]).repeat_interleave(SAMPLES // 2)[:, None]


def returns_and_scale(rank):
    """Of what an actor loss imagines on this rank, and what it divides advantages by."""
    agent = tiny_agent(images=False, num_bins=15)
    torch.nn.init.normal_(agent.reward.layers[-1].weight, std=0.5)  # or rewards, and returns, are 0
    loss = DreamerActorLoss(agent.actor, agent.value_model, agent.imagination, imagination_horizon=3)
    torch.manual_seed(rank)
    _, imagined = loss(TensorDict({key: torch.randn(8, size) for key, size in agent.latent_sizes.items()}, [8]))
    return imagined["lambda_target"], loss.return_norm.scale()


def joined_batch():
    return torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(1))


def one_rank(out):
    """What `torchrun` starts twice."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mine = joined_batch().chunk(2)[rank]
    results = {}
    with traffic() as sent:
        for case in CASES:
            sent.clear()
            loss, gradients = loss_and_gradients(mine, *case, rank)
            total = sum(sent.values())
            results[case] = *averaged(loss, gradients), total
    for which in DIVERGENCES:
        results[which] = averaged(*kl_and_gradients(near_and_far().chunk(2)[rank], which))
    results["dreamerpro"] = averaged(*dreamerpro_loss_and_gradients(mine))
    results["collapse"] = collapse_metrics(view=mine), collapse_metrics(view=torch.ones_like(mine))
    results["returns"] = returns_and_scale(rank)
    torch.save(results, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def averaged(loss, gradients):
    """As data-parallel training does."""
    for value in (loss, *gradients):
        torch.distributed.all_reduce(value)
        value /= 2
    return loss, gradients


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(("which", "features"), CASES)
def test_two_processes_equal_one_on_the_joined_batch(which, features, saved):
    halves = [loss_and_gradients(half, which, features)[0] for half in joined_batch().chunk(2)]
    expected, gradients = loss_and_gradients(joined_batch(), which, features)
    assert len(gradients) == (4 if which in BOTH_LEARN else 2)
    if which != "cdp":  # a mean over samples
        assert not torch.allclose(sum(halves) / 2, expected, rtol=1e-2)  # half a batch has another correlation
    check_equal(saved, (which, features), expected, gradients)


@pytest.mark.parametrize("which", MATRICES)
def test_matrices_are_summed_or_rows_gathered_whichever_is_fewer_bytes_and_nothing_is_sent_backwards(which, saved):
    matrix, rows = 4 * EMBEDDING**2, 4 * SAMPLES // 2 * WIDE
    few = 4 * (6 * EMBEDDING + 1)  # two means of both views, their variances, and how many rows count
    assert {results[which, EMBEDDING][2] for results in saved} == {matrix + few}
    keep = 4 * SAMPLES // 2
    expected = {"next embedding": 2 * rows * 2 // 3 + keep * 2 // 3}.get(
        which, 2 * rows
    )  # two of three steps have a next
    assert {results[which, WIDE][2] for results in saved} == {expected}


def test_other_objectives_send_no_view_twice(saved):
    rows = 4 * SAMPLES // 2 * EMBEDDING
    assert saved[0]["infonce", EMBEDDING][2] == rows  # targets
    assert saved[0]["cdp", EMBEDDING][2] == 0
    assert saved[0]["sigreg", EMBEDDING][2] == 4 * 6 * (EMBEDDING + 2 * 9)  # directions, cosines and sines


def test_collapse_metrics_are_of_all_rows(saved):
    for results in saved:
        found, collapsed = results["collapse"]
        for name, value in collapse_metrics(view=joined_batch()).items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0)
        assert not any(collapsed.values())


def test_dreamerpro_assigns_the_joined_batch_to_its_prototypes(saved):
    halves = [dreamerpro_loss_and_gradients(half)[0] for half in joined_batch().chunk(2)]
    expected, gradients = dreamerpro_loss_and_gradients(joined_batch())
    assert len(gradients) == 7  # a weight and a bias of the encoder and of both projections, and the prototypes
    assert not torch.allclose(sum(halves) / 2, expected, rtol=1e-3)  # the halves, each assigned by itself
    check_equal(saved, "dreamerpro", expected, gradients)


@pytest.mark.parametrize("which", DIVERGENCES)
def test_free_nats_are_those_of_the_mean_over_all_ranks(which, saved):
    near, _ = near_and_far().chunk(2)
    assert not kl_and_gradients(near, which)[1][0].any()  # alone it lies below them
    check_equal(saved, which, *kl_and_gradients(near_and_far(), which))


def test_returns_are_divided_by_the_range_of_those_of_all_ranks(saved):
    (first, scale), (second, other) = (results["returns"] for results in saved)
    expected = []
    for returns in (torch.cat([first, second]), first):
        norm = PercentileValueNorm(quantiles=(0.05, 0.95), rate=0.01)
        norm.update(returns)
        expected.append(norm.scale())
    assert scale == other == expected[0] != expected[1]


def check_equal(saved, which, expected, gradients):
    for results in saved:
        loss, found, *_ = results[which]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for one, other in zip(found, gradients, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6  # the bias' gradient is 0


def test_a_refusal_says_that_its_numbers_are_of_one_rank():
    for count, note in ((2, ["These are numbers of one rank, and settings are of all 2: 2 times as many."]), (1, [])):
        refusing = Ranks.refusing_own(SimpleNamespace(count=count), MemoryError, ValueError)
        with pytest.raises(ValueError, match="a capacity of at least 6") as caught, refusing:
            make_replay(4, 1, 1, 5)
        assert getattr(caught.value, "__notes__", []) == note


def test_a_single_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert gather_ranks(rows) is rows


if __name__ == "__main__":
    one_rank(sys.argv[1])

"""Adaptive gradient clipping of weights that a network holds in pieces: as of the one matrix that they are."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_capture import Copies, Looks
from test_speed import learner
from torch import nn
from torchrl.trainers.algorithms import DreamerV3Optimizer

from r2dreamer.examples.training.setup import check_same_run
from r2dreamer.losses import DreamerOptimizer

OPTIONS = dict(lr=1e-2, warmup_steps=2)


def test_pieces_are_updated_as_one_matrix():
    """Gradients of sizes that are clipped, of one piece alone and not at all, beside a weight of its own."""
    generator = torch.Generator().manual_seed(0)
    whole, other = (torch.randn(*shape, generator=generator) for shape in ((3, 7), (5,)))
    joined, beside = nn.Parameter(whole.clone()), nn.Parameter(other.clone())
    theirs = DreamerV3Optimizer([joined, beside], **OPTIONS)
    left, right, alone = (nn.Parameter(value.clone()) for value in (whole[:, :2], whole[:, 2:], other))
    ours = DreamerOptimizer([{"params": [left, alone, right], "joint": [(0, 2)]}], **OPTIONS)
    apart = DreamerOptimizer([nn.Parameter(value.clone()) for value in (whole[:, :2], whole[:, 2:])], **OPTIONS)
    for size in (1.0, 100.0, 0.01, 10.0):
        gradient = size * torch.randn(3, 7, generator=generator)
        gradient[:, 2:] *= 20
        joined.grad, left.grad, right.grad = gradient.clone(), gradient[:, :2].clone(), gradient[:, 2:].clone()
        for piece, each in zip(apart.param_groups[0]["params"], (left, right), strict=True):
            piece.grad = each.grad.clone()
        beside.grad = size * torch.randn(5, generator=generator)
        alone.grad = beside.grad.clone()
        for optimizer in (theirs, ours, apart):
            optimizer.step()
        torch.testing.assert_close(torch.cat([left, right], 1), joined)
        torch.testing.assert_close(alone, beside)
    assert not torch.allclose(torch.cat(apart.param_groups[0]["params"], 1), joined, rtol=1e-3)


def test_a_piece_without_gradient_still_counts_in_the_weights_norm():
    left, right = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = DreamerOptimizer([{"params": [left, right], "joint": [(0, 1)]}], agc=0.5)
    left.grad = torch.tensor([10.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(left.grad, torch.tensor([1.0, 0.0]))  # 0.5 * |(1, 1, 1, 1)|
    assert optimizer.param_groups[0]["agc"] == 0.5


@pytest.mark.parametrize(
    ("member", "pairs"), [("r2dreamer", 2), ("dreamer", 2), ("dreamerpro", 2), ("dreamerv1", 1), ("dreamerv2", 1)]
)
def test_an_agents_pairs_are_found(member, pairs):
    made = learner(member=member)
    model, *others = made.optimizer.param_groups
    assert len(model["joint"]) == pairs and not any(group["joint"] for group in others)


def test_the_block_gru_and_the_posterior_are_clipped_as_the_official_matrices():
    """Of the recurrent cell the matrix [G, D/G + 3H, out/G], which sees each block's slice beside what all blocks see."""
    made = learner(agc=0.3)
    names = {id(p): name.rpartition("module.")[2] for name, p in made.named_parameters()}
    weights = {names[id(p)]: p for p in made.optimizer.param_groups[0]["params"]}
    pairs = [("core.hidden.weight", "core.hidden.shared_weight"), ("belief_in.weight", "embedding_in.weight")]
    before, torch_generator = {}, torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        scale = 30.0 if name in ("core.hidden.shared_weight", "embedding_in.weight") else 1.0
        weight.grad = scale * torch.randn(weight.shape, generator=torch_generator)
        before[name] = weight.grad.clone(), weight.detach().clone()
    made.optimizer.step()
    for pair in pairs:
        gradients, values = zip(*(before[name] for name in pair), strict=True)
        if "core" in pair[0]:
            blocks = len(values[0])
            gradients, values = (
                [block, shared.unflatten(0, (blocks, -1)).mT] for block, shared in (gradients, values)
            )  # [G, in/G, out/G], [G, 3H, out/G]
            gradient, value = torch.cat(gradients, 1), torch.cat(values, 1)
        else:
            gradient, value = torch.cat(gradients, 1), torch.cat(values, 1)
        divisor = gradient.norm() / (0.3 * value.norm())
        assert divisor > 10
        for name in pair:
            torch.testing.assert_close(weights[name].grad, before[name][0] / divisor)
    single = "core.gates.weight"
    divisor = before[single][0].norm() / (0.3 * before[single][1].norm())
    torch.testing.assert_close(weights[single].grad, before[single][0] / divisor)


def test_a_step_never_waits_for_its_device():
    weights = [nn.Parameter(torch.zeros(3, size, device="meta")) for size in (2, 4, 5)]
    optimizer = DreamerOptimizer([{"params": weights, "joint": [(0, 2)]}])
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    with Looks() as looks, Copies() as copies:
        optimizer.step()
    assert not looks.found and not copies.found


def test_the_state_of_torchrls_optimizer_is_continued_and_the_pairs_are_the_models():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    theirs = DreamerV3Optimizer(weights, lr=0.5)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    theirs.step()
    ours = DreamerOptimizer([{"params": weights, "joint": [(0, 1)]}], lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    (group,) = ours.param_groups
    assert (group["joint"], group["step"], group["lr"]) == ([[0, 1]], 1, 0.5)
    assert torch.equal(ours.state[weights[1]]["rms"], theirs.state[weights[1]]["rms"])
    again = DreamerOptimizer([{"params": weights, "joint": [(0, 1)]}])
    again.load_state_dict(ours.state_dict())
    assert again.param_groups[0]["joint"] == [[0, 1]] and again.param_groups[0]["step"] == 1


def test_a_run_of_torchrls_optimizer_is_resumed():
    before, now = (
        OmegaConf.create({"algorithm": {"optimizer": {"_target_": target, "lr": lr}}})
        for target, lr in (
            ("torchrl.trainers.algorithms.DreamerV3Optimizer", 1.0),
            ("r2dreamer.losses.DreamerOptimizer", 1.0),
        )
    )
    check_same_run(before, now, Path("checkpoint"))
    check_same_run(before, before, Path("checkpoint"))
    with pytest.raises(ValueError, match="algorithm.optimizer.lr="):
        check_same_run(before, OmegaConf.merge(now, {"algorithm": {"optimizer": {"lr": 2.0}}}), Path("checkpoint"))


def test_a_factor_for_no_group_is_refused():
    group = {"params": [nn.Parameter(torch.ones(1))], "name": "model"}
    with pytest.raises(ValueError, match=r"lr_factors names 'models', but the parameter groups are called \['model'\]"):
        DreamerOptimizer([group], lr_factors={"models": 0.1})


@pytest.mark.parametrize("joint", [[(0, 2)], [(0, 1), (1,)], [(-1, 0)]])
def test_pairs_that_cannot_be_are_refused(joint):
    with pytest.raises(ValueError, match=r"joint=\[.*must be positions in the group's 2 params"):
        DreamerOptimizer([{"params": [nn.Parameter(torch.ones(1)) for _ in range(2)], "joint": joint}])

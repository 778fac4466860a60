"""The pure functions against recorded values of the official implementation, naive float64 loops and hand-worked numbers."""

import pathlib

import numpy as np
import pytest
import torch
from torchrl.modules import SymExpTwoHot
from torchrl.objectives import two_hot_cross_entropy

from r2dreamer.losses import (
    TwoHotLikelihood,
    barlow_twins_loss,
    functional,
    imagination_weight,
    lambda_return,
    two_hot_nll,
)

# Random inputs with the outputs and gradients that the official implementation (at 546e4fa) computed from them.
RECORDED = pathlib.Path(__file__).parent / "data" / "loss_values.npz"


@pytest.fixture(scope="module")
def recorded():
    return {name: torch.from_numpy(value) for name, value in np.load(RECORDED).items()}


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def naive_barlow(projected, target):
    """Correlation by explicit loops in float64."""
    k, e = (view.double().numpy() for view in (projected, target))
    samples, features = k.shape
    k, e = ((view - view.mean(0)) / view.std(0, ddof=1) for view in (k, e))
    invariance = redundancy = 0.0
    for i in range(features):
        for j in range(features):
            correlation = sum(k[n, i] * e[n, j] for n in range(samples)) / samples
            if i == j:
                invariance += (correlation - 1) ** 2
            else:
                redundancy += correlation**2
    return invariance, redundancy


def naive_lambda_return(reward, bootstrap, last, terminal, discount, lmbda):
    """The recursion written out for one sequence after the other, in float64."""
    reward, bootstrap, last, terminal = (x.double().squeeze(-1).numpy() for x in (reward, bootstrap, last, terminal))
    batch, time = reward.shape
    returns = np.zeros((batch, time - 1))
    for b in range(batch):
        following = bootstrap[b, time - 1]
        for t in reversed(range(time - 1)):
            mix = 0.0 if last[b, t + 1] else lmbda
            value = (1 - mix) * bootstrap[b, t + 1] + mix * following
            following = reward[b, t + 1] + discount * (1 - terminal[b, t + 1]) * value
            returns[b, t] = following
    return torch.from_numpy(returns).unsqueeze(-1)


def test_barlow_equals_the_official_values_and_gradient(recorded):
    projected = recorded["barlow_projected"].clone().requires_grad_()
    invariance, redundancy = barlow_twins_loss(projected, recorded["barlow_target"], 5e-4)
    assert relative(invariance, recorded["barlow_invariance"]) < 1e-5
    assert relative(redundancy, 5e-4 * recorded["barlow_redundancy"]) < 1e-5
    (invariance + redundancy).backward()
    assert relative(projected.grad, recorded["barlow_grad_projected"]) < 1e-5


def test_barlow_equals_the_naive_loops():
    generator = torch.Generator().manual_seed(3)
    projected = torch.randn(11, 5, generator=generator)
    target = 0.3 * projected + torch.randn(11, 5, generator=generator)
    invariance, redundancy = barlow_twins_loss(projected, target, 1.0)
    expected = naive_barlow(projected, target)
    assert invariance.item() == pytest.approx(expected[0], rel=1e-5)
    assert redundancy.item() == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("constant", [0.0, 3.7, -1234.5])
def test_a_constant_feature_gives_zero_correlation_and_finite_gradients(constant):
    projected = torch.randn(13, 4)
    projected[:, 1] = constant
    projected.requires_grad_()
    target = torch.randn(13, 4)
    target[:, 1] = constant
    invariance, redundancy = barlow_twins_loss(projected, target, 1.0)
    without = barlow_twins_loss(projected[:, [0, 2, 3]], target[:, [0, 2, 3]], 1.0)
    assert invariance.item() == pytest.approx(without[0].item() + 1, rel=1e-4)  # C_11 = 0
    assert redundancy.item() == pytest.approx(without[1].item(), rel=1e-4)
    (invariance + redundancy).backward()
    assert projected.grad.isfinite().all()


def test_barlow_is_computed_in_float32_under_autocast():
    projected, target = torch.randn(40, 6), torch.randn(40, 6)
    plain = barlow_twins_loss(projected, target)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = barlow_twins_loss(projected, target)
    assert torch.equal(torch.stack(plain), torch.stack(mixed))


def test_barlow_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2"):
        barlow_twins_loss(torch.randn(1, 3), torch.randn(1, 3))


@pytest.fixture(params=["accumulate_steps", "accumulate_spans"])
def either_way(request, monkeypatch):
    """As on a CPU, and as on a GPU."""
    monkeypatch.setattr(functional, "accumulate_steps", getattr(functional, request.param))


@pytest.mark.usefixtures("either_way")
def test_lambda_return_equals_the_official_values(recorded):
    returns = lambda_return(*(recorded[f"lr_{name}"] for name in ("reward", "bootstrap", "last", "terminal")))
    torch.testing.assert_close(returns, recorded["lr_return"], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("time", [2, 5, 11, 17, 64])
def test_lambda_return_equals_the_naive_loop(time):
    generator, batch = torch.Generator().manual_seed(5), 7
    reward, bootstrap = (torch.randn(batch, time, 1, generator=generator) for _ in range(2))
    terminal = torch.rand(batch, time, 1, generator=generator) < 0.15
    last = terminal | (torch.rand(batch, time, 1, generator=generator) < 0.15)
    returns = lambda_return(reward, bootstrap, last, terminal, discount=0.9, lmbda=0.8)
    expected = naive_lambda_return(reward, bootstrap, last, terminal, 0.9, 0.8)
    torch.testing.assert_close(returns.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("either_way")
def test_lambda_return_by_hand():
    # Three states; rewards 1 and 2 come with states 1 and 2. discount 0.5, lambda 0.5, bootstrap 8 everywhere:
    # R_1 = 2 + 0.5 * (0.5 * 8 + 0.5 * 8) = 6; R_0 = 1 + 0.5 * (0.5 * 8 + 0.5 * 6) = 4.5
    reward = torch.tensor([[[9.0], [1.0], [2.0]]])
    bootstrap = torch.full((1, 3, 1), 8.0)
    returns = lambda_return(reward, bootstrap, discount=0.5, lmbda=0.5)
    assert returns.flatten().tolist() == [4.5, 6.0]
    # State 1 terminal: nothing follows its reward. Truncated: its own value follows, nothing later does.
    flag = torch.tensor([[[0.0], [1.0], [0.0]]])
    assert lambda_return(reward, bootstrap, flag, flag, discount=0.5, lmbda=0.5)[0, 0].item() == 1.0
    assert lambda_return(reward, bootstrap, flag, 0 * flag, discount=0.5, lmbda=0.5)[0, 0].item() == 5.0


def test_whole_and_half_numbers_are_computed_in_float32():
    reward, terminal = torch.tensor([0, 1, 1, 1]).view(1, 4, 1), torch.full((1, 4, 1), 0.5)
    values = torch.ones(1, 4, 1)
    expected = lambda_return(reward.float(), values, terminal=terminal)
    assert torch.equal(lambda_return(reward, values, terminal=terminal), expected)
    assert torch.equal(lambda_return(reward.bfloat16(), values.bfloat16(), terminal=terminal), expected)
    assert lambda_return(reward.double(), values.double(), terminal=terminal).dtype == torch.float64
    assert imagination_weight(values.bfloat16()).dtype == torch.float32


def test_imagination_weights_by_hand():
    continuation = torch.tensor([[[1.0], [0.5], [0.0], [1.0]]])
    assert imagination_weight(continuation, 0.5).flatten().tolist() == [0.5, 0.125, 0.0, 0.0]


def test_two_hot_equals_the_official_values(recorded):
    likelihood = TwoHotLikelihood()
    nll = likelihood(recorded["twohot_logits"], recorded["twohot_target"])
    torch.testing.assert_close(-nll, recorded["twohot_logprob"].reshape(nll.shape), rtol=1e-5, atol=1e-5)
    mean = likelihood.two_hot(recorded["twohot_logits"])
    torch.testing.assert_close(mean, recorded["twohot_mean"].reshape(mean.shape), rtol=1e-5, atol=1e-5)
    assert likelihood.two_hot(torch.zeros(3, 255)).tolist() == [[0.0]] * 3


def test_two_hot_equals_torchrls_for_several_targets_at_once():
    support = SymExpTwoHot(41).bins
    logits = torch.randn(7, 3, 41, requires_grad=True)
    spread = torch.tensor([0.0, 1e-3, 5.0, -300.0, 1e12, -1e12, support[7].item(), support[0].item()])
    targets = spread[torch.randint(len(spread), (7, 3, 5))]
    nll = two_hot_nll(logits, targets, support)
    expected = torch.stack([two_hot_cross_entropy(logits, target, support) for target in targets.unbind(-1)], -1)
    torch.testing.assert_close(nll, expected)
    weight = torch.randn_like(nll)
    gradients = [torch.autograd.grad((value * weight).sum(), logits)[0] for value in (nll, expected)]
    torch.testing.assert_close(*gradients)

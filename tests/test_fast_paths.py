"""What a GPU or a compiler computes in another order than a CPU: each against the plain way, with its gradients."""

import pytest
import torch
import torch.nn.functional as F
from agents import rssm_modules, tiny_agent, tiny_records
from tensordict.nn import TensorDictModule
from torch import nn

from r2dreamer.dreamer import ImageDecoder, ImageEncoder, compile_parts
from r2dreamer.dreamer.fast import TRICKS, convolutions, speed_up
from r2dreamer.dreamer.fast.casting import cast_once
from r2dreamer.dreamer.fast.convolutions import by_squares
from r2dreamer.dreamer.networks.layers import BlockLinear, Linear
from r2dreamer.losses import functional


def with_gradients(function, *inputs):
    inputs = [value.clone().requires_grad_() for value in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out.sin().sum(), inputs)]


def assert_same(one, other, **tolerance):
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, **tolerance)


@pytest.mark.parametrize("channels, kernel, height, width", [(3, 5, 8, 12), (1, 3, 6, 4), (9, 7, 10, 6), (4, 1, 4, 4)])
def test_squares_as_channels_convolve_as_pixels_do(channels, kernel, height, width):
    torch.manual_seed(0)
    value = torch.randn(2, channels, height, width, dtype=torch.float64)
    weight = torch.randn(5, channels, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)

    def plain(value, weight, bias):
        return F.max_pool2d(F.conv2d(value, weight, bias, padding="same"), 2).permute(0, 2, 3, 1)

    def squares(value, weight, bias):
        return by_squares(value, weight).amax(-2) + bias

    assert_same(with_gradients(plain, value, weight, bias), with_gradients(squares, value, weight, bias))


@pytest.mark.parametrize("channels, kernel", [(3, 5), (1, 3), (3, 4), (32, 5)])
def test_a_stage_gives_on_a_gpu_what_it_gives_on_a_cpu(channels, kernel):
    """Few channels, an even kernel, many channels: three ways to the same."""
    torch.manual_seed(0)
    value = torch.randn(2, channels, 8, 12, dtype=torch.float64)
    convolution = nn.Conv2d(channels, 7, kernel, padding="same", dtype=torch.float64)
    encoder = ImageEncoder((3, 16, 16), depth=2)
    inputs = value, *convolution.parameters()
    plain, faster = (
        [out := each(convolution, value), *torch.autograd.grad(out.sin().sum(), inputs)]
        for each in (encoder.pooled, convolutions.pooled)
        if value.requires_grad_() is not None
    )
    assert plain[0].shape == (2, 4, 6, 7)
    assert_same(plain, faster)


@pytest.mark.parametrize("time", [1, 2, 3, 16, 21])
def test_returns_over_spans_have_the_gradients_of_returns_over_steps(time):
    torch.manual_seed(0)
    shapes = (4, time, 1), (4, time, 1), (4, 1, 1)
    inputs = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    accumulate = functional.accumulate_steps, functional.accumulate_spans
    assert_same(*(with_gradients(each, *inputs) for each in accumulate))


def test_a_compiled_upsampling_is_the_interpolation():
    torch.manual_seed(0)
    value, decoder = torch.randn(2, 3, 4, 5), ImageDecoder(3, 8, (3, 16, 16), depth=2, units=4)
    plain = with_gradients(decoder.doubled, value)
    assert torch.equal(plain[0], value.repeat_interleave(2, 1).repeat_interleave(2, 2))
    speed_up(decoder, tricks=["convolutions"])
    assert_same(plain, with_gradients(torch.compile(decoder.doubled, backend="aot_eager"), value))


@pytest.fixture
def layers():
    torch.manual_seed(0)
    dense, block = Linear(6, 4), BlockLinear(8, 4, 2, shared_features=3)
    for parameter in (*dense.parameters(), *block.parameters()):
        nn.init.normal_(parameter)
    return nn.ModuleDict({"dense": dense, "block": block, "exact": Float32Linear(6, 4)})


def outputs(layers):
    torch.manual_seed(1)
    value, wide, shared = torch.randn(5, 6), torch.randn(5, 8), torch.randn(5, 3)
    dense, block = layers["dense"], layers["block"]
    with torch.autocast("cpu", enabled=False):
        exact = layers["exact"](value)
    return [dense(value), dense.joined(value[:, :2], value[:, 2:]), block(wide, shared), exact]


@torch.no_grad()
def test_weights_cast_once_compute_what_weights_cast_every_time_do(layers):
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # which has a memory of its own
        plain = outputs(layers)
        with cast_once(layers):
            assert layers["block"].read("shared_weight").dtype == torch.bfloat16
            assert all(map(torch.equal, plain, outputs(layers)))
            nn.init.zeros_(layers["dense"].weight)  # what it reads now is what was cast
            with cast_once(layers["dense"]):
                assert not torch.equal(outputs(layers)[0], plain[0])
            assert torch.equal(outputs(layers)[0], plain[0])
            with torch.enable_grad():
                assert outputs(layers)[0].requires_grad and not torch.equal(outputs(layers)[0], plain[0])
        assert layers["dense"].read("weight") is layers["dense"].weight
        assert not torch.equal(outputs(layers)[0], plain[0])


@torch.no_grad()
def test_layers_whose_weight_is_computed_or_wide_cast_as_ever():
    torch.manual_seed(0)
    made = nn.utils.parametrizations.weight_norm(Linear(6, 4))
    wide = Linear(6, 4).double()
    value = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        plain = made(value), wide(value.double())
        with cast_once(made, wide, lambda value: value):  # a policy may be any callable
            assert torch.equal(made(value), plain[0]) and torch.equal(wide(value.double()), plain[1])


def test_nothing_is_cast_for_gradients_or_without_autocast(layers):
    with torch.autocast("cpu", torch.bfloat16), cast_once(layers):
        assert layers["dense"].read("weight") is layers["dense"].weight
    with torch.no_grad(), cast_once(layers):
        assert layers["dense"].read("weight") is layers["dense"].weight
    with pytest.raises(KeyError), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), cast_once(layers):
        raise KeyError
    assert all(layer.cast is None for layer in layers.values())


def test_imagination_casts_prior_and_policy(monkeypatch):
    agent, seen, read = tiny_agent(), {}, Linear.read

    def watched(layer, name):
        seen[layer] = read(layer, name)
        return seen[layer]

    monkeypatch.setattr(Linear, "read", watched)
    start = tiny_records(agent).select("state", "belief").flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        agent.imagination.rollout(2, agent.actor, tensordict=start)
    within = [layer for part in (agent.prior, agent.actor) for layer in part.modules() if isinstance(layer, Linear)]
    assert len(within) > 5 and {seen[layer].dtype for layer in within} == {torch.bfloat16}


def test_a_module_of_ones_own_says_what_is_compiled_of_it():
    class Own(nn.Module):
        compiles = ("forward", "twice")

        def forward(self, value):
            return value + 1 + torch.compiler.is_compiling()

        def twice(self, value):
            return 2 * value + torch.compiler.is_compiling()

        def other(self, value):
            return value + torch.compiler.is_compiling()

    own, one = Own(), torch.ones(())
    assert (own(one), own.twice(one), own.other(one)) == (2, 2, 1)
    wrapped = TensorDictModule(own, ["in"], ["out"])
    compile_parts(wrapped, backend="eager")
    assert (own(one), own.twice(one), own.other(one)) == (3, 3, 1)
    assert wrapped._compiled_call_impl is None and "twice" not in vars(wrapped)  # it would guard all that a dict holds

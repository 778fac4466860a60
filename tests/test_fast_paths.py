"""What a GPU or a compiler computes in another order than a CPU: each against the plain way, with its gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from agents import tiny_agent
from tensordict.nn import TensorDictModule
from torch import nn

from r2dreamer.dreamer import CategoricalLatent, ImageDecoder, ImageEncoder, Linear, compile_parts
from r2dreamer.dreamer.fast import convolutions, speed_up
from r2dreamer.dreamer.fast.convolutions import by_squares
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


def test_copies_and_pickles_keep_what_makes_a_layer_fast():
    torch.manual_seed(0)
    agent = tiny_agent()
    with torch.no_grad():
        for twin in (copy.deepcopy(agent.prior), pickle.loads(pickle.dumps(agent.prior))):
            assert [type(module) for module in twin.modules()] == [type(module) for module in agent.prior.modules()]
            assert torch.equal(twin.logits(torch.ones(2, 16)), agent.prior.logits(torch.ones(2, 16)))


def test_a_subclass_of_ones_own_stays_as_it_is():
    class Own(Linear):
        pass

    layers = nn.ModuleList([Own(2, 3), Linear(2, 3)])
    speed_up(layers)
    assert type(layers[0]) is Own and isinstance(layers[1], Linear) and type(layers[1]) is not Linear


@pytest.mark.parametrize("fast", ["magic", ["magic"]])
def test_a_trick_that_does_not_exist_is_refused(fast):
    with pytest.raises(ValueError, match="fast names magic, .* deferred"):
        tiny_agent(fast=fast)


@pytest.mark.parametrize("classes", [2, 8, 15, 16, 32])
def test_the_narrow_softmax_is_torchs(classes):
    logits = 30 * torch.randn(5, 7, classes)
    latent, plain = CategoricalLatent(7, classes), CategoricalLatent(7, classes)
    speed_up(latent, tricks=["softmax"])
    torch.testing.assert_close(latent.probs(logits), plain.probs(logits))
    assert latent.probs(logits.requires_grad_()).requires_grad
    extreme = torch.tensor([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30]])
    torch.testing.assert_close(latent.probs(extreme), plain.probs(extreme))


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

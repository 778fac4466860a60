"""The encoder that strides: an object named in a configuration, in the place of the paper's convolutions."""

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from r2dreamer.dreamer import ActionSpace, ImageEncoder, ObservationSpace, StridedEncoder, build_agent
from r2dreamer.dreamer.networks.encoders import centred


def test_its_stages_are_strided_convolutions_each_normed_over_channels():
    torch.manual_seed(0)
    encoder = StridedEncoder((2, 16, 12), channels=(4, 6), kernels=(4, 3), strides=(4, 2))
    image = torch.randint(0, 256, (5, 2, 16, 12), dtype=torch.uint8)
    value = image / 255 - 0.5
    for convolution, stride, padding in zip(encoder.convolutions, (4, 2), (0, 1), strict=True):
        value = F.conv2d(value, convolution.weight, convolution.bias, stride, padding)
        value = F.silu(value / (value.square().mean(1, keepdim=True) + 1e-4).sqrt())
    expected = value.permute(0, 2, 3, 1).reshape(5, -1)
    found = encoder(image)
    assert encoder.out_features == found.shape[-1] == 6 * 2 * 2
    positions = found.reshape(5, 6, 2, 2).permute(0, 2, 3, 1).reshape(5, -1)
    torch.testing.assert_close(positions, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [StridedEncoder, lambda shape: ImageEncoder(shape, depth=2)])
def test_uint8_and_float_images_several_images_and_leading_dimensions_agree(make):
    encoder = make((6, 64, 64))
    first, second = torch.randint(0, 256, (2, 3, 5, 3, 64, 64), dtype=torch.uint8)
    together = encoder(first, second)
    assert together.shape == (3, 5, encoder.out_features)
    torch.testing.assert_close(together, encoder(torch.cat([first, second], -3)))
    torch.testing.assert_close(together, encoder(first / 255, second))
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float16, 0.02)):
        floats = torch.cat([first, second], -3).div(255).to(dtype)
        torch.testing.assert_close(encoder(floats), together, rtol=0, atol=tolerance)
    assert make((6, 64, 64)).double()(first, second).dtype == torch.float64
    torch.testing.assert_close(together[1, 2], encoder(first[1, 2], second[1, 2]), rtol=1e-4, atol=1e-5)


def test_an_image_given_as_float_is_left_as_it_was():
    image = torch.rand(2, 3, 8, 8)
    before = image.clone()
    centred([image])
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(channels=(4, 8)), "one entry for each stage"),
        (dict(kernels=(2, 3, 3)), "leaves pixels unread"),
        (dict(channels=(1,) * 8, kernels=(3,) * 8, strides=(2,) * 8), None),
        (dict(channels=(4, 4), kernels=(80, 3), strides=(80, 2)), "too small"),
    ],
)
def test_what_cannot_encode_is_refused_at_construction(arguments, message):
    if message is None:  # padding keeps one position for ever
        assert StridedEncoder((3, 64, 64), **arguments).out_features == 1
        return
    with pytest.raises(ValueError, match=message):
        StridedEncoder((3, 64, 64), **arguments)


def test_a_configuration_names_it():
    with initialize_config_module("r2dreamer.configs", version_base=None):
        model = compose("config", ["experiment=dmc_small"]).model
    agent = build_agent(ObservationSpace({"pixels": (3, 64, 64)}, {}), ActionSpace(1, False), **instantiate(model))
    assert isinstance(agent.encoder.image, StridedEncoder)
    assert agent.encoder.out_features == 1024

"""Decoder and augmentation: sizes to the number, every observation decoded, pixels moved as they should be."""

import pytest
import torch
from agents import BATCH, TIME, tiny_agent, tiny_records
from tensordict import TensorDict
from test_networks import widths

from r2dreamer.dreamer import ActionSpace, ImageDecoder, ObservationDecoder, ObservationSpace, RandomShift, build_agent
from r2dreamer.dreamer.networks.augmentation import random_shift


def counts(heads, observations=None):
    observations = observations or ObservationSpace({"pixels": (3, 64, 64)}, {})
    with torch.device("meta"):
        return build_agent(observations, ActionSpace(6, False), **widths("12M"), heads=heads).parameter_counts()


def test_dreamer_at_12m_has_the_published_parameter_counts():
    dreamer = counts({"decoder": ObservationDecoder})
    assert dreamer["decoder"] == 1_272_003
    assert "projection" not in dreamer
    assert sum(dreamer.values()) == 10_494_158  # 10.49M


def test_every_observation_is_decoded_in_its_own_shape():
    observations = ObservationSpace({"left": (3, 16, 32), "right": (1, 16, 32)}, {"speed": 2, "torque": 5})
    sizes = dict(belief=16, hidden=8, classes=4, depth=2, categoricals=3, encoder_multipliers=(1, 2))
    agent = build_agent(observations, ActionSpace(2, True), **sizes, heads={"decoder": ObservationDecoder})
    posterior = agent.world_model(tiny_records(agent))["next"]
    for key, shape in {**observations.images, "speed": (2,), "torque": (5,)}.items():
        assert posterior["reconstruction", key].shape == (BATCH, TIME, *shape)
    decoded = agent.heads["decoder"].decode(posterior["state"], posterior["belief"])
    assert torch.equal(decoded["left"], posterior["reconstruction", "left"])
    code = posterior["reconstruction", "speed"]
    torch.testing.assert_close(decoded["speed"], code.sign() * code.abs().expm1())
    assert decoded["left"].min() > 0 and decoded["left"].max() < 1


def test_the_decoder_reads_state_and_belief():
    decoder = ImageDecoder(6, 8, (1, 8, 8), depth=2, units=4, multipliers=(1, 2), blocks=4)
    state, belief = torch.randn(1, 6, requires_grad=True), torch.randn(1, 8, requires_grad=True)
    image = decoder(state, belief)
    assert image.shape == (1, 1, 8, 8)
    gradients = torch.autograd.grad(image.square().sum(), [state, belief])
    assert all((gradient != 0).all() for gradient in gradients)
    height, width, channels = decoder.smallest
    drawn = []  # which of the smallest map's channels and places each block of the belief reaches
    decoder.norms[0].register_forward_pre_hook(lambda norm, inputs: drawn.append(inputs[0]))
    for block in (None, 0, 3):
        belief = torch.zeros(1, 8)
        if block is not None:
            belief[:, 2 * block : 2 * block + 2] = 1.0
        decoder(torch.zeros(1, 6), belief)
    for block, seen in ((0, drawn[1]), (3, drawn[2])):
        changed = (seen != drawn[0]).reshape(height, width, 4, channels // 4).any(-1)
        assert changed[..., block].all() and changed.sum() == height * width
    with pytest.raises(ValueError, match="12x8 cannot be decoded"):
        ImageDecoder(6, 8, (1, 12, 8), depth=2, units=4, multipliers=(1, 2, 2), blocks=4)


def naive_shift(image, down, right, pad):
    """One image [C, H, W], pixel by pixel: what is `down - pad` rows and `right - pad` columns away, borders repeated."""
    channels, height, width = image.shape
    at = lambda c, y, x: image[c, min(max(y, 0), height - 1), min(max(x, 0), width - 1)].item()
    out = torch.zeros(image.shape, dtype=torch.float64)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                top, left = y + down - pad, x + right - pad
                row, column = int(top // 1), int(left // 1)
                a, b = top - row, left - column
                out[c, y, x] = (1 - a) * ((1 - b) * at(c, row, column) + b * at(c, row, column + 1)) + a * (
                    (1 - b) * at(c, row + 1, column) + b * at(c, row + 1, column + 1)
                )
    return out


def test_a_shift_is_the_naive_one_and_the_same_over_time(monkeypatch):
    pad, offsets = 2, torch.tensor([[0.1, 0.9], [0.5, 0.6180], [1.0, 0.0]])
    images = torch.rand(3, 2, 2, 5, 7)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: offsets)
    shifted = random_shift(images, pad)
    for b in range(3):
        for t in range(2):
            expected = naive_shift(images[b, t].double(), *(2 * pad * offsets[b]).tolist(), pad)
            torch.testing.assert_close(shifted[b, t].double(), expected, atol=1e-5, rtol=0)


def test_the_augmentation_moves_images_alone_each_sequence_by_itself():
    agent = tiny_agent()
    records = tiny_records(agent)
    records["next", "pixels"] = records["next", "pixels"][:1, :1].expand(BATCH, TIME, -1, -1, -1).clone()
    before = records.clone()
    torch.manual_seed(0)
    shifted = RandomShift(pad=3)(records)
    assert (records == before).all()  # a copy
    moved = shifted["next", "pixels"]
    assert moved.dtype == torch.uint8 and torch.equal(moved, moved[:, :1].expand_as(moved))
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], before["next", "pixels"][0])
    assert torch.equal(shifted["next", "speed"], before["next", "speed"])
    assert torch.equal(shifted["action"], before["action"])
    plain = TensorDict({"next": {"pixels": torch.full((2, 3, 1, 4, 4), 7, dtype=torch.uint8)}}, [2, 3])
    assert random_shift(torch.rand(1, 2, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64
    assert (RandomShift(pad=1)(plain)["next", "pixels"] == 7).all()
    with pytest.raises(ValueError, match="pad=0"):
        RandomShift(pad=0)
    with pytest.warns(UserWarning, match="no image to shift"):
        RandomShift(pad=1)(TensorDict({"next": {"speed": torch.zeros(2, 3, 4)}}, [2, 3]))

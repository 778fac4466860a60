"""AdversarialPatch: what it shows, where, within which bounds; as a batch's module, and on disk."""

import json
import pickle

import numpy as np
import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from tensordict import TensorDict

from r2dreamer.envs import AdversarialPatch

H, W = 12, 10
EVERY_BYTE = torch.arange(2 * 4 * 3 * H * W).remainder(256).to(torch.uint8).reshape(2, 4, 3, H, W)  # [B, T, C, H, W]


def patch_of(*, hw=(3, 5), delta=None, **settings):
    patch = AdversarialPatch(hw, **settings)
    if delta is not None:
        patch.delta.data[:] = torch.as_tensor(delta, dtype=torch.float32)
    return patch


# -- what it shows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"mode": "eps", "eps": 0.1}, {"mode": "perturb", "eps": 0.1}])
def test_pixels_outside_of_the_rectangle_stay_to_the_bit(settings):
    patch = patch_of(**settings, placement="random", seed=3)
    corners = patch.corners(2, (H, W))
    patched = patch.paste(EVERY_BYTE, corners)
    inside = torch.zeros(2, H, W, dtype=torch.bool)
    for index, (y, x) in enumerate(corners.tolist()):
        inside[index, y : y + 3, x : x + 5] = True
    inside = inside[:, None, None].expand(EVERY_BYTE.shape)
    assert torch.equal(patched[~inside], (EVERY_BYTE / 255)[~inside])
    assert (patched[inside] != (EVERY_BYTE / 255)[inside]).float().mean() > 0.9
    bytes_shown = (patched * 255).round().to(torch.uint8)
    assert torch.equal(bytes_shown[~inside], EVERY_BYTE[~inside])  # all 256 values occur


@pytest.mark.parametrize(
    "placement, corner",
    [
        ({"placement": "bottom_center"}, (9, 2)),
        ({"placement": "top_center"}, (0, 2)),
        ({"placement": "center"}, (4, 2)),
        ({"placement": "fixed", "x0": 4, "y0": 1}, (1, 4)),
        ({"placement": "fixed", "x0": 0, "y0": 0}, (0, 0)),
    ],
)
def test_every_placement_has_its_corner(placement, corner):
    patch = patch_of(delta=1.0, **placement)
    patched = patch(TensorDict({"pixels": torch.zeros(2, 3, H, W)}, [2]))["pixels"]
    expected = torch.zeros(2, 3, H, W)
    expected[..., corner[0] : corner[0] + 3, corner[1] : corner[1] + 5] = 1
    assert torch.equal(patched, expected)


def test_random_corners_are_fresh_for_each_sequence_reach_every_place_and_repeat_with_the_seed():
    patch = patch_of(placement="random", seed=7)
    corners = patch.corners(3000, (H, W))
    assert corners.min(0)[0].tolist() == [0, 0] and corners.max(0)[0].tolist() == [H - 3, W - 5]
    assert len(corners.unique(dim=0)) == 10 * 6
    assert not torch.equal(corners, patch.corners(3000, (H, W)))
    patch.reseed(7)
    assert torch.equal(patch_of(placement="random", seed=7).corners(9, (H, W)), patch.corners(9, (H, W)))


def test_all_frames_of_a_sequence_and_both_its_ends_show_the_patch_at_one_place():
    patch = patch_of(delta=1.0, placement="random")
    batch = TensorDict({"pixels": torch.zeros(2, 4, 3, H, W), "next": {"pixels": torch.zeros(2, 4, 3, H, W)}}, [2, 4])
    patched = patch(batch)
    assert torch.equal(patched["pixels"], patched["next", "pixels"])
    assert (patched["pixels"] == patched["pixels"][:, :1]).all() and patched["pixels"].sum() == 2 * 4 * 3 * 15
    with pytest.raises(KeyError, match="neither 'pixels' nor"):
        patch(TensorDict({"observation": torch.zeros(2, 3)}, [2]))


def test_the_base_colour_is_what_a_sticker_starts_from():
    red = patch_of(mode="eps", eps=0.1, base=[0.8, 0.2, 0.0], delta=0.0)
    assert torch.allclose(red.content(), torch.tensor([0.8, 0.2, 0.0]).expand(3, 5, 3))
    assert torch.allclose(patch_of(mode="eps", eps=0.1, delta=0.05).content(), torch.full((3, 5, 3), 0.55))
    shown = red.paste(torch.zeros(1, 3, H, W), red.corners(1, (H, W)))
    assert shown[0, :, -1, 4].mul(255).tolist() == pytest.approx([204, 51, 0])  # opaque, and 0.8, 0.2, 0 in bytes


def test_a_perturbation_is_that_of_the_pixels_underneath_and_never_leaves_its_bound():
    patch = patch_of(mode="perturb", eps=9.7 / 255, placement="top_center")
    patch.delta.data = torch.linspace(-0.05, 0.05, 45).reshape(3, 5, 3)
    patched = (patch.paste(EVERY_BYTE, patch.corners(2, (H, W))) * 255).round()
    change = patched - EVERY_BYTE.float()
    assert change.abs().max() == 9  # whole levels: 9.7 of them would round to 10
    assert patched.min() >= 0 and patched.max() <= 255 and len(change.unique()) == 19


@pytest.mark.parametrize("levels", [1, 8, 16, 20.3])
def test_what_a_sticker_or_a_perturbation_shows_is_inside_its_bound_though_rounded(levels):
    image = torch.rand(2, 3, H, W)  # between the levels of 8 bits
    for mode, under in (("eps", torch.tensor(0.5)), ("perturb", image)):
        patch = patch_of(mode=mode, eps=levels / 255)
        patch.delta.data.normal_(std=3)
        patch.project_()
        shown = patch.paste(image, patch.corners(2, (H, W)))
        inside = torch.zeros(H, W, dtype=torch.bool)
        (y, x), (height, width) = patch.corners(1, (H, W))[0], patch.patch_hw
        inside[y : y + height, x : x + width] = True
        change = ((shown - under) * 255)[..., inside].abs()
        assert levels - 1 <= change.max() <= levels + 1e-2


@pytest.mark.parametrize(
    "settings, low, high",
    [
        ({}, 0.0, 1.0),
        ({"mode": "eps", "eps": 0.2}, -0.2, 0.2),
        ({"mode": "eps", "eps": 0.2, "base": 0.9}, -0.2, 0.1),  # on its base colour it must stay a colour
        ({"mode": "perturb", "eps": 0.2}, -0.2, 0.2),
    ],
)
def test_projection_keeps_both_bounds(settings, low, high):
    patch = patch_of(**settings)
    start = patch.delta.detach().clone()
    assert start.min() >= low and start.max() <= high and start.std() > 0
    patch.project_()
    assert torch.equal(patch.delta, start)
    patch.delta.data.normal_(std=3)
    patch.project_()
    assert patch.delta.min().item() == pytest.approx(low) and patch.delta.max().item() == pytest.approx(high)
    assert patch.content().min() >= (0 if settings.get("mode") != "perturb" else low)


def test_total_variation_and_l2_by_hand():
    delta = torch.tensor([[0.0, 0.5], [1.0, 0.5]]).unsqueeze(-1)  # vertical |1|, |0|; horizontal |0.5|, |0.5|
    patch = patch_of(hw=(2, 2), channels=1, delta=delta)
    assert patch.total_variation().item() == pytest.approx(0.5 + 0.5)
    assert patch.l2().item() == pytest.approx((0.25 + 0 + 0.25 + 0) / 4)  # to grey
    assert patch_of(hw=(2, 2), channels=1, base=0.0, delta=delta).l2().item() == pytest.approx(1.5 / 4)
    for mode in ("eps", "perturb"):  # to nothing added
        assert patch_of(hw=(2, 2), channels=1, mode=mode, eps=0.5, delta=delta - 0.5).l2().item() == pytest.approx(
            0.5 / 4, abs=2e-3
        )
    assert patch_of(hw=(1, 1), channels=1, delta=0.3).total_variation() == 0
    noise = patch_of(delta=torch.rand(3, 5, 3))
    naive = sum((noise.delta[y + 1, x] - noise.delta[y, x]).abs().mean() for y in range(2) for x in range(5)) / 10
    naive += sum((noise.delta[y, x + 1] - noise.delta[y, x]).abs().mean() for y in range(3) for x in range(4)) / 12
    assert noise.total_variation().item() == pytest.approx(naive.item(), rel=1e-5)


def test_bytes_survive_quantisation_and_the_gradient_passes_straight_through():
    levels = torch.arange(256).reshape(16, 16, 1) / 255
    patch = patch_of(hw=(16, 16), channels=1, delta=levels)
    image = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    shown = patch.paste(image, patch.corners(1, (16, 16)))
    assert torch.equal((shown * 255).round().flatten(), torch.arange(256.0))
    patch.delta.data += 0.3 / 255
    shown = patch.paste(image, patch.corners(1, (16, 16)))
    assert torch.equal(shown.flatten(), torch.arange(256) / 255)
    weight = torch.arange(256.0)
    (shown.flatten() * weight).sum().backward()
    assert torch.equal(patch.delta.grad.flatten()[:255], weight[:255])
    exact = patch_of(hw=(16, 16), channels=1, delta=levels + 0.3 / 255, quantize=False)
    assert not torch.equal(
        exact.paste(image, exact.corners(1, (16, 16))).flatten()[:255], (torch.arange(256) / 255)[:255]
    )


# -- where -----------------------------------------------------------------------------------------------------------


def test_views_shift_and_brighten_within_their_limits_and_stay_in_the_image():
    patch = patch_of(placement="center", eot_translations=400, eot_max_shift=2, eot_max_brightness=0.25, delta=0.5)
    views = patch.views(3, (H, W))
    corners, brightness = (torch.stack(each) for each in zip(*views, strict=True))  # [400, 3, 2], [400, 3]
    shifts = (corners - torch.tensor([4, 2])).flatten(0, 1)
    assert len(shifts.unique(dim=0)) == 25 and shifts.abs().max() == 2
    assert 0.24 < brightness.abs().max() <= 0.25 and brightness.min() < 0 < brightness.max()
    at_the_edge = patch_of(placement="fixed", x0=5, y0=0, eot_translations=50, eot_max_shift=2)
    corners = torch.stack([each for each, _ in at_the_edge.views(2, (H, W))])
    assert corners[..., 0].unique().tolist() == [0, 1, 2] and corners[..., 1].unique().tolist() == [3, 4, 5]
    brighter = patch.paste(torch.zeros(1, 3, H, W), torch.tensor([[4, 2]]), torch.tensor([0.2]))
    assert brighter.max().item() == pytest.approx(0.7, abs=1 / 255)
    ((only, none),) = patch_of().views(3, (H, W))  # without translations: as it is
    assert only.tolist() == [[9, 2]] * 3 and none is None


def test_saliency_finds_a_planted_hot_spot_inside_of_what_is_allowed():
    heat = torch.rand(H, W, generator=torch.Generator().manual_seed(0))
    heat[6:9, 4:9] += 3
    patch = patch_of(placement="saliency")
    patch.place_by_saliency(heat)
    assert patch.corners(2, (H, W)).tolist() == [[6, 4]] * 2
    allowed = torch.zeros(H, W, dtype=torch.bool)
    allowed[:8, 1:] = True
    patch = patch_of(placement="saliency", allowed=allowed)
    patch.place_by_saliency(heat)
    assert patch.corners(1, (H, W)).tolist() == [[5, 4]]
    random = patch_of(placement="random", seed=3)
    random.reseed(7)
    assert random.settings["seed"] == 7
    assert torch.equal(random.corners(9, (H, W)), patch_of(placement="random", seed=7).corners(9, (H, W)))
    with pytest.raises(ValueError, match=r"one image \[3, 8, 8\], not a batch"):
        random(TensorDict({"pixels": torch.zeros(3, 8, 8)}, []))
    with pytest.raises(ValueError, match="call place_by_saliency"):
        patch_of(placement="saliency").corners(1, (H, W))
    with pytest.raises(ValueError, match="lies wholly inside"):
        patch_of(placement="saliency", allowed=torch.zeros(H, W)).place_by_saliency(heat)
    with pytest.raises(ValueError, match="mask of"):
        patch_of(placement="saliency", allowed=torch.ones(W, H)).place_by_saliency(heat)
    with pytest.raises(ValueError, match="not chosen by saliency"):
        patch_of().place_by_saliency(heat)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"hw": (0, 5)}, "patch_height=0"),
        ({"mode": "stamp"}, "mode='stamp' must be one of"),
        ({"mode": "eps"}, "eps=None with mode='eps'"),
        ({"eps": 0.1}, "eps=0.1 with mode='direct'"),
        ({"mode": "perturb", "eps": 0.001}, "must lie in"),
        ({"base": 1.5}, "base=1.5"),
        ({"placement": "left"}, "placement='left'"),
        ({"placement": "fixed", "x0": 1}, "needs both"),
        ({"x0": 1, "y0": 1}, "the others neither"),
        ({"allowed": torch.ones(H, W)}, "allowed is a mask"),
        ({"eot_translations": -1}, "eot_translations=-1"),
        ({"onset": 1.5}, "onset=1.5"),
        ({"eot_max_brightness": 2.0}, "eot_max_brightness=2.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        patch_of(**settings)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"hw": (13, 5)}, "larger than the images"),
        ({"hw": (3, 11)}, "larger than the images"),
        ({"channels": 1}, "set channels=3"),
        ({"placement": "fixed", "x0": 6, "y0": 0}, "leaves the images"),
        ({"placement": "fixed", "x0": 0, "y0": -1}, "leaves the images"),
    ],
)
def test_a_patch_that_does_not_fit_the_images_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        patch_of(**settings)(TensorDict({"pixels": torch.zeros(2, 3, H, W)}, [2]))


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_an_older_file_with_a_brightness_that_nothing_drew_loads(tmp_path):
    with pytest.raises(ValueError, match="eot_max_brightness=0.5 is drawn with each of eot_translations"):
        patch_of(eot_max_brightness=0.5)
    patch = patch_of(delta=0.5)
    patch.settings["eot_max_brightness"] = 0.5
    loaded = AdversarialPatch.load(patch.save(tmp_path / "patch.npz"))
    assert torch.equal(loaded.delta, patch.delta) and loaded.settings["eot_max_brightness"] == 0


@pytest.mark.parametrize(
    "mode", [{}, {"mode": "eps", "eps": 0.1, "base": [0.1, 0.5, 0.9]}, {"mode": "perturb", "eps": 0.1}]
)
@pytest.mark.parametrize(
    "placement",
    [
        {"placement": "bottom_center", "eot_translations": 3, "eot_max_shift": 1, "eot_max_brightness": 0.2},
        {"placement": "top_center", "quantize": False},
        {"placement": "center", "onset": 4, "pixels_key": "camera"},
        {"placement": "fixed", "x0": 4, "y0": 1},
        {"placement": "random", "seed": 5},
        {"placement": "saliency", "allowed": torch.ones(H, W)},
    ],
)
def test_a_loaded_patch_is_the_saved_one(mode, placement, tmp_path):
    patch = patch_of(**mode, **placement)
    patch.delta.data.mul_(0.9)
    if patch.placement == "saliency":
        patch.place_by_saliency(torch.arange(float(H * W)).reshape(H, W))
    loaded = AdversarialPatch.load(patch.save(tmp_path / "deep" / "patch.npz"))
    assert loaded.settings == patch.settings and torch.equal(loaded.content(), patch.content())
    other = patch_of(**mode, **placement)
    other.load_state_dict(patch.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in patch.state_dict().items())
    patch.reseed(patch.seed), loaded.reseed(loaded.seed)
    for (one, bright), (other, also) in zip(patch.views(4, (H, W)), loaded.views(4, (H, W)), strict=True):
        assert torch.equal(one, other) and (bright is also or torch.equal(bright, also))
        assert one.abs().sum() > 0 or patch.placement == "top_center"
    for name in ("heat", "allowed", "found"):
        assert (getattr(patch, name) is None) == (getattr(loaded, name) is None)
    image = EVERY_BYTE[:, 0]
    assert torch.equal(patch.paste(image, patch.corners(2, (H, W))), loaded.paste(image, loaded.corners(2, (H, W))))


def test_what_is_not_a_saved_patch_is_refused_and_never_executed(tmp_path):
    path = tmp_path / "patch.npz"
    with pytest.raises(ValueError, match="must end in .npz"):
        patch_of().save(tmp_path / "patch.pt")
    patch_of().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a patch"):
        AdversarialPatch.load(path)
    for arrays, said in (
        ({"delta": np.zeros((2, 2, 3))}, "size mismatch for delta"),
        (
            {"delta": np.zeros((16, 16, 3)), "low": np.zeros(3)},
            "Unexpected key.*low",
        ),  # a bound is never read from a file
        ({}, "Missing key.*delta"),
    ):
        np.savez(path, settings=json.dumps({"mode": "direct"}), **arrays)
        with pytest.raises(ValueError, match=f"(?s)is not a patch.*{said}"):
            AdversarialPatch.load(path)
    np.savez(path, settings=np.array([patch_of], dtype=object))  # a pickle
    with pytest.raises(ValueError, match="is not a patch"):
        AdversarialPatch.load(path)
    with pytest.raises(ValueError, match="is not a patch"):
        AdversarialPatch.load(tmp_path / "nowhere.npz")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not a patch"):
        AdversarialPatch.load(path)


def test_a_patch_can_be_sent_to_another_process():
    patch = patch_of(placement="random", seed=2)
    twin = pickle.loads(pickle.dumps(patch))
    assert torch.equal(patch.corners(5, (H, W)), twin.corners(5, (H, W)))

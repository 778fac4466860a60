"""Occlusion saliency finds what an agent reads, and knows where the simulator's objects are."""

import functools

import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from agents import WIDTHS, tiny_agent
from launcher import config
from omegaconf import OmegaConf
from tensordict import TensorDict
from test_attack_loss import opinionated

from r2dreamer.dreamer import ActionSpace, ObservationSpace, build_agent
from r2dreamer.envs import make_dmc, make_dmc_subtle, make_probe
from r2dreamer.examples.attacks.masks import object_mask
from r2dreamer.examples.attacks.occlusion import OcclusionSaliency, blurred, inside_fraction, window_masks
from r2dreamer.examples.saliency import watch
from r2dreamer.examples.training.loading import Trained


@pytest.fixture(scope="module")
def agent():
    return opinionated(tiny_agent())


def observed(agent, image, is_init=False):
    generator = torch.Generator().manual_seed(3)
    sizes = {**agent.latent_sizes, "action": agent.actions.size, "speed": 6}
    entries = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return TensorDict({**entries, "pixels": image, "is_init": torch.tensor([is_init])})


def test_hiding_what_is_not_there_changes_nothing_and_a_spot_is_found_where_it_is(agent):
    grey = torch.full((3, 16, 16), 0.5)
    saliency = OcclusionSaliency(agent, "pixels", fill="grey", window=4, stride=2)
    blank = saliency(observed(agent, grey * 255))
    assert all(heat.max() < 1e-10 for heat in blank.values())  # rounding alone
    spot = grey.clone()
    spot[:, 9:11, 4:6] = 1.0
    for fill in ("grey", "blur"):
        saliency = OcclusionSaliency(agent, "pixels", fill=fill, window=4, stride=2)
        for heat in saliency(observed(agent, spot * 255)).values():
            y, x = divmod(int(heat.argmax()), 16)
            assert heat.shape == (16, 16) and 8 <= y <= 11 and 3 <= x <= 6 and heat.min() >= 0
    heat = OcclusionSaliency(agent, "pixels", fill="grey", window=4, stride=2)(observed(agent, spot * 255))["policy"]
    reach = torch.zeros(16, 16, dtype=torch.bool)
    reach[6:14, 2:8] = True  # windows that touch the spot
    assert heat[~reach].max() < 1e-10 and heat[reach].min() > 1e-8


def test_maps_are_those_of_a_loop_over_windows(agent):
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = observed(agent, image)
    found = OcclusionSaliency(agent, "pixels", fill="blur", window=5, stride=3)(seen)

    def judge(picture):
        belief = agent.prior(*(seen[name].unsqueeze(0) for name in ("state", "belief", "action")))[2]
        embedding = agent.encoder.at_root()(TensorDict({"pixels": picture, "speed": seen["speed"]}))["encoded_latents"]
        logits, _ = agent.posterior(belief, embedding.unsqueeze(0))
        expected = 0.99 * logits.softmax(-1) + 0.01 / logits.shape[-1]
        latents = TensorDict({"state": expected.flatten(-2), "belief": belief}, [1])
        return agent.actor.get_dist(latents).mean, agent.value_model(latents)["state_value"]

    with torch.no_grad():
        mean, value = judge(image / 255)
        total, count = {name: torch.zeros(16, 16) for name in found}, torch.zeros(16, 16)
        for y in (0, 3, 6, 9, 11):
            for x in (0, 3, 6, 9, 11):
                place = (slice(y, y + 5), slice(x, x + 5))
                picture = image / 255
                picture[(slice(None), *place)] = blurred(image / 255, 2.5)[(slice(None), *place)]
                new_mean, new_value = judge(picture)
                total["policy"][place] += (new_mean - mean).square().sum() / 2
                total["value"][place] += (new_value - value).square().sum() / 2
                count[place] += 1
    for name in found:
        assert torch.allclose(found[name], total[name] / count, rtol=1e-3, atol=1e-7) and found[name].max() > 0
    first = OcclusionSaliency(agent, "pixels")(observed(agent, image, is_init=True))
    assert not torch.allclose(first["policy"], OcclusionSaliency(agent, "pixels")(seen)["policy"])


def test_windows_reach_every_pixel_and_blurring_keeps_the_mean():
    masks = window_masks(7, 10, 3, 2)
    assert masks.shape == (3 * 5, 7, 10) and masks.sum((1, 2)).unique().tolist() == [9] and masks.any(0).all()
    assert masks[-1, 4:, 7:].all()
    spot = torch.zeros(1, 15, 15)
    spot[0, 7, 7] = 1.0
    soft = blurred(spot, 1.0)[0]
    assert soft.sum().item() == pytest.approx(1) and soft.argmax() == 7 * 15 + 7 and torch.allclose(soft, soft.T)
    assert soft[7, 8] / soft[7, 7] == pytest.approx(torch.tensor(-0.5).exp().item())
    assert torch.allclose(blurred(torch.full((2, 6, 6), 0.3), 3.0), torch.tensor(0.3))


def test_the_fraction_inside_counts_frames_that_show_the_object():
    maps, masks = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.bool)
    maps[0] = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    maps[1], maps[2] = 5.0, torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    masks[0, 0, 0] = masks[2, 1, 0] = masks[2, 1, 1] = True  # frame 1 does not show it
    assert inside_fraction(maps, masks) == {"fraction": 7 / 8, "area": 3 / 8, "frames": 2}
    assert inside_fraction(0 * maps, masks) == {"fraction": None, "area": 3 / 8, "frames": 2}
    assert inside_fraction(maps, torch.zeros_like(masks)) == {"fraction": None, "area": None, "frames": 0}


@pytest.mark.parametrize(
    "make, task, objects",
    [
        (functools.partial(make_dmc_subtle, "reacher", shrink=1.0), "reacher", None),
        (functools.partial(make_dmc_subtle, "finger_turn", shrink=1.0), "finger_turn", None),  # a site
        (functools.partial(make_dmc, "reacher_easy", from_pixels=True), "reacher_easy", ["target"]),
    ],
)
def test_the_simulator_says_where_its_target_is(make, task, objects):
    env = make(seed=4)
    segment = object_mask(env, task, objects)
    pixels = env.reset()["pixels"]
    mask = segment(pixels)
    assert mask.shape == (64, 64) and 4 < mask.sum() < 300
    inside, outside = pixels[:, mask].float(), pixels[:, ~mask].float()
    assert (inside.mean(1) - outside.mean(1)).abs().max() > 40  # a colour of its own
    assert inside.std(1).max() < outside.std(1).max() + 60
    moved = segment(env.set_seed(9) and env.reset()["pixels"])
    assert not torch.equal(mask, moved)


def test_every_frame_that_is_watched_comes_with_the_mask_of_its_own_moment():
    torch.manual_seed(0)
    agent = build_agent(ObservationSpace({"pixels": (3, 64, 64)}, {}), ActionSpace(2, discrete=False), **WIDTHS)
    run = OmegaConf.create({"env": {"task": "reacher"}})
    trained = Trained(agent, run, None, 0, functools.partial(make_dmc_subtle, "reacher", shrink=1.0))
    settings = ["episodes=2", "max_steps=3", "occlusion.window=16", "occlusion.stride=16", "progress=false"]
    seen = watch(trained, config(*settings, name="saliency"), "pixels", 0)
    assert {name: len(found) for name, found in seen.items()} == {
        "frames": 6, "policy": 6, "value": 6, "masks": 6, "returns": 2
    }  # fmt: skip
    for frame, mask in zip(seen["frames"], seen["masks"], strict=True):
        inside, outside = frame[mask.numpy()].mean(0), frame[~mask.numpy()].mean(0)
        assert mask.any() and abs(inside - outside).max() > 40
    assert not torch.equal(seen["masks"][0], seen["masks"][3])  # another episode, another target


def test_an_episode_does_not_depend_on_how_it_is_looked_at():
    torch.manual_seed(0)
    agent = build_agent(ObservationSpace({"pixels": (3, 64, 64)}, {}), ActionSpace(2, discrete=False), **WIDTHS)
    run = OmegaConf.create({"env": {"task": "reacher"}})
    trained = Trained(agent, run, None, 0, functools.partial(make_dmc_subtle, "reacher", shrink=1.0))
    states = []
    for stride in (16, 32):
        settings = ["max_steps=3", "occlusion.window=32", f"occlusion.stride={stride}", "progress=false"]
        keep = lambda module, inputs, output: states.append(output["state"].clone())
        with agent.policy.register_forward_hook(keep):
            watch(trained, config(*settings, name="saliency"), "pixels", 0)
    assert len(states) == 6
    assert all(torch.equal(one, other) for one, other in zip(states[:3], states[3:], strict=True))


def test_objects_have_names_parts_and_bodies_and_elsewhere_colours():
    cartpole = make_dmc_subtle("cartpole_swingup", seed=0, shrink=1.0)
    pixels = cartpole.reset()["pixels"]
    pole = object_mask(cartpole, "cartpole_swingup")(pixels)  # its default class is "pole", its geom "pole_1"
    assert 10 < pole.sum() < 200
    assert torch.equal(object_mask(cartpole, "", ["pole_1"])(pixels), pole)
    cart = object_mask(cartpole, "", ["cart"])(pixels)
    assert cart.any() and not (cart & pole).any()
    with pytest.raises(ValueError, match="are not among what this model has: .*cart.*pole_1"):
        object_mask(cartpole, "", ["wheel"])
    assert object_mask(make_dmc("walker_walk", seed=0, from_pixels=True), "walker_walk") is None  # has no target
    probe = make_probe("small_target", seed=0, image_size=16)
    assert object_mask(probe, "small_target") is None
    assert object_mask(probe, "small_target", colour=[255, 255, 255])(probe.reset()["pixels"]).sum() == 4
    with pytest.raises(ValueError, match="only environments of the DeepMind Control suite"):
        object_mask(probe, "small_target", ["target"])
    with pytest.raises(ValueError, match="both say what the object is"):
        object_mask(probe, "small_target", ["target"], [255, 255, 255])

"""PlanningAttackLoss: returns by hand, what can lower them, where gradients go, and what exactly cancels."""

import pytest

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL
import torch
from agents import ACTIONS, BATCH, TIME, tiny_agent, tiny_records
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from test_classic import made
from torch.nn.functional import softplus

from r2dreamer.dreamer import BoundedNormal, latent_head
from r2dreamer.dreamer.classic.networks import StraightThroughAction
from r2dreamer.envs import AdversarialPatch
from r2dreamer.losses import PlanningAttackLoss, total_loss

LATENTS = [("next", "state"), ("next", "belief"), ("next", "posterior_logits")]
STEPS = [("next", "state"), ("next", "belief")]
IDENTITY = dict(hw=(16, 16), mode="perturb", eps=1.0)


def patch_of(hw=(6, 4), delta=None, **settings):
    patch = AdversarialPatch(hw, **settings)
    if delta is not None:
        patch.delta.data[:] = delta
    return patch


# -- a world small enough to work by hand: a belief is an image's only pixel --------------------------------------------


def toy_loss(patch, *, gain=0.5, continuation=None, ends="continue_pred", reward=lambda belief: belief, **settings):
    """belief' = belief + action, action = gain * belief, reward = belief', value = 10 belief."""

    def world(pixels):
        pixels = pixels if pixels.is_floating_point() else pixels / 255
        belief = pixels.flatten(-3)  # [B, T, 1]
        logits = torch.stack([belief, -belief], -1)  # [B, T, 1, 2]
        return torch.zeros_like(belief), belief, logits

    head = lambda function, key: TensorDictModule(function, in_keys=["belief"], out_keys=[key])
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(lambda b: (gain * b, 0.1 + 0 * b), in_keys=["belief"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=BoundedNormal),
    )
    return PlanningAttackLoss(
        patch,
        TensorDictModule(world, in_keys=[("next", "pixels")], out_keys=LATENTS),
        TensorDictModule(lambda s, b, a: (s, b + a), in_keys=["state", "belief", "action"], out_keys=STEPS),
        actor,
        head(reward, "reward"),
        head(lambda belief: 10 * belief, "state_value"),
        continue_model=None if continuation is None else head(continuation, ends),
        **{"imagination_horizon": 2, "discount": 0.5, "unimix": 0.0, **settings},
    )


def toy_records(*pixels):
    images = torch.tensor(pixels).reshape(1, len(pixels), 1, 1, 1)
    return TensorDict({"next": {"pixels": images}}, [1, len(pixels)])


def toy_patch(value):
    return patch_of((1, 1), torch.tensor(value), channels=1, quantize=False)


def test_returns_by_hand_in_either_belief():
    seen, truth = 0.2, 0.8  # the patch covers the only pixel
    patched = toy_loss(toy_patch(seen), belief="patched")(toy_records(truth))
    # 0.3, 0.45 are believed: rewards at both, and the value after the second, discounted twice
    assert patched["imagined_return"].item() == pytest.approx(0.3 + 0.5 * 0.45 + 0.25 * 4.5)
    clean = toy_loss(toy_patch(seen))(toy_records(truth))
    # the same actions, 0.1 and 0.15, from 0.8: 0.9, 1.05
    assert clean["imagined_return"].item() == pytest.approx(0.9 + 0.5 * 1.05 + 0.25 * 10.5)
    for losses in (clean, patched):  # undisturbed: actions 0.4, 0.6
        assert losses["clean_return"].item() == pytest.approx(1.2 + 0.5 * 1.8 + 0.25 * 18)
        assert losses["return_change"].item() == pytest.approx(
            (losses["imagined_return"] - losses["clean_return"]).item(), rel=1e-6
        )
        assert losses["action_shift"].item() == pytest.approx((0.1 - 0.4) ** 2)
        one, other = (torch.tensor([belief, -belief]).log_softmax(0) for belief in (seen, truth))
        assert losses["kl"].item() == pytest.approx((one.exp() * (one - other)).sum().item(), rel=1e-5)


def test_the_value_at_the_end_and_continue_probabilities_count():
    without = toy_loss(toy_patch(0.2), bootstrap=False)(toy_records(0.8))
    assert without["imagined_return"].item() == pytest.approx(0.9 + 0.5 * 1.05)
    half = toy_loss(toy_patch(0.2), continuation=torch.zeros_like)(toy_records(0.8))
    assert half["imagined_return"].item() == pytest.approx(0.9 + 0.25 * 1.05 + 0.0625 * 10.5)
    same = toy_loss(toy_patch(0.2), continuation=lambda belief: 0.5 + 0 * belief, ends="continuation")(toy_records(0.8))
    assert same["imagined_return"].item() == pytest.approx(half["imagined_return"].item())


def test_terms_have_their_weights_and_signs():
    weights = {"w_return": 2.0, "w_kl": 3.0, "w_action": 4.0, "w_tv": 5.0, "w_l2": 6.0}
    patch = patch_of((1, 2), torch.tensor([[[0.2], [0.4]]]), channels=1)
    records = TensorDict({"next": {"pixels": torch.full((1, 1, 1, 1, 2), 0.8)}}, [1, 1])
    losses = toy_loss(patch, **weights)(records)
    expected = {
        "loss_return": 2 * losses["imagined_return"],
        "loss_kl": -3 * losses["kl"],
        "loss_action": -4 * losses["action_shift"],
        "loss_tv": 5 * patch.total_variation(),
        "loss_l2": 6 * patch.l2(),
    }
    assert patch.total_variation().item() == pytest.approx(0.2) and patch.l2().item() == pytest.approx(0.05)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item()) and losses[name] != 0
    assert total_loss(losses).item() == pytest.approx(sum(value.item() for value in expected.values()))


def test_believed_doom_that_changes_no_action_lowers_only_the_patched_belief():
    """An actor that ignores what it sees cannot be attacked; its first reward and its continue weights still can."""
    doom = dict(gain=0.0, continuation=lambda belief: 5 * belief - 2, reward=softplus)
    patch = toy_patch(0.1)
    fork = toy_loss(patch, belief="patched", **doom)
    losses = fork(toy_records(0.9, 0.7))
    assert losses["return_change"] < -0.5 and losses["action_shift"] == 0
    total_loss(losses).backward()
    assert patch.delta.grad.abs().sum() > 0.1
    patch.delta.grad = None
    ours = toy_loss(patch, w_tv=0.0, w_l2=0.0, **doom)(toy_records(0.9, 0.7))
    assert ours["return_change"] == 0 and ours["kl"] > 0
    total_loss(ours).backward()
    assert patch.delta.grad.abs().sum() == 0


def test_all_context_states_begin_imaginations_or_only_the_last():
    def reached(starts):
        loss, images = toy_loss(toy_patch(0.2), starts=starts), toy_records(0.8, 0.5, 0.9)["next", "pixels"]
        images.requires_grad_()
        loss.patch.paste = lambda pixels, corners, brightness: images  # as if every frame were the attacker's
        loss(TensorDict({"next": {"pixels": images.detach()}}, [1, 3]))["loss_return"].backward()
        return (images.grad.flatten() != 0).tolist()

    assert reached("all") == [True, True, True] and reached("last") == [False, False, True]
    one = lambda *truth, starts: toy_loss(toy_patch(0.2), starts=starts)(toy_records(*truth))["imagined_return"].item()
    mean = (one(0.8, starts="all") + one(0.5, starts="all")) / 2
    assert one(0.8, 0.5, starts="all") == pytest.approx(mean) != one(0.8, 0.5, starts="last")
    assert one(0.8, 0.5, starts="last") == pytest.approx(one(0.5, starts="all"))


# -- an agent of ours ----------------------------------------------------------------------------------------------------


def opinionated(agent):
    """Untrained heads predict 0 and hardly tell one image from another: this agent has views on everything."""
    generator = torch.Generator().manual_seed(5)
    for part, scale in ((agent.actor, 0.6), (agent.reward, 0.3), (agent.value, 0.3), (agent.encoder, 0.3)):
        for parameter in part.parameters():
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    for head in (agent.reward, agent.value):  # of about 1, not of millions
        bins = head.layers[-1].bias.data
        bins -= (torch.arange(len(bins)) - len(bins) // 2).square() / 50
    agent.posterior.embedding_in.weight.data *= 20
    agent.posterior.out.weight.data *= 5
    return agent


def agent_loss(agent, patch, **settings):
    return PlanningAttackLoss(
        patch,
        agent.world_model.select_subsequence(out_keys=LATENTS),
        TensorDictModule(agent.prior, in_keys=["state", "belief", "action"], out_keys=["prior_logits", *STEPS]),
        agent.actor,
        latent_head(agent.reward, ["reward_logits", "reward"]),
        agent.value_model,
        continue_model=agent.continue_model,
        **{"imagination_horizon": 3, **settings},
    )


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("belief", ["clean", "patched"])
@pytest.mark.parametrize("actions", ["mode", "sample"])
def test_the_gradient_reaches_the_patch_and_no_parameter_of_the_agent(discrete, belief, actions):
    agent = opinionated(tiny_agent(discrete=discrete))
    patch = patch_of(seed=3)
    loss = agent_loss(agent, patch, belief=belief, actions=actions, w_kl=0.1, w_action=0.1, w_tv=0.0, w_l2=0.0)
    losses = loss(tiny_records(agent))
    for name in ("loss_return", "loss_kl", "loss_action"):
        (gradient,) = torch.autograd.grad(losses[name], patch.delta, retain_graph=True)
        assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.5, name
    total_loss(losses).backward()
    parameters = [parameter for part in agent.parts().values() for parameter in part.parameters()]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)
    assert [name for name, _ in loss.named_parameters()] == ["patch.delta"]


@pytest.mark.parametrize("actions", ["mode", "sample"])
def test_the_choice_of_a_v2_actor_is_differentiated_too(actions):
    """Its distribution says has_rsample, and its mode has no gradient of its own."""
    agent = opinionated(tiny_agent(discrete=True))
    agent.actor[-1].distribution_class = StraightThroughAction
    patch = patch_of(seed=3)
    losses = agent_loss(agent, patch, actions=actions, w_action=0.1)(tiny_records(agent))
    (gradient,) = torch.autograd.grad(losses["loss_return"], patch.delta)
    assert (gradient != 0).float().mean() > 0.5
    assert losses["action_shift"] > 0


def test_a_gaussian_state_is_refused():
    agent = made("v1")
    heads = latent_head(agent.reward, ["reward"]), agent.value_model
    prior = TensorDictModule(agent.prior, in_keys=["state", "belief", "action"], out_keys=["prior_logits", *STEPS])
    with pytest.raises(ValueError, match="Gaussian state"):
        PlanningAttackLoss(patch_of(), agent.world_model, prior, agent.actor, *heads)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("settings", [{}, {"belief": "patched"}, {"actions": "sample", "starts": "last"}])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_patch_that_changes_no_pixel_changes_nothing_exactly(discrete, settings, precision):
    agent = opinionated(tiny_agent(discrete=discrete))
    loss = agent_loss(agent, patch_of(delta=0.0, **IDENTITY), **settings)
    for _ in range(3):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            losses = loss(tiny_records(agent))
        assert losses["kl"] == 0 and losses["action_shift"] == 0 and losses["return_change"] == 0
        assert losses["clean_return"] != 0
    with torch.no_grad():
        assert loss(tiny_records(agent))["return_change"] == 0
    loss.patch.delta.data[:] = 0.5
    several = [loss(tiny_records(agent)) for _ in range(5)]  # of one batch all sampled actions may stay the same
    assert all(losses["kl"] > 0 and losses["action_shift"] > 0 for losses in several)
    assert any(losses["return_change"] != 0 for losses in several)


def test_the_generators_go_on_as_if_one_number_had_been_drawn():
    agent = opinionated(tiny_agent())
    loss = agent_loss(agent, patch_of())
    torch.manual_seed(0)
    first = loss(tiny_records(agent))["loss_return"]
    after = torch.rand(3)
    torch.manual_seed(0)
    torch.randint(2**31, ())
    assert torch.equal(torch.rand(3), after)
    torch.manual_seed(0)
    assert loss(tiny_records(agent))["loss_return"] == first
    assert loss(tiny_records(agent))["loss_return"] != first


def test_expectation_over_transformation_averages_losses_over_every_shift():
    agent = opinionated(tiny_agent())
    stripes = torch.tensor([0.0, 1.0]).repeat(3).view(6, 1, 1)
    patch = patch_of(placement="center", eot_translations=200, eot_max_shift=1, delta=stripes)
    loss, records = agent_loss(agent, patch), tiny_records(agent)
    centre = torch.tensor([5, 6])
    every = [((centre + torch.tensor([dy, dx])).expand(BATCH, 2), None) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]

    def returns(views):
        torch.manual_seed(0)
        return loss(records, views=views)["loss_return"].item()

    one_by_one = [returns([view]) for view in every]
    assert returns(every) == pytest.approx(sum(one_by_one) / 9, rel=1e-5)
    assert len(set(one_by_one)) == 9
    # Averaging images first would be another number.
    images = torch.stack([patch.paste(records["next", "pixels"], *view) for view in every]).mean(0)
    averaged = patch_of(placement="center")
    averaged.paste = lambda pixels, corners, brightness: images
    torch.manual_seed(0)
    assert agent_loss(agent, averaged)(records)["loss_return"].item() != pytest.approx(returns(every), rel=1e-3)
    # And the patch's own draws are of those shifts, each as likely.
    drawn = torch.stack([corners for corners, _ in patch.views(BATCH, (16, 16))]) - centre  # [200, B, 2]
    shifts, counts = drawn.flatten(0, 1).unique(dim=0, return_counts=True)
    assert len(shifts) == 9 and shifts.abs().max() == 1 and counts.min() > 600 / 9 * 0.6


def test_common_random_numbers_leave_no_noise_between_two_patches():
    agent = opinionated(tiny_agent())
    records = tiny_records(agent)
    torch.manual_seed(0)
    one = agent_loss(agent, patch_of(delta=0.25))(records)["return_change"]
    torch.manual_seed(0)
    same = agent_loss(agent, patch_of(mode="eps", eps=0.3, delta=-0.25))(records)["return_change"]
    assert one != 0 and same.item() == pytest.approx(one.item(), rel=1e-5)


def test_saliency_is_the_gradient_of_the_return_and_shows_what_the_agent_reads():
    agent = opinionated(tiny_agent())
    blind = agent.encoder.image.convolutions[0]
    records = tiny_records(agent)
    heat = agent_loss(agent, patch_of()).saliency(records)
    assert heat.shape == (16, 16) and (heat > 0).float().mean() > 0.9
    assert all(parameter.grad is None for part in agent.parts().values() for parameter in part.parameters())
    blind.weight.data.zero_()
    assert agent_loss(agent, patch_of()).saliency(records).abs().max() == 0
    loss = toy_loss(toy_patch(0.2))
    found = loss.saliency(toy_records(0.8))  # R = (1.5 + 0.5 * 2.25 + 0.25 * 22.5) b
    assert found.item() == pytest.approx(1.5 + 1.125 + 5.625)


def test_keys_can_be_renamed_and_other_entries_of_the_records_are_left_alone():
    agent = opinionated(tiny_agent())
    records = tiny_records(agent)
    before = records.clone()
    loss = agent_loss(agent, patch_of())
    assert ("next", "pixels") in loss.in_keys and ("next", "reward") not in loss.in_keys
    loss(records)
    assert (records == before).all() and set(records.keys(True)) == set(before.keys(True))
    renamed = toy_loss(toy_patch(0.2))
    renamed.set_keys(pixels="camera", value="worth")
    renamed.world_model.in_keys[:] = [("next", "camera")]
    renamed.value_model.out_keys[:] = ["worth"]
    records = TensorDict({"next": {"camera": toy_records(0.8)["next", "pixels"]}}, [1, 1])
    assert renamed(records)["imagined_return"].item() == pytest.approx(0.9 + 0.5 * 1.05 + 0.25 * 10.5)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"belief": "both"}, "belief='both' must be one of clean, patched"),
        ({"starts": "first"}, "starts='first'"),
        ({"actions": "random"}, "actions='random'"),
        ({"imagination_horizon": 0}, "imagination_horizon"),
        ({"discount": 1.5}, "discount"),
        ({"w_kl": -1.0}, "w_kl=-1.0 must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        toy_loss(toy_patch(0.5), **settings)


def test_what_is_missing_is_named():
    records = TensorDict({"next": {"camera": torch.rand(1, 1, 1, 1, 1)}}, [1, 1])
    elsewhere = toy_loss(toy_patch(0.5), continuation=lambda belief: belief, ends="alive")
    with pytest.raises(ValueError, match=r"continue_pred is missing.*\n.*\n.*set_keys\(continue_pred="):
        elsewhere(toy_records(0.8))
    elsewhere.continue_model = None
    elsewhere.reward_model.out_keys[:] = ["gain"]
    with pytest.raises(ValueError, match="reward is missing"):
        elsewhere(toy_records(0.8))
    loss = toy_loss(toy_patch(0.5))
    for look in (loss, loss.saliency):
        with pytest.raises(ValueError, match="pixels is missing"):
            look(records)


assert ACTIONS == 2 and TIME == 5  # what the discrete and continuous agents above have

"""The networks: sizes to the number, the sequence pass against single steps, routes of information and gradients."""

import math
from functools import partial

import pytest
import torch
from agents import ACTIONS, BELIEF, CATEGORICALS, CLASSES, TIME, rssm_modules, tiny_agent, tiny_records
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3

from r2dreamer.dreamer import (
    ActionSpace,
    BlockLinear,
    CategoricalLatent,
    ImageEncoder,
    Linear,
    ObservationSpace,
    RSSMRollout,
    VectorEncoder,
    build_agent,
)
from r2dreamer.dreamer.networks.layers import elu_mlp
from r2dreamer.losses import R2DreamerWorldModelLoss, total_loss

SIZES = {"12M": 11.84e6, "25M": 26.5e6, "50M": 47.1e6, "100M": 105.6e6, "200M": 187.6e6}


def widths(size):
    with initialize_config_module("r2dreamer.configs", version_base=None):
        return dict(compose(f"model/size{size}").model)


def counts(size):
    with torch.device("meta"):
        agent = build_agent(ObservationSpace({"pixels": (3, 64, 64)}, {}), ActionSpace(6, False), **widths(size))
    return agent.parameter_counts()


def test_the_12m_parts_have_the_published_parameter_counts():
    assert counts("12M") == {
        "encoder": 220_416,
        "rssm": 5_979_648,
        "projection": 2_621_440,
        "reward": 721_407,
        "continue": 656_129,
        "value": 853_503,
        "actor": 791_052,
    }


@pytest.mark.parametrize("size", SIZES)
def test_all_sizes_have_the_published_total(size):
    assert sum(counts(size).values()) == pytest.approx(SIZES[size], rel=0.01)


def test_the_smallest_and_largest_size_build():
    assert sum(counts("1M").values()) < 1e6
    assert sum(counts("400M").values()) > 400e6


def test_block_linear_with_a_shared_input_equals_the_input_repeated_for_every_block():
    blocks, shared_size = 3, 5
    layer = BlockLinear(6, 9, blocks, shared_features=shared_size)
    value, shared = torch.randn(4, 6), torch.randn(4, shared_size)
    repeated = torch.cat([value.unflatten(-1, (blocks, 2)), shared.unsqueeze(1).expand(-1, blocks, -1)], -1)
    dense = layer.shared_weight.unflatten(0, (blocks, 3)).transpose(1, 2)  # [G, shared, out/G]
    kernel = torch.cat([layer.weight, dense], 1)  # [G, in/G + shared, out/G]
    expected = torch.einsum("ngi,gio->ngo", repeated, kernel).flatten(-2) + layer.bias
    torch.testing.assert_close(layer(value, shared), expected)


def test_initialisation_is_a_cut_normal_of_the_stated_width():
    weight = Linear(400, 300).weight
    width = 1.1368 / 20
    assert weight.abs().max() <= 2 * width
    assert weight.std().item() == pytest.approx(0.88 * width, rel=0.02)  # a normal cut at two std keeps 0.88 of its std


def test_outputs_start_where_the_paper_says():
    agent = tiny_agent()
    latents = TensorDict({"state": torch.randn(9, CATEGORICALS * CLASSES), "belief": torch.randn(9, BELIEF)}, [9])
    assert agent.value_model(latents.copy())["state_value"].abs().max() == 0
    assert agent.actor.get_dist(latents.copy()).mean.abs().max() < 0.1


def test_samples_are_exactly_one_hot_follow_the_mixed_probabilities_and_pass_gradients():
    latent = CategoricalLatent(2, 5, unimix=0.2)
    logits = torch.tensor([[0.0, 1.0, 2.0, -9.0, 0.5], [3.0, 0.0, 0.0, 0.0, -40.0]]).requires_grad_()
    probs = 0.8 * torch.softmax(logits, -1) + 0.2 / 5
    samples = latent.sample(logits.expand(20000, 2, 5)).unflatten(-1, (2, 5))
    assert set(samples.unique().tolist()) == {0.0, 1.0}
    assert (samples.sum(-1) == 1).all()
    torch.testing.assert_close(samples.mean(0), probs, atol=0.012, rtol=0)
    sample = latent.sample(logits)
    weight = torch.randn_like(sample)
    (actual,) = torch.autograd.grad((sample * weight).sum(), logits)
    (expected,) = torch.autograd.grad((probs.flatten() * weight.flatten()).sum(), logits)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="num_classes=1: .* know nothing"):
        CategoricalLatent(30, 1)


def test_the_sequence_pass_equals_single_steps():
    """Beliefs and logits of RSSMRollout against prior and posterior called step by step on its own sampled states."""
    agent = tiny_agent()
    records = tiny_records(agent)
    agent.encoder(records)
    out = RSSMRollout(*rssm_modules(agent))(records.copy())
    for t in range(TIME):
        keep = (~records["is_init"][:, t]).float()
        state = (out["next", "state"][:, t - 1] if t else records["state"][:, 0]) * keep
        belief = (out["next", "belief"][:, t - 1] if t else records["belief"][:, 0]) * keep
        prior_logits, _, belief = agent.prior(state, belief, records["action"][:, t] * keep)
        posterior_logits, _ = agent.posterior(belief, records["next", "encoded_latents"][:, t])
        torch.testing.assert_close(out["next", "belief"][:, t], belief)
        torch.testing.assert_close(out["next", "prior_logits"][:, t], prior_logits)
        torch.testing.assert_close(out["next", "posterior_logits"][:, t], posterior_logits)


@pytest.mark.parametrize("rollout_class", [RSSMRollout, RSSMRolloutV3])
@pytest.mark.parametrize("networks", ["ours", "torchrl"])
def test_our_rssm_and_torchrls_are_interchangeable_in_the_world_model(rollout_class, networks):
    agent = tiny_agent()
    prior = posterior = None
    if networks == "torchrl":
        sizes = dict(hidden_dim=12, rnn_hidden_dim=BELIEF, num_categoricals=CATEGORICALS, num_classes=CLASSES)
        prior = RSSMPriorV3(action_shape=(ACTIONS,), action_dim=ACTIONS, recurrent_model="block_gru", **sizes)
        posterior = RSSMPosteriorV3(obs_embed_dim=agent.encoder.out_features, use_rms_norm=True, **sizes)
    rollout = rollout_class(*rssm_modules(agent, prior, posterior))
    world_model = TensorDictSequential(agent.encoder, rollout, *list(agent.world_model.module)[2:])
    loss = R2DreamerWorldModelLoss(world_model)
    losses, posterior_records = loss(tiny_records(agent))
    total = total_loss(losses)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rollout.parameters())
    assert posterior_records["next", "prior_logits"].shape == (3, TIME, CATEGORICALS, CLASSES)


def test_an_episode_start_cuts_every_memory():
    """Nothing before is_init reaches what comes after: beliefs there are the same whatever came before."""
    agent = tiny_agent()
    records = tiny_records(agent)
    records["is_init"][:] = False
    records["is_init"][:, 3] = True
    other = records.clone()
    other["belief"][:, 0] += 1
    other["action"][:, :4] *= -1  # the action *of* the first record counts as before it
    other["next", "speed"][:, :3] += 1
    beliefs = []
    for data in (records, other):
        torch.manual_seed(7)
        beliefs.append(agent.world_model(data)["next", "belief"])
    assert not torch.allclose(beliefs[0][:, 2], beliefs[1][:, 2])
    assert torch.equal(beliefs[0][:, 3], beliefs[1][:, 3])


def test_what_stands_before_an_episode_may_be_anything():
    agent = tiny_agent()
    records = tiny_records(agent)
    records["is_init"][:, 0] = True
    beliefs = []
    for value in (0.5, torch.nan, torch.inf):
        for key in ("state", "belief", "action"):
            records[key][:, 0] = value
        torch.manual_seed(7)
        beliefs.append(agent.world_model(records.clone())["next", "belief"])
    assert all(torch.equal(each, beliefs[0]) for each in beliefs)
    dtypes, project = [], agent.prior.project_action
    agent.prior.project_action = lambda action: dtypes.append(action.dtype) or project(action)
    agent.world_model(records.set("action", records["action"].isfinite().long()))  # one-hot, as in TorchRL
    assert dtypes == [torch.float32]


def test_two_different_images_give_two_different_actions():
    """A blind policy, acting on the prior, would pass most tests but this one."""
    agent = tiny_agent(vectors=False)
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    actions = []
    for image in (black, black + 200):
        torch.manual_seed(0)
        with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
            step = agent.policy(TensorDict({"pixels": image, "is_init": torch.ones(1, 1, dtype=torch.bool)}, [1]))
        actions.append(step["action"])
    assert not torch.allclose(actions[0], actions[1])


def test_the_policy_forgets_at_is_init_and_ignores_what_a_fresh_buffer_holds():
    agent = tiny_agent(images=False)
    fresh = TensorDict({"speed": torch.ones(2, 6), "is_init": torch.ones(2, 1, dtype=torch.bool)}, [2])
    used = fresh.clone().update(
        {
            "state": torch.full((2, CATEGORICALS * CLASSES), torch.nan),
            "belief": torch.full((2, BELIEF), torch.nan),
            "action": torch.full((2, ACTIONS), torch.nan),
        }
    )
    results = []
    for data in (fresh, used):
        torch.manual_seed(0)
        results.append(agent.policy(data)["belief"])
    assert torch.equal(*results)
    assert results[0].isfinite().all()


def test_acting_follows_training_step_by_step():
    """The policy's beliefs along a sequence are those of the sequence pass, given the same sampled states."""
    agent = tiny_agent(images=False)
    records = tiny_records(agent)
    records["is_init"][:] = False
    records["is_init"][:, 0] = True
    out = agent.world_model(records.clone())
    step = TensorDict({}, [3])
    for t in range(TIME):
        step["speed"], step["is_init"] = records["next", "speed"][:, t], records["is_init"][:, t]
        step["action"] = records["action"][:, t]
        if t:
            step["state"] = out["next", "state"][:, t - 1].detach()
        agent.policy(step)
        torch.testing.assert_close(step["belief"], out["next", "belief"][:, t])


@pytest.mark.parametrize("discrete", [False, True])
def test_imagination_builds_no_graph_and_follows_the_prior(discrete):
    agent = tiny_agent(discrete=discrete)
    start = TensorDict({"state": torch.zeros(6, CATEGORICALS * CLASSES), "belief": torch.randn(6, BELIEF)}, [6])
    imagined = agent.imagination.rollout(4, agent.actor, tensordict=start)
    assert imagined.shape == (6, 4)
    assert not any(value.requires_grad for value in imagined.values(True, True))
    assert torch.equal(imagined["belief"][:, 1:], imagined["next", "belief"][:, :-1])
    _, belief = agent.prior(imagined["state"], imagined["belief"], imagined["action"])[1:]
    torch.testing.assert_close(imagined["next", "belief"], belief.detach())
    if discrete:
        assert (imagined["action"].sum(-1) == 1).all()


def test_imagination_rolls_out_as_an_environment_does():
    agent = tiny_agent(discrete=False)
    start = TensorDict({"state": torch.zeros(6, CATEGORICALS * CLASSES), "belief": torch.randn(6, BELIEF)}, [6])
    dream = lambda policy=agent.actor, start=start: agent.imagination.rollout(
        4, policy, tensordict=start, auto_reset=False, break_when_any_done=False
    )
    torch.manual_seed(0)
    sampled = dream()
    assert not sampled["done"].any() and not sampled["next", "terminated"].any()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        greedy = dream()
        torch.testing.assert_close(greedy["action"][:, 0], agent.actor.get_dist(start).deterministic_sample)
    assert not torch.equal(sampled["action"][:, 0], greedy["action"][:, 0])
    torch.manual_seed(0)
    with set_exploration_type(ExplorationType.RANDOM):
        assert torch.equal(dream()["action"], sampled["action"])
    constant = lambda latents: latents.set("action", torch.full((*latents.shape, ACTIONS), 0.5))
    assert (dream(constant)["action"] == 0.5).all()  # any callable is a policy
    torch.manual_seed(0)
    reshaped = dream(start=start.reshape(2, 3))
    assert reshaped.shape == (2, 3, 4)
    torch.testing.assert_close(reshaped.reshape(6, 4), sampled)
    assert dream(start=start[0]).shape == (4,)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, ValueError, "begins from latents.*'state' and 'belief'"),
        ({"tensordict": TensorDict({"belief": torch.zeros(6, BELIEF)}, [6])}, ValueError, r"was given \['belief'\]"),
        ({"tensordic": None}, TypeError, "tensordic"),
    ],
)
def test_imagination_refuses_what_it_cannot_begin_from(arguments, error, said):
    agent = tiny_agent()
    with pytest.raises(error, match=said):
        agent.imagination.rollout(4, agent.actor, **arguments)


def test_encoder_mixes_images_and_vectors_and_refuses_odd_sizes():
    agent = tiny_agent()
    assert agent.encoder.out_features == 4 * 4 * 4 + 12
    with pytest.raises(ValueError, match="divisible by the encoder's stride 16"):
        ImageEncoder((3, 60, 64), depth=2)
    with pytest.raises(ValueError, match=r"seem to be \[H, W, C\].*ToTensorImage"):
        ImageEncoder((64, 64, 3), depth=2)
    with pytest.raises(ValueError, match="one size"):
        build_agent(ObservationSpace({"a": (3, 64, 64), "b": (3, 32, 32)}, {}), ActionSpace(2, True), **widths("1M"))
    with pytest.raises(ValueError, match="model.hidden=0"):
        tiny_agent(hidden=0)


def test_vectors_may_go_into_the_embedding_as_they_are():
    agent = tiny_agent(images=False, vector_layers=0, heads={})
    assert agent.encoder.out_features == 6
    agent.world_model(tiny_records(agent))


def test_two_images_concatenate_on_channels():
    agent = build_agent(
        ObservationSpace({"left": (3, 16, 16), "right": (1, 16, 16)}, {}),
        ActionSpace(2, True),
        belief=16, hidden=8, classes=4, depth=2, categoricals=3, encoder_multipliers=(1, 2),
    )  # fmt: skip
    assert agent.encoder.image.convolutions[0].in_channels == 4
    records = tiny_records(agent)
    assert agent.encoder(records)["next", "encoded_latents"].shape == (3, 5, agent.encoder.out_features)


def test_frequencies_add_sines_and_cosines_of_the_symlog_of_a_vector():
    vectors = torch.tensor([[0.0, 3.0]]), torch.tensor([[-1.0]])
    symlog = torch.tensor([[0.0, math.log(4), -math.log(2)]])
    expected = torch.cat([symlog, (2 * symlog).sin(), (2 * symlog).cos(), (8 * symlog).sin(), (8 * symlog).cos()], -1)
    for make in (VectorEncoder, partial(VectorEncoder, make_layers=elu_mlp)):
        encoder = make(3, units=4, layers=1, frequencies=(2, 8))
        assert torch.allclose(encoder(*vectors), encoder.layers(expected), atol=1e-6)
        assert torch.equal(make(3, units=4, layers=0)(*vectors), symlog)

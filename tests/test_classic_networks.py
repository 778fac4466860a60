"""The networks of Dreamer V1 and V2 against plain arithmetic, and every number that their configs give."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from launcher import config
from test_classic import actor_loss, every_generation, made, start_of
from torch import nn

from r2dreamer.dreamer import ActionSpace, ObservationSpace
from r2dreamer.dreamer.classic.networks import ConvDecoder, ConvEncoder, SquashedParameters
from r2dreamer.examples.settings.schema import check
from r2dreamer.examples.training.setup import make_agent

array = lambda tensor: tensor.detach().double().numpy()
elu = lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)
relu = lambda x: np.maximum(x, 0)


def dense(layer, rows):
    return rows @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))


def elu_layers(layers, rows):
    """Every linear but the last is followed by an ELU."""
    *hidden, last = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in hidden:
        rows = elu(dense(layer, rows))
    return dense(last, rows)


def test_the_encoder_is_four_strided_convolutions_with_relu():
    encoder = ConvEncoder((3, 64, 64), depth=1)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    value = array(images) / 255 - 0.5
    for layer in (layer for layer in encoder.layers if isinstance(layer, nn.Conv2d)):
        size, kernels = (value.shape[-1] - 4) // 2 + 1, array(layer.weight)
        out = np.zeros((2, len(kernels), size, size))
        for i in range(size):
            for j in range(size):
                out[:, :, i, j] = np.einsum("nchw,ochw->no", value[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4], kernels)
        value = relu(out + array(layer.bias)[:, None, None])
    np.testing.assert_allclose(array(encoder(images)), value.reshape(2, -1), rtol=1e-4, atol=1e-5)


def test_the_decoder_is_four_transposed_convolutions_with_relu_between():
    decoder = ConvDecoder(7, (3, 64, 64), depth=1)
    state, belief = torch.randn(2, 3), torch.randn(2, 4)
    value = dense(decoder.first, np.concatenate([array(state), array(belief)], -1))[:, :, None, None]
    layers = [layer for layer in decoder.layers if isinstance(layer, nn.ConvTranspose2d)]
    for layer in layers:
        kernels = array(layer.weight)  # [in, out, k, k]: what one input adds to a square of the output
        side, kernel = value.shape[-1], kernels.shape[-1]
        out = np.zeros((2, kernels.shape[1], 2 * (side - 1) + kernel, 2 * (side - 1) + kernel))
        for i in range(side):
            for j in range(side):
                drawn = np.einsum("nc,cohw->nohw", value[:, :, i, j], kernels)
                out[:, :, 2 * i : 2 * i + kernel, 2 * j : 2 * j + kernel] += drawn
        value = out + array(layer.bias)[:, None, None]
        value = value if layer is layers[-1] else relu(value)
    np.testing.assert_allclose(array(decoder(state, belief)), value + 0.5, rtol=1e-4, atol=1e-4)


def test_convolutions_begin_as_the_specification_says():
    layers = [*ConvEncoder((3, 64, 64), depth=16).layers, *ConvDecoder(7, (3, 64, 64), depth=16).layers]
    convolutions = [layer for layer in layers if not isinstance(layer, nn.ReLU)]
    inputs = [3 * 16, 16 * 16, 32 * 16, 64 * 16]  # of one output: channels times kernel
    inputs += [
        32 * 16,
        64 * 25 / 4,
        32 * 36 / 4,
        16 * 36 / 4,
    ]  # of stride 2, a quarter of the kernel; the first map is 1x1
    for layer, fan_in in zip(convolutions, inputs, strict=True):
        cut = 2 * 1.1368 / fan_in**0.5
        assert (layer.bias == 0).all() and 0.95 * cut < layer.weight.abs().max() <= cut
        assert layer.weight.std().item() == pytest.approx(1 / fan_in**0.5, rel=0.1)


@every_generation
def test_dense_layers_are_linear_and_elu(generation):
    agent = made(generation, actor_layers=2, reward_layers=2, vector_layers=2)
    state, belief, action = (torch.randn(3, size) for size in (agent.sizes.state, agent.sizes.belief, 2))
    features = np.concatenate([array(state), array(belief)], -1)
    for head in (agent.reward, agent.value):
        np.testing.assert_allclose(array(head(state, belief)), elu_layers(head.layers, features), rtol=1e-4, atol=1e-6)
    actor = agent.actor[0].module
    np.testing.assert_allclose(
        array(super(type(actor), actor).forward(state, belief)),
        elu_layers(actor.layers, features),
        rtol=1e-4,
        atol=1e-6,
    )
    prior, posterior, embedding = agent.prior, agent.posterior, torch.randn(3, agent.encoder.out_features)
    expected = elu_layers(prior.head, array(belief))
    np.testing.assert_allclose(array(prior.head(belief)), expected, rtol=1e-4, atol=1e-6)
    hidden = elu(dense(posterior.belief_in, array(belief)) + dense(posterior.embedding_in, array(embedding)))
    flat = torch.from_numpy(dense(posterior.out, hidden)).float()
    torch.testing.assert_close(posterior(belief, embedding)[0], posterior.latent.logits(flat), rtol=1e-4, atol=1e-5)
    core, entered = prior.core, []
    core.cell.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    core(state, belief, 3 * action)
    bounded = np.clip(3 * array(action), -1, 1)
    joined = dense(core.state_in, array(state)) + dense(core.action_in, bounded)
    np.testing.assert_allclose(array(entered[0]), elu(joined), rtol=1e-4, atol=1e-6)
    vector = agent.encoder.vector
    speed = array(torch.randn(3, 6))
    squeezed = np.sign(speed) * np.log1p(np.abs(speed))
    for layer in (layer for layer in vector.layers if isinstance(layer, nn.Linear)):
        squeezed = elu(dense(layer, squeezed))
    np.testing.assert_allclose(array(vector(torch.from_numpy(speed).float())), squeezed, rtol=1e-4, atol=1e-6)


def test_the_first_generations_actor_has_a_wide_and_bounded_normal():
    outputs = torch.tensor([[0.0, 2.0, 900.0, 0.0, 3.0, -50.0]])
    loc, scale = SquashedParameters()(outputs)
    torch.testing.assert_close(loc, torch.tensor([[0.0, 5 * math.tanh(0.4), 5.0]]))
    at_three = math.log1p(math.exp(3 + math.log(math.exp(5) - 1)))
    torch.testing.assert_close(scale, torch.tensor([[5.0001, at_three + 1e-4, 1e-4]]), rtol=1e-5, atol=1e-6)


@every_generation
def test_what_the_policy_reads_is_detached_from_the_dynamics(generation):
    """The return's gradient reaches an action through the dynamics, not through the policy's view of earlier ones."""
    agent = made(generation)
    with torch.no_grad():
        for head in (agent.reward, agent.value, agent.actor[0].module):
            nn.init.normal_(head.layers[-1].weight)
    read = []
    distribution = agent.actor.get_dist
    agent.actor.get_dist = lambda latents: read.append(latents.select("state", "belief")) or distribution(latents)
    losses, _ = actor_loss(agent, imagination_horizon=4)(start_of(agent))
    losses["loss_actor"].backward()
    assert len(read) >= 4
    assert not any(value.requires_grad for latents in read for value in latents.values())


def linear(*widths):
    return sum(inputs * outputs + outputs for inputs, outputs in pairwise(widths))


ENCODER = sum(i * o * 16 + o for i, o in pairwise((3, 32, 64, 128, 256)))  # 4x4 kernels
UPWARDS = sum(i * o * k * k + o for (i, o), k in zip(pairwise((1024, 128, 64, 32, 3)), (5, 5, 6, 6), strict=True))
ACTIONS = 6
PARAMETERS = {  # belief D, state Z, features D + Z
    "dreamerv1": {
        "encoder": ENCODER,
        "rssm": linear(30 + ACTIONS, 200) + 3 * (2 * 200 * 200 + 2 * 200) + linear(200, 200, 60)  # GRU, prior
        + linear(200 + 1024, 200, 60),
        "decoder": linear(230, 1024) + UPWARDS,
        "reward": linear(230, 400, 400, 1),
        "value": linear(230, 400, 400, 400, 1),
        "actor": linear(230, 400, 400, 400, 400, 2 * ACTIONS),
    },
    "dreamerv2": {
        "encoder": ENCODER,
        "rssm": linear(1024 + ACTIONS, 600) + 1200 * 1800 + 2 * 1800 + linear(600, 600, 1024)  # LayerNorm GRU, prior
        + linear(600 + 1024, 600, 1024),
        "decoder": linear(1624, 1024) + UPWARDS,
        "reward": linear(1624, 400, 400, 400, 400, 1),
        "continue": linear(1624, 400, 400, 400, 400, 1),
        "value": linear(1624, 400, 400, 400, 400, 1),
        "actor": linear(1624, 400, 400, 400, 400, 2 * ACTIONS),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_part_has_the_parameters_of_the_published_widths(name):
    cfg = config(f"algorithm={name}")
    spaces = ObservationSpace({"pixels": (3, 64, 64)}, {}), ActionSpace(ACTIONS, discrete=False)
    assert make_agent(cfg.algorithm, cfg.model, *spaces).parameter_counts() == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_configs_hold_the_published_numbers(name):
    algorithm = config(f"algorithm={name}").algorithm
    found = {
        "kl": {key: value for key, value in algorithm.kl.items() if key != "_target_"},
        "latent": algorithm.agent.latent.get("min_std", algorithm.agent.latent.get("unimix")),
        "noise": algorithm.agent.noise,
        "squashed": algorithm.agent.squashed_actions,
        "dynamics": algorithm.actor.dynamics,
        "returns": (algorithm.actor.imagination_horizon, algorithm.actor.discount, algorithm.actor.lmbda),
        "entropy": algorithm.actor.entropy_bonus,
        "norm": algorithm.optimizer.max_norm,
        "copied": algorithm.slow_critic.get("rate"),
        "bootstrap": algorithm.value.get("bootstrap_target", False),
        "replay value": algorithm.replay_value_weight,
    }
    assert found == {
        "dreamerv1": {
            "kl": {"weight": 1.0, "free_nats": 3.0}, "latent": 0.1, "noise": 0.3, "squashed": True, "dynamics": 1.0,
            "returns": (15, 0.99, 0.95), "entropy": 0.0, "norm": 100.0, "copied": None, "bootstrap": False,
            "replay value": 0.0,
        },
        "dreamerv2": {
            "kl": {"dynamics": 0.8, "representation": 0.2, "free_nats": 1.0, "average_first": True, "unimix": 0.0}, "latent": 0.0,
            "noise": 0.0, "squashed": False, "dynamics": 0.1, "returns": (15, 0.997, 0.95), "entropy": 1e-3,
            "norm": 100.0, "copied": 0.01, "bootstrap": True, "replay value": 0.0,
        },
    }[name]  # fmt: skip


@pytest.mark.parametrize("member", ["experiment=quickstart_dreamerv1", "algorithm=r2dreamer"])
def test_units_and_a_continue_head_may_be_left_out(member):
    cfg = config("env=gym", "env.task=CartPole-v1", member, "model.units=null", "model.continue_layers=null")
    check(cfg, "config")
    agent = make_agent(cfg.algorithm, cfg.model, ObservationSpace({}, {"observation": 4}), ActionSpace(2, True))
    assert "continue" not in agent.parts() and agent.continue_model is None
    assert agent.sizes.units == cfg.model.hidden

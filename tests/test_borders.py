"""What comes from a user's own code, and was once taken in silence: memory, divergences, actions, names."""

import functools

import gymnasium
import numpy as np
import pytest
import torch
from agents import ACTIONS, WIDTHS, tiny_agent, tiny_records
from gymnasium import spaces
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.envs import ActionScaling, GymEnv, GymWrapper, InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.utils import step_mdp

from r2dreamer.dreamer import (
    ActionSpace,
    GaussianLatent,
    Imagination,
    ObservationSpace,
    build_agent,
    build_classic_agent,
    projection_head,
)
from r2dreamer.envs import AdversarialPatch, ClippedActionScaling, DMCSubtle, make_gym, make_vector_env
from r2dreamer.envs.base.images import to_pixels
from r2dreamer.envs.base.simulator import Simulator
from r2dreamer.examples.attacks.occlusion import OcclusionSaliency
from r2dreamer.examples.settings.schema import ARGUMENTS
from r2dreamer.examples.training.evaluation import _to_image
from r2dreamer.losses import (
    BarlowTwins,
    CategoricalKL,
    DreamerActorLoss,
    DreamerValueLoss,
    GaussianKL,
    R2DreamerWorldModelLoss,
    SIGReg,
    VICReg,
)


def refused(said):
    return pytest.raises(ValueError, match=said)


# --- The policy's memory ---


def test_the_action_that_step_mdp_drops():
    torch.manual_seed(0)
    env = TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=False), InitTracker())
    agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, True), **WIDTHS)
    after = env.step(agent.policy(env.reset()))
    with refused(r"action of the step before is absent.*step_mdp\(td, exclude_action=False\)"):
        agent.policy(step_mdp(after))
    for following in (env.step_mdp(after), step_mdp(after, exclude_action=False)):
        assert torch.equal(following["action"], after["action"])
        agent.policy(following)


# --- Divergences ---


def test_the_divergence_fits_the_state():
    sizes = dict(
        belief=8, hidden=8, depth=2, categoricals=5, classes=1, vector_layers=1, reward_layers=1, actor_layers=1
    )
    gaussian = functools.partial(
        build_classic_agent, ObservationSpace({}, {"speed": 6}), ActionSpace(ACTIONS, False), value_layers=1,
        latent=GaussianLatent, cell=torch.nn.GRUCell, squashed_actions=True, noise=0.0,
    )  # fmt: skip
    model = gaussian(**sizes, heads={"projection": projection_head}).world_model
    with refused(r"kl=CategoricalKL does not fit .* state is Gaussian: pass kl=GaussianKL"):
        R2DreamerWorldModelLoss(model)
    R2DreamerWorldModelLoss(model, kl=GaussianKL())
    with refused(r"kl=GaussianKL does not fit .* state is categorical: pass kl=CategoricalKL"):
        R2DreamerWorldModelLoss(tiny_agent(images=False).world_model, kl=GaussianKL())
    for change in ({"actor_layers": -1}, {"belief": 0}):
        with refused("model.*must"):
            gaussian(**{**sizes, **change}, heads={})


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: CategoricalKL(dynamics=bad),
        lambda bad: CategoricalKL(free_nats=bad),
        lambda bad: CategoricalKL(unimix=bad),
        lambda bad: GaussianKL(weight=bad),
        lambda bad: BarlowTwins(redundancy_weight=bad),
        lambda bad: VICReg(variance=bad),
        lambda bad: SIGReg(gaussian=bad),
        lambda bad: R2DreamerWorldModelLoss(tiny_agent(images=False).world_model, reward_weight=bad),
        lambda bad: actor_loss(tiny_agent(images=False), entropy_bonus=bad),
        lambda bad: DreamerValueLoss(tiny_agent().value_model).replay_value_loss(TensorDict({}), horizon=bad),
        lambda bad: DreamerValueLoss(tiny_agent().value_model).replay_value_loss(TensorDict({}), lmbda=bad),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_weights_are_numbers_from_zero_on(make, bad):
    with refused("must"):
        make(bad)


def actor_loss(agent, **options):
    return DreamerActorLoss(agent.actor, agent.value_model, agent.imagination, **options)


# --- Names ---


def test_keys_that_are_refused_change_nothing():
    agent = tiny_agent(images=False)
    loss = R2DreamerWorldModelLoss(agent.world_model)
    with refused("continue_pred and continuation"):
        loss.set_keys(continuation="continue_pred")
    loss.set_keys(reward="reward")
    assert loss(tiny_records(agent))[0]["loss_continue"].isfinite()


@pytest.mark.parametrize("name", ["loc", "state", "belief", "encoded_latents", "reward_logits", "true_reward"])
def test_an_observation_of_a_name_that_the_agent_writes(name):
    with refused(rf"observation '{name}' .* would be overwritten.*RenameTransform"):
        build_agent(ObservationSpace({}, {name: 4}), ActionSpace(2, False), **WIDTHS)


def test_a_gate_inside_of_a_continue_head_is_no_probability():
    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gate = torch.nn.Linear(16, 1), torch.nn.Sigmoid()

        def forward(self, belief):
            return self.linear(belief * self.gate(belief))

    head = TensorDictModule(Gated(), in_keys=["belief"], out_keys=["continue_pred"])
    agent = tiny_agent(images=False)
    loss = DreamerActorLoss(agent.actor, agent.value_model, agent.imagination, continue_model=head)
    assert loss.continue_name == "continue_pred"
    head.module = torch.nn.Sequential(torch.nn.Linear(16, 1), torch.nn.Sequential(torch.nn.Sigmoid()))
    with refused("comes out of a sigmoid"):
        DreamerActorLoss(agent.actor, agent.value_model, agent.imagination, continue_model=head)


def test_an_imagination_says_which_names_it_knows():
    agent = tiny_agent(images=False)
    start = TensorDict({key: torch.zeros(2, size) for key, size in agent.latent_sizes.items()}, [2])
    policy = TensorDictModule(lambda state: torch.zeros(*state.shape[:-1], ACTIONS), ["state"], ["my_action"])
    with refused("policy wrote no 'action'; there is belief, my_action, state"):
        agent.imagination.rollout(2, policy, tensordict=start)
    reward = TensorDictModule(lambda state: state[..., :1], in_keys=["state"], out_keys=["r"])
    with refused("reward head wrote no 'reward'; there is belief, r, state"):
        Imagination(agent.prior, reward).rollout(2, agent.actor, tensordict=start)


# --- Batches ---


@pytest.mark.parametrize("fast", [True, False])
def test_an_empty_batch(fast):
    agent = tiny_agent(fast=fast)
    records = tiny_records(agent)[:0]
    records.update(agent.encoder(records))
    assert agent.rollout(records)["next", "belief"].shape == (0, 5, 16)
    starts = TensorDict({key: torch.zeros(0, size) for key, size in agent.latent_sizes.items()}, [0])
    assert agent.imagination.rollout(2, agent.actor, tensordict=starts).shape == (0, 2)


# --- Actions ---


class Noted(Simulator):
    """Keeps the action that it was given."""

    def __init__(self, actions):
        super().__init__(observations={"place": (1,)}, actions=actions)

    def begin(self):
        return {"place": np.zeros(1, np.float32)}

    def advance(self, action):
        vars(self)["given"] = action
        return self.begin(), 0.0, False, False

    def seed(self, number):
        pass


def test_a_dimension_with_one_bound_is_clipped_to_it():
    bounds = np.array([0, -2, -np.inf, -np.inf]), np.array([np.inf, 4, 3, np.inf])
    env = Noted(bounds)
    env.reset_arrays()
    env.step_arrays(np.full(4, -9.0, np.float32))
    assert env.given.tolist() == [0, -2, -9, -9]
    env.step_arrays(np.full(4, 9.0, np.float32))
    assert env.given.tolist() == [9, 4, 3, 9]


def test_no_action_leaves_the_simulators_bounds_by_a_rounding():
    generator = np.random.default_rng(0)
    low = generator.uniform(-9, 9, 500).round(2)
    high = low + generator.uniform(0.1, 9, 500).round(2)
    env = Noted((low, high))  # in double precision
    env.reset_arrays()
    for sign in (-1, 1):
        env.step_arrays(np.full(500, sign, np.float32))
        assert (low <= env.given).all() and (env.given <= high).all()
        assert np.allclose(env.given, high if sign > 0 else low)


def test_clipped_scaling_does_not_round_beyond_a_bound():
    class Narrow(gymnasium.Env):
        observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Box(-8, np.float32(3.3), (1,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            assert self.action_space.contains(action)
            return np.zeros(1, np.float32), 0.0, False, False, {}

    ours = TransformedEnv(GymWrapper(Narrow()), ClippedActionScaling())
    plain = TransformedEnv(GymWrapper(Narrow()), ActionScaling())
    ours.step(ours.reset().set("action", torch.ones(1)))
    with pytest.raises(AssertionError):
        plain.step(plain.reset().set("action", torch.ones(1)))


@pytest.mark.parametrize("action", [torch.zeros(1), torch.zeros(2, 1), torch.tensor([0.0, np.nan])])
def test_an_action_of_another_shape_or_of_nan(action):
    env = Noted((-np.ones(2), np.ones(2)))
    with refused("The action .* expected 2 finite numbers.*diverged"):
        env.step(env.reset().set("action", action))


def test_choices_that_are_weighed_are_the_same_alone_and_in_a_vector_environment():
    alone, many = (
        make_gym("CartPole-v1", seed=5),
        make_vector_env(functools.partial(make_gym, "CartPole-v1"), [5], parallel=False),
    )
    weighed = torch.tensor([0.2, 0.8])
    one = alone.step(alone.reset().set("action", weighed))["next", "observation"]
    other = many.step(many.reset().set("action", weighed[None]))["next", "observation"]
    assert torch.equal(one, other[0])
    with refused(r"actions have shape \[1, 1\].*take \[1, 2\]"):
        many.step(many.reset().set("action", weighed[None, :1]))
    with refused("NaN or Inf: the policy"):
        many.step(many.reset().set("action", weighed[None] / 0 * 0))


@pytest.mark.parametrize("option", [{"standard_normal": False}, {"loc": 0.0, "scale": 0.5}])
def test_clipped_scaling_has_one_range(option):
    with refused("ClippedActionScaling"):
        ClippedActionScaling(**option)


# --- Ends of episodes ---


def test_resetting_some_does_not_end_others_again():
    factory = functools.partial(make_gym, "CartPole-v1", time_limit=3)
    for env in (make_vector_env(factory, [1, 2], parallel=False), SerialEnv(2, functools.partial(factory, seed=1))):
        root = env.reset()
        for _ in range(3):
            _, root = env.step_and_maybe_reset(root.set("action", torch.tensor([[1, 0], [1, 0]])))
        some = env.reset(TensorDict({"_reset": torch.tensor([[True], [False]])}, [2]))
        assert not any(some[flag].any() for flag in ("done", "terminated", "truncated"))


# --- Images, patches and small things ---


@pytest.mark.parametrize("box", [spaces.Box(0, 255, (7, 7, 3), np.uint8), spaces.Box(0, 10, (16, 16, 3), np.uint8)])
def test_a_grid_of_codes_is_no_photograph(box):
    class Grid(gymnasium.Env):
        observation_space, action_space = box, spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.full(box.shape, 3, np.uint8), {}

        def step(self, action):
            return np.full(box.shape, 3, np.uint8), 0.0, False, False, {}

    gymnasium.register("Codes-v0", Grid)
    try:
        first = make_gym("Codes-v0", seed=0).reset()
    finally:
        del gymnasium.registry["Codes-v0"]
    assert first["observation"].tolist() == [3.0] * np.prod(box.shape)


def test_a_picture_with_opacity_becomes_grey():
    image = np.zeros((8, 8, 4), np.uint8)
    image[..., 1], image[..., 3] = 100, 255
    assert to_pixels(image, grayscale=True).shape == (1, 8, 8) and (to_pixels(image, grayscale=True) == 59).all()
    with refused("looks like four grey frames"):
        to_pixels(image.transpose(2, 0, 1), grayscale=True)


def test_a_film_shows_colours_and_not_their_opacity():
    colour = torch.tensor([200, 20, 0, 255], dtype=torch.uint8).view(4, 1, 1).expand(4, 2, 2)
    assert _to_image(colour).tolist() == [[[200, 20, 0]] * 2] * 2
    frames = torch.tensor([1, 2, 3, 4], dtype=torch.uint8).view(4, 1, 1).expand(4, 2, 2)
    assert _to_image(frames).tolist() == [[[4, 4, 4]] * 2] * 2  # the newest


def test_a_task_that_fails_to_build_is_not_called_unknown():
    class Broken(gymnasium.Env):
        def __init__(self, render_mode=None):
            raise gymnasium.error.Error("its licence has run out")

    gymnasium.register("Broken-v0", Broken)
    try:
        with refused("'Broken-v0' could not be made: its licence has run out"):
            make_gym("Broken-v0", seed=0)
        with refused("no task 'Brokem-v0'.*Broken-v0"):
            make_gym("Brokem-v0", seed=0)
    finally:
        del gymnasium.registry["Broken-v0"]


def test_windows_that_would_leave_gaps():
    agent = tiny_agent(vectors=False)
    with refused("occlusion.stride=3: .* at most the window"):
        OcclusionSaliency(agent, "pixels", window=2, stride=3)


def test_the_free_camera_is_a_number():
    assert ARGUMENTS["camera"].read(-1) == -1 and ARGUMENTS["camera"].read("side") == "side"


def test_a_patch_of_nested_images_comes_back(tmp_path):
    patch = AdversarialPatch((2, 2), pixels_key=("camera", "pixels"))
    again = AdversarialPatch.load(patch.save(tmp_path / "patch.npz"))
    assert again.in_keys == patch.in_keys and torch.equal(again.delta, patch.delta)


@pytest.mark.parametrize("nothing", ["", []])
def test_subtle_names_something(nothing):
    with refused("names nothing"):
        DMCSubtle(geoms=nothing, shrink=0.5)

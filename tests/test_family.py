"""Every member of the family trains from the one script, by its name alone, and logs whether it collapses."""

import subprocess
import sys

import pytest
import torch
from launcher import CARTPOLE, EXAMPLES, PENDULUM, TINY, config, lines, train_here
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from r2dreamer.dreamer import load_pretrained

SHARED = {"reward", "actor", "value"}
V3 = SHARED | {"dynamics", "representation", "continue", "replay_value"}
LOSSES = {
    "r2dreamer": V3 | {"barlow"},
    "dreamer": V3 | {"reconstruction"},
    "infonce": V3 | {"infonce"},
    "vicreg": V3 | {"vicreg"},
    "nedreamer": V3 | {"next_embedding"},
    "dreamercdp": V3 | {"cdp"},
    "sigreg": V3 | {"sigreg"},
    "dreamerpro": V3 | {"swapped", "temporal", "norm"},
    "none": V3,
    "dreamerv2": SHARED | {"dynamics", "representation", "continue", "reconstruction"},
    "dreamerv1": SHARED | {"kl", "reconstruction"},
}
MEMBERS = list(LOSSES)
CLASSIC = ["dreamerv1", "dreamerv2"]
ONCE = ["eval.every=1000000", "env.eval_episodes=1", "checkpoint.every=1000000"]


def member(folder, name, *task):
    small = ["model.units=8", "total_frames=60", "log_every=60"]
    trainer = train_here(folder, *task, *TINY, *ONCE, f"algorithm={name}", *small)
    assert trainer.count["updates"] >= 10
    (logged,) = lines(folder, '"count/updates"')
    losses = {key.removeprefix("loss/") for key in logged if key.startswith("loss/")}
    assert losses == LOSSES[name]
    for view in ("embedding", "state"):
        assert logged[f"train/{view}_rank"] > 0 and logged[f"train/{view}_std"] > 0
    return trainer.agent


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_trains_on_vectors(tmp_path, name):
    member(tmp_path, name, "experiment=quickstart")


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_trains_on_images_and_comes_back_as_it_was_trained(tmp_path, name):
    trained = member(tmp_path, name, "experiment=probe", "env.task=small_target")
    agent = load_pretrained(tmp_path)
    observation = TensorDict({"pixels": torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)}, [2])
    observation["is_init"] = torch.ones(2, 1, dtype=torch.bool)
    acted = []
    for one in (agent, trained):
        torch.manual_seed(3)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            acted.append(one.policy(observation.copy()))
        torch.manual_seed(4)
        latents = acted[-1].select("state", "belief")
        acted[-1]["imagined"] = one.imagination.rollout(3, one.actor, tensordict=latents)["next", "reward"]
    for key in ("encoded_latents", "state", "belief", "action", "imagined"):
        assert torch.equal(acted[0][key], acted[1][key]), key
    assert agent.parameter_counts() == trained.parameter_counts()
    total = sum(agent.parameter_counts().values())
    assert agent.summary().splitlines()[-1].split() == ["total", f"{total:,}"]
    assert not any(p.requires_grad for part in agent.parts().values() for p in part.parameters())


VISION, PROPRIO = ["env=dmc_vision", "env.task=cartpole_swingup"], ["env=dmc_proprio", "env.task=walker_walk"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("dreamerv1", VISION),
        ("dreamerv2", PROPRIO),
        pytest.param("dreamerv1", PROPRIO, marks=pytest.mark.slow),
        pytest.param("dreamerv2", VISION, marks=pytest.mark.slow),
    ],
)
def test_the_first_generations_train_on_dmc(tmp_path, name, task):
    short = ["env.action_repeat=25", "total_frames=1500", "env.parallel=false", "model.units=8"]
    trainer = train_here(tmp_path, *task, *TINY, *short, *ONCE, f"algorithm={name}")
    assert trainer.count["updates"] >= 10 and not trainer.agent.actions.discrete


@pytest.mark.parametrize("name", CLASSIC)
def test_the_first_generations_have_the_published_sizes(name):
    cfg = config(f"algorithm={name}")
    rates = {"dreamerv1": (6e-4, 8e-5, 8e-5), "dreamerv2": (3e-4, 8e-5, 8e-5)}
    optimizer = cfg.algorithm.optimizer
    assert (optimizer.lr, optimizer.actor_lr, optimizer.value_lr) == rates[name]
    assert (cfg.batch_size, cfg.batch_length) == {"dreamerv1": (50, 50), "dreamerv2": (16, 50)}[name]
    assert (cfg.model.categoricals, cfg.model.classes) == {"dreamerv1": (30, 1), "dreamerv2": (32, 32)}[name]
    assert cfg.algorithm.actor.discount == {"dreamerv1": 0.99, "dreamerv2": 0.997}[name]
    assert config(f"algorithm={name}", "model=size1M", "batch_size=3").batch_size == 3  # the command line has its say


@pytest.mark.parametrize("name", CLASSIC)
def test_the_quickstarts_of_the_first_generations_are_those_members_on_the_quickstart(name):
    own, plain = config(f"experiment=quickstart_{name}"), config(f"experiment=[quickstart,member_{name}]")
    assert (own.env, own.name) == (plain.env, plain.name)
    assert dict(own.model) == dict(plain.model) | {"belief": 256, "vector_frequencies": None}
    assert own.algorithm.agent == plain.algorithm.agent == config(f"algorithm={name}").algorithm.agent
    assert own.algorithm != plain.algorithm and (own.batch_size, own.train_ratio) == (16, 8)


@pytest.mark.parametrize("name", ["dreamer", *CLASSIC])
def test_a_continuous_member_with_decoder_in_mixed_precision(tmp_path, name):
    mixed = ["precision=bf16", "total_frames=60", "model.units=8"]
    trainer = train_here(tmp_path, *PENDULUM, *ONCE, f"algorithm={name}", *mixed)
    assert trainer.count["updates"] >= 10
    assert lines(tmp_path, '"count/updates"')[-1]["train/reconstruction_observation"] > 0


def test_the_augmentation_is_an_independent_switch(tmp_path):
    pixels = ["env=probe", "env.task=small_target", *TINY, *ONCE, "total_frames=40", "log_every=40"]
    for name, overrides in (("without", []), ("with", ["augmentation=random_shift"])):
        trainer = train_here(tmp_path / name, *pixels, *overrides, "algorithm=dreamer")
        batch = trainer.replay.sample(device=trainer.device)
        read = {}
        keep = lambda module, inputs, read=read: read.update(inputs[0]["next"])
        trainer.agent.encoder.register_forward_pre_hook(keep)
        trainer.learner.losses(batch)
        given, read = batch["next", "pixels"], read["pixels"]
        assert read.shape == given.shape and torch.equal(read, given) == (name == "without")


def test_members_build_only_what_they_need():
    heads = {name: set(config(f"algorithm={name}").algorithm.agent["heads"]) for name in MEMBERS}
    projection, decoder = {"projection"}, {"decoder"}
    assert heads == {
        "r2dreamer": projection,
        "infonce": projection,
        "vicreg": projection,
        "nedreamer": {"projection", "prediction"},
        "dreamercdp": {"prediction"},
        "sigreg": projection,
        "dreamer": decoder,
        "dreamerpro": set(),
        "none": set(),
        "dreamerv2": decoder,
        "dreamerv1": decoder,
    }


MINE = """
from r2dreamer.losses import Objective

class Calm(Objective):
    terms = ("calm",)

    def forward(self, tensordict, keys):
        return {"calm": self.weight * tensordict["next", keys.encoded_latents].square().mean()}, {}
"""


def test_a_users_objective_is_named_on_the_command_line_and_nothing_else_changes(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [*CARTPOLE, *ONCE, "algorithm=none", "algorithm.representation._target_=mine.Calm", "total_frames=60"]
    trainer = train_here(tmp_path / "log", *overrides)
    assert lines(tmp_path / "log", '"loss/calm"') and "loss_calm" in trainer.learner.world_model_loss.out_keys


COSINE = """
import torch
from r2dreamer.losses import Objective

class Cosine(Objective):
    terms = ("cosine",)

    def __init__(self, agent, weight):
        super().__init__(weight)
        self.projection = torch.nn.Linear(sum(agent.latent_sizes.values()), agent.encoder.out_features)

    def forward(self, posterior, keys):
        after = posterior["next"]
        projected = self.projection(torch.cat([after["state"], after["belief"]], -1))
        cosine = torch.cosine_similarity(projected, after["encoded_latents"].detach(), -1).mean()
        return {"cosine": -self.weight * cosine}, {"cosine": cosine.detach()}
"""
CONFIG = """
defaults: [base, _self_]
agent: {heads: {}}
representation: {_target_: cosine.Cosine, _partial_: true, weight: 2.0}
"""


def test_an_objective_of_ones_own_needs_a_file_and_a_config_where_one_stands(tmp_path):
    (tmp_path / "cosine.py").write_text(COSINE)
    (tmp_path / "algorithm").mkdir()
    (tmp_path / "algorithm" / "mine.yaml").write_text(CONFIG)
    command = [sys.executable, str(EXAMPLES / "train.py"), "--config-dir=.", "algorithm=mine", *CARTPOLE]
    command += ["algorithm.optimizer.lr=1e-2", "algorithm.optimizer.warmup_steps=1"]
    done = subprocess.run([*command, "logdir=run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logged = lines(tmp_path / "run", '"train/cosine"')
    assert logged[-1]["loss/cosine"] == pytest.approx(-2 * logged[-1]["train/cosine"], rel=1e-4)
    assert logged[-1]["train/cosine"] > logged[0]["train/cosine"]

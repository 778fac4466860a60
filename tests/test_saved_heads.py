"""Heads and recipes of saved agents: what comes back, what is refused."""

import pytest
import torch
from agents import WIDTHS, tiny_agent
from launcher import CARTPOLE, train_here
from test_pretrained import RECIPE

from r2dreamer.dreamer import (
    ActionSpace,
    CategoricalLatent,
    NormGRUCell,
    ObservationSpace,
    build_classic_agent,
    load_pretrained,
    projection_head,
    save_pretrained,
)
from r2dreamer.dreamer.folder import write_folder
from r2dreamer.dreamer.pretrained import pack
from r2dreamer.dreamer.recipe import construct


def test_a_bare_network_is_no_head():
    with pytest.raises(ValueError, match="The head 'bare' is a Linear, .* no in_keys and out_keys. Wrap the network"):
        tiny_agent(heads={"bare": lambda sizes: torch.nn.Linear(sizes.state, 3)})


@pytest.mark.parametrize("name", ["encoder", "reward", "my.head"])
def test_a_head_with_the_name_of_another_part_is_refused(name):
    with pytest.raises(ValueError, match=f"heads has '{name}', .* name other parts; .* Choose another name"):
        tiny_agent(heads={name: lambda sizes: projection_head(sizes, size=4)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"belief": 32}, "size mismatch"),
        (
            {"heads": {"mine": {"_target_": "r2dreamer.dreamer.projection_head", "_partial_": True, "size": 4}}},
            "'mine'",
        ),
        ({"width": 3}, "unexpected keyword argument 'width'"),
        ({"_target_": "no_such_module.agent"}, "no_such_module"),
        ({"_target_": "builtins.dict"}, "dict expected"),
    ],
)
def test_a_recipe_of_another_agent_is_refused_while_the_weights_can_be_saved(tmp_path, change, said):
    with pytest.raises(ValueError, match=f"recipe does not give this agent back: .*{said}"):
        save_pretrained(tiny_agent(heads={}), RECIPE | change, tmp_path / "agent")
    assert not (tmp_path / "agent").exists()


def test_a_part_without_weights_is_saved_too(tmp_path, monkeypatch):
    (tmp_path / "plain_heads.py").write_text(
        "from r2dreamer.dreamer import latent_head\n\n"
        'def last(sizes):\n    return latent_head(lambda state, belief: belief, ["projected_latents"], prefix=("next",))\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = RECIPE | {"heads": {"mine": {"_target_": "plain_heads.last", "_partial_": True}}}
    agent = construct({**recipe, "_partial_": True}, ["plain_heads"])(*spaces_of(tiny_agent(heads={})))
    save_pretrained(agent, recipe, tmp_path / "agent")
    assert list(load_pretrained(tmp_path / "agent", trust=["plain_heads"]).heads) == ["mine"]


def spaces_of(agent):
    return agent.observations, agent.actions


def test_heads_of_ones_own_are_loaded_where_they_are_trusted(tmp_path, monkeypatch):
    (tmp_path / "my_heads.py").write_text(
        "from torch import nn\nfrom r2dreamer.dreamer import latent_head\n\n"
        "class Distance(nn.Module):\n"
        "    def __init__(self, features):\n        super().__init__()\n        self.linear = nn.Linear(features, 1)\n"
        "    def forward(self, state, belief):\n        return self.linear(belief)\n\n"
        'def distance(sizes):\n    return latent_head(Distance(sizes.belief), ["distance"], prefix=("next",))\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = "+algorithm.agent.heads.mine={_target_:my_heads.distance,_partial_:true}"
    trained = train_here(tmp_path / "run", *CARTPOLE, "total_frames=52", "algorithm=none", mine).agent
    with pytest.raises(ValueError, match=r"my_heads.distance is not part .* trust=\['my_heads'\]"):
        load_pretrained(tmp_path / "run")
    loaded = load_pretrained(tmp_path / "run", trust=["my_heads"])
    save_pretrained(loaded, None, tmp_path / "agent")
    again = load_pretrained(tmp_path / "agent", trust=["my_heads"])
    one, *others = (agent.heads["mine"].module.linear.weight for agent in (trained, loaded, again))
    assert all(torch.equal(one, other) for other in others)


def test_heads_that_were_added_to_an_agent_are_saved_with_it(tmp_path):
    agent = tiny_agent(heads={})
    made = {"_target_": "r2dreamer.dreamer.projection_head", "_partial_": True, "layers": 1}
    head = construct(made)(agent.sizes)
    packed = pack(agent, RECIPE, {"probe": (made, head)})
    write_folder(tmp_path / "one", packed, "", {})
    for name, before in (("one", None), ("two", "one")):
        if before:
            save_pretrained(load_pretrained(tmp_path / before), None, tmp_path / name)
        found = load_pretrained(tmp_path / name).heads["probe"].state_dict()
        assert all(torch.equal(found[key], value) for key, value in head.state_dict().items())


def test_a_recipe_whose_weights_have_the_same_shapes(tmp_path):
    recipe = {"_target_": "r2dreamer.dreamer.build_agent", "heads": {}, **WIDTHS, "encoder_multipliers": [1, 2]}
    agent = tiny_agent(heads={}, classes=4, categoricals=7, unimix=0.5)
    with pytest.raises(ValueError, match="recipe does not give this agent back: rssm.*unimix is 0.5, and 0.01"):
        save_pretrained(agent, recipe, tmp_path / "agent")
    with pytest.raises(ValueError, match="recipe does not give this agent back: rssm.*num_categoricals is 7, and 4"):
        save_pretrained(agent, recipe | {"classes": 7, "categoricals": 4, "unimix": 0.5}, tmp_path / "agent")
    assert not (tmp_path / "agent").exists()
    save_pretrained(agent, recipe | {"unimix": 0.5, "fast": False}, tmp_path / "agent")
    with pytest.raises(ValueError, match="more has 'observations', which are the agent's own: rename them"):
        save_pretrained(agent, recipe | {"unimix": 0.5}, tmp_path / "agent", more={"observations": 1})


def test_a_recipe_of_other_frequencies_or_another_distribution(tmp_path):
    recipe = {"_target_": "r2dreamer.dreamer.build_agent", "heads": {}, **WIDTHS, "encoder_multipliers": [1, 2]}
    agent = tiny_agent(heads={}, images=False, vector_frequencies=(3.0, 9.0))
    with pytest.raises(ValueError, match=r"encoder.*frequencies is \(3.0, 9.0\), and \(1.0, 2.0\)"):
        save_pretrained(agent, recipe | {"vector_frequencies": [1.0, 2.0]}, tmp_path / "agent")
    save_pretrained(agent, recipe | {"vector_frequencies": [3.0, 9.0]}, tmp_path / "agent")
    part = lambda name: {"_target_": f"r2dreamer.dreamer.{name}", "_partial_": True}
    recipe = {"_target_": "r2dreamer.dreamer.build_classic_agent", "heads": {}, "belief": 8, "hidden": 8, "depth": 2}
    recipe |= dict(vector_layers=1, reward_layers=1, actor_layers=1, value_layers=1, noise=0.0)
    recipe |= {"classes": 4, "categoricals": 3, "latent": part("CategoricalLatent"), "cell": part("NormGRUCell")}
    built = {**recipe, "latent": CategoricalLatent, "cell": NormGRUCell, "squashed_actions": True}
    del built["_target_"]
    agent = build_classic_agent(ObservationSpace({}, {"speed": 6}), ActionSpace(2, False), **built)
    with pytest.raises(ValueError, match="actor.* is a SquashedParameters, and a NormalParameters in what it builds"):
        save_pretrained(agent, recipe | {"squashed_actions": False}, tmp_path / "classic")

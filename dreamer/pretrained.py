"""Agents out of a run's directory, without the command line that trained them.

agent = load_pretrained("runs/quickstart/seed0")
agent.encoder, agent.prior, agent.posterior, agent.imagination     # the world model
step = TensorDict({"pixels": images, "is_init": torch.ones(1, 1, dtype=torch.bool)}, [1])  # an episode's first images
with set_exploration_type(ExplorationType.DETERMINISTIC):          # the mode; else actions are sampled
    step = agent.policy(step)                                      # "action", and the latents it remembers by
step.update({"pixels": images, "is_init": torch.zeros(1, 1, dtype=torch.bool)})  # the same TensorDict goes on
print(agent.summary())

Continuous actions are for [-1, 1]: clip them and scale them to the environment's range.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import pkgutil
import re
import warnings
import zipfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .agent import ActionSpace, Agent, ObservationSpace

STATE = "state.pt"  # the file of a checkpoint that holds the entry "agent"
OWN_NAME = re.compile(
    r"step_\d{9,}(_\d+)?"
)  # a checkpoint that a run named; a user's copy beside it is opened by its name
PACKAGE = "r2dreamer"
# What a recipe may call. Nothing here imports, opens or calls what a string names.
BUILDERS = """
    build_agent build_classic_agent projection_head classic_decoder ObservationDecoder CategoricalLatent GaussianLatent
    BlockGRU GRUCell NormGRUCell StridedEncoder next_embedding_head belief_prediction_head
""".split()  # noqa: SIM905
BUILDERS = frozenset(f"{PACKAGE}.dreamer.{name}" for name in BUILDERS)
PLAIN = (str, int, float, bool, type(None))


def construct(recipe: Any, trust: Sequence[str] = ()) -> Any:
    """Builds what nested dicts with ``_target_`` (and ``_partial_``) describe, as hydra does, from ``BUILDERS`` alone.

    trust: packages and modules outside of this one whose functions it may call, too.
    """
    if isinstance(recipe, list | tuple):
        return [construct(entry, trust) for entry in recipe]
    if not isinstance(recipe, Mapping):
        if not isinstance(recipe, PLAIN):
            raise ValueError(f"A recipe holds text, numbers, lists and dicts, and this one a {type(recipe).__name__}.")
        return recipe
    arguments = {
        name: construct(entry, trust) for name, entry in recipe.items() if name not in ("_target_", "_partial_")
    }
    if "_target_" not in recipe:
        return arguments
    target = recipe["_target_"]
    check_target(target, BUILDERS, trust)
    function = pkgutil.resolve_name(target)
    return functools.partial(function, **arguments) if recipe.get("_partial_") else function(**arguments)


def check_target(
    target: Any,
    allowed: Container[str],
    trust: Sequence[str],
    where: str = "_target_",
    remedy: str = "trust=[{!r}]",
) -> None:
    """Refuses ``"module.name"`` or ``"module:name"`` that is neither ``allowed`` nor lies in a trusted module.

    What a trusted module has only imported from elsewhere is not trusted by that, and this package never is as a whole.
    """
    if isinstance(target, str) and target in allowed:
        return
    wrong = f"{where}={target} is not part of what a saved run may call"
    if not isinstance(target, str) or _inside(target, [PACKAGE]):
        raise ValueError(f"{wrong}.")
    module = target.partition(":")[0] if ":" in target else target.rpartition(".")[0]
    if module.rpartition(".")[2][:1].isupper():  # a method, whose class lies in the module
        module = module.rpartition(".")[0]
    if _inside(module, trust):
        try:
            found = pkgutil.resolve_name(target)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{where}={target} cannot be found: {error}.") from error
        if isinstance(found, ModuleType):
            module = found.__name__
        else:
            module = getattr(found, "__module__", None) or type(found).__module__
        if _inside(module, [PACKAGE]):
            raise ValueError(f"{wrong}: it lies in {module}.")
    if not _inside(module, trust):
        ask = f": if {module} is yours, or you have read it, add {remedy.format(module)}" if module else ""
        raise ValueError(f"{wrong}{ask}.")


def _inside(module: str, packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def pack(
    agent: Agent, recipe: Mapping[str, Any], more_heads: Mapping[str, tuple[Mapping, nn.Module]] | None = None
) -> dict[str, Any]:
    """Everything :func:`unpack` needs, tensors and plain values only.

    recipe: nested plain dicts for :func:`construct`; called with observation and action space they give such an agent.
    more_heads: by name a recipe, called with the agent's sizes, and such a head; the agent comes back with it in ``heads``,
        and its world model as it was, without.
    """
    added = {
        name: {"recipe": dict(made_by), "weights": head.state_dict()}
        for name, (made_by, head) in (more_heads or {}).items()
    }
    return {
        "observations": {"images": dict(agent.observations.images), "vectors": dict(agent.observations.vectors)},
        "actions": {"size": agent.actions.size, "discrete": agent.actions.discrete},
        "recipe": dict(recipe),
        "weights": {name: part.state_dict() for name, part in agent.parts().items()},
        "more_heads": added,
    }


def unpack(packed: Mapping[str, Any], trust: Sequence[str] = ()) -> Agent:
    images = {key: tuple(shape) for key, shape in packed["observations"]["images"].items()}
    observations = ObservationSpace(images, packed["observations"]["vectors"])
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away
        agent = construct({**packed["recipe"], "_partial_": True}, trust)(
            observations, ActionSpace(**packed["actions"])
        )
    for name, part in agent.parts().items():
        part.load_state_dict(packed["weights"][name])
    for name, head in packed.get("more_heads", {}).items():
        with torch.random.fork_rng(devices=[]):
            agent.heads[name] = construct({**head["recipe"], "_partial_": True}, trust)(agent.sizes)
        agent.heads[name].load_state_dict(head["weights"])
    agent.recipe = dict(packed["recipe"])
    return agent


def save_pretrained(agent: Agent, recipe: Mapping[str, Any] | None, directory: str | os.PathLike) -> Path:
    """Writes the agent alone, for :func:`load_pretrained`: weights, spaces, and the recipe readable beside them.

    recipe: as for :func:`pack`; None takes the one that the agent was loaded with.
    """
    recipe = recipe or agent.recipe
    if recipe is None:
        raise ValueError(
            "recipe=None is for agents that load_pretrained made; give what builds this one, as in pack()."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for file in (directory / STATE, directory / "agent.json"):
        if file.is_symlink():
            raise ValueError(f"{file} is a link to {os.readlink(file)}, which would be overwritten: remove the link.")
    packed = pack(agent, recipe)
    torch.save({"agent": packed}, directory / STATE)
    readable = {name: packed[name] for name in ("observations", "actions", "recipe")}
    (directory / "agent.json").write_text(json.dumps(readable, indent=1))
    return directory / STATE


def load_pretrained(
    directory: str | os.PathLike,
    device: torch.device | str = "cpu",
    trust: Sequence[str] = (),
    *,
    trainable: bool = False,
) -> Agent:
    """The agent of a run's newest checkpoint, of one particular checkpoint, or of :func:`save_pretrained`'s directory.

    In evaluation mode and without gradients, unless ``trainable``. Nothing pickled is executed, and the file's recipe calls
    ``BUILDERS`` alone.

    Args:
        trust: packages or modules outside of this one whose functions may build the agent, such as heads of your own.
        trainable: leave it in training mode and with gradients, to train it on.

    Example:
        >>> import tempfile
        >>> from r2dreamer.dreamer import build_agent
        >>> recipe = dict(_target_="r2dreamer.dreamer.build_agent", belief=16, hidden=8, classes=4, depth=2)
        >>> agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, discrete=True),
        ...                     belief=16, hidden=8, classes=4, depth=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_pretrained(agent, recipe, folder)
        ...     same = load_pretrained(folder)
        >>> bool((same.actor.module[0].module.layers[0].weight == agent.actor.module[0].module.layers[0].weight).all())
        True
    """
    trust = [trust] if isinstance(trust, str) else trust
    path = Path(directory)
    files = [path / STATE] if (path / STATE).exists() else []
    if not files:
        found = [*path.glob(f"checkpoints/step_*/{STATE}"), *path.glob(f"step_*/{STATE}")]
        files = sorted((file for file in found if OWN_NAME.fullmatch(file.parent.name)), key=_serial)[::-1]
    if not files:
        raise ValueError(f"{path} holds no agent: give a run's directory, one of its checkpoints, or a saved agent's.")
    for file in files:  # the newest one that is whole
        try:
            _check_sums(file)
            state = torch.load(file, map_location=device, weights_only=True)
            break
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            damaged = f"{file} is damaged ({type(error).__name__})"
            if file == files[-1]:
                raise ValueError(f"{damaged}, and there is no other one.") from error
            warnings.warn(f"{damaged}; an older checkpoint is loaded in its place.", stacklevel=2)
    if "agent" not in state:
        raise ValueError(f"{file} holds {sorted(state)} and no agent; it was saved by another program or version.")
    agent = unpack(state["agent"], trust)
    for part in agent.parts().values():
        part.to(device).train(trainable)
        if not trainable:
            part.requires_grad_(False)
    return agent


def _serial(file: Path) -> tuple[int, list[int]]:
    """Of a run's checkpoints the one saved last is the newest, even if an older one was resumed and it has fewer frames."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((file.parent / "manifest.json").read_bytes())["manifest"]["serial"], []
    return -1, [int(part) for part in file.parent.name.split("_")[1:]]


def _check_sums(file: Path) -> None:
    """torch.load reads past flipped bits; the sums in its archive do not."""
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
    if broken:
        raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")

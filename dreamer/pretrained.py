"""Agents out of a run's directory, a folder or the Hugging Face Hub, without the command line that trained them.

agent = load_pretrained("runs/quickstart/seed0")                   # or "owner/name", with the extra hub
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
import inspect
import json
import os
import pickle
import pkgutil
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .agent import ActionSpace, Agent, ObservationSpace
from .card import ModelCard
from .folder import WEIGHTS, read_folder, write_folder
from .hub import locate
from .recipe import construct

STATE = "state.pt"  # the file of a checkpoint that holds the entry "agent"
OWN_NAME = re.compile(r"step_\d{9,}(_\d+)?")  # of a checkpoint that a run named; a user's copy is opened by its name


def pack(
    agent: Agent, recipe: Mapping[str, Any], more_heads: Mapping[str, tuple[Mapping, nn.Module]] | None = None
) -> dict[str, Any]:
    """Everything :func:`unpack` needs, tensors and plain values only.

    recipe: nested plain dicts for :func:`construct`; called with observation and action space they give such an agent.
    more_heads: by name a recipe, called with the agent's sizes, and such a head; the agent comes back with it in ``heads``,
        and its world model as it was, without.
    """
    heads = (more_heads or {}).items()
    added = {name: {"recipe": dict(made_by), "weights": head.state_dict()} for name, (made_by, head) in heads}
    return {
        "observations": {"images": dict(agent.observations.images), "vectors": dict(agent.observations.vectors)},
        "actions": {"size": agent.actions.size, "discrete": agent.actions.discrete},
        "recipe": dict(recipe),
        "weights": {name: part.state_dict() for name, part in agent.parts().items() if name not in added},
        "more_heads": added,
    }


def unpack(packed: Mapping[str, Any], trust: Sequence[str] = ()) -> Agent:
    """The agent of what :func:`pack` gave; the recipe calls what ``recipe.py`` and `trust` list alone.

    Args:
        packed: from :func:`pack`.
        trust: as for :func:`load_pretrained`.
    """
    images = {key: tuple(shape) for key, shape in packed["observations"]["images"].items()}
    observations = ObservationSpace(images, packed["observations"]["vectors"])
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away
        build = construct({**packed["recipe"], "_partial_": True}, trust)
        agent = build(observations, ActionSpace(**packed["actions"]))
    if unknown := packed["weights"].keys() - agent.parts().keys():
        raise RuntimeError(f"weights of {', '.join(sorted(unknown))}, which this agent does not have")
    for name, part in agent.parts().items():
        _load(part, packed["weights"].get(name, {}), name)  # a file has no entry for a part without weights
    more_heads = packed.get("more_heads", {})
    for name, head in more_heads.items():
        with torch.random.fork_rng(devices=[]):
            agent.heads[name] = construct({**head["recipe"], "_partial_": True}, trust)(agent.sizes)
        _load(agent.heads[name], head["weights"], name)
    agent.recipe = dict(packed["recipe"])
    agent.more_heads = {name: dict(head["recipe"]) for name, head in more_heads.items()}
    return agent


def _load(part: nn.Module, weights: Mapping[str, torch.Tensor], name: str) -> None:
    """torch would turn integers into weights, and take NaN."""
    own = part.state_dict()
    if own and not weights:
        raise RuntimeError(f"there are no weights of {name!r}")
    for key, value in weights.items():
        if key in own and value.is_floating_point() != own[key].is_floating_point():
            raise RuntimeError(f"{name}.{key} is {value.dtype}, expected {own[key].dtype}")
        if not value.isfinite().all():
            raise RuntimeError(f"{name}.{key} holds NaN or Inf; the agent was saved broken")
    part.load_state_dict(weights)


def unpack_folder(directory: Path, device: torch.device | str = "cpu", trust: Sequence[str] = ()) -> Agent:
    """The agent of a folder; what its files say that does not fit together is one paragraph."""
    packed, _ = read_folder(directory, device)
    try:
        return unpack(packed, trust)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The weights and the configuration in {directory} do not fit together, or not this version: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def save_pretrained(
    agent: Agent,
    recipe: Mapping[str, Any] | None,
    directory: str | os.PathLike,
    *,
    card: ModelCard | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the agent alone, for :func:`load_pretrained`: `config.yaml`, `model.safetensors` and a model card.

    Args:
        agent: any agent of this package.
        recipe: as for :func:`pack`; None takes the one that the agent was loaded with.
        directory: the folder to write; what it holds of an agent is replaced.
        card: what the model card says.
        more: further entries of `config.yaml`, plain data.
    """
    recipe = recipe or agent.recipe
    if recipe is None:
        raise ValueError("recipe=None is for what load_pretrained made; give what builds this agent, as in pack().")
    packed = pack(agent, recipe, {name: (made_by, agent.heads[name]) for name, made_by in agent.more_heads.items()})
    _check_recipe(packed, agent)
    write_folder(Path(directory), packed, (card or ModelCard()).text(packed), more or {})
    return Path(directory)


def _check_recipe(packed: Mapping[str, Any], agent: Agent) -> None:
    """Refuses a recipe of another agent now, while the weights can still be saved with the right one."""
    try:
        built = unpack(packed, trust=_modules([packed["recipe"], packed["more_heads"]]))
        parts = built.parts()
        for name, part in agent.parts().items():
            _check_alike(name, part, parts[name])
    except Exception as error:  # whatever a builder of the user's own raises
        raise ValueError(f"recipe does not give this agent back: {' '.join(str(error).split())[:300]}") from error


def _check_alike(name: str, part: nn.Module, built: nn.Module) -> None:
    """Refuses classes and arguments that shapes of weights do not show, such as the classes of a latent."""
    others = dict(built.named_modules())
    for path, module in part.named_modules():
        other = others.get(path, module)
        own, its = (getattr(type(each), "made_of", (type(each),))[0].__qualname__ for each in (module, other))
        if own != its:
            raise ValueError(f"{'.'.join(filter(None, [name, path]))} is a {own}, and a {its} in what it builds")
        known = inspect.signature(type(module).__init__).parameters
        for argument, value in vars(module).items():
            given = vars(other).get(argument, value)
            if _is_plain(value) and argument in known and given != value:
                where = ".".join(filter(None, [name, path, argument]))
                raise ValueError(f"{where} is {value!r}, and {given!r} in what it builds")


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def _modules(recipe: Any) -> list[str]:
    """Where a recipe's functions lie: who saves an agent has built it with them."""
    if isinstance(recipe, list | tuple):
        return [module for entry in recipe for module in _modules(entry)]
    if not isinstance(recipe, Mapping):
        return []
    target = recipe.get("_target_")
    found = [target, getattr(pkgutil.resolve_name(target), "__module__", target)] if isinstance(target, str) else []
    return [re.split("[.:]", module)[0] for module in found] + _modules(list(recipe.values()))


def load_pretrained(
    directory: str | os.PathLike,
    device: torch.device | str = "cpu",
    trust: Sequence[str] = (),
    *,
    revision: str | None = None,
    trainable: bool = False,
) -> Agent:
    """The agent of a run's newest checkpoint, of one particular checkpoint, or of :func:`save_pretrained`'s directory.

    A text ``"owner/name"`` that is no folder here is a repository on the Hugging Face Hub.
    In evaluation mode and without gradients, unless ``trainable``. Nothing pickled is executed, and the file's recipe calls
    what ``recipe.py`` lists alone.

    Args:
        directory: the run, the checkpoint, the folder, or ``"owner/name"``.
        device: where the agent goes.
        trust: packages or modules outside of this one whose functions may build the agent, such as heads of your own.
        revision: of a repository on the Hub: a branch, a tag or a commit. Default: the main branch.
        trainable: leave it in training mode and with gradients, to train it on.

    Example:
        >>> import tempfile
        >>> from r2dreamer.dreamer import build_agent
        >>> recipe = dict(_target_="r2dreamer.dreamer.build_agent", belief=16, hidden=8, classes=4, depth=2)
        >>> agent = build_agent(ObservationSpace({}, {"observation": 4}), ActionSpace(2, discrete=True),
        ...                     belief=16, hidden=8, classes=4, depth=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_pretrained(agent, recipe, folder)
        ...     same = load_pretrained(folder)
        >>> bool((same.actor.module[0].module.layers[0].weight == agent.actor.module[0].module.layers[0].weight).all())
        True
    """
    trust = [trust] if isinstance(trust, str) else trust
    path = locate(directory, revision)
    agent = unpack_folder(path, device, trust) if (path / WEIGHTS).is_file() else _from_checkpoint(path, device, trust)
    for part in agent.parts().values():
        part.to(device).train(trainable)
        if not trainable:
            part.requires_grad_(False)
    return agent


def _from_checkpoint(path: Path, device: torch.device | str, trust: Sequence[str]) -> Agent:
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
    return unpack(state["agent"], trust)


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

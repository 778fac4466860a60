"""A trained agent and its environment from a checkpoint alone, for every tool that plays one."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tensordict.nn import TensorDictModule
from torchrl.envs import EnvBase

from r2dreamer.dreamer import Agent, CategoricalLatent, TwoHotMLP, latent_head
from r2dreamer.dreamer.folder import WEIGHTS, read_config
from r2dreamer.dreamer.hub import locate
from r2dreamer.dreamer.pretrained import unpack, unpack_folder
from r2dreamer.envs import VectorEnv, make_vector_env
from r2dreamer.losses import PlanningAttackLoss

from .checkpoint import Checkpoints
from .evaluation import LONGEST_EPISODE
from .files import refuse_links
from .saved_config import runnable_config
from .setup import spaces

LATENTS = [("next", "state"), ("next", "belief"), ("next", "posterior_logits")]


@dataclass
class Trained:
    """An agent that sees, and the configuration of the run that trained it."""

    agent: Agent
    run: DictConfig
    path: Path
    step: int
    make_environment: Callable[..., EnvBase]
    folder: Path | None = None  # of an agent that is no checkpoint
    downloaded: bool = False

    @property
    def directory(self) -> Path:
        """Where results go: the run's directory, that of a checkpoint or an agent which stands alone."""
        if self.folder is not None:
            return self.folder
        inside = self.path.resolve().parent  # the path may begin in the run's own `checkpoints`
        return inside.parent if inside.name == "checkpoints" else self.path

    def output(self, out: str | None, name: str) -> Path:
        """Where a tool writes: where the user said, or beside the agent; of a downloaded one, into the working directory."""
        if out or self.downloaded:
            return Path(out or name)
        return refuse_links(self.directory) / name

    @property
    def identity(self) -> dict[str, str | int]:
        return {"name": self.run.name, "seed": self.run.seed, "frames": self.step}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the weights that act, the same for a run's checkpoint and what was exported from it in half precision."""
        digest = hashlib.sha256()
        for _, value in sorted(self.agent.policy.state_dict().items()):
            digest.update(value.half().numpy(force=True).tobytes())
        return digest.hexdigest()[:16]

    def environments(self, seeds: Sequence[int]) -> VectorEnv:
        """One for each seed, stepped as the run's own evaluations step them."""
        run = self.run
        return make_vector_env(self.make_environment, seeds, parallel=run.env.parallel, timeout=run.timeout)

    @property
    def max_steps(self) -> int | None:
        """Policy steps after which the run's own evaluations cut an episode off."""
        return self.run.eval.get("max_steps", LONGEST_EPISODE)

    def pixels_key(self, wanted: str | None = None) -> str:
        images = self.agent.observations.images
        key = next(iter(images)) if wanted is None else wanted
        if key not in images:
            raise ValueError(f"pixels_key={key} is not among the images this agent sees: {', '.join(images)}.")
        return key

    def attack_loss(self, patch: torch.nn.Module, *, key: str, **settings) -> PlanningAttackLoss:
        """The attack on this agent; what it discounts by and how it mixes its categoricals are the run's own."""
        agent = self.agent
        if not (isinstance(agent.posterior.latent, CategoricalLatent) and isinstance(agent.reward, TwoHotMLP)):
            raise ValueError(
                f"{self.path} holds an agent of another family (Dreamer V1 or V2, built by "
                f"{self.run.algorithm.agent._target_.rpartition('.')[2]}), and the attack reads categorical states and two-hot "
                "heads: give a checkpoint of R2-Dreamer, Dreamer V3 or another member that build_agent builds."
            )
        prior_keys = ["prior_logits", ("next", "state"), ("next", "belief")]
        loss = PlanningAttackLoss(
            patch,
            agent.world_model.select_subsequence(out_keys=LATENTS),
            TensorDictModule(agent.prior, in_keys=["state", "belief", "action"], out_keys=prior_keys),
            agent.actor,
            latent_head(agent.reward, ["reward_logits", "reward"]),
            agent.value_model,
            continue_model=agent.continue_model,
            num_reward_bins=agent.reward.num_bins,
            num_value_bins=agent.value.num_bins,
            discount=self.run.algorithm.actor.discount,
            unimix=agent.posterior.latent.unimix,
            **settings,
        )
        loss.set_keys(pixels=key)
        return loss.to(next(agent.value.parameters()).device)


def load_trained(
    path: str | None, device: torch.device, trust: str | Sequence[str] | None = None, *, images: bool = True
) -> Trained:
    """The agent in a run's newest checkpoint, in one particular checkpoint, in a folder that export wrote, or on the Hub.

    path: a directory, or "owner/name" or "owner/name@revision" of the Hugging Face Hub.

    Args:
        trust: modules beside this package whose functions may make the environment or the agent.
        images: whether an agent that sees none is refused.
    """
    if path is None:
        raise ValueError(
            "checkpoint=DIR is missing: give a run's directory, one of its checkpoints, or an exported agent."
        )
    trust = [trust] if isinstance(trust, str) else list(trust or ())
    found = locate(path)
    directory = None
    if (found / WEIGHTS).is_file():
        where = directory = found
        make_agent: Callable[[], Agent] = functools.partial(unpack_folder, found, trust=trust)
        config = read_config(found)
        step, config = config.get("frames"), config.get("run")
        if type(step) is not int or config is None:
            raise ValueError(
                f"{path} holds an agent and not the environment it was trained in, as save_pretrained writes it. load_pretrained "
                "opens it; export writes a folder that can be played, from the run's checkpoint."
            )
    else:
        loaded = Checkpoints(found).load(found, replay=False)
        assert loaded is not None  # of a path it would have raised
        if not {"config", "agent"} <= loaded.state.keys():
            raise ValueError(f"{loaded.path} holds {sorted(loaded.state)}; it was not saved by examples/train.py.")
        where, step, config = loaded.path, loaded.step, loaded.state["config"]
        make_agent = functools.partial(unpack, loaded.state["agent"], trust)
    run = runnable_config(config, where, trust)
    try:
        make_environment = hydra.utils.instantiate(run["env"].make_evaluation)
        agent = make_agent()
        seen = spaces(make_environment, run.timeout)
        if seen != (agent.observations, agent.actions):
            raise KeyError(f"it sees and does {agent.observations}, {agent.actions}, and its environment has {seen}")
        run["algorithm"]  # what attacks read of it
    except (RuntimeError, KeyError, TypeError, OmegaConfBaseException, InstantiationException) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{where} holds no world model, actor and critic of the family that examples/train.py of this version "
            f"trains ({first}). Give a checkpoint of such a run, or use the version that saved this one."
        ) from error
    if images and not agent.observations.images:
        raise ValueError(
            f"{where} is of an agent that sees no images ({', '.join(agent.observations.vectors)}), and this is "
            "about pixels. Give a checkpoint of a run that does, for example env=dmc_vision or env.from_pixels=true."
        )
    for part in agent.parts().values():
        part.to(device).eval().requires_grad_(False)
    return Trained(agent, run, where, step, make_environment, directory, downloaded=not Path(path).exists())

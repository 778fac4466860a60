"""What every setting may be: tables of kinds by key and by argument, and the check of a configuration against them.

A key outside of `_target_` sections must stand in its script's table. Within such a section, an argument of our own classes
stands in `ARGUMENTS`; any other takes the type that its annotation names. A new key brings one line here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .kinds import (
    Kind,
    any_of,
    choice,
    device,
    flag,
    list_of,
    maybe,
    number,
    one_like,
    say,
    section,
    storage,
    text,
    whole,
)
from .targets import SettingError, Target, annotated

count, seed, share, weight = whole(1), whole(0, 2**32 - 1), number(0, 1), number(0)
rate, fraction = number(above=0, most=1), number(0, below=1)
fraction_text = one_like(r"paper|\d+/0*[1-9]\d*", "paper, or a fraction such as 1/3")
cluster = one_like(r"local|auto|[^/]+:\d+", "local, auto or HOST:PORT, for example node7:6379")
colour = any_of(share, list_of(share))

_ALGORITHM = {
    "": section, "agent": section, "agent.heads.*": section, "kl": section, "world_model": section,
    "world_model.reward_weight": weight, "world_model.continue_weight": weight,
    "world_model.scalar_likelihood": maybe(section), "actor": section, "value": section, "replay_value_weight": weight,
    "slow_critic_rate": rate, "slow_critic": section, "final_lr_fraction": share, "final_entropy_fraction": share,
    "optimizer": section, "optimizer.lr_factors.*": number(above=0), "representation": section, "augmentation": section,
    "detached_decoder": section,
}  # fmt: skip


def _algorithm(prefix: str) -> dict[str, Kind]:
    return {f"{prefix}.{name}".rstrip("."): kind for name, kind in _ALGORITHM.items()}


TRAIN = {
    "seed": seed, "device": device, "precision": choice("auto", "bf16", "fp32"),
    "compile": choice(None, "parts"), "capture": choice("auto", True, False), "threads": maybe(whole(1, 4096)),
    "total_frames": count, "train_ratio": weight, "batch_size": count, "batch_length": whole(2),
    "warmup_steps": whole(), "collect_steps": count, "timeout": number(above=0, most=1_000_000), "name": text,
    "logdir": text, "resume": any_of(choice("auto", True, False), text), "log_every": count, "progress": flag,
    "model": section, "collector": section, "logger": maybe(section), "logger.*": section,
    "logger.wandb.mode": maybe(choice("online", "offline", "disabled", "shared")),
    "eval": section, "eval.every": count, "eval.episodes": count, "eval.video": flag, "eval.max_steps": maybe(count),
    "checkpoint": section, "checkpoint.every": count, "checkpoint.keep": count, "checkpoint.replay": flag,
    "checkpoint.exact": flag, "replay": section, "replay.capacity": count, "replay.prefill": maybe(text), "replay.prefill_counts": flag, "replay.place": section,
    "replay.place.storage": storage, "replay.place.directory": maybe(text),
    "env": section, "env.suite": text, "env.task": text, "env.action_repeat": count, "env.total_frames": count,
    "env.train_ratio": weight, "env.num_envs": count, "env.eval_episodes": count,
    "env.parallel": any_of(choice("auto", True, False), count), "env.make": section, "env.make_evaluation": section,
    "env.scores": maybe(section), "env.train_scores": maybe(section),
    "env.frames": maybe(section), "env.frames.*": count,
    "env.entropy_bonus": maybe(section), "env.entropy_bonus.*": weight, **_algorithm("algorithm"),
    # Of one suite each, passed on to its `make`: as the arguments of that name.
    **dict.fromkeys((f"env.{name}" for name in (
        "lives", "factory", "shrink", "physics", "from_pixels", "episode_frames", "sticky", "difficulty", "dynamic",
        "background", "colour", "moving_camera", "background_frames"
    )), None),
}  # fmt: skip

_PLAYED = {"checkpoint": maybe(text), "device": device, "video": flag, "out": maybe(text)}
_PLAYED["trust"] = maybe(any_of(text, list_of(text)))
_SEEN = {"pixels_key": maybe(text), "progress": flag}
SCRIPTS: dict[str, dict[str, Kind | None]] = {
    "config": TRAIN,
    "doctor": TRAIN | {"steps": count},
    "benchmark": TRAIN | _algorithm("other") | {
        "synthetic": flag, "measure": list_of(choice("update", "acting", "replay", "environment")),
        "compare": choice(None, "torchrl", "algorithm", "tricks"), "repeats": maybe(count),
        "counts": list_of(count), "seconds": number(above=0), "rounds": count,
    },
    "evaluate": _PLAYED | {"episodes": maybe(count), "seed": maybe(seed), "max_steps": maybe(count), "compile": TRAIN["compile"]},
    "saliency": _PLAYED | _SEEN | {
        "seed": maybe(seed), "episodes": count, "max_steps": count, "occlusion": section,
        "occlusion.fill": choice("blur", "grey"), "occlusion.window": count, "occlusion.stride": count,
        "objects": maybe(list_of(text)), "colour": maybe(list_of(whole(0, 255), 3)),
    },
    "latents": {
        "suite": choice("dmc_subtle", "dmc_distracting"), "difficulties": list_of(choice("none", "easy", "medium", "hard")),
        **dict.fromkeys(("tasks", "members"), list_of(text)), "overrides": any_of(list_of(text), choice([])), "shrinks": list_of(any_of(rate, fraction_text)),
        "seeds": list_of(seed), "updates": count, "checkpoint": maybe(text), "trust": _PLAYED["trust"], "record": section, "out": maybe(text),
        "record.episodes": whole(2), "record.heldout": count, "record.steps": count, "record.lead": whole(),
        "record.keep": share, "device": device, "precision": choice("auto", "bf16", "fp32"),
        "threads": maybe(whole(1, 4096)), "progress": flag,
    },
    "attack": _PLAYED | _SEEN | {
        "other": maybe(text), "beside": choice("patched", "clean", None), "seed": seed,
        "precision": TRAIN["precision"], "collect": section, "collect.episodes": whole(2),
        "collect.max_steps": maybe(count), "collect.held_out": number(above=0, below=1), "collect.context": count,
        "optimize": section, "optimize.steps": count, "optimize.batch_size": count, "optimize.lr": number(above=0),
        "optimize.final_lr_fraction": share, "optimize.eval_every": count, "optimize.eval_windows": count,
        "evaluate": section, "evaluate.episodes": whole(2), "evaluate.seed": maybe(seed), "attack": section,
        "attack.patch": section, "attack.allowed": maybe(list_of(whole(), 4)), "attack.loss": section,
        "attack.loss.belief": choice("clean", "patched"), "attack.loss.starts": choice("all", "last"),
        "attack.loss.actions": choice("mode", "sample"), "attack.loss.bootstrap": flag,
        "attack.loss.imagination_horizon": count,
        **{f"attack.loss.w_{name}": weight for name in ("return", "kl", "action", "tv", "l2")},
    },
}  # fmt: skip

ARGUMENTS = {
    # of environments
    "task": text, "from_pixels": flag, "image_size": maybe(count), "action_repeat": count,
    "factory": one_like(r"[\w.]+:[\w.]+", '"package.module:function", for example my_module:make_env'),
    "camera": maybe(any_of(whole(-1), text)), "time_limit": maybe(count), "episode_frames": maybe(count),
    "lives": choice("unused", "discount", "reset"), "sticky": share, "noops": whole(), "grayscale": flag,
    "full_actions": flag, "keys": maybe(list_of(text)), "cumulative": flag, "actions": count, "continuous": flag,
    "shrink": maybe(any_of(rate, text)), "physics": choice("official", "frozen"),
    "difficulty": choice("easy", "medium", "hard"), "split": choice("train", "val"), "background_frames": maybe(text),
    **dict.fromkeys(("dynamic", "background", "colour", "moving_camera"), flag),
    # of networks
    **dict.fromkeys(("belief", "hidden", "classes", "depth", "categoricals", "blocks", "num_bins"), count),
    "units": maybe(count), "encoder_multipliers": list_of(count), "image_encoder": maybe(section), "core": maybe(section), "channels": list_of(count), "kernels": list_of(count), "strides": list_of(count), "continue_layers": maybe(whole()),
    "vector_frequencies": maybe(list_of(number(above=0))),
    **dict.fromkeys(("vector_layers", "reward_layers", "actor_layers", "value_layers", "layers", "pad"), whole()),
    "unimix": fraction, "min_std": weight, "squashed_actions": flag, "noise": weight,
    **dict.fromkeys(("heads", "latent", "cell", "decoder"), section),
    # of losses
    **dict.fromkeys((
        "weight", "factor", "redundancy_weight", "dynamics", "representation", "free_nats", "variance", "covariance",
        "entropy_bonus", "slow_critic_regularization",
    ), weight),
    "gaussian": weight, "directions": count, "attention_heads": count, "width": maybe(count), "lr_factors": maybe(section),
    "detach_target": flag, "average_first": flag, "cosine": flag, "bootstrap_target": flag,
    "temperature": number(above=0),
    "prototypes": count, "size": count, "sinkhorn_eps": number(above=0), "sinkhorn_iterations": count,
    "ema_rate": share, "frozen_updates": whole(), "dropped_steps": whole(), "augmentation": maybe(section),
    "scalar_likelihood": maybe(section), "imagination_horizon": count, "discount": fraction, "lmbda": share,
    "return_quantiles": list_of(share, 2), "return_rate": rate, "tau": rate, "rate": rate,
    # of optimisers
    **dict.fromkeys(("lr", "actor_lr", "value_lr", "agc", "max_norm", "parameter_norm_min"), number(above=0)),
    "beta1": fraction, "beta2": fraction, "eps": weight, "warmup_steps": whole(),
    # of remote collectors
    "num_collectors": count, "num_cpus": number(above=0), "update_interval": count, "address": cluster,
    "object_store_memory": whole(80_000_000),
    # of the attack's patch
    "patch_hw": list_of(count, 2), "mode": choice("direct", "eps", "perturb"), "base": colour,
    "placement": choice("bottom_center", "top_center", "center", "fixed", "random", "saliency"),
    "x0": maybe(whole()), "y0": maybe(whole()), "eot_translations": whole(), "eot_max_shift": whole(),
    "eot_max_brightness": share, "quantize": flag, "onset": whole(),
}  # fmt: skip
# Arguments whose name has another meaning elsewhere.
TRAIN |= {"logger.wandb.project": text, "logger.wandb.name": text}
SCRIPTS["attack"]["attack.patch.eps"] = maybe(number(above=0, most=1))


def check(cfg: DictConfig, script: str) -> None:
    """Refuses the first setting that cannot be used; writes numbers back as they are used, 1e6 as 1000000."""
    raw = json.dumps(OmegaConf.to_container(cfg, resolve=False), default=str)
    for key, kind in SCRIPTS[script].items():
        if kind is section and "*" not in key and OmegaConf.select(cfg, key, default=...) is ...:
            raise SettingError(
                key, f"The section {key} is missing: choose another {key.partition('.')[0]}, one that has it."
            )
    found = [(place, kind_of(place, SCRIPTS[script])) for place in places(cfg)]
    # What the user wrote before what refers to it.
    found.sort(key=lambda each: OmegaConf.is_interpolation(each[0].section, each[0].name))
    for place, kind in found:
        if OmegaConf.is_missing(place.section, place.name):
            expected = "" if kind is None else f", which must be {kind.expected}"
            raise SettingError(place.key, f"{place.key} is missing: say {place.key}=VALUE{expected}.")
        value = place.value()
        if kind is None:
            if not isinstance(value, DictConfig) and not is_read(place.key, raw):
                raise unknown_key(place, script)
            continue
        try:
            plain = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
            used = kind.read(plain)
        except (TypeError, ValueError, OverflowError, RuntimeError, OmegaConfBaseException):
            expected = kind.expected
            if isinstance(place.section._get_node(place.name), DictConfig) and kind.expected != "a section":
                expected += ", not a section"
            elif value is None and "null" not in expected:
                expected += ", and must be given"
            elif "section" in expected:
                expected = expected.replace("a section", f"a section, of which {place.key}.KEY=VALUE is one entry")
                if place.key == "checkpoint":
                    expected += ". To continue a run say resume=PATH"
            raise SettingError(place.key, f"{place.key}={say(value)} must be {expected}.") from None
        if used != plain or type(used) is not type(plain):
            OmegaConf.update(cfg, place.key, used)


@dataclass(frozen=True)
class Place:
    """One entry of a section; `target` is the callable whose argument it is, if any."""

    key: str
    section: DictConfig
    name: str
    target: Target | None

    def value(self) -> object:
        try:
            return self.section[self.name]
        except OmegaConfBaseException as error:
            written = say(self.section._get_node(self.name)._value())
            reason = str(error).splitlines()[0]
            message = (
                f"{self.key}={written} refers to what cannot be read: {reason}. Refer to another key, or give a value."
            )
            raise SettingError(self.key, message) from error


def places(section: DictConfig, prefix: str = "", target: Target | None = None) -> Iterator[Place]:
    """Every entry of the configuration, sections included; what is only a reference to a section is not gone through."""
    if "_target_" in section:
        target = Target(prefix.rstrip("."), section._target_)
        target.require(prefix, section)
    for name in section:
        if str(name).startswith("_") and "_target_" in section:
            continue
        key, node = f"{prefix}{name}", section._get_node(name)
        yield Place(key, section, name, target)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
            inner = target and Target(key, "builtins.dict")  # a plain dict among a callable's arguments
            agent = OmegaConf.select(section, "algorithm.agent") if key == "model" else None
            if isinstance(agent, DictConfig) and "_target_" in agent:
                inner = Target("algorithm.agent", agent._target_)  # whose arguments they become
                inner.require("model.", {*agent, *node})
            yield from places(node, f"{key}.", inner)


def kind_of(place: Place, table: Mapping[str, Kind | None]) -> Kind | None:
    """By its key, by its name among the arguments of our own classes, by its annotation; None: nobody knows it."""
    key, target = place.key, place.target
    for pattern in (key, *(each for each in table if "*" in each)):
        if pattern in table and pattern.count(".") == key.count(".") and fnmatchcase(key, pattern):
            return table[pattern] or ARGUMENTS[place.name]
    if target is None:
        return None
    if place.name not in target.arguments and not target.open and not key.startswith("model."):
        hint = near(place.name, target.arguments) or f", which takes {', '.join(target.arguments)}."
        raise SettingError(key, f"{key}={say(place.value())} is no argument of {target.name}{hint}")
    if target.ours and place.name in ARGUMENTS:
        return ARGUMENTS[place.name]
    return annotated(target.arguments.get(place.name, object))


def is_read(key: str, raw: str) -> bool:
    """Whether an interpolation refers to this key of the user's own, or to a section around it."""
    parts = key.split(".")
    prefixes = [".".join(parts[: end + 1]) for end in range(len(parts)) if end or len(parts) == 1]
    return any(re.search(rf"\$\{{[^\"]*\b{re.escape(prefix)}\b", raw) for prefix in prefixes)


def unknown_key(place: Place, script: str) -> SettingError:
    name = "train" if script == "config" else script
    hint = (
        near(place.key, SCRIPTS[script]) or ": nothing reads it. Leave it out, or refer to it as ${" + place.key + "}."
    )
    return SettingError(place.key, f"{place.key}={say(place.value())} means nothing to {name}.py{hint}")


def near(wrong: str, known: Mapping[str, object]) -> str:
    found = difflib.get_close_matches(wrong, [str(each) for each in known], n=2, cutoff=0.75)
    return f"; did you mean {' or '.join(found)}?" if found else ""

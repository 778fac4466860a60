"""Optimises a patch of pixels against a trained agent, and measures what it really costs the agent.

python examples/attack.py checkpoint=runs/quickstart_pixels/seed0 other=runs/quickstart_pixels/seed1
python examples/attack.py checkpoint=DIR attack=perturb attack.patch.placement=random beside=patched
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torchrl.envs import Compose, TransformedEnv
from tqdm import tqdm

from r2dreamer.envs import AdversarialPatch, VectorEnv, env_seeds
from r2dreamer.examples.attacks.gallery import contact_sheet, draw_patch, draw_search, side_by_side
from r2dreamer.examples.attacks.report import BELIEFS, compare, markdown, percent_drop, verdict
from r2dreamer.examples.attacks.search import Search, Windows, collect_episodes, measure, optimize
from r2dreamer.examples.cli.script import Interrupt, script
from r2dreamer.examples.training.devices import resolve_device, resolve_precision
from r2dreamer.examples.training.evaluation import EvaluationResult, evaluate
from r2dreamer.examples.training.files import make_output
from r2dreamer.examples.training.loading import Trained, load_trained
from r2dreamer.examples.training.video import write_video
from r2dreamer.losses import PlanningAttackLoss


class Attack:
    """What an attack on one agent needs: windows of its undisturbed episodes, the loss, the search."""

    def __init__(self, trained: Trained, cfg: DictConfig, device: torch.device):
        self.trained, self.cfg, self.device = trained, cfg, device
        self.key = trained.pixels_key(cfg.pixels_key)
        self.image = tuple(trained.agent.observations.images[self.key])  # C, H, W
        self.precision = resolve_precision(cfg.precision, device)
        self.loss(self.new_patch(), cfg.attack.loss.belief)  # refuses bad settings before anything heavy starts
        max_steps = trained.max_steps if cfg.collect.max_steps is None else cfg.collect.max_steps
        with closing(trained.environments(env_seeds(cfg.seed, cfg.collect.episodes, "train"))) as environments:
            episodes = collect_episodes(environments, trained.agent, max_steps=max_steps, seed=cfg.seed)
        kept = min(max(round(len(episodes) * (1 - cfg.collect.held_out)), 1), len(episodes) - 1)
        self.windows = Windows(torch.cat(episodes[:kept]), cfg.collect.context)
        held_out = Windows(torch.cat(episodes[kept:]), cfg.collect.context)
        self.held_out = held_out.spread(cfg.optimize.eval_windows).split(cfg.optimize.batch_size)

    def new_patch(self) -> AdversarialPatch:
        cfg, shape = self.cfg.attack, self.image
        more = {"channels": shape[0], "pixels_key": self.key, "seed": self.cfg.seed}
        if cfg.allowed is not None:
            y0, x0, y1, x1 = cfg.allowed
            more["allowed"] = torch.zeros(shape[1:], dtype=torch.bool)
            more["allowed"][y0:y1, x0:x1] = True
        patch = hydra.utils.instantiate(cfg.patch, _convert_="all", **more)
        patch.check_image(shape)
        return patch.to(self.device)

    def loss(self, patch: AdversarialPatch, belief: str) -> PlanningAttackLoss:
        return self.trained.attack_loss(patch, key=self.key, **{**self.cfg.attack.loss, "belief": belief})

    def search(self, belief: str, interrupt: Interrupt, title: str) -> Search:
        loss = self.loss(self.new_patch(), belief)
        if loss.patch.placement == "saliency":
            maps = [loss.saliency(batch.to(self.device)) for batch in self.held_out]
            loss.patch.place_by_saliency(torch.stack(maps).mean(0))
        return optimize(
            loss, self.windows, self.held_out, self.cfg, precision=self.precision, interrupt=interrupt, title=title
        )

    def imagined(self, patch: AdversarialPatch) -> dict[str, dict[str, float]]:
        """What the patch does to the imagined return of the windows held out, scored in either belief."""
        found = {}
        for belief in BELIEFS:
            values = measure(self.loss(patch, belief), self.held_out, self.precision, self.cfg.seed)
            found[belief] = {name: values[name] for name in ("clean_return", "imagined_return", "kl", "action_shift")}
            found[belief]["percent_drop"] = percent_drop(values["imagined_return"], values["clean_return"])
        return found

    def play(self, patches: dict[str, AdversarialPatch | None], interrupt: Interrupt) -> dict[str, EvaluationResult]:
        """The same episodes under every patch, until interrupted."""
        cfg, run, results = self.cfg, self.trained.run, {}
        seed = run.seed if cfg.evaluate.seed is None else cfg.evaluate.seed
        seeds = env_seeds(seed, cfg.evaluate.episodes, "eval")
        with closing(self.trained.environments(seeds)) as environments:
            for name, patch in tqdm(patches.items(), desc="evaluate", disable=not cfg.progress):
                if interrupt.requested:
                    break
                how = {"key": self.key, "seed": seed, "max_steps": self.trained.max_steps}
                results[name] = play(environments, self.trained, patch, seeds, **how)
        return results


def play(
    environments: VectorEnv, trained: Trained, patch: AdversarialPatch | None, seeds: list[int], *, key: str, seed: int,
    max_steps: int | None = None,
) -> EvaluationResult:  # fmt: skip
    """One episode from each seed, with mode actions and the same draws inside the policy, whatever the patch."""
    environments.reseed(seeds)
    transform = Compose()  # the undisturbed condition takes the same way through TorchRL
    if patch is not None:
        transform = patch.clone()
        transform.reseed(patch.seed)
    seen = TransformedEnv(environments, transform)
    how = {"max_steps": max_steps, "pixels_key": key, "seed": seed}
    return evaluate(seen, trained.agent.policy, episodes=len(seeds), record=True, **how)


def controls(patch: AdversarialPatch, seed: int) -> dict[str, AdversarialPatch]:
    """Patches of the same size, place and bounds that nobody optimised; and the optimised one, its pixels shuffled."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (bound.cpu().expand(patch.delta.shape) for bound in (patch.low, patch.high))
    pixels = patch.delta.detach().cpu().flatten(0, 1)  # [ph * pw, C]
    shown = {
        "grey": (low + high) / 2,  # in the mode "perturb": the pixels underneath, unchanged
        "black": low,
        "white": high,
        "noise": low + (high - low) * torch.rand(low.shape, generator=generator),
        "shuffled": pixels[torch.randperm(len(pixels), generator=generator)].reshape(low.shape),
    }
    return {name: patch.showing(delta) for name, delta in shown.items()}


def prepare_other(cfg: DictConfig, attack: Attack) -> Callable[[Interrupt], tuple[torch.Tensor, dict]]:
    """The control that was optimised, too, but for another agent: read from a file, or to be found in the same way.

    Returns what finds its pixels, and says whose they are; mistakes show before anything is optimised.
    """
    wanted = attack.new_patch()
    if Path(cfg.other).suffix == ".npz":
        other = AdversarialPatch.load(cfg.other)
        if (other.delta.shape, other.mode) != (wanted.delta.shape, wanted.mode):
            raise ValueError(f"other={cfg.other} holds {other}, which cannot be compared with {wanted}.")
        return lambda interrupt: (other.delta.detach(), {"file": cfg.other})
    trained = load_trained(cfg.other, attack.device, cfg.trust)
    if trained.fingerprint == attack.trained.fingerprint:
        raise ValueError(f"other={cfg.other} is the agent that is attacked: give a run of another seed.")
    rival = Attack(trained, cfg, attack.device)
    if rival.image != attack.image:
        raise ValueError(f"other={cfg.other} sees images of {rival.image}, this agent sees {attack.image}.")
    search = lambda interrupt: rival.search(cfg.attack.loss.belief, interrupt, "other agent").patch.delta.detach()
    return lambda interrupt: (search(interrupt), trained.identity)


def keep(out: Path, searches: dict[str, Search], record: dict) -> None:
    """The patches, their pictures, and what is known so far."""
    record["searches"] = {name: {"best_step": each.step, "curve": each.curve} for name, each in searches.items()}
    for name, search in searches.items():
        stem = "patch" if name == "optimized" else f"patch_{name.replace(' ', '_')}"
        search.patch.save(out / f"{stem}.npz")
        draw_patch(search.patch, out / f"{stem}.png")
    draw_search({name: search.curve for name, search in searches.items()}, out / "curve.png")
    (out / "metrics.json").write_text(json.dumps(record, indent=1))


@script("attack", foreign=True)
def main(cfg: DictConfig) -> None:
    device = resolve_device(cfg.device)
    trained = load_trained(cfg.checkpoint, device, cfg.trust)
    if trained.run.threads:
        torch.set_num_threads(trained.run.threads)
    out = trained.output(cfg.out, "attack")
    if (out / "patch.npz").exists():
        raise ValueError(f"{out} holds an attack already: remove it, or give another directory, out=DIR.")
    attack = Attack(trained, cfg, device)
    other = None if cfg.other is None else prepare_other(cfg, attack)
    record = {"agent": trained.identity, "config": OmegaConf.to_container(cfg, resolve=True)}
    make_output(out)
    with Interrupt() as interrupt:
        searches = {"optimized": attack.search(cfg.attack.loss.belief, interrupt, "optimized")}
        keep(out, searches, record)  # whatever happens to the others
        best = searches["optimized"].patch
        patches = {"clean": None, "optimized": best, **controls(best, cfg.seed)}
        if other is not None and not interrupt.requested:
            delta, record["other"] = other(interrupt)
            patches["other agent"] = best.showing(delta)
        if cfg.beside is not None and not interrupt.requested:
            name = f"{cfg.beside} belief"
            searches[name] = attack.search(cfg.beside, interrupt, name)
            patches[name] = searches[name].patch
            keep(out, searches, record)
        results = {} if interrupt.requested else attack.play(patches, interrupt)
    if interrupt.requested:
        print(f"Interrupted: {out / 'patch.npz'} is the best patch so far, that of step {searches['optimized'].step}.")
        return

    imagined = {name: attack.imagined(patch) for name, patch in patches.items() if patch is not None}
    conditions = compare(results, imagined)
    table, said = markdown(conditions), verdict(conditions)
    (out / "metrics.json").write_text(json.dumps(record | {"conditions": conditions, "verdict": said}, indent=1))
    (out / "table.md").write_text(f"{table}\n\n{said}\n")
    films = {name: result.frames for name, result in results.items()}
    contact_sheet(films, out / "frames.png")
    if cfg.video:
        write_video(out / "attack.mp4", side_by_side([films["clean"], films["optimized"]]), fps=30)
    print(f"{table}\n\n{said}\n{out}")


if __name__ == "__main__":
    main()

"""Shows what a trained agent looks at: which piece of the image, hidden, would change its policy and its value.

python examples/saliency.py checkpoint=runs/dmc_subtle-reacher/seed0
python examples/saliency.py checkpoint=DIR occlusion.fill=grey occlusion.window=5 objects=[target]
"""

from __future__ import annotations

import json
from contextlib import closing

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from r2dreamer.envs import env_seeds
from r2dreamer.examples.attacks.gallery import contact_sheet, overlay, side_by_side
from r2dreamer.examples.attacks.masks import object_mask
from r2dreamer.examples.attacks.occlusion import OcclusionSaliency, inside_fraction
from r2dreamer.examples.cli.script import script
from r2dreamer.examples.training.devices import resolve_device
from r2dreamer.examples.training.evaluation import LONGEST_FILM, evaluate, untouched_generators
from r2dreamer.examples.training.files import make_output
from r2dreamer.examples.training.loading import Trained, load_trained
from r2dreamer.examples.training.video import write_video


def watch(trained: Trained, cfg: DictConfig, key: str, seed: int) -> dict[str, list]:
    """Episodes with mode actions: every frame the agent acts on, its maps, and the object's mask where it is known."""
    run = trained.run
    saliency = OcclusionSaliency(trained.agent, key, **cfg.occlusion)
    seen = {"frames": [], "policy": [], "value": [], "masks": [], "returns": []}
    for each in env_seeds(seed, cfg.episodes, "eval"):
        environment = trained.make_environment(seed=each)
        mask = object_mask(environment, run.env.task, cfg.objects, cfg.colour)
        bar = tqdm(total=cfg.max_steps, disable=not cfg.progress)
        how = {"episodes": 1, "max_steps": cfg.max_steps, "record": True, "pixels_key": key, "seed": seed}

        def look(module, inputs, mask=mask, bar=bar):
            (observed,) = inputs
            with untouched_generators(None):  # what is looked at does not depend on how
                heats = saliency(observed)
            for name, heat in heats.items():
                seen[name].append(heat.cpu())
            if mask is not None:  # the simulator still is where the image was made
                seen["masks"].append(mask(observed[key]))
            bar.update()

        with closing(environment), bar, trained.agent.policy.register_forward_pre_hook(look):
            result = evaluate(environment, trained.agent.policy, **how)
        seen["frames"] += list(result.frames[: result.lengths[0]])  # without the last one, on which nobody acts
        seen["returns"] += result.returns
    return seen


@script("saliency", foreign=True)
def main(cfg: DictConfig) -> None:
    if cfg.max_steps > LONGEST_FILM:
        raise ValueError(f"max_steps={cfg.max_steps} is more than a film holds: at most {LONGEST_FILM}.")
    trained = load_trained(cfg.checkpoint, resolve_device(cfg.device), cfg.trust)
    if trained.run.threads:
        torch.set_num_threads(trained.run.threads)
    key = trained.pixels_key(cfg.pixels_key)
    out = trained.output(cfg.out, "saliency")
    make_output(out)
    seen = watch(trained, cfg, key, trained.run.seed if cfg.seed is None else cfg.seed)
    masks = torch.stack(seen["masks"]) if seen["masks"] else None

    films = {"seen": np.stack(seen["frames"])}
    record = {
        "agent": trained.identity,
        "algorithm": OmegaConf.to_container(trained.run.algorithm, resolve=True),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "frames": len(seen["frames"]),
        "returns": seen["returns"],
    }
    for name in ("policy", "value"):
        maps = torch.stack(seen[name])  # [T, H, W]
        bright = maps / maps.flatten(1).quantile(0.99, dim=1).clamp_min(1e-12)[:, None, None]
        outlines = [None] * len(maps) if masks is None else masks.numpy()
        films[name] = np.stack([overlay(*each) for each in zip(films["seen"], bright, outlines, strict=True)])
        if masks is not None:
            record[name] = found = inside_fraction(maps, masks)
            if found["area"] is None:
                print(f"{name}: no frame shows the object, so nothing says how much of the saliency lies in it")
                continue
            share = "none" if found["fraction"] is None else f"{found['fraction']:.4f}"
            area = f"which covers {found['area']:.4f} of the image"
            print(f"{name}: {share} of the saliency lies in the object, {area} ({found['frames']} frames)")
    (out / "saliency.json").write_text(json.dumps(record, indent=1))
    contact_sheet(films, out / "saliency.png")
    if cfg.video:
        write_video(out / "saliency.mp4", side_by_side(list(films.values())), fps=15)
    if masks is None:
        print(
            "No fraction inside the object: nothing says where it is; see objects and colour in configs/saliency.yaml."
        )
    print(out)


if __name__ == "__main__":
    main()

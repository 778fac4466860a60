"""Times one update of sheeprl's DreamerV3 on synthetic data and prints one JSON line.

    git clone https://github.com/Eclectic-Sheep/sheeprl
    pip install torch "lightning<2.6" torchmetrics gymnasium==0.29.1 hydra-core decorator opencv-python-headless moviepy python-dotenv rich
    OMP_NUM_THREADS=1 python sheeprl_update.py sheeprl --size XS --precision 32-true

It has DreamerV3's first edition, whose sizes are others: XS has 8 million parameters and S 18. One thread.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("clone", type=Path)
parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
parser.add_argument("--size", default="XS")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--repeats", type=int, default=5)
args = parser.parse_args()

sys.path.insert(0, str(args.clone))

import gymnasium  # noqa: E402
import hydra  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from lightning.fabric import Fabric  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from sheeprl.algos.dreamer_v3.agent import build_agent  # noqa: E402
from sheeprl.algos.dreamer_v3.dreamer_v3 import train  # noqa: E402
from sheeprl.algos.dreamer_v3.utils import Moments  # noqa: E402
from sheeprl.utils.utils import dotdict  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)
sizes = [f"algo.per_rank_batch_size={args.batch}", f"algo.per_rank_sequence_length={args.length}"]
keys = [
    f"algo.{kind}_keys.{part}={names}"
    for part in ("encoder", "decoder")
    for kind, names in (("cnn", "[rgb]"), ("mlp", "[]"))
]
with hydra.initialize_config_dir(str((args.clone / "sheeprl" / "configs").resolve()), version_base=None):
    composed = hydra.compose("config", ["exp=dreamer_v3", f"algo=dreamer_v3_{args.size}", "env=dummy", *sizes, *keys])
cfg = dotdict(OmegaConf.to_container(composed, resolve=True))
fabric = Fabric(accelerator="cpu", devices=1, precision=args.precision)
space = gymnasium.spaces.Dict({"rgb": gymnasium.spaces.Box(0, 255, (3, 64, 64), np.uint8)})
world_model, actor, critic, slow_critic, _ = build_agent(fabric, [6], True, cfg, space)
networks = {"world_model": world_model, "actor": actor, "critic": critic}
optimizers = [
    fabric.setup_optimizers(
        hydra.utils.instantiate(cfg.algo[name].optimizer, params=module.parameters(), _convert_="all")
    )
    for name, module in networks.items()
]
settings = cfg.algo.actor.moments
moments = Moments(settings.decay, settings.max, settings.percentile.low, settings.percentile.high)

lead = (args.length, args.batch)
records = {"rgb": torch.randint(0, 255, (*lead, 3, 64, 64)).float(), "actions": 2 * torch.rand(*lead, 6) - 1}
records |= {"rewards": torch.rand(*lead, 1)}
records |= {name: torch.zeros(*lead, 1) for name in ("terminated", "truncated", "is_first")}


def update() -> float:
    start = time.perf_counter()
    batch = {name: value.clone() for name, value in records.items()}
    train(fabric, *networks.values(), slow_critic, *optimizers, batch, None, cfg, True, [6], moments)
    return time.perf_counter() - start


first, _ = update(), update()
times = [update() for _ in range(args.repeats)]
parameters = sum(p.numel() for module in networks.values() for p in module.parameters())
result = {"implementation": "sheeprl", "torch": torch.__version__, "size": args.size, "precision": args.precision}
result |= {"batch": args.batch, "length": args.length, "parameters": parameters, "first": round(first, 1)}
print(json.dumps(result | {"update": round(statistics.median(times), 2), "times": [round(each, 2) for each in times]}))

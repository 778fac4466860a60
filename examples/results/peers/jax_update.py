"""Times one update of the JAX DreamerV3 on synthetic data and prints one JSON line.

    git clone https://github.com/danijar/dreamerv3
    pip install jax==0.4.33 "numpy<2" "chex<0.1.90" "optax<0.2.5" einops elements ninjax portal scope granular ruamel.yaml jaxtyping psutil
    OMP_NUM_THREADS=1 python jax_update.py dreamerv3 --precision float32

Sizes and settings are its own (`dmc_vision`, `size12m`). One thread.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("clone", type=Path)
parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
parser.add_argument("--size", default="size12m")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--repeats", type=int, default=5)
args = parser.parse_args()

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
sys.path.insert(0, str(args.clone))

import elements  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from dreamerv3.agent import Agent  # noqa: E402
from embodied.jax import internal  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402

presets = YAML(typ="safe").load((args.clone / "dreamerv3" / "configs.yaml").read_text())
config = elements.Config(presets["defaults"]).update(presets["dmc_vision"]).update(presets[args.size])
config = config.update({"jax.platform": "cpu", "jax.compute_dtype": args.precision, "jax.prealloc": False})
quiet = elements.Config({**config.jax.flat, "precompile": False, "profiler": False})
Space = elements.Space
observations = {"image": Space(np.uint8, (64, 64, 3)), "reward": Space(np.float32)}
observations |= {name: Space(bool) for name in ("is_first", "is_last", "is_terminal")}
sizes = {"batch_size": args.batch, "batch_length": args.length, "report_length": 32}
run = {"logdir": "unused", "seed": 0, "replica": 0, "replicas": 1, "replay_context": config.replay_context}
actions = {"action": Space(np.float32, (6,), -1, 1)}
agent = Agent(observations, actions, elements.Config(**config.agent, jax=quiet, **sizes, **run))

random = np.random.default_rng(0)
drawn = {
    "image": lambda shape: random.integers(0, 255, shape, dtype=np.uint8),
    "action": lambda shape: random.uniform(-1, 1, shape).astype(np.float32),
    "reward": lambda shape: random.uniform(0, 1, shape).astype(np.float32),
    "consec": lambda shape: np.ones(shape, np.int32),
}
records = {}
for name, space in agent.spaces.items():
    shape = (args.batch, args.length + config.replay_context, *space.shape)
    records[name] = drawn.get(name, lambda shape, kind=space.dtype: np.zeros(shape, kind))(shape)
records = internal.device_put(records, agent.train_sharded)
carry = agent.init_train(args.batch)


def update(number: int) -> float:
    global carry
    start = time.perf_counter()
    carry, _, _ = agent.train(carry, {**records, "seed": agent._seeds(number, agent.train_mirrored)})
    jax.block_until_ready(agent.params)
    return time.perf_counter() - start


first, _ = update(0), update(1)
times = [update(2 + number) for number in range(args.repeats)]
apart = ("opt", "slowval", "retnorm", "valnorm", "advnorm")
parameters = sum(value.size for name, value in agent.params.items() if not name.startswith(apart))
result = {"implementation": "jax", "jax": jax.__version__, "size": args.size, "precision": args.precision}
result |= {"batch": args.batch, "length": args.length, "parameters": int(parameters), "first": round(first, 1)}
print(json.dumps(result | {"update": round(statistics.median(times), 2), "times": [round(each, 2) for each in times]}))

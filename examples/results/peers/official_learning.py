"""Trains the official R2-Dreamer on DeepMind Control from vectors with the settings of `dmc_small_vectors`, on one CPU thread.

    git clone https://github.com/NM512/r2dreamer
    python official_learning.py r2dreamer walker_walk 0 100000 metrics.jsonl

Network, losses, optimiser and training loop are its own. From outside come what a CPU needs (no pinned memory, bfloat16 in place of
float16, environments in this process, no images), a replayed action that its in-place shift does not overwrite, and our
schedule: learning rate and entropy bonus fall to a tenth. It needs hydra, gymnasium, torchrl, tensorboard and dm_control.
"""

import functools
import json
import os
import sys
import time

clone, task, seed, frames, out = sys.argv[1:6]
os.environ.setdefault("MUJOCO_GL", "egl")
sys.path.insert(0, clone)

import hydra  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tensordict import TensorDict  # noqa: E402

SETTINGS = f"""
    device=cpu env=dmc_proprio env.task=dmc_{task} seed={seed} env.env_num=8 env.train_ratio=64 env.steps={frames}
    batch_size=16 batch_length=16 buffer.max_size=50000 trainer.update_log_every=1000
    model.deter=512 model.hidden=64 model.units=64 model.discrete=8 model.depth=4 model.compile=False
    model.act_entropy=5e-4 model.horizon=100 model.lr=1e-3 model.warmup=100 model.slow_target_fraction=0.05
    model.loss_scales.barlow=1.0
"""
with hydra.initialize_config_dir(os.path.abspath(os.path.join(clone, "configs")), version_base=None):
    config = hydra.compose("configs", overrides=[*SETTINGS.split(), *sys.argv[6:]])

# Modules of the clone, which comes first on the path: its own dreamer.py and envs/, not those of this repository.
import buffer  # noqa: E402
import tools  # noqa: E402
import trainer  # noqa: E402

import dreamer  # noqa: E402
import envs  # noqa: E402
from envs import dmc, parallel  # noqa: E402


class InThisProcess:
    """An environment in place of one in a worker: a call returns a promise."""

    def __init__(self, constructor, strategy):
        self.env = constructor()

    def __getattr__(self, name):
        value = getattr(self.env, name)
        if not callable(value):
            return value
        return lambda *args: functools.partial(lambda result: result, value(*args))


def sample(self):
    records, info = self._buffer.sample(return_info=True)
    records = records.view(-1, self.batch_length + 1)
    data = records[:, 1:].clone()
    data["action"] = records["action"][:, :-1].clone()  # theirs copies onto what it still reads
    index = [each.view(-1, self.batch_length + 1)[:, 1:] for each in info["index"]]
    return data, index, (records["stoch"][:, 0], records["deter"][:, 0])


class Lines:
    """Its logger's methods; writes JSON lines."""

    def __init__(self):
        self.values, self.began = {}, time.time()

    def scalar(self, name, value):
        self.values[name] = float(value)

    def video(self, *_):
        pass

    def write(self, step, fps=False):
        line = {"step": int(step), "seconds": round(time.time() - self.began), **self.values}
        with open(out, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.values = {}


def falling(replay):
    left = 1 - 0.9 * min(1.0, replay.count() * config.env.action_repeat / float(frames))
    agent.act_entropy = config.model.act_entropy * left
    agent._scheduler.base_lrs = [config.model.lr * left]
    return update(replay)


torch.set_num_threads(1)
dreamer.autocast = lambda **_: torch.autocast("cpu", torch.bfloat16)
TensorDict.pin_memory = lambda self: self
tools.to_np = lambda value: value.detach().float().cpu().numpy()  # NumPy has no bfloat16
parallel.Parallel = InThisProcess
buffer.Buffer.sample = sample

dmc.DeepMindControl.render = lambda self: np.zeros((1, 1, 3), np.uint8)
tools.set_seed_everywhere(config.seed)
logger, replay = Lines(), buffer.Buffer(config.buffer)
train_envs, eval_envs, observations, actions = envs.make_envs(config.env)
agent = dreamer.Dreamer(config.model, observations, actions)
update, agent.update = agent.update, falling
loop = trainer.OnlineTrainer(config.trainer, replay, logger, None, train_envs, eval_envs)
loop.begin(agent)
loop.eval(agent, int(frames))

"""Trains R2-Dreamer, or another member of its family: environments, replay, world model, actor and critic, wired here.

python examples/train.py env=dmc_vision env.task=walker_walk
python examples/train.py experiment=quickstart
python examples/train.py experiment=quickstart algorithm=dreamer

The process keeps freed memory, which makes updates faster on a CPU; R2DREAMER_MALLOC=system before the command prevents that.
"""

import functools
import sys
import time

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
from r2dreamer.examples.training.malloc import keep_memory  # isort: skip

if __name__ == "__main__":
    keep_memory()  # before torch as well

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torchrl.checkpoint import CheckpointError
from torchrl.envs.utils import ExplorationType
from torchrl.trainers.algorithms.dreamer_v3 import DreamerV3UpdateRatio
from tqdm import tqdm

from r2dreamer.dreamer.fast.capture import WARMUP
from r2dreamer.envs import WorkerError, env_seeds, make_vector_env
from r2dreamer.envs.replay.buffer import make_replay
from r2dreamer.envs.replay.place import check_memory, record_bytes
from r2dreamer.envs.replay.records import RecordBuilder
from r2dreamer.examples.cli.script import Interrupt, script
from r2dreamer.examples.figures.curves import draw_curve
from r2dreamer.examples.training.collecting import EnvironmentsLost
from r2dreamer.examples.training.devices import resolve_precision
from r2dreamer.examples.training.diagnosis import Diagnosis, largest_entropy
from r2dreamer.examples.training.episodes import EpisodeReturns
from r2dreamer.examples.training.evaluation import EvaluationResult, evaluate_seeds
from r2dreamer.examples.training.files import replace_text, warn
from r2dreamer.examples.training.learner import Learner, check_weights, parameter_counts
from r2dreamer.examples.training.metrics import Averages, progress, rename_loss
from r2dreamer.examples.training.openloop import film_open_loop
from r2dreamer.examples.training.prefill import prefill_replay
from r2dreamer.examples.training.ranks import Ranks
from r2dreamer.examples.training.setup import build, open_metrics
from r2dreamer.examples.training.shards import NoMetrics, open_together, save_together
from r2dreamer.examples.training.snapshot import restore
from r2dreamer.examples.training.video import write_video


class Trainer:
    """Collect, store, update, and now and then log, evaluate, save."""

    def __init__(self, cfg: DictConfig, ranks: Ranks | None = None):
        self.ranks = ranks = ranks or Ranks(cfg.device)
        self.cfg, self.device = cfg, ranks.device  # counts in it are of all ranks
        own = ranks.own(cfg)  # and in this one of this rank
        hydra.utils.get_class(cfg.collector._target_).check(cfg, own)
        precision = resolve_precision(cfg.precision, self.device)
        # Refuses what cannot be resumed before anything heavy starts.
        self.logdir, self.lock, self.checkpoints, self.saved = open_together(cfg, ranks)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.suite = suite = hydra.utils.instantiate(cfg.env, _convert_="all")
        with ranks.refusing_own(MemoryError):
            self.agent, keys = build(suite["make"], own, self.device, precision)
        self.collection = hydra.utils.instantiate(cfg.collector, self.agent.policy)
        self.learner = Learner(self.agent, cfg.algorithm, precision, cfg.compile, cfg.capture, ranks)
        ranks.broadcast(self.learner, *self.agent.parts().values())
        ranks.seed(cfg.seed)

        streams, sizes = own.env.num_envs, self.agent.latent_sizes
        size = record_bytes(self.agent.example_record(), sizes)
        saved_in = self.logdir if cfg.checkpoint.replay else None
        with ranks.refusing_own(MemoryError, ValueError):
            self.memory = check_memory(size, own.replay.capacity, **own.replay.place, saved_in=saved_in)
            self.replay = make_replay(
                own.replay.capacity, streams, own.batch_size, cfg.batch_length, **own.replay.place
            )
        self.records = RecordBuilder(streams, keys, latent_sizes=sizes)
        self.ratio = DreamerV3UpdateRatio(cfg.train_ratio / (cfg.batch_size * cfg.batch_length))
        self.returns, self.averages = EpisodeReturns(streams, suite["train_scores"]), Averages()
        self.diagnosis = Diagnosis(largest_entropy(self.agent.actions))
        self.count = {"policy_steps": 0, "updates": 0, "replayed_steps": 0, "restarts": 0, "collected_from": 0}
        self.count["evaluated"] = -1  # frames at the last evaluation that was finished
        self.interrupt, self.left = Interrupt(), False
        self.unprepared = WARMUP  # updates of this process that may compile or capture

        workers = {"parallel": cfg.env.parallel, "timeout": cfg.timeout}
        self.collection.start(
            functools.partial(make_vector_env, suite["make"], **workers),
            self.train_seeds(),
            keep=sizes,  # the latents the policy acted on, beside each transition
            frames_per_batch=streams * cfg.collect_steps,
            total_frames=-1,
            policy_device=self.device,
            exploration_type=ExplorationType.RANDOM,
        )
        self.evaluation_seeds = ranks.part(env_seeds(cfg.seed, cfg.eval.episodes, "eval"))
        evaluation = functools.partial(make_vector_env, suite["make_evaluation"], **workers)
        self.evaluation = evaluation(self.evaluation_seeds) if self.evaluation_seeds else None  # of a rank without any
        if self.saved:
            restore(self)
        self.metrics = open_metrics(cfg, self.logdir, self.saved) if ranks.first else NoMetrics()
        prefill_replay(self)
        if ranks.first:  # nothing refuses it any more
            replace_text(self.logdir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        self.restart_environments()
        if self.saved:
            self.saved.restore_rng()
        ranks.meet()
        self.clock = self.now()

    @property
    def frames(self) -> int:
        return self.count["policy_steps"] * self.cfg.env.action_repeat

    def now(self) -> dict[str, float]:
        return self.count | {"time": time.perf_counter(), "waited": self.collection.waited}

    def train_seeds(self) -> list[int]:
        """Of this rank's environments, other ones after each restart and each loss."""
        generation = self.count["restarts"] + 1_000_000 * self.collection.losses
        return self.ranks.part(env_seeds(self.cfg.seed, self.cfg.env.num_envs, "train", generation))

    def run(self) -> None:
        cfg = self.cfg
        if cfg.progress:
            parts = ", ".join(f"{name} {size:,}" for name, size in parameter_counts(self.agent, self.learner).items())
            print(f"{self.logdir}: {parts} parameters, {self.learner.precision} on {self.device}")
            print(f"Replay: {self.memory}")
        total, leaving, evaluated = cfg.total_frames, False, self.count["evaluated"]
        # Of a resumed run one may be missing: an environment that dies in an evaluation ends the run.
        missing = self.frames // cfg.eval.every > evaluated // cfg.eval.every or evaluated < self.frames >= total
        score = self.evaluate() if missing else "not measured since the run was resumed"
        if missing and self.frames >= total:
            self.save()  # else it would be missing again
        with self.interrupt, tqdm(total=total, initial=self.frames, disable=not cfg.progress) as bar:
            while self.frames < total and not (leaving := self.ranks.any(self.interrupt.requested)):
                before = self.frames
                self.collect(self.next_batch())
                collected = self.count["policy_steps"] - self.count["collected_from"]
                if collected >= cfg.warmup_steps and self.ranks.all(self.replay.can_sample()):
                    self.update()
                due = lambda every, before=before: self.frames // every > before // every
                if due(cfg.log_every) or self.frames >= total:
                    bar.set_postfix(self.log(), refresh=False)
                if due(cfg.eval.every) or self.frames >= total:
                    score = self.evaluate()
                if due(cfg.checkpoint.every) or self.frames >= total:
                    self.save()
                bar.update(self.frames - before)
            leaving = leaving or self.count["evaluated"] < self.frames  # the last evaluation was left
            if leaving:
                self.save(leaving=True)
        self.left = leaving
        if not self.ranks.first:
            return
        if cfg.train_ratio and not self.count["updates"] and not leaving:
            warn(
                f"Nothing was learnt: no environment collected a window of batch_length={cfg.batch_length} steps after "
                f"warmup_steps={cfg.warmup_steps}. Use more frames, fewer environments or shorter windows."
            )
        curve = draw_curve(self.logdir, cfg.env.suite, cfg.env.task, self.logdir / "curve.png")
        state = "interrupted, resume with the same command" if leaving else "finished"
        if leaving and cfg.checkpoint.exact:
            state = (
                "interrupted without a checkpoint (checkpoint.exact=true); the same command repeats from the last one,"
            )
        print(f"{cfg.name} seed {cfg.seed}: {state} at {self.frames} frames, eval return {score}, curve {curve}")

    def next_batch(self) -> TensorDict:
        while True:
            try:
                return self.collection.next(self.count["updates"])
            except EnvironmentsLost as error:
                warn(f"{error} Its episodes are cut off, and environments begin anew.")
                self.restart_environments()

    def collect(self, transitions: TensorDict) -> None:
        """[N, k] transitions, beside each the latents the policy acted on, become records."""
        self.count["policy_steps"] += transitions.numel() * self.ranks.count
        self.returns.add(transitions)
        self.replay.extend(self.records(transitions))

    def update(self) -> None:
        """The updates owed for the policy steps made since the last ones."""
        self.learner.anneal(self.frames / self.cfg.total_frames)
        if self.unprepared > 0:
            self.collection.pause()  # what compiles or captures concerns the whole process
        owed = self.ratio(self.count["policy_steps"])
        for made in range(owed):
            if made % 50 == 49 and self.ranks.any(self.interrupt.requested):  # after a prefill thousands may be owed
                self.ratio.reset(self.count["policy_steps"] - (owed - made) / self.ratio.ratio)
                break
            batch = self.replay.sample(device=self.device)
            losses, latents = self.learner.update(batch)
            self.replay.write_back(batch, latents["state"], latents["belief"])
            self.averages.add(losses)
            self.count["updates"] += 1
            self.unprepared -= 1
            self.count["replayed_steps"] += batch.numel() * self.ranks.count
        self.averages.check_finite(self.frames, self.count["updates"])

    def log(self) -> dict[str, str]:
        before, self.clock = self.clock, self.now()
        line = {rename_loss(name): value for name, value in self.ranks.mean(self.averages.pop()).items()}
        self.returns.finished = self.ranks.join(self.returns.finished)
        line |= self.returns.pop()
        line |= progress(before, self.clock, self.cfg.env.action_repeat) | {"count/policy_lag": self.collection.lag}
        self.metrics.write(self.frames, line)
        for sign in self.diagnosis.look(line):
            warn(f"At {self.frames} frames {sign}")
        return {"updates/s": f"{line['speed/updates_per_second']:.1f}", "return": f"{self.returns.latest:.4g}"}

    def evaluate(self) -> str:
        """Mode actions in environments of their own, the same seeds every time; the return, and when it was measured.

        An interrupt leaves it, and the resumed run makes it.
        """
        self.collection.pause()
        cfg = self.cfg
        last = self.frames >= cfg.total_frames  # a film of what shows no images is made once: rendering takes long
        records = cfg.eval.video and self.ranks.first
        film = {"record": records, "make_environment": self.suite["make_evaluation"] if last else None}
        how = {"seed": cfg.seed + self.ranks.rank, "max_steps": cfg.eval.max_steps, "timeout": cfg.timeout}
        stop = lambda: self.interrupt.requested
        result = EvaluationResult()
        if self.evaluation is not None:
            result = evaluate_seeds(self.evaluation, self.agent, self.evaluation_seeds, stop=stop, **how, **film)
        self.ranks.meet()
        if self.ranks.any(self.interrupt.requested):
            return f"not measured at {self.frames} frames"
        result.episodes = self.ranks.join(result.episodes)
        self.metrics.write(self.frames, result.summary(self.suite["scores"]))
        if result.frames is not None:
            write_video(self.logdir / "eval.mp4", result.frames, fps=30)
            self.metrics.video(self.frames, "eval/video", result.frames, fps=30)
        if records:
            film_open_loop(self)
        self.ranks.meet()
        self.count["evaluated"] = self.frames
        return f"{result.mean:.4g} +- {result.std:.3g} at {self.frames} frames"

    def restart_environments(self) -> None:
        """New episodes everywhere, from seeds that depend on the run's seed and on how often this happened."""
        self.collection.pause()
        self.replay.truncate_streams()
        self.records.reset()
        self.returns.reset()
        self.collection.restart(self.train_seeds())

    def save(self, leaving: bool = False) -> None:
        """leaving: an extra checkpoint because the run ends early; it must succeed, as must the one at the end."""
        if self.cfg.checkpoint.exact:  # a simulator cannot be saved in mid-episode: every run restarts it here
            if leaving:
                return  # an exact run repeats from its last regular checkpoint
            self.count["restarts"] += 1
            self.restart_environments()
        self.collection.pause()  # the generators are saved, too
        check_weights(self.agent, self.frames, self.count["updates"])
        try:
            save_together(self)
        except CheckpointError as error:
            if leaving or self.frames >= self.cfg.total_frames:
                raise
            warn(f"{error} Training goes on; the next checkpoint tries again.")

    def close(self) -> None:
        for part in (self.collection, self.evaluation, self.metrics, self.lock):
            if part is not None:
                part.close()


@script("config")
def main(cfg: DictConfig) -> None:
    with Ranks.launched(cfg) as ranks:
        trainer = Trainer(cfg, ranks)
        train(trainer)
    if trainer.left and HydraConfig.get().mode is RunMode.MULTIRUN and "Basic" in HydraConfig.get().launcher._target_:
        print("The runs after it are not begun.")
        sys.exit()


def train(trainer: Trainer) -> None:
    try:
        trainer.run()
    except Exception as error:
        # Environments are lost, what was learned is not.
        if (trainer.collection.failed or isinstance(error, WorkerError)) and trainer.ranks.count == 1:
            trainer.save(leaving=True)
        elif isinstance(error, RuntimeError):
            check_weights(trainer.agent, trainer.frames, trainer.count["updates"])
        raise
    finally:
        trainer.close()


if __name__ == "__main__":
    main()

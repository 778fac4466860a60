"""Trains R2-Dreamer, or another member of its family: environments, replay, world model, actor and critic, wired here.

python examples/train.py env=dmc_vision env.task=walker_walk
python examples/train.py experiment=quickstart
python examples/train.py experiment=quickstart algorithm=dreamer

The process keeps freed memory, which makes updates faster on a CPU; R2DREAMER_MALLOC=system before the command prevents that.
"""

import time

import r2dreamer.examples  # noqa: F401  # isort: skip  # before torch
from r2dreamer.examples.training.memory import keep_memory  # isort: skip

if __name__ == "__main__":
    keep_memory()  # before torch as well

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType
from torchrl.trainers.algorithms.dreamer_v3 import DreamerV3UpdateRatio
from tqdm import tqdm

from r2dreamer.dreamer import Agent, compile_parts
from r2dreamer.dreamer.fast.capture import PREPARING, captured
from r2dreamer.envs import VectorCollector, WorkerError, env_seeds, make_vector_env, reseed
from r2dreamer.envs.replay.buffer import check_memory, make_replay, record_bytes
from r2dreamer.envs.replay.records import RecordBuilder
from r2dreamer.examples.cli.script import Interrupt, script
from r2dreamer.examples.figures.curves import draw_curve
from r2dreamer.examples.training.checkpoint import CheckpointError
from r2dreamer.examples.training.devices import resolve_device, resolve_precision
from r2dreamer.examples.training.diagnosis import Diagnosis, largest_entropy
from r2dreamer.examples.training.disk import replace_text, warn
from r2dreamer.examples.training.episodes import EpisodeReturns
from r2dreamer.examples.training.film import evaluate_seeds
from r2dreamer.examples.training.metrics import Averages, progress, rename_loss
from r2dreamer.examples.training.openloop import film_open_loop
from r2dreamer.examples.training.schedule import LinearFall
from r2dreamer.examples.training.setup import (
    build,
    check_weights,
    objective,
    open_metrics,
    open_run,
    parameter_counts,
    parameter_groups,
)
from r2dreamer.examples.training.snapshot import restore, snapshot
from r2dreamer.examples.training.video import write_video
from r2dreamer.losses import R2DreamerWorldModelLoss, collapse_metrics, total_loss


class Learner(nn.Module):
    """Three losses, one optimiser, one slow critic."""

    def __init__(self, agent: Agent, algorithm: DictConfig, precision: torch.dtype, compile=None, capture="auto"):
        super().__init__()
        make = hydra.utils.instantiate
        self.world_model_loss = R2DreamerWorldModelLoss(
            agent.world_model,
            objective(algorithm.representation, agent),
            kl=make(algorithm.kl),
            num_reward_bins=agent.reward.num_bins,
            **make(algorithm.world_model),
        )
        self.posterior_mean = agent.posterior.latent.expected
        self.augmentation = make(algorithm.augmentation)
        value_loss = make(algorithm.value)(agent.value_model, num_value_bins=agent.value.num_bins)
        bootstrap, ends = value_loss.bootstrap_model, agent.continue_model
        self.actor_loss = make(algorithm.actor)(agent.actor, bootstrap, agent.imagination, continue_model=ends)
        self.value_loss = value_loss
        self.probe = objective(algorithm.probe, agent)  # last: with it or without, all else begins the same
        device = next(agent.encoder.parameters()).device
        self.to(device)  # the losses have buffers of their own
        self.replay_value_weight = algorithm.replay_value_weight
        self.optimizer = make(algorithm.optimizer, parameter_groups(self, agent))
        fractions = algorithm.final_lr_fraction, algorithm.final_entropy_fraction
        self.anneal = LinearFall(self.optimizer, self.actor_loss, *fractions)
        self.slow_critic = make(algorithm.slow_critic)(self.value_loss)
        self.precision, self.device = precision, device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.compute_losses = torch.compile(self.losses) if compile == "step" else self.losses
        if compile == "parts":
            compile_parts(agent.rollout, *agent.parts().values(), self)
        self.gradients = captured(self.losses_and_gradients, device, capture)

    def losses(self, batch: TensorDict) -> tuple[TensorDict, TensorDict]:
        """Every loss on records [B, T], and the detached posterior latents [B, T] for the replay."""
        losses, posterior = self.world_model_loss(self.augmentation(batch))
        probe_terms, _ = self.probe(posterior, self.world_model_loss.tensor_keys)
        losses.update({f"loss_{name}": term for name, term in probe_terms.items()})
        latents = posterior.get("next").select("state", "belief")
        start = latents.detach().flatten(0, 1)  # imagination begins at every posterior state and trains none of them
        actor_losses, imagined = self.actor_loss(start)
        value_losses, _ = self.value_loss(imagined)
        losses.update(actor_losses).update(value_losses)
        if self.replay_value_weight:
            losses.set("loss_replay_value", self.replay_value_weight * self.replay_value_loss(batch, latents, imagined))
        embedding = posterior.get(("next", "encoded_latents"))
        # Not the samples, which vary also where the posterior knows nothing.
        expected = self.posterior_mean(posterior.get(("next", "posterior_logits")).detach())
        losses.update(collapse_metrics(embedding=embedding, state=expected))
        return losses, latents.detach()

    def replay_value_loss(self, batch: TensorDict, latents: TensorDict, imagined: TensorDict) -> torch.Tensor:
        """The critic along the replayed sequence; the latents are attached, so that its error reaches the world model."""
        replayed = latents.copy()
        replayed.set("bootstrap", imagined.get("lambda_target")[:, 0].reshape(*batch.shape, 1))
        replayed.set("next", batch.get("next").select("reward", "done", "terminated"))
        horizon = 1 / (1 - self.actor_loss.discount)
        loss = self.value_loss.replay_value_loss(replayed, horizon=horizon, lmbda=self.actor_loss.lmbda)
        return loss.get("loss_replay_value")

    def update(self, batch: TensorDict) -> tuple[TensorDict, TensorDict]:
        """One step of the one optimiser over everything, then the slow critic moves."""
        losses, latents = self.gradients(batch)
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)  # clips each tensor's gradient by its norm (AGC), then LaProp
        self.scaler.update()
        self.slow_critic.step()
        self.world_model_loss.representation.after_update()
        return losses, latents

    def losses_and_gradients(self, batch: TensorDict) -> tuple[TensorDict, TensorDict]:
        """Nothing in here may wait for the device: on a GPU it is captured, and runs without Python from then on."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            losses, latents = self.compute_losses(batch)
        self.optimizer.zero_grad()
        self.scaler.scale(total_loss(losses)).backward()
        return losses.detach(), latents


class Trainer:
    """Collect, store, update, and now and then log, evaluate, save."""

    def __init__(self, cfg: DictConfig):
        self.cfg, self.device = cfg, resolve_device(cfg.device)
        precision = resolve_precision(cfg.precision, self.device)
        # Refuses what cannot be resumed before anything heavy starts.
        self.logdir, self.lock, self.checkpoints, self.saved = open_run(cfg)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.suite = suite = hydra.utils.instantiate(cfg.env, _convert_="all")
        self.agent, keys = build(suite["make"], cfg, self.device, precision)
        self.stream = hydra.utils.instantiate(cfg.collector, self.agent.policy)
        self.learner = Learner(self.agent, cfg.algorithm, precision, cfg.compile, cfg.capture)

        streams, sizes = cfg.env.num_envs, self.agent.latent_sizes
        size = record_bytes(self.agent.example_record(), sizes)
        saved_in = self.logdir if cfg.checkpoint.replay else None
        self.memory = check_memory(size, cfg.replay.capacity, **cfg.replay.place, saved_in=saved_in)
        self.replay = make_replay(cfg.replay.capacity, streams, cfg.batch_size, cfg.batch_length, **cfg.replay.place)
        self.records = RecordBuilder(streams, keys, latent_sizes=sizes)
        self.ratio = DreamerV3UpdateRatio(cfg.train_ratio / (cfg.batch_size * cfg.batch_length))
        self.returns, self.averages = EpisodeReturns(streams, suite["train_scores"]), Averages()
        self.diagnosis = Diagnosis(largest_entropy(self.agent.actions))
        self.count = {"policy_steps": 0, "updates": 0, "replayed_steps": 0, "restarts": 0}
        self.first_update = cfg.warmup_steps  # in policy steps
        self.unprepared = PREPARING  # updates of this process that may compile or capture

        workers = {"parallel": cfg.env.parallel, "timeout": cfg.timeout}
        self.environments = make_vector_env(suite["make"], self.train_seeds(), **workers)
        self.evaluation_seeds = env_seeds(cfg.seed, cfg.eval.episodes, "eval")
        self.evaluation = make_vector_env(suite["make_evaluation"], self.evaluation_seeds, **workers)
        collector = VectorCollector(  # TorchRL's Collector, with a shorter way from step to step
            self.environments,
            self.stream.policy,
            keep=sizes,  # the latents the policy acted on, beside each transition
            frames_per_batch=streams * cfg.collect_steps,
            total_frames=-1,
            policy_device=self.device,
            exploration_type=ExplorationType.RANDOM,
        )
        self.stream.start(collector)
        if self.saved:
            restore(self)
        replace_text(self.logdir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))  # nothing refuses it any more
        self.metrics = open_metrics(cfg, self.logdir, self.saved)
        self.restart_environments()
        if self.saved:
            self.saved.restore_rng()
        self.clock = self.now()

    @property
    def frames(self) -> int:
        return self.count["policy_steps"] * self.cfg.env.action_repeat

    def now(self) -> dict[str, float]:
        return self.count | {"time": time.perf_counter(), "waited": self.stream.waited}

    def train_seeds(self) -> list[int]:
        return env_seeds(self.cfg.seed, self.cfg.env.num_envs, "train", self.count["restarts"])

    def run(self) -> None:
        cfg = self.cfg
        if cfg.progress:
            parts = ", ".join(f"{name} {size:,}" for name, size in parameter_counts(self.agent, self.learner).items())
            print(f"{self.logdir}: {parts} parameters, {self.learner.precision} on {self.device}")
            print(f"Replay: {self.memory}")
        score = "not measured since the run was resumed" if self.saved else self.evaluate()
        total = cfg.total_frames
        with Interrupt() as interrupt, tqdm(total=total, initial=self.frames, disable=not cfg.progress) as bar:
            while self.frames < total and not interrupt.requested:
                before = self.frames
                self.collect(self.stream.next(self.count["updates"]))
                if self.count["policy_steps"] >= self.first_update and self.replay.can_sample():
                    self.update()
                due = lambda every, before=before: self.frames // every > before // every
                if due(cfg.log_every):
                    bar.set_postfix(self.log(), refresh=False)
                if due(cfg.eval.every) or self.frames >= total:
                    score = self.evaluate()
                if due(cfg.checkpoint.every) or self.frames >= total:
                    self.save()
                bar.update(self.frames - before)
            if interrupt.requested:
                self.save(leaving=True)
        curve = draw_curve(self.logdir, cfg.env.suite, cfg.env.task, self.logdir / "curve.png")
        state = "interrupted, resume with the same command" if interrupt.requested else "finished"
        print(f"{cfg.name} seed {cfg.seed}: {state} at {self.frames} frames, eval return {score}, curve {curve}")

    def collect(self, transitions: TensorDict) -> None:
        """[N, k] transitions, beside each the latents the policy acted on, become records."""
        self.count["policy_steps"] += transitions.numel()
        self.returns.add(transitions)
        self.replay.extend(self.records(transitions))

    def update(self) -> None:
        """The updates owed for the policy steps made since the last ones."""
        self.learner.anneal(self.frames / self.cfg.total_frames)
        if self.unprepared > 0:
            self.stream.pause()  # what compiles or captures concerns the whole process
        for _ in range(self.ratio(self.count["policy_steps"])):
            batch = self.replay.sample(device=self.device)
            losses, latents = self.learner.update(batch)
            self.replay.write_back(batch, latents["state"], latents["belief"])
            self.averages.add(losses)
            self.count["updates"] += 1
            self.unprepared -= 1
            self.count["replayed_steps"] += batch.numel()
        self.averages.check_finite(self.frames, self.count["updates"])

    def log(self) -> dict[str, str]:
        before, self.clock = self.clock, self.now()
        line = {rename_loss(name): value for name, value in self.averages.pop().items()} | self.returns.pop()
        line |= progress(before, self.clock, self.cfg.env.action_repeat) | {"count/policy_lag": self.stream.lag}
        self.metrics.write(self.frames, line)
        for sign in self.diagnosis.look(line):
            warn(f"At {self.frames} frames {sign}")
        return {"updates/s": f"{line['speed/updates_per_second']:.1f}", "return": f"{self.returns.latest:.4g}"}

    def evaluate(self) -> str:
        """Mode actions in environments of their own, the same seeds every time; the return, and when it was measured."""
        self.stream.pause()
        cfg = self.cfg
        last = self.frames >= cfg.total_frames  # a film of what shows no images is made once: rendering takes long
        film = {"record": cfg.eval.video, "make_environment": self.suite["make_evaluation"] if last else None}
        how = {"seed": cfg.seed, "max_steps": cfg.eval.max_steps}
        result = evaluate_seeds(self.evaluation, self.agent, self.evaluation_seeds, **how, **film)
        self.metrics.write(self.frames, result.summary(self.suite["scores"]))
        if result.frames is not None:
            write_video(self.logdir / "eval.mp4", result.frames, fps=30)
            self.metrics.video(self.frames, "eval/video", result.frames, fps=30)
        if cfg.eval.video:
            film_open_loop(self)
        return f"{result.mean:.4g} +- {result.std:.3g} at {self.frames} frames"

    def restart_environments(self) -> None:
        """New episodes everywhere, from seeds that depend on the run's seed and on how often this happened."""
        self.stream.pause()
        self.replay.truncate_streams()
        self.records.reset()
        self.returns.reset()
        reseed(self.environments, self.train_seeds())
        self.stream.restart()

    def save(self, leaving: bool = False) -> None:
        """leaving: an extra checkpoint because the run ends early; it must succeed, as must the one at the end."""
        if self.cfg.checkpoint.exact:  # a simulator cannot be saved in mid-episode: every run restarts it here
            if leaving:
                return  # an exact run repeats from its last regular checkpoint
            self.count["restarts"] += 1
            self.restart_environments()
        self.stream.pause()  # the generators are saved, too
        check_weights(self.agent, self.frames, self.count["updates"])
        try:
            self.checkpoints.save(self.frames, snapshot(self), self.replay if self.cfg.checkpoint.replay else None)
        except CheckpointError as error:
            if leaving or self.frames >= self.cfg.total_frames:
                raise
            warn(f"{error} Training goes on; the next checkpoint tries again.")

    def close(self) -> None:
        for part in (self.stream, self.evaluation, self.metrics, self.lock):
            part.close()


@script("config")
def main(cfg: DictConfig) -> None:
    trainer = Trainer(cfg)
    try:
        trainer.run()
    except Exception as error:
        if trainer.stream.failed or isinstance(error, WorkerError):  # environments are lost, what was learned is not
            trainer.save(leaving=True)
        elif isinstance(error, RuntimeError):
            check_weights(trainer.agent, trainer.frames, trainer.count["updates"])
        raise
    finally:
        trainer.close()


if __name__ == "__main__":
    main()

"""How batches come from the collector: one after another with learning, or the next one while the learner learns."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
from omegaconf import DictConfig
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn

from r2dreamer.envs import VectorCollector, VectorEnv, WorkerError, count_workers

CLOSE_TIMEOUT = 5.0  # seconds for a batch under way when the program ends
MakeEnvironments = functools.partial[VectorEnv]  # called with one seed for each environment


class EnvironmentsLost(WorkerError):
    """What collected is gone, with the batch under way; `restart` makes it anew."""


class Alternating:
    """`collector=sync`: environments wait while the learner learns. What a run does depends on its seed alone.

    Attributes:
        policy: the one to collect with.
        waited: seconds the learner has waited for batches, or for collecting to pause.
        lag: how many updates older than the learner the weights were that acted in the latest batch.
        failed: the latest batch never came.
        losses: how often the environments were lost.
    """

    repeats = True
    remote = False  # whether the environments live in other processes than this one and its workers

    def __init__(self, policy: TensorDictModuleBase):
        self.policy, self.waited, self.lag, self.failed, self.losses = policy, 0.0, 0, False, 0

    @classmethod
    def check(cls, cfg: DictConfig, own: DictConfig) -> None:
        """Refuses what cannot work; `own` is the configuration of this rank."""
        if cfg.checkpoint.exact and not cls.repeats:
            raise ValueError(
                "checkpoint.exact=true promises that a resumed run repeats the uninterrupted one, which no run does whose "
                "environments step while it learns; use collector=sync, or checkpoint.exact=false."
            )

    def start(self, make: MakeEnvironments, seeds: Sequence[int], **options: Any) -> None:
        """Makes the environments and their collector, of which `options` are arguments."""
        self.collector = VectorCollector(make(seeds), self.policy, **options)
        self.batches = iter(self.collector)

    def next(self, updates: int) -> TensorDict:
        """The next batch; `updates` is how many the learner has made."""
        with self._waiting():
            self.failed = True
            batch = self._take(updates)
            self.failed = False
            return batch

    def pause(self) -> None:
        """Until the next batch is asked for, nothing steps, draws random numbers or reads the weights."""
        with self._waiting():
            self._finish()

    def restart(self, seeds: Sequence[int]) -> None:
        """Episodes begin anew from these seeds; a batch of the old ones that nobody took is dropped."""
        self.pause()
        self.collector.restart(seeds)

    def close(self) -> None:
        self.pause()  # also after a second Ctrl-C: environments in mid-step cannot be closed
        self.collector.shutdown()  # closes its environments, too

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start

    def _take(self, updates: int) -> TensorDict:
        return next(self.batches)

    def _finish(self) -> None:
        """Nothing is ever under way between two batches."""


class Overlapping(Alternating):
    """`collector=async`: while the learner uses one batch a thread collects the next one.

    The thread acts with a copy of the policy, whose weights are the learner's when the batch begins: the learner writes
    its own in place, and records its recurrence on the modules themselves. Updates are owed for the batches taken, so the
    train ratio stays what it is. Both threads draw from the same random generators: a seed no longer repeats a run.
    Environments step in workers of their own (`env.parallel=true`): an OpenGL context belongs to one thread.
    """

    repeats = False

    def __init__(self, policy: TensorDictModuleBase):
        super().__init__(copy.deepcopy(policy))
        self.learned = policy
        self.thread = ThreadPoolExecutor(1, "collect")
        self.begun: tuple[Future, int] | None = None  # the batch under way, and the updates its weights had seen

    @classmethod
    def check(cls, cfg: DictConfig, own: DictConfig) -> None:
        super().check(cfg, own)
        if not cls.remote and not count_workers(cfg.env.parallel, cfg.env.num_envs):
            raise ValueError(
                "collector=async steps the environments while the learner learns, which needs workers of their own: "
                "add env.parallel=true, or use collector=sync."
            )

    def _begin(self, updates: int) -> tuple[Future, int]:
        copy_weights(self.learned, self.policy)
        return self.thread.submit(next, self.batches), updates

    def _take(self, updates: int) -> TensorDict:
        self.begun = self.begun or self._begin(updates)
        future, then = self.begun
        batch = self._result(future)
        self.lag = updates - then
        self.begun = self._begin(updates)
        return batch

    def _result(self, future: Future) -> Any:
        return future.result()  # an error of the thread is raised here, and again if somebody asks again

    def _finish(self) -> None:
        if self.begun:
            wait([self.begun[0]])

    def restart(self, seeds: Sequence[int]) -> None:
        super().restart(seeds)
        self.begun = None

    def close(self) -> None:
        if self.begun and not wait([self.begun[0]], timeout=CLOSE_TIMEOUT).done:
            self._kill()  # nobody waits minutes for a second Ctrl-C
        super().close()
        self.thread.shutdown()

    def _kill(self) -> None:
        environments: Any = self.collector.env
        environments.pool.kill()


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    ours, theirs = ((*module.parameters(), *module.buffers()) for module in (source, target))
    for here, there in zip(ours, theirs, strict=True):
        there.data.copy_(here.data)

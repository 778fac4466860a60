"""`collector=ray`: the training environments live in processes of a Ray cluster, on whatever machines it has."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import signal
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, NoReturn

import r2dreamer.envs  # noqa: F401  # isort: skip  # before TorchRL, which imports MuJoCo
import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn

from r2dreamer.envs import VectorCollector, VectorEnv, WorkerError
from r2dreamer.envs.base.errors import require
from r2dreamer.envs.vector.workers import ignored

from .collecting import CLOSE_TIMEOUT, EnvironmentsLost, MakeEnvironments, Overlapping, copy_weights

LOSSES = 3  # that follow each other end the run
RARE = 100  # batches after a loss: the next one does not follow it


class RemoteCollector(VectorCollector):
    """What TorchRL's RayCollector makes in a process of the cluster: environments, a copy of the policy, and our collector."""

    def __init__(
        self, make: Callable[[], VectorEnv], policy: TensorDictModuleBase, *, seed: int, worker_idx: int, **options: Any
    ):
        self.number = worker_idx
        torch.manual_seed(seed)  # every process begins with the same generator otherwise, and draws the same actions
        super().__init__(make(), policy, **options)
        self.acting: Any = self._wrapped_policy

    def __repr__(self) -> str:
        return f"collector {self.number}"  # in front of what it prints

    def __bool__(self) -> bool:
        return True  # Ray asks when __init__ fails, and a collector's length is not known then

    def place(self) -> tuple[int, str, str]:
        """The process, its machine, and Ray's name for the node."""
        import ray

        return os.getpid(), platform.node(), ray.get_runtime_context().get_node_id()

    def restart(self, seeds: Sequence[int]) -> None:
        torch.manual_seed(seeds[0])
        super().restart(seeds)

    def collect(self, weights: list[np.ndarray] | None) -> TensorDict:
        """The next batch, with these weights if there are any."""
        if weights is not None:
            for here, there in zip(weights_of(self.acting), weights, strict=True):
                here[...] = there
        return self.next()

    def weights(self) -> list[np.ndarray]:
        """Copies of what it acts with, in the order of `weights_of`."""
        return [value.copy() for value in weights_of(self.acting)]


class Remote(Overlapping):
    """`collector=ray`: as `Overlapping`, with the environments of all remote collectors in one batch.

    TorchRL's RayCollector makes the remote collectors, calls them and ends them. Weights go through Ray's object store. The
    RayCollector's own way is a gloo group of fixed members: no new process can take the place of a dead one, and its address
    is what the trainer's host name resolves to, on many machines 127.0.0.1.

    Args:
        num_collectors: how many processes share the environments.
        num_cpus: what Ray reserves for each.
        update_interval: updates of the learner between two times that weights go out.
        address: "local" starts a cluster for this run alone, "auto" finds the one of this machine, else HOST:PORT.
        object_store_memory: bytes of shared memory for weights and batches on their way; of a local cluster only.
    """

    remote = True

    def __init__(
        self,
        policy: TensorDictModuleBase,
        num_collectors: int,
        num_cpus: float,
        update_interval: int,
        address: str,
        object_store_memory: int,
    ):
        super().__init__(policy)
        self.policy = self.policy.to("cpu")
        self.num_collectors, self.num_cpus, self.update_interval = num_collectors, num_cpus, update_interval
        self.address, self.object_store_memory = address, object_store_memory
        self.collector: Any = None
        self.sent, self.in_a_row, self.since, self.connected = -1, 0, 0, False
        self.hung = False  # since the collectors were made
        self.loss: EnvironmentsLost | None = None  # until the collectors are made anew
        self.places: list[tuple[int, str, str]] = []

    @classmethod
    def check(cls, cfg: DictConfig, own: DictConfig) -> None:
        super().check(cfg, own)
        count, each = own.env.num_envs, cfg.collector.num_collectors
        if count % each:
            ranks = cfg.env.num_envs // count
            lower = ranks * (count - count % each)
            near = f"{lower} or {lower + ranks * each}" if lower else str(ranks * each)
            of = f" ({count} for each of {ranks} ranks)" if ranks > 1 else ""
            raise ValueError(
                f"env.num_envs={cfg.env.num_envs}{of} cannot be divided among collector.num_collectors={each}: use "
                f"env.num_envs={near}, or another number of collectors."
            )
        require("ray", "ray")

    def start(self, make: MakeEnvironments, seeds: Sequence[int], **options: Any) -> None:
        if make.keywords["parallel"] == "auto":
            make = functools.partial(make, parallel=int(self.num_cpus) if self.num_cpus >= 2 else False)
        steps = options["frames_per_batch"] // len(seeds)
        self.timeout = make.keywords["timeout"] * steps
        self.make, self.frames = make, options["frames_per_batch"] // self.num_collectors
        self.options = {"keep": list(options["keep"]), "exploration_type": options["exploration_type"]}
        self.options["frames_per_batch"] = self.frames
        self.connected = connect(self.address, self.object_store_memory)
        try:
            self._build(seeds)
        except BaseException:
            self.close()
            raise

    def _build(self, seeds: Sequence[int]) -> None:
        """New remote collectors."""
        from torchrl.collectors.distributed import RayCollector

        check_cpus(self.num_collectors, self.num_cpus)
        self.places, self.sent, self.hung = [], -1, False
        kind: Any = RemoteCollector  # as TorchRL's annotation has it, a function
        # Made empty, because its constructor waits for its collectors, without end where the cluster is busy.
        self.collector = RayCollector(
            [],
            self.policy,
            collector_class=kind,
            collector_kwargs=[],
            remote_configs=[],
            frames_per_batch=self.frames,
            weight_sync_schemes={},
        )
        parts, each = self._parts(seeds), self.num_collectors
        self.collector.add_collectors(
            [functools.partial(self.make, part) for part in parts],
            1,
            self.policy,
            [self.options | {"seed": part[0]} for part in parts],
            [{"num_cpus": self.num_cpus, "scheduling_strategy": "SPREAD"}] * each,
        )
        self.collector.num_collectors = each
        self.places = self._ask("place")

    def _parts(self, seeds: Sequence[int]) -> list[list[int]]:
        each = len(seeds) // self.num_collectors
        return [list(seeds[first : first + each]) for first in range(0, len(seeds), each)]

    def _begin(self, updates: int) -> tuple[Future, int]:
        weights = None
        if self.sent < 0 or updates - self.sent >= self.update_interval:
            copy_weights(self.learned, self.policy)
            weights, self.sent = weights_of(self.policy), updates
        return self.thread.submit(self._collect, weights), self.sent

    def _collect(self, weights: list[np.ndarray] | None) -> TensorDict:
        import ray

        stored = None if weights is None else ray.put(weights)
        batch: Any = torch.cat(self.collector.map_fn("collect", [(stored,)] * self.num_collectors), 0)
        return batch

    def _take(self, updates: int) -> TensorDict:
        if self.loss is not None:
            raise self.loss
        batch = super()._take(updates)
        self.since += 1
        return batch

    def _finish(self) -> None:
        if self.begun:
            self._wait(self.begun[0])

    def _wait(self, future: Future) -> None:
        """Until it is done; collectors that take too long are ended."""
        if not wait([future], timeout=self.timeout).done:
            self.hung = True
            self._kill()

    def restart(self, seeds: Sequence[int]) -> None:
        self.pause()
        self.begun = None
        with contextlib.suppress(EnvironmentsLost):  # which the next batch raises
            if self.loss is not None:
                lost, self.loss = self.loss, None
                try:
                    self._build(seeds)
                except ValueError as error:  # the machine that had them is gone, too
                    raise WorkerError(f"{lost} {error}") from error
            else:
                self._ask("restart", self._parts(seeds))

    def _ask(self, method: str, arguments: Sequence[Any] | None = None) -> list[Any]:
        """The answers of all remote collectors; each is given its own argument."""
        each = None if arguments is None else [(argument,) for argument in arguments]
        return self._result(self.thread.submit(self.collector.map_fn, method, each))

    def _result(self, future: Future) -> Any:
        """What a call returned. An error of a simulator is final; processes that are gone, or hang, can be made anew."""
        import ray.exceptions

        self._wait(future)
        try:
            return future.result()
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            text = " ".join([f"{type(cause).__name__}: {cause}", *getattr(cause, "__notes__", [])])
            raise WorkerError(f"A remote collector failed: {text}") from error
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
                raise WorkerError(f"A remote collector could not be made: {lines[-1].strip()}") from error
            reason = f"{self._named(error)} has ended, or its machine has; running out of memory is the usual cause."
            if self.hung:
                reason = f"no answer within {self.timeout:g} seconds."
                if not self.places:  # they were never placed
                    free, there = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
                    reason = f"they did not start within {self.timeout:g} seconds. {free:g} of the cluster's {there:g} CPUs are free."
            self._lose(f"Remote collectors were lost: {reason}", error)

    def _named(self, error: Exception) -> str:
        ids = [actor._actor_id.hex() for actor in self.collector.remote_collectors]
        lost = getattr(error, "actor_id", None)
        if lost not in ids or not self.places:
            return "one of them"
        number = ids.index(lost)
        return "number {} (process {} on {})".format(number, *self.places[number][:2])

    def _lose(self, text: str, error: Exception) -> NoReturn:
        self._kill()
        self.begun = None
        self.in_a_row = 1 if self.since >= RARE else self.in_a_row + 1
        self.losses, self.since = self.losses + 1, 0
        if self.in_a_row >= LOSSES:
            raise WorkerError(f"{text} That was loss {self.in_a_row}, with few batches between.") from error
        self.loss = EnvironmentsLost(text)
        raise self.loss from error

    def _kill(self) -> None:
        # Also forgets them: one that a RayCollector still knew as the program ends would make its `__del__` join a cluster
        # again, without end.
        self.collector.stop_remote_collectors()

    def close(self) -> None:
        import ray

        if self.collector is not None:
            if not self.begun or wait([self.begun[0]], timeout=CLOSE_TIMEOUT).done:
                closing = [actor.shutdown.remote() for actor in self.collector.remote_collectors]
                if closing:
                    ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT)
            self.collector.shutdown()  # kills what still runs
        self.thread.shutdown()
        if self.connected:
            ray.shutdown()  # ends the cluster as well, where it was begun here


def weights_of(module: nn.Module) -> list[np.ndarray]:
    """Views of its parameters and buffers, which lie in main memory."""
    return [value.detach().numpy() for value in (*module.parameters(), *module.buffers())]


def connect(address: str, object_store_memory: int) -> bool:
    """Joins or begins a Ray cluster; False if this process has joined one before."""
    import ray

    if ray.is_initialized():
        return False
    hint = (
        "`ray start --head` starts a cluster, `ray start --address=HOST:6379` adds a machine; address=local needs none."
    )
    options: dict[str, Any] = {}
    try:
        if address == "local":
            options = {"include_dashboard": False, "object_store_memory": object_store_memory}
            os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 collectors starve beside a learner
        elif address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself asks for a minute, then aborts
        with ignored(signal.SIGHUP):
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConnectionError(f"No Ray cluster at collector.address={address}: {reason}. {hint}") from error
    return True


def check_cpus(collectors: int, each: float) -> None:
    import ray

    there = ray.cluster_resources().get("CPU", 0)
    if collectors * each > there:
        raise ValueError(
            f"collector.num_collectors={collectors} with collector.num_cpus={each:g} need {collectors * each:g} CPUs, and the "
            f"Ray cluster has {there:g}. Use fewer collectors or a smaller num_cpus, which may be a fraction, or add a machine."
        )

"""The processes that train one agent together under `torchrun`: what they send each other.

Every rank has environments, a replay and a sampler of its own. One all-reduce averages the gradients of an update.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import signal
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn

from r2dreamer.envs.base.errors import WorkerError

from ..cli.torchrun import Board, place
from ..settings.compose import entries
from .devices import resolve_device
from .manifest import program

SLOW = 15  # times the timeout: how long ranks wait for one that evaluates, films or saves
SOURCES = ("dreamer", "envs", "examples", "losses")


class RankLost(ConnectionError):
    """Another rank has ended, or hangs."""


class Ranks:
    """This process among all ranks. Alone it sends nothing, and every method returns what it is given.

    Args:
        device: the setting of that name; on GPUs each rank of a machine takes one.
        timeout: seconds after which a rank that sends nothing counts as hanging; while it acts and learns twice as many.

    Attributes:
        count, rank, first: how many there are, which one this is, and whether it is the one that writes and prints.
    """

    def __init__(self, device: str = "cpu", timeout: float = 120.0, count: int = 1, rank: int = 0):
        self.count, self.rank, self.first = count, rank, rank == 0
        if count == 1:
            self.device = resolve_device(device)
            return
        if device.startswith("cuda:"):
            raise ValueError(f"device={device} gives one GPU to all {count} ranks; device=cuda gives each its own.")
        self.device = resolve_device(device)
        if self.device.type == "cuda":
            self.device = resolve_device(f"cuda:{place()[2]}")
            torch.cuda.set_device(self.device)
        backend, seconds = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl", timedelta(seconds=1)
        dist.init_process_group(backend, timeout=2 * timeout * seconds)
        self.control: Any = dist.new_group(backend="gloo", timeout=2 * timeout * seconds)
        self.waiting: Any = dist.new_group(backend="gloo", timeout=SLOW * timeout * seconds)

    @classmethod
    def launched(cls, cfg: DictConfig) -> Ranks:
        """Those that torchrun started; a process alone otherwise."""
        try:
            ranks = cls(cfg.device, cfg.timeout, *place()[:2])
            ranks.check_same(cfg)
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            raise lost(error) from error
        return ranks

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if self.count == 1:
            return
        if isinstance(error, Exception) and is_lost_connection(error):
            raise lost(error) from error
        if error is None:
            dist.destroy_process_group()

    def check_same(self, cfg: DictConfig) -> None:
        """Refuses ranks of different configurations, programs or devices."""
        if self.count == 1:
            return
        mine = {"device": self.device.type, "program": program(), "torch": torch.__version__, "code": code_hash()}
        settings = entries(OmegaConf.to_container(cfg, resolve=True))
        mine |= {key: value for key, value in settings if not isinstance(value, dict)}
        everyone = self.gather((platform.node(), mine))
        first = everyone[0][1]
        for rank, (node, other) in enumerate(everyone):
            for key in first | other:
                if first.get(key) != other.get(key):
                    raise ValueError(
                        f"Ranks must run the same command, code and kind of device: {key} is {first.get(key)} on rank 0 and "
                        f"{other.get(key)} on rank {rank} ({node})."
                    )

    def own(self, cfg: DictConfig) -> DictConfig:
        """The configuration with this rank's share of environments, batch, evaluation episodes and replay."""
        if self.count == 1:
            return cfg
        for key in ("env.num_envs", "batch_size"):
            total = OmegaConf.select(cfg, key)
            if total % self.count:
                lower = total - total % self.count
                near = f"{lower} or {lower + self.count}" if lower else str(self.count)
                raise ValueError(
                    f"{key}={total} is of all ranks and cannot be divided among {self.count}: use {key}={near}."
                )
        own = DictConfig(OmegaConf.to_container(cfg, resolve=True))
        own.env.num_envs //= self.count
        own.batch_size //= self.count
        own.replay.capacity //= self.count
        own.eval.episodes = len(self.part(range(cfg.eval.episodes)))
        if own.replay.place.get("directory") and not self.first:
            own.replay.place.directory += f".rank{self.rank}"
        return own

    @contextlib.contextmanager
    def refusing_own(self, *kinds: type[Exception]) -> Iterator[None]:
        """Around what may refuse this rank's share: the numbers in its message are not those of the settings."""
        try:
            yield
        except kinds as error:
            if self.count > 1:
                error.add_note(
                    f"These are numbers of one rank, and settings are of all {self.count}: {self.count} times as many."
                )
            raise

    def part(self, items: Any) -> Any:
        """This rank's of a sequence that is of all: consecutive, the first ranks have one more where it does not divide."""
        each, more = divmod(len(items), self.count)
        start = self.rank * each + min(self.rank, more)
        return items[start : start + each + (self.rank < more)]

    def seed(self, seed: int) -> None:
        """Generators of its own for every rank; those of the first are left as they are."""
        if not self.first:
            state = np.random.SeedSequence([seed, self.rank]).generate_state(2)
            torch.manual_seed(int(state[0]))
            np.random.seed(int(state[1]))

    @torch.no_grad()
    def broadcast(self, *modules: nn.Module) -> None:
        """The first rank's parameters and buffers, to all."""
        if self.count > 1:
            self.meet()  # making environments may have taken long
            for module in modules:
                for value in (*module.parameters(), *module.buffers()):
                    dist.broadcast(value, 0)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean over ranks, in one all-reduce of all gradients."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        pieces = flat.div_(self.count).split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.control)
        return values

    def join(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks, one after another."""
        return [each for part in self.gather(values) for each in part]

    def any(self, flag: bool) -> bool:
        if self.count == 1:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.control)
        return bool(raised)

    def all(self, flag: bool) -> bool:
        return not self.any(not flag)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of numbers that every rank has under the same names."""
        everyone = self.gather(values)
        return {name: sum(each[name] for each in everyone) / self.count for name in values}

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.count == 1:
            return value
        values = [value if self.first else None]
        dist.broadcast_object_list(values, 0, group=self.control)
        return values[0]

    def meet(self) -> None:
        """Waits for all ranks, also for one that does something slow."""
        if self.count > 1:
            dist.barrier(group=self.waiting)


def lost(error: Exception) -> RankLost:
    """Names the ranks that do not answer. torchrun ends this process while it does, unless SIGTERM is ignored."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    missing = []
    with contextlib.suppress(RuntimeError):
        missing = Board().missing("left", wait=5)
    if missing:
        names = ", ".join(map(str, missing))
        what = f"Rank {names} of {place()[0]} has ended or hangs" if len(missing) == 1 else f"Ranks {names} are lost"
    else:
        what = f"The ranks lost each other ({(str(error).splitlines() or ['no reason'])[0][:200]})"
    return RankLost(f"{what}; the others leave. The same command resumes from the newest checkpoint of all ranks.")


def is_lost_connection(error: BaseException) -> bool:
    """Whether it comes from torch.distributed, whose gloo raises plain RuntimeErrors; a simulator may have connections, too."""
    if isinstance(error, WorkerError):
        return False
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def code_hash() -> str:
    """Of this package's source: two checkouts of different commits differ in it."""
    root, digest = Path(__file__).parent.parent.parent, hashlib.sha256()
    for path in sorted(path for wing in SOURCES for path in (root / wing).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]

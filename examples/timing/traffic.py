"""How many bytes a process hands to the others, by collective."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist

# The argument that holds what this rank hands over.
HANDED = {"all_reduce": 0, "broadcast": 0, "all_gather_into_tensor": 1, "all_gather_single": 1}


@contextlib.contextmanager
def traffic() -> Iterator[Counter[str]]:
    """Counts the bytes of tensors that this process hands to each collective of torch.distributed.

    With two ranks a ring sends just as much; with N it sends 2 (N - 1)/N of what is reduced and N - 1 times what is gathered.
    """
    sent: Counter[str] = Counter()

    def counting(name: str, place: int):
        function = getattr(dist, name)

        @functools.wraps(function)
        def call(*tensors: torch.Tensor, **options: object):
            sent[name] += tensors[place].nbytes
            return function(*tensors, **options)

        return call

    with contextlib.ExitStack() as counted:
        for name, place in HANDED.items():
            if hasattr(dist, name):
                counted.enter_context(mock.patch.object(dist, name, counting(name, place)))
        yield sent

"""Objectives over two processes: each computes the loss of the joined batch, and so is the averaged gradient."""

import os
import socket
import subprocess
import sys

import torch
from tensordict import TensorDict
from torch import nn

from r2dreamer.losses import BarlowTwins, InfoNCE, R2DreamerWorldModelLoss, VICReg, gather_ranks

SAMPLES, FEATURES, EMBEDDING = 12, 3, 4
OBJECTIVES = {
    "barlow": lambda: BarlowTwins(weight=0.5, redundancy_weight=0.1),
    "barlow, attached": lambda: BarlowTwins(weight=0.5, redundancy_weight=0.1, detach_target=False),
    "infonce": lambda: InfoNCE(temperature=0.5),
    "vicreg": lambda: VICReg(covariance=0.3),
}


def loss_and_gradients(rows, which):
    """Of a projection and an encoder on these rows [N, 3], shaped as a batch of two sequences."""
    torch.manual_seed(0)
    projection, encoder = (nn.Linear(FEATURES, EMBEDDING) for _ in range(2))
    k, e = (network(rows).unflatten(0, (2, -1)) for network in (projection, encoder))
    views = TensorDict({"next": {"projected_latents": k, "encoded_latents": e}}, k.shape[:2])
    terms, _ = OBJECTIVES[which]()(views, R2DreamerWorldModelLoss.default_keys())
    (loss,) = terms.values()
    loss.backward()
    parameters = [*projection.parameters(), *encoder.parameters()]
    return loss.detach(), [parameter.grad for parameter in parameters if parameter.grad is not None]


def joined_batch():
    return torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(1))


def one_rank(out):
    """What `torchrun` starts twice."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mine = joined_batch().chunk(2)[rank]
    results = {}
    for which in OBJECTIVES:
        loss, gradients = loss_and_gradients(mine, which)
        for gradient in gradients:  # as data-parallel training does
            torch.distributed.all_reduce(gradient)
            gradient /= 2
        results[which] = (loss, gradients)
    torch.save(results, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for which in OBJECTIVES:
        alone, _ = loss_and_gradients(joined_batch().chunk(2)[0], which)
        expected, gradients = loss_and_gradients(joined_batch(), which)
        assert len(gradients) == (4 if which in ("barlow, attached", "vicreg") else 2)
        assert not torch.allclose(alone, expected, rtol=1e-2)  # half a batch has another correlation
        for rank in (0, 1):
            loss, found = torch.load(tmp_path / f"{rank}.pt")[which]
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
            for one, other in zip(found, gradients, strict=True):
                assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6  # the bias' gradient is 0


def test_a_single_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert gather_ranks(rows) is rows


if __name__ == "__main__":
    one_rank(sys.argv[1])

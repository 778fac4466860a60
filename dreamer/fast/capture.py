"""CUDA graphs: the thousands of small kernels of losses and gradients, launched as one.

tensordict's ``CudaGraphModule`` cannot take its place:

* Its capturing call runs the step, then records it, and does not replay the graph. Afterwards the gradients are memory
  of the graph that nothing has written, and an optimiser outside of the graph would step by it.
* It calls ``torch.cuda.synchronize`` before every replay. Here the host launches the optimiser's step meanwhile.
* It captures in the mode "global": an acting thread's calls (``collector=async``) would break the capture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase

Step = Callable[[TensorDictBase], tuple[TensorDict, TensorDict]]


WARMUP = 3  # calls, of which the last records the graph


def captured(step: Step, device: torch.device, choice: str | bool = "auto") -> Step:
    """``step``, or its CUDA graph: on a GPU with ``auto``, or where ``True`` asks for it."""
    if choice not in ("auto", True, False):
        raise ValueError(f"capture={choice} is not one of auto, true, false.")
    if choice is True and device.type != "cuda":
        raise ValueError(f"capture=true records a CUDA graph, and the learner is on {device}. Use capture=auto.")
    return CapturedStep(step, device) if choice and device.type == "cuda" else step


class CapturedStep:
    """Losses and gradients of a batch: the first calls run ``step``, later ones replay a CUDA graph of it.

    ``step`` sets gradients to None, computes them, and returns losses and latents without gradients. It must not wait for
    the device. After the capture the gradients belong to the graph: nobody else may set them to None. All tensors that the
    graph reads must stay in place, and numbers of the host are constants of the graph. Random draws are those of ``step``.
    Entries that ``step`` writes into its batch are lost.
    """

    def __init__(self, step: Step, device: torch.device):
        self.step, self.device = step, device
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, batch: TensorDictBase) -> tuple[TensorDict, TensorDict]:
        self.calls += 1
        if self.calls < WARMUP:
            return self._warm_up(batch)
        if self.graph is None:
            self.graph = self._capture(batch)
        else:
            self._copy_in(batch)
        self.graph.replay()
        losses, latents = self.results
        return losses.clone(), latents.clone()  # the next replay overwrites them

    def _warm_up(self, batch: TensorDictBase) -> tuple[TensorDict, TensorDict]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            results = self.step(batch)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return results

    def _capture(self, batch: TensorDictBase) -> torch.cuda.CUDAGraph:
        batch = batch.clone()
        self.inputs = dict(batch.items(True, True))  # the tensors: the step may replace entries of its batch
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.results = self.step(batch)
        except RuntimeError as error:
            error.add_note(
                "This happened while the update was recorded as a CUDA graph. Nothing in it may wait for the device, as "
                ".item(), printing a tensor or copying one to or from the CPU do (in an objective of your own?), and the "
                "graph has memory of its own. capture=false trains without it."
            )
            raise
        return graph

    def _copy_in(self, batch: TensorDictBase) -> None:
        for key, kept in self.inputs.items():
            given = batch.get(key)
            if given.shape != kept.shape:
                raise ValueError(
                    f"The captured update takes {key} of shape {tuple(kept.shape)}, this batch has {tuple(given.shape)}; "
                    "capture=false takes batches of any shape."
                )
            kept.copy_(given, non_blocking=True)

"""CUDA graphs: what losses and gradients launch, thousands of small kernels one after another, launched as one.

tensordict's ``CudaGraphModule`` does the same; this one does not wait for the device before each replay, and the host
launches the optimiser's step in the meantime.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase

Step = Callable[[TensorDictBase], tuple[TensorDict, TensorDict]]


PREPARING = 3  # calls, of which the last makes the graph


def captured(step: Step, device: torch.device, choice: str | bool = "auto") -> Step:
    """``step``, or on a GPU (``auto``) or where asked for (``True``) the CUDA graph of it."""
    if choice not in ("auto", True, False):
        raise ValueError(f"capture={choice} is not one of auto, true, false.")
    if choice is True and device.type != "cuda":
        raise ValueError(
            f"capture=true records a CUDA graph, and the learner is on {device}. Use capture=auto or false."
        )
    return CapturedStep(step, device) if choice and device.type == "cuda" else step


class CapturedStep:
    """Losses and gradients of a batch: ``step`` itself for the first calls, from then on a CUDA graph of it.

    ``step`` sets gradients to None, computes them, and returns losses and latents without gradients; it may not wait for
    the device. From the capture on the gradients belong to the graph: nobody else may set them to None. All the graph reads
    stays where it is in memory, and numbers of the host are what they were when it was made. Draws are those of ``step``.
    What ``step`` writes into its batch is lost.
    """

    def __init__(self, step: Step, device: torch.device):
        self.step, self.device = step, device
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, batch: TensorDictBase) -> tuple[TensorDict, TensorDict]:
        self.calls += 1
        if self.calls < PREPARING:
            return self._aside(batch)
        if self.graph is None:
            self._capture(batch)
        else:
            self._take(batch)
        self.graph.replay()
        losses, latents = self.results
        return losses.clone(), latents.clone()  # the next replay writes over them

    def _aside(self, batch: TensorDictBase) -> tuple[TensorDict, TensorDict]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            results = self.step(batch)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return results

    def _capture(self, batch: TensorDictBase) -> None:
        mine = batch.clone()
        self.inputs = dict(mine.items(True, True))  # the tensors themselves: the step may put others in their place
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.results = self.step(mine)
        except RuntimeError as error:
            error.add_note(
                "This happened while the update was recorded as a CUDA graph. Nothing in it may wait for the device, as "
                ".item(), printing a tensor or copying one to or from the CPU do (in an objective of your own?), and the "
                "graph has memory of its own. capture=false trains without it."
            )
            raise
        self.graph = graph

    def _take(self, batch: TensorDictBase) -> None:
        for key, mine in self.inputs.items():
            given = batch.get(key)
            if given.shape != mine.shape:
                raise ValueError(
                    f"The captured update takes {key} of shape {tuple(mine.shape)}, this batch has {tuple(given.shape)}; "
                    "capture=false takes batches of any shape."
                )
            mine.copy_(given, non_blocking=True)

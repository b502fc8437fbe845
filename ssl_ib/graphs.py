"""`compile=graphs`: the model compiled, its kernels recorded in CUDA graphs and replayed: none waits for the host.

torch copies views and masks to where the graphs read them. Weights and buffers are read where they are, so parts change
them in place, as hooks, optimiser and checkpoints do. Outputs and gradients lie where the step before had its own, so
nothing of one step is read in the next: gradients are dropped first, and a hook that keeps an output copies it.
"""

from __future__ import annotations

import torch
from torch import nn

from .record.terminal import say

#: torch runs the model once, records it, and replays it from then on.
_SETTLED = 3


class Graphs:
    """Compiles a model for CUDA graphs; `begin_step` comes before each step, when the last one's gradients are dropped.

    The micro-batches of a step have graphs of their own, because gradients have to outlive the earlier ones.
    """

    def __init__(self, model: nn.Module):
        # It takes a second to import, which a run without graphs need not wait for.
        from torch._dynamo.utils import counters

        self._steps, self._counted, self._before = 0, counters["inductor"], counters["inductor"]["cudagraph_skips"]
        model.compile(mode="reduce-overhead")

    def begin_step(self) -> None:
        """Lets the graphs overwrite what the step before has left; says once where torch could record nothing."""
        torch.compiler.cudagraph_mark_step_begin()
        self._steps += 1
        left_out = self._counted["cudagraph_skips"] - self._before
        if self._steps == _SETTLED and left_out:
            say(
                f"compile=graphs: torch left {left_out} of the model's graphs out, which run as with compile=true; "
                "TORCH_LOGS=cudagraphs,perf_hints says why"
            )

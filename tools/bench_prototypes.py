"""Time and memory of SVIB's criterion on many prototypes, beside a last layer with lightly's DINO loss.

    python tools/bench_train.py prototypes [--prototypes 65536] [--batch 32] [--width 256] [--local 4] [--rounds 5]

Both go from projections to gradients of the student's projections and of the prototypes, in float32: SVIB's criterion
on unit vectors, with the hooks that keep the prototypes at length 1 around an optimiser's step; a linear layer to K
outputs with weight normalisation, for student and teacher, and DINOLoss. They take turns on the same inputs; medians
are printed, and the peak of memory beyond inputs, prototypes and their gradients, each contender in a process of its
own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from ssl_ib import Batch, Progress, RunInfo
from ssl_ib.bench.measure import memory_status
from ssl_ib.criterions.svib import SVIB

GLOBAL = 2


class Ours:
    name = "svib"

    def __init__(self, options: argparse.Namespace):
        views = GLOBAL + options.local
        info = RunInfo(((3, 32, 32),) * views, options.batch, num_global=GLOBAL, width=lambda name: options.width)
        self.criterion, self.options = SVIB(info, K=options.prototypes), options
        self.parameters = [self.criterion.prototypes.weight]

    def loss(self, student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
        index = torch.arange(self.options.batch)
        batch = Batch([], [], index, index)
        return self.criterion({"student": student, "teacher": teacher}, batch, Progress(0, 0, 1, 1)).total

    def after(self) -> None:
        self.criterion.prototypes.before_step(None)
        self.criterion.prototypes.after_step(None)


class Lightly:
    name = "last layer, lightly's DINOLoss"

    def __init__(self, options: argparse.Namespace):
        from lightly.loss import DINOLoss

        layer = torch.nn.Linear(options.width, options.prototypes, bias=False)
        self.layer = torch.nn.utils.parametrizations.weight_norm(layer)
        self.layer.parametrizations.weight.original0.requires_grad_(False)
        # The teacher's copy of the layer does not count: it stands in for its own.
        self.loss_of, self.parameters = DINOLoss(options.prototypes), [self.layer.parametrizations.weight.original1]

    def loss(self, student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            targets = self.layer(torch.cat(teacher)).chunk(len(teacher))
        return self.loss_of(list(targets), list(self.layer(torch.cat(student)).chunk(len(student))))

    def after(self) -> None:
        """The layer is normalised whenever it is used."""


CONTENDERS = (Ours, Lightly)


def inputs(options: argparse.Namespace, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Unit projections of all student views, which want a gradient, and of the teacher's."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return F.normalize(torch.randn(options.batch, options.width, generator=generator), dim=1)

    return [draw().requires_grad_() for _ in range(GLOBAL + options.local)], [draw() for _ in range(GLOBAL)]


def step(contender, student: list[torch.Tensor], teacher: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    contender.loss(student, teacher).backward()
    contender.after()
    return time.perf_counter() - start


def memory(number: int, options: argparse.Namespace) -> float:
    """MB of the peak beyond inputs, parameters and the gradients that are left in the end."""
    contender = CONTENDERS[number](options)
    # Threads' buffers and code are there after a small one.
    small = argparse.Namespace(**{**vars(options), "prototypes": 512})
    step(CONTENDERS[number](small), *inputs(small, 0))
    student, teacher = inputs(options, 1)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_status("VmRSS")
    step(contender, student, teacher)
    left = [p.grad for p in (*contender.parameters, *student)]
    return (memory_status("VmHWM") - before - sum(g.numel() * g.element_size() for g in left)) / 2**20


def main(arguments: list[str]) -> None:
    p = argparse.ArgumentParser(
        prog="bench_train.py prototypes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--prototypes", type=int, default=65536)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--local", type=int, default=4)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = p.parse_args(arguments)
    if options.memory_of is not None:
        print(memory(options.memory_of, options))
        return
    found = [contender(options) for contender in CONTENDERS]
    rounds = []
    for seed in range(options.rounds + 1):
        rounds.append([step(contender, *inputs(options, seed)) for contender in found])
    times = [statistics.median(row[n] for row in rounds[1:]) for n in range(len(found))]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, K={options.prototypes}, "
        f"batch {options.batch}, {GLOBAL} + {options.local} crops, d={options.width}, {options.rounds} rounds"
    )
    for number, contender in enumerate(found):
        command = [sys.executable, sys.argv[0], "prototypes", *arguments, "--memory-of", str(number)]
        extra = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        ratio = statistics.median(row[number] / row[0] for row in rounds[1:])
        print(f"{1e3 * times[number]:>9.1f} ms  {ratio:>6.2f}x  {extra:>8.1f} MB  {contender.name}")

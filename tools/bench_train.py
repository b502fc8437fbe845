"""Training speed and memory of our recipes, side by side with lightly's methods, interleaved in one process.

    python tools/bench_train.py simclr_cifar10 source.path=cifar10.tar.xz --lightly
    python tools/bench_train.py simclr_cifar10 source.path=cifar10.tar.xz source.limit=2000 --lightly \
        --also "mrcl_simclr_cifar10 masker.ratio=0.5 criterion.w_masked=0 criterion.w_unmasked=0"
    python tools/bench_train.py mi_mae_cifar10 source.path=cifar10.tar.xz batch_size=256 \
        --also "mae_cifar10 batch_size=1024"
    python tools/bench_train.py prototypes --help

Every contender takes one step a round, in turn, so that a busy machine disturbs all alike; medians over the rounds are
printed. On a GPU the phases' shares are those of further rounds, because their borders wait for the device. rows/s
counts what the encoder gets, images times views times masks; the ratio is that of rows/s to the first contender's. Peak
memory is that of a process of its own that takes three steps; --no-memory leaves it out. Overrides before `--also` go
to every recipe. --lightly adds its counterpart of the first recipe, SimCLR, MAE or DINO by what that one's criterion is
(tools/bench_peers.py), --lightly-views that on our views alone. `source=noise` is random images (tools/bench_noise.py).

"outside" is the share of a step that no transformer block is at work in, of encoder or decoder: data, views,
embedding, loss, optimiser and all else. It comes from further rounds with hooks on the blocks, which a compiled model
would not call, so that there it is not known; on a GPU the hooks wait for the device.

`prototypes` in place of a recipe: SVIB's criterion alone, beside a last layer with lightly's DINO loss
(tools/bench_prototypes.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import bench_noise  # noqa: E402, F401 (it registers a source)
import bench_prototypes  # noqa: E402
from bench_peers import Clock, peers  # noqa: E402

from ssl_ib.bench.measure import memory_status  # noqa: E402
from ssl_ib.config.config import resolve  # noqa: E402
from ssl_ib.data.transfer import on_device  # noqa: E402
from ssl_ib.errors import UserError  # noqa: E402
from ssl_ib.run import build_run  # noqa: E402
from ssl_ib.trainer import Trainer  # noqa: E402

#: Steps that do not count: they allocate and compile, and CUDA graphs are recorded in the second of them.
WARM_UP = 3
PHASES = ("data", "views", "forward", "backward", "optimiser")


class Ours:
    """One of our recipes, stepped by the trainer itself."""

    def __init__(self, arguments: list[str]):
        config = resolve(arguments[0], arguments[1:])
        self.name, self.run = config.recipe, build_run(config)
        if self.run.device.type == "cuda" and config.deterministic:
            # As `ssl_ib.train` does.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.trainer = Trainer(self.run, None)
        self.clock = Clock(self.run.device)
        self.batch_size, self.model = self.run.batch_size, self.run.model
        self.rows = self.batch_size * self._rows_an_image()
        self.run.task.prepare = self.clock.timed("views", self.run.task.prepare)
        module = self.trainer.step_module
        module.forward = self.clock.timed("forward", module.forward)
        self.trainer.optimizer.step = self.clock.timed("optimiser", self.trainer.optimizer.step)
        self.batches = on_device(self._batches(), self.run.device)
        self.compiled = bool(config.compile)

    def _rows_an_image(self) -> int:
        """Views times masks."""
        batch = self.run.task.prepare(next(self.trainer.loader.epoch(0)), self.trainer.progress())
        return sum(1 if masks is None else masks.keep.shape[1] for masks in batch.masks)

    def _batches(self):
        epoch = 0
        while True:
            yield from self.trainer.loader.epoch(epoch)
            epoch += 1

    def step(self) -> dict[str, float]:
        start = self.clock.now()
        with self.clock.phase("data"):
            sample = next(self.batches)
        backward = torch.Tensor.backward
        torch.Tensor.backward = self.clock.timed("backward", backward)
        try:
            self.trainer.train_step(sample)
        finally:
            torch.Tensor.backward = backward
        return {"total": self.clock.now() - start, **self.clock.take()}


def contenders(options: argparse.Namespace) -> list:
    """The first recipe, lightly on it, and the others."""
    first = Ours([options.recipe, *options.overrides])
    found = [first]
    if options.lightly or options.lightly_views:
        transforms = (True, False) if options.lightly else (False,)
        found += peers(first.trainer, first.batches, first.clock, transforms)
    for text in options.also:
        recipe, *extra = shlex.split(text)
        found.append(Ours([recipe, *options.overrides, *extra]))
        found[-1].name = text
    return found


def peak_memory(number: int) -> float:
    """MB that contender `number` needs beyond what is there before its first step, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", str(number)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(contender, device: torch.device) -> float:
    """MB of peak memory over three steps, beyond what was there before them (Linux, or CUDA's own count)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(3):
            contender.step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # Resets the process's peak to what it holds now: what loading the data took does not count.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_status("VmRSS")
    for _ in range(3):
        contender.step()
    return (memory_status("VmHWM") - before) / 2**20


def rounds(found: list, count: int, phases: bool) -> list[list[dict[str, float]]]:
    """Seconds of each contender's steps, in turns; phases: whether also those of their phases."""
    Clock.phases = phases
    return [[contender.step() for contender in found] for _ in range(count)]


def summary(found: list, rows: list, watched: list, number: int, memory: bool) -> dict[str, float | str | None]:
    """Speed and memory of contender `number` from the rounds' steps, and its phases from those that were watched."""
    contender, first, steps = found[number], found[0], [row[number] for row in rows]
    total = statistics.median(step["total"] for step in steps)
    slower = statistics.median(row[number]["total"] / row[0]["total"] for row in rows)
    return {
        "contender": contender.name,
        "images_per_s": contender.batch_size / total,
        "rows_per_s": contender.rows / total,
        "speed_ratio": contender.rows / first.rows / slower,
        **{
            name: statistics.median(row[number].get(name, 0.0) / row[number]["total"] for row in watched)
            for name in PHASES
        },
        "memory_mb": peak_memory(number) if memory else None,
    }


def outside(found: list, count: int) -> list[float | None]:
    """The share of each contender's step spent outside its transformer blocks; None where there is no telling."""
    if any(contender.compiled for contender in found):
        return [None] * len(found)
    for contender in found:
        contender.clock.time_blocks(contender.model)
        contender.step()
    steps = rounds(found, count, True)
    shares = [[1 - step["blocks"] / step["total"] if "blocks" in step else None for step in row] for row in steps]
    return [None if None in column else statistics.median(column) for column in zip(*shares, strict=True)]


def main() -> None:
    if sys.argv[1:2] == ["prototypes"]:
        bench_prototypes.main(sys.argv[2:])
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipe")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    p.add_argument("--also", action="append", default=[], metavar='"RECIPE KEY=VALUE ..."')
    p.add_argument("--lightly", action="store_true")
    p.add_argument("--lightly-views", action="store_true", help="lightly on our views alone")
    p.add_argument("--no-memory", action="store_true", help="leave out the peaks, each of which starts a process")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--json", type=Path)
    p.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = p.parse_intermixed_args()

    try:
        found = contenders(options)
    except UserError as error:
        p.error(str(error))
    device = found[0].run.device
    if options.memory_of is not None:
        print(measure_memory(found[options.memory_of], device))
        return
    for contender in found:
        for _ in range(WARM_UP):
            contender.step()
    on_gpu, memory = device.type == "cuda", not options.no_memory
    rows = rounds(found, options.rounds, not on_gpu)
    watched = rounds(found, options.rounds, True) if on_gpu else rows
    table = [summary(found, rows, watched, number, memory) for number in range(len(found))]
    config = found[0].run.config
    for row, share in zip(table, outside(found, options.rounds), strict=True):
        row["outside"] = share
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {config.precision}, "
        f"compile {config.compile}, batch {config.batch_size}, {options.rounds} interleaved rounds"
    )
    phases = " ".join(f"{name:>9}" for name in PHASES)
    print(f"{'images/s':>9} {'rows/s':>9} {'ratio':>6} {phases} {'outside':>9} {'peak MB':>8}  contender")
    for row in table:
        shares = " ".join(f"{row[name]:>9.1%}" for name in PHASES)
        beside = "-" if row["outside"] is None else f"{row['outside']:.1%}"
        speed = f"{row['images_per_s']:>9.1f} {row['rows_per_s']:>9.1f} {row['speed_ratio']:>6.2f}"
        peak = "-" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}"
        print(f"{speed} {shares} {beside:>9} {peak:>8}  {row['contender']}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Times steps on one process and on two or more, and what saving costs a step.

    torchrun --nproc-per-node 2 tools/bench_processes.py simclr_digits
    torchrun --nproc-per-node 2 tools/bench_processes.py simclr_digits parallel=fsdp --saves

Without --saves: a step of one process, while the others wait for it, and a step that all share, with the recipe's batch
and with as many times more images as there are processes. Each takes a step a round, in turn.

With --saves: rounds of three stretches of `--steps` steps each, in turn: without a save; with one that begins before
the first step and is waited for after the last one, as in a run that is sharded; with one that is waited for at once.
`in flight` is how long writing took in the background. `a step` is what a save that nobody waits for adds to the steps
that it goes on beside: what it adds to the stretch, by how long it was in flight.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ssl_ib import distributed, sharding  # noqa: E402
from ssl_ib.config.config import resolve  # noqa: E402
from ssl_ib.run import build_run  # noqa: E402
from ssl_ib.trainer import Trainer  # noqa: E402
from ssl_ib.types import Sample  # noqa: E402


def trainer_of(arguments: list[str], out: Path | None = None) -> Trainer:
    config = resolve(arguments[0], [*arguments[1:], "logger=[]"])
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    return Trainer(build_run(config), out, mesh=sharding.mesh(config.parallel, device))


def samples_of(trainer: Trainer) -> Iterator[Sample]:
    epoch = 0
    while True:
        yield from trainer.loader.epoch(epoch)
        epoch += 1


def seconds(work: Callable[[], object]) -> float:
    """How long all processes take, from when all are there to when the last one is done."""
    distributed.largest(0)
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    distributed.largest(0)
    return time.perf_counter() - began


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def time_steps(arguments: list[str], rounds: int) -> None:
    world, batch = distributed.world_size(), resolve(arguments[0], arguments[1:]).batch_size
    found: dict[tuple[int, int], list[float]] = {}
    steps: dict[tuple[int, int], Callable[[], object]] = {}
    for images in (batch, world * batch):
        for processes in (1, world):
            alone = processes == 1
            if alone and not distributed.is_main():
                steps[processes, images] = lambda: None
                continue
            more = [f"batch_size={images}", *(["parallel=none"] if alone else [])]
            with distributed.alone() if alone else nullcontext():
                trainer = trainer_of([*arguments, *more])
            samples = samples_of(trainer)

            def step(trainer=trainer, samples=samples, alone=alone):
                sample = next(samples).to(trainer.run.device)
                with distributed.alone() if alone else nullcontext():
                    trainer.train_step(sample)

            steps[processes, images] = step
    for turn in range(rounds + 2):
        for case, step in steps.items():
            took = seconds(step)
            if turn > 1:  # The first two do what later ones do not.
                found.setdefault(case, []).append(took)
    if distributed.is_main():
        for (processes, images), values in found.items():
            ratio = statistics.median(x / one for x, one in zip(values, found[1, batch], strict=True))
            print(f"{processes} processes, {images} images: {median(values)} s a step, {ratio:.2f} of one process's")


def time_saves(arguments: list[str], rounds: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(distributed.from_main(folder)) / "run"
        out.mkdir(exist_ok=True)
        trainer = trainer_of(arguments, out)
        samples, flights = samples_of(trainer), []

        def steps() -> None:
            for _ in range(count):
                trainer.train_step(next(samples).to(trainer.run.device))

        def behind() -> None:
            began = time.perf_counter()
            trainer.save()
            if trainer.sharded is not None:
                trainer._writer._pending.add_done_callback(lambda _: flights.append(time.perf_counter() - began))
            steps()
            trainer.settle()

        def at_once() -> None:
            trainer.save()
            trainer.settle()
            steps()

        found: dict[str, list[float]] = {"without": [], "in the background": [], "waited for": []}
        for turn in range(rounds + 1):
            for values, work in zip(found.values(), (steps, behind, at_once), strict=True):
                values.append(seconds(work))
            if not turn:  # The first does what later ones do not.
                for values in (*found.values(), flights):
                    values.clear()
        size = sum(file.stat().st_size for file in (out / "checkpoints").glob("last*/**/*") if file.is_file())
        distributed.largest(0)
        if distributed.is_main():
            without = found["without"]
            print(f"a step without a save: {median([x / count for x in without])} s; a checkpoint: {size / 1e6:.0f} MB")
            for name in ("in the background", "waited for"):
                extra = [x - before for x, before in zip(found[name], without, strict=True)]
                print(f"a save {name} adds {median(extra)} s to {count} steps of {median(without)} s")
            if flights:
                extra = [x - before for x, before in zip(found["in the background"], without, strict=True)]
                cost = [100 * x / flight for x, flight in zip(extra, flights, strict=True)]
                print(f"in flight: {median(flights)} s; a step costs {median(cost)} % more meanwhile")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipe")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--saves", action="store_true")
    p.add_argument("--steps", type=int, default=10, help="of a stretch, with --saves")
    options = p.parse_intermixed_args()
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        p.error("start it with torchrun --nproc-per-node 2")
    torch.set_num_threads(1)
    distributed.initialise("cuda" if torch.cuda.is_available() else "cpu")
    arguments = [options.recipe, *options.overrides]
    if not any(text.startswith("parallel=") for text in arguments):
        arguments.append("parallel=ddp")
    if distributed.is_main():
        print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, one thread a process, {options.rounds} rounds")
    if options.saves:
        time_saves(arguments, options.rounds, options.steps)
    else:
        time_steps(arguments, options.rounds)
    distributed.shutdown()


if __name__ == "__main__":
    main()

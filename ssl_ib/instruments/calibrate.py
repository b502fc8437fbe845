"""How far each estimator of mutual information is to be trusted at your own dimension and number of samples.

Draws pairs whose mutual information is known (Gaussians, their cubes, and Gaussians of which two coordinates share
everything), lets every estimator read them, and prints truth, estimate, bias and spread over seeds in nats. The last
line for each dimension names the estimator whose worst error is smallest.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..config.registry import Registry
    from ..info.reading import Reading

HELP = "how far each estimator is to be trusted at your own dimension and number of samples"

#: An estimator is trusted where its error stays below this share of the truth,
TRUSTED = 0.2
#: or of this many nats, where the truth is less.
LEAST_TRUTH = 0.5


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dim", type=int, nargs="+", required=True, metavar="D", help="dimensions of each side")
    parser.add_argument("--samples", type=int, required=True, metavar="N", help="pairs of samples")
    parser.add_argument(
        "--mi", type=float, nargs="+", default=[1.0, 2.0, 4.0], metavar="NATS", help="the truths (default: 1 2 4)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="draws of each (default: 3)")
    parser.add_argument("--estimators", nargs="+", metavar="NAME", help="which (default: all)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes to measure in (default: one a core)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.csv and calibration.png")


@dataclass(frozen=True)
class Row:
    """What an estimator read on `len(readings)` draws of one kind of pairs; all in nats.

    bias: mean estimate less the truth. spread: standard deviation over the draws; NaN for a single one.
    """

    dim: int
    samples: int
    task: str
    truth: float
    estimator: str
    readings: tuple[Reading, ...]

    @property
    def estimate(self) -> float:
        return fmean(reading.nats for reading in self.readings)

    @property
    def trained(self) -> float | None:
        """The mean of the readings on the training parts."""
        values = [reading.trained for reading in self.readings]
        return None if values[0] is None else fmean(values)

    @property
    def bias(self) -> float:
        return self.estimate - self.truth

    @property
    def spread(self) -> float:
        return stdev(reading.nats for reading in self.readings) if len(self.readings) > 1 else math.nan

    @property
    def error(self) -> float:
        """Root mean squared error, as a share of the truth (of half a nat where the truth is less)."""
        squared = fmean((reading.nats - self.truth) ** 2 for reading in self.readings)
        return math.sqrt(squared) / max(self.truth, LEAST_TRUTH)


def run(options: argparse.Namespace) -> int:
    """Measures, prints and stores; returns the exit code."""
    from ..evals.progress import track
    from ..info.estimators import ESTIMATORS

    names = list(dict.fromkeys(options.estimators or ESTIMATORS.names()))
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: expected at least 1")
    check(options.dim, options.samples, options.mi, options.seeds, names, ESTIMATORS)
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--out {options.out}: expected a folder, got a file") from None
    dims, truths = list(dict.fromkeys(options.dim)), list(dict.fromkeys(options.mi))
    work = jobs(dims, options.samples, truths, options.seeds, names)
    with side_by_side(min(options.workers, len(work))) as each:
        rows = list(track(each(measure, work), len(work), "calibrate"))
    print(table(rows))
    if options.out is not None:
        from ..record.files import replace

        replace(options.out / "results.csv", as_csv(rows))
        draw(rows, options.out / "calibration.png")
        print(f"\nwrote {options.out / 'results.csv'} and {options.out / 'calibration.png'}")
    print()
    for dim in dims:
        print(verdict([row for row in rows if row.dim == dim]))
    return 0


def check(
    dims: list[int], samples: int, truths: list[float], seeds: int, names: list[str], estimators: Registry
) -> None:
    """Raises UserError where something that was asked for cannot be measured, before anything is."""
    from ..info.known import most_nats
    from ..info.learning import LEAST

    for name in names:
        estimators[name]
    if min(dims) < 1 or seeds < 1:
        raise UserError(f"expected --dim and --seeds of at least 1, got --dim {min(dims)} and --seeds {seeds}")
    if samples < LEAST:
        raise UserError(f"--samples {samples}: expected at least {LEAST}, as critics are trained on a part of them")
    if samples < 2 * max(dims) + 2:
        raise UserError(
            f"--samples {samples}: fewer than the 2 x {max(dims)} dimensions of a pair; expected at least "
            f"{2 * max(dims) + 2} samples, or fewer dimensions"
        )
    most = most_nats(min(dims))
    for truth in truths:
        if not 0 <= truth <= most:
            raise UserError(f"--mi {truth:g}: expected 0 to {most:g} nats, which --dim {min(dims)} can share")


def jobs(dims: list[int], samples: int, truths: list[float], seeds: int, names: list[str]) -> list[tuple]:
    """What `measure` is to be called with, in the order of the table."""
    from ..info.known import KNOWN

    return [
        (dim, samples, task, truth, name, seeds)
        for dim in dims
        for task in KNOWN
        # Of one or two coordinates all share anyway.
        if task != "sparse" or dim > 2
        for truth in truths
        for name in names
    ]


def measure(job: tuple[int, int, str, float, str, int]) -> Row:
    """What an estimator reads on so many draws: (dim, samples, task, truth, estimator, seeds) -> a row."""
    from ..info.estimators import ESTIMATORS
    from ..info.known import KNOWN

    dim, samples, task, truth, name, seeds = job
    draws = (KNOWN[task](samples, dim, truth, seed) for seed in range(seeds))
    readings = tuple(ESTIMATORS[name](x, y, seed=seed) for seed, (x, y) in enumerate(draws))
    return Row(dim, samples, task, truth, name, readings)


@contextmanager
def side_by_side(workers: int) -> Iterator[Callable]:
    """A `map` that works in so many processes of one thread each, or in this process for a single one."""
    if workers == 1:
        yield map
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    import torch

    # Ctrl-C is for the process that the user started, and none may go on when that is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def table(rows: list[Row]) -> str:
    """The rows as text: a block for each dimension and kind of pairs, and at the end what readings remark."""
    lines, block, notes = [], None, {}
    for row in rows:
        if block != (row.dim, row.task):
            block = (row.dim, row.task)
            draws = f"{len(row.readings)} draw{'s' * (len(row.readings) > 1)} of {row.samples:,} samples"
            lines += ["", f"{row.task}, {row.dim} dimensions, {draws}; nats"]
            lines.append("  truth  estimator     kind         estimate    bias  spread  on training part  ceiling")
        first = row.readings[0]
        trained = "" if row.trained is None else f"{row.trained:.2f}"
        ceiling = "none" if math.isinf(first.ceiling) else f"{first.ceiling:.2f}"
        spread = "" if math.isnan(row.spread) else f"{row.spread:.2f}"
        lines.append(
            f"  {row.truth:5.2f}  {row.estimator:<12}  {first.kind:<11}  {row.estimate:8.2f}  {row.bias:+6.2f}  "
            f"{spread:>6}  {trained:>16}  {ceiling:>7}"
        )
        for reading in row.readings:
            for remark in filter(None, reading.remark.split("; ")):
                notes.setdefault((row.estimator, remark), []).append(reading)
    lines += [""] if notes else []
    for (name, remark), readings in notes.items():
        lines.append(f"{name}, {len(readings)} reading{'s' * (len(readings) > 1)}: {remark}")
    return "\n".join(lines[1:])


def as_csv(rows: list[Row]) -> str:
    """The rows as CSV with a heading; a cell of what there is not stays empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        "dim samples task truth estimator kind seeds estimate bias spread error trained ceiling read remark".split()
    )
    for row in rows:
        first = row.readings[0]
        numbers = (row.estimate, row.bias, row.spread, row.error, row.trained, first.ceiling)
        cells = ["" if v is None or not math.isfinite(v) else f"{v:.4f}" for v in numbers]
        known = [row.dim, row.samples, row.task, f"{row.truth:g}", row.estimator, first.kind, len(row.readings)]
        writer.writerow([*known, *cells, first.n, first.remark])
    return out.getvalue()


def verdict(rows: list[Row]) -> str:
    """One line: which estimator to trust at the rows' dimension and number of samples, or that none is to be trusted.

    That is the one whose worst error over all kinds of pairs and truths is smallest.
    """
    worst: dict[str, Row] = {}
    for row in rows:
        worst[row.estimator] = max(worst.get(row.estimator, row), row, key=lambda r: r.error)
    order = sorted(worst, key=lambda name: worst[name].error)
    best = worst[order[0]]
    where = f"{best.error:.0%} of the truth ({best.task}, {best.truth:g} nats)"
    head = f"At {best.dim} dimensions and {best.samples:,} samples"
    if best.error > TRUSTED:
        line = f"{head} trust none of these to {TRUSTED:.0%}: the best, {best.estimator}, is off by up to {where}"
        good = {
            task: _within([row for row in rows if row.task == task]) for task in dict.fromkeys(r.task for r in rows)
        }
        held = [f"{', '.join(names)} on {task} pairs" for task, names in good.items() if names]
        return f"{line}; within {TRUSTED:.0%}: {'; '.join(held)}." if held else f"{line}."
    others = [name for name in order[1:] if worst[name].error <= TRUSTED]
    also = f"; within {TRUSTED:.0%} too: {', '.join(others)}" if others else ""
    return f"{head} trust {best.estimator}: its worst error is {where}{also}."


def _within(rows: list[Row]) -> list[str]:
    """The estimators all of whose rows are within what is trusted, best first."""
    worst: dict[str, float] = {}
    for row in rows:
        worst[row.estimator] = max(worst.get(row.estimator, 0.0), row.error)
    return sorted((name for name in worst if worst[name] <= TRUSTED), key=worst.get)


def draw(rows: list[Row], path: Path) -> None:
    """Draws estimate against truth: a row of panels a dimension, a panel a kind of pairs, a curve an estimator."""
    from matplotlib import colormaps

    from ..record.figures import INK, MUTED, chart, tidy

    dims, tasks, names = (
        list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("dim", "task", "estimator")
    )
    colours = dict(zip(names, colormaps["tab10"].colors, strict=False))
    most = 1.6 * max(max(row.truth for row in rows), LEAST_TRUTH)
    figure = chart(3.6 * len(tasks) + 1.2, 3.0 * len(dims))
    panels = figure.subplots(len(dims), len(tasks), squeeze=False)
    for line, dim in zip(panels, dims, strict=True):
        for panel, task in zip(line, tasks, strict=True):
            if (dim, task) not in {(row.dim, row.task) for row in rows}:
                panel.set_axis_off()
                continue
            for place, name in enumerate(names):
                curve = sorted(
                    (r for r in rows if (r.dim, r.task, r.estimator) == (dim, task, name)), key=lambda r: r.truth
                )
                # Side by side, where curves would hide one another.
                shift = (place / max(len(names) - 1, 1) - 0.5) * 0.04 * most
                panel.errorbar(
                    [row.truth + shift for row in curve],
                    [row.estimate for row in curve],
                    yerr=[0 if math.isnan(row.spread) else row.spread for row in curve],
                    color=colours.get(name, MUTED),
                    label=name,
                    marker="o",
                    markersize=3.5,
                    linewidth=1.2,
                    elinewidth=1,
                    capsize=2,
                )
            panel.plot([0, most], [0, most], color=INK, linewidth=1, linestyle=(0, (5, 3)), label="truth", zorder=1)
            tidy(panel, f"{task}, {dim} dimensions", "true nats", small=True)
            panel.set_xlim(0, most / 1.6 * 1.08)
            panel.set_ylim(min(-0.1 * most, max(-most, min(r.estimate for r in rows) - 0.1)), most)
    panels[0, 0].set_ylabel("estimated nats", fontsize=8, color=MUTED)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, labelcolor=MUTED, loc="outside right upper")
    low, high = panels[0, 0].get_ylim()
    outside = sum(not low <= row.estimate <= high for row in rows)
    if outside:
        note = f"{outside} of {len(rows)} estimates lie outside the frames; results.csv has them"
        figure.suptitle(note, fontsize=8, color=MUTED, x=0.01, ha="left")
    figure.savefig(path)

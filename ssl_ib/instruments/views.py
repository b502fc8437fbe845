"""What two views share against how well the encoder does: held-out I_NCE and accuracy over the runs of a sweep.

I_NCE is log(candidates) - InfoNCE loss on held-out images: a lower bound on the views' mutual information in nats, and
at most log(candidates). It can only be compared between runs of one model, temperature and number of candidates. If the
best views share what the labels need and no more, accuracy has a peak between the ends, near H(Y).
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..sweep.finished import Finished

HELP = "held-out I_NCE against accuracy over a sweep, and where it peaks"
MI, CEILING = "held_out/mi_nats", "held_out/mi_ceiling"
RESAMPLES = 2000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP", help="folders of ssl-ib-sweep, of one axis")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where views.csv and views.png go (default: the SWEEP)")


def run(options: argparse.Namespace) -> int:
    from ..record.files import replace

    found = examine(options.sweeps)
    out = options.out or options.sweeps[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {out}: {error.strerror}") from None
    replace(out / "views.csv", table(found))
    replace(out / "views_peaks.csv", peaks_table(found))
    draw(found, out / "views.png")
    print(report(found), end="")
    print(f"{out}/views.csv, views_peaks.csv, views.png")
    return 0


@dataclass(frozen=True)
class Peak:
    """Where a mean accuracy is highest over the points.

    at:       the point's label; mi: its mean I_NCE, in nats.
    interior: whether it is neither the point of the least I_NCE nor that of the largest.
    gap:      the best point between the ends minus the better end; above 0 means an interior peak.
    low, high, mi_low, mi_high: 95 % intervals of gap and mi over resampled seeds; nan where a point has one seed only.
    share:    of the resamples, how many have their peak between the ends.
    """

    metric: str
    at: str
    mi: float
    mean: float
    interior: bool
    gap: float
    low: float
    high: float
    mi_low: float
    mi_high: float
    share: float

    def __str__(self) -> str:
        known = not math.isnan(self.low)
        end = f"interval of that [{self.low:+.4f}, {self.high:+.4f}]" if known else "no interval: a point has one seed"
        if math.isnan(self.gap):
            said = f"no interior peak: there are fewer than 3 points; the highest is {self.mean:.4f} at {self.at}"
        elif not self.interior:
            said = (
                f"no interior peak: the highest is {self.mean:.4f} at {self.at}, an end ({self.mi:.3f} nats), "
                f"{-self.gap:.4f} above the best point between the ends ({end})"
            )
        elif self.low <= 0:
            said = (
                f"no interior peak that these seeds can tell: the highest is {self.mean:.4f} at {self.at} "
                f"({self.mi:.3f} nats), {self.gap:.4f} above the better end ({end})"
            )
        elif not known:
            said = (
                f"the highest is {self.mean:.4f} at {self.at}, between the ends ({self.mi:.3f} nats), {self.gap:.4f} "
                f"above the better end; whether that is a peak cannot be said ({end})"
            )
        else:
            said = (
                f"interior peak at {self.at}: {self.mean:.4f} at {self.mi:.3f} nats, 95 % interval "
                f"[{self.mi_low:.3f}, {self.mi_high:.3f}], {self.gap:.4f} above the better end ({end})"
            )
        share = f"; {100 * self.share:.0f} % of the resamples peak between the ends" if known else ""
        return f"{self.metric}: {said}{share}"


@dataclass(frozen=True)
class Views:
    """Runs along an axis. points: a label of the axis and its runs, in the axis' order; peaks: one a metric."""

    axis: str
    points: Sequence[tuple[str, list[Finished]]]
    metrics: Sequence[str]
    peaks: Sequence[Peak]
    remarks: Sequence[str]

    @property
    def runs(self) -> list[Finished]:
        return [run for _, runs in self.points for run in runs]

    @property
    def label_entropy(self) -> float | None:
        """log(1 / share of the most frequent class) of the evaluated images, in nats: at most H(Y), and H(Y) itself
        where the classes are equally frequent."""
        shares = {run.numbers.get("chance/knn/top1") for run in self.runs}
        return -math.log(share) if len(shares) == 1 and (share := shares.pop()) else None


def examine(sweeps: Sequence[Path]) -> Views:
    """Reads sweeps of one axis. Raises UserError where their runs cannot be compared, or lack what is compared."""
    from ..sweep.finished import KNN, LINEAR, known, read

    for path in sweeps:
        if path.is_file():
            raise UserError(
                f"{path} is a file: views needs the sweep's folder, whose runs say their model, temperature and data"
            )
    every = [run for path in dict.fromkeys(sweeps) for run in read(path)]
    runs = known(every, MI)
    if not runs:
        criterions = ", ".join(sorted({run.method for run in every}))
        raise UserError(f"{sweeps[0]}: no finished run has {MI}, which contrastive criterions log; got {criterions}")
    _refuse_unlike(runs)
    axis = _axis(runs)
    metrics = [metric for metric in (KNN, LINEAR) if known(runs, metric)]
    if not metrics:
        raise UserError(f"{sweeps[0]}: no run has {KNN} or {LINEAR}; there are none of images without labels")
    order = _order(dict.fromkeys(run.labels[axis] for run in runs))
    points = [(label, [run for run in runs if run.labels[axis] == label]) for label in order]
    if len(points) < 2:
        raise UserError(f"{sweeps[0]}: expected at least 2 points of {axis} with {MI}, got {len(points)}")
    remarks = []
    if len(runs) < len(every):
        remarks.append(
            f"finished runs without a finite {MI}, which are left out: {len(every) - len(runs)} of {len(every)}"
        )
    for run in runs:
        value, ceiling = run.numbers[MI], run.numbers.get(CEILING, math.inf)
        if value < 0:
            remarks.append(f"{run.title}: I_NCE is {value:.4g}, below 0: as a bound it says nothing")
        if value > ceiling:
            remarks.append(f"{run.title}: I_NCE is {value:.4f}, above its ceiling {ceiling:.4f}, which cannot be")
    alone = [label for label, runs in points if len(runs) == 1]
    if alone:
        remarks.append(f"one seed at {'; '.join(alone)}: no interval can be given; repeat the sweep with --seeds 0,1,2")
    return Views(axis, points, metrics, [peak(points, metric) for metric in metrics], remarks)


def _axis(runs: Sequence[Finished]) -> str:
    """The axis that varies. Raises UserError where sweeps have different ones, or not one alone varies."""
    varied = {}
    for path in dict.fromkeys(run.sweep for run in runs):
        inside = [run for run in runs if run.sweep == path]
        varied[path] = tuple(inside[0].labels)
    if len(set(varied.values())) > 1:
        lines = "".join(f"\n  - {path}: {', '.join(names) or 'none'}" for path, names in varied.items())
        raise UserError(f"expected sweeps of one and the same axis, got:{lines}")
    names = [name for name in runs[0].labels if len({run.labels[name] for run in runs}) > 1]
    if len(names) != 1:
        raise UserError(
            f"{runs[0].sweep}: expected one axis that varies, got {', '.join(names) or 'none'}"
            + ("; sweep one at a time, since the points are joined in its order" if names else "")
        )
    return names[0]


def _order(labels: Sequence[str]) -> list[str]:
    """Labels by size where all are numbers, else as they come."""
    try:
        return sorted(labels, key=float)
    except ValueError:
        return list(labels)


def _refuse_unlike(runs: Sequence[Finished]) -> None:
    """Raises UserError, with the runs and the values, where what makes an I_NCE differs between runs."""
    from ..sweep.finished import flat

    def facts(run: Finished) -> dict[str, str]:
        config = flat(run.config)
        wanted = ("model.", "source.name", "source.path", "eval.source", "eval.train_images", "eval.val_images")
        found = {
            key: str(value)
            for key, value in config.items()
            if key.startswith(wanted) or (key.startswith("criterion.") and key.endswith(("name", "temperature")))
        }
        if CEILING in run.numbers:
            found["candidates (exp of held_out/mi_ceiling)"] = f"{math.exp(run.numbers[CEILING]):.0f}"
        else:
            found["batch_size"] = str(config.get("batch_size"))
        return found

    every = [facts(run) for run in runs]
    lines = []
    for key in dict.fromkeys(key for found in every for key in found):
        held: dict[str, list[str]] = {}
        for run, found in zip(runs, every, strict=True):
            held.setdefault(found.get(key, "not there"), []).append(f"{run.sweep}: {run.title}")
        if len(held) > 1:
            more = {value: f" and {len(who) - 1} more" if len(who) > 1 else "" for value, who in held.items()}
            told = [f"{value} ({who[0]}{more[value]})" for value, who in held.items()]
            lines.append(f"\n  - {key}: {', '.join(told)}")
    if lines:
        raise UserError(
            f"I_NCE of these runs cannot be compared: model, temperature, candidates or data differ:{''.join(lines)}"
        )


def peak(points: Sequence[tuple[str, list[Finished]]], metric: str, resamples: int = RESAMPLES, seed: int = 0) -> Peak:
    """The peak of a metric's mean over the points, and its bootstrap: each point's runs are drawn again, independently.

    The ends are the points of the least and of the largest mean I_NCE. Points without the metric are left out.
    """
    import numpy as np

    from ..sweep.finished import known

    have = [(label, known(runs, metric)) for label, runs in points]
    have = [(label, runs) for label, runs in have if runs]
    rng = np.random.default_rng(seed)
    values, draws = [], []
    for _, runs in have:
        pair = np.array([[run.numbers[MI], run.numbers[metric]] for run in runs])  # [seeds, 2]
        values.append(pair.mean(axis=0))
        draws.append(pair[rng.integers(len(runs), size=(resamples, len(runs)))].mean(axis=1))  # [resamples, 2]

    def found(mi: np.ndarray, accuracy: np.ndarray) -> tuple[int, float]:
        """The number of the best point, and how far the best point between the ends is above the better end."""
        ends = np.zeros(len(mi), dtype=bool)
        ends[[mi.argmin(), mi.argmax()]] = True
        gap = math.nan if ends.all() else float(accuracy[~ends].max() - accuracy[ends].max())
        return int(accuracy.argmax()), gap

    means, resampled = np.stack(values), np.stack(draws, axis=1)
    best, gap = found(*means.T)
    low = high = mi_low = mi_high = share = math.nan
    if all(len(runs) > 1 for _, runs in have) and not math.isnan(gap):
        again = [found(*draw.T) for draw in resampled]
        gaps = [g for _, g in again]
        low, high = map(float, np.nanquantile(gaps, (0.025, 0.975)))
        places = [draw[i, 0] for draw, (i, _) in zip(resampled, again, strict=True)]
        mi_low, mi_high = map(float, np.quantile(places, (0.025, 0.975)))
        share = float(np.mean(np.array(gaps) > 0))
    return Peak(metric, have[best][0], *map(float, means[best]), gap > 0, gap, low, high, mi_low, mi_high, share)


def table(views: Views) -> str:
    """A row a run, as CSV: the axis, seed, I_NCE and its ceiling in nats, the accuracies, and the run's folder."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [MI, CEILING, *views.metrics, "untrained/knn/top1"]
    writer.writerow([views.axis, "seed", *columns, "run"])
    for label, runs in views.points:
        writer.writerows([label, run.seed, *(run.numbers.get(name, "") for name in columns), run.place] for run in runs)
    return text.getvalue()


def peaks_table(views: Views) -> str:
    """The peaks as CSV, a row a metric; empty where there is no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(Peak.__dataclass_fields__)
    writer.writerow(names)
    for found in views.peaks:
        values = [getattr(found, name) for name in names]
        writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in values])
    return text.getvalue()


def report(views: Views) -> str:
    """What is printed: a row a point, H(Y), the peaks, and what to be careful about."""
    from ..sweep.finished import known
    from ..sweep.report import Cell

    rows = [[views.axis, "I_NCE, nats", *views.metrics, "n"]]
    for label, runs in views.points:
        cells = [str(Cell.of([run.numbers[name] for run in known(runs, name)])) for name in (MI, *views.metrics)]
        rows.append([label, *cells, str(len(runs))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.append("I_NCE is a lower bound on the views' information: mean ± standard deviation of a run over seeds.")
    ceiling = views.runs[0].numbers.get(CEILING)
    if ceiling is not None:
        lines.append(f"Its ceiling is log(candidates) = {ceiling:.3f} nats.")
    if views.label_entropy is not None:
        lines.append(
            f"H(Y) is at least {views.label_entropy:.3f} nats, log(1 / share of the most frequent class); it is just "
            "that where the classes are equally frequent."
        )
    images = views.runs[0].numbers.get("chance/images")
    if images:
        best = max(found.mean for found in views.peaks)
        lines.append(
            f"An accuracy of {best:.3f} on {images:.0f} images has a standard error of "
            f"{math.sqrt(best * (1 - best) / images):.4f}."
        )
    return "\n".join([*lines, *map(str, views.peaks), *views.remarks]) + "\n"


def draw(views: Views, path: Path) -> None:
    """A panel a metric: mean I_NCE and accuracy joined in the order of the axis, seeds as faint dots, H(Y) dashed."""
    from ..record.figures import BLUE, MUTED, chart, tidy
    from ..sweep.finished import known
    from ..sweep.report import Cell

    figure = chart(5.2 * len(views.metrics), 4.2)
    for place, metric in enumerate(views.metrics):
        panel = figure.add_subplot(1, len(views.metrics), place + 1)
        means = []
        for label, runs in views.points:
            runs = known(runs, metric)
            if not runs:
                continue
            x, y = ([run.numbers[name] for run in runs] for name in (MI, metric))
            if len(runs) > 1:
                panel.plot(x, y, color=BLUE, linestyle="none", marker="o", alpha=0.3, markersize=4, markeredgewidth=0)
            means.append((Cell.of(x).mean, Cell.of(y).mean))
            panel.annotate(label, means[-1], xytext=(4, 5), textcoords="offset points", fontsize=7, color=MUTED)
        panel.plot(*zip(*means, strict=True), color=BLUE, linewidth=1.2, marker="o", markersize=5)
        if views.label_entropy is not None:
            panel.axvline(views.label_entropy, color=MUTED, linewidth=1, linestyle=(0, (5, 3)), label="H(Y), at least")
            panel.legend(fontsize=7, frameon=False, labelcolor=MUTED)
        panel.margins(0.08)
        tidy(panel, f"{metric} over {views.axis}", "held-out I_NCE, nats (a lower bound)", small=True)
        panel.xaxis.get_major_locator().set_params(integer=False)
    figure.savefig(path)

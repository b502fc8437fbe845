"""The information plane of runs: I(X;Z), what the representation keeps of the image, against I(Z;Y), what it says of
the label, from the untrained encoder over the kept checkpoints to the last.

A deterministic encoder's I(X;Z) is infinite, so Z is the feature at length 1 plus noise N(0, sigma^2 I). I(X;Z) of
the n held-out images is an estimate (Monte Carlo, with its standard error), at most log n. I(Z;Y) is a lower bound:
H(Y) less the held-out cross-entropy of a logistic regression on Z. I(v1;v2) is the run's own lower bound on held-out
images, where its criterion has one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plane_points import Point, Trajectory

HELP = "what a run's encoder keeps of the image and of the label, over its checkpoints"
SIGMAS = (0.05, 0.1, 0.2, 0.4)
#: What stands below the tables.
MEANING = """\
nats; I(X;Z): an estimate ± the noise's standard error, at most log n; I(Z;Y): a lower bound ± the standard error over
held-out images, at most H(Y); I(v1;v2): the run's own held-out lower bound, at most its ceiling, without this noise"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs with checkpoint.keep")
    parser.add_argument(
        "--sigma",
        nargs="+",
        type=float,
        default=list(SIGMAS),
        metavar="S",
        help="deviation of the noise in each dimension, where features have length 1 (default: "
        f"{' '.join(map(str, SIGMAS))})",
    )
    parser.add_argument(
        "--images", type=int, default=2000, metavar="N", help="at most so many images of each split (default: 2000)"
    )
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where plane.csv and plane.png go (default, of one run: RUN/info)"
    )


def run(options: argparse.Namespace) -> int:
    from ..evals.progress import track
    from . import plane_figure, plane_points
    from .output import folder_of, make, write_rows

    out = folder_of(options.out, options.runs)
    found = []
    for path in plane_points.paths(options.runs, options.sigma, options.images, options.device, print, track):
        found.append(path)
        print(report(path))
    make(out)
    write_rows(out / "plane.csv", plane_points.COLUMNS, plane_points.rows(found))
    plane_figure.draw(found, options.sigma, out / "plane.png")
    print(MEANING)
    print(f"{out}/plane.csv, plane.png")
    return 0


def report(path: Trajectory) -> str:
    """A run's points as a table, below its limits."""
    label = path.points[0].label
    lines = [
        f"{path.name}: {path.images:,} held-out images; log n = {path.most:.3f}, H(Y) = {label.ceiling:.3f} nats; "
        f"classifiers of {path.train:,} training images",
        f"{'encoder':<12}{'epoch':>6}{'sigma':>7}  {'I(X;Z)':<16}{'I(Z;Y) >=':<18}I(v1;v2) >=",
    ]
    for point in path.points:
        shared, label = point.shared, point.label
        agreed = "" if shared is None else f"{shared.nats:.3f} of {shared.ceiling:.3f}".removesuffix(" of inf")
        line = (
            f"{point.state.name:<12}{point.state.epoch:>6.4g}{point.sigma:>7.3g}  "
            f"{f'{point.kept:.3f} ± {point.error:.3f}':<16}"
            f"{f'{label.nats:.3f} ± {label.error:.3f}':<18}{agreed:<22}"
        )
        lines.append((line + "; ".join(_remarks(point, path.most))).rstrip())
    return "\n".join([*lines, ""])


def _remarks(point: Point, most: float) -> list[str]:
    from .encoders import remark

    named = [("I(X;Z)", point.kept, most), ("I(Z;Y)", point.label.nats, point.label.ceiling)]
    if point.shared is not None:
        named.append(("I(v1;v2)", point.shared.nats, point.shared.ceiling))
    return [f"{name} is {said}" for name, value, ceiling in named if (said := remark(value, ceiling))]

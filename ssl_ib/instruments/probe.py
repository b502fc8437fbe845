"""What of each named factor a run's encoder holds, before training and after: the class, what the source knows of its
images, and what an augmentation changes, such as the place of the crop, the hue or the rotation.

For a factor of the augmentation each image gets one of a few levels by chance. A logistic regression reads the level
off the features; H(F) less its held-out cross-entropy is a lower bound on I(F;Z) in nats, at most H(F). Another
classifier may find more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .probe_readings import Probed

HELP = "what of each factor (class, crop, hue, rotation, ...) a run's encoder holds, before training and after"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--factors",
        nargs="+",
        metavar="F",
        help="some of: class, those of the source, crop_position, crop_size, hue, rotation, brightness, contrast, "
        "blur, flip, grey (default: all)",
    )
    parser.add_argument(
        "--images", type=int, default=2000, metavar="N", help="at most so many images of each split (default: 2000)"
    )
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where probe.csv and probe.png go (default: RUN/info)")


def run(options: argparse.Namespace) -> int:
    from ..evals.progress import track
    from . import probe_figure, probe_readings
    from .output import folder_of, make, write_rows

    out = folder_of(options.out, [options.run_folder])
    found = probe_readings.probe(options.run_folder, options.factors, options.images, options.device, print, track)
    make(out)
    write_rows(out / "probe.csv", probe_readings.COLUMNS, probe_readings.rows(found))
    probe_figure.draw(found, out / "probe.png")
    print(report(found))
    print(f"{out}/probe.csv, probe.png")
    return 0


def report(found: Probed) -> str:
    """A row a factor: before and after in nats with the ceiling, what became of it, and accuracies."""
    from .encoders import remark

    width = max(map(len, found.after)) + 2
    lines = [
        f"{found.name}: {found.images:,} held-out images, classifiers of {found.train:,} training images",
        f"{'factor':<{width}}{'before >=':<16}{'after >=':<16}{'H(F)':<7}{'':<11}{'accuracy before, after, chance'}",
    ]
    for name, after in found.after.items():
        before = found.before.get(name)
        cells = ["" if read is None else f"{read.nats:.3f} ± {read.error:.3f}" for read in (before, after)]
        shares = ["" if read is None else f"{read.accuracy:.3f}" for read in (before, after)]
        said = [
            f"{when} is {remark(read.nats, read.ceiling)}"
            for when, read in (("before", before), ("after", after))
            if read is not None and remark(read.nats, read.ceiling)
        ]
        line = f"{name:<{width}}{cells[0]:<16}{cells[1]:<16}{after.ceiling:<7.3f}{found.verdict(name):<11}"
        line += f"{shares[0]:<7}{shares[1]:<7}{after.chance:<7.3f}{'; '.join(said)}"
        lines.append(line.rstrip())
    lines.append("")
    lines.append("nats: lower bounds on I(F;Z) by a linear classifier, at most H(F), ± the standard error over")
    lines.append("held-out images; gained or dropped: the change is more than two of its errors")
    return "\n".join(lines)

"""The points of information planes: what an encoder keeps of the image and of its label, over a run's checkpoints.

Shapes: n images, D feature dimensions, R draws of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import UserError
from ..info.decoding import Decoded, decode
from ..info.mixture import mixture_information
from ..record.folder import names_of
from ..record.log import read_rows
from .encoders import Encoders, State, distinct, of_state, remark

#: Of the noise, for each image.
DRAWS = 3


@dataclass(frozen=True)
class Shared:
    """I(v1;v2) as the run's criterion found it on held-out images: a lower bound in nats, and the most it can say.

    ceiling: inf where the criterion has none, or an earlier version recorded none.
    """

    nats: float
    ceiling: float


@dataclass(frozen=True)
class Point:
    """An encoder at a time with noise of one width.

    kept, error: I(X;Z), an estimate, and its standard error over the noise, in nats.
    label:       what is read of Y, a lower bound.
    shared:      I(v1;v2), where the run had it at that step.
    """

    state: State
    sigma: float
    kept: float
    error: float
    label: Decoded
    shared: Shared | None


@dataclass(frozen=True)
class Trajectory:
    """A run's points, those of one state after those of the state before; `images` and `train` are numbers of them."""

    name: str
    points: list[Point]
    images: int
    train: int

    @property
    def most(self) -> float:
        """log n: the most that I(X;Z) can be."""
        return math.log(self.images)

    def of(self, sigma: float) -> list[Point]:
        return [point for point in self.points if point.sigma == sigma]


def paths(
    folders: Sequence[Path],
    sigmas: Sequence[float],
    images: int,
    device: str,
    say: Callable[[str], None],
    track: Callable[[Iterable[State], int, str], Iterable[State]],
) -> Iterator[Trajectory]:
    """The points of several runs on the same held-out images, a run after the other.

    images: at most so many of each split. track: called with the states of a run, how many there are and what they
    are; gives them one by one. Raises UserError for what cannot be shown, where possible before anything is encoded.
    """
    for sigma in sigmas:
        if not (sigma > 0 and math.isfinite(sigma)):
            raise UserError(f"--sigma: expected widths of the noise above 0, got {sigma:g}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("expected each run once")
    runs = [Encoders(folder, device) for folder in folders]
    for run in runs:
        run.kept()
    first = None
    for name, run in zip(names_of(folders), runs, strict=True):
        train, val = run.images(images, say)
        if first is not None and val.fingerprint != first:
            raise UserError(
                f"{run.folder} was evaluated on other held-out images than {folders[0]}, so that their planes have "
                "other limits: show them apart"
            )
        first = val.fingerprint
        shared, points = _shared(run), []
        for state in track(run.along(say), len(run.kept()) + 1, f"encoders of {name}"):
            with of_state(run, state):
                known, scored = (unit(run.features(split)) for split in (train, val))
                points += at(state, known, train.labels, scored, val.labels, sigmas, shared.get(state.step))
        yield Trajectory(name, points, len(val), len(train))


def unit(features: Tensor) -> Tensor:
    """Features at length 1: [n, D] -> [n, D]. Raises UserError where they are all the same then."""
    found = normalize(features.double(), dim=1)
    distinct(found)
    return found


def at(
    state: State,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    labels: Tensor,
    sigmas: Sequence[float],
    shared: Shared | None = None,
) -> list[Point]:
    """The points of one encoder, one a width: unit features [n, D] and [m, D] with labels int64 [n] and [m].

    I(X;Z) is of the m held-out images. The classifier is trained on the n others, with noise of their own.
    """
    kept, errors = mixture_information(test, sigmas, DRAWS)
    found = []
    for sigma, value, error in zip(sigmas, kept.tolist(), errors.tolist(), strict=True):
        noisy = [_noisy(rows, sigma, seed) for seed, rows in enumerate((train, test), start=1)]
        label = decode(noisy[0], train_labels, noisy[1], labels, DRAWS)
        found.append(Point(state, sigma, value, error, label, shared))
    return found


def _noisy(rows: Tensor, sigma: float, seed: int) -> Tensor:
    """R blocks of the rows with noise: [m, D] -> [R m, D]. Widths share the draws."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows.repeat(DRAWS, 1)
    return rows + sigma * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)


def _shared(run: Encoders) -> dict[int, Shared]:
    """I(v1;v2) by the step at which the run's held-out criterion gave it: of its numbers the first lower bound."""
    told = ((name, nats) for name, nats in run.run.criterion.nats.items() if nats.kind == "lower bound")
    name, nats = next(told, (None, None))
    file, found = run.folder / "metrics.jsonl", {}
    for row in read_rows(file) if name and file.is_file() else ():
        if isinstance(value := row.get(f"held_out/{name}"), float):
            ceiling = row.get(f"held_out/{nats.ceiling}") if isinstance(nats.ceiling, str) else nats.ceiling
            found[row["step"]] = Shared(value, math.inf if ceiling is None else ceiling)
    return found


#: The columns of plane.csv: a row for each number.
COLUMNS = "run state step epoch sigma quantity kind value error ceiling images draws remark".split()


def rows(found: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """Every number with what it is, for plane.csv.

    I(v1;v2) has no noise, and no error, as the run recorded a mean alone.
    """
    table = []
    for path in found:
        said = set()
        for point in path.points:
            state = {"run": path.name, "state": point.state.name, "step": point.state.step, "epoch": point.state.epoch}
            label = point.label
            numbers = [
                ("I(X;Z)", "estimate", point.kept, point.error, path.most, path.images, DRAWS),
                ("I(Z;Y)", "lower bound", label.nats, label.error, label.ceiling, path.images, DRAWS),
            ]
            for quantity, kind, value, error, ceiling, images, draws in numbers:
                row = dict(state, sigma=point.sigma, quantity=quantity, kind=kind, value=value, error=error)
                row |= {"ceiling": ceiling, "images": images, "draws": draws, "remark": remark(value, ceiling)}
                table.append(row)
            if point.shared is not None and point.state.step not in said:
                said.add(point.state.step)
                row = dict(state, sigma=None, quantity="I(v1;v2)", kind="lower bound", value=point.shared.nats)
                ceiling = point.shared.ceiling if math.isfinite(point.shared.ceiling) else None
                row |= {"error": None, "ceiling": ceiling, "images": None, "draws": None}
                table.append(row | {"remark": remark(point.shared.nats, point.shared.ceiling)})
    return table

"""What of each factor an encoder holds, before training and after: lower bounds in nats, and accuracies.

Shapes: n training images, m held-out images, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..evals.protocol import Split
from ..info.decoding import Decoded, decode, verdict
from ..record.folder import names_of
from ..types import Sample
from .encoders import Encoders, State, distinct, of_state, remark
from .factors import AUGMENTATION, at_levels, chosen, drawn, known


@dataclass(frozen=True)
class Probed:
    """What is read of each factor `before` training, where the first weights can be had, and `after`.

    states: which encoders these are. levels: the number of values of each factor. images, train: how many held-out and
    training images.
    """

    name: str
    before: dict[str, Decoded]
    after: dict[str, Decoded]
    states: dict[str, State]
    levels: dict[str, int]
    images: int
    train: int

    def change(self, factor: str) -> tuple[float, float] | None:
        """After less before in nats, and its error, as if the two were of other images: the true one is smaller."""
        if factor not in self.before:
            return None
        before, after = self.before[factor], self.after[factor]
        return after.nats - before.nats, (before.error**2 + after.error**2) ** 0.5

    def verdict(self, factor: str) -> str:
        """`gained`, `dropped`, or `as before` where the change is within two of its errors."""
        change = self.change(factor)
        return "" if change is None else verdict(*change)


def probe(
    folder: Path,
    factors: list[str] | None,
    images: int,
    device: str,
    say: Callable[[str], None],
    track: Callable[[Iterable[Any], int, str], Iterable[Any]],
) -> Probed:
    """Reads factors off a run's encoder, as it started and as it ended.

    factors: their names, or None for all. images: at most so many of each split. track: called with what is done one by
    one, how many there are, and what they are. Raises UserError for what cannot be read.
    """
    run = Encoders(folder, device)
    train, val = run.images(images, say)
    own = known(train, val)
    names = chosen(factors, own)
    values = {name: own[name] if name in own else _drawn(name, train, val) for name in names}
    for name in names:
        if (why := _unreadable(*values[name])) is None:
            continue
        if factors is not None:
            raise UserError(f"--factors: {name} cannot be read: {why}")
        say(f"{name} is left out: {why}")
        del values[name]
    found: dict[str, dict[str, Decoded]] = {"before": {}, "after": {}}
    states: dict[str, State] = {}

    def todo() -> Iterator[tuple[str, str]]:
        for when in found:
            state = run.first(say) if when == "before" else run.at(run.last)
            if state is not None:
                states[when] = state
                yield from ((when, name) for name in values)

    plain: dict[str, tuple[Tensor, Tensor]] = {}
    for when, name in track(todo(), 2 * len(values), "factors"):
        with of_state(run, states[when]):
            if name in AUGMENTATION:
                pair = zip((train, val), values[name], strict=True)
                read = [_features(run, split, name, levels) for split, levels in pair]
            elif when in plain:
                read = plain[when]
            else:
                read = plain[when] = [run.features(split) for split in (train, val)]
            distinct(read[1])
            found[when][name] = decode(read[0], values[name][0], read[1], values[name][1])
    levels = {name: len(pair[1].unique()) for name, pair in values.items()}
    return Probed(names_of([folder])[0], found["before"], found["after"], states, levels, len(val), len(train))


def _unreadable(train: Tensor, val: Tensor) -> str | None:
    """Why a factor's values, int64 [n] and [m], leave nothing to read; None where they do not."""
    if val.unique().numel() < 2:
        return "the held-out images all have one value of it"
    unseen = sorted(set(val.tolist()) - set(train.tolist()))
    return f"a held-out image has the value {unseen[0]}, and no training image has" if unseen else None


def _drawn(name: str, train: Split, val: Split) -> tuple[Tensor, Tensor]:
    """A level for each image, the same at every call."""
    count, seed = len(AUGMENTATION[name].names), 2 * list(AUGMENTATION).index(name)
    return drawn(len(train), count, seed), drawn(len(val), count, seed + 1)


def _features(run: Encoders, split: Split, name: str, levels: Tensor) -> Tensor:
    """Features of a split's images at levels int64 [n]: [n, D]."""
    begun = 0

    def plain(sample: Sample) -> Tensor:
        nonlocal begun
        part = levels[begun : begun + len(sample)]
        begun += len(sample)
        return at_levels(sample, part, AUGMENTATION[name], run.plain)

    return run.features(split, plain)


#: The columns of probe.csv: a row for each factor and state.
COLUMNS = (
    "run state step epoch factor levels nats kind error ceiling accuracy chance strength images train remark".split()
)


def rows(found: Probed) -> list[dict[str, Any]]:
    """Every number with what it is, for probe.csv."""
    table = []
    for when, readings in (("before", found.before), ("after", found.after)):
        for name, read in readings.items():
            state = found.states[when]
            row = {"run": found.name, "state": state.name, "step": state.step, "epoch": state.epoch, "factor": name}
            row |= {"levels": found.levels[name], "nats": read.nats, "kind": "lower bound", "error": read.error}
            row |= {"ceiling": read.ceiling, "accuracy": read.accuracy, "chance": read.chance}
            row |= {"strength": read.strength, "images": found.images, "train": found.train}
            table.append(row | {"remark": remark(read.nats, read.ceiling)})
    return table

"""The encoder of a finished run as it was at several times, and the images that the run was evaluated on.

Every part of the run is built again from its configuration, so that the encoder has its first weights by the run's
seed; the weights of checkpoints are put in their place. Features are computed in float32.

Shapes: n images, B a batch, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .. import ops
from ..config.config import configure
from ..data.sources.base import stratified
from ..errors import UserError
from ..evals.features import extract
from ..evals.protocol import Settings, Split, open_splits
from ..initialise import initialise
from ..record import checkpoint as checkpoints
from ..record.results import read_results
from ..record.weights import read_file
from ..run import FIRST, build_run
from ..types import Sample

ENCODE_BATCH = 256
#: Unit features that are all nearer than this to each other are the same one.
SAME = 1e-5


@dataclass(frozen=True)
class State:
    """The encoder at a time: `untrained` (`initial` where it started from given weights), or of a checkpoint.

    epoch: 0 for the first; a fraction where a checkpoint is not of an epoch's end.
    """

    name: str
    step: int
    epoch: float


class Encoders:
    """A finished run's encoder at several times.

    folder: of the run. device: auto, cpu, cuda or cuda:N.

    Raises UserError where there is no finished run, and what building its parts raises.
    """

    def __init__(self, folder: Path, device: str = "auto"):
        self.folder = folder
        if not (folder / "config.yaml").is_file():
            raise UserError(f"expected the folder of a run, and there is no config.yaml in {folder}")
        if not (folder / "results.json").is_file():
            raise UserError(
                f"the run in {folder} is not finished (no results.json): finish it with "
                f"ssl-ib-train {folder} --resume --out {folder}"
            )
        #: What the run's results.json holds.
        self.results: dict[str, Any] = read_results(folder)
        config = configure(str(folder / "config.yaml"), [f"device={device}", "precision=fp32", "ops.backend=auto"])
        with torch.random.fork_rng(devices=[]), ops.use_backend("auto"):
            # What views have learned elsewhere is in the checkpoint, as where a run is resumed.
            self.run = build_run(config, resumed=True)
            self._why_not = self._initialise()
        self.run.views.measure(self.run.source)
        self._parts = nn.ModuleDict({"task": self.run.task, "model": self.run.model, "criterion": self.run.criterion})
        self._parts.eval()
        self._first = {name: value.clone() for name, value in self.run.model.state_dict().items()}

    def _initialise(self) -> str | None:
        """Gives the encoder the weights that the run started from; why not, where they cannot be had any more."""
        try:
            initialise(self.run)
        except UserError as error:
            return str(error)
        return None

    @property
    def last(self) -> Path:
        folder = self.folder / "checkpoints"
        return checkpoints.last(folder) or folder / "last.pt"

    def kept(self) -> list[Path]:
        """The checkpoints of epochs, in their order, and the last one. Raises UserError where no epoch's was kept."""
        found = checkpoints.kept(self.folder / "checkpoints")
        if not found:
            raise UserError(
                f"{self.folder} kept no checkpoint of an epoch, so there is no path to show. Train it once more with "
                f"checkpoint.keep=1, which keeps every epoch's: ssl-ib-train {self.folder} checkpoint.keep=1 --out "
                f"{self.folder}_kept"
            )
        return [*found, self.last]

    def first(self, say: Callable[[str], None]) -> State | None:
        """Puts the first weights into the encoder. None where they cannot be had any more, which is said."""
        if self._why_not is not None:
            say(f"{self.folder}: the encoder as it started is left out: {self._why_not}")
            return None
        self._load(self.last)
        self.run.model.load_state_dict(self._first)
        name = next((name for name in FIRST if name in self.results), self.run.first_evaluation)
        return State(name, 0, 0.0)

    def at(self, checkpoint: Path) -> State:
        """Puts a checkpoint's weights into the encoder."""
        step = self._load(checkpoint)
        return State(checkpoint.stem, step, step * self.run.config.epochs / self.results["step"])

    def _load(self, checkpoint: Path) -> int:
        saved = read_file(checkpoint)
        try:
            self._parts.load_state_dict(saved["parts"])
        except (RuntimeError, KeyError, TypeError) as error:
            raise UserError(
                f"{checkpoint} fits the parts no more; has their code changed since the run? {error}"
            ) from None
        return saved["step"]

    def along(self, say: Callable[[str], None]) -> Iterator[State]:
        """The encoder as it started and as it was at each kept checkpoint; its weights are in place at each."""
        kept = self.kept()
        first, step = self.first(say), -1
        if first is not None:
            yield first
        for checkpoint in kept:
            # The last checkpoint of a run is also that of its last epoch.
            state = self.at(checkpoint)
            if state.step > step:
                yield state
            step = state.step

    def images(self, count: int, say: Callable[[str], None]) -> tuple[Split, Split]:
        """The labelled training and held-out images that the run was evaluated on, at most `count` of each.

        Stratified by class. Raises UserError where they are fewer than the classes, or of one class.
        """
        train, val = open_splits(self.run.evaluated, Settings(), False, say)
        classes = int(train.labels.unique().numel())
        if count < classes:
            raise UserError(f"--images: expected as many images as there are classes ({classes}) at least, got {count}")
        train, val = (split.rows(stratified(split.labels, count)) for split in (train, val))
        unseen = [row for row, label in enumerate(val.labels.tolist()) if label not in train.labels]
        if unseen:
            raise UserError(
                f"--images: {count} training images leave out the class {val.name_of(unseen[0])}, which is held out: "
                "raise it"
            )
        if val.labels.unique().numel() < 2:
            raise UserError(
                f"the {len(val)} held-out images of {self.folder} are all of the class {val.name_of(0)}: H(Y) = 0, "
                "and there is nothing to tell apart"
            )
        return train, val

    def plain(self, sample: Sample) -> Tensor:
        """The view that is encoded, [B, ...]."""
        return self.run.views.center(sample)

    def features(self, split: Split, plain: Callable[[Sample], Tensor] | None = None) -> Tensor:
        """Features of a split's images with the weights that are in place: float32 [n, D], on the CPU.

        plain: makes the view that is encoded, where that is another one. Raises UserError where one is not a finite
        number.
        """
        encode, plain = self.run.model.encode, plain or self.plain
        found, _ = extract(encode, split.images, split.index, ENCODE_BATCH, plain, self.run.device)
        bad = int((~found.isfinite().all(dim=1)).sum())
        if bad:
            raise UserError(f"the features of {bad} of {len(found)} images ({split.name}) are not finite numbers")
        return found


@contextmanager
def of_state(encoders: Encoders, state: State) -> Iterator[None]:
    """Says which run and which checkpoint a mistake was found in."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{encoders.folder}, {state.name}: {error}") from None


def distinct(features: Tensor) -> None:
    """Raises UserError where features [n, D] all point the same way: a collapsed encoder holds nothing."""
    unit = normalize(features.double(), dim=1)
    spread = (unit - unit[0]).norm(dim=1).max().item()
    if spread < SAME:
        raise UserError(
            f"the features of all {len(unit)} images point the same way (within {spread:.1g}): the encoder has "
            "collapsed, and holds no information"
        )


def remark(value: float, ceiling: float) -> str:
    """What is to be said of a reading that no information can be."""
    return "below 0" if value < 0 else "above its ceiling" if value > ceiling + 1e-9 else ""

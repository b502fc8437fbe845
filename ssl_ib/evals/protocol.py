"""What a protocol is: a function that takes a job and its settings, and records results.

    @register_protocol("knn")
    def knn(job: Job, settings: KnnSettings) -> None: ...

The settings' class is read from the function's type hints: its fields are the keys of `ssl-ib-eval knn RUN KEY=VALUE`.
A protocol asks the job for what is not finished yet (`todo`), and records one result at a time (`record`), so that a
command that was killed continues with the next one.

Shapes: n images, D feature dimensions, C classes.
"""

from __future__ import annotations

import time
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor

from .. import __version__, distributed
from ..config.config import PartSpec, Section
from ..config.hints import Count, Positive, PositiveInt
from ..config.registry import Registry, build_part
from ..data.sources.base import ImageSet, Source, stratified
from ..errors import UserError
from ..record.artifacts import shown
from ..types import Sample
from .features import extract
from .progress import track
from .results import Results, fingerprint_of, fingerprint_of_images, identity_of
from .subject import Subject


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


def _distinct(values: tuple) -> tuple:
    if not values or len(set(values)) < len(values):
        raise ValueError("values that differ, one at least")
    return values


def several(one: Any, text: str) -> Any:
    """The type of a list of values that differ, one at least, which may stand alone; text: what --describe shows."""
    return Annotated[tuple[one, ...], BeforeValidator(_as_tuple), AfterValidator(_distinct), text]


Positives = several(Positive, "float > 0, or a list of them")
Numbers = several(PositiveInt, "int >= 1, or a list of them")
Seeds = several(Count, "int >= 0, or a list of them")
Files = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), "a file, or a list of them"]

PROTOCOLS: Registry = Registry("protocol", "ssl_ib.evals.protocols", supplied=("job",))
register_protocol = PROTOCOLS.register

#: What a dry run is cut down to.
DRY_IMAGES = 64


class CommonSettings(Section):
    """What every protocol can be told.

    name: which encoder of a run with several. pretrained: with timm:NAME, load timm's weights. encode_batch: images
    encoded at a time. device: auto, cpu, cuda or cuda:N. precision: bf16 computes in bfloat16 where that is safe.
    figures: draw pictures.
    """

    #: Lists, of which each result has one value: the key and what it is called in the result.
    varied: ClassVar[dict[str, str]] = {}

    name: str | None = None
    pretrained: bool = False
    encode_batch: PositiveInt = 256
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    figures: bool = True

    def shareable(self) -> bool:
        """Whether the processes that torchrun starts can do it together.

        `Job.features` and kNN are divided among them. All else each of them does alike, so it must not take long, nor
        write files but by `Job.record` and `Job.figure`.
        """
        return False

    def check(self) -> None:
        """Raises UserError where settings do not fit each other."""

    def open(self, dry: bool, say: Callable[[str], None]) -> tuple[Images, Images]:
        """The training and the held-out images; few of them in a dry run. Raises UserError where they cannot be used.

        say: called with a line for the user, such as how many images are left out.
        """
        raise NotImplementedError


class Settings(CommonSettings):
    """What a protocol on labelled images can be told, besides what every protocol can.

    source: the images (default: those that the run was evaluated on). size: pixels of a side of the images that are
    encoded (default: the encoder's own). train_images, val_images: at most so many labelled images of each split,
    stratified by class.
    """

    source: PartSpec | None = None
    size: PositiveInt | None = None
    train_images: PositiveInt | None = None
    val_images: PositiveInt | None = None

    def open(self, dry: bool, say: Callable[[str], None]) -> tuple[Split, Split]:
        return open_splits(self.source, self, dry, say)


def settings_of(protocol: str) -> type[CommonSettings]:
    """The settings' class of a protocol. Raises UserError where there is no such protocol."""
    return typing.get_type_hints(PROTOCOLS[protocol])["settings"]


class Images(typing.Protocol):
    """What a protocol is trained on or scored on; a protocol's own settings say what it is beyond this.

    fingerprint: changes with the images and with what is known of them.
    facts:       what the heading says of them, such as "10 classes, chance 0.1031".
    """

    fingerprint: str
    facts: str

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Split:
    """Some labelled images of a set.

    index: their numbers in the set, int64 [n].
    """

    name: str
    images: ImageSet
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> Tensor:
        """int64 [n], on the CPU."""
        return self.images.labels[self.index]

    @property
    def classes(self) -> list[str]:
        return self.images.classes

    def rows(self, rows: Tensor) -> Split:
        """The images with the numbers `rows` among these."""
        return replace(self, index=self.index[rows])

    def few(self) -> Split:
        """What a dry run takes of them."""
        return self.rows(stratified(self.labels, DRY_IMAGES))

    def name_of(self, row: int) -> str:
        """The class of one of the images."""
        return self.classes[int(self.labels[row])]

    def spread(self, count: int) -> Tensor:
        """The rows of `count` images spread over the classes, always the same: int64 [at most count]."""
        return shown(self.labels, count)

    @property
    def chance(self) -> float:
        """The accuracy of always naming the most frequent class of these images."""
        labels = self.labels
        return int(labels.bincount().max()) / len(labels)

    @property
    def facts(self) -> str:
        return f"{len(self.classes)} classes, chance {self.chance:.4f}"

    @property
    def fingerprint(self) -> str:
        return fingerprint_of_images(self.images, self.index)


@dataclass
class Job:
    """One command: a protocol on an encoder and images.

    train, val: what the settings' `open` gave: of labelled images, which most methods here are for, a `Split` each.
    home: the folder of the results, from which what other protocols left is read; None where there is none.
    out: where results and pictures go: the same, or None for a dry run, which writes nothing.
    say: called with a line for the user.
    overwrite: whether former results are computed again.
    """

    protocol: str
    settings: CommonSettings
    subject: Subject
    train: Any
    val: Any
    results: Results
    home: Path | None
    out: Path | None
    say: Callable[[str], None] = print
    overwrite: bool = False
    #: What this command was asked for, in that order, by the fingerprints of identities; None: it is not there yet.
    _asked: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    _features: dict[Any, Any] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.weights = self.subject.fingerprint
        self.data = f"{self.train.fingerprint}-{self.val.fingerprint}"

    @property
    def dry(self) -> bool:
        return self.out is None

    @property
    def device(self) -> torch.device:
        return self.subject.device

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)

    @property
    def chance(self) -> float:
        """The accuracy of always naming the most frequent class of the held-out images."""
        return self.val.chance

    def autocast(self) -> torch.autocast:
        """The precision asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def todo(self, variants: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the variants that have no result yet; the results of the others are shown with the new ones.

        A variant holds the values of what `Settings.varied` names.
        """
        missing = []
        for variant in variants:
            identity = identity_of(self.line(variant))
            key = fingerprint_of(identity)
            if self._asked.get(key) is None:
                self._asked[key] = None if self.overwrite else self.results.find(identity)
            if self._asked[key] is None:
                missing.append(variant)
        return missing

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The results of this command in the order in which they were asked for: those found, and those recorded."""
        return [line for line in self._asked.values() if line is not None]

    def record(
        self,
        variant: dict[str, Any],
        metric: str,
        value: float,
        *,
        spread: float | None = None,
        spread_of: str | None = None,
        chance: float | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Adds a result to `evals.jsonl`.

        variant:   as for `todo`.
        spread:    its uncertainty, in the value's unit; spread_of: what it is the spread over.
        chance:    what the value would be without knowing anything.
        more:      further facts of the result, plain data.
        """
        line = {
            **self.line(variant),
            "metric": metric,
            "value": value,
            "spread": spread,
            "spread_of": spread_of,
            "chance": chance,
            **more,
            "seconds": round(time.perf_counter() - self._began, 2),
        }
        self._began = time.perf_counter()
        found = self.results.add(line)
        self._asked[fingerprint_of(identity_of(found))] = found
        return found

    def record_accuracy(self, variant: dict[str, Any], named: Tensor, labels: Tensor, **more: Any) -> dict[str, Any]:
        """`record` of the share of held-out images that are named right, with its binomial standard error.

        named, labels: int64 [m].
        """
        right, count = (named.cpu() == labels.cpu()).double().mean().item(), len(labels)
        error = (right * (1 - right) / count) ** 0.5
        return self.record(
            variant, "top1", right, spread=error, spread_of=f"{count} images", chance=self.chance, **more
        )

    def record_mean(self, variant: dict[str, Any], metric: str, values: list[float], **more: Any) -> None:
        """Adds the mean of results over seeds, and their sample deviation, where it is not there yet."""
        if self.todo([variant]):
            many = torch.tensor(values, dtype=torch.float64)
            spread, spread_of = many.std().item(), f"{len(values)} seeds"
            more |= {"spread": spread, "spread_of": spread_of, "chance": self.chance}
            self.record(variant, metric, many.mean().item(), **more)

    def found(self, variant: dict[str, Any]) -> dict[str, Any]:
        """The finished result of a variant."""
        line = self.results.find(identity_of(self.line(variant)))
        assert line is not None, variant
        return line

    def line(self, variant: dict[str, Any]) -> dict[str, Any]:
        """What `evals.jsonl` says of a result before there is one."""
        settings = self.settings.model_dump(mode="json")
        for key in self.settings.varied:
            settings.pop(key, None)
        return {
            "protocol": self.protocol,
            "encoder": self.subject.where,
            "step": self.subject.step,
            "settings": {**settings, **variant},
            "weights": self.weights,
            "prepared": {key: self.subject.description[key] for key in ("preprocessing", "mean", "std")},
            "data": self.data,
            "images": {"train": len(self.train), "val": len(self.val)},
            "ssl_ib": __version__,
        }

    def features(
        self,
        split: Split,
        encode: Callable[[Tensor], Tensor] | None = None,
        key: Any = None,
        center: Callable[[Sample], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features float32 [n, D] and labels int64 [n] of a split's plain images, on the CPU, computed once.

        encode, center: default: the encoder, and its plain view. key: what tells another encode or center from these;
        None with one of them: the features are not kept. The processes of a group share the batches, and all get all.
        Raises UserError where one is not a finite number: no accuracy would mean anything.
        """
        kept = key is not None or (encode is None and center is None)
        place = (split.name, key, tuple(split.index.tolist())) if kept else None
        if place is not None and place in self._features:
            return self._features[place]
        found = extract(
            encode or self.subject.encode,
            split.images,
            split.index,
            self.settings.encode_batch,
            center or self.subject.plain,
            self.device,
            torch.bfloat16 if self.settings.precision == "bf16" else None,
            lambda batches: track(batches, len(batches), f"features of {len(split):,} images ({split.name})"),
        )
        bad = int((~found[0].isfinite().all(dim=1)).sum())
        if bad:
            raise UserError(f"{self.subject.where}: the features of {bad} images ({split.name}) are not finite numbers")
        if place is not None:
            self._features[place] = found
        return found

    def picture(self, split: Split, row: int) -> Tensor:
        """An image of a split as it is, uint8 [3, H, W]."""
        sample = split.images.gather(split.index[row : row + 1])
        return sample.images[0].cpu()

    def figure(self, name: str) -> Path | None:
        """Where a picture goes; None where none is drawn, as in all processes but the main one."""
        if self.out is None or not self.settings.figures or not distributed.is_main():
            return None
        folder = self.out / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.protocol}_{name}.png"


def open_splits(
    source: dict[str, Any] | Source | None, settings: Settings, dry: bool, say: Callable[[str], None]
) -> tuple[Split, Split]:
    """The labelled training and held-out images of a source, or of what one is built from.

    Raises UserError where they cannot be evaluated on.
    """
    if source is None:
        raise UserError("which images? give source=, such as source=folder source.path=FOLDER")
    built: Source = source if isinstance(source, Source) else build_part("source", source).part
    train, val = built.train(), built.val()
    if val is None or not len(val):
        raise UserError(
            "the source has no held-out images: give a folder with a split val, or hold some out with "
            "source.val_fraction=0.1"
        )
    splits = []
    for name, images, limit in (("train", train, settings.train_images), ("val", val, settings.val_images)):
        labels = images.labels
        wrong = labels[labels >= len(images.classes)]
        if len(wrong):
            raise UserError(
                f"source: {len(wrong)} of {len(labels)} labels of the split {name} are out of range: the source names "
                f"{len(images.classes)} classes, and the largest label is {int(wrong.max())}"
            )
        known = (labels >= 0).nonzero()[:, 0]
        if not len(known):
            notes = "; ".join(built.notes)
            raise UserError(f"source: no image of the split {name} has a label{f' ({notes})' if notes else ''}")
        if len(known) < len(labels):
            say(f"{len(labels) - len(known):,} images of the split {name} have no label and are left out")
        if limit is not None:
            known = known[stratified(labels[known], limit)]
        splits.append(Split(name, images, known))
    if train.classes != val.classes:
        raise UserError(
            f"source: training and held-out images have other classes: {train.classes[:5]} and {val.classes[:5]}"
        )
    _check_classes(*splits, "leave them out" if settings.train_images is None else "raise train_images", say)
    return tuple(split.few() if dry else split for split in splits)


def _check_classes(train: Split, val: Split, advice: str, say: Callable[[str], None]) -> None:
    counts = [split.labels.bincount(minlength=len(split.classes)) for split in (train, val)]
    untrained = ((counts[0] == 0) & (counts[1] > 0)).nonzero()[:, 0].tolist()
    unscored = ((counts[0] > 0) & (counts[1] == 0)).nonzero()[:, 0].tolist()
    if untrained:
        images = sum(int(counts[1][k]) for k in untrained)
        raise UserError(
            f"source: {_some(untrained, train.classes)} of the held-out images {_have(untrained)} no training "
            f"image, so that {images:,} held-out images cannot be named right: {advice}"
        )
    if int((counts[0] > 0).sum()) < 2:
        raise UserError(
            "source: expected training images of two classes at least, got one class: H(Y) = 0, and there is nothing "
            "to tell apart"
        )
    if unscored:
        say(f"{_some(unscored, train.classes)} {_have(unscored)} no held-out image: the accuracy does not count that")


def _have(classes: list[int]) -> str:
    return "has" if len(classes) == 1 else "have"


def _some(numbers: list[int], classes: list[str]) -> str:
    names = ", ".join(classes[k] for k in numbers[:3]) + (", ..." if len(numbers) > 3 else "")
    return f"the class {names}" if len(numbers) == 1 else f"{len(numbers)} classes ({names})"

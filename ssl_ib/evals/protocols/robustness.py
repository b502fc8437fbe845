"""Robustness: the errors on corrupted or otherwise shifted images, of a classifier that was trained on plain ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ... import random
from ...config.hints import Count, PositiveInt
from ...config.outside import user_path
from ...data.decode import image_files, read_image
from ...data.sources.base import ImageSet, InMemory, Streamed, stratified
from ...errors import UserError, nearest
from ...types import Sample
from ..corruptions import ALEXNET, NAMES, SEVERITIES, corrupt, mean_corruption_error
from ..finetune import Recipe, classifier
from ..knn import knn_scores
from ..protocol import DRY_IMAGES, Job, Split, register_protocol, several
from ..results import Results, fingerprint_of, fingerprint_of_weights, identity_of
from .finetune import KEPT
from .linear import LinearSettings, train_heads

#: Keeps what a corruption draws apart from other chance.
_STREAM = -7
#: Settings in which a baseline may differ from what it is compared with.
_OF_ENCODER = ("name", "pretrained", "size", "blocks", "pool", "lr", "classifier_weights")


class RobustnessSettings(LinearSettings):
    """Errors under the 15 corruptions of ImageNet-C at 5 severities, and their mean.

    path: a folder of corrupted images; without one, corruptions are made of the held-out images, at their own size.
    A folder of ImageNet-C holds CORRUPTION/SEVERITY/CLASS/image, one of CIFAR-10-C CORRUPTION.npy and labels.npy, one
    like ImageNet-A CLASS/image, of which the classes are told apart that it has. corruptions, severities: some alone.
    classifier: knn (k neighbours), or linear: one linear layer with the settings of the protocol linear, or finetuned:
    the model that the protocol finetune left with keep=true. baseline: the errors that the mean corruption error (mCE)
    is in proportion to: alexnet (for ImageNet-C), the folder of another encoder's results with the same settings, or
    none, which gives the plain mean. seed: of the corruptions that are made.
    """

    varied: ClassVar = {"corruptions": "corruption", "baseline": "baseline"}

    path: str | None = None
    corruptions: several(str, "a corruption's name, or a list of them") = NAMES
    severities: several(Literal[1, 2, 3, 4, 5], "1 | 2 | 3 | 4 | 5, or a list of them") = SEVERITIES
    classifier: Literal["knn", "linear", "finetuned"] = "knn"
    k: PositiveInt = 20
    baseline: str = "none"
    seed: Count = 0

    def shareable(self) -> bool:
        return self.classifier != "linear" or super().shareable()

    def check(self) -> None:
        super().check()
        unknown = [name for name in self.corruptions if name not in NAMES]
        if unknown:
            raise UserError(f"corruptions: unknown corruption {unknown[0]!r}{nearest(unknown[0], NAMES)}")
        if len(self.lr) > 1 or len(self.seeds) > 1:
            raise UserError("robustness takes one lr and one of seeds: find the rate with the protocol linear")


#: The scores [n, C] and the labels [n] of a split, given how a sample becomes views (None: as it always does).
Scores = Callable[[Split, Callable[[Sample], Tensor] | None], tuple[Tensor, Tensor]]


@register_protocol("robustness")
def robustness(job: Job, settings: RobustnessSettings) -> None:
    """Errors on corrupted images, made on the fly or in folders like ImageNet-C's, and their mean (mCE)."""
    base = {"classifier_weights": _fingerprint(job, settings)}
    scores = cache(lambda: _classifier(job, settings))
    lines: dict[str, dict[str, Any]] = {}
    for name, parts in _sets(job, settings):
        variant = {**base, "corruption": name}
        if settings.path is not None:
            variant["corrupted"] = fingerprint_of([part.split.fingerprint for part in parts])
        if job.todo([variant]):
            errors = [_error(scores(), part) for part in parts]
            # The severities are of the same images, so that they do not make the mean more certain.
            mean, count = fmean(errors), len(parts[0].split)
            spread = (mean * (1 - mean) / count) ** 0.5
            chance = 1 - max(part.chance for part in parts)
            job.record(variant, "error", mean, spread=spread, spread_of=f"{count} images", chance=chance, errors=errors)
        lines[name] = job.found(variant)
    errors = {name: line["errors"] for name, line in lines.items() if name in NAMES}
    if not errors:
        return
    variant = {**base, "corruption": "mean of " + ("all" if set(errors) == set(NAMES) else ",".join(errors))}
    variant["errors"] = fingerprint_of(errors)
    if job.todo([variant]):
        mean = fmean(fmean(values) for values in errors.values())
        job.record(variant, "mean error", mean, chance=1 - job.chance)
    if settings.baseline != "none":
        baseline = _baseline(settings, {name: lines[name] for name in errors})
        variant |= {"baseline": settings.baseline, "baseline_errors": fingerprint_of(baseline)}
        if job.todo([variant]):
            job.record(variant, "mCE in %", mean_corruption_error(errors, baseline))


@dataclass(frozen=True)
class _Shifted:
    """Images of one corruption at one severity.

    center: how their view is made; None: as it is always made. classes: the numbers of those that are told apart, among
    those of the training images; None: all.
    """

    split: Split
    center: Callable[[Sample], Tensor] | None = None
    classes: Tensor | None = None

    @property
    def chance(self) -> float:
        labels = self.split.labels
        return int(labels.bincount().max()) / len(labels)


def _error(score: Scores, part: _Shifted) -> float:
    scores, labels = score(part.split, part.center)
    if part.classes is not None:
        left_out = torch.ones(scores.shape[1], dtype=torch.bool)
        left_out[part.classes] = False
        scores = scores.masked_fill(left_out, -torch.inf)
    return (scores.argmax(dim=1) != labels).double().mean().item()


def _classifier(job: Job, settings: RobustnessSettings) -> Scores:
    """What gives the scores of images, trained on the plain training images."""
    if settings.classifier == "finetuned":
        model, _ = _finetuned(job)
        return lambda split, center: job.features(split, lambda x: job.subject.call(model, x), center=center)
    if settings.classifier == "knn":
        train, labels = (x.to(job.device) for x in job.features(job.train))

        def nearest_classes(split: Split, center: Any) -> tuple[Tensor, Tensor]:
            test, truth = job.features(split, job.subject.encode, center=center)
            return knn_scores(train, labels, test.to(job.device), settings.k, job.num_classes), truth

        return nearest_classes
    encode, key = job.subject.blocks(settings.blocks, settings.pool), (settings.blocks, settings.pool)
    width = job.features(job.val, encode, key)[0].shape[1]
    heads = train_heads(job, settings, torch.arange(len(job.train)), encode, key, width, settings.seeds[0])
    if not bool(heads.finite.all()):
        raise UserError(f"lr={settings.lr[0]:g} is too high: the weights of the linear layer are no longer finite")

    def linear(split: Split, center: Any) -> tuple[Tensor, Tensor]:
        test, truth = job.features(split, encode, center=center)
        return torch.cat([heads.scores(part.to(job.device))[0].cpu() for part in test.split(4096)]), truth

    return linear


def _finetuned(job: Job) -> tuple[nn.Module, str]:
    """The model that the protocol finetune left, and its fingerprint."""
    file = (job.home or Path()) / KEPT
    if not file.is_file():
        raise UserError(
            f"classifier=finetuned: there is no {file}: run the protocol finetune with keep=true first, and with "
            "--overwrite where that was done before"
        )
    kept = torch.load(file, map_location="cpu", weights_only=True)
    if kept["weights"] != job.weights or kept["classes"] != job.train.classes:
        raise UserError(f"classifier=finetuned: {file} is of another encoder, or of other classes")
    model = classifier(job, Recipe(**kept["recipe"]), 0)
    model.load_state_dict(kept["model"])
    return model.eval(), fingerprint_of_weights(model)


def _fingerprint(job: Job, settings: RobustnessSettings) -> str | None:
    return _finetuned(job)[1] if settings.classifier == "finetuned" else None


def _baseline(settings: RobustnessSettings, lines: dict[str, dict[str, Any]]) -> dict[str, Sequence[float]]:
    """The errors that those of `lines`, results by corruption, are in proportion to; without those it does not have."""
    if settings.baseline == "alexnet":
        return {name: [ALEXNET[name]] * len(settings.severities) for name in lines}
    path = Path(settings.baseline)
    file = path / "evals.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"baseline: expected alexnet, none, or a folder with evals.jsonl, and there is no {file}")
    found = {}
    for former in Results(file).lines:
        for name, line in lines.items():
            if _besides_encoder(former) == _besides_encoder(line):
                found[name] = former["errors"]
    return found


def _besides_encoder(line: dict[str, Any]) -> list[Any]:
    """What two results have in common that differ in their encoders alone."""
    settings = {key: value for key, value in line["settings"].items() if key not in _OF_ENCODER}
    identity = identity_of({**line, "settings": settings})
    return [identity[key] for key in ("protocol", "settings", "data")]


def _sets(job: Job, settings: RobustnessSettings) -> Iterator[tuple[str, list[_Shifted]]]:
    """The images of each corruption, a part a severity; those that are not corrupted first, where they are known."""
    if settings.path is None:
        yield "none", [_Shifted(job.val)]
        for name in settings.corruptions:
            yield name, [_Shifted(job.val, _corrupted(job, settings, name, s)) for s in settings.severities]
        return
    root = user_path(settings.path, "path")
    if not root.is_dir():
        raise UserError(f"path: expected a folder of corrupted images, and there is none at {root}")
    arrays = (root / "labels.npy").is_file()
    places = {name: _place(root, name) for name in settings.corruptions}
    there = {name: place for name, place in places.items() if place is not None}
    if not arrays and not there:
        yield root.name, [_of_folder(job, settings, root, some=True)]
        return
    missing = [name for name, place in places.items() if place is None]
    if missing:
        raise UserError(f"path: {root} has no {', '.join(missing)}: say which to take, with corruptions=")
    for name, place in there.items():
        if arrays:
            yield name, [_of_array(job, settings, root, place, s) for s in settings.severities]
        else:
            yield name, [_of_folder(job, settings, place / str(s), some=False) for s in settings.severities]


def _place(root: Path, name: str) -> Path | None:
    """Where a corruption lies: NAME.npy, NAME, or GROUP/NAME, as in the published archives."""
    found = [root / f"{name}.npy", root / name, *sorted(root.glob(f"*/{name}"))]
    return next((path for path in found if path.exists()), None)


def _corrupted(job: Job, settings: RobustnessSettings, name: str, severity: int) -> Callable[[Sample], Tensor]:
    def center(sample: Sample) -> Tensor:
        keys = random.image_keys(settings.seed, severity, sample.index, _STREAM)
        sizes, images = sample.extra.get("size"), sample.images
        if sizes is None:
            return job.subject.plain(Sample.unlabelled(corrupt(images, name, severity, keys)))
        views = []
        for image, key, (h, w) in zip(images, keys.split(1), sizes.tolist(), strict=True):
            views.append(job.subject.plain(Sample.unlabelled(corrupt(image[None, :, :h, :w], name, severity, key))))
        return torch.cat(views)

    return center


def _limited(job: Job, settings: RobustnessSettings, name: str, images: ImageSet, index: Tensor) -> Split:
    limit = DRY_IMAGES if job.dry else settings.val_images
    return Split(name, images, index if limit is None else index[stratified(images.labels[index], limit)])


def _of_array(job: Job, settings: RobustnessSettings, root: Path, file: Path, severity: int) -> _Shifted:
    """A severity of a file of CIFAR-10-C: the five follow one another, each with the labels of the test set."""
    try:
        images, labels = np.load(file, mmap_mode="r"), np.load(root / "labels.npy")
    except (OSError, ValueError) as error:
        raise UserError(f"path: cannot read {file} or labels.npy beside it: {error}") from None
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) % len(SEVERITIES):
        raise UserError(f"path: expected uint8 images [5 n, H, W, 3] in {file}, got {images.dtype} {images.shape}")
    count = len(images) // len(SEVERITIES)
    rows = slice((severity - 1) * count, severity * count)
    truth = torch.from_numpy(labels[rows if len(labels) == len(images) else slice(0, count)].astype(np.int64))
    if len(truth) != count or int(truth.max()) >= job.num_classes or int(truth.min()) < 0:
        raise UserError(
            f"path: expected {count} labels from 0 to {job.num_classes - 1} in {root / 'labels.npy'}, got {len(truth)} "
            f"from {int(truth.min())} to {int(truth.max())}"
        )
    held = InMemory(torch.from_numpy(np.array(images[rows])).permute(0, 3, 1, 2), truth, job.train.classes)
    return _Shifted(_limited(job, settings, f"{file.stem} {severity}", held, torch.arange(count)))


def _of_folder(job: Job, settings: RobustnessSettings, root: Path, some: bool) -> _Shifted:
    """Images in a folder of each class. some: whether classes may be missing, which are then not told apart from."""
    if not root.is_dir():
        raise UserError(f"path: expected a folder of images, and there is none at {root}")
    names = sorted(image_files(root))
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    known = {name: number for number, name in enumerate(job.train.classes)}
    strange = [name for name in classes if name not in known]
    if not classes or strange:
        what = f"such as {strange[0]!r}, which is no class of the training images" if strange else "and there is none"
        raise UserError(f"path: expected a folder for each class in {root}, {what}")
    missing = len(known) - len(classes)
    if missing and not some:
        job.say(f"{root}: {missing} of {len(known)} classes have no images there")
    names = [name for name in names if "/" in name]
    labels = torch.tensor([known[name.split("/")[0]] for name in names])
    max_side = job.subject.max_side or 512
    images = Streamed(_Reader(root), names, labels, job.train.classes, max_side)
    split = _limited(job, settings, str(root), images, torch.arange(len(names)))
    numbers = torch.tensor([known[name] for name in classes])
    return _Shifted(split, classes=numbers if some and missing else None)


@dataclass(frozen=True)
class _Reader:
    root: Path

    def __call__(self, name: str) -> bytes:
        return read_image(Path(os.path.join(self.root, name)))

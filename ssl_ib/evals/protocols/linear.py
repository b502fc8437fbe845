"""The linear probe in the papers' forms, with a sweep of learning rates in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ... import random
from ...config.hints import NonNegative, Positive, PositiveInt, Ratio
from ...data.sources.base import stratified
from ...errors import UserError
from ...record import eval_figures
from ...types import Sample
from ..heads import Heads, Shape, Training, fit
from ..progress import track
from ..protocol import Job, Positives, Seeds, Settings, Split, register_protocol
from ..subject import Pool

#: The papers' probes. Rates of `lr_scale: linear` are per 256 images.
FORMS: dict[str, dict[str, Any]] = {
    # He et al., CVPR 2022, appendix A.1.
    "mae": {
        "optimiser": "lars",
        "lr": [0.1],
        "lr_scale": "linear",
        "batch_size": 16384,
        "epochs": 90,
        "warmup_epochs": 10.0,
        "batch_norm": True,
        "interpolation": "bicubic",
    },
    # Chen, Xie and He, ICCV 2021, and their code; the rate for a vision transformer.
    "moco_v3": {"lr": [3.0], "lr_scale": "linear", "batch_size": 1024, "epochs": 90, "shape": "cosine_by_epoch"},
    "moco_v3_resnet": {"lr": [0.1], "lr_scale": "linear", "batch_size": 1024, "epochs": 90, "shape": "cosine_by_epoch"},
    # Tian et al., NeurIPS 2020.
    "infomin": {
        "lr": [30.0],
        "batch_size": 256,
        "epochs": 60,
        "shape": "step",
        "milestones": [30.0, 40.0, 50.0],
        "gamma": 0.2,
        "crop": [0.2, 1.0],
    },
    # Caron et al., ICCV 2021, and their code, for ViT-S.
    "dino": {
        "lr": [0.001],
        "lr_scale": "linear",
        "batch_size": 1024,
        "epochs": 100,
        "shape": "cosine_by_epoch",
        "blocks": 4,
        "pool": "cls",
    },
    "mrcl": {"lr": [0.2], "batch_size": 1024, "epochs": 100},
    # The rate for a vision transformer, and for a ResNet.
    "svib": {"lr": [0.001], "batch_size": 1024, "epochs": 100},
    "svib_resnet": {"lr": [0.3], "batch_size": 1024, "epochs": 100},
}


class LinearSettings(Settings):
    """One linear layer on frozen features. `form` sets all that follows; what is given besides stands in its place.

    form: mae, moco_v3, moco_v3_resnet, infomin, dino, mrcl, svib or svib_resnet, after the papers. augment: train on
    augmented images, as the papers do, in place of features that are computed once; crop is the range of a crop's share
    of the image, and flips are made half the time.
    lr: the rate, or a list of rates that are trained in one pass, each a result; lr_scale=linear multiplies it by
    batch_size / 256, with the number of training images where that is smaller. choose: with several rates, the share of
    the training images that is kept out of the training, to choose the rate by; 0 chooses by the held-out images
    themselves, which flatters. seeds: of the layer's start and of the order of images; several give mean and deviation.
    optimiser, epochs, warmup_epochs, shape, milestones, gamma, momentum, weight_decay, batch_norm: --describe shows
    their types; shape is the course of the rate. blocks, pool: the features are the class tokens (cls) or the means of
    the patches (mean) of the last blocks of a vision transformer; own: as the encoder pools.
    """

    varied: ClassVar = {"lr": "lr", "seeds": "seed", "choose": "choose"}

    form: Literal[tuple(FORMS)] = "mrcl"  # type: ignore[valid-type]
    augment: bool = False
    crop: tuple[Positive, Positive] = (0.08, 1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    optimiser: Literal["sgd", "lars"] = "sgd"
    lr: Positives = (0.2,)
    lr_scale: Literal["raw", "linear"] = "raw"
    choose: Ratio = 0.1
    batch_size: PositiveInt = 1024
    epochs: PositiveInt = 100
    warmup_epochs: NonNegative = 0.0
    shape: Shape = "cosine"
    milestones: tuple[NonNegative, ...] = ()
    gamma: Positive = 0.1
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 0.0
    batch_norm: bool = False
    blocks: PositiveInt = 1
    pool: Pool = "own"
    seeds: Seeds = (0,)

    @classmethod
    def fill(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The values of the form."""
        form = given.get("form", "mrcl")
        return FORMS[form] if form in tuple(FORMS) else {}

    def check(self) -> None:
        check_training(self)

    def shareable(self) -> bool:
        return not self.augment

    def training(self) -> Training:
        """How the heads are trained."""
        keys = ("optimiser", "epochs", "warmup_epochs", "shape", "milestones", "gamma", "momentum", "weight_decay")
        return Training(**{key: getattr(self, key) for key in keys}, batch_norm=self.batch_norm)


def check_training(settings: Any) -> None:
    """Raises UserError where crop, warmup_epochs, epochs, shape and milestones of settings do not fit each other."""
    if not 0 < settings.crop[0] <= settings.crop[1] <= 1:
        raise UserError(f"crop: expected 0 < low <= high <= 1, got {list(settings.crop)}")
    if settings.warmup_epochs >= settings.epochs:
        raise UserError(f"warmup_epochs: expected fewer than epochs={settings.epochs}, got {settings.warmup_epochs:g}")
    if (settings.shape == "step") != bool(settings.milestones):
        raise UserError("milestones: the epochs at which shape=step lowers the rate, and none with another shape")


@register_protocol("linear")
def linear(job: Job, settings: LinearSettings) -> None:
    """Top-1 accuracy of one linear layer, trained as the papers train it."""
    sweep = len(settings.lr) > 1
    choose = settings.choose if sweep else 0.0
    chosen = []
    for seed in settings.seeds:
        variants = [{"lr": lr, "seed": seed, "choose": choose} for lr in settings.lr]
        variants += [{"lr": list(settings.lr), "seed": seed, "choose": choose}] if sweep else []
        if job.todo(variants):
            _train(job, settings, variants, seed, choose)
        chosen.append(job.found(variants[-1])["value"])
    if len(chosen) > 1:
        lr = list(settings.lr) if sweep else settings.lr[0]
        job.record_mean({"lr": lr, "seed": list(settings.seeds), "choose": choose}, "top1", chosen)


def _train(job: Job, settings: LinearSettings, variants: list[dict[str, Any]], seed: int, choose: float) -> None:
    """Trains a head for each rate, and records them and the chosen one."""
    encode = job.subject.blocks(settings.blocks, settings.pool)
    key = (settings.blocks, settings.pool)
    test, labels = job.features(job.val, encode, key)
    train, judges = split_off(job.train, choose, seed)
    heads = train_heads(job, settings, train, encode, key, test.shape[1], seed)
    named, finite = heads.named(test), heads.finite
    scores = (named == labels).double().mean(dim=1)
    for variant, classes, ok in zip(variants, named, finite.tolist(), strict=False):
        if not ok:
            job.say(f"lr={variant['lr']:g} is too high: the weights are no longer finite")
        if variant in job.todo([variant]):
            job.record_accuracy(variant, classes, labels, diverged=not ok)
    best = 0
    if len(settings.lr) > 1:
        kept, kept_labels = (test, labels) if judges is None else job.features(judges, encode, (*key, "choose", seed))
        merits = scores if judges is None else (heads.named(kept) == kept_labels).double().mean(dim=1)
        best = int(merits.where(finite, -1.0).argmax())
        by = "the held-out images themselves" if judges is None else f"{len(judges)} training images kept out"
        job.record_accuracy(variants[-1], named[best], labels, chosen_lr=settings.lr[best], chosen_by=by)
    if path := job.figure("confusion"):
        eval_figures.confusion(labels, named[best], job.val.classes, path, f"linear probe, {settings.form}")


def split_off(train: Split, share: float, seed: int) -> tuple[Split, Split | None]:
    """The training images without a share of them, stratified by class, and that share (None where it is empty)."""
    order = random.shuffled(seed, -1, len(train))
    rows = order[stratified(train.labels[order], round(share * len(train)))] if share else order[:0]
    if not len(rows):
        return train, None
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[rows] = False
    return train.rows(kept.nonzero()[:, 0]), train.rows(rows.sort().values)


def train_heads(
    job: Job,
    settings: LinearSettings,
    train: Split,
    encode: Callable[[Tensor], Tensor],
    key: Any,
    width: int,
    seed: int,
) -> Heads:
    """A trained head for each of the settings' rates, on features of `train`, computed once or augmented anew."""
    batch = min(settings.batch_size, len(train))
    # Batches of equal size but for one: a last one of a few images would spoil a batch norm.
    steps = -(-len(train) // batch)
    scale = batch / 256 if settings.lr_scale == "linear" else 1.0
    training, device = settings.training(), job.device
    heads = Heads(width, job.num_classes, [lr * scale for lr in settings.lr], training, seed, device)
    batches = (_augmented if settings.augment else _cached)(job, settings, train, encode, key, steps, seed)
    epochs = range(2 if job.dry else settings.epochs)
    what = f"linear probe, {len(settings.lr)} learning rate{'s' * (len(settings.lr) > 1)}"
    fit(heads, batches, steps, track(epochs, len(epochs), f"{what}, epochs"))
    return heads


def _cached(
    job: Job, settings: LinearSettings, train: Split, encode: Callable, key: Any, steps: int, seed: int
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    features, labels = (x.to(job.device) for x in job.features(train, encode, key))
    job.check_finite(features)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = random.shuffled(seed, epoch, len(features)).to(features.device)
        return ((features[rows], labels[rows]) for rows in order.tensor_split(steps))

    return batches


def _augmented(
    job: Job, settings: LinearSettings, train: Split, encode: Callable, key: Any, steps: int, seed: int
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    views = job.subject.crops(scale=settings.crop, flip=0.5, interpolation=settings.interpolation)

    @torch.no_grad()
    def encoded(sample: Sample, epoch: int) -> Tensor:
        keys = random.image_keys(seed, epoch, sample.index)
        with job.autocast():
            return encode(views.draw(sample.to(job.device), [keys])[0]).flatten(1).float()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = random.shuffled(seed, epoch, len(train))
        for rows in order.tensor_split(steps):
            parts = [train.images.gather(part) for part in train.index[rows].split(settings.encode_batch)]
            labels = torch.cat([part.label for part in parts]).to(job.device)
            yield torch.cat([encoded(part, epoch) for part in parts]), labels

    return batches

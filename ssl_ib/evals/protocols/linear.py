"""The linear probe in the papers' forms, with a sweep of learning rates in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ... import random
from ...config.hints import NonNegative, Positive, PositiveInt, Ratio
from ...data.sources.base import stratified
from ...errors import UserError
from ...record import eval_figures
from ...types import Sample
from .. import unfinished
from ..heads import Heads, Shape, Training
from ..progress import track
from ..protocol import Job, Positives, Seeds, Settings, register_protocol
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
    optimiser, epochs, warmup_epochs, momentum, weight_decay, batch_norm: of the training. shape: the course of the rate
    after the warm-up: step multiplies it by gamma at each of the epochs milestones. blocks, pool: the features are the
    class tokens (cls) or the means of the patches (mean) of the last blocks of a vision transformer; own: as the
    encoder pools.
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
        return FORMS.get(str(given.get("form", "mrcl")), {})

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
    rows, judges = split_off(job.train.labels, choose, seed)
    saved = unfinished.place(job, variants[-1])
    heads = train_heads(job, settings, rows, encode, key, test.shape[1], seed, saved)
    named, finite = heads.named(test), heads.finite
    scores = (named == labels).double().mean(dim=1)
    for variant, classes, ok in zip(variants, named, finite.tolist(), strict=False):
        if not ok:
            job.say(f"lr={variant['lr']:g} is too high: the weights are no longer finite")
        if variant in job.todo([variant]):
            job.record_accuracy(variant, classes, labels, diverged=not ok)
    best = 0
    if len(settings.lr) > 1:
        merits, by = scores, "the held-out images themselves"
        if len(judges):
            kept, kept_labels = (x[judges] for x in job.features(job.train, encode, key))
            merits = (heads.named(kept) == kept_labels).double().mean(dim=1)
            by = f"{len(judges)} training images kept out"
        best = int(merits.where(finite, -1.0).argmax())
        more = {"chosen_lr": settings.lr[best], "chosen_by": by, "diverged": not finite[best].item()}
        job.record_accuracy(variants[-1], named[best], labels, **more)
    unfinished.forget(saved)
    if path := job.figure("confusion"):
        eval_figures.confusion(labels, named[best], job.val.classes, path, f"linear probe, {settings.form}")


def split_off(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rows of images without a share of them, stratified by class, and those of that share: int64, ascending."""
    order, count = random.shuffled(seed, -1, len(labels)), round(share * len(labels))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    if count:
        chosen[order[stratified(labels[order], count)]] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def train_heads(
    job: Job,
    settings: LinearSettings,
    rows: Tensor,
    encode: Callable[[Tensor], Tensor],
    key: Any,
    width: int,
    seed: int,
    saved: Path | None = None,
) -> Heads:
    """A trained head for each of the settings' rates, on features that are computed once, or augmented anew.

    rows: int64 [n], which of the training images. encode, key: as for `Job.features`. width: of a feature. saved: as
    for `finetune`, where images are augmented, which takes long.
    """
    batch = min(settings.batch_size, len(rows))
    # Batches of equal size but for one: a last one of a few images would spoil a batch norm.
    steps = -(-len(rows) // batch)
    scale = batch / 256 if settings.lr_scale == "linear" else 1.0
    rates = [lr * scale for lr in settings.lr]
    heads = Heads(width, job.num_classes, rates, settings.training(), seed, job.device)
    batches = _augmented(job, settings, rows, encode, seed) if settings.augment else _cached(job, rows, encode, key)
    epochs = 2 if job.dry else settings.epochs
    state = unfinished.load(saved)
    first = 0 if state is None else state["epoch"]
    if state is not None:
        heads.load_state_dict(state["heads"])

    def all_batches() -> Iterator[tuple[int, int, Tensor, Tensor]]:
        for epoch in range(first, epochs):
            order = random.shuffled(seed, epoch, len(rows)).tensor_split(steps)
            for number, batch in enumerate(batches(epoch, order)):
                yield epoch, number, *batch

    what = f"linear probe, {len(rates)} learning rate{'s' * (len(rates) > 1)}, steps"
    for epoch, number, features, labels in track(all_batches(), epochs * steps, what, first * steps):
        heads.step(features, labels, epoch + number / steps)
        if settings.augment and number == steps - 1 and epoch + 1 < epochs:
            unfinished.save(saved, {"epoch": epoch + 1, "heads": heads.state_dict()})
    return heads


#: From an epoch's number and the rows of each batch to its features [B, D] and labels [B], on the job's device.
Batches = Callable[[int, Sequence[Tensor]], Iterator[tuple[Tensor, Tensor]]]


def _cached(job: Job, rows: Tensor, encode: Callable, key: Any) -> Batches:
    features, labels = (x.to(job.device) for x in job.features(job.train, encode, key))

    def batches(epoch: int, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        # The rows of rows: a copy of the features could be too much for the memory.
        return ((features[which], labels[which]) for which in (rows[some].to(job.device) for some in order))

    return batches


def _augmented(job: Job, settings: LinearSettings, rows: Tensor, encode: Callable, seed: int) -> Batches:
    views = job.subject.crops(scale=settings.crop, flip=0.5, interpolation=settings.interpolation)
    train = job.train.rows(rows)

    @torch.no_grad()
    def encoded(sample: Sample, epoch: int) -> Tensor:
        keys = random.image_keys(seed, epoch, sample.index)
        with job.autocast():
            return encode(views.draw(sample.to(job.device), [keys])[0]).flatten(1).float()

    def batches(epoch: int, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for some in order:
            parts = [train.images.gather(part) for part in train.index[some].split(settings.encode_batch)]
            labels = torch.cat([part.label for part in parts]).to(job.device)
            yield torch.cat([encoded(part, epoch) for part in parts]), labels

    return batches

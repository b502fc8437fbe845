"""Few labels: a probe or fine-tuning on a small part of the training images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch

from ... import random
from ...config.hints import Positive, PositiveInt
from ...data.sources.base import stratified
from ...errors import UserError
from .. import unfinished
from ..finetune import finetune, named
from ..protocol import Files, Job, Seeds, Split, register_protocol
from .finetune import FinetuneSettings
from .logistic import fit_logistic

#: Caron et al., NeurIPS 2020 (SwAV's eval_semisup.py): the rates of the encoder and of its classifier, by the share.
SWAV: dict[str, Any] = {
    "optimiser": "sgd",
    "epochs": 20,
    "batch_size": 256,
    "lr_scale": "raw",
    "min_lr": 0.0,
    "warmup_epochs": 0.0,
    "shape": "step",
    "milestones": [12.0, 16.0],
    "gamma": 0.2,
    "weight_decay": 0.0,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "rand_augment": None,
    "erasing": 0.0,
    "smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "pool": "own",
}
_FEW, _MORE = {"lr": 0.02, "head_lr": 5.0}, {"lr": 0.01, "head_lr": 0.2}
#: The largest share that has the rates for 1 %.
_MOST = 0.05


class LowshotSettings(FinetuneSettings):
    """Training on a few labelled images: a share of each class (fraction), so many of each class (shots), or those that
    files name (lists). One of the three is given; the default is one per cent.

    method: probe is scikit-learn's logistic regression on frozen features (c: its inverse penalty); finetune trains the
    encoder too, with SwAV's rates, which are those for 1 % up to a fraction of 5 %, for shots and for lists, and those
    for 10 % above (the other settings are those of the protocol finetune; form=mae gives its defaults). lists: files
    with an image's name in each line, as published; each is one draw. seeds: each draws other images; the result is
    the mean over them.
    """

    varied: ClassVar = {"seeds": "seed"}

    fraction: Positive | None = None
    shots: PositiveInt | None = None
    lists: Files = ()
    method: Literal["probe", "finetune"] = "probe"
    form: Literal["swav", "mae"] = "swav"
    c: Positive = 1.0
    seeds: Seeds = (0, 1, 2, 3, 4)

    def check(self) -> None:
        super().check()
        given = [key for key in ("fraction", "shots", "lists") if getattr(self, key)]
        if len(given) != 1:
            raise UserError(f"expected one of fraction, shots and lists, got {', '.join(given) or 'none'}")
        if self.fraction is not None and self.fraction > 1:
            raise UserError(f"fraction: expected a share of the training images in (0, 1], got {self.fraction:g}")

    def open(self, dry: bool, say: Callable[[str], None]) -> tuple[Split, Split]:
        # Also a dry run draws from all training images, of which few might be too few.
        train, val = super().open(False, say)
        return train, val.few() if dry else val

    @classmethod
    def fill(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The default share, and SwAV's rates."""
        data: dict[str, Any] = {}
        if not (given.get("fraction") or given.get("shots") or given.get("lists")):
            data["fraction"] = 0.01
        if given.get("form", "swav") == "swav":
            share = given.get("fraction", data.get("fraction"))
            few = not isinstance(share, int | float) or share <= _MOST
            data |= SWAV | (_FEW if few else _MORE)
        return data

    def shareable(self) -> bool:
        return self.method == "probe"


@register_protocol("lowshot")
def lowshot(job: Job, settings: LowshotSettings) -> None:
    """Top-1 accuracy with few labels, as mean and deviation over several draws of them."""
    recipe, values = settings.recipe(), []
    draws = list(_draws(job, settings))
    share = max(len(train) for _, train in draws) / len(job.train)
    if settings.method == "finetune" and share > _MOST and {"lr": settings.lr, "head_lr": settings.head_lr} == _FEW:
        rates = " ".join(f"{key}={value:g}" for key, value in _MORE.items())
        job.say(
            f"lr, head_lr: SwAV's rates for 1 % of the images; here are {share:.0%}, and those for 10 % are {rates}"
        )
    for variant, train in draws:
        for missing in job.todo([variant]):
            more = {"trained_on": len(train)}
            if settings.method == "probe":
                features, labels = job.features(train)
                test, truth = job.features(job.val)
                classes, converged = fit_logistic(features, labels, test, settings.c)
                more["converged"] = converged
            else:
                saved = unfinished.place(job, missing)
                model = finetune(job, recipe, train, missing["seed"], settings.workers, saved)
                classes, truth = named(job, model, job.val)
                unfinished.forget(saved)
            job.record_accuracy(missing, classes, truth, **more)
        values.append(job.found(variant)["value"])
    if len(values) > 1:
        each = {key: [variant[key] for variant, _ in draws] for key in ("seed", "chosen")}
        job.record_mean(each, "top1", values, trained_on=fmean(len(train) for _, train in draws))


def _draws(job: Job, settings: LowshotSettings) -> Iterator[tuple[dict[str, Any], Split]]:
    """The training images of each draw, with its seed, or the number of its list."""
    for seed in range(len(settings.lists)) if settings.lists else settings.seeds:
        if settings.lists:
            rows = rows_of_list(job.train, Path(settings.lists[seed]))
        else:
            rows = drawn(job.train.labels, settings.fraction, settings.shots, seed)
        train = job.train.rows(rows)
        train = train.few() if job.dry else train
        # Who is drawn is told by the seed, but a list may change under its name.
        yield {"seed": seed, "chosen": train.fingerprint}, train


def drawn(labels: torch.Tensor, fraction: float | None, shots: int | None, seed: int) -> torch.Tensor:
    """The rows of a random part of the images, stratified by class: labels int64 [n] -> int64 [k], ascending.

    fraction: a share of all; shots: so many of each class. A class has one image at least. Raises UserError where a
    class has fewer images than that.
    """
    order = random.shuffled(seed, -1, len(labels))
    if fraction is not None:
        rows = order[stratified(labels[order], max(round(fraction * len(labels)), 1))]
        # Of a class that is too small for the share, the first image.
        lacking = set(labels.unique().tolist()) - set(labels[rows].tolist())
        more = [order[(labels[order] == k).nonzero()[0]] for k in sorted(lacking)]
        return torch.cat([rows, *more]).sort().values
    found = []
    for k in labels.unique().tolist():
        members = order[labels[order] == k]
        if len(members) < shots:
            raise UserError(f"shots={shots}: a class has only {len(members)} training images")
        found.append(members[:shots])
    return torch.cat(found).sort().values


def rows_of_list(train: Split, file: Path) -> torch.Tensor:
    """The rows of the images that a file names, one in each line: by their path or by its last part. int64 [k]."""
    try:
        wanted = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"lists: cannot read {file}: {error}") from None
    names = getattr(train.images, "names", None)
    if names is None:
        raise UserError("lists: the images of this source have no names: use fraction or shots")
    rows: dict[str, list[int]] = {}
    for row, number in enumerate(train.index.tolist()):
        parts = names[number].split("/")
        for start in range(len(parts)):
            rows.setdefault("/".join(parts[start:]), []).append(row)
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        raise UserError(
            f"lists: {len(unknown)} of the {len(wanted)} names in {file} are of no training image, such as {unknown[0]}"
        )
    double = [name for name in wanted if len(rows[name]) > 1]
    if double:
        raise UserError(
            f"lists: {double[0]} in {file} is the name of {len(rows[double[0]])} images: give more of its path"
        )
    found = torch.tensor(sorted({rows[name][0] for name in wanted}), dtype=torch.int64)
    if len(train.labels[found].unique()) < 2:
        raise UserError(f"lists: expected images of two classes at least in {file}")
    return found

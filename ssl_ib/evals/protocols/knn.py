"""kNN: weighted nearest neighbours on frozen features."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from ...config.hints import Positive
from ...errors import UserError
from ...record import eval_figures
from ..knn import knn_classes, neighbours
from ..protocol import Job, Numbers, Settings, register_protocol

#: Images whose neighbours are shown, and how many of these; images of the map.
_SHOWN, _NEAREST, _MAPPED = 8, 6, 2000


class KnnSettings(Settings):
    """Nearest neighbours by cosine (DINO's protocol): exact, nothing is trained.

    k: numbers of neighbours, each a result. temperature: of the weights exp(cosine / temperature). weighted: false
    counts all neighbours alike.
    """

    varied: ClassVar = {"k": "k"}

    k: Numbers = (10, 20, 100, 200)
    temperature: Positive = 0.07
    weighted: bool = True

    def shareable(self) -> bool:
        return True


@register_protocol("knn")
def knn(job: Job, settings: KnnSettings) -> None:
    """Top-1 accuracy of weighted nearest neighbours, for several numbers of them in one pass."""
    too_many = [k for k in settings.k if k > len(job.train)]
    if too_many and not job.dry:
        raise UserError(
            f"k={too_many[0]}: there are {len(job.train)} training images: give smaller ones, as in k=[1,5]"
        )
    todo = [variant["k"] for variant in job.todo({"k": k} for k in settings.k)]
    if not todo:
        return
    (train, train_labels), (test, labels) = job.features(job.train), job.features(job.val)
    train, train_labels, test = (x.to(job.device) for x in (train, train_labels, test))
    temperature = settings.temperature if settings.weighted else None
    named = knn_classes(train, train_labels, test, todo, job.num_classes, temperature)
    for k, classes in zip(todo, named, strict=True):
        job.record_accuracy({"k": k}, classes, labels)
    if path := job.figure("confusion"):
        eval_figures.confusion(labels, named[0], job.val.classes, path, f"{todo[0]} nearest neighbours")
    if path := job.figure("neighbours"):
        _draw_neighbours(job, train, test, path)
    if path := job.figure("map"):
        rows = torch.arange(len(test))[:: max(len(test) // _MAPPED, 1)]
        eval_figures.feature_map(F.normalize(test[rows], dim=1).cpu(), labels[rows], job.val.classes, path)


def _draw_neighbours(job: Job, train: torch.Tensor, test: torch.Tensor, path) -> None:
    chosen = job.val.spread(_SHOWN)
    (cosines, rows), *_ = neighbours(train, test[chosen.to(test.device)], min(_NEAREST, len(train)), chunk=_SHOWN)
    eval_figures.nearest(
        [(job.picture(job.val, i), job.val.name_of(i)) for i in chosen.tolist()],
        [[(job.picture(job.train, i), job.train.name_of(i)) for i in row] for row in rows.tolist()],
        cosines.cpu(),
        path,
    )

"""What a run is asked while it trains: weighted kNN, representation health, and at the end a linear probe.

Nothing here moves the run: no training, no random state, views from counters of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..data.loader import ordered
from ..run import Run
from ..types import Progress, Sample
from . import features, health
from .knn import knn_top1
from .linear import linear_top1

#: Images from which rank, spread, alignment and uniformity are estimated.
HEALTH_IMAGES = 2048


class Online:
    """Evaluates a run's encoder on its own source. `limit` bounds the images of each split (a dry run), or None."""

    def __init__(self, run: Run, limit: int | None = None):
        self.run, self.config, self.limit = run, run.config.eval, limit

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, under the run's precision; its former modes afterwards."""
        modes = {module: module.training for module in self.run.model.modules()}
        self.run.model.eval()
        try:
            with self.autocast():
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    def autocast(self) -> torch.autocast:
        """The run's precision."""
        return torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.run.config.precision == "bf16")

    def evaluate(self, progress: Progress, final: bool = False) -> dict[str, float]:
        """`knn/top1`, `health/*`, and where `final` asks for it `linear/top1`. Without labels only health is left."""
        with self.evaluating():
            metrics = self._health(progress)
            if self._labelled():
                train, test = (features.extract(self.run.model.encode, *self._split(s)) for s in ("train", "val"))
                metrics["knn/top1"] = self._knn(train, test)
                if final and self.config.linear.enabled:
                    metrics["linear/top1"] = self._linear(train, test)
        return metrics

    def raw_pixels(self) -> dict[str, float]:
        """kNN on the pixels themselves: what the encoder has to beat."""
        if not self._labelled():
            return {}
        train, test = (features.raw_pixels(*self._split(s)[:2]) for s in ("train", "val"))
        return {"raw_pixels/knn/top1": self._knn(train, test)}

    def _labelled(self) -> bool:
        train, val = self.run.source.train(), self.run.source.val()
        return val is not None and len(val) > 0 and bool((train.labels >= 0).any())

    def _split(self, name: str):
        images = getattr(self.run.source, name)()
        limit = min(filter(None, (self.limit, getattr(self.config, f"{name}_images"))), default=None)
        return self._samples(images, limit), self._plain, self.run.device

    def _samples(self, images, limit: int | None) -> Iterator[Sample]:
        return ordered(images, self.config.batch_size, limit)

    def _plain(self, sample: Sample) -> Tensor:
        return self.run.views.center(sample.images, sample.extra.get("size"))

    def _knn(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
        return knn_top1(*train, *test, k=self.config.knn_k, temperature=self.config.knn_temperature)

    def _linear(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
        probe = self.config.linear.model_dump(exclude={"enabled"})
        return linear_top1(*train, *test, **probe, seed=self.run.config.seed)

    def _health(self, progress: Progress) -> dict[str, float]:
        """Rank and spread of the plain features; alignment and uniformity of two views, where views are images."""
        held_out = self.run.source.val()
        images = self.run.source.train() if held_out is None or not len(held_out) else held_out
        limit = min(filter(None, (self.limit, HEALTH_IMAGES)))
        plain, _ = features.extract(self.run.model.encode, self._samples(images, limit), self._plain, self.run.device)
        metrics = {"health/rankme": health.rankme(plain), "health/std": health.dimension_std(plain)}
        shapes = self.run.views.shapes
        if len(shapes) >= 2 and len(shapes[0]) == 3 and shapes[0] == shapes[1]:
            # An epoch that training never has, so that every evaluation draws the same views.
            fixed = replace(progress, epoch=-1)

            def view(number: int):
                def encode(sample: Sample) -> Tensor:
                    return self.run.task.prepare(sample, fixed).views[number]

                samples = self._samples(images, limit)
                return features.extract(self.run.model.encode, samples, encode, self.run.device)[0]

            first, second = view(0), view(1)
            metrics["health/alignment"] = health.alignment(first, second)
            metrics["health/uniformity"] = health.uniformity(first)
        return metrics

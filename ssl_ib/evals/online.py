"""What a run is asked while it trains: weighted kNN, representation health, held-out loss, at the end linear probes.

Nothing here moves the run: the parts are in evaluation mode and get their former modes back, and views come from
counters of their own.

All processes of a run ask it at once and share the work: batches to encode, the queries of kNN, held-out batches, and
probes. Each has all answers, which are those of one process.

Shapes: B images a batch, n images in all, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .. import distributed, random
from ..data.sources.base import ImageSet, stratified
from ..info.labels import cross_entropy_bound, entropy, fano
from ..run import Run
from ..types import Batch, Progress, Sample
from . import features, health, ledger
from .features import num_classes
from .knn import knn_top1
from .linear import linear_distance, linear_logits, linear_top1

#: Images from which rank, spread, alignment, uniformity and LiDAR are estimated.
HEALTH_IMAGES = 2048
#: Held-out images whose loss is taken, in batches of the run's size; one whole batch at least.
HELD_OUT_IMAGES = 512
#: Side in pixels of the images whose raw pixels are compared.
RAW_SIDE = 64


class Online:
    """Evaluates a run's encoder on its own source, or on that of `eval.source`.

    limit: bounds the images of each split (a dry run), or None.
    """

    def __init__(self, run: Run, limit: int | None = None):
        self.run, self.config, self.limit = run, run.config.eval, limit

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The parts in evaluation mode, under the run's precision; their former modes afterwards."""
        roots = (self.run.task, self.run.model, self.run.criterion)
        modes = {module: module.training for root in roots for module in root.modules()}
        for root in roots:
            root.eval()
        try:
            with self.autocast():
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    def autocast(self) -> torch.autocast:
        """The run's precision."""
        return torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.run.config.precision == "bf16")

    def evaluate(self, progress: Progress, final: bool = False, probes: bool = False) -> dict[str, float]:
        """`knn/top1`, `health/*`, `held_out/*`, where `final` asks for it `linear/top1`, and `probe/*` of `probes`.

        `information/labels` is a lower bound, in nats, on what the features hold of the labels, from kNN's accuracy
        (`labels_linear`: from the linear probe), at most `labels_ceiling`; `..._error` is its standard error.
        Without two classes there are no accuracies, without held-out images no `held_out/*`. `probe/<factor>` is of a
        linear layer on the features, for each factor the images have: its accuracy where the factor is a class, its
        mean Euclidean distance from the truth where it is a number or a vector of them.
        """
        metrics = self.ledger(progress) if self.config.ledger else {}
        roots = (self.run.task, self.run.model, self.run.criterion)
        # Batch norms may count the rows of their own process alone: those of the main process are saved and evaluated.
        with self.evaluating(), distributed.as_main(buffer for root in roots for buffer in root.buffers()):
            metrics |= self._health(progress) | self._held_out(progress)
            if self._has_labels():
                encode = self.run.model.encode
                train, test = (self._features(encode, images, index) for images, index in self._splits())
                asked: dict[str, Callable[[], Any]] = self._probes(train[0], test[0]) if probes else {}
                train, test = _labelled(train), _labelled(test)
                metrics |= self._knn_and_bound(train, test)
                if final and self.config.linear.enabled:
                    asked["linear/top1"] = partial(self._linear_and_bound, train, test)
                answers = distributed.shared(lambda name: asked[name](), list(asked))
                answers = dict(zip(asked, answers, strict=True))
                metrics |= answers.pop("linear/top1", {}) | answers
        return metrics

    def ledger(self, progress: Progress) -> dict[str, float]:
        """`ledger/*`: what the terms of the loss ask of the encoder (`evals.ledger`), on `images` held-out images.

        A batch is one of a process, so that it takes as much memory as in training.
        """
        run, images = self.run, self.run.source.val()
        size = run.batch_size // run.config.accumulate
        count = ledger.num_batches(round(progress.steps_per_epoch * self.config.every_epochs))
        batches = stratified(images.labels, min(filter(None, (self.limit, count * size)))).split(size)
        batches = [index for index in batches if len(index) == size] or batches
        depths = ledger.by_depth(run.model.trained_encoders())

        def products(index: Tensor) -> tuple[list[str], list]:
            batch = run.task.prepare(images.gather(index).to(run.device), replace(progress, epoch=-1))
            loss = run.criterion(run.model.forward(batch), batch, progress)
            terms = ledger.trained_terms(loss)
            with torch.autocast(run.device.type, enabled=False):
                return list(terms), ledger.products(terms, depths).tolist()

        devices = [run.device] if run.device.type == "cuda" else []
        with (
            torch.enable_grad(),
            torch.random.fork_rng(devices),
            self.evaluating(),
            ledger.batch_statistics(run.model, run.criterion),
        ):
            found = distributed.shared(products, batches)
        names, _ = found[0]
        numbers = ledger.readings(names, torch.tensor([each for _, each in found], dtype=torch.float64).mean(dim=0))
        return {"ledger/images": sum(map(len, batches)), **numbers}

    def _probes(self, train: Tensor, test: Tensor) -> dict[str, Callable[[], float]]:
        """What gives `probe/<factor>` by features of the images that are scored, [n, D] and [m, D]."""
        found: dict[str, Callable[[], float]] = {}
        for name, (known, wanted) in self._factors().items():
            if known.is_floating_point():
                found[f"probe/{name}"] = partial(linear_distance, train, known, test, wanted)
            elif self.config.linear.enabled:
                found[f"probe/{name}"] = partial(self._linear, (train, known), (test, wanted))
        return found

    def _factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each factor of the images that are scored: of the training images and of the held-out ones."""
        train, val = self.run.evaluated.train(), self.run.evaluated.val()
        chosen = {name: self._chosen(name) for name in ("train", "val")}
        return {
            name: (values[chosen["train"]], val.factors[name][chosen["val"]]) for name, values in train.factors.items()
        }

    def raw_pixels(self) -> dict[str, float]:
        """`knn/top1` on the pixels themselves: what the encoder has to beat. Empty without two classes.

        Images above RAW_SIDE pixels are shrunk, and of a sequence of frames the last counts: more would not fit into
        memory.
        """
        if not self._has_labels():
            return {}
        size = self.config.batch_size
        train, test = (
            _labelled(features.raw_pixels(images, index, size, self._small)) for images, index in self._splits()
        )
        return {"knn/top1": self._knn(train, test)}

    def chance(self) -> dict[str, float]:
        """What the accuracies have to be held against: `knn/top1` of always naming the most frequent class.

        `images` is the number of held-out images that are scored; `probe/<factor>` is that of the training images' most
        frequent class, or of their mean. Empty without two classes.
        """
        if not self._has_labels():
            return {}
        labels = self.run.evaluated.val().labels[self._chosen("val")]
        found = {"knn/top1": int(labels.bincount().max()) / len(labels), "images": len(labels)}
        for name, (known, wanted) in self._factors().items():
            if known.is_floating_point():
                found[f"probe/{name}"] = (wanted - known.mean(dim=0)).norm(dim=1).mean().item()
            else:
                found[f"probe/{name}"] = (wanted == known.bincount().argmax()).double().mean().item()
        return found

    def collect(self, name: str, n: int, draw: int | None = None) -> Tensor:
        """The model's output `name`, of its first view, for n plain training images (or all): [n, ...].

        draw: a number that chooses the images at random; None for those that are always taken.

        All processes ask at once. Each computes its share of the batches, and as many as any other: where the model is
        sharded, they go through it in step.
        """
        images, model, found = self.run.source.train(), self.run.model, []
        if draw is None:
            index = stratified(images.labels, n)
        else:
            index = random.shuffled(self.run.config.seed, draw, len(images))[:n]
        batches = index.split(self.config.batch_size)
        mine = list(distributed.share(batches))
        idle = -(-len(batches) // distributed.world_size()) - len(mine)
        wanted, views = model.wanted, model.wanted_views
        try:
            model.wanted, model.wanted_views = frozenset({name}), {}
            with torch.no_grad(), self.evaluating(), distributed.as_main(model.buffers()):
                for batch in [*mine, *batches[:idle]]:
                    sample = images.gather(batch).to(self.run.device)
                    batch = Batch([self._plain(sample)], [None], sample.index, sample.label)
                    # Not through a compiled __call__, which would compile the model once more for these images.
                    found.append(model.forward(batch)[name][0])
        finally:
            model.wanted, model.wanted_views = wanted, views
        rows = torch.cat(found)[: sum(map(len, mine))]
        return distributed.gather_rows(rows, distributed.shares(len(rows)))

    @torch.no_grad()
    def _held_out(self, progress: Progress) -> dict[str, float]:
        """The loss and its terms on held-out images, always the same views and masks of them."""
        run, images = self.run, self.run.source.val()
        if images is None or not len(images) or not run.criterion.held_out:
            return {}
        # What a criterion gets at once in training, of all processes together.
        size = run.batch_size * distributed.world_size() // run.config.accumulate
        limit = min(filter(None, (self.limit, max(HELD_OUT_IMAGES, size))))
        batches = stratified(images.labels, limit).split(size)
        # Losses that compare images depend on how many there are: a smaller last batch does not count.
        batches = [index for index in batches if len(index) == size] or batches

        def terms(index: Tensor) -> dict[str, float]:
            batch = run.task.prepare(images.gather(index).to(run.device), replace(progress, epoch=-1))
            # Not through a compiled __call__, which would compile the model a second time for evaluation.
            loss = run.criterion(run.model.forward(batch), batch, progress)
            return {name: float(value.double()) for name, value in {"loss": loss.total, **loss.terms}.items()}

        found = distributed.shared(terms, batches)
        return {f"held_out/{name}": sum(each[name] for each in found) / len(found) for name in found[0]}

    def _has_labels(self) -> bool:
        """Whether there is anything to tell apart: two classes in the training images and in the held-out ones."""
        sets = self.run.evaluated.train(), self.run.evaluated.val()
        return all(images is not None and len(images.labels[images.labels >= 0].unique()) > 1 for images in sets)

    def _chosen(self, split: str) -> Tensor:
        """The labelled images of the split "train" or "val" that are scored: their numbers, int64 [n]."""
        labels = getattr(self.run.evaluated, split)().labels
        labelled = (labels >= 0).nonzero()[:, 0]
        limit = min(filter(None, (self.limit, getattr(self.config, f"{split}_images"))), default=len(labelled))
        return labelled[stratified(labels[labelled], limit)]

    def _splits(self) -> Iterator[tuple[ImageSet, Tensor]]:
        """The training and the held-out split, and the numbers of the images that are scored, int64 [n]."""
        for name in ("train", "val"):
            yield getattr(self.run.evaluated, name)(), self._chosen(name)

    def _features(
        self,
        encode: Callable[[Tensor], Tensor],
        images: ImageSet,
        index: Tensor,
        center: Callable[[Sample], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features float32 [n, D] and labels int64 [n] of images; center: default: their plain view."""
        center = center or self._plain
        return features.extract(encode, images, index, self.config.batch_size, center, self.run.device)

    def _plain(self, sample: Sample) -> Tensor:
        return self.run.views.center(sample)

    def _plain_shape(self, images: ImageSet) -> tuple[int, ...]:
        """The shape of a plain view of these images, without the batch."""
        return tuple(self._plain(images.gather(torch.zeros(1, dtype=torch.int64)).to(self.run.device)).shape[1:])

    def _small(self, sample: Sample) -> Tensor:
        images = self._plain(sample)
        images = images[:, -1] if images.ndim == 5 else images
        return adaptive_avg_pool2d(images, RAW_SIDE) if images.shape[-1] > RAW_SIDE else images

    def _knn(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
        return knn_top1(*train, *test, k=self.config.knn_k, temperature=self.config.knn_temperature)

    def _knn_and_bound(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
        """`knn/top1`, and what that accuracy says at least of the information that features hold of labels."""
        accuracy, classes = self._knn(train, test), num_classes(train[1], test[1])
        bound, error = fano(accuracy, test[1], classes)
        information = {"labels": bound, "labels_error": error, "labels_ceiling": entropy(test[1])}
        return {"knn/top1": accuracy, **{f"information/{name}": value for name, value in information.items()}}

    def _linear(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
        return linear_top1(*train, *test, **self._probe())

    def _linear_and_bound(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
        """`linear/top1`, and the closer bound that the probe's probabilities give."""
        logits = linear_logits(*train, *test, **self._probe())
        if logits.isnan().any():
            return {"linear/top1": float("nan")}
        bound, error = cross_entropy_bound(logits, test[1])
        accuracy = (logits.argmax(dim=1) == test[1]).double().mean().item()
        return {
            "linear/top1": accuracy,
            "information/labels_linear": bound,
            "information/labels_linear_error": error,
        }

    def _probe(self) -> dict[str, Any]:
        return {**self.config.linear.model_dump(exclude={"enabled"}), "seed": self.run.config.seed}

    def _health(self, progress: Progress) -> dict[str, float]:
        """Rank and spread of plain features; of two views like them alignment, uniformity and LiDAR."""
        held_out = self.run.source.val()
        images = self.run.source.train() if held_out is None or not len(held_out) else held_out
        index = stratified(images.labels, min(filter(None, (self.limit, HEALTH_IMAGES))))
        plain, _ = self._features(self.run.model.encode, images, index)
        metrics = {"health/rankme": health.rankme(plain), "health/std": health.dimension_std(plain)}
        shapes = self.run.views.shapes
        if len(shapes) >= 2 and shapes[0] == shapes[1] == self._plain_shape(images):
            # An epoch that training never has, so that every evaluation draws the same views.
            fixed = replace(progress, epoch=-1)

            def pair(sample: Sample) -> Tensor:
                return torch.cat([view[: len(sample)] for view in self.run.task.prepare(sample, fixed).views[:2]])

            def encode(views: Tensor) -> Tensor:
                return torch.cat(self.run.model.encode(views).chunk(2), dim=1)

            both, _ = self._features(encode, images, index, pair)
            first, second = both.chunk(2, dim=1)
            metrics["health/alignment"] = health.alignment(first, second)
            metrics["health/uniformity"] = health.uniformity(first)
            # What varies within an image is not known in more directions than there are images.
            if len(first) > first.shape[1]:
                metrics["health/lidar"] = health.lidar(torch.stack([first, second]))
        return metrics


def _labelled(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The rows whose label is known: features [n, D] and labels [n], -1 where unknown."""
    features, labels = found
    return features[labels >= 0], labels[labels >= 0]

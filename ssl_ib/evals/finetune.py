"""Training an encoder with its classifier from end to end: timm's augmentations, mixing and rates by layer.

Everything a step draws is a function of the seed, the epoch and the image or the step, so a training that was stopped
goes on as if it had not been.

Shapes: B images a batch, n images in all, C classes, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from .. import random
from ..errors import UserError
from . import unfinished
from .progress import track
from .protocol import Job, Split
from .training import Order, generators, seed_all, seed_step

#: Keeps what an image draws apart from the order of the images, and from what a step draws.
_IMAGES = -3


@dataclass(frozen=True)
class Recipe:
    """How an encoder is fine-tuned (`FinetuneSettings` has the values of MAE).

    optimiser:     AdamW, or SGD with momentum 0.9.
    lr:            per 256 images where `lr_scale` is linear. head_lr: of the classifier; None: as the encoder's.
    layer_decay:   each layer's rate is that of the layer above it times this; 1: all are alike.
    weight_decay:  not on biases and other 1-D parameters.
    shape:         after the warm-up a cosine down to min_lr, or steps by gamma at each of the milestones.
    drop_path:     of the last block, rising from 0.
    rand_augment:  timm's text for it; None for none. erasing: probability of random erasing.
    smoothing:     of the labels. mixup, cutmix: parameters of their beta distributions; 0: off.
    pool:          of a vision transformer: the mean of the patches with a norm of its own after it, as in MAE's code,
                   the class token, or the encoder's own.
    clip:          of the gradient's norm; None: none.
    """

    epochs: int
    batch_size: int
    optimiser: Literal["adamw", "sgd"]
    lr: float
    lr_scale: Literal["raw", "linear"]
    head_lr: float | None
    min_lr: float
    warmup_epochs: float
    shape: Literal["cosine", "step"]
    milestones: tuple[float, ...]
    gamma: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    crop: tuple[float, float]
    rand_augment: str | None
    erasing: float
    smoothing: float
    mixup: float
    cutmix: float
    pool: Literal["own", "cls", "mean"]
    clip: float | None

    def rate(self, epoch: float, peak: float) -> float:
        """The encoder's rate after `epoch` epochs, a fraction counting, where its highest is `peak`."""
        if epoch < self.warmup_epochs:
            return peak * epoch / self.warmup_epochs
        if self.shape == "step":
            return peak * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-12)
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def classifier(job: Job, recipe: Recipe, seed: int) -> nn.Module:
    """The encoder with a new classifier on it, in timm's form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drop = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
        model = job.subject.create(num_classes=job.num_classes, **drop)
        if not isinstance(model.get_classifier(), nn.Linear):
            raise UserError(f"{job.subject.where}: the classifier of a {type(model).__name__} is not one linear layer")
        if job.subject.vit and recipe.pool != "own":
            if recipe.pool == "cls" and not model.has_class_token:
                raise UserError(f"pool=cls: {job.subject.where} has no class token: give pool=mean")
            model.reset_classifier(job.num_classes, "token" if recipe.pool == "cls" else "avg")
            if recipe.pool == "mean" and isinstance(model.fc_norm, nn.Identity):
                # The pretrained norm is of tokens; the mean of the patches gets one of its own.
                model.norm, model.fc_norm = nn.Identity(), nn.LayerNorm(model.embed_dim, eps=1e-6)
        head = model.get_classifier()
        nn.init.trunc_normal_(head.weight, std=2e-5)  # As in MAE's code.
        nn.init.zeros_(head.bias)
    return model.to(job.device)


def finetune(job: Job, recipe: Recipe, train: Split, seed: int, workers: int, saved: Path | None) -> nn.Module:
    """The encoder and a classifier, trained together on the images of `train`.

    workers: processes that augment images; 0: this one. saved: where the training stands at the end of each epoch is
    written there, and it goes on from there; None: nothing is written.
    """
    model = classifier(job, recipe, seed)
    batch = min(recipe.batch_size, len(train))
    steps = max(len(train) // batch, 1)
    scale = batch / 256 if recipe.lr_scale == "linear" else 1.0
    optimiser = _optimiser(model, recipe)
    epochs = min(recipe.epochs, 1) if job.dry else recipe.epochs
    state = unfinished.load(saved)
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    first = 0 if state is None else state["epoch"]
    mixing = bool(recipe.mixup or recipe.cutmix) and batch > 1
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=job.num_classes)
    images = _Augmented(job, recipe, train, seed)
    order = Order(len(train), batch, steps, seed)
    loader = DataLoader(
        images, batch_sampler=order, num_workers=workers, generator=torch.Generator(), persistent_workers=workers > 0
    )

    def batches() -> Iterator[tuple[int, int, Tensor, Tensor]]:
        for epoch in range(first, epochs):
            order.epoch = epoch
            for number, (views, labels) in enumerate(loader):
                yield epoch, number, views, labels
                if job.dry:
                    return

    total = epochs * steps
    with generators():
        for epoch, number, views, labels in track(batches(), total, "fine-tuning, steps", first * steps):
            step = epoch * steps + number
            seed_step(seed, step)
            views, labels = views.to(job.device), labels.to(job.device)
            targets = labels
            if mixing:
                even = batch // 2 * 2  # timm mixes pairs.
                views, targets = mix(views[:even], labels[:even])
            _set_rates(optimiser, recipe, epoch + number / steps, scale)
            model.train()
            optimiser.zero_grad(set_to_none=True)
            with job.autocast():
                scores = job.subject.call(model, views)
                loss = F.cross_entropy(scores.float(), targets, label_smoothing=0.0 if mixing else recipe.smoothing)
            if not bool(loss.isfinite()):
                raise UserError(
                    f"the loss of the fine-tuning is no longer finite at step {step}: lower lr={recipe.lr:g}"
                )
            loss.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimiser.step()
            if number == steps - 1 and epoch + 1 < epochs:
                unfinished.save(
                    saved, {"epoch": epoch + 1, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
                )
    return model.eval()


def named(job: Job, model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """The classes that a classifier names for a split's plain images, and the true ones: int64 [n], on the CPU."""
    scores, labels = job.features(split, lambda views: job.subject.call(model, views))
    return scores.argmax(dim=1), labels


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser; each of its groups has `lr_scale`, by which the rate of its layer is lower, and `head`."""
    decay = {"layer_decay": recipe.layer_decay} if recipe.layer_decay < 1 else {}
    more = {"betas": (0.9, 0.999)} if recipe.optimiser == "adamw" else {"momentum": 0.9}
    # timm's `sgd` is Nesterov's; `momentum` is the plain one.
    name = {"adamw": "adamw", "sgd": "momentum"}[recipe.optimiser]
    groups = create_optimizer_v2(model, opt=name, lr=1.0, weight_decay=recipe.weight_decay, **decay, **more)
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    found = []
    for group in groups.param_groups:
        for of_head in (False, True):
            parameters = [p for p in group["params"] if (id(p) in head) is of_head]
            if parameters:
                found.append({**group, "params": parameters, "head": of_head})
    return type(groups)(found, lr=1.0)


def _set_rates(optimiser: torch.optim.Optimizer, recipe: Recipe, epoch: float, scale: float) -> None:
    """The rate of each group after `epoch` epochs, a fraction counting; scale: of the rates, by the batch."""
    for group in optimiser.param_groups:
        peak = recipe.head_lr if group["head"] and recipe.head_lr is not None else recipe.lr
        group["lr"] = recipe.rate(epoch, peak * scale) * group.get("lr_scale", 1.0)


class _Augmented(Dataset):
    """Images augmented by timm, each by its own draw: (epoch, row) -> float32 [3, h, w] and its label."""

    def __init__(self, job: Job, recipe: Recipe, train: Split, seed: int):
        how = job.subject.preprocessing
        self.train, self.seed = train, seed
        self.transform = create_transform(
            how["size"],
            is_training=True,
            scale=recipe.crop,
            color_jitter=0.0,
            auto_augment=recipe.rand_augment,
            interpolation=how["interpolation"],
            mean=job.subject.description["mean"],
            std=job.subject.description["std"],
            re_prob=recipe.erasing,
            re_mode="pixel",
        )
        for step in self.transform.transforms:
            for operation in getattr(step, "ops", ()):
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = _posterize

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, row = place
        sample = self.train.images.gather(self.train.index[row : row + 1])
        key = random.image_keys(self.seed, epoch, sample.index, _IMAGES)
        seed_all(int(key[0]) % 2**32)
        return self.transform(to_pil_image(sample.images[0].cpu())), int(sample.label)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Of no bits at all, which timm may ask for, nothing is left. Pillow refuses them since its version 13."""
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)

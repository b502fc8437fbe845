"""Fine-tuning: the encoder is trained on with its classifier."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import ClassVar, Literal

from ...config.hints import Count, NonNegative, Positive, PositiveInt, Probability
from ...record import eval_figures
from .. import unfinished
from ..finetune import Recipe, finetune, named
from ..protocol import Job, Seeds, Settings, register_protocol
from .linear import check_training

#: Where a fine-tuned model is left, in the folder of the results.
KEPT = "evals/finetuned.pt"


class FinetuneSettings(Settings):
    """Fine-tuning from end to end, with the defaults of MAE (He et al., CVPR 2022, appendix A.2).

    optimiser: adamw, or sgd with momentum 0.9. lr: per 256 images, of so many as there are at most (lr_scale=raw: the
    rate itself); head_lr: of the classifier, where it is another one. layer_decay: each layer's rate is that of the
    layer above it times this. shape: after the warm-up a cosine down to min_lr, or steps by gamma at the milestones.
    crop: range of a crop's share of the image. rand_augment: timm's text for it, null for none. erasing: probability of
    random erasing. smoothing: of the labels. mixup, cutmix: parameters of their beta distributions, 0 for none. pool:
    of a vision transformer, the mean of the patches, the class token (cls), or the encoder's own. clip: of the
    gradient's norm. workers: processes that augment images. keep: leave the model of the last seed in
    evals/finetuned.pt, which the protocol robustness can take. seeds: several give mean and deviation.
    """

    varied: ClassVar = {"seeds": "seed"}

    epochs: PositiveInt = 100
    batch_size: PositiveInt = 1024
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    lr_scale: Literal["raw", "linear"] = "linear"
    head_lr: Positive | None = None
    min_lr: NonNegative = 1e-6
    warmup_epochs: NonNegative = 5.0
    shape: Literal["cosine", "step"] = "cosine"
    milestones: tuple[NonNegative, ...] = ()
    gamma: Positive = 0.2
    weight_decay: NonNegative = 0.05
    layer_decay: Probability = 0.75
    drop_path: Probability = 0.1
    crop: tuple[Positive, Positive] = (0.08, 1.0)
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: Probability = 0.25
    smoothing: Probability = 0.1
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    pool: Literal["own", "cls", "mean"] = "mean"
    clip: Positive | None = None
    workers: Count = 2
    keep: bool = False
    seeds: Seeds = (0,)

    def check(self) -> None:
        check_training(self)

    def recipe(self) -> Recipe:
        """How it is fine-tuned."""
        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})


@register_protocol("finetune")
def run(job: Job, settings: FinetuneSettings) -> None:
    """Top-1 accuracy after the encoder was fine-tuned with a classifier, in MAE's form by default."""
    recipe, values = settings.recipe(), []
    for seed in settings.seeds:
        for variant in job.todo([{"seed": seed}]):
            saved = unfinished.place(job, variant)
            model = finetune(job, recipe, job.train, seed, settings.workers, saved)
            classes, labels = named(job, model, job.val)
            # Kept before it is recorded: what is recorded is not trained again.
            if settings.keep and job.out is not None:
                kept = {"model": model.state_dict(), "recipe": asdict(recipe), "weights": job.weights}
                unfinished.save(job.out / KEPT, {**kept, "classes": job.train.classes})
            job.record_accuracy(variant, classes, labels)
            unfinished.forget(saved)
            if path := job.figure("confusion"):
                eval_figures.confusion(labels, classes, job.val.classes, path, "fine-tuning")
        values.append(job.found({"seed": seed})["value"])
    if len(values) > 1:
        job.record_mean({"seed": list(settings.seeds)}, "top1", values)

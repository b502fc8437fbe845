"""Semantic segmentation: a decoder on an encoder's feature maps, and the mean intersection over union."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from ...config.hints import Count, NonNegative, Positive, PositiveInt, Probability, Ratio
from ...errors import UserError
from ...record import eval_figures
from .. import unfinished
from ..mask_sets import MaskedImages, open_masks
from ..protocol import CommonSettings, Job, Seeds, register_protocol
from ..segmenter import Recipe, fit, predicted

#: What a form sets; the defaults are those of UPerNet.
FORMS: dict[str, dict[str, Any]] = {
    "upernet": {},
    # Tian et al., NeurIPS 2020: a frozen encoder, and a decoder of four layers. All else is chosen here.
    "infomin": {
        "decoder": "layers",
        "frozen": True,
        "width": 256,
        "crop": 224,
        "steps": 20_000,
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "overlap": 0.0,
    },
}
#: Images of a dry run; images that are drawn; how often the held-out images are drawn anew for the spread.
_DRY, _SHOWN, _DRAWS = 8, 6, 1000


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


Labels = Annotated[tuple[Count, ...], BeforeValidator(_as_tuple), "int >= 0, or a list of them"]
Range = tuple[Positive, Positive]


class SegmentationSettings(CommonSettings):
    """A decoder on the encoder's feature maps, trained on images with masks. `form` sets how.

    path: the folder: train/images and train/labels (or masks, annotations), and the same in val; or images/training and
    annotations/training, as ADE20K has them. An image and its mask have the same name but for the ending; a mask has
    the number of a class in each pixel, in grey or with a palette. split: the one that is scored. classes: how many
    there are, or a file with a name in each line (default: as many as the training masks say). 255 is void; ignore:
    other numbers that are; reduce_zero_label: 0 is void, and the classes begin at 1. train_images, val_images: at most
    so many of each split, spread over the names.
    form: upernet trains the encoder with the decoder UPerNet, in the form published for MAE on ADE20K. infomin freezes
    the encoder, and trains a decoder of four layers. What is given besides stands in its place.
    decoder: upernet, or layers: three convolutions and a classifier on the last map. frozen: keep the encoder. width:
    channels of the decoder (default: a vision transformer's own, else 512). blocks: of a vision transformer, the four
    that UPerNet gets, counted from 0 (default: at a third, a half, two thirds and all of the depth). auxiliary: weight
    of a second head's loss. dropout: before the classifier.
    crop: pixels of a side of the training crops, and of the windows by which an image is predicted; overlap: the share
    of a window that the next one covers too. size: pixels of the images' shorter side, for both (default: as crop).
    scale: range of a further scaling in training. largest: a crop is drawn anew where one class has more of it than
    this share. jitter: change colours. flip: mirror half of the crops.
    steps: of batch_size crops; epochs: how long instead. lr: of AdamW, after a linear rise in a share of the steps
    (warmup), falling linearly to 0. layer_decay: each layer's rate is that of the layer above it times this. workers:
    processes that prepare crops. encode_batch: windows predicted at a time. seeds: several give mean and deviation.
    """

    varied: ClassVar = {"seeds": "seed"}

    encode_batch: PositiveInt = 8
    path: str
    split: Literal["val", "test"] = "val"
    classes: PositiveInt | str | None = None
    ignore: Labels = ()
    reduce_zero_label: bool = False
    train_images: PositiveInt | None = None
    val_images: PositiveInt | None = None
    form: Literal[tuple(FORMS)] = "upernet"  # type: ignore[valid-type]
    decoder: Literal["upernet", "layers"] = "upernet"
    frozen: bool = False
    width: PositiveInt | None = None
    blocks: tuple[Count, ...] | None = None
    auxiliary: NonNegative = 0.4
    dropout: Ratio = 0.1
    crop: PositiveInt = 512
    size: PositiveInt | None = None
    scale: Range = (0.5, 2.0)
    largest: Probability = 0.75
    jitter: bool = True
    flip: bool = True
    steps: PositiveInt = 160_000
    epochs: PositiveInt | None = None
    batch_size: PositiveInt = 16
    lr: Positive = 1e-4
    warmup: Ratio = 0.009375
    weight_decay: NonNegative = 0.05
    layer_decay: Probability = 0.65
    drop_path: Ratio = 0.1
    overlap: Ratio = 0.5
    workers: Count = 2
    seeds: Seeds = (0,)

    @classmethod
    def fill(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The values of the form."""
        return FORMS.get(str(given.get("form", "upernet")), {})

    def open(self, dry: bool, say: Callable[[str], None]) -> tuple[MaskedImages, MaskedImages]:
        if self.decoder == "upernet" and find_spec("segmentation_models_pytorch") is None:
            raise UserError(
                "decoder=upernet needs segmentation-models-pytorch: pip install 'ssl-ib[dense]', or give decoder=layers"
            )
        limits = (self.train_images, self.val_images)
        sets = open_masks(self.path, self.split, say, self.classes, self.ignore, self.reduce_zero_label, limits)
        if dry:
            return tuple(images.rows(range(min(_DRY, len(images)))) for images in sets)
        return sets


@register_protocol("segmentation")
def segmentation(job: Job, settings: SegmentationSettings) -> None:
    """Mean IoU of the masks that a decoder on the encoder's feature maps predicts, by UPerNet by default."""
    recipe, values = _recipe_of(job, settings), []
    for seed in settings.seeds:
        for variant in job.todo([{"seed": seed}]):
            saved = unfinished.place(job, variant)
            model = fit(job, recipe, job.train, seed, settings.workers, saved)
            _score(job, variant, predicted(job, recipe, model, job.val, settings.workers), recipe)
            unfinished.forget(saved)
        values.append(job.found({"seed": seed})["value"])
    if len(values) > 1:
        job.record_mean({"seed": list(settings.seeds)}, "mIoU", values)


def _recipe_of(job: Job, settings: SegmentationSettings) -> Recipe:
    """How the decoder is trained. Raises UserError where the settings do not fit together, or the encoder to them."""
    made_for = job.subject.preprocessing["size"]
    if not 0 < settings.scale[0] <= settings.scale[1]:
        raise UserError(f"scale: expected 0 < low <= high, got {list(settings.scale)}")
    if job.subject.vit and settings.crop % (patch := job.subject.model.patch_embed.patch_size[0]):
        above = (settings.crop // patch + 1) * patch
        raise UserError(f"crop: expected a multiple of the patch, {patch}, such as {above}, got {settings.crop}")
    given = {field.name: getattr(settings, field.name) for field in fields(Recipe)}
    batch = min(settings.batch_size, len(job.train))
    if batch < 2:
        raise UserError(
            f"expected two images a batch at least, as batch norm needs them, got batch_size={settings.batch_size} and "
            f"{len(job.train)} training images"
        )
    given["batch_size"] = batch
    if settings.epochs is not None:
        given["steps"] = settings.epochs * (len(job.train) // batch)
    given["width"] = settings.width or (job.subject.model.embed_dim if job.subject.vit else 512)
    given["size"] = settings.size or settings.crop
    if settings.crop != made_for:
        resampled = ": positions are resampled" if job.subject.vit else ""
        job.say(
            f"crops of {settings.crop} x {settings.crop} pixels, and the encoder was made for {made_for}{resampled}"
        )
    return Recipe(**given)


def _score(job: Job, variant: dict[str, Any], masks: Iterable[tuple[Tensor, Tensor]], recipe: Recipe) -> None:
    """Records the mIoU of predicted masks, and draws some."""
    metric = MulticlassJaccardIndex(job.num_classes, average="none", ignore_index=-1)
    path = job.figure("masks")
    shown = {number * len(job.val) // _SHOWN for number in range(_SHOWN if path else 0)}
    confusions, pictures = [], []
    for row, (named, true) in enumerate(masks):
        before = metric.confmat.clone()
        metric.update(named[None], true[None].long())
        confusions.append(metric.confmat - before)
        if row in shown:
            pictures.append((job.val.image(row), true, named))
    iou, confusion = metric.compute(), metric.confmat
    present = confusion.sum(dim=1) > 0
    per_class = {
        name: value if there else None
        for name, value, there in zip(job.val.classes, iou.tolist(), present.tolist(), strict=True)
    }
    job.record(
        variant,
        "mIoU",
        iou[present].mean().item(),
        spread=spread_over_images(torch.stack(confusions), present),
        spread_of=f"{len(confusions)} images",
        chance=job.chance,
        pixel_accuracy=(confusion.diagonal().sum() / confusion.sum()).item(),
        iou=per_class,
        averaged_over=int(present.sum()),
        trained_steps=recipe.steps,
    )
    if path:
        eval_figures.masks(pictures, job.val.classes, per_class, path)


def spread_over_images(confusions: Tensor, present: Tensor) -> float | None:
    """The standard deviation of the mIoU over draws of as many held-out images, with replacement; None of one image.

    confusions: pixels of each image by true and named class, [n, C, C]. present: the classes averaged over, bool [C].
    """
    if len(confusions) < 2:
        return None
    confusions = confusions.double()
    right = confusions.diagonal(dim1=1, dim2=2)[:, present]
    union = (confusions.sum(dim=1) + confusions.sum(dim=2))[:, present] - right
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(confusions), (_DRAWS, len(confusions)), generator=generator)
    times = torch.zeros(_DRAWS, len(confusions), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    # A class that a draw has no pixel of is not in its mean.
    return ((times @ right) / (times @ union)).nanmean(dim=1).std().item()

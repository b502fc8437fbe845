"""A pretrained encoder in Python: `load` finds it, and `Backbone` knows how its images are prepared.

Shapes: B images a batch, n images in all, H x W pixels, h x w of the view that is encoded, D feature dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from .config.outside import user_path
from .config.plugins import load_plugins, remembered
from .config.recipe import named, read_recipe
from .config.registry import build_part, check_part
from .data.decode import ENDINGS, Unreadable, decode_file, image_files, pixels, read_image
from .data.views import Augment, Crops, Views
from .device import choose_device
from .errors import ConfigError, UserError, nearest
from .ops.pixels.resample import Interpolation
from .record import backbone as record
from .record import shards
from .record.checkpoint import last as last_checkpoint
from .record.weights import read_file
from .run import Run
from .types import Sample

TIMM = "timm:"
#: Where a run's views are among a checkpoint's parts.
_VIEWS = "task.views."
#: What `Backbone.tokens` gives.
TOKENS = ("cls", "mean", "patches")
#: Images of one size are prepared together, which is faster, where they have no more numbers than this.
_TOGETHER = 1 << 24


class Backbone(nn.Module):
    """A timm model without its classifier, and how its images are prepared; in evaluation mode until it is trained.

    model:    the timm module, which may be used and trained like any other.
    center:   images uint8 [B, 3, H, W] -> the normalised view that is encoded, float32 [B, 3, h, w]; None where that is
              not known: then only `forward` can be used.
    max_side: larger images are shrunk first, until their longer side has this many pixels; None: they are not.
    description: what `backbone.json` says of it (record/backbone.py); None where that is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        center: Callable[[Tensor], Tensor] | None,
        max_side: int | None = None,
        description: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model, self.center, self.max_side, self.description = model, center, max_side, description
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features of images that are prepared already: [B, 3, h, w], as `transform` gives them -> [B, D]."""
        return self.model(images)

    def tokens(self, images: Tensor, which: str | None = None) -> Tensor:
        """Features of images that are prepared already, of a kind: [B, 3, h, w] -> [B, D], or [B, L, D] of patches.

        which: "cls", the class token; "mean", the mean of the patches; "patches", each patch, row by row; after the
               model's last norm. The patches of a model without tokens are the positions of its final map. None: what
               `forward` gives, which is how the run evaluated the encoder.

        Raises UserError where the model has no such tokens.
        """
        if which is None:
            return self(images)
        if which not in TOKENS:
            raise UserError(f"tokens: expected one of these, got {which!r}{nearest(which, TOKENS)}")
        model: Any = self.model
        found, name = model.forward_features(images), type(model).__name__
        if found.ndim not in (3, 4):
            raise UserError(f"tokens={which}: {name} has no patches, its features are {list(found.shape)}")
        if found.ndim == 4:
            last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
            found, prefix = found.flatten(1, 2) if last else found.flatten(2).mT, 0
        else:
            prefix = getattr(self.model, "num_prefix_tokens", 0)
        if which == "patches":
            return found[:, prefix:]
        if which == "cls" and (not prefix or getattr(self.model, "cls_token", None) is None):
            raise UserError(f"tokens=cls needs a class token, and {name} has none: use tokens=mean or tokens=patches")
        pooled = found[:, 0] if which == "cls" else found[:, prefix:].mean(dim=1)
        # Where timm norms what was pooled, in place of the tokens.
        norm = getattr(self.model, "fc_norm", None)
        return pooled if norm is None else norm(pooled)

    def transform(self, image: Image.Image | str | Path) -> Tensor:
        """Prepares one image, as the run's own evaluation did: a PIL image or a file -> float32 [3, h, w], on the CPU.

        A PIL image of any mode and size will do, and is left as it is. Raises UserError for a file that cannot be read,
        and where the preprocessing is not known.
        """
        return self.views([self._pixels(image)])[0]

    def _pixels(self, image: Image.Image | str | Path) -> Tensor:
        """One image as it is read: uint8 [3, H, W]."""
        if isinstance(image, Image.Image):
            return pixels(image.copy(), self.max_side)
        if not isinstance(image, (str, Path)):
            raise UserError(f"expected a PIL image or the path of an image file, got {type(image).__name__}")
        found = decode_file(lambda name: read_image(Path(name)), str(image), self.max_side)
        if isinstance(found, Unreadable):
            raise UserError(f"{found.name} cannot be read as an image: {found.reason}")
        return found

    def views(self, images: list[Tensor]) -> Tensor:
        """What is encoded of some images, each uint8 [3, H, W]: float32 [B, 3, h, w], on the CPU.

        Raises UserError where the preprocessing is not known.
        """
        if self.center is None:
            raise UserError(
                "this backbone does not say how its images are prepared (backbone.json has no preprocessing, and there "
                "is no config.yaml beside it): prepare them yourself, and call the backbone on a tensor [B, 3, h, w]"
            )
        if len({image.shape for image in images}) == 1 and len(images) * images[0].numel() <= _TOGETHER:
            return self.center(torch.stack(images))
        return torch.cat([self.center(image[None]) for image in images])

    @torch.no_grad()
    def embed(
        self, images: Iterable[Image.Image | str | Path], batch_size: int = 64, tokens: str | None = None
    ) -> Tensor:
        """Features of images, in their order: float32 [n, D], or [n, L, D] of patches, on the CPU, without gradient.

        images: PIL images, or paths of image files. They are encoded `batch_size` at a time, on the device and in the
        dtype of the parameters. tokens: as for the method `tokens`. Raises what `transform` and `tokens` raise, and
        UserError where there is no image.
        """
        if isinstance(images, (str, Path, Image.Image)):
            raise UserError(
                f"embed: expected a list of images or of their paths, got one {type(images).__name__}; "
                "embed_folder takes a folder"
            )
        parameter = next(self.model.parameters())
        images, features = iter(images), []
        while batch := list(islice(images, batch_size)):
            views = self.views([self._pixels(image) for image in batch])
            features.append(self.tokens(views.to(parameter.device, parameter.dtype), tokens).float().cpu())
        if not features:
            raise UserError("embed: expected at least one image, got none")
        return torch.cat(features)

    def embed_folder(self, folder: str | Path, batch_size: int = 64) -> tuple[Tensor, list[str]]:
        """Features [n, D] of the image files below a folder, and their sorted names, relative to it.

        What counts as an image is what the source `folder` says. All features are held in memory: the command
        ssl-ib-embed writes those of a large folder to a file. Raises UserError where there is no image, or one cannot
        be read.
        """
        root = Path(folder)
        names = sorted(image_files(root))
        if not names:
            found = "no image in it" if root.is_dir() else "a file" if root.exists() else "nothing"
            raise UserError(f"embed_folder: expected a folder of images, found {found}: {root}; what counts: {ENDINGS}")
        return self.embed((root / name for name in names), batch_size), names


def load(
    source: str | Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    pretrained: bool = False,
) -> Backbone:
    """A pretrained encoder, in evaluation mode, ready for images.

    source:     the folder of a finished run; a checkpoint of a run (`checkpoints/last.pt`), finished or not; or
                `timm:NAME`, any model of timm's.
    name:       which encoder of a run whose model has several; needed with those alone.
    device:     auto, cpu, cuda or cuda:N.
    dtype:      of the parameters and of the computation; features are float32 all the same.
    pretrained: with `timm:NAME`, load timm's weights, which may download them; otherwise they are random.

    Raises UserError where there is no such encoder.
    """
    source, place = str(source), choose_device(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype: expected a floating-point type of torch's, such as torch.bfloat16, got {dtype!r}")
    if source.startswith(TIMM):
        found = _of_timm(source.removeprefix(TIMM), pretrained)
    elif pretrained:
        raise UserError(f"pretrained is for timm's models, such as timm:resnet18, and {source!r} is none")
    elif (path := user_path(source, "encoder")).is_dir() and not shards.is_checkpoint(path):
        found = _of_folder(path, name)
    elif path.exists():
        found = _of_checkpoint(path, name)
    else:
        raise UserError(
            f"expected the folder of a run, a checkpoint of one, or timm:NAME, and there is nothing at {source!r}"
        )
    return found.to(place, dtype)


def of_run(run: Run) -> dict[str, Backbone]:
    """Copies of the encoders that a run's model exports, by name, on the CPU. All processes ask at once."""
    exports, max_side = run.model.exports(), getattr(run.source, "max_side", None)
    return {
        name: Backbone(
            record.rebuild(description, record.state_of(exports[name][0])),
            _center(run.views, description),
            max_side,
            description,
        )
        for name, description in record.of_run(run).items()
    }


def _center(views: Views, description: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The plain view of bare images, or the channels that the encoder reads: uint8 [B, 3, H, W] -> [B, C, h, w]."""
    channels = slice(*description.get("channels", (None,)))
    return lambda images: views.center(Sample.unlabelled(images))[:, channels]


def _the_one(found: Iterable[str], name: str | None, place: Path) -> str:
    """The encoder that is meant, of those found. Raises UserError where it is not there, or where it is not said."""
    found = sorted(found)
    if name is None and len(found) == 1:
        return found[0]
    if name not in found:
        asked = "" if name is None else f", and {name!r} is none of them"
        raise UserError(f"{place} holds the encoders {', '.join(found)}{asked}: say which, with name=")
    return name


def _of_folder(folder: Path, name: str | None) -> Backbone:
    description, state = record.read(folder, _the_one(record.names(folder), name, folder))
    config, checkpoints = folder / "config.yaml", folder / "checkpoints"
    return _rebuilt(
        description,
        state,
        read_recipe(config) if config.is_file() else None,
        lambda: read_file(last_checkpoint(checkpoints) or checkpoints / "last.pt"),
    )


def _of_checkpoint(file: Path, name: str | None) -> Backbone:
    saved = read_file(file)
    saved = saved if isinstance(saved, dict) else {}
    found = record.from_checkpoint(saved)
    if not found:
        raise UserError(
            f"{file} does not describe an encoder: it is no checkpoint of a run, its model exports none, or it was "
            "saved by an earlier version. Of a finished run, give the folder"
        )
    config = saved.get("config")
    return _rebuilt(*found[_the_one(found, name, file)], config if isinstance(config, dict) else {}, lambda: saved)


def _rebuilt(
    description: dict[str, Any],
    state: dict[str, Tensor],
    config: dict[str, Any] | None,
    checkpoint: Callable[[], dict[str, Any]],
) -> Backbone:
    """config: that of the run, whose views are asked where the description does not have the preprocessing.

    checkpoint: reads the run's checkpoint, which has what such views have learned.
    """
    model, how = record.rebuild(description, state), description.get("preprocessing")
    if config and "preprocessing" not in description:
        description["arguments"] |= _pool_as_evaluated(model, named(config.get("model") or {}))
    if how is not None:
        embed: Any = getattr(model, "patch_embed", None)
        sides = tuple(getattr(embed, "img_size", None) or ())
        if getattr(embed, "strict_img_size", False) and sides and set(sides) != {how["size"]}:
            raise UserError(
                f"backbone.json says that images are cut to {how['size']} pixels, and that timm's "
                f"{description['model']!r} reads {' x '.join(map(str, sides))}: one of them is wrong"
            )
        views = Crops([Augment(how["size"], interpolation=how["interpolation"])], how["crop_ratio"])
        max_side = how["max_side"]
    elif config:
        load_plugins(remembered(config), "the run")
        problems: list[str] = []
        spec, source = check_part("views", config.get("views"), "views", problems), config.get("source")
        if problems:
            raise ConfigError(problems)
        max_side = source.get("max_side") if isinstance(source, dict) else None
        # As in a run that is resumed, whose views have in the checkpoint what they took from elsewhere at first.
        views = build_part("views", spec, resumed=True).part
        if views.state_dict():
            parts = checkpoint()["parts"].items()
            views.load_state_dict({name.removeprefix(_VIEWS): v for name, v in parts if name.startswith(_VIEWS)})
        how = views.preprocessing and {**views.preprocessing, "max_side": max_side}
    else:
        return Backbone(model, None, description=description)
    views.normalize(description["mean"], description["std"])
    return Backbone(model, _center(views, description), max_side, {**description, "preprocessing": how})


def _pool_as_evaluated(model: nn.Module, spec: dict[str, Any]) -> dict[str, Any]:
    """Earlier versions did not write how a vision transformer was pooled: the model of the run's configuration says.

    Returns the arguments that rebuild it so.
    """
    parts = [part for part in (spec, spec.get("contrastive")) if isinstance(part, dict)]
    pool = next((part["pool"] for part in parts if part.get("pool")), None)
    if type(model) is not VisionTransformer or pool is None:
        return {}
    model.reset_classifier(0, "token" if pool == "cls" else "avg")
    return record.pooling(model)


def of_timm(name: str, pretrained: bool) -> nn.Module:
    """A model of timm's without its classifier, with timm's weights where `pretrained`, which may download them.

    torch's generator is left as it was. Raises UserError where there is no such model, or its weights cannot be had.
    """
    if not timm.is_model(name):
        alike = get_close_matches(name, timm.list_models(), n=20, cutoff=0.4)
        raise UserError(f"timm has no model {name!r}{nearest(name, alike)}")
    with torch.random.fork_rng(devices=[]):
        if not pretrained:
            return timm.create_model(name, num_classes=0)
        record.check_reachable(name)
        try:
            return timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # What the download raises depends on the library that does it.
            raise UserError(f"timm could not load the weights of {name!r}: {error}") from error


def _of_timm(name: str, pretrained: bool) -> Backbone:
    model: Any = of_timm(name, pretrained)
    how = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**how)
    preprocessing, (_, height, width) = None, how["input_size"]
    if how["crop_mode"] == "center" and height == width and how["interpolation"] in get_args(Interpolation):
        resized, ratio = math.floor(width / how["crop_pct"]), how["crop_pct"]
        # timm rounds down where the views round to the nearest.
        ratio = ratio if round(width / ratio) == resized else width / resized
        preprocessing = {"size": width, "crop_ratio": ratio, "interpolation": how["interpolation"], "max_side": None}
    arguments = {"num_classes": 0, **({"img_size": width} if model.pretrained_cfg.get("fixed_input_size") else {})}
    description = record.describe(name, arguments, (how["mean"], how["std"]), preprocessing)
    return Backbone(model, partial(_by_transform, transform), description=description)


def _by_transform(transform: Callable[[Image.Image], Tensor], images: Tensor) -> Tensor:
    """A transform of single PIL images, on a batch: uint8 [B, 3, H, W] -> [B, 3, h, w]."""
    return torch.stack([transform(to_pil_image(image)) for image in images])

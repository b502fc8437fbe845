"""What is evaluated: an encoder, how its images are prepared, and where it comes from.

Shapes: B images, H x W pixels of the source, h x w of the view that is encoded, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from .. import pretrained
from ..config.recipe import read_recipe
from ..data.views import Augment, Crops
from ..errors import UserError
from ..record import backbone as record
from ..record import shards
from ..record.results import read_results
from ..types import Sample
from .results import fingerprint_of_weights

Pool = Literal["own", "cls", "mean"]


class Subject:
    """An encoder with its preprocessing.

    where:    as it was given: the folder of a run, a checkpoint, or `timm:NAME`. of: what `origin` says of it.
    backbone: as `ssl_ib.load` gives it.
    config:   the configuration of its run, as plain data; None where there is none.
    step:     how long the run had trained; None where that is not known.
    size:     pixels of a side of the images that are encoded, where that is another one than the encoder's own.
    """

    def __init__(
        self,
        where: str,
        of: Origin,
        *,
        name: str | None = None,
        size: int | None = None,
        pretrained_weights: bool = False,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        self.where, self.name, self.device = where, name, torch.device(device)
        self.config, self.step = of.config, of.step
        with torch.random.fork_rng(devices=[]):
            # A timm model without pretrained weights has random ones, which repeat by the seed.
            torch.manual_seed(seed)
            self.backbone = pretrained.load(where, name=name, pretrained=pretrained_weights)
        #: What backbone.json says of it (record/backbone.py).
        self.description: dict[str, Any] = self.backbone.description
        self.fingerprint = fingerprint_of_weights(self.backbone.model)
        self.notes: list[str] = []
        self._center: Callable[[Tensor], Tensor] | None = self.backbone.center
        if size is not None:
            self._resize(size)
        self.backbone.to(self.device)

    @property
    def model(self) -> nn.Module:
        """The timm model, without a classifier."""
        return self.backbone.model

    @property
    def vit(self) -> bool:
        """Whether the model is a plain vision transformer, with tokens and blocks."""
        return isinstance(self.model, VisionTransformer)

    @property
    def max_side(self) -> int | None:
        """Larger images are shrunk first, until their longer side has so many pixels; None: they are not."""
        return self.backbone.max_side

    def plain(self, sample: Sample) -> Tensor:
        """The view that is encoded, without chance: uint8 images, padded where their sizes differ -> [B, 3, h, w]."""
        if self._center is None:
            raise UserError(
                f"{self.where} does not say how its images are prepared: its backbone.json has no preprocessing, and "
                "there is no config.yaml beside it"
            )
        sizes, images = sample.extra.get("size"), sample.images
        if self._center is self.backbone.center and self.where.startswith(pretrained.TIMM):
            images = images.cpu()  # timm's own transform is of PIL images.
        if sizes is None:
            return self._center(images).to(self.device)
        cut = (image[None, :, :h, :w] for image, (h, w) in zip(images, sizes.tolist(), strict=True))
        return torch.cat([self._center(image) for image in cut]).to(self.device)

    def encode(self, views: Tensor) -> Tensor:
        """Features of prepared views: [B, 3, h, w] -> [B, D]. Raises UserError for a size that the encoder refuses."""
        return self.call(self.model, views)

    def call(self, module: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
        """`module(views)`; raises UserError where the encoder does not take the views' size."""
        try:
            return module(views)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            shape = " x ".join(map(str, views.shape[2:]))
            raise UserError(f"{self.where} cannot encode views of {shape} pixels: {error}") from error

    def blocks(self, count: int, pool: Pool) -> Callable[[Tensor], Tensor]:
        """What encodes views by the last `count` blocks of a vision transformer, each normed and pooled, side by side.

        pool: "cls", "mean" (of the patches), or "own": as the encoder itself pools. [B, 3, h, w] -> [B, count x D].
        With one block and "own" it is the encoder itself. Raises UserError where it has no blocks, or not so many.
        """
        if count == 1 and pool == "own":
            return self.encode
        if not self.vit:
            raise UserError(
                f"blocks={count}, pool={pool}: only a plain vision transformer has tokens, and {self.where} is none: "
                "give blocks=1 pool=own"
            )
        model = self.model
        if count > len(model.blocks):
            raise UserError(f"blocks={count}: {self.where} has {len(model.blocks)} blocks")
        if pool == "own":
            pool = "cls" if model.global_pool == "token" else "mean"
        if pool == "cls" and not model.has_class_token:
            raise UserError(f"pool=cls: {self.where} has no class token: give pool=mean")

        def encode(views: Tensor) -> Tensor:
            def tokens(x: Tensor) -> list[tuple[Tensor, Tensor]]:
                return model.forward_intermediates(
                    x, count, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
                )

            found = self.call(tokens, views)
            pooled = (prefix[:, 0] if pool == "cls" else patches.mean(dim=1) for patches, prefix in found)
            # timm may norm what was pooled, in place of the tokens.
            return torch.cat([model.fc_norm(one) for one in pooled], dim=1)

        return encode

    def create(self, **arguments: Any) -> nn.Module:
        """A new model with the encoder's weights and other arguments of timm's, such as num_classes and drop_path_rate.

        What the encoder does not have, its classifier, is as timm makes it, by torch's global generator.
        Raises UserError for an argument that timm does not take.
        """
        stem = {"stem": self.description["stem"]} if "stem" in self.description else {}
        given = {**self.description["arguments"], **stem, **arguments}
        try:
            model = record.create(self.description["model"], given)
        except TypeError as error:
            raise UserError(f"{self.description['model']} of timm does not take these arguments: {error}") from None
        size = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        if size is not None and size != model.patch_embed.img_size:
            model.set_input_size(img_size=size)
        missing, unexpected = model.load_state_dict(self.model.state_dict(), strict=False)
        heads = model.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads))
        strange = [name for name in missing if not name.startswith(heads)] + list(unexpected)
        assert not strange, f"the encoder and its copy differ: {strange}"
        return model

    def crops(self, **augment: Any) -> Crops:
        """Views of the encoder's size, normalised as its own, with another distribution: arguments of `Augment`.

        Raises UserError where the encoder's images are not resized and cropped, but prepared in a way of their own.
        """
        how = self.preprocessing
        views = Crops([Augment(how["size"], **{"interpolation": how["interpolation"], **augment})], how["crop_ratio"])
        views.normalize(self.description["mean"], self.description["std"])
        return views

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """`size`, `crop_ratio` and `interpolation` of the plain view. Raises UserError where it is none of these."""
        how = self.description["preprocessing"]
        if how is None:
            raise UserError(
                f"{self.where} prepares its images in a way of its own, so that they cannot be augmented or resized "
                "here: use a protocol on plain features, without augment and size"
            )
        return dict(how)

    def _resize(self, size: int) -> None:
        how = self.preprocessing
        if how["size"] == size:
            return
        self.notes.append(f"images of {size} x {size} pixels, and the encoder was made for {how['size']}")
        how["size"] = size
        if hasattr(self.model, "set_input_size"):
            try:
                self.model.set_input_size(img_size=size)
            except (AssertionError, RuntimeError) as error:
                raise UserError(f"size: {self.where} cannot take images of {size} pixels: {error}") from None
            self.notes[-1] += ": positions are resampled"
        views = self.crops()
        self._center = lambda images: views.center(Sample.unlabelled(images))


@dataclass(frozen=True)
class Origin:
    """Where an encoder comes from: what is known of its run, and whether there is anything to load."""

    config: dict[str, Any] | None = None
    step: int | None = None
    folder: Path | None = None
    found: bool = True


def origin(where: str) -> Origin:
    """What is known of the run that an encoder comes from, where there is one."""
    path = Path(where)
    if where.startswith(pretrained.TIMM):
        return Origin()
    if path.is_dir() and not shards.is_checkpoint(path):
        config, results = path / "config.yaml", path / "results.json"
        step = read_results(path)["step"] if results.is_file() else None
        return Origin(read_recipe(config) if config.is_file() else None, step, path)
    try:
        saved = torch.load(path / shards.STATE if path.is_dir() else path, map_location="cpu", weights_only=True)
    except Exception:  # There is no such file, or it is another kind of file: `load` says what is wrong.
        return Origin(found=False)
    saved = saved if isinstance(saved, dict) else {}
    folder = path.parent.parent if path.parent.name == "checkpoints" else None
    return Origin(saved.get("config"), saved.get("step"), folder)

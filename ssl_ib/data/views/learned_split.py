"""Views that the generator of another run makes: what a representation is trained on once the views are learned.

Shapes: B images, h x w pixels of a view.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.hints import CropRatio, NonNegative, PositiveInt, Probability
from ...config.registry import register_views
from ...errors import UserError
from ...ops.pixels.resample import Interpolation
from .augment import Augment
from .generator import Generator, Space
from .recipes import Scale
from .splits import Split

#: Where the generator of the model `view_generator` is among a checkpoint's parts.
_PREFIX = "model.generator."


@register_views("learned_split")
class LearnedSplit(Split):
    """One channel and two channels of what a learned generator makes of an augmented image; both views of one crop.

    The generator is frozen, and its weights are in this run's checkpoint: the other run is read at the start alone. The
    plain view has all three channels. Each channel is standardised, with statistics of training images. Source: Tian et
    al., "What Makes for Good Views for Contrastive Learning?", 2020, section 4.2.

    run:   folder of a run of the model `view_generator`, whose last checkpoint is read; it need not be finished. null
           gives the channels of `space` as they are, the paper's raw views.
    space: "rgb" or "ydbdr", where there is no run; a run's generator has its own.
    The others say how the image is augmented before it is split: by a crop and a flip alone, as for the generator, or
    also by SimCLR's jitter at a `strength`, grey and blur.
    """

    def __init__(
        self,
        run: str | None = None,
        space: Space | None = None,
        size: PositiveInt = 32,
        scale: Scale = (0.2, 1.0),
        flip: Probability = 0.5,
        strength: NonNegative = 0.0,
        grey_p: Probability = 0.0,
        blur_p: Probability = 0.0,
        crop_ratio: CropRatio = 1.0,
        interpolation: Interpolation = "bicubic",
        resumed: bool = False,
    ):
        if (run is None) == (space is None):
            raise UserError(
                "give either run=DIR, the folder of a run of the model view_generator, or space=rgb or space=ydbdr for "
                f"that space's channels as they are; got run={run} and space={space}"
            )
        jitter = tuple(strength * base for base in (0.8, 0.8, 0.8, 0.2))
        augment = Augment(
            size, scale, flip=flip, jitter=jitter, grey_p=grey_p, blur_p=blur_p, interpolation=interpolation
        )
        super().__init__(augment, crop_ratio, channels=3, first=1)
        self.generator = Generator(space or "rgb")
        # A run that resumes has the generator in its own checkpoint.
        if run is not None and not resumed:
            self.generator.load_state_dict(_generator_of(run))
        self.generator.requires_grad_(False)
        # In the checkpoint, unlike other views' statistics: those of a run that resumes are measured before the
        # generator is loaded.
        for name in ("_mean", "_std"):
            self.register_buffer(name, getattr(self, name), persistent=True)

    @torch.no_grad()
    def divide(self, pixels: Tensor) -> Tensor:
        # Statistics may be measured on the CPU, of images for a GPU.
        return self.generator(self.generator.normalized(pixels.to(self._mean.device)))

    def show(self, view: Tensor, number: int | None) -> Tensor:
        """The plain view as the pixels it was made of; a view's channels in grey, or in green and blue."""
        if number is None:
            return self.generator.inverse(self._denormalised(view, None)).clamp(0.0, 1.0)
        channels = (0.5 + view / 4).clamp(0.0, 1.0)
        if number == 0:
            return channels.expand(-1, 3, -1, -1)
        return torch.cat([torch.zeros_like(channels[:, :1]), channels], dim=1)


def _generator_of(run: str) -> dict[str, Any]:
    """The state_dict of the generator that a run has trained. Raises UserError where there is none."""
    folder, advice = Path(run), "give the folder of a run of the model view_generator"
    if not (folder / "config.yaml").is_file():
        there = "that folder holds no run (no config.yaml)" if folder.is_dir() else "there is no such folder"
        raise UserError(f"run={run}: {there}: {advice} (`ssl-ib-train view_generator_semi_ydbdr` trains one)")
    file = folder / "checkpoints" / "last.pt"
    if not file.is_file() and (folder / "checkpoints" / "last").is_dir():
        raise UserError(
            f"run={run}: the run's last checkpoint is that of a sharded run, which is not read here: train it with "
            "parallel=ddp, or in one process"
        )
    if not file.is_file():
        raise UserError(f"run={run}: the run has no checkpoint yet: wait for its first, or {advice}")
    try:
        parts = torch.load(file, map_location="cpu", weights_only=True)["parts"]
    except Exception as error:  # Unpickling a torn file can raise anything.
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(f"run={run}: {file} cannot be read as a checkpoint: {reason}") from None
    state = {name.removeprefix(_PREFIX): value for name, value in parts.items() if name.startswith(_PREFIX)}
    if "_extra_state" not in state:
        raise UserError(f"run={run}: the run's model has no generator of views: {advice}")
    return state

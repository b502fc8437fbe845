"""MRCL: any contrastive criterion on masked views, with their reconstruction as a regulariser.

Shapes: B images, N masks an image, L patches, P = p*p*C pixels a patch, V views.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..config.hints import NonNegative
from ..config.registry import register_criterion
from ..errors import UserError
from ..part import Criterion, RunInfo
from ..types import Batch, Loss, Progress
from .info_nce import InfoNCE
from .reconstruction import standardised_note, unstandardised


@register_criterion("mrcl")
class MRCL(Criterion):
    """The contrastive loss, plus over all views w_masked * M + w_unmasked * U.

    M and U are the squared errors of a view's reconstruction over its hidden and its visible patches; the view is a
    constant. Reads what the contrastive criterion reads, and `reconstruction` [B*N, L, P] of each view unless both
    weights are 0. A view without masks has every patch visible. Source: Liu et al., "Masked Reconstruction Contrastive
    Learning with Information Bottleneck Principle", 2022, equations 12 and 16.

    contrastive: the criterion it regularises, of any kind (default: info_nce at temperature 0.2).
    norm_pix:    reconstruct pixels standardised within their patch, as MAE does.
    rec_unit:    unit of the errors, which the paper does not state: "pixel", in which white is 1 and black is 0; or
                 "standardised", in which views are given to the encoder. Weights are absolute, so that the unit
                 changes what they do: where a channel's deviation is 0.25, the same error is 16 times as large when it
                 is standardised. "pixel" costs a float32 copy of view and prediction. With norm_pix the errors have no
                 unit.
    rec_reduce:  "group": mean over pixels, then over the group's patches (a group without patches gives 0). So one
                 hidden patch weighs w_masked / w_unmasked x (1 - ratio) / ratio times as much as a visible one: at
                 weights 8 and 5 and a mask ratio of 0.2, 6.4 times;
                 "all":   the group's errors divided by all L, so equal weights w give w x the plain squared error;
                 "sum":   sum over an image's pixels and patches, mean over images.
    con:         "native": the contrastive criterion as it is; "eq16": as the equation prints it, which needs an
                 info_nce and makes it one-directional with cross-view candidates only.
    """

    def __init__(
        self,
        contrastive: Criterion | None = None,
        w_masked: NonNegative = 8.0,
        w_unmasked: NonNegative = 5.0,
        norm_pix: bool = False,
        rec_unit: Literal["pixel", "standardised"] = "pixel",
        rec_reduce: Literal["group", "all", "sum"] = "group",
        con: Literal["native", "eq16"] = "native",
        info: RunInfo | None = None,
    ):
        super().__init__()
        self.contrastive = InfoNCE(temperature=0.2) if contrastive is None else contrastive
        self.num_views, self.reads = self.contrastive.num_views, self.contrastive.reads
        self.held_out, self.nats = self.contrastive.held_out, self.contrastive.nats
        self.w_masked, self.w_unmasked = w_masked, w_unmasked
        self.norm_pix, self.rec_reduce, self.con = norm_pix, rec_reduce, con
        self.in_pixels = rec_unit == "pixel" and not norm_pix
        # Read at the first step, as the source may have to be read for it; without a run, views are in pixels.
        self._deviation = cache(lambda device: torch.tensor(info.deviation() if info else [1.0], device=device))
        if con == "eq16":
            if not isinstance(self.contrastive, InfoNCE):
                raise UserError(
                    f"con='eq16' is a form of the criterion info_nce, but the contrastive criterion is a "
                    f"{type(self.contrastive).__name__}: use con='native' or contrastive=info_nce"
                )
            self.contrastive.negatives, self.contrastive.symmetric = "cross", False
        # Fixed here, because scheduled weights may pass through 0 while the decoder must stay in the graph.
        self.reconstructs = bool(w_masked or w_unmasked)
        self.requires = frozenset(self.contrastive.requires) | ({"reconstruction"} if self.reconstructs else set())

    def forward(self, outputs: dict[str, list[Tensor]], batch: Batch, progress: Progress) -> Loss:
        contrastive = self.contrastive(outputs, batch, progress)
        if not self.reconstructs:
            return contrastive
        errors = [
            self._errors(pred, view, None if masks is None else masks.mask.flatten(0, 1))
            for pred, view, masks in zip(outputs["reconstruction"], batch.views, batch.masks, strict=True)
        ]
        masked, unmasked = (sum(group) for group in zip(*errors, strict=True))
        reconstruction = Loss.weighted(
            reconstruction_masked=(masked, self.w_masked), reconstruction_unmasked=(unmasked, self.w_unmasked)
        )
        return Loss(
            contrastive.total + reconstruction.total,
            contrastive.terms | reconstruction.terms,
            contrastive.weights | reconstruction.weights,
        )

    def _errors(self, pred: Tensor, view: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Error over hidden and over visible patches: pred [B*N, L, P], view [B, C, H, W], mask bool [B*N, L]."""
        if mask is None:
            mask = torch.zeros(pred.shape[:2], dtype=torch.bool, device=pred.device)
        if self.in_pixels:
            deviation = self._deviation(view.device)
            if len(deviation) not in (1, view.shape[1]):
                raise UserError(
                    f"rec_unit=pixel: the source has {len(deviation)} channels and a view has {view.shape[1]}: use "
                    "rec_unit=standardised"
                )
            # Channels run fastest within a patch.
            pred, view = pred * deviation.repeat(pred.shape[2] // len(deviation)), view * deviation[:, None, None]
        masked, unmasked = ops.masked_patch_mse(pred, view, mask, self.norm_pix)
        if self.rec_reduce == "group":
            return masked, unmasked
        # From a mean over the group's patches to a mean over all of them.
        hidden = mask.to(masked.dtype).mean()
        masked, unmasked = masked * hidden, unmasked * (1 - hidden)
        if self.rec_reduce == "all":
            return masked, unmasked
        pixels = pred.shape[1] * pred.shape[2]
        return masked * pixels, unmasked * pixels

    def pixels(self, outputs: dict[str, list[Tensor]], batch: Batch) -> list[Tensor] | None:
        """The reconstruction; with norm_pix it gets back the mean and deviation of the view's own patches."""
        patches = super().pixels(outputs, batch)
        if patches is None or not self.norm_pix:
            return patches
        return [unstandardised(pred, view) for pred, view in zip(patches, batch.views, strict=True)]

    @property
    def pixels_note(self) -> str:
        return f"every patch is predicted, visible ones too{standardised_note(self.norm_pix)}"

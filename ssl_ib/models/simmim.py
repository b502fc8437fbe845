"""SimMIM: mask tokens enter the encoder, a linear head predicts the pixels (Xie et al., "SimMIM", CVPR 2022).

Masks are drawn on a grid of mask units: squares of several patches, 32 pixels wide in the paper.

Shapes: B images, N masks an image, U mask units of u x u pixels, K visible units, K' their patches, L patches, D0 width
of an embedded patch, L' positions of the final map, D its width, s pixels from one of them to the next, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.models import SwinTransformer
from torch import Tensor, nn

from .. import ops
from ..config.hints import PositiveInt
from ..config.registry import register_model
from ..errors import UserError
from ..part import ParamGroup, RunInfo
from ..types import Masks
from .encoder import Encoder, Pool
from .encoder_model import MaskedImageModel, check_final_norm, one_shape


@register_model("simmim")
class SimMIM(MaskedImageModel):
    """A Swin or vision transformer on all patches, the hidden ones replaced by a mask token, and a linear head.

    The N masks of an image share its patch embedding, and all masks are one batch of the encoder. Positions are
    learned: Swin's relative ones, or those that timm adds to a vision transformer's patches, hidden ones included. The
    head is a 1 x 1 convolution and a pixel shuffle; it is neither run nor trained where the criterion does not read the
    reconstruction.

    Gives `tokens` [B*N, L', D] (the final map, row by row, without class token), `visible` [B*N, K', D0] (the embedded
    patches of the visible units, unit by unit, without positions), `latents` [B, N, D] and `reconstruction`
    [B*N, U, u*u*C]; row b*N + n is mask n of image b.

    backbone, backbone_args: a SwinTransformer or a plain vision transformer of timm's. A Swin of timm's has stochastic
               depth unless drop_path_rate is 0, as it is in SimMIM.
    pool:      what stands for an image where a vision transformer is evaluated: the mean of the patches or the class
               token. A Swin's is the mean of its final map.
    z:         what stands for a mask's view in `latents`: the mean of the final map, or the class token.
    mask_unit: side of a mask unit in pixels.

    In the published weights `mask_token` is `encoder.mask_token` [1, 1, D0] and `decoder.0` is named as here.
    """

    def __init__(
        self,
        info: RunInfo,
        backbone: str = "swin_base_patch4_window7_224",
        backbone_args: dict[str, Any] | None = None,
        pool: Pool = "mean",
        z: Literal["cls", "mean"] = "mean",
        mask_unit: PositiveInt = 32,
    ):
        super().__init__()
        self.z, self.mask_unit = z, mask_unit
        shape = one_shape("simmim", info.view_shapes)
        self.encoder = Encoder(backbone, backbone_args or {}, shape, pool)
        timms = self.encoder.backbone
        if not (self.encoder.is_vit or isinstance(timms, SwinTransformer)):
            raise UserError(
                f"model 'simmim' needs a Swin or a plain vision transformer of timm's, and {backbone!r} is neither: "
                "choose one, such as backbone=vit_tiny_patch16_224"
            )
        if "cls" in (z, pool) and not (self.encoder.is_vit and timms.has_class_token):
            which = "z" if z == "cls" else "pool"
            raise UserError(f"{which}=cls needs a class token, and {backbone!r} has none: use {which}=mean")
        check_final_norm("simmim", self.encoder)
        self.patch_size: int = timms.patch_embed.patch_size[0]
        self.stride: int = self.patch_size if self.encoder.is_vit else timms.feature_info[-1]["reduction"]
        self.grid(shape)
        if not self.encoder.is_vit:
            check_windows(backbone, timms)
        embedded_width, width, pixels = timms.embed_dim, self.encoder.width, self.stride**2 * shape[0]
        # One dimension, as such parameters do not decay: SimMIM's does not either.
        self.mask_token = nn.Parameter(torch.empty(embedded_width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Sequential(nn.Conv2d(width, pixels, 1), nn.PixelShuffle(self.stride))
        self.widths = {
            "tokens": width,
            "visible": embedded_width,
            "latents": width,
            "reconstruction": mask_unit**2 * shape[0],
        }
        self.provides = self.wanted = frozenset(self.widths)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Mask units (rows, columns) of a view of shape [C, H, W].

        Raises UserError where a unit is not made of whole patches, or the view not of whole units and whole positions
        of the final map.
        """
        _, height, width = shape
        if self.mask_unit % self.patch_size:
            raise UserError(
                f"mask_unit={self.mask_unit} is not a multiple of the patch size {self.patch_size}: "
                f"use mask_unit={self.patch_size}, or backbone_args.patch_size={self.mask_unit}"
            )
        for what, side in (
            (f"mask units of {self.mask_unit}", self.mask_unit),
            (f"the backbone's total stride of {self.stride}", self.stride),
        ):
            if height % side or width % side:
                raise UserError(f"a view of {height} x {width} pixels is not a multiple of {what}: change views.size")
        return height // self.mask_unit, width // self.mask_unit

    def param_groups(self) -> Iterable[ParamGroup]:
        """All but the backbone's absolute positions and class token, and those, which do not decay, as published.

        Swin's relative position tables decay: the published code means to spare them, and its keyword matches none.
        """
        spared = {f"encoder.backbone.{name}" for name in self.backbone.no_weight_decay() if "relative" not in name}
        for group in super().param_groups():
            positions = [(n, p) for n, p in group.params if n in spared]
            yield replace(group, params=[(n, p) for n, p in group.params if n not in spared])
            if positions:
                yield ParamGroup("positions", positions, weight_decay=0.0)

    def outputs_of(self, view: Tensor, masks: Masks | None) -> dict[str, Tensor]:
        height, width = view.shape[2:]
        x = visible = self.encoder.patches(view)
        if masks is not None:
            keep = self._patches_of(masks.keep, (height // self.patch_size, width // self.patch_size))
            # Read once an image for all of its masks, then one row a mask.
            visible = ops.token_gather(x, keep.flatten(1)).unflatten(1, keep.shape[1:]).flatten(0, 1)
            x = ops.token_scatter(visible, keep.flatten(0, 1), self.mask_token, x.shape[1])
        prefix, tokens = self._encoded(x, (height, width))
        latents = prefix[:, 0] if self.z == "cls" else tokens.mean(dim=1)
        found = {"tokens": tokens, "visible": visible, "latents": latents.unflatten(0, (len(view), -1))}
        if "reconstruction" in self.wanted:
            final_map = tokens.transpose(1, 2).unflatten(2, (height // self.stride, width // self.stride))
            found["reconstruction"] = ops.patchify(self.decoder(final_map), self.mask_unit)
        return found

    def _patches_of(self, units: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patches of mask units: int64 [B, N, K] -> [B, N, K'], unit by unit, on a grid of patches."""
        side = self.mask_unit // self.patch_size
        number = torch.arange(grid[0] * grid[1], device=units.device).unflatten(0, grid)
        number = number.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)
        return number.flatten(2).flatten(0, 1)[units].flatten(2)

    def _encoded(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Prefix tokens [B*N, P, D] and final map [B*N, L', D], both normed, of embedded patches [B*N, L, D0]."""
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        if self.encoder.is_vit:
            x = self.encoder.encoded(self.encoder.placed(x, grid))
            num_prefix = self.encoder.num_prefix_tokens
        else:
            swin = self.encoder.backbone
            x = swin.norm(swin.layers(x.unflatten(1, grid))).flatten(1, 2)
            num_prefix = 0
        return x[:, :num_prefix], x[:, num_prefix:]


def check_windows(name: str, swin: SwinTransformer) -> None:
    """Raises UserError where a stage's windows do not tile its map: timm would fill up, and attend to, empty places."""
    for number, stage in enumerate(swin.layers):
        rows, columns = stage.output_resolution
        # As timm has them: no larger than the map.
        for window in {block.window_size for block in stage.blocks}:
            if rows % window[0] or columns % window[1]:
                raise UserError(
                    f"{name!r}: windows of {window[0]} x {window[1]} do not tile the {rows} x {columns} positions of "
                    f"stage {number}: change backbone_args.window_size or views.size"
                )

"""The masked autoencoder: encode the visible patches, decode all of them (He et al., "Masked Autoencoders", CVPR 2022).

Shapes: B images, N masks an image, K kept patches, L patches, P prefix tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config.hints import LayerCount, PositiveInt
from ..config.registry import register_model
from ..errors import UserError
from ..part import RunInfo
from ..types import Masks
from . import official
from .decoder import PatchDecoder
from .encoder import Encoder, Pool
from .encoder_model import MaskedImageModel, check_final_norm, one_shape


@register_model("mae")
class MAE(MaskedImageModel):
    """A vision transformer over the visible patches of each mask, and a small one that reconstructs every patch.

    The N masks of an image share its embedding: a patch is read and embedded once for each mask that shows it, all
    masks are one batch of the encoder, and one scatter makes the decoder's input. The decoder is neither run nor
    trained where the criterion does not read the reconstruction.

    Gives `tokens` [B*N, P + K, D], `visible` [B*N, K, D] (the visible patches as they enter the first block),
    `latents` [B, N, Dz] and `reconstruction` [B*N, L, p*p*C]; row b*N + n is mask n of image b.

    backbone, backbone_args: a plain vision transformer of timm's; its positions are fixed sines and cosines.
    pool:       what stands for an image where the encoder is evaluated: the class token or the mean of the patches.
    z:          what stands for a mask's view in `latents`: the class token, the mean of the visible patches, or all
                of them side by side ("flat": Dz = K D; which position a dimension belongs to then changes with the
                mask).
    decoder_*:  width, depth and heads of the decoder.
    checkpoint: weights to start from: a file of the official MAE, with its decoder or without (models/official.py).
    """

    def __init__(
        self,
        info: RunInfo,
        backbone: str = "vit_base_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        pool: Pool = "cls",
        z: Literal["cls", "mean", "flat"] = "cls",
        decoder_dim: PositiveInt = 512,
        decoder_depth: LayerCount = 8,
        decoder_heads: PositiveInt = 16,
        checkpoint: str | None = None,
    ):
        super().__init__()
        self.z = z
        shape = one_shape("mae", info.view_shapes)
        self.encoder = Encoder(backbone, backbone_args or {}, shape, pool)
        if not self.encoder.is_vit:
            raise UserError(
                f"model 'mae' needs a plain vision transformer of timm's, and {backbone!r} is none: "
                "choose one, such as backbone=vit_tiny_patch16_224"
            )
        self.encoder.fix_positions()
        if z == "cls" and not self.encoder.backbone.has_class_token:
            raise UserError(f"z=cls needs a class token, and {backbone!r} has none: use z=mean")
        check_final_norm("mae", self.encoder)
        if not self.encoder.pretrained:
            initialise(self.encoder.backbone)
        grid, width = self.encoder.grid(shape), self.encoder.width
        patch_dim = self.encoder.patch_size**2 * shape[0]
        self.decoder = PatchDecoder(
            width, grid, patch_dim, decoder_dim, decoder_depth, decoder_heads, self.encoder.num_prefix_tokens
        )
        if checkpoint is not None:
            official.load(self, checkpoint)
            self.encoder.pretrained = True
        num_kept = (info.masks(grid) or (1, grid[0] * grid[1]))[1]
        self.widths = {
            "tokens": width,
            "visible": width,
            "latents": num_kept * width if z == "flat" else width,
            "reconstruction": patch_dim,
        }
        self.provides = self.wanted = frozenset(self.widths)

    def outputs_of(self, view: Tensor, masks: Masks | None) -> dict[str, Tensor]:
        keep = None if masks is None else masks.keep
        embedded = self.encoder.embedded(view, keep)
        tokens = self.encoder.encoded(embedded)
        found = {
            "tokens": tokens,
            "visible": embedded[:, self.encoder.num_prefix_tokens :],
            "latents": self._latents(tokens).unflatten(0, (len(view), -1)),
        }
        if "reconstruction" in self.wanted:
            found["reconstruction"] = self.decoder(tokens, None if keep is None else keep.flatten(0, 1))
        return found

    def _latents(self, tokens: Tensor) -> Tensor:
        """One vector a mask: tokens [B*N, P + K, D] -> [B*N, Dz]."""
        if self.z == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        return patches.mean(dim=1) if self.z == "mean" else patches.flatten(1)


@torch.no_grad()
def initialise(vit: nn.Module) -> None:
    """MAE's start of a vision transformer: Xavier-uniform matrices (the patch projection as one), N(0, .02) tokens."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)

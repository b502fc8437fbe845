"""MRCL: any contrastive model with a decoder that reconstructs its masked views.

Shapes: B batch, N masks an image, L patches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config.hints import LayerCount, PositiveInt
from ..config.registry import register_model
from ..errors import UserError
from ..part import Model, RunInfo
from ..types import Batch
from .decoder import PatchDecoder
from .encoder_model import one_shape
from .siamese import Siamese


@register_model("mrcl")
class MRCL(Model):
    """The contrastive model's outputs, and `reconstruction` [B*N, L, p*p*C] of each view.

    contrastive:   a model that gives `tokens` of a vision transformer as `encoder` (default: siamese's defaults).
    decoder_*:     MAE's decoder. The defaults are 26.0 million parameters, the difference of the sizes MRCL reports.

    Where the criterion does not read the reconstruction, the decoder is neither run nor trained.
    """

    def __init__(
        self,
        info: RunInfo,
        contrastive: Model | None = None,
        decoder_dim: PositiveInt = 512,
        decoder_depth: LayerCount = 8,
        decoder_heads: PositiveInt = 16,
    ):
        super().__init__()
        self.contrastive = contrastive if contrastive is not None else Siamese(info)
        if "tokens" not in self.contrastive.provides:
            raise UserError(
                "model 'mrcl' needs a contrastive model that gives 'tokens' (siamese with a vision transformer does); "
                f"{type(self.contrastive).__name__} gives {', '.join(sorted(self.contrastive.provides))}: choose a "
                "vision transformer, such as contrastive.backbone=vit_tiny_patch16_224"
            )
        encoder, shape = self.contrastive.encoder, one_shape("mrcl", info.view_shapes)
        self.decoder = PatchDecoder(
            encoder.width,
            encoder.grid(shape),
            encoder.patch_size**2 * shape[0],
            decoder_dim,
            decoder_depth,
            decoder_heads,
            encoder.num_prefix_tokens,
        )
        self.widths = {**self.contrastive.widths, "reconstruction": encoder.patch_size**2 * shape[0]}
        self.provides = self.wanted = self.contrastive.provides | {"reconstruction"}

    @property
    def backbone(self) -> nn.Module:
        return self.contrastive.backbone

    def select(self, names) -> None:
        super().select(names)
        reconstructs = "reconstruction" in self.wanted
        self.contrastive.select(self.wanted - {"reconstruction"} | ({"tokens"} if reconstructs else set()))
        self.decoder.requires_grad_(reconstructs)

    def forward(self, batch: Batch) -> dict[str, list[Tensor]]:
        outputs = self.contrastive(batch)
        if "reconstruction" in self.wanted:
            keeps = [None if masks is None else masks.keep.flatten(0, 1) for masks in batch.masks]
            outputs["reconstruction"] = [self.decoder(t, k) for t, k in zip(outputs["tokens"], keeps, strict=True)]
        return outputs

    def encode(self, images: Tensor) -> Tensor:
        return self.contrastive.encode(images)

    def feature_maps(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        return self.contrastive.feature_maps(images, layers)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        return self.contrastive.grid(shape)

    def export(self) -> tuple[str, dict[str, Any]] | None:
        return self.contrastive.export()

    def trained_encoders(self) -> list[nn.Module]:
        return self.contrastive.trained_encoders()

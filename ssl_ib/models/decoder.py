"""MAE's decoder: from visible tokens to the pixels of every patch (He et al., CVPR 2022).

Shapes: G rows (images times masks), L patches, K kept, P prefix tokens, D encoder width, d decoder width.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .. import ops
from ..errors import UserError
from .positions import sincos_positions


class PatchDecoder(nn.Module):
    """Linear D -> d, mask tokens put in, fixed positions added, `depth` blocks, LayerNorm, linear -> p*p*C.

    Raises UserError where `width` is divisible neither by 4 (positions) nor by `heads`.
    """

    def __init__(
        self, in_width: int, grid: tuple[int, int], patch_dim: int, width: int, depth: int, heads: int, prefix: int
    ):
        super().__init__()
        if width % heads or width % 4:
            raise UserError(f"decoder_dim must be divisible by 4 and by decoder_heads={heads}, got {width}")
        self.num_patches, self.num_prefix_tokens = grid[0] * grid[1], prefix
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        positions = torch.cat([torch.zeros(prefix, width), sincos_positions(width, grid)])
        self.register_buffer("positions", positions, persistent=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = [Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        self.blocks, self.norm = nn.Sequential(*blocks), norm(width)
        self.predict = nn.Linear(width, patch_dim)
        self.apply(self._initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        """tokens [G, P + K, D], keep int64 [G, K] or None (all patches, in order) -> [G, L, p*p*C]."""
        x = self.embed(tokens)
        if keep is None:
            x = x + self.positions.to(x.dtype)
        else:
            x = ops.token_scatter(
                x, keep, self.mask_token, self.num_patches, pos=self.positions, num_prefix=self.num_prefix_tokens
            )
        x = self.norm(self.blocks(x))
        return self.predict(x[:, self.num_prefix_tokens :])

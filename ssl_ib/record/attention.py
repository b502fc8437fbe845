"""Where a vision transformer's class token looks: the attention of its last block.

Shapes: B images, P prefix tokens (the class token first), L patches, h heads.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn


def has_class_attention(backbone: nn.Module | None) -> bool:
    """Whether `class_attention` can say something of a backbone: timm's plain ViT with a class token."""
    return (
        isinstance(backbone, VisionTransformer)
        and backbone.has_class_token
        and type(backbone.blocks[-1].attn) is Attention
    )


@torch.no_grad()
def class_attention(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """How much each head of the last block attends from the class token to each patch.

    images [B, 3, H, W], normalised, in the backbone's own size -> [B, h, rows, columns]; over the patches and the
    prefix tokens together a head's weights add up to 1, so over the patches alone to at most 1. Source: DINO, figure 1.
    """
    attention, seen = backbone.blocks[-1].attn, []
    handle = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        backbone.forward_features(images)
    finally:
        handle.remove()
    (x,) = seen
    qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    weights = (q[:, :, :1].float() @ k.float().mT * attention.scale).softmax(dim=-1)
    patches = weights[:, :, 0, backbone.num_prefix_tokens :]
    side = backbone.patch_embed.patch_size
    return patches.unflatten(2, (images.shape[2] // side[0], images.shape[3] // side[1]))

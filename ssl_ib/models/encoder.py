"""A timm backbone as every model here uses it: on all patches of a view, or on its visible ones alone.

Shapes: B images, L patches, K kept, P prefix tokens (class, registers), D width.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Any, Literal

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import VisionTransformer, get_pretrained_cfg_value
from torch import Tensor, nn

from .. import ops
from ..errors import UserError, nearest
from ..record.backbone import check_reachable, check_sizes, create, pooling, without_origins
from .positions import sincos_positions

Pool = Literal["cls", "mean"]


class Encoder(nn.Module):
    """A timm backbone without its classifier.

    name, arguments: as for `timm.create_model`, and `stem: cifar` for a ResNet of small images (record/backbone.py);
                     the image size is set from `shape` where the model takes one.
    shape:           [C, H, W] of a view.
    pool:            what stands for the image in a vision transformer: the class token or the mean of the patches.
    positions:       "learned" (timm's) or "sincos" (fixed, in MAE's layout).

    is_vit says whether it is timm's plain vision transformer, with positions added to its patches: only that can be
    masked and gives tokens. Others, distilled and hybrid ones among them, are run as timm runs them.

    Raises UserError for a name or argument timm does not take, or a view that it cannot read.
    """

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        shape: tuple[int, int, int],
        pool: Pool = "cls",
        positions: Literal["learned", "sincos"] = "learned",
    ):
        super().__init__()
        self.name, self.pool = name, pool
        channels, height, width = self._image(shape)
        if arguments.get("in_chans", channels) != channels:
            raise UserError(
                f"backbone_args.in_chans={arguments['in_chans']}, and the views have {channels} channels: leave it out"
            )
        self.channels = channels
        self.arguments = {"num_classes": 0, "in_chans": channels, **arguments}
        self.backbone = self._create(height, width)
        self.is_vit = (
            type(self.backbone) is VisionTransformer
            and isinstance(self.backbone.patch_embed, PatchEmbed)
            and self.backbone.pos_embed is not None
        )
        self.width: int = self.backbone.head_hidden_size
        self.num_prefix_tokens: int = self.backbone.num_prefix_tokens if self.is_vit else 0
        self.patch_size: int | None = self.backbone.patch_embed.patch_size[0] if self.is_vit else None
        if self.is_vit:
            # Views of other sizes are welcome: `tokens` resamples the positions.
            self.backbone.patch_embed.strict_img_size = False
            self.grid(shape)
            if pool == "cls" and not self.backbone.has_class_token:
                raise UserError(f"pool=cls needs a class token, and {name!r} has none: use pool=mean")
            self._pool_as_evaluated()
            if positions == "sincos":
                self.fix_positions()
        elif positions == "sincos":
            raise UserError(f"positions=sincos needs a vision transformer, and {name!r} is none: use positions=learned")
        else:
            self.check(shape)

    def _create(self, height: int, width: int) -> nn.Module:
        if not timm.is_model(self.name):
            alike = get_close_matches(self.name, timm.list_models(), n=20, cutoff=0.4)
            raise UserError(f"timm has no backbone {self.name!r}{nearest(self.name, alike)}")
        arguments = dict(self.arguments)
        check_sizes(arguments, "backbone_args")
        if get_pretrained_cfg_value(self.name, "fixed_input_size"):
            arguments.setdefault("img_size", (height, width) if height != width else height)
        if arguments.get("pretrained"):
            check_reachable(self.name)
        try:
            backbone = create(self.name, arguments)
        except UserError:
            raise
        except Exception as error:  # timm takes whatever it is given, and may fail anywhere.
            patch = arguments.get("patch_size")
            if isinstance(patch, int) and patch > 0 and (height % patch or width % patch):
                raise self._indivisible(height, width, patch) from None
            raise UserError(
                f"timm could not build {self.name!r} with {arguments}: {str(error) or type(error).__name__}"
            ) from None
        self.pretrained = bool(arguments.get("pretrained") or arguments.get("checkpoint_path"))
        self.arguments = without_origins(arguments)
        return backbone

    def _pool_as_evaluated(self) -> None:
        """Has timm's own forward give what `pooled` gives, here and where the backbone is rebuilt."""
        vit, pool = self.backbone, "token" if self.pool == "cls" else "avg"
        if (vit.global_pool, vit.num_classes) != (pool, 0):
            vit.reset_classifier(0, pool)
            self.arguments |= pooling(vit)

    @staticmethod
    def _indivisible(height: int, width: int, patch: int, others: tuple[int, ...] = ()) -> UserError:
        """others: sides of the views besides, which the patches have to divide too."""
        side = math.gcd(height, width, *others)
        fits = [size for size in range(2, min(patch, side // 2 + 1)) if side % size == 0]
        smaller = f"use backbone_args.patch_size={fits[-1]}, or " if fits else ""
        return UserError(
            f"a view of {height} x {width} pixels cannot be cut into patches of {patch}: {smaller}change the size of "
            "the views (views.size, and views.local_size of local crops)"
        )

    def _image(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The shape, where it is an image's. Raises UserError where it is not."""
        if len(shape) != 3:
            raise UserError(f"backbone {self.name!r} reads views [C, H, W], and this one is {list(shape)}")
        return shape

    @torch.no_grad()
    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UserError where the backbone cannot read a view of this shape."""
        self._image(shape)
        self._check_channels(shape[0])
        if self.is_vit:
            self.grid(shape)
            return
        try:
            self.backbone.eval()(torch.zeros(1, *shape))
        except UserError:
            raise
        except Exception as error:  # timm builds what it cannot run: a ResNet of three stages, say.
            raise UserError(
                f"{self.name!r} cannot read a view of {shape[1]} x {shape[2]} pixels ({error}): choose larger views "
                "(views.size, and views.local_size of local crops), another backbone, or other backbone_args"
            ) from None
        finally:
            self.backbone.train()

    def _check_channels(self, channels: int) -> None:
        if channels != self.channels:
            raise UserError(
                f"backbone {self.name!r} reads views of {self.channels} channels, and this one has {channels}"
            )

    def fix_positions(self) -> None:
        """Replaces learned positions by fixed sines and cosines; those of pretrained weights stay, and are fixed too.

        Raises UserError where the width is not 4 x n.
        """
        if self.width % 4:
            raise UserError(f"positions=sincos needs a width divisible by 4, and {self.name!r} has {self.width}")
        table = self.backbone.pos_embed
        table.requires_grad_(False)
        if self.pretrained:
            # The weights were trained with their own.
            return
        positions = sincos_positions(self.width, self.backbone.patch_embed.grid_size)
        prefix = table.shape[1] - len(positions)
        with torch.no_grad():
            table.copy_(torch.cat([positions.new_zeros(prefix, self.width), positions])[None])

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Patches (rows, columns) of a view of shape [C, H, W]; None without patches.

        Raises UserError where the patches do not divide the view.
        """
        if not self.is_vit or len(shape) != 3:
            return None
        _, height, width = shape
        if height % self.patch_size or width % self.patch_size:
            raise self._indivisible(height, width, self.patch_size, self.backbone.patch_embed.img_size)
        return height // self.patch_size, width // self.patch_size

    def _embedding(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Positions of the patches [L, D] and the prefix tokens with theirs [P, D]."""
        vit = self.backbone
        tokens = [t for t in (vit.cls_token, vit.reg_token) if t is not None]
        prefix = torch.cat(tokens, dim=1)[0] if tokens else vit.pos_embed.new_zeros(0, self.width)
        num_positions = 0 if vit.no_embed_class else len(prefix)
        table = vit.pos_embed
        own = vit.patch_embed.grid_size
        if grid != tuple(own):
            table = resample_abs_pos_embed(table, list(grid), list(own), num_prefix_tokens=num_positions)
        if num_positions:
            prefix = prefix + table[0, :num_positions]
        return table[0, num_positions:], prefix

    def embedded(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """What enters the first block of a vision transformer: images [B, C, H, W] -> [B, P + K, D].

        keep int64 [B, K], [B, N, K] or None (all patches). Hidden patches are not embedded. An image with N masks
        becomes N rows, one after the other, and is read once for all of them.
        """
        vit = self.backbone
        positions, prefix = self._embedding(self.grid(images.shape[1:]))
        embed = vit.patch_embed
        num_masks = keep.shape[1] if keep is not None and keep.ndim == 3 else 1
        keep = None if keep is None else keep.flatten(1)
        # Some (CLIP's) have no bias here, or a norm.
        plain = type(embed) is PatchEmbed and isinstance(embed.norm, nn.Identity) and embed.proj.bias is not None
        if keep is not None and plain:
            # The kernel puts the prefix in front of an image's tokens, which is the place while they are one row.
            in_front = prefix if num_masks == 1 else None
            x = ops.patch_embed_gather(images, keep, embed.proj.weight, embed.proj.bias, positions, in_front)
        else:
            in_front = None
            x = self.patches(images)
            x = x + positions.to(x.dtype)
            x = x if keep is None else ops.token_gather(x, keep)
        if in_front is None:
            x = x.unflatten(1, (num_masks, -1)).flatten(0, 1)
            x = torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return vit.norm_pre(vit.pos_drop(x))

    def patches(self, images: Tensor) -> Tensor:
        """The patch embedding alone, of a vision transformer or a Swin: images [B, C, H, W] -> [B, L, D]."""
        x = self.backbone.patch_embed(images)
        return x.flatten(1, 2) if x.ndim == 4 else x

    def placed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """`embedded` from where `patches` ends, for all patches of a grid: [G, L, D] -> [G, P + L, D]."""
        positions, prefix = self._embedding(grid)
        x = patches + positions.to(patches.dtype)
        x = torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return self.backbone.norm_pre(self.backbone.pos_drop(x))

    def encoded(self, x: Tensor) -> Tensor:
        """The blocks of a vision transformer and its final norm: [B, P + K, D] -> [B, P + K, D]."""
        for block in self.backbone.blocks:
            x = block(x)
        return self.backbone.norm(x)

    def tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Final-norm tokens of a vision transformer: `embedded`, then `encoded`. Hidden patches cost nothing."""
        return self.encoded(self.embedded(images, keep))

    def pooled(self, tokens: Tensor) -> Tensor:
        """What stands for the image: tokens [B, P + K, D] -> [B, D]."""
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return self.backbone.fc_norm(pooled)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """Tokens (None for a backbone that has none) and the features [B, D], or [B*N, D] of N masks an image."""
        self._check_channels(images.shape[1])
        if self.is_vit:
            tokens = self.tokens(images, keep)
            return tokens, self.pooled(tokens)
        if keep is not None:
            raise UserError(f"masking needs a vision transformer, and {self.name!r} is none: use masker=none")
        return None, self.backbone(images)

    def feature_maps(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """Spatial features of the given layers, each [B, D, h, w]."""
        return self.backbone.forward_intermediates(
            images, indices=layers, intermediates_only=True, output_fmt="NCHW", norm=False
        )

    def freeze_patch_embed(self) -> None:
        """Leaves the patch projection as it starts (MoCo v3's remedy for unstable training, section 4.2).

        Pretrained weights stay. A random start is the published code's: weights uniform within
        sqrt(6 / (fan in + fan out)), so of deviation 0.036 for ViT-B/16, and no bias.
        """
        if not self.is_vit:
            raise UserError(
                f"freeze_patch_embed=true needs a vision transformer, and {self.name!r} is none: "
                "use freeze_patch_embed=false"
            )
        projection = self.backbone.patch_embed.proj
        if not self.pretrained:
            nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        self.backbone.patch_embed.requires_grad_(False)

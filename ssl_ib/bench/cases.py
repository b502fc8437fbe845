"""What is measured: an op on a shape, its inputs, its work, and the other ways to do the same.

Shapes: B images, L patches, K kept tokens or prototypes, D width, p patch side, P prefix tokens, N rows, M columns,
d embedding; "256 px -> 224 px": sides of images and of views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.pixels.levels import Operations
from ..ops.views import Parameters, Steps
from . import baselines

#: What most recipes do to a view.
_STRONG = ("jitter", "grey", "blur", "solarise")


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    draw:      (seeded generator, dtype) -> the inputs, of which the first `leaves` get gradients, if any.
    call:      the op on the inputs; answers a tensor or a tuple, all of them differentiated.
    work:      the op's size, as the choice of a backend counts it.
    flops:     of forward and backward together, as mathematics counts them.
    moved:     bytes that forward and backward must read or write at least, for 2-byte numbers.
    unfused:   bytes that an implementation holds which keeps the logits or the patches, for float32.
    others:    name -> the same answer by other means.
    """

    op: str
    shape: str
    draw: Callable[[torch.Generator, torch.dtype], tuple[Any, ...]]
    leaves: int
    call: Callable[..., Any]
    work: int
    flops: float
    moved: float
    unfused: float
    others: dict[str, Callable] = field(default_factory=dict)


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def _unit(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return F.normalize(_normal(generator, torch.float32, *shape), dim=-1).to(dtype)


def _keep(generator: torch.Generator, batch: int, num_tokens: int, kept: int) -> Tensor:
    noise = torch.rand(batch, num_tokens, generator=generator, device=generator.device)
    return noise.argsort(dim=1)[:, :kept].sort(dim=1).values


def token_gather(batch: int, num_tokens: int, kept: int, width: int) -> Case:
    def draw(g, dtype):
        return _normal(g, dtype, batch, num_tokens, width), _keep(g, batch, num_tokens, kept)

    return Case(
        "token_gather",
        f"B={batch} L={num_tokens} K={kept} D={width}",
        draw,
        1,
        ops.token_gather,
        batch * kept * width,
        0.0,
        2.0 * batch * width * (3 * kept + num_tokens),
        4.0 * batch * width * (num_tokens + 3 * kept),
        {"mae": baselines.mae_gather},
    )


def token_scatter(batch: int, num_tokens: int, kept: int, width: int) -> Case:
    def draw(g, dtype):
        latents = _normal(g, dtype, batch, 1 + kept, width)
        mask_token, pos = _normal(g, torch.float32, width), _normal(g, torch.float32, 1 + num_tokens, width)
        return latents, mask_token, pos, _keep(g, batch, num_tokens, kept)

    return Case(
        "token_scatter",
        f"B={batch} L={num_tokens} K={kept} D={width}",
        draw,
        3,
        lambda latents, mask, pos, keep: ops.token_scatter(latents, keep, mask, num_tokens, pos, num_prefix=1),
        batch * (1 + num_tokens) * width,
        0.0,
        4.0 * batch * width * (num_tokens + kept + 2),
        12.0 * batch * width * num_tokens,
        {"mae": baselines.mae_scatter},
    )


def patch_embed_gather(batch: int, image: int, side: int, kept: int, width: int) -> Case:
    num_patches = (image // side) ** 2

    def draw(g, dtype):
        weight = _normal(g, dtype, width, 3, side, side) / (3 * side * side) ** 0.5
        rest = _normal(g, torch.float32, width), _normal(g, torch.float32, num_patches, width)
        return weight, *rest, _normal(g, dtype, batch, 3, image, image), _keep(g, batch, num_patches, kept)

    pixels = 3 * side * side
    return Case(
        "patch_embed_gather",
        f"B={batch} L={num_patches} K={kept} D={width} p={side}",
        draw,
        3,
        lambda weight, bias, pos, images, keep: ops.patch_embed_gather(images, keep, weight, bias, pos),
        batch * kept * width,
        4.0 * batch * kept * pixels * width,
        4.0 * batch * kept * (pixels + width),
        8.0 * batch * num_patches * (pixels + width),
        {"embed_all": baselines.embed_all},
    )


def masked_patch_mse(batch: int, num_masks: int, image: int, side: int) -> Case:
    num_patches, pixels = (image // side) ** 2, 3 * side * side

    def draw(g, dtype):
        pred = _normal(g, dtype, batch * num_masks, num_patches, pixels)
        mask = torch.rand(batch * num_masks, num_patches, generator=g, device=g.device) < 0.75
        return pred, _normal(g, dtype, batch, 3, image, image), mask

    return Case(
        "masked_patch_mse",
        f"B={batch} N={num_masks} L={num_patches} p={side} norm_pix",
        draw,
        1,
        lambda pred, images, mask: ops.masked_patch_mse(pred, images, mask, norm_pix=True),
        batch * num_masks * num_patches * pixels,
        0.0,
        2.0 * batch * num_patches * pixels * (3 * num_masks + 2),
        16.0 * batch * num_masks * num_patches * pixels,
        {"mae": baselines.mae_loss},
    )


def nt_xent(rows: int, width: int, temperature: float, whole: bool = False) -> Case:
    """NT-Xent of unit rows; whole: with their normalisation, which lightly's loss does too."""
    given = {}

    def draw(g, dtype):
        given["labels"] = torch.arange(rows // 2, device=g.device).repeat(2)
        given["itself"] = torch.arange(rows, device=g.device)
        return ((_normal if whole else _unit)(g, dtype, rows, width),)

    def unit(z):
        return F.normalize(z, dim=1) if whole else z

    others = {"cross_entropy": lambda z: baselines.nt_xent(unit(z), temperature)}
    if whole:
        others = {"lightly": lambda z: baselines.lightly_nt_xent(z, temperature)} | others
    return Case(
        "info_nce",
        f"NT-Xent N={rows} d={width} tau={temperature}" + (" normalised" if whole else ""),
        draw,
        1,
        lambda z: ops.info_nce(unit(z), None, given["labels"], None, temperature, given["itself"]),
        rows * rows,
        6.0 * rows * rows * width,
        10.0 * rows * width,
        12.0 * rows * rows,
        others,
    )


def one_way(rows: int, cols: int, width: int, temperature: float) -> Case:
    labels = {}

    def draw(g, dtype):
        labels["rows"] = torch.arange(rows, device=g.device) % cols
        labels["cols"] = torch.arange(cols, device=g.device)
        return _unit(g, dtype, rows, width), _unit(g, dtype, cols, width)

    return Case(
        "info_nce",
        f"one way N={rows} M={cols} d={width} tau={temperature}",
        draw,
        2,
        lambda q, k: ops.info_nce(q, k, labels["rows"], labels["cols"], temperature),
        rows * cols,
        8.0 * rows * cols * width,
        6.0 * (rows + cols) * width,
        12.0 * rows * cols,
        {
            "cross_entropy": lambda q, k: F.cross_entropy(q @ k.T / temperature, labels["rows"], reduction="none"),
            "inf_cl": lambda q, k: baselines.inf_cl(q, k, labels["rows"], temperature),
            "cut_cross_entropy": lambda q, k: baselines.cut_cross_entropy(q, k, labels["rows"], temperature),
            "liger": lambda q, k: baselines.liger(q, k, labels["rows"], temperature),
        },
    )


def queue(rows: int, cols: int, width: int, temperature: float) -> Case:
    """As MoCo uses it: every query has one key, all share the queue, and only the queries get gradients."""
    return Case(
        "info_nce",
        f"queue N={rows} M={cols} d={width} tau={temperature}",
        lambda g, dtype: tuple(_unit(g, dtype, n, width) for n in (rows, rows, cols)),
        1,
        lambda q, k, negatives: ops.info_nce(q, negatives, None, None, temperature, own=k),
        rows * cols,
        4.0 * rows * cols * width,
        2.0 * (4 * rows + cols) * width,
        12.0 * rows * cols,
        {"cross_entropy": lambda q, k, negatives: baselines.moco(q, k, negatives, temperature)},
    )


def gmm_lse(rows: int, prototypes: int, width: int, tau: float) -> Case:
    return Case(
        "gmm_lse",
        f"N={rows} K={prototypes} d={width} tau={tau}",
        lambda g, dtype: (_unit(g, dtype, rows, width), _unit(g, dtype, prototypes, width)),
        2,
        lambda x, c: ops.gmm_lse(x, c, tau),
        rows * prototypes,
        8.0 * rows * prototypes * width,
        6.0 * (rows + prototypes) * width,
        12.0 * rows * prototypes,
    )


def gmm_posterior(rows: int, prototypes: int, width: int, tau: float) -> Case:
    """As a student-teacher loss uses it: the teacher's rows are constants, so is p in the mean; gradients go to c.

    Four products: the forward's logits and mean, and the backward's logits and values. The entropy, of which a gradient
    would take a fifth, is not asked for.
    """
    return Case(
        "gmm_posterior",
        f"N={rows} K={prototypes} d={width} tau={tau}",
        lambda g, dtype: (_unit(g, dtype, prototypes, width), _unit(g, dtype, rows, width)),
        1,
        lambda c, t: ops.gmm_posterior(t, c, tau, detach_p=True, marginal=False)[0],
        rows * prototypes,
        8.0 * rows * prototypes * width,
        6.0 * (rows + prototypes) * width,
        16.0 * rows * prototypes,
    )


def gmm_assign(rows: int, prototypes: int, width: int) -> Case:
    def draw(g, dtype):
        shapes = (rows, width), (prototypes, width), (rows, width)
        return tuple(_unit(g, dtype, *shape) for shape in shapes)

    return Case(
        "gmm_assign",
        f"N={rows} K={prototypes} d={width}",
        draw,
        2,
        lambda s, c, t: ops.gmm_assign(s, t, c, 0.1, 0.04, detach_p=True),
        rows * prototypes,
        18.0 * rows * prototypes * width,
        6.0 * (2 * rows + prototypes) * width,
        28.0 * rows * prototypes,
    )


def augment(batch: int, image: int, size: int, *operations: str) -> Case:
    """A view of uint8 images of image x image pixels: a bicubic crop of about half of each, and these operations."""
    names = ("invert", "posterize", "solarize", "colour") if "rand_augment" in operations else ()
    steps = Steps(size, operations, "bicubic", min(max(1, size // 20), size - 1), names)

    def draw(g, dtype):
        def uniform(low, high, *shape):
            return (low + (high - low) * torch.rand(*shape, generator=g, device=g.device)).cpu()

        images = torch.randint(0, 256, (batch, 3, image, image), generator=g, device=g.device, dtype=torch.uint8)
        extent = uniform(0.5, 1.0, batch, 2).mul(image).long().clamp(min=1)
        corner = (uniform(0.0, 1.0, batch, 2) * (image - extent + 1)).long()
        factors = torch.cat([uniform(0.2, 1.8, batch, 3), uniform(-0.2, 0.2, batch, 1)], dim=1)
        jittered = uniform(0.0, 1.0, batch, 1) < 0.8
        order = uniform(0.0, 1.0, batch, 4).argsort(dim=1)
        fires = uniform(0.0, 1.0, batch, 2) < 0.5
        chosen = (uniform(0.0, 1.0, batch, 2) * max(len(names), 1)).long()
        drawn = Parameters(
            torch.cat([corner, extent], dim=1),
            uniform(0.0, 1.0, batch) < 0.5,
            torch.where(jittered, factors, torch.tensor([1.0, 1.0, 1.0, 0.0])),
            order,
            uniform(0.0, 1.0, batch) < 0.2,
            uniform(0.1, 2.0, batch) * (uniform(0.0, 1.0, batch) < 0.5),
            uniform(0.0, 1.0, batch) < 0.2,
            Operations(torch.where(fires, chosen, -1), uniform(1.0, 1.9, batch, 2).double(), fires & False),
        )
        mean, std = (torch.full((3,), x, device=g.device) for x in (0.45, 0.25))
        return images, drawn, mean, std, dtype

    pixels = 3.0 * batch * size**2
    return Case(
        "augment",
        f"B={batch} {image} px -> {size} px {' '.join(operations) or 'crop alone'}",
        draw,
        0,
        lambda images, drawn, mean, std, dtype: ops.augment(images, steps, drawn, mean, std, dtype),
        round(pixels),
        0.0,
        # Of the images what the mean crop reads.
        0.5625 * 3 * batch * image**2 + 2 * pixels,
        40.0 * pixels,
    )


def cases(size: str) -> list[Case]:
    """The shapes of a size: "quick" takes seconds, "cpu" minutes on two cores; "cuda" and "goals" are for a GPU."""
    if size == "quick":
        return [
            token_gather(16, 64, 16, 96),
            token_scatter(16, 64, 16, 96),
            patch_embed_gather(16, 32, 4, 16, 96),
            masked_patch_mse(16, 1, 32, 4),
            nt_xent(512, 64, 0.1, whole=True),
            one_way(300, 500, 64, 0.1),
            queue(32, 4096, 64, 0.1),
            gmm_lse(128, 2048, 64, 0.1),
            gmm_posterior(128, 2048, 64, 0.04),
            gmm_assign(128, 2048, 64),
            augment(8, 40, 32, "jitter", "grey", "blur", "solarise", "rand_augment"),
        ]
    if size == "cpu":
        return [
            token_gather(256, 196, 49, 384),
            token_scatter(256, 196, 49, 512),
            patch_embed_gather(64, 224, 16, 49, 384),
            patch_embed_gather(256, 32, 4, 16, 192),
            masked_patch_mse(64, 1, 224, 16),
            masked_patch_mse(64, 4, 32, 4),
            nt_xent(2048, 128, 0.1, whole=True),
            nt_xent(16384, 128, 0.1, whole=True),
            one_way(4096, 4096, 128, 0.2),
            queue(256, 65536, 128, 0.15),
            gmm_lse(1024, 65536, 256, 0.1),
            gmm_posterior(1024, 65536, 256, 0.04),
            gmm_assign(1024, 65536, 256),
            augment(256, 40, 32, "jitter", "grey"),
        ]
    if size == "goals":
        return [
            token_gather(1024, 196, 49, 768),
            patch_embed_gather(1024, 224, 16, 49, 768),
            token_scatter(1024, 196, 49, 512),
            one_way(8192, 8192, 256, 0.1),
            one_way(32768, 32768, 256, 0.1),
            nt_xent(32768, 256, 0.1),
            gmm_lse(6144, 65536, 256, 0.1),
            gmm_posterior(6144, 65536, 256, 0.04),
            augment(256, 256, 224, *_STRONG),
        ]
    grid = [(batch, kept, width) for batch in (256, 1024) for kept in (49, 98) for width in (384, 768, 1024)]
    mixtures = [(rows, prototypes) for rows in (1024, 6144, 16384) for prototypes in (4096, 65536)]
    return [
        *(token_gather(batch, 196, kept, width) for batch, kept, width in grid),
        *(token_scatter(batch, 196, 49, 512) for batch in (256, 1024)),
        *(patch_embed_gather(batch, 224, 16, kept, width) for batch, kept, width in grid),
        masked_patch_mse(1024, 1, 224, 16),
        masked_patch_mse(256, 4, 224, 16),
        *(nt_xent(rows, width, 0.1) for rows in (2048, 8192, 32768) for width in (128, 256)),
        nt_xent(65536, 256, 0.1),
        nt_xent(8192, 128, 0.1, whole=True),
        *(nt_xent(8192, 256, tau) for tau in (0.04, 0.5)),
        *(one_way(rows, rows, 256, 0.1) for rows in (8192, 32768)),
        one_way(4096, 65536 + 37, 128, 0.2),
        queue(256, 65536, 128, 0.15),
        *(gmm_lse(rows, prototypes, 256, 0.1) for rows, prototypes in mixtures),
        *(gmm_posterior(rows, prototypes, 256, 0.04) for rows, prototypes in mixtures),
        gmm_assign(6144, 65536, 256),
        augment(256, 256, 224),
        augment(256, 256, 224, "jitter", "grey"),
        augment(256, 256, 224, *_STRONG),
        augment(256, 256, 96, *_STRONG),
        augment(256, 500, 224, *_STRONG),
        augment(4096, 32, 32, "jitter", "grey"),
    ]

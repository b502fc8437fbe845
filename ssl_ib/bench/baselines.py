"""The same answers by other means: as one writes them without a kernel, and by public packages where installed.

A package that is missing, or that refuses the inputs, raises `Unsupported`, which the table prints.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor


class Unsupported(Exception):
    """This contender cannot do it; the message says why."""


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unsupported("not installed") from None


def mae_gather(x: Tensor, keep: Tensor) -> Tensor:
    """Visible tokens as MAE's code takes them: an int64 index repeated over the width."""
    return torch.gather(x, 1, keep[..., None].expand(-1, -1, x.shape[2]).contiguous())


def mae_scatter(latents: Tensor, mask_token: Tensor, pos: Tensor, keep: Tensor) -> Tensor:
    """A decoder's input as MAE's code makes it: mask tokens, cat, unshuffle by a repeated index, class token, add."""
    batch, kept = keep.shape
    num_tokens, width = pos.shape[0] - 1, latents.shape[2]
    hidden = torch.ones(batch, num_tokens, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
    shuffle = torch.cat([keep, hidden.nonzero()[:, 1].view(batch, -1)], dim=1)
    restore = shuffle.argsort(dim=1)
    blank = mask_token.to(latents.dtype).repeat(batch, num_tokens - kept, 1)
    tokens = torch.cat([latents[:, 1:], blank], dim=1)
    tokens = torch.gather(tokens, 1, restore[..., None].repeat(1, 1, width))
    return torch.cat([latents[:, :1], tokens], dim=1) + pos.to(latents.dtype)


def embed_all(weight: Tensor, bias: Tensor, pos: Tensor, images: Tensor, keep: Tensor) -> Tensor:
    """Embeds every patch by the convolution, adds positions, and drops the hidden ones."""
    tokens = F.conv2d(images, weight, bias.to(weight.dtype), stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    tokens = tokens + pos.to(tokens.dtype)
    return torch.gather(tokens, 1, keep[..., None].expand(-1, -1, tokens.shape[2]))


def mae_loss(pred: Tensor, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """MAE's loss with normalised pixels, for hidden and for visible patches; targets are repeated for every mask."""
    batch, channels, height, width = images.shape
    side = round((pred.shape[2] / channels) ** 0.5)
    rows, columns = height // side, width // side
    target = images.reshape(batch, channels, rows, side, columns, side)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(batch, rows * columns, -1)
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = ((target - mean) / (var + 1e-6) ** 0.5).repeat_interleave(len(pred) // batch, dim=0)
    error = ((pred - target) ** 2).mean(dim=-1)
    return (error * mask).sum() / mask.sum(), (error * ~mask).sum() / (~mask).sum()


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent of unit rows by the whole matrix of logits and `cross_entropy`."""
    logits = z @ z.T / temperature
    logits.diagonal().fill_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(logits, partner, reduction="none")


def moco(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's loss as its code has it: the logits of key and queue side by side, and `cross_entropy`."""
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device), reduction="none")


def lightly_nt_xent(z: Tensor, temperature: float) -> Tensor:
    """lightly's NTXentLoss, a mean."""
    loss = _package("lightly.loss").NTXentLoss(temperature=temperature)
    return loss(*z.chunk(2))


def cut_cross_entropy(q: Tensor, k: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Apple's linear cross-entropy, without dropping small gradients."""
    if not q.is_cuda:
        raise Unsupported("runs on a GPU")
    package = _package("cut_cross_entropy")
    if q.dtype == torch.float32:
        raise Unsupported("takes 16-bit operands")
    scaled = q / temperature
    return package.linear_cross_entropy(scaled, k, labels, reduction="none", impl="cce_exact")


def inf_cl(q: Tensor, k: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Inf-CL's kernel, on one GPU."""
    if not q.is_cuda:
        raise Unsupported("runs on a GPU")
    package = _package("inf_cl")
    if len(q) % 64 or len(k) % 64:
        raise Unsupported("reads past the end of numbers of rows that 64 does not divide")
    if q.shape[1] not in (16, 32, 64, 128, 256):
        raise Unsupported("takes widths of 16 to 256, powers of two")
    return package.cal_flash_loss(q, k, labels, 1 / temperature, q.shape[1])


def liger(q: Tensor, k: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Liger's fused linear cross-entropy, a mean."""
    if not q.is_cuda:
        raise Unsupported("runs on a GPU")
    package = _package("liger_kernel.transformers")
    return package.LigerFusedLinearCrossEntropyLoss()(k, q / temperature, labels)

"""The gather kernels as torch operators: fake tensors and gradients for every backend but the reference.

An operator's last argument names its backend, so that a compiled graph holds the choice. Each gradient is its
own operator. Only the reference backend has second derivatives.

Shapes: B images, L patches, K kept, D width, P prefix tokens, C channels, p patch side, G reconstructions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from .backend import function
from .chunked.gather import accumulator


def apart(outputs: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """The outputs with an empty tensor of its own for each that is not wanted: an operator's may share no memory."""
    return tuple(x if want else x.new_empty(0) for x, want in zip(outputs, wanted, strict=True))


@custom_op("ssl_ib::token_gather", mutates_args=(), schema="(Tensor x, Tensor keep, str backend) -> Tensor")
def token_gather(x, keep, backend):
    return function("token_gather", "token_gather", backend, x)(x, keep)


@token_gather.register_fake
def _(x, keep, backend):
    return x.new_empty(*keep.shape, x.shape[2])


@custom_op(
    "ssl_ib::token_gather_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor keep, SymInt num_tokens, str backend) -> Tensor",
)
def token_gather_backward(grad, keep, num_tokens, backend):
    return function("token_gather", "token_gather_backward", backend, grad)(grad, keep, num_tokens)


@token_gather_backward.register_fake
def _(grad, keep, num_tokens, backend):
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[2])


def _save_token_gather(ctx, inputs, output):
    x, keep, ctx.backend = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(keep)


def _token_gather_gradient(ctx, grad):
    return token_gather_backward(grad, *ctx.saved_tensors, ctx.num_tokens, ctx.backend), None, None


token_gather.register_autograd(_token_gather_gradient, setup_context=_save_token_gather)


@custom_op(
    "ssl_ib::token_scatter",
    mutates_args=(),
    schema="(Tensor latents, Tensor keep, Tensor mask_token, SymInt num_tokens, Tensor? pos, int num_prefix, "
    "str backend) -> Tensor",
)
def token_scatter(latents, keep, mask_token, num_tokens, pos, num_prefix, backend):
    kernel = function("token_scatter", "token_scatter", backend, latents)
    return kernel(latents, keep, mask_token, num_tokens, pos, num_prefix)


@token_scatter.register_fake
def _(latents, keep, mask_token, num_tokens, pos, num_prefix, backend):
    return latents.new_empty(latents.shape[0], num_prefix + num_tokens, latents.shape[2])


@custom_op(
    "ssl_ib::token_scatter_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor keep, int num_prefix, bool want_latents, bool want_mask_token, bool want_pos, "
    "str backend) -> (Tensor, Tensor, Tensor)",
)
def token_scatter_backward(grad, keep, num_prefix, want_latents, want_mask_token, want_pos, backend):
    kernel = function("token_scatter", "token_scatter_backward", backend, grad)
    wanted = want_latents, want_mask_token, want_pos
    return apart(kernel(grad, keep, num_prefix, *wanted), wanted)


@token_scatter_backward.register_fake
def _(grad, keep, num_prefix, want_latents, want_mask_token, want_pos, backend):
    batch, total, width = grad.shape
    dtype = accumulator(grad.dtype)
    return (
        grad.new_empty(batch, num_prefix + keep.shape[1], width) if want_latents else grad.new_empty(0),
        grad.new_empty(width if want_mask_token else 0, dtype=dtype),
        grad.new_empty(total, width, dtype=dtype) if want_pos else grad.new_empty(0, dtype=dtype),
    )


def _save_token_scatter(ctx, inputs, output):
    _, keep, mask_token, _, pos, ctx.num_prefix, ctx.backend = inputs
    ctx.dtypes = mask_token.dtype, None if pos is None else pos.dtype
    ctx.save_for_backward(keep)


def _token_scatter_gradient(ctx, grad):
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 4)]
    latents, mask_token, pos = token_scatter_backward(grad, *ctx.saved_tensors, ctx.num_prefix, *wanted, ctx.backend)
    return (
        latents if wanted[0] else None,
        None,
        mask_token.to(ctx.dtypes[0]) if wanted[1] else None,
        None,
        pos.to(ctx.dtypes[1]) if wanted[2] else None,
        None,
        None,
    )


token_scatter.register_autograd(_token_scatter_gradient, setup_context=_save_token_scatter)


@custom_op(
    "ssl_ib::patch_embed_gather",
    mutates_args=(),
    schema="(Tensor images, Tensor keep, Tensor weight, Tensor? bias, Tensor pos, Tensor? prefix, str backend) "
    "-> Tensor",
)
def patch_embed_gather(images, keep, weight, bias, pos, prefix, backend):
    return function("patch_embed_gather", "patch_embed_gather", backend, weight)(
        images, keep, weight, bias, pos, prefix
    )


@patch_embed_gather.register_fake
def _(images, keep, weight, bias, pos, prefix, backend):
    num_prefix = 0 if prefix is None else prefix.shape[0]
    return weight.new_empty(keep.shape[0], num_prefix + keep.shape[1], weight.shape[0])


@custom_op(
    "ssl_ib::patch_embed_gather_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor images, Tensor keep, Tensor weight, int num_prefix, bool want_images, "
    "bool want_weight, bool want_pos, str backend) -> (Tensor, Tensor, Tensor)",
)
def patch_embed_gather_backward(grad, images, keep, weight, num_prefix, want_images, want_weight, want_pos, backend):
    kernel = function("patch_embed_gather", "patch_embed_gather_backward", backend, grad)
    wanted = want_images, want_weight, want_pos
    return apart(kernel(grad, images, keep, weight, num_prefix, *wanted), wanted)


@patch_embed_gather_backward.register_fake
def _(grad, images, keep, weight, num_prefix, want_images, want_weight, want_pos, backend):
    dtype, side = accumulator(grad.dtype), weight.shape[-1]
    num_patches = (images.shape[2] // side) * (images.shape[3] // side)
    return (
        images.new_empty(images.shape if want_images else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,), dtype=dtype),
        grad.new_empty((num_patches, weight.shape[0]) if want_pos else (0,), dtype=dtype),
    )


def _save_patch_embed_gather(ctx, inputs, output):
    images, keep, weight, bias, pos, prefix, ctx.backend = inputs
    ctx.num_prefix = 0 if prefix is None else prefix.shape[0]
    ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias, pos, prefix)]
    ctx.save_for_backward(images, keep, weight)


def _patch_embed_gather_gradient(ctx, grad):
    want_images, _, want_weight, want_bias, want_pos, want_prefix, _ = ctx.needs_input_grad
    weight_dtype, bias_dtype, pos_dtype, prefix_dtype = ctx.dtypes
    grad = grad.contiguous()
    images, weight, pos = patch_embed_gather_backward(
        grad, *ctx.saved_tensors, ctx.num_prefix, want_images, want_weight, want_bias or want_pos, ctx.backend
    )
    # Every token adds the bias and one position, so what the positions receive adds up to what the bias does.
    bias = pos.sum(dim=0).to(bias_dtype) if want_bias else None
    prefix = None
    if want_prefix:
        prefix = grad[:, : ctx.num_prefix].sum(dim=0, dtype=accumulator(grad.dtype)).to(prefix_dtype)
    return (
        images if want_images else None,
        None,
        weight.to(weight_dtype) if want_weight else None,
        bias,
        pos.to(pos_dtype) if want_pos else None,
        prefix,
        None,
    )


patch_embed_gather.register_autograd(_patch_embed_gather_gradient, setup_context=_save_patch_embed_gather)


@custom_op(
    "ssl_ib::masked_patch_mse",
    mutates_args=(),
    schema="(Tensor pred, Tensor images, Tensor mask, bool norm_pix, str backend) -> Tensor",
)
def masked_patch_mse(pred, images, mask, norm_pix, backend):
    """Mean error over the hidden patches and over the visible ones: [2]."""
    sums = function("masked_patch_mse", "masked_patch_mse", backend, pred)(pred, images, mask, norm_pix)
    return sums / _counts(mask)


def _counts(mask: Tensor) -> Tensor:
    """How many patches are hidden and visible [2], at least 1: an empty group's sum is 0."""
    hidden = mask.sum()
    return torch.stack([hidden, mask.numel() - hidden]).clamp(min=1)


@masked_patch_mse.register_fake
def _(pred, images, mask, norm_pix, backend):
    return pred.new_empty(2, dtype=accumulator(pred.dtype))


@custom_op(
    "ssl_ib::masked_patch_mse_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor pred, Tensor images, Tensor mask, bool norm_pix, str backend) -> Tensor",
)
def masked_patch_mse_backward(grad, pred, images, mask, norm_pix, backend):
    scale = grad * 2 / (_counts(mask) * pred.shape[2])
    kernel = function("masked_patch_mse", "masked_patch_mse_backward", backend, pred)
    return kernel(scale, pred, images, mask, norm_pix)


@masked_patch_mse_backward.register_fake
def _(grad, pred, images, mask, norm_pix, backend):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _save_masked_patch_mse(ctx, inputs, output):
    *tensors, ctx.norm_pix, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _masked_patch_mse_gradient(ctx, grad):
    return masked_patch_mse_backward(grad, *ctx.saved_tensors, ctx.norm_pix, ctx.backend), None, None, None, None


masked_patch_mse.register_autograd(_masked_patch_mse_gradient, setup_context=_save_masked_patch_mse)

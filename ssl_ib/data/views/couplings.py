"""An invertible map of each pixel's three channels: InfoMin's generator of views (Tian et al., 2020, section 4.2).

A block lets one channel pass and changes the other two by small networks of it, two 1x1 convolutions with a ReLU
between; the channel that passes is the first, the second and the third in turn. Nothing mixes pixels, so images are
laid out as [channels, pixels] and each convolution is one matrix product.

Shapes: B images, h x w pixels, P = B * h * w pixels of a batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Flow = Literal["vp", "nvp"]

#: Pixels worked on together: on the CPU as many as keep the hidden activations in the cache. That is what makes this
#: several times faster than convolutions, whose activations travel to memory and back.
_PIXELS = {"cpu": 4096}
_PIXELS_ELSEWHERE = 1 << 22


class _Pointwise(torch.autograd.Function):
    """last @ relu(first @ [x, 1]) + last_bias in pieces of pixels; the backward computes the hidden activations again.

    All pieces share their buffers: asking the system for fresh memory would take most of the time.
    """

    @staticmethod
    def forward(ctx, x, first, last, last_bias):
        ctx.save_for_backward(x, first, last)
        out = x.new_empty(len(last), x.shape[1])
        for columns, piece, (hidden,) in _pieces(x, len(first), buffers=1):
            torch.mm(first, piece, out=hidden).relu_()
            torch.addmm(last_bias, last, hidden, out=out[:, columns])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, first, last = ctx.saved_tensors
        d_x, d_first, d_last = torch.empty_like(x), torch.zeros_like(first.t()), torch.zeros_like(last)
        weight = first[:, :-1].t()
        for columns, piece, (hidden, d_hidden) in _pieces(x, len(first), buffers=2):
            d_out = grad[:, columns]
            torch.mm(first, piece, out=hidden).relu_()
            torch.mm(last.t(), d_out, out=d_hidden)
            torch.ops.aten.threshold_backward.grad_input(d_hidden, hidden, 0, grad_input=d_hidden)
            torch.mm(weight, d_hidden, out=d_x[:, columns])
            # The operand with few rows first: the other order takes several times as long.
            d_first.addmm_(piece, d_hidden.t())
            d_last.addmm_(d_out, hidden.t())
        return d_x, d_first.t(), d_last, grad.sum(1, keepdim=True)


def _pieces(x: Tensor, hidden: int, buffers: int) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """The columns of x [C, P] in pieces: where one is, itself above a row of ones, empty buffers [hidden, columns]."""
    rows, total = x.shape
    step = min(total, _PIXELS.get(x.device.type, _PIXELS_ELSEWHERE))
    shared = [x.new_empty(hidden, step) for _ in range(buffers)]
    above = x.new_ones(rows + 1, step)
    for start in range(0, total, step):
        count = min(step, total - start)
        above[:rows, :count] = x[:, start : start + count]
        yield slice(start, start + count), above[:, :count], [buffer[:, :count] for buffer in shared]


class Pointwise(nn.Module):
    """Two 1x1 convolutions with a ReLU between, on pixels: [in_channels, P] -> [out_channels, P].

    Starts as zero everywhere. Gradients cannot be differentiated again.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int):
        super().__init__()
        self.first, self.last = nn.Linear(in_channels, hidden), nn.Linear(hidden, out_channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.cat([self.first.weight, self.first.bias[:, None]], dim=1)
        return _Pointwise.apply(x, first, self.last.weight, self.last.bias[:, None])


class Coupling(nn.Module):
    """One block: of the rows (x1, x2) [1 + 2, P] the first passes, and x2 becomes x2 * exp(G(x1)) + F(x1).

    It returns (x2, x1), [2 + 1, P], so that another channel is the first for the next block.

    flow: "vp" preserves volume (G = 0); "nvp" does not.
    clip: G lies in (-clip, clip), by a tanh.
    """

    def __init__(self, flow: Flow, hidden: int, clip: float):
        super().__init__()
        self.clip = clip
        self.shift = Pointwise(1, hidden, 2)
        self.scale = Pointwise(1, hidden, 2) if flow == "nvp" else None

    def log_scale(self, x1: Tensor) -> Tensor:
        """G: [1, P] -> [2, P]."""
        return self.clip * self.scale(x1).tanh()

    def forward(self, x: Tensor) -> Tensor:
        """[3, P] -> [3, P]."""
        x1, x2 = x.split([1, 2])
        shift = self.shift(x1)
        x2 = x2 + shift if self.scale is None else torch.addcmul(shift, x2, self.log_scale(x1).exp())
        return torch.cat([x2, x1])

    def inverse(self, y: Tensor) -> Tensor:
        """[3, P] -> [3, P]."""
        x2, x1 = y.split([2, 1])
        x2 = x2 - self.shift(x1)
        if self.scale is not None:
            x2 = x2 * (-self.log_scale(x1)).exp()
        return torch.cat([x1, x2])

    def log_det(self, x: Tensor) -> Tensor:
        """Logarithm of the factor by which a pixel's volume grows: [3, P] -> [P]."""
        return x.new_zeros(x.shape[1]) if self.scale is None else self.log_scale(x[:1]).sum(0)


class Couplings(nn.Module):
    """A chain of blocks on images of three channels; starts as the identity. Works in float32 at least.

    flow:   "vp" (volume preserving) or "nvp" (each block scales too).
    blocks: how many; three let every channel pass once.
    hidden: width of the small networks.
    clip:   bound of a block's log scale, above 0.
    """

    def __init__(self, flow: Flow = "nvp", blocks: int = 6, hidden: int = 32, clip: float = 1.0):
        super().__init__()
        self.blocks = nn.ModuleList([Coupling(flow, hidden, clip) for _ in range(blocks)])

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, 3, h, w]."""
        with torch.autocast(images.device.type, enabled=False):
            x = _pixels(images)
            for block in self.blocks:
                x = block(x)
            # Each block has turned the channels by one.
            x = x.roll(len(self.blocks), 0)
        return _images(x, images)

    def inverse(self, images: Tensor) -> Tensor:
        """The images that `forward` maps to these: [B, 3, h, w] -> [B, 3, h, w]."""
        with torch.autocast(images.device.type, enabled=False):
            x = _pixels(images).roll(-len(self.blocks), 0)
            for block in reversed(self.blocks):
                x = block.inverse(x)
        return _images(x, images)

    def log_det(self, images: Tensor) -> Tensor:
        """log |det| of the map at each image, the sum over its pixels: [B, 3, h, w] -> [B], in nats."""
        with torch.autocast(images.device.type, enabled=False):
            x = _pixels(images)
            total = x.new_zeros(x.shape[1])
            for block in self.blocks:
                total = total + block.log_det(x)
                x = block(x)
        return total.view(len(images), -1).sum(1)


def _pixels(images: Tensor) -> Tensor:
    """[B, 3, h, w] -> [3, P], in float32 at least."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    return images.transpose(0, 1).flatten(1)


def _images(pixels: Tensor, like: Tensor) -> Tensor:
    b, _, h, w = like.shape
    return pixels.view(3, b, h, w).transpose(0, 1).contiguous()

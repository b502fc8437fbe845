"""An invertible map of each pixel's three channels: InfoMin's generator of views (Tian et al., 2020, section 4.2).

A block lets one channel pass and changes the other two by small networks of it, two 1x1 convolutions with a ReLU
between; the channel that passes is the first, the second and the third in turn. Nothing mixes pixels, so images are
laid out as [channels, pixels] and each convolution is one matrix product.

Shapes: B images, h x w pixels, P = B * h * w pixels of a batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Flow = Literal["vp", "nvp"]

#: Pixels worked on together: on the CPU as many as keep the hidden activations in the cache. That is what makes this
#: several times faster than convolutions, whose activations travel to memory and back.
_PIXELS = {"cpu": 4096}
_PIXELS_ELSEWHERE = 1 << 22

#: Weights of a small network: of its hidden layer with the bias as last column [H, 2], of its outputs [2, H], [2, 1].
Weights = tuple[Tensor, Tensor, Tensor]


class _Block(torch.autograd.Function):
    """(x1, x2) -> (x2 * exp(clip * tanh(G(x1))) + F(x1), x1), in pieces of pixels; without G, x2 + F(x1).

    The backward computes the hidden activations again. All pieces share their buffers: asking the system for fresh
    memory would take longer than the products.
    """

    @staticmethod
    def forward(ctx, x: Tensor, clip: float, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.clip, (shift, *scale) = clip, _networks(weights)
        y = torch.empty_like(x)
        y[2] = x[0]
        for at, x1, (hidden,) in _pieces(x, len(weights[0]), buffers=1):
            x2, out = x[1:, at], y[:2, at]
            moved = _network(x1, shift, hidden)
            if scale:
                torch.addcmul(moved, x2, (clip * _network(x1, scale[0], hidden).tanh_()).exp_(), out=out)
            else:
                torch.add(moved, x2, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        clip, (shift, *scale) = ctx.clip, _networks(weights)
        d_x, sums = torch.empty_like(x), [torch.zeros_like(weight) for weight in weights]
        d_shift, *d_scale = _networks(sums)
        for at, x1, (hidden, d_hidden) in _pieces(x, len(weights[0]), buffers=2):
            d_out, x2 = grad[:2, at], x[1:, at]
            torch.relu_(torch.mm(shift[0], x1, out=hidden))
            d_x1 = grad[2:, at] + _network_backward(x1, shift, hidden, d_hidden, d_out, d_shift)
            if scale:
                bounded = _network(x1, scale[0], hidden).tanh_()
                d_x2 = (clip * bounded).exp_().mul_(d_out)
                d_log_scale = (d_x2 * x2).mul_(clip).mul_(bounded.square_().neg_().add_(1.0))
                d_x1 += _network_backward(x1, scale[0], hidden, d_hidden, d_log_scale, d_scale[0])
            else:
                d_x2 = d_out
            d_x[:1, at], d_x[1:, at] = d_x1, d_x2
        return d_x, None, *sums


def _networks(weights: Sequence[Tensor]) -> list[Weights]:
    return [tuple(weights[i : i + 3]) for i in range(0, len(weights), 3)]


def _pieces(x: Tensor, hidden: int, buffers: int) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Pieces of x [3, P]: its columns, its first row above a row of ones [2, n], and empty buffers [hidden, n]."""
    total = x.shape[1]
    step = min(total, _PIXELS.get(x.device.type, _PIXELS_ELSEWHERE))
    shared, above = [x.new_empty(hidden, step) for _ in range(buffers)], x.new_ones(2, step)
    for start in range(0, total, step):
        count = min(step, total - start)
        above[0, :count] = x[0, start : start + count]
        yield slice(start, start + count), above[:, :count], [buffer[:, :count] for buffer in shared]


def _network(x1: Tensor, weights: Weights, hidden: Tensor) -> Tensor:
    """A small network of x1 [2, n], the second row ones: [2, n]; its hidden activations are left in `hidden`."""
    first, last, bias = weights
    torch.relu_(torch.mm(first, x1, out=hidden))
    return torch.addmm(bias, last, hidden)


def _network_backward(
    x1: Tensor, weights: Weights, hidden: Tensor, d_hidden: Tensor, d_out: Tensor, sums: Weights
) -> Tensor:
    """The gradient of x1's first row [1, n]; those of the weights are added to `sums`."""
    first, last, _ = weights
    torch.mm(last.t(), d_out, out=d_hidden)
    torch.ops.aten.threshold_backward.grad_input(d_hidden, hidden, 0, grad_input=d_hidden)
    # The operand with few rows first: the other order takes several times as long.
    sums[0].add_((x1 @ d_hidden.t()).t())
    sums[1].addmm_(d_out, hidden.t())
    sums[2].add_(d_out.sum(1, keepdim=True))
    # Both rows, of which one is wanted: a product with a single row takes longer.
    return torch.mm(first.t(), d_hidden)[:1]


class Pointwise(nn.Module):
    """Two 1x1 convolutions with a ReLU between, on pixels: [1, P] -> [2, P]. Starts as zero everywhere."""

    def __init__(self, hidden: int):
        super().__init__()
        self.first, self.last = nn.Linear(1, hidden), nn.Linear(hidden, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def weights(self) -> Weights:
        first = torch.cat([self.first.weight, self.first.bias[:, None]], dim=1)
        return first, self.last.weight, self.last.bias[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.t()).relu()).t()


class Coupling(nn.Module):
    """One block: of the rows (x1, x2) [1 + 2, P] the first passes, and x2 becomes x2 * exp(G(x1)) + F(x1).

    It returns (x2, x1), [2 + 1, P], so that another channel is the first for the next block. The gradient of `forward`
    cannot be differentiated again.

    flow: "vp" preserves volume (G = 0); "nvp" does not.
    clip: G lies in (-clip, clip), by a tanh.
    """

    def __init__(self, flow: Flow, hidden: int, clip: float):
        super().__init__()
        self.clip = clip
        self.shift = Pointwise(hidden)
        self.scale = Pointwise(hidden) if flow == "nvp" else None

    def log_scale(self, x1: Tensor) -> Tensor:
        """G: [1, P] -> [2, P]."""
        return self.clip * self.scale(x1).tanh()

    def forward(self, x: Tensor) -> Tensor:
        """[3, P] -> [3, P]."""
        return _Block.apply(x, self.clip, *self.shift.weights(), *(self.scale.weights() if self.scale else ()))

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

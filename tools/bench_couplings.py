"""Times InfoMin's couplings against the same network of nn.Conv2d modules: python tools/bench_couplings.py

Forward and backward of 6 blocks of kind "nvp", 32 hidden, on 128 images of 32 x 32 pixels, with one thread. Rounds of
the two take turns; medians and their ratio are printed.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from ssl_ib.data.views.couplings import Couplings

ROUNDS = 15


class Convolutions(nn.Module):
    """The same map in the usual form: two 1x1 convolutions a small network, images as [B, 3, h, w]."""

    def __init__(self, couplings: Couplings):
        super().__init__()
        self.networks = nn.ModuleList(
            nn.ModuleList([_convolutions(block.scale), _convolutions(block.shift)]) for block in couplings.blocks
        )
        self.clips = [block.clip for block in couplings.blocks]

    def forward(self, x: Tensor) -> Tensor:
        for number, (scale, shift) in enumerate(self.networks):
            order = [(number + k) % 3 for k in range(3)]
            x1, x2 = x[:, order[:1]], x[:, order[1:]]
            x2 = x2 * (self.clips[number] * scale(x1).tanh()).exp() + shift(x1)
            x = torch.cat([x1, x2], dim=1)[:, [order.index(channel) for channel in range(3)]]
        return x


def _convolutions(network: nn.Module) -> nn.Sequential:
    layers = []
    for linear in (network.first, network.last):
        layer = nn.Conv2d(linear.in_features, linear.out_features, 1)
        layer.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})
        layers.append(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def seconds(network: nn.Module, images: Tensor) -> float:
    began = time.perf_counter()
    network(images).square().mean().backward()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    couplings = Couplings("nvp", blocks=6, hidden=32)
    for block in couplings.blocks:
        for network in (block.scale, block.shift):
            nn.init.normal_(network.last.weight, std=0.1)
    convolutions, images = Convolutions(couplings), torch.randn(128, 3, 32, 32)
    torch.testing.assert_close(couplings(images), convolutions(images), rtol=1e-4, atol=1e-4)
    times: dict[str, list[float]] = {"couplings": [], "convolutions": []}
    for _ in range(ROUNDS + 1):
        times["couplings"].append(seconds(couplings, images))
        times["convolutions"].append(seconds(convolutions, images))
    # The first round of each is warm-up.
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratios = sorted(b / a for a, b in zip(*(values[1:] for values in times.values()), strict=True))
    print(", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in medians.items()))
    print(
        f"the couplings are {medians['convolutions'] / medians['couplings']:.1f} times as fast "
        f"(rounds: {ratios[0]:.1f} to {ratios[-1]:.1f})"
    )


if __name__ == "__main__":
    main()

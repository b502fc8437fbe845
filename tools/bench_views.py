"""Time of RandAugment on a batch of tensors, beside timm's on a list of Pillow images, on one thread.

    python tools/bench_views.py [--images 512] [--size 32] [--rounds 7] [--each]

Both apply two of the fifteen operations at magnitude 10, each with probability one half, to the same generated images.
They take turns; the medians and their ratio are printed. timm's images are Pillow's already, and are not made tensors
afterwards; ours are float tensors, and what is drawn counts. With --each every operation is timed alone, on all images.
"""

from __future__ import annotations

import argparse
import random as python_random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment

from ssl_ib import random
from ssl_ib.data.views.rand_augment import OPS, RandAugment

#: timm's names, in the order of OPS.
THEIRS = (
    "AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast Brightness Sharpness ShearX "
    "ShearY TranslateXRel TranslateYRel"
).split()


def generated(number: int, size: int) -> torch.Tensor:
    """Smooth shades with some noise: float32 [number, 3, size, size] in multiples of 1/255."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, 3, 5, 5, generator=generator)
    shades = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    noise = 0.05 * torch.randn(shades.shape, generator=generator)
    return (255 * (shades + noise)).clamp(0, 255).round() / 255


def turns(contenders: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender over the rounds, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            start = time.process_time()
            work(turn)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def compare(images: torch.Tensor, pictures: list[Image.Image], ops: list[int], p: float, number: int, rounds: int):
    ours = RandAugment(number, op_p=p, ops=tuple(OPS[op] for op in ops))
    hparams = {"img_mean": tuple(round(255 * share) for share in ours.fill), "magnitude_std": 0.5}
    names = [THEIRS[op] for op in ops]
    theirs = auto_augment.RandAugment(auto_augment.rand_augment_ops(10, p, hparams, names), number)

    def batch(turn: int) -> torch.Tensor:
        keys = random.image_keys(0, turn, torch.arange(len(images)))
        return ours.apply(images.clone(), ours.draw(keys))

    def listed(turn: int) -> list[Image.Image]:
        return [theirs(picture) for picture in pictures]

    return turns({"ssl_ib": batch, "timm": listed}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", action="store_true", help="also every operation alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    python_random.seed(0)
    np.random.seed(0)
    images = generated(options.images, options.size)
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    cases = [("RandAugment", list(range(len(OPS))), 0.5, 2)]
    if options.each:
        cases += [(name, [op], 1.0, 1) for op, name in enumerate(OPS)]
    print(f"{options.images} images of {options.size} pixels, medians of {options.rounds}, one thread")
    for name, ops, p, number in cases:
        found = compare(images, pictures, ops, p, number, options.rounds)
        ms = {contender: f"{1e3 * seconds:.1f} ms" for contender, seconds in found.items()}
        ratio = found["ssl_ib"] / found["timm"]
        print(f"{name:14} ssl_ib {ms['ssl_ib']:>9}   timm {ms['timm']:>9}   ssl_ib / timm {ratio:.2f}")


if __name__ == "__main__":
    main()

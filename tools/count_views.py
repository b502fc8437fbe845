"""What drawing a view costs a GPU: kernels, copies that wait, and bytes moved, in plain torch and fused. Needs no GPU.

    python tools/count_views.py [--batch 256] [--image 256]

Plain torch is counted as it runs: images lie on the device "meta", which computes nothing, and every operation on it
that would launch a kernel counts, with the bytes of the tensors that it reads and writes. A copy from the host that is
not pinned makes the host wait. The fused kernels are counted where they are launched, their bytes calculated: what they
read and write once. So both are estimates of traffic: caches may make it less, reading pixels again more.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import ssl_ib_kernels.augment as kernels  # noqa: E402

from ssl_ib import ops, random  # noqa: E402
from ssl_ib.config.registry import build_part, check_part  # noqa: E402
from ssl_ib.data.views.boxes import full_sizes  # noqa: E402
from ssl_ib.ops import backend, views  # noqa: E402

#: Recipe, and what is set of it.
RECIPES = [
    ("plain", {}),
    ("moco_v1", {}),
    ("simclr", {}),
    ("byol", {}),
    ("multi_crop", {}),
    ("infomin", {"jigsaw": False}),
    ("infomin", {"jigsaw": False, "ops": ["invert", "posterize", "solarize", "solarize_add", "colour", "brightness"]}),
]


class Counter(TorchDispatchMode):
    """Counts kernels, copies that wait, and bytes moved, of operations on the device "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.waits = self.moved = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        answer = operation(*arguments, **(keywords or {}))
        given = [x for x in _pytree.tree_leaves((arguments, keywords)) if isinstance(x, Tensor)]
        made = [x for x in _pytree.tree_leaves(answer) if isinstance(x, Tensor)]
        name = operation.overloadpacket.__name__
        if (
            not any(x.is_meta for x in made)
            or operation.is_view
            or name in ("empty", "new_empty", "empty_like", "augment")
        ):
            return answer
        if any(x.is_cpu and x.ndim for x in given) and "copy" in name:
            self.waits += 1
        else:
            self.kernels += 1
        touched = (
            [*given, *made] if name not in ("index", "index_put_") else 2 * (made if name == "index" else given[-1:])
        )
        self.moved += sum(_bytes(x) for x in touched if x.is_meta)
        return answer


def _bytes(x: Tensor) -> int:
    """Without what an expanded tensor repeats."""
    sides = [side for side, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * int(torch.tensor(sides).prod()) if sides else x.element_size()


def counted(augment: Any, images: Tensor, keys: Tensor, name: str) -> tuple[int, int, float]:
    """Kernels, waits and megabytes of one view of the images."""
    drawn = augment.draw(keys, full_sizes(images))
    mean, std = torch.zeros(3, device="meta"), torch.ones(3, device="meta")
    counter, former = Counter(), kernels.launch

    def launch(kernel: Any, grid: Any, **given: Any) -> None:
        counter.kernels += 1
        counter.moved += _bytes(given["out"])
        area = drawn.boxes[:, 2] * drawn.boxes[:, 3]
        read = int(area.sum()) * images.shape[1] * images.element_size() if "images" in given else _bytes(given["x"])
        counter.moved += read

    kernels.launch = launch
    try:
        with ops.use_backend(name), counter:
            augment.apply(images, drawn, mean, std)
    finally:
        kernels.launch = former
    return counter.kernels, counter.waits, counter.moved / 1e6


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--image", type=int, default=256, help="pixels of a side of the images")
    options = p.parse_args()
    backend.why_not = lambda *_: None  # nothing runs
    views.operators = SimpleNamespace(augment=lambda images, *numbers: kernels.augment(images, *numbers[:-1]))
    kernels._moved = lambda x, device: torch.empty(x.shape, device=device)  # from pinned memory, where there is a GPU
    torch.autocast = lambda *_, **__: nullcontext()  # which "meta" does not know
    images = torch.empty(options.batch, 3, options.image, options.image, dtype=torch.uint8, device="meta")
    print(f"a view of {options.batch} images of {options.image} x {options.image}, the mean of a recipe's views")
    print("| views | torch: kernels | waits | MB | fused: kernels | waits | MB |\n|---|---|---|---|---|---|---|")
    for name, arguments in RECIPES:
        recipe = build_part("views", check_part("views", {"name": name, **arguments}, "views", [])).part
        cells = []
        for choice in ("reference", "triton"):
            found = [
                counted(augment, images, random.image_keys(0, 0, torch.arange(options.batch), number), choice)
                for number, augment in enumerate(recipe.augments)
            ]
            means = (sum(column) / len(found) for column in zip(*found, strict=True))
            cells += [f"{mean:.0f}" for mean in means]
        title = name + "".join(f" {key}={value}" for key, value in arguments.items() if key == "ops")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Draws what views recipes make of generated images: one column an image, one row a view.

    python tools/draw_views.py docs/images/infomin_views.png
    python tools/draw_views.py out.png --views '{name: infomin, size: 64, jigsaw: false}' '{name: simclr, size: 64}'

--views: recipes' views as YAML, by default InfoMin's and the constructions of its studies. The images are drawn here:
shapes on shaded grounds.
"""

from __future__ import annotations

import argparse
import math

import torch
import yaml

from ssl_ib import ConfigError, Sample, UserError, random
from ssl_ib.config.registry import build_part, check_part
from ssl_ib.data.sources.base import InMemory, Source
from ssl_ib.record.figures import contact_sheet

SIZE = 96
DEFAULT = (
    "{name: infomin, size: 64, jigsaw_size: 96, jigsaw_patch: 24}",
    "{name: colour_split, space: ydbdr, size: 64}",
    "{name: frequency_split, sigma: 1.0, size: 64}",
    "{name: patches, size: 32, distance: 40}",
)


def scenes(number: int) -> torch.Tensor:
    """A disc, a square and a triangle each, on a shaded ground: uint8 [number, 3, SIZE, SIZE]."""
    generator = torch.Generator().manual_seed(3)
    line = torch.linspace(0, 1, SIZE)
    y, x = line[:, None], line[None]
    images = torch.empty(number, 3, SIZE, SIZE)
    for image in images:
        draw = torch.rand(20, 3, generator=generator)
        image[:] = 0.3 + 0.5 * (draw[0, :, None, None] * y + draw[1, :, None, None] * x)
        image += 0.05 * (2 * math.pi * (6 * x + 4 * y)).sin()
        (a, b, r), (c, d, s), (e, f, t) = (0.2 + 0.6 * draw[2:5]).tolist()
        shapes = (
            (x - a) ** 2 + (y - b) ** 2 < (0.25 * r) ** 2,
            torch.maximum((x - c).abs(), (y - d).abs()) < 0.2 * s,
            (y - f + 0.15 * t > 2 * (x - e).abs()) & (y - f < 0.15 * t),
        )
        for shape, colour in zip(shapes, draw[5:8], strict=True):
            image[:, shape] = colour[:, None]
    return (images.clamp(0, 1) * 255).round().byte()


class Scenes(Source):
    """The generated images as a source, which views measure their statistics on."""

    def __init__(self, images: torch.Tensor):
        self.images = InMemory(images, torch.full((len(images),), -1), [])

    def train(self) -> InMemory:
        return self.images


def rows(text: str, source: Scenes, sample: Sample) -> list[tuple[str, torch.Tensor]]:
    """(name, pictures) of each view of a recipe. Raises UserError where the recipe is wrong."""
    problems: list[str] = []
    spec = check_part("views", yaml.safe_load(text), "views", problems)
    if problems:
        raise ConfigError(problems)
    views = build_part("views", spec, source=source).part
    views.measure(source)
    keys = [random.image_keys(0, 0, sample.index, number) for number in range(len(views.shapes))]
    drawn = [views.show(view, number) for number, view in enumerate(views.draw(sample, keys))]
    name = spec["name"].replace("_", " ")
    return [(f"{name}\nview {number}", picture) for number, picture in enumerate(drawn, start=1) if picture is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the picture, a .png")
    parser.add_argument("--views", nargs="+", default=DEFAULT)
    parser.add_argument("--images", type=int, default=5)
    options = parser.parse_args()
    source = Scenes(scenes(64))
    sample = source.images.gather(torch.arange(options.images))
    try:
        groups = [rows(text, source, sample) for text in options.views]
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    images = [("image", sample.images / 255)]
    contact_sheet([images, *groups], ["Views of generated images"]).savefig(options.out)


if __name__ == "__main__":
    main()

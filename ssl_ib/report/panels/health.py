"""Signs of life in the features, read without labels."""

from __future__ import annotations

from ..blocks import Panel
from ..curves import evaluated
from ..page import Page

#: What is shown, and how it is read.
SIGNS = {
    "health/rankme": (
        "RankMe",
        "dimensions",
        "How many dimensions the features use in effect. 1 is a collapse, and the features' width is the most.",
    ),
    "health/lidar": (
        "LiDAR",
        "dimensions",
        "In how many dimensions images differ more than views of one image do. What the augmentation alone moves does "
        "not count, which in RankMe it does.",
    ),
    "health/std": ("Spread", "", "0 where all features point one way, 1 where every dimension varies alike."),
    "health/alignment": (
        "Alignment",
        "",
        "The mean squared distance of an image's two views. 0 where they agree; alone it can be had by a collapse.",
    ),
    "health/uniformity": (
        "Uniformity",
        "",
        "How evenly features cover the sphere. 0 where all agree, and lower is better.",
    ),
}


def build(page: Page) -> Panel | None:
    text = (
        "Whether the features are alive, measured on held-out images without labels at each evaluation. A fall of "
        "RankMe and spread towards their lowest values is a collapse, whatever the loss says."
    )
    blocks = [block for key, (name, unit, said) in SIGNS.items() for block in evaluated(page, key, name, unit, said)]
    known = {key for run in page.runs for row in run.evaluations for key in row if key.startswith("health/")}
    for key in sorted(known - set(SIGNS)):
        blocks += evaluated(page, key, key.removeprefix("health/"))
    return Panel("Health", text, blocks) if blocks else None

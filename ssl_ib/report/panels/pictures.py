"""What the model saw, rebuilt and looked at: the pictures of the run's folder that no other panel shows."""

from __future__ import annotations

from ..blocks import Panel, Picture, Pictures
from ..page import Page

#: Pictures that need saying what they show, in this order.
KNOWN = {
    "reconstructions": "What the model sees of some images, as they were drawn, and what it rebuilds. Grey patches are "
    "hidden from the encoder.",
    "attention": "Where the class token looks in its last block, by the heads' mean and by each head. The row's name "
    "says what its brightest colour is worth, and the title what an even spread would give.",
}
#: Shown as curves by other panels, or by the panels on prototypes and evaluations.
ELSEWHERE = {"loss_curves", "knn_curve", "information", "ledger", "occupancy"}


def build(page: Page) -> Panel | None:
    names = [*KNOWN, *sorted({path.stem for run in page.runs for path in page.figures(run)} - set(KNOWN) - ELSEWHERE)]
    names = [name for name in names if not page.is_evaluation(name)]
    blocks = []
    # A kind after the other, so that of many runs each has its first picture before one has its second.
    for name in names:
        shown = [
            Picture(path, f"{run.name}: {name}" if len(page.runs) > 1 else name.replace("_", " "))
            for run in page.runs
            for path in page.figures(run)
            if path.stem == name
        ]
        if shown:
            blocks.append(Pictures(shown, name.replace("_", " ").capitalize(), KNOWN.get(name, "")))
    text = "Pictures that the run has drawn at its end, of the same few held-out images."
    return Panel("What the model sees", text, blocks) if blocks else None

"""The loss and the terms that it is made of, in training and held out."""

from __future__ import annotations

from ..blocks import Chart, Panel
from ..curves import charts
from ..names import title, unit, words
from ..page import Page


def build(page: Page) -> Panel | None:
    text = (
        "What training makes smaller: the whole loss, then each term that is trained, without its weight. Bold is the "
        "smoothed course, faint each logged value. A held-out value that rises while training falls shows that the "
        "encoder learns its images by heart."
    )
    blocks: list[Chart] = charts(page, "loss", "held_out/loss", "Loss", "", span=3)
    for term in page.terms(trained=True):
        weight = next((run.about["terms"][term] for run in page.runs if run.about.get("terms", {}).get(term)), None)
        said = "" if weight is None else f"Weight in the loss: {weight:g}."
        blocks += charts(page, f"loss/{term}", f"held_out/{term}", title(words(term)), unit(term), said)
    if len(page.runs) > 1:
        text += " Solid curves are training, dashed ones with points are held out."
    return Panel("Loss by term", text, blocks) if blocks else None

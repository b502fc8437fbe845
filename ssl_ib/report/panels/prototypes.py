"""How prototypes are used, of methods that assign features to some."""

from __future__ import annotations

from ..blocks import Panel, Picture, Pictures
from ..curves import charts
from ..names import title, unit, words
from ..page import Page

#: The terms that speak of prototypes, and how each is read.
TERMS = {
    "dead_prototypes": "The share of prototypes that get next to nothing. 0 is best.",
    "marginal_entropy": "How evenly prototypes are used over all images, at most log K of K prototypes. High is good.",
    "assignment_entropy": "How undecided the assignment of one image is. Low is decided; 0 for all is a collapse too.",
    "kl_to_uniform": "What an assignment says beyond an even one, at most log K.",
    "agreement": "How alike student and teacher assign two views of an image.",
}


def build(page: Page) -> Panel | None:
    if not page.has_prototypes:
        return None
    blocks = []
    for term, said in TERMS.items():
        blocks += charts(page, f"loss/{term}", f"held_out/{term}", title(words(term)), unit(term), said)
    shown = [
        Picture(path, f"{run.name}: occupancy")
        for run in page.runs
        for path in page.figures(run)
        if path.stem == "occupancy"
    ]
    said = (
        "Of each end of an epoch, how many prototypes get which share of the assignment, as log2 of the share times K: "
        "0 is an even share. A band around 0 is good; one far below it are dead prototypes."
    )
    blocks += [Pictures(shown, "Prototypes by their share of the assignment", said)] if shown else []
    text = "Whether the prototypes are all in use. A collapse shows as dead prototypes and a falling marginal entropy."
    return Panel("Prototypes", text, blocks)

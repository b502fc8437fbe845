"""Numbers that the criterion logs and that nothing is trained on."""

from __future__ import annotations

from ..blocks import Group, Panel
from ..curves import charts
from ..names import title, unit, words
from ..page import Page
from .prototypes import TERMS


def build(page: Page) -> Panel | None:
    blocks = []
    for term in page.terms(trained=False):
        if page.has_prototypes and term in TERMS:
            continue
        blocks += charts(page, f"loss/{term}", f"held_out/{term}", title(words(term)), unit(term))
    if not blocks:
        return None
    text = (
        "What the criterion measures beside its loss. No gradient comes from these numbers, so they are neither good "
        "nor bad by being small. Those in nats say of information what the panel on information explains."
    )
    return Panel("Watched numbers", text, [Group(f"{len(blocks)} figures", blocks, folded=len(blocks) > 6)])

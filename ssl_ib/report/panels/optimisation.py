"""The learning rate and the size of the gradient."""

from __future__ import annotations

from ..blocks import Panel
from ..curves import charts
from ..page import Page


def build(page: Page) -> Panel | None:
    blocks = charts(page, "lr", None, "Learning rate", raw=False)
    blocks += charts(page, "gradient_norm", None, "Norm of the gradient", text="Before it is clipped.")
    text = "How training is driven. A gradient whose norm jumps or grows without end tells of a rate that is too high."
    return Panel("Optimisation", text, blocks) if blocks else None

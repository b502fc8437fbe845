"""The gradient ledger: which term of the loss moves the encoder, where the run was asked for it."""

from __future__ import annotations

import numpy as np

from ...record.figures import column
from ...record.ledger import pair, summary, terms_of
from ..blocks import Chart, Group, Level, Line, Note, Panel
from ..curves import drawn
from ..names import words
from ..page import Page
from ..reading import RunData


def build(page: Page) -> Panel | None:
    runs = [run for run in page.runs if any("ledger/norm" in row for row in run.evaluations)]
    if not runs:
        return None
    text = (
        "The gradient that each term of the loss sends into the encoder, on held-out images. The shares of the terms "
        "add up to 100 %; a negative share pulls against the whole. Two terms whose cosine is below 0 fight."
    )
    blocks = [_blocks(page, run) for run in runs]
    if len(page.runs) == 1:
        return Panel("Gradient ledger", text, blocks[0])
    return Panel(
        "Gradient ledger", text, [Group(run.name, inner, folded=True) for run, inner in zip(runs, blocks, strict=True)]
    )


def _blocks(page: Page, run: RunData) -> list[Note | Chart]:
    rows = [row for row in run.evaluations if "ledger/norm" in row]
    x, terms = column(rows, page.x_name), terms_of(rows[-1])
    pairs = list(dict.fromkeys(key for row in rows for key in row if key.startswith("ledger/cosine/")))

    def lines(keys: dict[str, str], factor: float = 1.0, positive: bool = False) -> list[Line]:
        found = []
        for color, (key, name) in enumerate(keys.items()):
            y = factor * column(rows, key)
            known = np.isfinite(y) & (y > 0 if positive else True)
            if known.any():
                found.append(Line(name, x[known], y[known], color, marks=True))
        return found

    def norms(title: str, end: str, text: str = "") -> Chart:
        found = lines({f"ledger/{term}/{end}": words(term) for term in terms}, positive=True)
        values = np.concatenate([line.y for line in found]) if found else np.ones(1)
        return Chart(title, found, "", text, page.x_name, log=bool(values.max() > 10 * values.min()))

    shares = lines({f"ledger/{term}/share": words(term) for term in terms}, 100)
    between = {key: " and ".join(map(words, pair(key, terms))) for key in pairs}
    depths = sum(f"ledger/{terms[0]}/depth_{n}" in rows[-1] for n in range(1, 100))
    charts = [
        Chart("Share of the gradient", shares, "%", "", page.x_name, [Level("", 0)]),
        norms("Norm", "norm", "With the term's weight."),
        Chart(
            "Cosine of two terms",
            lines(between),
            "",
            "1 together, 0 apart, below 0 against each other.",
            page.x_name,
            [Level("", 0)],
        ),
    ]
    for depth in range(1, depths + 1):
        where = "at the image" if depth == 1 else "at the features" if depth == depths else ""
        charts.append(norms(f"Norm at depth {depth}" + (f", {where}" if where else ""), f"depth_{depth}"))
    said = summary(rows[-1])
    for term in terms:
        said = said.replace(term, words(term))
    return [
        *([Note(f"At the last evaluation: {said}.", plain=True)] if said else []),
        *drawn([c for c in charts if c.lines]),
    ]

"""What of each factor was kept and dropped, where `ssl-ib-info probe` was called for a run."""

from __future__ import annotations

from ...info.decoding import verdict
from ..blocks import Bar, Bars, Panel, Part
from ..page import Page
from ..reading import RunData


def build(page: Page) -> Panel | None:
    blocks = [_bars(page, run) for run in page.runs if run.probe]
    if not blocks:
        return None
    text = (
        "What a linear classifier reads of each factor off the features, before training and after. Each number is a "
        "lower bound on I(F;Z), and the whole track is its ceiling H(F). Gained and dropped say that it has changed by "
        "more than two standard errors. A factor that the task needs should be kept; one that it does not need may go."
    )
    return Panel("Kept and dropped factors", text, blocks)


def _bars(page: Page, run: RunData) -> Bars:
    states = list(dict.fromkeys(row["state"] for row in run.probe))
    rows = []
    for factor in dict.fromkeys(row["factor"] for row in run.probe):
        parts, read = [], []
        for color, state in enumerate(states):
            for row in run.probe:
                if (row["factor"], row["state"]) == (factor, state):
                    nats, error, ceiling = (float(row[key]) for key in ("nats", "error", "ceiling"))
                    read.append((nats, error))
                    tone = page.color(run) if color == len(states) - 1 else -1
                    said = f"{round(nats, 2) + 0:.2f} ± {error:.2f} of {ceiling:.2f}"
                    parts.append(Part(nats / ceiling if ceiling else 0.0, said, tone))
        note = "" if len(read) < 2 else verdict(read[-1][0] - read[0][0], (read[0][1] ** 2 + read[-1][1] ** 2) ** 0.5)
        rows.append(Bar(factor.replace("_", " "), parts, note))
    legend = [(state, page.color(run) if state == states[-1] else -1) for state in states]
    title = "Nats of each factor" if len(page.runs) == 1 else f"{run.name}, nats of each factor"
    return Bars(title, rows, legend=legend, span=3 if len(page.runs) == 1 else 1)

"""The gradient ledger of a run, read from its rows: a figure over time, and a line of words.

`ssl_ib.evals.ledger` says what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .figures import FAINT, INK, MUTED, chart, clock, column, save, tidy

#: Two terms whose gradients have at most this cosine are said to fight.
FIGHT = -0.1
#: Told apart also by readers who see few colours (Okabe and Ito, 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_LINES = ("-", "--", ":")


def terms_of(row: Iterable[str]) -> list[str]:
    """The terms that a row's ledger is of, in their order; none where it has no ledger."""
    ends = "ledger/", "/depth_1"
    keys = (key for key in row if key.startswith(ends[0]) and key.endswith(ends[1]))
    return [key.removeprefix(ends[0]).removesuffix(ends[1]) for key in keys]


def summary(row: Mapping[str, Any]) -> str:
    """A row's ledger in a line: each term's share, the largest first, terms that fight, and those without a gradient.

    Empty where the row has no ledger.
    """
    terms = terms_of(row)
    norms = {term: row[f"ledger/{term}/norm"] for term in terms}
    shares = {term: row[f"ledger/{term}/share"] for term in terms if norms[term] and f"ledger/{term}/share" in row}
    said = [f"{term} {round(100 * shares[term])} %" for term in sorted(shares, key=lambda term: -shares[term])]
    said = [", ".join(said)] if said else []
    cosines = {key.removeprefix("ledger/cosine/"): row[key] for key in row if key.startswith("ledger/cosine/")}
    said += [f"{pair.replace('/', ' and ')} fight (cosine {cosine:.2f})" for pair, cosine in cosines.items()
             if cosine <= FIGHT]  # fmt: skip
    none = [term for term in terms if norms[term] == 0]
    said += [f"none from {', '.join(none)}"] if none else []
    return "; ".join(said)


def draw(rows: Sequence[dict[str, Any]], path: Path | str) -> None:
    """Draws the ledger over time: the terms' shares and norms, their norms at each depth, and their cosines.

    rows: as in `metrics.jsonl`; those without a ledger are passed over. Without any, nothing is drawn.
    """
    rows = [row for row in rows if "ledger/norm" in row]
    if not rows:
        return
    terms = terms_of(rows[-1])
    depths = max(int(key.rpartition("_")[2]) for key in rows[-1] if key.startswith(f"ledger/{terms[0]}/depth_"))
    pairs = list(dict.fromkeys(key for row in rows for key in row if key.startswith("ledger/cosine/")))
    x, unit = clock(rows)
    style = {
        term: {"color": COLORS[n % len(COLORS)], "linestyle": _LINES[n // len(COLORS) % len(_LINES)]}
        for n, term in enumerate(terms)
    }

    figure = chart(11, 6.8)
    images = int(rows[-1]["ledger/images"])
    figure.suptitle(f"The encoder's gradient on {images:,} held-out images, by term", x=0.01, ha="left", color=INK)
    whole, below = figure.subfigures(2, 1, height_ratios=[1.35, 1])
    above = whole.subplots(1, 3 if pairs else 2, sharex=True)
    share, norm = above[:2]
    share.axhline(0, color=MUTED, linewidth=1)
    for term in terms:
        name = term if any(row.get(f"ledger/{term}/norm") for row in rows) else f"{term}: no gradient"
        _line(share, x, 100 * column(rows, f"ledger/{term}/share"), style[term], name)
        _line(norm, x, _positive(column(rows, f"ledger/{term}/norm")), style[term])
    tidy(share, "Share of the whole gradient (%)", unit)
    whole.legend(
        *share.get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9, frameon=False, labelcolor=INK
    )
    tidy(norm, "Norm, with the term's weight", unit)
    if pairs:
        _cosines(above[2], x, unit, rows, pairs, style)
    _log_scale(norm, rows, [f"ledger/{term}/norm" for term in terms])

    panels = below.subplots(1, depths, sharey=True, squeeze=False)[0]
    for depth, panel in enumerate(panels, start=1):
        keys = [f"ledger/{term}/depth_{depth}" for term in terms]
        for term, key in zip(terms, keys, strict=True):
            _line(panel, x, _positive(column(rows, key)), style[term])
        where = " (at the image)" if depth == 1 < depths else " (at the features)" if depth == depths > 1 else ""
        tidy(panel, f"Norm at depth {depth}{where}", unit, small=True)
        _log_scale(panel, rows, [f"ledger/{term}/depth_{n}" for term in terms for n in range(1, depths + 1)])
    save(figure, path)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, style: dict[str, str], name: str | None = None) -> None:
    axes.plot(x, y, linewidth=1.6, marker="o", markersize=3.5, label=name, **style)


def _positive(y: np.ndarray) -> np.ndarray:
    """Without zeros, which an axis of powers of ten has no place for."""
    return np.where(y > 0, y, np.nan)


def _cosines(
    axes: Axes, x: np.ndarray, unit: str, rows: Sequence[dict[str, Any]], pairs: Sequence[str], style: dict[str, Any]
) -> None:
    """The cosine of every two terms, a line in the colours of both."""
    axes.axhline(0, color=MUTED, linewidth=1)
    for key in pairs:
        y = column(rows, key)
        for term, dashes in zip(pair(key, style), ("-", (0, (3, 3))), strict=True):
            axes.plot(x, y, color=style[term]["color"], linewidth=2, linestyle=dashes)
    axes.set_ylim(-1.05, 1.05)
    tidy(axes, "Cosine of two terms: below 0 they fight", unit)


def pair(key: str, terms: Iterable[str]) -> tuple[str, str]:
    """The two terms of `ledger/cosine/<a>/<b>`."""
    rest = key.removeprefix("ledger/cosine/")
    return next((a, rest[len(a) + 1 :]) for a in terms if rest.startswith(f"{a}/") and rest[len(a) + 1 :] in terms)


def _log_scale(axes: Axes, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Powers of ten, where the norms span more than one of them."""
    values = np.concatenate([column(rows, key) for key in keys])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.grid(axis="y", color=FAINT, linewidth=0.6)

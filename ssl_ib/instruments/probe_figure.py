"""The picture of a probe: a radar of what share of each factor is held, and accuracies over chance."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from ..record.figures import BLUE, FAINT, INK, MUTED, chart, tidy
from .probe_readings import Probed


def draw(found: Probed, file: Path) -> None:
    """Draws the bounds as shares of H(F) on a radar (rows of dots for fewer than three factors), with accuracies."""
    names = list(found.after)
    figure = chart(12, max(5.4, 1.4 + 0.34 * len(names)))
    figure.suptitle(
        f"{found.name}: what is read of each factor off the features of {found.images:,} held-out images",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    if len(names) < 3:
        panels = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        _dots(panels[0], found, names, lambda read: (read.nats, read.error), "I(F;Z), lower bound (nats)")
    else:
        panels = figure.add_subplot(1, 2, 1, projection="polar"), figure.add_subplot(1, 2, 2)
        _radar(panels[0], found, names)
    count = found.images
    _dots(
        panels[1],
        found,
        names,
        lambda read: (read.accuracy - read.chance, math.sqrt(read.accuracy * (1 - read.accuracy) / count)),
        "accuracy over chance",
    )
    figure.savefig(file)


def _radar(panel: Axes, found: Probed, names: list[str]) -> None:
    angles = [2 * math.pi * number / len(names) for number in range(len(names))]
    lowest = 0.0
    for readings, style in (
        (found.before, {"color": MUTED, "linestyle": (0, (4, 2)), "label": "before training"}),
        (found.after, {"color": BLUE, "label": "after"}),
    ):
        if not readings:
            continue
        shares = [readings[name].nats / readings[name].ceiling for name in names]
        lowest = min(lowest, *shares)
        panel.plot([*angles, angles[0]], [*shares, shares[0]], linewidth=1.6, marker="o", markersize=3.5, **style)
        if style["color"] == BLUE:
            panel.fill([*angles, angles[0]], [*shares, shares[0]], color=BLUE, alpha=0.12)
    panel.set_theta_offset(math.pi / 2)
    panel.set_theta_direction(-1)
    panel.set_ylim(lowest - 0.05 if lowest < 0 else 0, 1)
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.set_xticks(angles, [name.replace("_", " ") for name in names])
    panel.tick_params(colors=MUTED, labelsize=9, pad=8)
    panel.tick_params(axis="y", labelsize=7)
    panel.grid(color=FAINT, linewidth=0.6)
    panel.spines["polar"].set_color(FAINT)
    panel.set_title("Lower bound on I(F;Z) as a share of H(F)", loc="left", fontsize=11, color=INK, pad=24)
    panel.legend(loc="upper left", bbox_to_anchor=(-0.2, 0.06), fontsize=8, frameon=False, labelcolor=MUTED)


def _dots(panel: Axes, found: Probed, names: list[str], value, title: str) -> None:
    """A row a factor, from before (open) to after."""
    for row, name in enumerate(names):
        pair = [value(readings[name]) for readings in (found.before, found.after) if name in readings]
        panel.plot([x for x, _ in pair], [row] * len(pair), color=FAINT, linewidth=3, zorder=1, solid_capstyle="round")
        for (x, error), open_ in zip(pair, [True, False][-len(pair) :], strict=True):
            face = {"markerfacecolor": "white", "color": MUTED} if open_ else {"color": BLUE}
            panel.errorbar([x], [row], xerr=[error], marker="o", markersize=5, elinewidth=1, zorder=2, **face)
    panel.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    tidy(panel, title[:1].upper() + title[1:], "before training (open) and after")
    panel.xaxis.get_major_locator().set_params(integer=False, min_n_ticks=3)
    panel.grid(axis="x", color=FAINT, linewidth=0.6)
    panel.grid(visible=False, axis="y")
    panel.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    panel.set_ylim(len(names) - 0.5, -0.5)

"""The pictures a run leaves in `figures/`: its losses, its kNN accuracy, and what the model saw and rebuilt.

Drawn with matplotlib's objects on the Agg canvas, without pyplot: no display, no global state.

Shapes: B images, C channels, L patches, p pixels a patch side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..errors import UserError
from .files import naming

_DPI = 120
INK, MUTED, FAINT = "#222222", "#6b6b6b", "#d9d9d9"
BLUE, TEAL = "#2a5f9e", "#3b8686"
_GREY = 0.55  # of a hidden patch, in [0, 1]
#: What an accuracy is compared with, by its name in `results.json`, in words.
REFERENCES = {
    "raw_pixels": "raw pixels",
    "untrained": "untrained encoder",
    "initial": "initial encoder",
    "chance": "chance",
}
_LEFT = 148  # pixels beside a sheet of images, for the rows' names


def loss_curves(rows: Sequence[dict[str, Any]], path: Path | str) -> None:
    """Draws `loss` over the run, and below it one small panel a `loss/<term>`: the raw values faint, smoothed on top.

    rows: as in `metrics.jsonl`; those without a loss are passed over. Raises UserError where none has one.
    """
    rows = [row for row in rows if "loss" in row]
    if not rows:
        raise UserError("loss curves: expected rows with `loss`, got none")
    x, unit = clock(rows)
    terms = list(dict.fromkeys(key for row in rows for key in row if key.startswith("loss/")))
    columns = min(max(len(terms), 1), 3)
    small_rows = math.ceil(len(terms) / columns)

    figure = chart(8, 3.4 + 1.9 * small_rows)
    grid = figure.add_gridspec(1 + small_rows, columns, height_ratios=[1.7] + [1] * small_rows)
    total = figure.add_subplot(grid[0, :])
    _curve(total, x, column(rows, "loss"), BLUE)
    tidy(total, "Training loss", unit)
    for place, term in enumerate(terms):
        panel = figure.add_subplot(grid[1 + place // columns, place % columns], sharex=total)
        _curve(panel, x, column(rows, term), TEAL)
        tidy(panel, term.removeprefix("loss/"), unit, small=True)
    save(figure, path)


def knn_curve(
    rows: Sequence[dict[str, Any]],
    path: Path | str,
    raw_pixels: float | None = None,
    untrained: float | None = None,
    chance: float | None = None,
    images: int | None = None,
    initial: float | None = None,
) -> None:
    """Draws `knn/top1` over the run, against the same classifier on raw pixels and on the encoder as it started:
    `untrained`, or `initial` where it started from given weights.

    rows:   as in `metrics.jsonl`; those without `knn/top1` are passed over.
    chance: accuracy of guessing, for one more line.
    images: held-out images n that each accuracy p was measured on; with it, a band of one binomial standard error
        sqrt(p (1 - p) / n) to either side: what another test set of this size would change.

    All accuracies are in [0, 1]; a reference that is None is left out. Raises UserError where no row has an accuracy.
    """
    rows = [row for row in rows if "knn/top1" in row]
    if not rows:
        raise UserError("kNN curve: expected rows with `knn/top1`, got none")
    x, unit = clock(rows)
    accuracy = 100 * column(rows, "knn/top1")

    figure = chart(8, 4)
    axes = figure.add_subplot()
    axes.plot(x, accuracy, color=BLUE, linewidth=2, marker="o", markersize=4.5, zorder=3)
    if images:
        error = 100 * standard_error(accuracy / 100, images)
        label = f"± 1 standard error of {images:,} test images"
        axes.fill_between(x, accuracy - error, accuracy + error, color=BLUE, alpha=0.18, linewidth=0, label=label)
        # A run evaluated once has no curve to put a band around.
        axes.errorbar(x, accuracy, yerr=error, fmt="none", ecolor=BLUE, elinewidth=1, capsize=2, alpha=0.6)
        axes.legend(loc="best", fontsize=8, frameon=False, labelcolor=MUTED)
    lines = [("this run", accuracy[-1], BLUE)]
    dashed, dotted = (0, (5, 3)), (0, (1, 2))
    known = {"raw_pixels": raw_pixels, "untrained": untrained, "initial": initial, "chance": chance}
    for key, name in REFERENCES.items():
        value, style = known[key], dotted if key == "chance" else dashed
        if value is not None:
            axes.axhline(100 * value, color=MUTED, linewidth=1, linestyle=style)
            lines.append((name, 100 * value, MUTED))
    axes.margins(y=0.1)
    _label_lines(axes, [line for line in lines if np.isfinite(line[1])])
    tidy(axes, "kNN top-1 accuracy on frozen features (%)", unit)
    save(figure, path)


def reconstructions(
    views: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    reconstructions: Sequence[Tensor | None] | None,
    patch: int,
    path: Path | str,
    num: int = 8,
    names: Sequence[str] = (),
    note: str = "",
) -> None:
    """Draws the first `num` images as columns; as rows, for each view: the view, and of each of its masks the view
    masked and its reconstruction.

    views:           one [B, 3, H, W] a view, in [0, 1]; H and W may differ between views.
    masks:           one bool [B, L] or [B, N, L] a view, True = hidden, over the patches row-major; None for no mask.
    reconstructions: one [B, 3, H, W] or [B, N, 3, H, W] a view, in [0, 1] (values outside are clipped), or None.
    patch:           side of a patch in pixels. Raises UserError where the views are not cut into L patches of it.
    names:           what stands above the columns, such as the images' classes.
    note:            what of a reconstruction is predicted and what is not, for the title.
    """
    if reconstructions is None:
        reconstructions = [None] * len(views)
    groups = []
    for number, (view, mask, image) in enumerate(zip(views, masks, reconstructions, strict=True), start=1):
        groups.append([(f"view {number}" if len(views) > 1 else "image", view[:num])])
        mask = mask[:, None] if mask is not None and mask.ndim == 2 else mask
        image = image[:, None] if image is not None and image.ndim == 4 else image
        num_masks = max([x.shape[1] for x in (mask, image) if x is not None], default=0)
        for n in range(num_masks):
            which = f" {n + 1}" if num_masks > 1 else ""
            if mask is not None:
                groups[-1].append((f"masked{which}", hide(view[:num], mask[:num, n], patch)))
            if image is not None:
                groups[-1].append((f"reconstruction{which}", image[:num, n]))
    rebuilt = any(image is not None for image in reconstructions)
    titles = ["What the model sees, and what it reconstructs" if rebuilt else "What the model sees"]
    if any(mask is not None for mask in masks):
        titles.append("Grey patches are hidden from the encoder.")
    if rebuilt and note:
        titles.append(f"In a reconstruction {note}.")
    save(contact_sheet(groups, titles, names), path)


def attention(images: Tensor, maps: Tensor, path: Path | str, num: int = 8, names: Sequence[str] = ()) -> None:
    """Draws the first `num` images as columns, and below each its attention: the heads' mean, then each of up to 6.

    images [B, 3, H, W] in [0, 1]; maps [B, h, rows, columns] of at least 0. The colours of a row go from 0 to the
    row's largest weight, which its name states, so that its images can be compared. names: what stands above the
    columns.
    """
    images, maps = images[:num], maps[:num].float()
    rows = [("image", images)]
    heads = [(f"head {head + 1}", maps[:, head]) for head in range(min(maps.shape[1], 6))]
    for name, weights in [("mean of heads", maps.mean(dim=1)), *heads]:
        largest = weights.max()
        shown = F.interpolate((weights / largest.clamp(min=1e-12))[:, None], images.shape[2:])[:, 0]
        heat = torch.from_numpy(colormaps["magma"](shown.numpy())[..., :3]).permute(0, 3, 1, 2)
        rows.append((f"{name}\n0 to {_percent(largest)}", heat))
    even = 1 / maps[0, 0].numel()
    titles = [
        "Where the class token looks: the share of its attention that each patch gets, in the last block",
        f"A share spread evenly over the patches would be {_percent(even)}.",
    ]
    figure = contact_sheet([rows], titles, names, foot=64)
    width, height = figure.get_size_inches() * _DPI
    bar = figure.add_axes((_LEFT / width, 42 / height, min(3 * 118, width - _LEFT - 12) / width, 10 / height))
    bar.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap="magma", extent=(0, 1, 0, 1))
    bar.set_yticks([])
    bar.set_xticks([0, 1], ["0", "the row's largest"])
    bar.get_xticklabels()[0].set_ha("left")
    bar.get_xticklabels()[1].set_ha("right")
    bar.tick_params(colors=MUTED, labelsize=8, length=2)
    bar.spines[:].set_visible(False)
    save(figure, path)


def _percent(share: float) -> str:
    """A share with three digits, in per cent."""
    return f"{100 * float(share):.3g} %"


def occupancy(shares: Tensor, limit: float, path: Path | str) -> None:
    """Draws how prototypes are used over time: shares [T, bins], each row a histogram that adds up to 1.

    The bins divide log2(share of the assignment / an equal share) from -limit to limit.
    """
    figure = chart(7, 3.6)
    axes = figure.add_subplot()
    extent = (0, max(len(shares), 1), -limit, limit)
    shown = axes.imshow(shares.T.cpu().numpy(), origin="lower", aspect="auto", cmap="magma", extent=extent, vmin=0)
    axes.set_title("Prototypes by their share of the assignment", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("time (ends of epochs)", fontsize=9, color=MUTED)
    axes.set_ylabel("log2(share x K)", fontsize=9, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=axes, label="share of prototypes")
    save(figure, path)


def hide(images: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Greys the hidden patches: images [B, C, H, W] in [0, 1], mask bool [B, L] (True = hidden) -> [B, C, H, W].

    Raises UserError where the images are not cut into L patches of side `patch`.
    """
    height, width = images.shape[-2:]
    rows, columns = height // patch, width // patch
    if (rows * patch, columns * patch) != (height, width) or mask.shape[1] != rows * columns:
        raise UserError(
            f"mask: expected one entry a patch of side {patch} in an image of {height} x {width} pixels, "
            f"got {mask.shape[1]} entries"
        )
    hidden = mask.reshape(-1, 1, rows, columns).repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
    return images.masked_fill(hidden, _GREY)


def unpatchify(pred: Tensor, grid: tuple[int, int], channels: int = 3) -> Tensor:
    """Puts patches together: [B, L, p * p * C] -> images [B, C, rows * p, columns * p], with grid = (rows, columns).

    In MAE's order: patches row-major; within a patch row, column, channel, the channel running fastest.
    """
    rows, columns = grid
    batch, num_patches, numbers = pred.shape
    p = math.isqrt(numbers // channels)
    fits = num_patches == rows * columns and numbers == channels * p * p
    assert fits, f"{tuple(pred.shape)} is no {rows} x {columns} grid"
    patches = pred.view(batch, rows, columns, p, p, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * p, columns * p)


def chart(width: float, height: float) -> Figure:
    """An empty figure of so many inches, whose axes will fill it."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path | str) -> None:
    """Writes a figure in the format that the path ends in. Raises OSError, with the path, where the disk refuses."""
    with naming(Path(path)):
        figure.savefig(path)


def clock(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, str]:
    """What to draw the rows over: their epochs where no two share one, otherwise their steps."""
    epochs = column(rows, "epoch")
    if (np.diff(epochs) > 0).all():
        return epochs, "epoch"
    return column(rows, "step"), "step"


def column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """A column of the rows, nan where a row has no such number."""
    values = (row.get(key) for row in rows)
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    y = np.where(np.isfinite(y), y, np.nan)
    if len(y) < 30:
        axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=3)
        return
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.25)
    axes.plot(x, smooth(y, width=smoothing(len(y))), color=color, linewidth=1.6)


def smooth(y: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window of `width` (made odd) points, fewer at the ends; nan counts for nothing, and stays."""
    window, finite = np.ones(2 * (width // 2) + 1), np.isfinite(y)
    count = np.convolve(finite, window, mode="same")
    mean = np.convolve(np.where(finite, y, 0), window, mode="same") / np.maximum(count, 1)
    return np.where(finite, mean, np.nan)


def smoothing(points: int) -> int:
    """The width of the window that a curve of so many points is smoothed with."""
    return max(points // 40, 3)


def standard_error(accuracy: np.ndarray, images: int) -> np.ndarray:
    """One binomial standard error sqrt(p (1 - p) / n) of accuracies p in [0, 1], each measured on n images."""
    return np.sqrt(accuracy * (1 - accuracy) / images)


def tidy(axes: Axes, title: str, unit: str, small: bool = False) -> None:
    size = 9 if small else 10
    axes.set_title(title, loc="left", fontsize=size + 1, color=INK)
    axes.set_xlabel(unit, fontsize=size - 1, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=size - 1, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    # Whole epochs or steps, as long as that leaves two of them to mark; a single point has only one.
    ticks = 2 if axes.dataLim.width else 1
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4 if small else 8, integer=True, min_n_ticks=ticks))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if small else 6, steps=[1, 2, 5, 10]))


def _label_lines(axes: Axes, lines: Sequence[tuple[str, float, str]]) -> None:
    """Names lines (name, height in %, colour) at the right of the axes, spread so that no two names overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.065 * (top - bottom)
    height = -math.inf
    for name, value, color in sorted(lines, key=lambda line: line[1]):
        height = max(value, height + gap)
        axes.text(
            1.01,
            height,
            f"{name}  {value:.1f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            color=color,
            fontsize=9,
        )


def contact_sheet(
    groups: Sequence[Sequence[tuple[str, Tensor]]], titles: Sequence[str], names: Sequence[str] = (), foot: int = 0
) -> Figure:
    """Draws groups of named rows of images [n, C, H, W], each row's name at the left, pixel for pixel.

    titles: the lines above them, the first one larger. names: above the columns. foot: pixels left free below.
    """
    gap, between, left = 6, 20, _LEFT
    head = 40 + 18 * (len(titles) - 1) + (18 if names else 0)
    tiles = [[(name, _enlarge(images)) for name, images in group] for group in groups]
    every = [row for group in tiles for _, row in group]
    cell = max(row.shape[2] for row in every) + gap
    width = left + max(map(len, every)) * cell + gap
    height = head + sum(row.shape[1] + gap for row in every) + between * (len(groups) - 1) + gap + foot
    sheet = np.ones((height, width, 3), dtype=np.float32)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    for line, text in enumerate(titles):
        where = left / width, 1 - (20 + 19 * line) / height
        figure.text(*where, text, color=MUTED if line else INK, fontsize=9 if line else 11, va="center")
    letters = (cell - gap) // 9
    for column, name in enumerate(names):
        where = (left + column * cell + (cell - gap) / 2) / width, 1 - (head - 10) / height
        short = name if len(name) <= letters else f"{name[: letters - 1]}…"
        figure.text(*where, short, color=MUTED, fontsize=9, ha="center", va="center")
    y = head
    for group in tiles:
        for name, row in group:
            _, h, w, _ = row.shape
            for column, tile in enumerate(row):
                x = left + column * cell + (cell - gap - w) // 2
                sheet[y : y + h, x : x + w] = tile
            where = (left - 10) / width, 1 - (y + h / 2) / height
            figure.text(*where, name, color=MUTED, fontsize=9, ha="right", va="center")
            y += h + gap
        y += between
    figure.figimage(sheet, zorder=-1)
    return figure


def _enlarge(images: Tensor) -> np.ndarray:
    """Images [n, C, H, W] in [0, 1], C 1 or 3, as tiles [n, h, w, 3] about 100 to 200 pixels high."""
    images = images.detach().float().cpu().clamp(0, 1)
    height = images.shape[2]
    if height > 200:
        images = F.interpolate(images, scale_factor=160 / height, mode="bilinear", antialias=True)
    else:
        # By a whole factor, so that a pixel stays a square and the borders of patches stay sharp.
        zoom = max(1, math.ceil(112 / height))
        images = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()

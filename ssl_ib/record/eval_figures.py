"""Pictures of evaluations: which classes are taken for which, which images are near to which, and a map of features.

Shapes: m images, C classes, D feature dimensions, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, hsv_to_rgb
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from .figures import FAINT, INK, MUTED, chart, save, tidy

#: Classes whose names fit beside a matrix, and numbers into its cells; classes that a map can tell apart.
_NAMED, _NUMBERED, _COLOURED = 40, 20, 20
#: Inches of a picture with a mask, how much a mask covers it, and the classes that its legend has.
_PICTURE, _OVER, _LEGEND = 2.6, 0.7, 24
#: Boxes on an image that have room for their scores.
_SCORED = 40


def confusion(labels: Tensor, named: Tensor, classes: Sequence[str], path: Path | str, title: str) -> None:
    """Draws how the images of each class are named, in per cent of them: the diagonal is what is right.

    labels, named: int64 [m], the true classes and those that were named. Above 40 classes, the 40 that are named wrong
    most often are shown.
    """
    labels, named = labels.cpu(), named.cpu()
    counts = torch.zeros(len(classes), len(classes), dtype=torch.float64)
    counts.index_put_((labels, named), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    totals = counts.sum(dim=1)
    shown = torch.arange(len(classes))
    if len(classes) > _NAMED:
        shown = (totals - counts.diagonal()).topk(_NAMED).indices.sort().values
    shares = (100 * counts / totals.clamp_min(1)[:, None])[shown][:, shown]
    names = [classes[k] for k in shown.tolist()]

    side = min(max(3.6, 0.42 * len(names)), 13)
    figure = chart(side + 1.6, side + 1.2)
    axes = figure.add_subplot()
    drawn = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    if len(names) <= _NUMBERED:
        for row, column in (shares >= 0.5).nonzero().tolist():
            value = float(shares[row, column])
            color = "white" if value > 55 else INK
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.spines[:].set_color(FAINT)
    axes.set_xlabel("named", fontsize=9, color=MUTED)
    axes.set_ylabel("true", fontsize=9, color=MUTED)
    right = 100 * (labels == named).double().mean().item()
    which = f", the {len(names)} classes most often named wrong" if len(classes) > len(names) else ""
    axes.set_title(f"{title}: {right:.1f} % right{which}", loc="left", fontsize=11, color=INK)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.set_label("% of the class's images", fontsize=9, color=MUTED)
    bar.ax.tick_params(colors=MUTED, labelsize=8)
    save(figure, path)


def nearest(
    queries: Sequence[tuple[Tensor, str]],
    found: Sequence[Sequence[tuple[Tensor, str]]],
    cosines: Tensor,
    path: Path | str,
) -> None:
    """Draws images with the training images nearest to them, each with its class and cosine; wrong classes in red.

    queries: images uint8 [3, H, W] with their class. found: as many rows of the nearest ones. cosines: [rows, columns].
    """
    columns = 1 + max(map(len, found))
    figure = chart(1.25 * columns, 1.5 * len(queries) + 0.5)
    figure.suptitle("Held-out images, and the training images nearest to them by cosine", x=0.02, ha="left", color=INK)
    grid = figure.subplots(len(queries), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, ((image, name), others) in enumerate(zip(queries, found, strict=True)):
        cells = [(image, name, INK)]
        for (other, label), cosine in zip(others, cosines[row].tolist(), strict=True):
            cells.append((other, f"{label} {cosine:.2f}", MUTED if label == name else "#b03030"))
        for axes, (picture, text, color) in zip(grid[row], cells, strict=False):
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_title(text if len(text) < 20 else f"{text[:12]}… {text[-4:]}", fontsize=8, color=color)
    save(figure, path)


@dataclass(frozen=True)
class Marks:
    """Objects on an image.

    boxes: float32 [k, 4], left, top, right, bottom in pixels. labels: int64 [k]. scores: float32 [k], in [0, 1]; None
    where they are true ones. masks: uint8 [k, H, W], 1 on the object; None where there are none.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    masks: Tensor | None = None


def detections(
    images: Sequence[Tensor],
    true: Sequence[Marks],
    found: Sequence[Marks],
    classes: Sequence[str],
    path: Path | str,
    least: float,
) -> None:
    """Draws images uint8 [3, H, W] twice, with the true boxes and with those that were found; colours are classes.

    least: the score of those that are drawn, in [0, 1].
    """
    columns = 2 if len(images) > 1 else 1
    rows = -(-len(images) // columns)
    ratio = max(image.shape[1] / image.shape[2] for image in images)
    figure = chart(5.6 * columns, 2.7 * ratio * rows + 1)
    title = f"Held-out images: what is there, and what was found with a score of {100 * least:.0f} % or more"
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, color=INK)
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    there: set[int] = set()
    for axes in grid.flat:
        axes.axis("off")
    for number, (image, *both) in enumerate(zip(images, true, found, strict=True)):
        row, column = divmod(number, columns)
        for side, marks in enumerate(both):
            axes = grid[row, 2 * column + side]
            axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, image.shape[2], image.shape[1], 0))
            there.update(marks.labels.tolist())
            _mark(axes, marks, palette)
            axes.set_title(f"{'found' if side else 'true'}: {len(marks.labels)}", fontsize=8, color=MUTED, pad=3)
    if there:
        keys = [Rectangle((0, 0), 1, 1, color=palette(k % palette.N), label=classes[k]) for k in sorted(there)]
        figure.legend(
            handles=keys[:_COLOURED], loc="outside lower left", ncols=8, fontsize=8, frameon=False, labelcolor=MUTED
        )
    save(figure, path)


def _mark(axes: Axes, marks: Marks, palette: Colormap) -> None:
    crowded = len(marks.labels) > _SCORED
    for k, (box, label) in enumerate(zip(marks.boxes.tolist(), marks.labels.tolist(), strict=True)):
        color = palette(label % palette.N)
        left, top, right, bottom = box
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.2))
        if marks.masks is not None:
            tint = marks.masks[k].bool()[:, :, None] * torch.tensor([*color[:3], 0.45])
            axes.imshow(tint.numpy(), extent=axes.images[0].get_extent())
        if marks.scores is not None and not crowded:
            text = f"{100 * float(marks.scores[k]):.0f}"
            how = {"fontsize": 5, "color": "white", "va": "top", "ha": "left", "clip_on": True}
            axes.text(left, top, text, bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8}, **how)


def precision_by_recall(curves: Tensor, classes: Sequence[str], path: Path | str, title: str) -> None:
    """Draws the precision at each recall: float64 [R, K] for R recalls from 0 to 1; classes with -1 are left out.

    Above 20 classes, the 20 with the lowest mean precision are drawn.
    """
    means = curves.mean(dim=0)
    there = [k for k in means.argsort(stable=True).tolist() if curves[0, k] >= 0]
    figure = chart(7.2, 4.4)
    axes = figure.add_subplot()
    drawn = sorted(there[:_COLOURED])
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    recalls = torch.linspace(0, 1, len(curves)).numpy()
    for k in drawn:
        label = f"{classes[k]}, {100 * float(means[k]):.1f} %"
        axes.plot(recalls, curves[:, k].numpy(), color=palette(k % palette.N), linewidth=1.6, label=label)
    tidy(
        axes, title + (f", the {len(drawn)} worst of {len(there)} classes" if len(there) > len(drawn) else ""), "recall"
    )
    axes.set_ylabel("precision", fontsize=9, color=MUTED)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, labelcolor=MUTED)
    save(figure, path)


def feature_map(
    features: Tensor, labels: Tensor, classes: Sequence[str], path: Path | str, method: str = "tsne"
) -> None:
    """Draws features [m, D] in two dimensions, coloured by class: by t-SNE of 50 principal components, or by two.

    labels: int64 [m]. method: "tsne" or "pca". The 20 most frequent classes have colours. Fewer than 10 features are
    drawn by PCA. What t-SNE shows is which features are near; distances between groups mean little.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    method = method if len(features) >= 10 else "pca"
    points = features.float().numpy()
    reduced = PCA(min(50 if method == "tsne" else 2, *points.shape), random_state=0).fit_transform(points)
    if method == "tsne":
        perplexity = min(30.0, (len(points) - 1) / 3)
        reduced = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
    figure = chart(8, 6.4)
    axes = figure.add_subplot()
    frequent = labels.bincount(minlength=len(classes)).argsort(descending=True, stable=True)[:_COLOURED]
    frequent = [k for k in frequent.sort().values.tolist() if (labels == k).any()]
    rest = ~torch.isin(labels, torch.tensor(frequent))
    if rest.any():
        axes.scatter(*reduced[rest.numpy()].T[:2], s=5, color=FAINT, linewidths=0, label="other classes")
    palette = colormaps["tab10" if len(frequent) <= 10 else "tab20"]
    for number, k in enumerate(frequent):
        here = reduced[(labels == k).numpy()]
        axes.scatter(here[:, 0], here[:, -1], s=7, color=palette(number), alpha=0.8, linewidths=0, label=classes[k])
    names = {"tsne": "t-SNE of 50 principal components", "pca": "the two first principal components"}
    title = f"Features of {len(points):,} held-out images: {names[method]}"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(FAINT)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, labelcolor=MUTED, markerscale=2
    )
    save(figure, path)


def masks(
    pictures: Sequence[tuple[Image.Image, Tensor, Tensor]],
    classes: Sequence[str],
    iou: Mapping[str, float | None],
    path: Path | str,
) -> None:
    """Draws images with their true and their predicted masks over them, and the IoU of each class.

    pictures: images with the true and the named class of each pixel, [H, W]; -1 is void, and has no colour.
    iou:      of each class by its name, in [0, 1]; None where it has no pixel.
    """
    palette = _palette(len(classes))
    wide, tall = pictures[0][0].size
    figure = chart(3 * _PICTURE + 1.8, len(pictures) * (_PICTURE * tall / wide + 0.06) + 0.8)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    known = [value for value in iou.values() if value is not None]
    title = f"Held-out images: mIoU {100 * sum(known) / len(known):.1f} % over {len(known)} classes"
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, color=INK)
    grid = figure.subplots(len(pictures), 3, squeeze=False)
    for axes, what in zip(grid[0], ("image", "true classes (void is grey)", "predicted classes"), strict=True):
        axes.set_title(what, loc="left", fontsize=9, color=MUTED)
    for row, (image, true, named) in zip(grid, pictures, strict=True):
        pixels = torch.from_numpy(np.array(image)) / 255
        grey = pixels.mean(dim=2, keepdim=True).expand(-1, -1, 3)
        for axes, mask in zip(row, (None, true, named), strict=True):
            shown = pixels
            if mask is not None:
                coloured = (1 - _OVER) * grey + _OVER * palette[mask.long().clamp_min(0)]
                shown = torch.where((mask >= 0)[..., None], coloured, grey)
            axes.imshow(shown.numpy(), interpolation="nearest")
            axes.axis("off")
    counts = sum(mask[mask >= 0].long().bincount(minlength=len(classes)) for _, *both in pictures for mask in both)
    frequent = counts.argsort(descending=True, stable=True)[:_LEGEND]
    entries = []
    for k in frequent[counts[frequent] > 0].sort().values.tolist():
        value = iou[classes[k]]
        share = "no pixel" if value is None else f"{100 * value:.1f}"
        entries.append(Patch(facecolor=palette[k].tolist(), label=f"{classes[k]}  {share}"))
    figure.legend(
        handles=entries,
        loc="outside right upper",
        title="IoU (%)",
        title_fontsize=9,
        fontsize=9,
        frameon=False,
        labelcolor=INK,
        alignment="left",
    )
    save(figure, path)


def _palette(count: int) -> Tensor:
    """Colours that are easily told apart where there are few of them: [count, 3] in [0, 1]."""
    if count <= 20:
        colours = colormaps["tab10" if count <= 10 else "tab20"](np.arange(count))[:, :3]
    else:
        number = np.arange(count)
        # Neighbours on the list are far from each other on the circle of hues.
        colours = hsv_to_rgb(np.stack([number * 0.618 % 1, 0.5 + 0.17 * (number % 4), 0.95 - 0.15 * (number % 3)], 1))
    return torch.from_numpy(np.ascontiguousarray(colours)).float()

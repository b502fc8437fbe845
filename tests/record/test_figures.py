"""The figures: real pictures, that show what they are given."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_ib import UserError
from ssl_ib.record import figures

GREY = round(0.55 * 255)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def loss_rows(n: int) -> list[dict]:
    return [{"step": i, "epoch": i // 10, "loss": 1 + math.exp(-i / 20), "loss/a": 1.0, "loss/b": i} for i in range(n)]


@pytest.mark.parametrize("n", [1, 5, 200])
def test_loss_curves(tmp_path, n):
    rows = loss_rows(n)
    rows[n // 2] |= {"loss": math.nan, "loss/a": None}
    rows.append({"step": n, "epoch": n // 10, "knn/top1": 0.5})
    figures.loss_curves(rows, tmp_path / "loss.png")
    with_terms = pixels(tmp_path / "loss.png")
    figures.loss_curves(
        [{"step": r["step"], "epoch": r["epoch"], "loss": r.get("loss")} for r in rows], tmp_path / "t.png"
    )
    total = pixels(tmp_path / "t.png")
    assert with_terms.shape[0] > total.shape[0] > 200
    assert with_terms.std() > 5 and total.std() > 5


def test_loss_curves_show_the_losses(tmp_path):
    rows = loss_rows(40)
    figures.loss_curves(rows, tmp_path / "a.png")
    rows[20]["loss/b"] = 500
    figures.loss_curves(rows, tmp_path / "b.png")
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()


def test_smoothing_keeps_constants_and_ignores_gaps():
    y = np.full(50, 3.0)
    y[[0, 20, 49]] = np.nan
    smooth = figures.smooth(y, width=7)
    assert np.array_equal(np.isnan(smooth), np.isnan(y))
    np.testing.assert_allclose(smooth[~np.isnan(y)], 3.0)
    line = np.arange(30.0)
    np.testing.assert_allclose(figures.smooth(line, width=5)[2:-2], line[2:-2])


def test_the_axis_is_epochs_only_where_they_tell_the_rows_apart():
    by_epoch = [{"step": 10 * i, "epoch": i} for i in range(3)]
    assert figures.clock(by_epoch)[1] == "epoch"
    x, unit = figures.clock(by_epoch + [{"step": 25, "epoch": 2}])
    assert unit == "step" and x.tolist() == [0, 10, 20, 25]


def test_knn_curve_draws_its_references(tmp_path):
    rows = [{"step": i, "epoch": i, "knn/top1": 0.3 + 0.02 * i} for i in range(8)] + [{"step": 9, "epoch": 9}]
    pictures = []
    for references in ((None, None), (0.35, None), (0.35, 0.4)):
        figures.knn_curve(rows, tmp_path / "knn.png", *references)
        pictures.append(pixels(tmp_path / "knn.png"))
    assert all((a != b).any() for a, b in zip(pictures, pictures[1:], strict=False))
    figures.knn_curve([{"step": 1, "epoch": 1, "knn/top1": math.nan}], tmp_path / "nan.png", 0.3, math.nan)
    assert pixels(tmp_path / "nan.png").std() > 1


def test_knn_curve_has_the_error_of_its_test_set_and_chance(tmp_path, monkeypatch):
    made = []
    chart = figures.chart
    monkeypatch.setattr(figures, "chart", lambda *size: made.append(chart(*size)) or made[-1])
    rows = [{"step": i, "epoch": i, "knn/top1": p} for i, p in enumerate((0.5, 0.9))]
    figures.knn_curve(rows, tmp_path / "knn.png", 0.8, 0.4, chance=0.1, images=400)
    (axes,) = made[0].axes
    (band,) = (c for c in axes.collections if "error" in c.get_label())
    assert "400 test images" in band.get_label()
    heights = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices}
    # 100 sqrt(p (1 - p) / 400): 2.5 and 1.5.
    assert {(0, 47.5), (0, 52.5), (1, 88.5), (1, 91.5)} <= heights
    names = {text.get_text() for text in axes.texts}
    assert names == {"this run  90.0", "raw pixels  80.0", "untrained encoder  40.0", "chance  10.0"}
    assert [10.0, 10.0] in [list(line.get_ydata()) for line in axes.lines]
    figures.knn_curve(rows, tmp_path / "knn.png", 0.8, 0.4)
    (axes,) = made[1].axes
    assert axes.get_legend() is None and len(axes.texts) == 3


def test_nothing_to_draw_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="rows with `loss`"):
        figures.loss_curves([{"step": 0, "epoch": 0, "knn/top1": 0.1}], tmp_path / "x.png")
    with pytest.raises(UserError, match="rows with `knn/top1`"):
        figures.knn_curve([], tmp_path / "x.png")


def test_line_names_do_not_overlap():
    axes = figures.chart(8, 4).add_subplot()
    axes.set_ylim(0, 100)
    figures._label_lines(axes, [("a", 50.0, "k"), ("b", 50.1, "k"), ("c", 49.9, "k"), ("d", 90.0, "k")])
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert np.diff(heights).min() >= 6
    assert heights[-1] == 90


def test_reconstructions_differ_where_the_mask_is(tmp_path):
    torch.manual_seed(0)
    views = [torch.rand(3, 3, 16, 16) * 0.4 for _ in range(2)]
    masks = [torch.zeros(3, 16, dtype=torch.bool), None]
    figures.reconstructions(views, masks, None, patch=4, path=tmp_path / "plain.png")
    plain = pixels(tmp_path / "plain.png")
    masks[0][1, 6] = True  # the second image's patch in row 1, column 2
    figures.reconstructions(views, masks, None, patch=4, path=tmp_path / "masked.png")
    masked = pixels(tmp_path / "masked.png")

    assert plain.shape == masked.shape
    changed = (plain != masked).any(axis=2)
    ys, xs = np.nonzero(changed)
    side = 4 * 7  # 16 pixels are shown as 112
    assert changed.sum() == side**2
    assert (np.ptp(ys) + 1, np.ptp(xs) + 1) == (side, side)
    assert np.abs(masked[changed] - GREY).max() <= 1
    # The untouched view lies above it, pixel for pixel: its own patch stands one row of images higher.
    above = masked[ys - 118, xs].reshape(side, side, 3)[::7, ::7]
    expected = views[0][1, :, 4:8, 8:12].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(above, expected, atol=1)


def test_rows_are_left_out_where_there_is_nothing_to_show(tmp_path):
    view, mask = torch.rand(4, 3, 8, 8), torch.rand(4, 4) < 0.5
    heights = []
    for masks, images in (([None], None), ([mask], None), ([None], [view]), ([mask], [view]), ([mask], [None])):
        figures.reconstructions([view], masks, images, 4, tmp_path / "x.png", num=2)
        heights.append(pixels(tmp_path / "x.png").shape[0])
    # 8 pixels are shown as 112, 6 lie between two rows, and a line of 18 says what grey patches are.
    assert [h - heights[0] for h in heights] == [0, 118 + 18, 118, 2 * 118 + 18, 118 + 18]


def test_every_mask_of_an_image_has_its_rows(tmp_path):
    """Rows: the view, then of each mask the view masked and its reconstruction, in the masks' order."""
    view = torch.rand(2, 3, 8, 8) * 0.4
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[:, 1, 2] = True
    images = torch.stack([torch.full((2, 3, 8, 8), level) for level in (0.1, 0.5, 0.9)], dim=1)
    figures.reconstructions([view], [masks], [images], 4, tmp_path / "x.png")
    drawn = pixels(tmp_path / "x.png")
    row, first = 118, 40 + 18
    tiles = [drawn[first + row * n + 4 : first + row * n + 108, 156:256] for n in range(7)]
    for number, level in ((2, 0.1), (4, 0.5), (6, 0.9)):
        assert np.abs(tiles[number] - 255 * level).max() <= 1
    assert np.array_equal(tiles[0], tiles[1]) and np.array_equal(tiles[0], tiles[5])
    assert not np.array_equal(tiles[0], tiles[3])


def test_reconstructions_takes_any_size_of_view(tmp_path):
    views = [torch.rand(2, 3, 64, 32), torch.rand(2, 1, 8, 8), torch.rand(2, 3, 224, 224)]
    images = [None, views[1] * 9 - 4, None]  # a reconstruction may leave [0, 1]
    figures.reconstructions(views, [None] * 3, images, 8, tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").std() > 20


def test_a_mask_of_another_grid_is_a_mistake():
    with pytest.raises(UserError, match="side 4 in an image of 16 x 16 pixels, got 9 entries"):
        figures.hide(torch.rand(2, 3, 16, 16), torch.zeros(2, 9, dtype=torch.bool), 4)
    with pytest.raises(UserError, match="side 5"):
        figures.hide(torch.rand(2, 3, 16, 16), torch.zeros(2, 9, dtype=torch.bool), 5)


def test_unpatchify_is_mae_order():
    rows, columns, p = 2, 3, 4
    images = torch.rand(2, 3, rows * p, columns * p)
    patches = torch.empty(2, rows * columns, p * p * 3)
    for number in range(rows * columns):
        top, left = number // columns * p, number % columns * p
        for i in range(p):
            for j in range(p):
                for c in range(3):
                    patches[:, number, (i * p + j) * 3 + c] = images[:, c, top + i, left + j]
    assert torch.equal(figures.unpatchify(patches, (rows, columns)), images)


def test_a_sheet_names_its_columns(tmp_path):
    view = torch.rand(2, 3, 16, 16)
    figure = figures.contact_sheet([[("image", view)]], ["Title", "More"], ["cat", "a name longer than its image"])
    texts = [text.get_text() for text in figure.texts]
    assert texts[:3] == ["Title", "More", "cat"] and texts[3].endswith("…") and texts[4] == "image"

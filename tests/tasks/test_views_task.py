"""The plain task: a pure function of (seed, epoch, image, view), with masks of its own for each view."""

import pytest
import torch

from ssl_ib import Masks, Progress, RunInfo, Sample, UserError
from ssl_ib.cli.train import main
from ssl_ib.config.registry import MASKERS, TASKS, VIEWS
from ssl_ib.random import image_keys
from ssl_ib.tasks.views import ViewsTask


class Images:
    """A set of 40 random images."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (40, 3, 20, 20), generator=generator, dtype=torch.uint8)

    def __getitem__(self, numbers):
        index = torch.tensor(numbers)
        return Sample(self.images[index], index, index % 10)


IMAGES = Images()


def grid(shape):
    return shape[1] // 4, shape[2] // 4


def info(views, grid=grid):
    return RunInfo(tuple(views.shapes), batch_size=8, grid=grid)


def task(masker="random", ratio=0.5, num_views=2):
    views = VIEWS["plain"](size=16, num_views=num_views)
    masker = None if masker is None else MASKERS[masker](ratio)
    return ViewsTask(views=views, masker=masker, info=info(views))


def progress(epoch=0, seed=0, step=0):
    return Progress(step, epoch, 100, 10, seed)


def assert_rows(batch, rows, whole, whole_rows):
    """Some rows of a batch are some rows of another."""
    for view, other in zip(batch.views, whole.views, strict=True):
        assert torch.equal(view[rows], other[whole_rows])
    for masks, other in zip(batch.masks, whole.masks, strict=True):
        assert torch.equal(masks.keep[rows], other.keep[whole_rows])
        assert torch.equal(masks.mask[rows], other.mask[whole_rows])
    assert torch.equal(batch.index[rows], whole.index[whole_rows])
    assert torch.equal(batch.label[rows], whole.label[whole_rows])


def test_shapes():
    batch = task(ratio=0.75, num_views=3).prepare(IMAGES[list(range(8))], progress())
    assert [view.shape for view in batch.views] == [(8, 3, 16, 16)] * 3
    assert all(view.is_floating_point() for view in batch.views)
    assert [masks.keep.shape for masks in batch.masks] == [(8, 1, 4)] * 3
    assert [masks.mask.shape for masks in batch.masks] == [(8, 1, 16)] * 3
    assert batch.index.tolist() == list(range(8)) == batch.label.tolist()


def test_the_same_images_in_any_batch():
    t = task()
    whole = t.prepare(IMAGES[list(range(12))], progress(3, 7))
    order = [5, 0, 11, 3]
    assert_rows(t.prepare(IMAGES[order], progress(3, 7)), slice(None), whole, order)
    assert_rows(t.prepare(IMAGES[[3]], progress(3, 7)), [0], whole, [3])
    # Another instance, later in the epoch: nothing is remembered.
    assert_rows(task().prepare(IMAGES[[39, 5]], progress(3, 7, step=50)), [1], whole, [5])


@pytest.mark.parametrize("other", [progress(epoch=1), progress(seed=1)])
def test_epochs_and_seeds_differ(other):
    a, b = (task().prepare(IMAGES[list(range(8))], p) for p in (progress(), other))
    for v in range(2):
        assert (a.views[v] != b.views[v]).flatten(1).any(dim=1).all()
        assert not torch.equal(a.masks[v].keep, b.masks[v].keep)


def test_views_and_their_masks_are_drawn_independently():
    batch = task().prepare(IMAGES[list(range(40))], progress())
    assert (batch.views[0] != batch.views[1]).flatten(1).any(dim=1).all()
    first, second = (masks.mask[:, 0].double() for masks in batch.masks)
    # Half of the patches is hidden in each: independent masks agree on half of them, equal ones on all.
    assert (first == second).double().mean().item() == pytest.approx(0.5, abs=0.08)
    assert not (first == second).all(dim=1).any()
    # And images differ.
    assert len(first.unique(dim=0)) == 40


def test_masks_do_not_depend_on_the_views():
    a = task(num_views=1).prepare(IMAGES[list(range(4))], progress())
    b = task(num_views=3).prepare(IMAGES[list(range(4))], progress())
    assert torch.equal(a.masks[0].keep, b.masks[0].keep) and torch.equal(a.views[0], b.views[0])


def test_the_keys_of_the_masks():
    """View v's masks are drawn from stream 1000 + v, its pixels from stream v."""
    index = torch.arange(4)
    batch = task().prepare(IMAGES[index.tolist()], progress(2, 5))
    for v in range(2):
        expected = MASKERS["random"](0.5)(image_keys(5, 2, index, 1000 + v), (4, 4))
        assert torch.equal(batch.masks[v].keep, expected.keep)
    sample = IMAGES[index.tolist()]
    views = VIEWS["plain"](size=16, num_views=2).draw(sample, [image_keys(5, 2, index, v) for v in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(batch.views, views, strict=True))


def test_without_a_masker():
    masked, plain = (task(m).prepare(IMAGES[list(range(4))], progress()) for m in ("random", None))
    assert plain.masks == [None, None]
    # Masking changes no pixel.
    assert all(torch.equal(a, b) for a, b in zip(masked.views, plain.views, strict=True))
    assert masked.unmasked().masks == [None, None]


def test_keep_and_mask_complement_each_other():
    for masker in ("random", "block", "grid"):
        masks = task(masker).prepare(IMAGES[list(range(6))], progress()).masks[1]
        rebuilt = Masks.from_keep(masks.keep, 16)
        assert torch.equal(rebuilt.mask, masks.mask) and (~masks.mask).sum(dim=2).eq(masks.keep.shape[2]).all()


def test_each_view_has_the_grid_of_its_size():
    class Two:
        shapes = [(3, 16, 16), (3, 8, 8)]

        def draw(self, sample, keys):
            return [torch.zeros(len(sample), *shape) for shape in self.shapes]

    t = ViewsTask(views=Two(), masker=MASKERS["random"](0.5), info=info(Two))
    batch = t.prepare(IMAGES[[0, 1]], progress())
    assert [masks.keep.shape for masks in batch.masks] == [(2, 1, 8), (2, 1, 2)]


def test_mistakes():
    views = VIEWS["plain"](size=16)
    with pytest.raises(UserError, match=r"masker RandomMasker needs a model that cuts views of \(3, 16, 16\)"):
        ViewsTask(views=views, masker=MASKERS["random"](0.5), info=info(views, grid=lambda shape: None))
    with pytest.raises(UserError, match="mask ratio 0.99 on a grid of 4 x 4 patches keeps 0"):
        ViewsTask(views=views, masker=MASKERS["random"](0.99), info=info(views))
    # Without a masker nobody needs patches.
    ViewsTask(views=views, masker=None, info=info(views, grid=lambda shape: None))


def test_an_image_counts_once():
    assert TASKS["views"] is ViewsTask and task().samples_per_image == 1
    assert set(TASKS.schema("views")) == {"mask_draw", "lr_batch"}


def several(masker="orthogonal", mask_draw="step", lr_batch="images", **arguments):
    views = VIEWS["plain"](size=16, num_views=2)
    masker = MASKERS[masker](**arguments)

    def masks(grid):
        drawn = masker(torch.zeros(1, dtype=torch.int64), grid)
        return None if drawn is None else tuple(drawn.keep.shape[1:])

    given = RunInfo(tuple(views.shapes), batch_size=8, grid=grid, masks=masks)
    return ViewsTask(views, masker, given, mask_draw, lr_batch)


def test_several_masks_an_image():
    batch = several(ratio=0.75).prepare(IMAGES[list(range(6))], progress())
    assert [view.shape for view in batch.views] == [(6, 3, 16, 16)] * 2  # an image is not repeated
    assert [masks.keep.shape for masks in batch.masks] == [(6, 4, 4)] * 2
    assert not (batch.masks[0].keep == batch.masks[1].keep).flatten(1).all(dim=1).any()


def test_masks_are_drawn_anew_in_each_epoch_or_once_for_good():
    sample, epochs = IMAGES[list(range(8))], [progress(epoch=e, step=10 * e) for e in (0, 1, 5)]
    first, *later = (several("random", ratio=0.5).prepare(sample, p) for p in epochs)
    for other in later:
        assert not (other.masks[0].keep == first.masks[0].keep).flatten(1).all(dim=1).any()
    kept = several(mask_draw="image", ratio=0.75)
    first, *later = (kept.prepare(sample, p) for p in epochs)
    for other in later:
        assert all(torch.equal(a.keep, b.keep) for a, b in zip(other.masks, first.masks, strict=True))
        assert not torch.equal(other.views[0], first.views[0])  # the views still change
    # They are the first epoch's, they differ between images and views, and another run has others.
    fresh = several(ratio=0.75).prepare(sample, progress())
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(fresh.masks, first.masks, strict=True))
    assert len(first.masks[0].keep.flatten(1).unique(dim=0)) == 8
    assert not torch.equal(first.masks[0].keep, first.masks[1].keep)
    assert not torch.equal(kept.prepare(sample, progress(seed=1)).masks[0].keep, first.masks[0].keep)


@pytest.mark.parametrize(
    ("masker", "arguments", "count"),
    [("orthogonal", {}, 4), ("orthogonal", {"ratio": 0.5}, 2), ("independent", {"n_masks": 7}, 7), ("random", {}, 1)],
)
def test_what_an_image_counts_for_in_the_linear_scaling_rule(masker, arguments, count):
    arguments = {"ratio": 0.75} | arguments
    assert several(masker, lr_batch="masks", **arguments).samples_per_image == count
    assert several(masker, lr_batch="images", **arguments).samples_per_image == 1
    assert several(masker, **arguments).samples_per_image == 1


def test_without_a_masker_an_image_counts_once():
    views = VIEWS["plain"](size=16)
    assert ViewsTask(views, None, info(views), lr_batch="masks").samples_per_image == 1


@pytest.mark.parametrize(("lr_batch", "samples", "rate"), [("images", 8, "3.125e-05"), ("masks", 32, "0.000125")])
def test_the_printed_learning_rate_counts_images_or_masks(lr_batch, samples, rate, capsys):
    """A dry run has 8 images a step: base rate x samples / 256."""
    small = "model.backbone_args={patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}"
    given = ["optim.lr=1e-3", "optim.linear_scaling=true", "model.decoder_dim=16", f"task.lr_batch={lr_batch}"]
    assert main(["mi_mae_digits", "--dry-run", "--device", "cpu", small, *given]) == 0
    printed = capsys.readouterr().out
    shown = f"8 images ({samples} masks)" if samples > 8 else "8"
    assert f"batch      {shown} a step" in printed
    assert f"learning rate {rate} (0.001 x {samples / 256:g})" in printed

"""Unlabelled rows and as many labelled ones, drawn from a fixed pool by the row's own key."""

import pytest
import torch

from ssl_ib import Progress, RunInfo, UserError
from ssl_ib.config.registry import MASKERS, VIEWS
from ssl_ib.data.sources.base import InMemory
from ssl_ib.tasks.labelled_pair import LabelledPair
from ssl_ib.tasks.views import ViewsTask


class Source:
    """40 images of 3 classes, of which class c has c + 6 labelled ones."""

    def __init__(self, labelled=True):
        images = torch.randint(256, (40, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        labels = torch.full((40,), -1)
        if labelled:
            labels[:21] = torch.tensor([0] * 6 + [1] * 7 + [2] * 8)
        self.images = InMemory(images, labels, ["ant", "bee", "cow"] if labelled else [])

    def train(self):
        return self.images


def task(masker=None, source=None, **more):
    views = VIEWS["plain"](size=8)
    info = RunInfo(tuple(views.shapes), 8, grid=lambda shape: (2, 2))
    source = source or Source()
    return LabelledPair(views, masker, info, source, **more), ViewsTask(views, masker, info), source.train()


def progress(epoch=0, seed=0):
    return Progress(0, epoch, 10, 10, seed)


def test_the_second_half_is_labelled():
    pair, plain, images = task(MASKERS["random"](0.5), labels_per_class=2)
    sample = images.gather(torch.arange(0, 40, 2))
    batch = pair.prepare(sample, progress())
    alone = plain.prepare(sample, progress())
    assert torch.equal(batch.views[0][:20], alone.views[0]) and torch.equal(
        batch.masks[0].keep[:20], alone.masks[0].keep
    )
    assert batch.views[0].shape == (40, 3, 8, 8) and batch.masks[0].mask.shape == (40, 1, 4)
    assert torch.equal(batch.index[:20], sample.index) and (batch.label[:20] == -1).all()
    # The labelled rows are of the pool, two images a class, each with its own label.
    chosen = batch.index[20:]
    assert torch.equal(batch.label[20:], images.labels[chosen])
    assert len(pair.pool) == 6 and set(chosen.tolist()) <= set(pair.pool.tolist())
    assert images.labels[pair.pool].bincount().tolist() == [2, 2, 2]
    # An image that comes twice is seen in two views.
    assert len({tuple(view.flatten().tolist()) for view in batch.views[0][20:]}) == 20


def test_a_row_s_partner_depends_on_seed_epoch_and_image_alone():
    pair, _, images = task()
    whole = pair.prepare(images.gather(torch.arange(8)), progress())
    few = pair.prepare(images.gather(torch.tensor([5, 2])), progress())
    assert torch.equal(few.index[2:], whole.index[8:][[5, 2]])
    assert torch.allclose(few.views[0][2:], whole.views[0][8:][[5, 2]], atol=1e-5)
    for other in (progress(epoch=1), progress(seed=1)):
        assert not torch.equal(pair.prepare(images.gather(torch.arange(8)), other).index[8:], whole.index[8:])
    assert len(pair.pool) == 21


def test_evaluation_has_the_images_alone():
    pair, plain, images = task()
    sample = images.gather(torch.arange(18, 24))
    batch = pair.eval().prepare(sample, progress())
    assert torch.equal(batch.views[0], plain.prepare(sample, progress()).views[0])
    assert torch.equal(batch.label, sample.label)


def test_mistakes():
    with pytest.raises(UserError, match="labels_per_class=7: .* of each class, but 'ant' has 6$"):
        task(labels_per_class=7)
    with pytest.raises(UserError, match="needs labelled training images, and the source has none"):
        task(source=Source(labelled=False))

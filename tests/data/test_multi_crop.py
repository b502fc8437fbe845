"""Multi-crop: how many views of which size, of how much of the image, and which of them a teacher sees."""

import pytest
import torch

from ssl_ib import Progress, RunInfo, UserError, random
from ssl_ib.config.registry import build_part, check_part
from ssl_ib.tasks.views import ViewsTask
from ssl_ib.types import Sample


def build(**arguments):
    problems = []
    spec = check_part("views", {"name": "multi_crop", **arguments}, "views", problems)
    if problems:
        raise UserError("\n".join(problems))
    return build_part("views", spec).part


def drawn(views, n: int = 400, side: int = 32):
    """Parameters of every view for n images of side x side pixels."""
    sizes, index = torch.full((n, 2), side), torch.arange(n)
    return [a.draw(random.image_keys(0, 0, index, v), sizes) for v, a in enumerate(views.augments)]


@pytest.mark.parametrize("num_global, num_local", [(2, 8), (2, 0), (1, 3), (4, 1)])
def test_number_and_sizes(num_global, num_local):
    views = build(size=16, local_size=8, num_global=num_global, num_local=num_local)
    assert views.num_global == num_global
    assert views.shapes == ((3, 16, 16),) * num_global + ((3, 8, 8),) * num_local
    images = torch.randint(0, 256, (5, 3, 20, 24), dtype=torch.uint8)
    task = ViewsTask(views, None, RunInfo(views.shapes, 5))
    batch = task.prepare(Sample(images, torch.arange(5), torch.zeros(5, dtype=torch.int64)), Progress(0, 0, 1, 1))
    assert [tuple(view.shape[1:]) for view in batch.views] == list(views.shapes)
    assert batch.masks == [None] * (num_global + num_local)
    # Every view is drawn on its own.
    for group in (batch.views[:num_global], batch.views[num_global:]):
        for a in range(len(group)):
            assert not any(torch.equal(group[a], other) for other in group[:a])


def test_local_crops_of_several_sizes():
    further = [[2, 12, 0.2, 0.3], [1, 4, 0.01, 0.05]]
    views = build(size=16, local_size=8, num_local=1, local_scale=[0.1, 0.2], further_local=further)
    assert views.shapes == tuple((3, side, side) for side in (16, 16, 8, 12, 12, 4)) and views.num_global == 2
    assert [a.scale for a in views.augments[2:]] == [(0.1, 0.2), (0.2, 0.3), (0.2, 0.3), (0.01, 0.05)]
    assert {(a.blur_p, a.solarise_p) for a in views.augments[2:]} == {(0.5, 0.0)}
    shares = [p.boxes[:, 2:].prod(dim=1).double().mean() / 32**2 for p in drawn(views)[2:]]
    assert shares == pytest.approx([0.15, 0.25, 0.25, 0.03], abs=0.01)


def test_the_papers_numbers():
    views = build()
    assert views.shapes == ((3, 224, 224),) * 2 + ((3, 96, 96),) * 8 and views.num_global == 2
    first, second, *local = views.augments
    assert {(a.scale, a.interpolation, a.jitter, a.jitter_p, a.grey_p) for a in (first, second)} == {
        ((0.4, 1.0), "bicubic", (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
    }
    assert [(a.blur_p, a.solarise_p) for a in (first, second)] == [(1.0, 0.0), (0.1, 0.2)]
    assert {(a.scale, a.blur_p, a.solarise_p) for a in local} == {((0.05, 0.4), 0.5, 0.0)}
    assert first.blur_radius == 11  # 23 pixels at 224


def test_scales_of_global_and_local_crops():
    views = build(size=16, scale=[0.25, 1.0], local_size=8, local_scale=[0.05, 0.25], num_local=3)
    shares = [p.boxes[:, 2:].prod(dim=1) / 32**2 for p in drawn(views)]
    for share in shares[:2]:
        # Boxes are rounded to whole pixels.
        assert share.min() > 0.22 and share.max() > 0.9
        # Few shapes of a large share fit into the image.
        assert 0.5 < share.mean() < 0.63
    for share in shares[2:]:
        assert 0.03 < share.min() < 0.07 and share.max() < 0.28
        assert abs(share.mean() - 0.15) < 0.02


def test_probabilities_by_kind_of_crop():
    views = build(size=16, local_size=8, num_global=3, num_local=2, blur_p=[1.0, 0.0, 0.5], solarise_p=[0.0, 1.0, 0.0])
    blurred = [(p.sigma > 0).double().mean().item() for p in drawn(views)]
    solarised = [p.solarise.double().mean().item() for p in drawn(views)]
    assert blurred[:3] == [1.0, 0.0, 0.0] and all(0.4 < share < 0.6 for share in blurred[3:])
    assert solarised == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_strength_scales_the_jitter_and_flip_can_be_left_out():
    views = build(strength=0.5, flip=0.0)
    assert views.augments[-1].jitter == (0.2, 0.2, 0.1, 0.05)
    assert not any(p.flip.any() for p in drawn(views, 50))


def test_other_recipes_show_a_teacher_everything():
    problems = []
    spec = check_part("views", {"name": "simclr_cifar"}, "views", problems)
    assert build_part("views", spec).part.num_global == 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_global": 0}, "views.num_global: expected greater than or equal to 1, got 0"),
        ({"num_local": -1}, "views.num_local"),
        ({"local_scale": [0.5, 0.1]}, "local_scale: expected 0 < low <= high <= 1"),
        ({"scale": [0.0, 1.0]}, "views.scale"),
        ({"further_local": [[1, 8, 0.5, 0.1]]}, "further_local: expected 0 < low <= high <= 1"),
        ({"further_local": [[1, 8, 0.5]]}, "views.further_local.0.3: required"),
    ],
)
def test_mistakes(wrong, message):
    with pytest.raises(UserError, match=message):
        build(**wrong)

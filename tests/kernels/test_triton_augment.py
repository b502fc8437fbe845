"""The fused views against plain torch: every operation alone and together, for all images, some and none of them.

Outputs and what lies between the kernels stand between NaNs, so that what is read or written outside shows.

Shapes: B images, S pixels of a side of a view.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from ssl_ib_kernels import augment as kernels

from ssl_ib import ops
from ssl_ib.ops import view_operators
from ssl_ib.ops.pixels import colour, levels
from ssl_ib.ops.views import Parameters, Steps, joining

B = 6
MARGIN = 1024
#: How far a pixel in [0, 1] may be from plain torch's, before a jitter and after it.
PLAIN, JITTERED = 2e-6, 2e-5

#: (top, left, height, width) in 20 x 26 pixels: the whole image, one pixel, one column, the corners, the inside.
BOXES = torch.tensor([[0, 0, 20, 26], [7, 9, 1, 1], [0, 25, 20, 1], [15, 19, 5, 7], [4, 0, 16, 16], [3, 4, 11, 13]])
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(B, 1)
NONE, ALL, SOME = torch.zeros(B) > 0, torch.ones(B) > 0, torch.arange(B) % 2 == 0


@pytest.fixture(autouse=True)
def margins(monkeypatch):
    """Puts what is allocated between NaNs, fills it with NaN, and checks afterwards that the margins are untouched."""
    allocate, buffers = torch.Tensor.new_empty, []

    def new_empty(self, *size, **options):
        size = tuple(size[0]) if isinstance(size[0], tuple | list) else size
        if self.device.type == "meta" or not math.prod(size):
            return allocate(self, size, **options)
        buffer = allocate(self, math.prod(size) + 2 * MARGIN, **options).fill_(torch.nan)
        buffers.append(buffer)
        return buffer[MARGIN:-MARGIN].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer in buffers:
        assert buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all(), "written outside of a tensor"


@pytest.fixture
def pictures(device):
    """pictures(channels=3, height=20, width=26): uint8, with grey, black, white and saturated parts."""

    def pictures(channels=3, height=20, width=26):
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (B, channels, height, width), generator=generator).to(torch.uint8)
        x[0] = x[0, :1]
        x[1, :, :4], x[1, :, 4:8] = 0, 255
        x[2] = x[2] // 128 * 255
        x[3, -1] = x[3, 0]
        return x.to(device)

    return pictures


def uniform(low: float, high: float, *shape: int, seed: int = 0) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(**given) -> Parameters:
    """The whole image, and nothing else done to it, but for what is given."""
    nothing = {"boxes": BOXES[:1].repeat(B, 1), "flip": NONE, "factors": NEUTRAL, "order": torch.arange(4).repeat(B, 1)}
    return Parameters(**nothing | {"grey": NONE, "sigma": torch.zeros(B), "solarise": NONE} | given)


def compare(images, steps, drawn, tolerance, **statistics) -> torch.Tensor:
    """The fused view, which has to be plain torch's."""
    with ops.use_backend("reference"):
        expected = ops.augment(images, steps, drawn, **statistics)
    with ops.use_backend("triton"), ops.record() as ran:
        view = ops.augment(images, steps, drawn, **statistics)
    assert ran == {("augment", "triton")} and view.dtype == expected.dtype and view.is_contiguous()
    torch.testing.assert_close(view, expected, atol=tolerance, rtol=0)
    return view


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [5, 16, 37])
def test_a_crop_of_any_box_and_size_mirrored_or_not(pictures, size, interpolation):
    steps = Steps(size, (), interpolation)
    compare(pictures(), steps, parameters(boxes=BOXES, flip=SOME), PLAIN)
    if size == 16:
        compare(pictures(height=16, width=16), steps, parameters(boxes=torch.tensor([[0, 0, 16, 16]] * B)), 1e-7)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_any_number_of_channels_and_any_layout(pictures, channels):
    drawn = parameters(boxes=BOXES, sigma=uniform(0.1, 2.0, B) * SOME, solarise=SOME.flip(0))
    steps = Steps(9, ("blur", "solarise"), "bilinear", 2)
    statistics = {"mean": torch.linspace(0.3, 0.5, channels), "std": torch.linspace(0.2, 0.3, channels)}
    images = pictures(channels)
    view = compare(images, steps, drawn, 5 * PLAIN, **statistics)
    for other in (
        () if channels < 3 else (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT)
    ):
        with ops.use_backend("triton"):
            assert torch.equal(ops.augment(other, steps, drawn, **statistics), view)


def test_float_images_and_nothing_from_outside_the_box(pictures):
    images, inside = pictures().float() / 255, torch.zeros(B, 1, 20, 26, dtype=torch.bool)
    for i, (top, left, height, width) in enumerate(BOXES.tolist()):
        inside[i, :, top : top + height, left : left + width] = True
    hidden = torch.where(inside.to(images.device), images, torch.nan)
    steps, drawn = Steps(13, (), "bicubic"), parameters(boxes=BOXES, flip=SOME)
    view = compare(images, steps, drawn, PLAIN)
    with ops.use_backend("triton"):
        assert torch.equal(ops.augment(hidden, steps, drawn), view)


@pytest.mark.parametrize("kind", range(4))
def test_each_of_the_jitter_alone(pictures, kind):
    drawn = uniform(-0.5, 0.5, B) if kind == colour.HUE else uniform(0.0, 1.8, B)
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(B)])
    # Each pixel of the view is one of the image: the crop, whose tests stand above, is cheap to interpret then.
    whole = torch.tensor([[0, 0, 18, 18]] * B)
    for whom in (ALL, SOME, NONE):
        factors = NEUTRAL.clone()
        factors[:, kind] = torch.where(whom, drawn, factors[:, kind])
        drawn_so = parameters(factors=factors, order=order, boxes=whole)
        compare(pictures(3, 18, 18), Steps(18, ("jitter",)), drawn_so, JITTERED)


def test_the_jitter_in_all_orders(pictures):
    orders = torch.tensor(list(itertools.permutations(range(4))))
    factors = torch.cat([uniform(0.2, 1.8, B, 3), uniform(-0.5, 0.5, B, 1)], 1)
    whole = torch.tensor([[0, 0, 10, 10]] * B)
    for order in orders.view(-1, B, 4):
        drawn = parameters(factors=factors, order=order, boxes=whole)
        compare(pictures(3, 10, 10), Steps(10, ("jitter",)), drawn, JITTERED)


@pytest.mark.parametrize("name", ["grey", "blur", "solarise"])
def test_each_of_the_others_alone(pictures, name):
    for whom in (ALL, SOME, NONE):
        given = {"sigma": uniform(0.1, 2.0, B) * whom} if name == "blur" else {name: whom}
        compare(pictures(), Steps(33 if name == "blur" else 9, (name,), "bilinear", 3), parameters(**given), PLAIN)


@pytest.mark.parametrize(("size", "radius"), [(1, 0), (2, 1), (5, 4)])
def test_a_blur_as_wide_as_the_view(pictures, size, radius):
    drawn = parameters(sigma=uniform(0.5, 9.0, B), boxes=BOXES[3:].repeat(2, 1))
    compare(pictures(), Steps(size, ("blur",), "bilinear", radius), drawn, PLAIN)


def everything() -> Parameters:
    factors = torch.cat([uniform(0.4, 1.6, B, 3), uniform(-0.2, 0.2, B, 1)], 1)
    factors[1] = NEUTRAL[0]
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(B)])
    chances = {"grey": SOME.roll(1), "sigma": uniform(0.1, 2.0, B) * (torch.arange(B) > 1), "solarise": SOME}
    return Parameters(BOXES, SOME, factors, order, **chances)


@pytest.mark.parametrize("operations", list(itertools.permutations(("jitter", "grey", "blur", "solarise")))[::4])
def test_everything_in_any_order(pictures, operations):
    """A jitter after a blur does not join: it runs in torch, with what follows."""
    statistics = {"mean": torch.tensor([0.5, 0.4, 0.3]), "std": torch.tensor([0.2, 0.25, 0.3])}
    compare(pictures(), Steps(17, operations, "bicubic", 2), everything(), 5 * JITTERED, **statistics)


def test_bfloat16_is_the_rounded_float32(pictures):
    for operations in ((), ("jitter",), ("jitter", "blur")):
        steps = Steps(9, operations, "bilinear", 1)
        with ops.use_backend("triton"):
            exact, rounded = (
                ops.augment(pictures(), steps, everything(), dtype=d) for d in (torch.float32, torch.bfloat16)
            )
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())


#: Values for each of RandAugment's operations that change every pixel by itself.
VALUES = {"posterize": (1.0, 4.0, 8.0), "solarize": (0.0, 100.0, 256.0), "solarize_add": (0.0, 64.0, 110.0)}


@pytest.mark.parametrize("name", sorted(levels.PIXELWISE))
def test_rand_augments_pixelwise_operations(pictures, name):
    """On whole levels, so that all is exact but for products rounded once: these may lie one level apart."""
    images = pictures(3, 16, 16)
    values = torch.tensor([VALUES.get(name, (0.1, 0.8, 1.9))]).T.repeat(2, 2).double()
    op = torch.stack([torch.zeros(B).long(), torch.where(torch.arange(B) < 4, 0, -1)], 1)
    op[0] = -1
    drawn = parameters(boxes=torch.tensor([[0, 0, 16, 16]] * B), ops=levels.Operations(op, values, op > 9))
    steps = Steps(16, ("rand_augment",), "bilinear", 1, (name,))
    view = compare(images, steps, drawn, 1.01 / 255)
    with ops.use_backend("reference"):
        assert ((view - ops.augment(images, steps, drawn)).abs() > 1e-6).float().mean() < 0.01


def test_rand_augment_between_other_operations(pictures):
    names = tuple(sorted(levels.PIXELWISE))
    op = torch.randint(-1, len(names), (B, 3), generator=torch.Generator().manual_seed(1))
    drawn = replace(everything(), ops=levels.Operations(op, uniform(0.5, 1.5, B, 3).double(), op > 99))
    steps = Steps(17, ("jitter", "blur", "rand_augment", "grey"), "bicubic", 2, names)
    assert joining(steps) == steps.operations
    with ops.use_backend("reference"):
        expected = ops.augment(pictures(), steps, drawn)
    with ops.use_backend("triton"):
        view = ops.augment(pictures(), steps, drawn)
    # A pixel that rounding puts on the next level may jump far: where levels are inverted above a threshold.
    assert ((view - expected).abs() > JITTERED).float().mean() < 0.005


def test_a_view_depends_on_its_own_numbers_alone_and_repeats_bit_for_bit(pictures):
    steps, drawn, images = Steps(34, ("jitter", "grey", "blur", "solarise"), "bilinear", 2), everything(), pictures()
    rows = torch.tensor([4, 1])
    some = Parameters(*(getattr(drawn, name)[rows] for name in Parameters.__annotations__ if name != "ops"))
    with ops.use_backend("triton"):
        view = ops.augment(images, steps, drawn)
        assert torch.equal(ops.augment(images, steps, drawn), view)
        assert torch.equal(ops.augment(images[rows.to(images.device)], steps, some), view[rows.to(view.device)])
        none = Parameters(*(x[:0] for x in vars(some).values() if x is not None))
        assert ops.augment(images[:0], steps, none).shape == (0, 3, 34, 34)


@pytest.mark.parametrize(
    ("operations", "dtype", "launches", "intermediate"),
    [
        ((), torch.bfloat16, 1, 0),
        (("grey", "solarise"), torch.float32, 1, 0),
        (("jitter", "grey"), torch.float32, 2, 0),
        (("jitter", "grey"), torch.bfloat16, 2, 1),
        (("blur",), torch.float32, 3, 1),
        (("jitter", "grey", "blur", "solarise"), torch.bfloat16, 3, 1),
    ],
)
def test_three_launches_at_most_one_intermediate_and_no_wait_for_the_device(
    monkeypatch, operations, dtype, launches, intermediate
):
    """On the "meta" device, where a number cannot be read: so nothing waits for one."""
    launched, held = [], set()

    def launch(kernel, grid, **arguments):
        launched.append(kernel)
        held.update(x for x in arguments.values() if isinstance(x, torch.Tensor) and x.shape == (B, 3, 32, 32))

    monkeypatch.setattr(kernels, "launch", launch)
    drawn, images = everything(), torch.empty(B, 3, 20, 26, dtype=torch.uint8, device="meta")
    given = drawn.boxes, drawn.flip, drawn.factors, drawn.order, drawn.grey, drawn.sigma, drawn.solarise
    statistics = torch.zeros(3), torch.ones(3)
    out = kernels.augment(images, *given, None, None, *statistics, 32, True, list(operations), 1, [], dtype)
    assert len(launched) == launches and out.dtype == dtype
    assert len(held - {out}) == intermediate


def test_the_operator_is_registered_well(monkeypatch, pictures):
    monkeypatch.undo()  # Margins would be metadata that fake tensors do not have.
    drawn = everything()
    given = drawn.boxes, drawn.flip, drawn.factors, drawn.order, drawn.grey, drawn.sigma, drawn.solarise
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (*given, None, None, None, None, 8, False, ["jitter"], 1, [], dtype, "triton")
        torch.library.opcheck(view_operators.augment, (pictures(), *arguments))


def test_every_recipe_draws_the_same_views(device):
    """With the same keys, fused and in plain torch; RandAugment's levels may flip, as said above."""
    pytest.importorskip("pydantic")
    from ssl_ib import random
    from ssl_ib.config.registry import VIEWS, build_part, check_part
    from ssl_ib.types import Sample

    small = {"size": 16, "local_size": 8, "num_local": 1, "distance": 5, "jigsaw_size": 20, "jigsaw_patch": 6}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 24, 30), generator=generator).to(torch.uint8).to(device)
    sample = Sample(images, torch.arange(3), torch.full((3,), -1))
    keys = random.image_keys(seed=0, epoch=0, index=torch.arange(3))
    fused = set()
    for name in VIEWS.names():
        schema = VIEWS.schema(name)
        if name == "moving_mnist" or not VIEWS[name].__module__.startswith("ssl_ib."):
            continue  # films, and what plugins of other tests have registered
        arguments = {key: value for key, value in small.items() if key in schema}
        arguments |= {"space": "rgb"} if name == "learned_split" else {}
        views = build_part("views", check_part("views", {"name": name, **arguments}, "views", [])).part.to(device)
        all_keys = [random.fold(keys, view) for view in range(len(views.shapes))]
        drawn = []
        for backend in ("reference", "triton"):
            with ops.use_backend(backend), ops.record() as ran:
                drawn.append(views.draw(sample, all_keys))
        fused |= {name} if ("augment", "triton") in ran else set()
        share = 0.01 if name == "infomin" else 0.0
        for plain, view in zip(*drawn, strict=True):
            assert ((plain - view).abs() > 2 * JITTERED).float().mean() <= share, name
    assert {"simclr", "byol", "dino", "multi_crop", "moco_v2", "plain", "infomin", "cmc", "pirl"} <= fused

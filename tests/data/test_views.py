"""Views as distributions: keys, probabilities, boxes, recipes, normalisation."""

import math
from dataclasses import replace

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from ssl_ib import UserError, random
from ssl_ib.config.registry import VIEWS, build_part, check_part, describe
from ssl_ib.data.sources.base import InMemory, Source
from ssl_ib.data.views import Augment, Crops, RandAugment, Views
from ssl_ib.data.views.rand_augment import OPS, PLAIN_OPS
from ssl_ib.data.views.splits import Split
from ssl_ib.ops.pixels import colour
from ssl_ib.types import Sample

STRONG = {"jitter": (0.4, 0.4, 0.2, 0.1), "grey_p": 0.2, "blur_p": 0.5, "solarise_p": 0.2, "interpolation": "bicubic"}
RECIPES = ["barlow_twins", "byol", "byol_cifar", "dino", "moco_v2", "plain", "simclr", "simclr_cifar"]
CROPS = [*RECIPES, "instdis", "moco_v1"]
#: Views of films, which other tests draw.
FILMS = {"moving_mnist"}
#: What a recipe cannot be built without.
NEEDED = {"learned_split": {"space": "rgb"}}
#: Arguments that make any recipe small, of which each takes those it has.
SMALL = {"size": 16, "local_size": 8, "num_local": 2, "distance": 5, "jigsaw_size": 20, "jigsaw_patch": 6}


def pixels(b: int, height: int = 24, width: int = 30, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, 3, height, width), dtype=torch.uint8, generator=generator)


def keys(n: int, view: int = 0) -> torch.Tensor:
    return random.image_keys(seed=0, epoch=0, index=torch.arange(n), stream=view)


def build(name: str, **arguments) -> Views:
    problems = []
    spec = check_part("views", {"name": name, **arguments}, "views", problems)
    assert not problems, problems
    return build_part("views", spec).part


@pytest.fixture
def threads():
    """Sets the number of threads, for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- keys ---


@pytest.mark.parametrize("size", [16, 33])
def test_a_view_depends_on_its_key_alone(size):
    augment, images, all_keys = Augment(size, **STRONG), pixels(40), keys(40)
    views = augment(images, all_keys)
    for rows in (torch.arange(40).flip(0), torch.tensor([39, 3, 17]), *torch.arange(40)[:, None]):
        assert torch.equal(augment(images[rows], all_keys[rows]), views[rows])


def test_threads_change_no_more_than_rounding(threads):
    augment, images, all_keys = Augment(33, **STRONG), pixels(40), keys(40)
    views = augment(images, all_keys)
    threads(3)
    for n in (1, 2, 40):
        torch.testing.assert_close(augment(images[:n], all_keys[:n]), views[:n], atol=1e-6, rtol=0)


def test_other_keys_give_other_views():
    augment, image = Augment(16, **STRONG), pixels(1).expand(64, -1, -1, -1)
    views = torch.cat([augment(image, keys(64, view)) for view in (0, 1)]).flatten(1)
    assert torch.cdist(views, views).fill_diagonal_(1.0).min() > 0.1


def test_a_draw_does_not_depend_on_the_other_operations():
    sizes = torch.tensor([[24, 30]]).expand(50, 2)
    bare, strong = (augment.draw(keys(50), sizes) for augment in (Augment(16), Augment(16, **STRONG)))
    for name in ("boxes", "flip", "order"):
        assert torch.equal(getattr(bare, name), getattr(strong, name))
    often = Augment(16, **{**STRONG, "blur_p": 1.0, "jitter_p": 1.0}).draw(keys(50), sizes)
    some = strong.sigma > 0
    assert 0 < some.sum() < 50 and torch.equal(often.sigma[some], strong.sigma[some])


def test_operations_are_drawn_independently():
    n = 20_000
    drawn = Augment(16, **STRONG).draw(keys(n), torch.tensor([[24, 30]]).expand(n, 2))
    on = torch.stack([drawn.flip, drawn.factors[:, 3] != 0, drawn.grey, drawn.sigma > 0, drawn.solarise])
    assert torch.corrcoef(on.double()).fill_diagonal_(0).abs().max() < 4 / math.sqrt(n)
    jittered = drawn.factors[:, 3] != 0
    numbers = torch.cat([drawn.boxes[:, 1:2], drawn.factors, drawn.sigma[:, None]], 1)[jittered].double()
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 4 / math.sqrt(len(numbers))


def test_padding_never_shows():
    augment, sizes = Augment(16, **STRONG), torch.tensor([[24, 30], [9, 30], [24, 7], [5, 5]])
    padded = pixels(4)
    for i, (height, width) in enumerate(sizes.tolist()):
        padded[i, :, height:], padded[i, :, :, width:] = 0, 0
    white = padded.clone()
    for i, (height, width) in enumerate(sizes.tolist()):
        white[i, :, height:], white[i, :, :, width:] = 255, 255
    views = augment(padded, keys(4), sizes)
    assert torch.equal(augment(white, keys(4), sizes), views)
    for i, (height, width) in enumerate(sizes.tolist()):
        alone = augment(padded[i : i + 1, :, :height, :width], keys(4)[i : i + 1])
        torch.testing.assert_close(alone[0], views[i], atol=1e-5, rtol=0)


# --- distributions ---


def test_probabilities_and_ranges():
    n = 20_000
    augment = Augment(16, flip=0.3, jitter=(0.4, 1.2, 0.2, 0.1), grey_p=0.2, blur_p=0.6, solarise_p=0.1)
    drawn = augment.draw(keys(n), torch.tensor([[24, 30]]).expand(n, 2))
    jittered = (drawn.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1)
    expected = {0.3: drawn.flip, 0.8: jittered, 0.2: drawn.grey, 0.6: drawn.sigma > 0, 0.1: drawn.solarise}
    for p, chosen in expected.items():
        assert abs(chosen.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)

    intervals = [(0.6, 1.4), (0.0, 2.2), (0.8, 1.2), (-0.1, 0.1)]
    numbers = [*zip(drawn.factors[jittered].T, intervals, strict=True), (drawn.sigma[drawn.sigma > 0], (0.1, 2.0))]
    for values, (low, high) in numbers:
        assert low - 1e-6 <= values.min() < low + 0.02 * (high - low)
        assert high + 1e-6 >= values.max() > high - 0.02 * (high - low)
        four_sigma = 4 * (high - low) / math.sqrt(12 * len(values))
        assert abs(values.mean() - (low + high) / 2) < four_sigma

    orders = (drawn.order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1] / n
    assert len(orders) == 24 and (orders - 1 / 24).abs().max() < 4 * math.sqrt(23 / 24**2 / n)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 25), (90, 12), (11, 200)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    n, scale, ratio = 6_000, (0.08, 1.0), (3 / 4, 4 / 3)
    sizes = torch.tensor([[height, width]]).expand(n, 2)
    ours = Augment(16, scale).draw(keys(n), sizes).boxes
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all() and (ours[:, :2] + ours[:, 2:] <= sizes).all()
    image = torch.zeros(1, 1, 1).expand(1, height, width)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n // 4)])
    for statistic in (
        lambda b: b[:, 2] * b[:, 3] / (height * width),
        lambda b: (b[:, 3] / b[:, 2]).log(),
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
        lambda b: (b[:, 0] + b[:, 2] / 2 - height / 2).abs(),
    ):
        a, b = statistic(ours.double()), statistic(theirs.double())
        four_sigma = 4 * math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) <= four_sigma + 1e-12


@pytest.mark.parametrize(("height", "width", "box"), [(90, 12, [37, 0, 16, 12]), (10, 200, [0, 93, 10, 13])])
def test_where_no_try_fits_the_box_is_the_centre(height, width, box):
    drawn = Augment(16, scale=(1.0, 1.0)).draw(keys(3), torch.tensor([[height, width]]).expand(3, 2))
    assert drawn.boxes.tolist() == [box] * 3


# --- pixels ---


def test_a_view_is_what_torchvision_makes_of_the_same_parameters():
    augment, images = Augment(21, **STRONG), pixels(48)
    drawn = augment.draw(keys(48), torch.tensor([[24, 30]]).expand(48, 2))
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    seen = set()
    for i, view in enumerate(augment(images, keys(48))):
        size, mode = [21, 21], tv.InterpolationMode.BICUBIC
        x = tv.resized_crop(images[i] / 255, *drawn.boxes[i].tolist(), size, mode, antialias=True).clamp(0, 1)
        x = x.flip(-1) if drawn.flip[i] else x
        for k in drawn.order[i].tolist():
            x = operations[k](x, drawn.factors[i, k].item())
        x = tv.rgb_to_grayscale(x, 3) if drawn.grey[i] else x
        x = tv.gaussian_blur(x, [3, 3], [drawn.sigma[i].item()] * 2) if drawn.sigma[i] > 0 else x
        x = torch.where(x >= 0.5, 1 - x, x) if drawn.solarise[i] else x
        # Neutral factors send the hue through HSV there and not here; a rounded pixel at one half is solarised to 1/2.
        torch.testing.assert_close(view, x, atol=3e-5, rtol=0)
        seen.add((drawn.grey[i].item(), (drawn.sigma[i] > 0).item(), drawn.solarise[i].item()))
    assert len(seen) >= 6  # nearly every combination of grey, blur and solarise


def test_views_are_within_the_unit_interval():
    image = (pixels(64) > 127).to(torch.uint8) * 255  # extreme contrast, where bicubic overshoots
    views = Augment(40, **STRONG)(image, keys(64))
    assert views.dtype == torch.float32 and views.min() == 0.0 and views.max() == 1.0


def test_jitter_of_strength_zero_is_none():
    images = pixels(8)
    assert torch.equal(Augment(16)(images, keys(8)), Augment(16, jitter_p=0.0)(images, keys(8)))
    drawn = Augment(16).draw(keys(8), torch.tensor([[24, 30]]).expand(8, 2))
    assert torch.equal(drawn.factors[:, : colour.HUE], torch.ones(8, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "hue"),
        ({"jitter": (-0.1, 0.4, 0.4, 0.1)}, "jitter"),
        ({"grey_p": 1.5}, "grey_p"),
    ],
)
def test_impossible_numbers_are_the_users_mistake(arguments, message):
    with pytest.raises(UserError, match=message):
        Augment(16, **arguments)


@pytest.mark.parametrize(("size", "kernel"), [(224, 23), (96, 9), (64, 7), (32, 3), (8, 3), (1, 1)])
def test_blur_kernel_is_about_a_tenth_of_the_view(size, kernel):
    assert 2 * Augment(size).blur_radius + 1 == kernel


# --- views ---


def sample(b: int, **extra) -> Sample:
    return Sample(pixels(b), torch.arange(b), torch.full((b,), -1), extra)


def test_draw_normalises_and_show_undoes_it():
    views, drawn_keys = Crops([Augment(16, **STRONG), Augment(8)]), [keys(6, 0), keys(6, 1)]
    raw = views.draw(sample(6), drawn_keys)
    assert views.shapes == ((3, 16, 16), (3, 8, 8))
    assert [view.shape[1:] for view in raw] == list(views.shapes)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    views.normalize(mean, std)
    assert views.statistics == (pytest.approx(mean), pytest.approx(std))
    for number, (view, before) in enumerate(zip(views.draw(sample(6), drawn_keys), raw, strict=True)):
        torch.testing.assert_close(view, tv.normalize(before, mean, std))
        torch.testing.assert_close(views.show(view, number), before, atol=1e-6, rtol=0)


def test_draw_reads_the_sizes_of_padded_images():
    sizes = torch.tensor([[24, 30], [10, 12]])
    augment = Augment(16)
    [view] = Crops([augment]).draw(sample(2, size=sizes), [keys(2)])
    assert torch.equal(view, augment(pixels(2), keys(2), sizes))
    assert not torch.equal(view[1], augment(pixels(2), keys(2))[1])


def test_sizes_stay_on_the_cpu_so_that_boxes_are_drawn_without_waiting_for_a_device():
    held = replace(
        sample(2, size=torch.tensor([[24, 30], [10, 12]]), other=torch.zeros(2)), factors={"size": torch.ones(2)}
    )
    moved = held.to("meta")
    assert moved.images.is_meta and moved.extra["other"].is_meta and moved.factors["size"].is_meta
    assert moved.extra["size"].is_cpu and moved.index.is_cpu


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,) * 3), ((), ()), ((0.5,) * 3, (0.5, 0.0, 0.5))])
def test_normalize_wants_both_of_each_channel_and_positive_deviations(mean, std):
    with pytest.raises(UserError, match="for each channel"):
        Crops([Augment(16)]).normalize(mean, std)


def test_center_resizes_the_shorter_side_and_cuts_the_centre():
    views = Crops([Augment(14)], crop_ratio=0.875)
    resized = tv.resize(pixels(4) / 255, [16], antialias=True)
    torch.testing.assert_close(views.center(sample(4)), tv.center_crop(resized, [14, 14]), atol=1e-5, rtol=0)
    sizes = torch.tensor([[24, 30], [9, 20], [12, 7], [5, 5]])
    for i, (height, width) in enumerate(sizes.tolist()):
        alone = views.center(Sample.unlabelled(pixels(4)[i : i + 1, :, :height, :width]))
        torch.testing.assert_close(views.center(sample(4, size=sizes))[i : i + 1], alone, atol=1e-5, rtol=0)


def test_center_leaves_images_of_the_views_size_as_they_are():
    images = pixels(3, 24, 24)
    for interpolation in ("bilinear", "bicubic"):
        views = Crops([Augment(24, interpolation=interpolation)])
        torch.testing.assert_close(views.center(Sample.unlabelled(images)), images / 255, atol=1e-7, rtol=0)


def test_operations_are_done_in_the_stated_order_and_one_left_out_is_not_done():
    strong = {"grey_p": 1.0, "solarise_p": 1.0, "flip": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    images = pixels(4, 16, 16)
    plain = images / 255
    luma = tv.rgb_to_grayscale(plain, 3)
    inverted = torch.minimum(plain, 1 - plain)
    for operations, expected in (
        (("grey", "solarise"), torch.minimum(luma, 1 - luma)),
        (("solarise", "grey"), tv.rgb_to_grayscale(inverted, 3)),
        (("solarise",), inverted),
        ((), plain),
    ):
        found = Augment(16, operations=operations, **strong)(images, keys(4))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("operations", [("blurr",), ("grey", "grey")])
def test_operations_that_do_not_exist_or_come_twice(operations):
    with pytest.raises(UserError, match="operations: expected some of jitter, .*, each once, got"):
        Augment(16, operations=operations)


# --- recipes ---


@pytest.fixture(scope="module")
def built_in() -> list[str]:
    """The package's recipes of views of images, without those that plugins of other tests have registered."""
    return [name for name in VIEWS.names() if VIEWS[name].__module__.startswith("ssl_ib.") and name not in FILMS]


def small(name: str, **arguments) -> Views:
    fitting = {key: value for key, value in SMALL.items() if key in VIEWS.schema(name)}
    return build(name, **fitting, **NEEDED.get(name, {}), **arguments)


def source_of(images: torch.Tensor) -> Source:
    class Some(Source):
        def train(self):
            return held

    held = InMemory(images, torch.full((len(images),), -1), [])
    return Some()


def test_every_recipe_is_registered(built_in):
    assert {*CROPS, "infomin", "pirl", "cmc", "patches", "colour_split", "frequency_split"} <= {*built_in}


def test_every_view_has_its_shape_and_is_drawn_of_its_image_alone(built_in):
    for name in built_in:
        views = small(name)
        all_keys = [keys(6, view) for view in range(len(views.shapes))]
        drawn = views.draw(sample(6), all_keys)
        assert [tuple(view.shape[1:]) for view in drawn] == list(views.shapes), name
        rows = slice(2, 4)
        for view, some in zip(drawn, views.draw(sample(6)[rows], [key[rows] for key in all_keys]), strict=True):
            torch.testing.assert_close(some, view[rows], atol=1e-5, rtol=0, msg=name)
        other = views.draw(sample(6), [keys(6, view + 100) for view in range(len(views.shapes))])
        assert not any(torch.equal(a, b) for a, b in zip(drawn, other, strict=True)), name


def test_every_view_is_normalised_with_what_was_measured_and_can_be_shown(built_in):
    images = pixels(40, 24, 24)
    images[:, 1] //= 2
    for name in built_in:
        views = small(name, **({"crop_ratio": 1.0} if "crop_ratio" in VIEWS.schema(name) else {}))
        views.measure(source_of(images))
        plain = views.center(Sample.unlabelled(images)).transpose(0, 1).flatten(1)
        assert plain.mean(1).abs().max() < 0.05, name
        if isinstance(views, Split):  # What the others are normalised with is measured before anything is resized.
            assert (plain.std(1) - 1).abs().max() < 0.05, name
        drawn = views.draw(sample(6), [keys(6, view) for view in range(len(views.shapes))])
        for number, view in [*enumerate(drawn), (None, views.center(sample(6)))]:
            picture = views.show(view, number)
            assert picture.shape[:2] == (6, 3) and 0 <= picture.min() < picture.max() <= 1, (name, number)


@pytest.mark.parametrize("name", CROPS)
def test_every_recipe_draws_at_any_size(name):
    views = build(name, size=16, scale=[0.3, 0.9], crop_ratio=0.5)
    drawn = views.draw(sample(5), [keys(5, view) for view in range(len(views.augments))])
    assert [tuple(view.shape[1:]) for view in drawn] == [(3, 16, 16)] * len(views.augments)
    assert views.augments[0].scale == (0.3, 0.9) and views.crop_ratio == 0.5
    assert "size: " in describe("views", name)


STRONG_JITTER, MOCO, BYOL = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1), (0.4, 0.4, 0.2, 0.1)


@pytest.mark.parametrize(
    ("name", "size", "scale", "jitter", "blur", "solarise"),
    [
        ("simclr", 224, (0.08, 1), STRONG_JITTER, (0.5, 0.5), (0, 0)),
        ("simclr_cifar", 32, (0.08, 1), (0.4, 0.4, 0.4, 0.1), (0, 0), (0, 0)),
        ("moco_v2", 224, (0.2, 1), MOCO, (0.5, 0.5), (0, 0)),
        ("infomin", 224, (0.2, 1), STRONG_JITTER, (0.5, 0.5), (0, 0)),
        ("byol", 224, (0.08, 1), BYOL, (1.0, 0.1), (0, 0.2)),
        ("barlow_twins", 224, (0.08, 1), BYOL, (1.0, 0.1), (0, 0.2)),
        ("byol_cifar", 32, (0.08, 1), BYOL, (0, 0), (0, 0.2)),
        ("dino", 224, (0.4, 1), BYOL, (1.0, 0.1), (0, 0.2)),
    ],
)
def test_the_papers_numbers(name, size, scale, jitter, blur, solarise):
    augments = build(name).augments
    assert tuple(a.blur_p for a in augments) == blur
    assert tuple(a.solarise_p for a in augments) == solarise
    for a in augments:
        assert (a.size, a.scale, a.jitter) == (size, scale, pytest.approx(jitter))
        assert (a.flip, a.jitter_p, a.grey_p, a.blur_sigma) == (0.5, 0.8, 0.2, (0.1, 2.0))


@pytest.mark.parametrize(
    ("name", "number", "scale", "jitter", "grey"),
    [
        ("instdis", 1, (0.08, 1), (0.4, 0.4, 0.4, 0.4), 0.2),
        ("moco_v1", 2, (0.2, 1), (0.4, 0.4, 0.4, 0.4), 0.2),
        ("pirl", 1, (0.08, 1), (0.4, 0.4, 0.4, 0.4), 0.2),
        ("cmc", 1, (0.08, 1), MOCO, 0.0),
    ],
)
def test_the_numbers_of_views_that_are_always_jittered(name, number, scale, jitter, grey):
    views = build(name)
    augments = views.augments if isinstance(views, Crops) else [views.augment]
    assert [(a.size, a.scale, a.jitter, a.jitter_p, a.grey_p, a.blur_p) for a in augments] == [
        (224, scale, pytest.approx(jitter), 1.0, grey, 0.0)
    ] * number


def test_infomins_order_and_operations():
    views = build("infomin")
    assert views.augments[0].operations == ("jitter", "blur", "rand_augment", "grey")
    assert views.augments[0].rand_augment == RandAugment(2, 10.0, 0.5, 0.5, OPS, {})
    assert views.shapes == ((3, 224, 224), (3, 224, 224), (9, 3, 64, 64)) and views.num_global == 2
    assert build("infomin", jigsaw=False).shapes == ((3, 224, 224),) * 2
    assert build("cmc", rand_augment=1).augment.rand_augment.ops == PLAIN_OPS
    with pytest.raises(UserError, match="op_strengths: operation 'rotat' is unknown"):
        build("infomin", op_strengths={"rotat": 3.0})


def test_plain_is_crop_and_flip():
    [augment] = build("plain").augments
    assert not (any(augment.jitter) or augment.grey_p or augment.blur_p or augment.solarise_p)
    assert len(build("plain", num_views=3).augments) == 3


def test_strength_multiplies_the_jitter():
    assert build("byol", strength=0.5).augments[0].jitter == pytest.approx((0.2, 0.2, 0.1, 0.05))
    with pytest.raises(UserError, match="hue"):
        build("simclr", strength=3.0)


def test_a_wrong_argument_is_reported_with_its_path():
    problems = []
    check_part("views", {"name": "byol", "sizes": 32, "blur_p": [0.5, 2.0]}, "views", problems)
    assert len(problems) == 2 and all(p.startswith("views.") for p in problems)

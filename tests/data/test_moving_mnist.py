"""Colorful Moving-MNIST: its dynamics, its frames, its splits, and the views that share what is chosen."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_ib import UserError, random
from ssl_ib.data.sources.moving_mnist import FRAMES, SEEN, MovingMNIST, render
from ssl_ib.data.views.moving_mnist import FACTORS, MovingViews

SHARES = [share for count in (1, 2, 3) for share in combinations(FACTORS, count)]


@pytest.fixture(scope="module")
def source():
    return MovingMNIST(size=32, sequences=200)


@pytest.fixture(scope="module")
def many():
    """So many sequences that chance shows, on the smallest canvas."""
    return MovingMNIST(size=8, sequences=10000)


@pytest.fixture(scope="module")
def all_of_many(many):
    return many.train().gather(torch.arange(10000))


@pytest.fixture
def files(tmp_path):
    """A file of digits and a folder of pictures of two classes, with the arrays."""
    generator = np.random.default_rng(0)
    arrays = {"x_train": generator.integers(0, 256, (12, 7, 7), dtype=np.uint8), "y_train": np.arange(12) % 3}
    arrays |= {"x_test": generator.integers(0, 256, (4, 7, 7), dtype=np.uint8), "y_test": np.arange(4) % 3}
    np.savez(tmp_path / "digits.npz", **arrays)
    for split, count in (("train", 4), ("val", 2)):
        for k, name in enumerate(("red", "blue")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (24, 20 + number, 3), dtype=np.uint8)
                pixels[..., 2 * k] = 255
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path, arrays


def test_a_sequence_is_a_function_of_split_and_number(source):
    both, one = source.train().gather(torch.tensor([3, 7])), source.train().gather(torch.tensor([7]))
    assert both.images.shape == (2, SEEN, 3, 32, 32) and both.images.dtype == torch.uint8
    assert torch.equal(both.images[1:], one.images)
    again = MovingMNIST(size=32, sequences=9).train().gather(torch.tensor([7]))
    assert torch.equal(again.images, one.images) and torch.equal(again.factors["position"], one.factors["position"])
    assert not torch.equal(source.val().gather(torch.tensor([7])).images, one.images)
    assert len(source.train()) == 200 and len(source.val()) == 40


def test_splits_share_neither_digits_nor_pictures(source):
    for name in ("digits", "pictures"):
        train, val = (getattr(pool, name).flatten(1) for pool in source.pools)
        assert (
            torch.cat([train, val]).unique(dim=0).shape[0] == train.unique(dim=0).shape[0] + val.unique(dim=0).shape[0]
        )


def test_digits_move_straight_and_are_reflected(source):
    pool, scenes = source.pools[0], source.train().scenes
    places = pool.places(scenes, *range(1, FRAMES + 1))
    assert pool.room == 32 - 14 and pool.digits.shape[1:] == (14, 14)
    assert torch.allclose(scenes.velocity.norm(dim=1), torch.tensor(3.2))
    place, velocity = scenes.start.double(), scenes.velocity.double()
    for frame in range(FRAMES):
        assert torch.all((place - places[:, frame]).abs() < 0.5 + 1e-4)
        place = place + velocity
        out = (place < 0) | (place > pool.room)
        place = torch.where(place < 0, -place, torch.where(place > pool.room, 2 * pool.room - place, place))
        velocity = torch.where(out, -velocity, velocity)


def test_frames_are_digits_over_backdrops():
    generator = torch.Generator().manual_seed(0)
    ink = torch.randint(0, 256, (2, 3, 3), generator=generator, dtype=torch.uint8)
    backdrop = torch.randint(0, 256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
    places = torch.tensor([[[0, 5], [2, 1]], [[5, 5], [4, 0]]])
    expected = backdrop[:, None].repeat(1, 2, 1, 1, 1).double()
    for b in range(2):
        for t, (top, left) in enumerate(places[b].tolist()):
            window = expected[b, t, :, top : top + 3, left : left + 3]
            window += (255 - window) * ink[b].double() / 255
    assert torch.equal(render(ink, backdrop, places), expected.round().to(torch.uint8))


def test_factors_and_extra_describe_frame_20(source):
    images = source.train()
    sample = images.gather(torch.arange(20))
    frame = render(sample.extra["ink"], sample.extra["backdrop"], sample.extra["place"][:, None])[:, 0]
    changed = (frame != sample.extra["backdrop"]).any(dim=1)
    for picture, centre in zip(changed, sample.factors["position"].tolist(), strict=True):
        rows, columns = picture.any(dim=1).nonzero(), picture.any(dim=0).nonzero()
        assert abs(float(rows.min() + rows.max() + 1) / 2 - centre[0]) <= 5
        assert centre[1] - 7 <= columns.min() and columns.max() < centre[1] + 7
    assert torch.equal(sample.label, sample.factors["digit"]) and set(sample.factors["background"].tolist()) == {0, 1}
    for name, values in images.factors.items():
        assert torch.equal(values[:20], sample.factors[name])
    assert torch.equal(images.labels[:20], sample.label)


def test_own_digits_and_pictures(files):
    folder, arrays = files
    source = MovingMNIST(str(folder / "digits.npz"), str(folder / "pictures"), size=16, sequences=30)
    train, val = source.pools
    assert torch.equal(train.digits, torch.from_numpy(arrays["x_train"]))
    assert val.digit_classes.tolist() == [0, 1, 2, 0] and source.train().classes == ["0", "1", "2"]
    assert train.pictures.shape == (8, 3, 24, 24) and val.pictures.shape == (4, 3, 24, 24)
    blue = train.pictures[:, 0].float().mean(dim=(1, 2)) == 255
    assert torch.equal(train.picture_classes, (~blue).long() if blue[-1] == 0 else blue.long())
    few = MovingMNIST(str(folder / "digits.npz"), str(folder / "pictures"), size=16, sequences=30, pictures=2)
    assert [len(pool.pictures) for pool in few.pools] == [2, 2] and few.pools[0].picture_classes.tolist() == [0, 1]
    images = source.train().gather(torch.arange(30)).images[:, 0].double() / 255
    assert torch.allclose(torch.tensor(source.statistics()[0]).double(), images.mean(dim=(0, 2, 3)), atol=1e-6)


def test_pictures_without_classes_have_no_factor(files):
    folder, _ = files
    source = MovingMNIST(None, str(folder / "pictures" / "train" / "red"), size=8, sequences=4)
    with pytest.raises(UserError, match="source.backgrounds: expected ten pictures"):
        source.train()
    for number in range(20):
        Image.new("RGB", (9, 9)).save(folder / "pictures" / "train" / "red" / f"more{number}.png")
    source = MovingMNIST(None, str(folder / "pictures" / "train" / "red"), size=8, sequences=4)
    assert set(source.train().factors) == {"digit", "position"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 7}, "size=7: expected a canvas of at least 8"),
        ({"digits": "nothing.npz"}, "expected FILE.npz with x_train .* cannot be read"),
        ({"backgrounds": "nowhere"}, "backgrounds=nowhere: expected a folder or an archive of pictures"),
        ({"backgrounds": "{}"}, "source.backgrounds: no image in"),
        ({"backgrounds": "{}/short.npz"}, "source.backgrounds: expected an archive ending in"),
        ({"digits": "{}/short.npz"}, "it lacks y_train, x_test, y_test"),
        ({"digits": "{}/flat.npz"}, r"x_train is uint8 \[2, 49\], y_train int64 \[2\]"),
    ],
)
def test_mistakes_are_said_at_once(tmp_path, arguments, message):
    np.savez(tmp_path / "short.npz", x_train=np.zeros((2, 7, 7), np.uint8))
    flat = {"x_train": np.zeros((2, 49), np.uint8), "y_train": np.zeros(2, np.int64)}
    np.savez(tmp_path / "flat.npz", **flat, x_test=flat["x_train"], y_test=flat["y_train"])
    filled = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in arguments.items()}
    with pytest.raises(UserError, match=message):
        MovingMNIST(**filled)


def independent(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two columns of small numbers pass the chi-square test of independence, at five standard deviations."""
    counts = torch.zeros(int(first.max()) + 1, int(second.max()) + 1, dtype=torch.float64)
    counts.index_put_((first, second), torch.ones(len(first), dtype=torch.float64), accumulate=True)
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    freedom = (counts.shape[0] - 1) * (counts.shape[1] - 1)
    return float(((counts - expected) ** 2 / expected).sum()) < freedom + 5 * (2 * freedom) ** 0.5


def columns(pool, scenes, places) -> dict[str, torch.Tensor]:
    """The factors of scenes as small numbers."""
    return {
        "digit": pool.digit_classes[scenes.digit],
        "background": scenes.picture,
        "position": places[:, 0] * (pool.room + 1) + places[:, 1],
    }


@pytest.mark.parametrize("share", SHARES)
def test_views_share_what_is_chosen_and_nothing_else(many, all_of_many, share):
    views, sample, pool = MovingViews(many, share), all_of_many, many.pools[0]
    keys = random.image_keys(seed=5, epoch=2, index=sample.index, stream=1)
    drawn = pool.draw(keys)
    new = {"ink": pool.ink(drawn), "backdrop": pool.backdrops(drawn), "place": pool.places(drawn, 1)[:, 0]}
    *second, places = views.second(sample, keys)
    for factor, name, found in zip(FACTORS, new, (*second, places[:, 0]), strict=True):
        assert torch.equal(found, sample.extra[name] if factor in share else new[name])


def test_what_is_not_shared_is_independent(many, all_of_many):
    pool, scenes = many.pools[0], many.train().scenes
    drawn = pool.draw(random.image_keys(seed=5, epoch=2, index=all_of_many.index, stream=1))
    old, new = columns(pool, scenes, all_of_many.extra["place"]), columns(pool, drawn, pool.places(drawn, 1)[:, 0])
    for a in FACTORS:
        assert not independent(old[a], old[a])
        for b in FACTORS:
            assert independent(old[a], new[b])
            assert a == b or (independent(old[a], old[b]) and independent(new[a], new[b]))


def test_views_are_rendered_and_normalised(source):
    sample, views = source.train().gather(torch.arange(6)), MovingViews(source, ("digit", "position"))
    views.measure(source)
    keys = [random.image_keys(0, 0, sample.index, stream) for stream in (0, 1)]
    frames, frame = views.draw(sample, keys)
    assert views.shapes == (frames.shape[1:], frame.shape[1:]) == ((SEEN, 3, 32, 32), (3, 32, 32))
    assert torch.equal(frames, views.center(sample))
    assert torch.allclose(views.show(frames, 0) * 255, sample.images[:, -1].float(), atol=1e-2)
    expected = render(*views.second(sample, keys[1]))[:, 0]
    assert torch.allclose(views.show(frame, 1) * 255, expected.float(), atol=1e-2)
    assert abs(float(frames.mean())) < 0.5 and 0.8 < float(frames.std()) < 1.2
    # As opaque as the ink is strong: where that is full, the pixel is white whatever the backdrop.
    full = torch.zeros(6, 32, 32, dtype=torch.bool)
    for row, (top, left) in enumerate(sample.extra["place"].tolist()):
        full[row, top : top + 14, left : left + 14] = sample.extra["ink"][row] == 255
    assert full.any() and (expected.amin(dim=1)[full] == 255).all()
    again = views.draw(sample[2:4], [key[2:4] for key in keys])
    assert torch.equal(again[0], frames[2:4]) and torch.equal(again[1], frame[2:4])


def test_held_out_sequences_meet_held_out_digits_and_pictures(source):
    sample, views = source.val().gather(torch.arange(8)), MovingViews(source, ("position",))
    ink, backdrops, _ = views.second(sample, random.image_keys(0, 0, sample.index, 1))
    known = {digit.numpy().tobytes() for digit in source.pools[1].digits}
    assert all(digit.numpy().tobytes() in known for digit in ink)
    drawn = source.pools[1].draw(random.image_keys(0, 0, sample.index, 1))
    assert torch.equal(backdrops, source.pools[1].backdrops(drawn))


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (("digit", "poistion"), "share=poistion: unknown factor; did you mean 'position'"),
        ((), r"share=\[\]: expected one of digit, background, position at least"),
    ],
)
def test_wrong_shares(source, share, message):
    with pytest.raises(UserError, match=message):
        MovingViews(source, share)
    assert MovingViews(source, "digit").share == ("digit",)


def test_views_need_their_source(source):
    from ssl_ib.data.sources.digits import Digits

    with pytest.raises(UserError, match="views 'moving_mnist' need source=moving_mnist, got"):
        MovingViews(Digits())
    other = Digits(32).train().gather(torch.arange(2))
    with pytest.raises(UserError, match="images of source=moving_mnist"):
        MovingViews(source).draw(other, [other.index] * 2)

"""The evaluations against brute force, scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch
from harness import trainer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from ssl_ib import UserError
from ssl_ib.data.sources.base import InMemory
from ssl_ib.evals.features import extract, raw_pixels
from ssl_ib.evals.health import alignment, dimension_std, lidar, rankme, uniformity
from ssl_ib.evals.knn import knn_top1, neighbours
from ssl_ib.evals.linear import linear_top1


def clusters(n: int, classes: int = 4, dim: int = 8, spread: float = 1.5, seed: int = 0):
    """Overlapping Gaussian classes: features [n, dim] of uneven scale, labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    features = centres[labels] + spread * torch.randn(n, dim, generator=generator)
    return features * torch.logspace(-0.5, 0.5, dim), labels


# --- nearest neighbours -----------------------------------------------------------------------------------------------


def brute_force_knn(train, train_labels, test, test_labels, k, temperature):
    train = np.asarray(train, dtype=np.float64)
    correct = 0
    for row, label in zip(np.asarray(test, dtype=np.float64), test_labels.tolist(), strict=True):
        cosine = [row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in train]
        scores = dict.fromkeys(range(10), 0.0)
        for i in sorted(range(len(train)), key=lambda i: -cosine[i])[:k]:
            scores[int(train_labels[i])] += math.exp(cosine[i] / temperature)
        correct += max(scores, key=scores.get) == label
    return correct / len(test)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5), (500, 0.07)])
def test_knn_is_brute_force(k, temperature):
    data = *clusters(150), *clusters(60, seed=1)
    expected = brute_force_knn(*data, k=k, temperature=temperature)
    assert 0.3 < expected < 1
    assert knn_top1(*data, k=k, temperature=temperature) == expected


def test_knn_is_sklearn():
    train, train_labels, test, test_labels = *clusters(300), *clusters(80, seed=1)
    vote = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = vote.fit(train, train_labels).score(test, test_labels)
    assert knn_top1(train, train_labels, test, test_labels) == pytest.approx(expected)


def test_knn_weighs_neighbours_by_similarity():
    # Two rows of class 1 lie farther away than one of class 0: they win only where the temperature is high.
    train, labels = torch.tensor([[1.0, 0.0], [1.0, 0.9], [1.0, -0.9]]), torch.tensor([0, 1, 1])
    test, answer = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_top1(train, labels, test, answer, temperature=0.07) == 1
    assert knn_top1(train, labels, test, answer, temperature=10.0) == 0


def test_knn_depends_on_neither_chunk_nor_scale():
    train, train_labels, test, test_labels = *clusters(200), *clusters(101, seed=1)
    scale = torch.linspace(0.1, 10, 200)[:, None]
    answers = {knn_top1(train, train_labels, test, test_labels, chunk=chunk) for chunk in (1, 7, 100, 1000)}
    answers.add(knn_top1(train * scale, train_labels, 3 * test, test_labels))
    assert len(answers) == 1


def test_nearest_rows_are_those_of_a_sort_by_similarity_and_number():
    """Also of many rows, which are searched by blocks, and where as many as there are blocks are tied."""
    generator = torch.Generator().manual_seed(0)
    # Of length 2, so that cosines are exact, and many are equal.
    train, test = (2.0 * torch.randint(2, (n, 4), generator=generator) - 1 for n in (1003, 9))
    similarity = test @ train.T / 4
    for k in (1, 5, 40, 1003):
        found = [torch.cat(parts) for parts in zip(*neighbours(train, test, k, chunk=4), strict=True)]
        values, columns = similarity.sort(dim=1, descending=True, stable=True)
        assert torch.equal(found[1], columns[:, :k])
        torch.testing.assert_close(found[0], values[:, :k])


def test_knn_ties_go_to_the_first_rows_and_the_smaller_class():
    same = torch.ones(6, 3)
    labels = torch.tensor([2, 2, 1, 1, 1, 1])
    for k, winner in ((1, 2), (3, 2), (4, 1), (6, 1)):
        assert knn_top1(same, labels, same[:1], torch.tensor([winner]), k=k) == 1


def test_knn_survives_a_small_temperature():
    train, labels = clusters(100)
    assert knn_top1(train, labels, train, labels, k=1, temperature=1e-3) == 1


# --- linear probe -----------------------------------------------------------------------------------------------------


def test_linear_probe_reaches_logistic_regression():
    train, train_labels, test, test_labels = *clusters(600), *clusters(400, seed=1)
    expected = LogisticRegression(C=1e6, max_iter=1000).fit(train, train_labels).score(test, test_labels)
    assert 0.5 < expected < 0.95
    assert linear_top1(train, train_labels, test, test_labels, batch_size=128) == pytest.approx(expected, abs=0.02)


def test_linear_probe_standardises():
    train, train_labels, test, test_labels = *clusters(200), *clusters(100, seed=1)
    plain = linear_top1(train, train_labels, test, test_labels, epochs=20)
    moved = linear_top1(1000 * train + 50, train_labels, 1000 * test + 50, test_labels, epochs=20)
    assert moved == pytest.approx(plain, abs=0.01)


def test_linear_probe_repeats_and_leaves_the_global_generator_alone():
    data = *clusters(200), *clusters(500, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = linear_top1(*data, epochs=2, batch_size=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert linear_top1(*data, epochs=2, batch_size=32) == first
    others = {linear_top1(*data, epochs=2, batch_size=32, seed=seed) for seed in range(1, 5)}
    assert others != {first}


def test_linear_rate_per_256_rows():
    data = *clusters(200), *clusters(500, seed=1)
    scaled = linear_top1(*data, epochs=3, batch_size=64, lr=0.02, lr_scale="linear")
    assert scaled == linear_top1(*data, epochs=3, batch_size=64, lr=0.005)
    assert scaled != linear_top1(*data, epochs=3, batch_size=64, lr=0.02)
    with pytest.raises(UserError, match="'raw' or 'linear', got 'square'"):
        linear_top1(*data, lr_scale="square")


def test_linear_probe_trains_under_no_grad():
    train, labels = clusters(200, spread=0.1)
    with torch.no_grad():
        assert linear_top1(train, labels, train, labels, epochs=20) == 1


@pytest.mark.parametrize("score", [knn_top1, linear_top1])
def test_scores_need_labels_and_finite_features(score):
    train, labels = clusters(20)
    unlabelled = labels.clone()
    unlabelled[3] = -1
    with pytest.raises(UserError, match="a label for every image, got 1 of 40 without"):
        score(train, unlabelled, train, labels)
    diverged = train.clone()
    diverged[0, 0] = float("inf")
    assert math.isnan(score(diverged, labels, train, labels))
    assert math.isnan(score(train, labels, diverged, labels))


@pytest.mark.parametrize("score", [knn_top1, linear_top1])
def test_scores_are_computed_in_float32_under_autocast(score):
    # Directions this close are one in bfloat16, and over so many rows some decision of its linear layer would change.
    train, train_labels, test, test_labels = *clusters(200), *clusters(3000, seed=1)
    if score is knn_top1:
        train, test = train + 200, test + 200
    expected = score(train, train_labels, test, test_labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert score(train, train_labels, test, test_labels) == expected


# --- health -----------------------------------------------------------------------------------------------------------


def test_rankme_counts_directions():
    orthonormal = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64)).Q
    assert rankme(orthonormal) == pytest.approx(6)
    assert rankme(torch.eye(5).repeat(3, 1)) == pytest.approx(5)
    # Singular values 3 and 1: p = (3/4, 1/4), and exp of the entropy is 4 / 3^(3/4).
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("row", [torch.full((8,), 0.3), torch.zeros(8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_health_of_collapsed_features(row, dtype):
    collapsed = row.to(dtype).repeat(10, 1)
    assert rankme(collapsed) == pytest.approx(1, abs=1e-9)
    assert dimension_std(collapsed) == pytest.approx(0, abs=1e-7)
    assert alignment(collapsed, collapsed) == 0
    assert uniformity(collapsed) == pytest.approx(0, abs=1e-9)
    assert lidar(torch.stack([collapsed, collapsed])) == pytest.approx(1, abs=1e-9)


def test_health_of_diverged_features_is_nan():
    diverged = torch.full((4, 3), float("nan"))
    assert all(math.isnan(measure(diverged)) for measure in (rankme, dimension_std, uniformity))
    assert math.isnan(alignment(diverged, diverged))
    assert math.isnan(lidar(torch.stack([diverged, diverged])))


@pytest.mark.parametrize("q, n", [(2, 40_000), (5, 20_000)])
def test_lidar_counts_what_tells_images_apart_and_not_views(q, n):
    """Images differ in three directions by 9, 3 and 1 times what views differ, and views in a fourth by far the most.

    The eigenvalues are 9, 3, 1 and 0 however many views are drawn and however the directions are mixed and scaled.
    """
    generator = torch.Generator().manual_seed(0)
    views_by = torch.tensor([1.0, 0.5, 2.0, 30.0], dtype=torch.float64)
    images_by = torch.tensor([9.0, 3.0, 1.0, 0.0], dtype=torch.float64).sqrt() * views_by
    images, views = (torch.randn(*shape, 4, generator=generator, dtype=torch.float64) for shape in ((n,), (q, n)))
    mixed = (images * images_by + views * views_by) @ torch.randn(4, 4, generator=generator, dtype=torch.float64)
    shares = torch.tensor([9.0, 3.0, 1.0]) / 13
    assert lidar(mixed, delta=0.0) == pytest.approx(torch.special.entr(shares).sum().exp().item(), rel=0.02)


def test_lidar_is_the_formula_written_out():
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(1, 30, 3, generator=generator, dtype=torch.float64) + 0.5 * torch.randn(
        50, 30, 3, generator=generator, dtype=torch.float64
    )
    means = [views[:, i].mean(dim=0) for i in range(30)]
    mean = sum(means) / 30
    between = sum(torch.outer(m - mean, m - mean) for m in means) / 29
    within = sum(torch.outer(v - means[i], v - means[i]) for i in range(30) for v in views[:, i]) / (30 * 49)
    between = between - within / 50
    values = torch.linalg.eigvals(torch.linalg.inv(within + 1e-4 * torch.eye(3)) @ between).real
    shares = values / values.sum()
    assert lidar(views) == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-9)


def test_dimension_std_of_an_isotropic_set_is_one():
    axes = torch.cat([torch.eye(6), -torch.eye(6)])
    assert dimension_std(5 * axes) == pytest.approx(1)
    # One-hot rows: a dimension is 1 with probability 1/D, so its std is sqrt(D - 1) / D.
    assert dimension_std(torch.eye(6)) == pytest.approx(math.sqrt(6) * math.sqrt(5) / 6)
    assert dimension_std(torch.randn(4000, 32)) == pytest.approx(1, abs=0.01)


def test_alignment_is_the_squared_distance_of_directions():
    x = torch.randn(7, 5)
    assert alignment(x, 4 * x) == pytest.approx(0, abs=1e-12)
    assert alignment(x, -x) == pytest.approx(4)
    assert alignment(torch.eye(4), torch.eye(4).roll(1, 0)) == pytest.approx(2)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_uniformity_is_brute_force(chunk):
    x = torch.randn(11, 5)
    unit = (x / x.norm(dim=1, keepdim=True)).double()
    energies = [math.exp(-3 * (unit[i] - unit[j]).square().sum()) for i in range(11) for j in range(i)]
    assert uniformity(x, t=3, chunk=chunk) == pytest.approx(math.log(sum(energies) / len(energies)), rel=1e-5)


def test_uniformity_of_orthogonal_rows():
    assert uniformity(torch.eye(6)) == pytest.approx(-4)


# --- features ---------------------------------------------------------------------------------------------------------


#: Three batches of two images.
IMAGES = InMemory(
    torch.arange(6 * 3 * 4 * 4).view(6, 3, 4, 4).to(torch.uint8), torch.tensor([0, -1, 1, -1, 2, -1]), ["a", "b", "c"]
)
ALL = torch.arange(6)


def center(sample):
    return sample.images.float() / 255


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_extract(amp):
    linear = torch.nn.Linear(48, 5)
    seen = []

    def encode(images):
        seen.append((torch.is_grad_enabled(), linear(images.flatten(1)).dtype))
        return linear(images.flatten(1))

    features, labels = extract(encode, IMAGES, ALL, 2, center, "cpu", amp)
    assert features.shape == (6, 5) and features.dtype == torch.float32 and not features.requires_grad
    assert labels.tolist() == [0, -1, 1, -1, 2, -1]
    assert seen == [(False, amp or torch.float32)] * 3
    expected = linear(center(IMAGES.gather(ALL)).flatten(1))
    torch.testing.assert_close(features, expected.detach(), atol=0.02 if amp else 1e-6, rtol=0)


def test_raw_pixels():
    pixels, labels = raw_pixels(IMAGES, ALL, 2, center)
    assert torch.equal(pixels, center(IMAGES.gather(ALL)).flatten(1))
    assert labels.tolist() == [0, -1, 1, -1, 2, -1]


def test_extract_follows_the_autocast_around_it():
    seen = []

    def encode(images):
        seen.append((images.flatten(1) @ torch.ones(48, 2)).dtype)
        return images

    with torch.autocast("cpu", torch.bfloat16):
        extract(encode, IMAGES, ALL, 6, center, "cpu")
        extract(encode, IMAGES, ALL, 6, center, "cpu", torch.float16)
    assert seen == [torch.bfloat16, torch.float16]


def test_an_empty_set_is_a_mistake():
    with pytest.raises(UserError, match="at least one image"):
        raw_pixels(IMAGES, ALL[:0], 2, center)


@pytest.mark.parametrize("width, has", [(24, True), (512, False)])
def test_lidar_is_read_where_images_are_more_than_dimensions(width, has):
    instance = trainer(f"model.backbone_args.embed_dim={width}", "model.backbone_args.num_heads=4")
    found = instance.online._health(instance.progress())
    assert ("health/lidar" in found) == has and "health/alignment" in found
    assert not has or 1 <= found["health/lidar"] <= width

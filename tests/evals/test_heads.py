"""Linear heads trained together: each step by the formula, and each head as if it were alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssl_ib.evals.heads import TRUST, Heads, Training

CPU = torch.device("cpu")


def data(n=60, width=5, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = 2 * torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(n, width, generator=generator), labels


def gradients(head, rows, labels, r):
    weight = head.weight[:, r].clone().requires_grad_()
    bias = head.bias[:, r].clone().requires_grad_()
    F.cross_entropy(rows @ weight.T + bias, labels).backward()
    return weight.grad, bias.grad


@pytest.mark.parametrize("optimiser, decay", [("lars", 0.0), ("lars", 0.1), ("sgd", 0.0), ("sgd", 0.1)])
def test_two_steps_are_the_official_ones(optimiser, decay):
    """MAE's LARS: g + wd p, times eta |p| / |g| of matrices, then momentum, then the rate; plain SGD without it."""
    rows, labels = data()
    rates, share = [6.4, 0.3], 0.5  # The cosine of 100 epochs after 50.
    heads = Heads(5, 3, rates, Training(optimiser=optimiser, weight_decay=decay), seed=1, device=CPU)
    expected = [(heads.weight[:, r].clone(), heads.bias[:, r].clone()) for r in range(2)]
    moved = [[torch.zeros_like(x) for x in pair] for pair in expected]
    for _ in range(2):
        for r, (weight, bias) in enumerate(expected):
            g, b = gradients(heads, rows, labels, r)
            g = g + decay * weight
            if optimiser == "lars":
                g = g * TRUST * weight.norm() / g.norm()
            moved[r] = [0.9 * m + d for m, d in zip(moved[r], (g, b), strict=True)]
            expected[r] = tuple(p - share * rates[r] * m for p, m in zip((weight, bias), moved[r], strict=True))
        heads.step(rows, labels, epoch=50)
        for r, (weight, bias) in enumerate(expected):
            torch.testing.assert_close(heads.weight[:, r], weight)
            torch.testing.assert_close(heads.bias[:, r], bias)


def trained(rates, epochs=6, **more):
    rows, labels = data()
    heads = Heads(5, 3, rates, Training(epochs=epochs, **more), seed=1, device=CPU)
    order = [torch.randperm(60, generator=torch.Generator().manual_seed(e)).split(16) for e in range(epochs)]
    for epoch in range(epochs):
        for number, i in enumerate(order[epoch]):
            heads.step(rows[i], labels[i], epoch + number / 4)
    return heads


@pytest.mark.parametrize("more", [{}, {"optimiser": "lars", "batch_norm": True, "warmup_epochs": 2.0}])
def test_a_head_of_a_sweep_is_the_one_trained_alone(more):
    rates = [0.01, 0.3, 3.0]
    together = trained(rates, **more)
    for r, rate in enumerate(rates):
        alone = trained([rate], **more)
        torch.testing.assert_close(together.weight[:, r], alone.weight[:, 0])


def test_heads_learn():
    rows, labels = data()
    assert (trained([0.3]).named(rows)[0] == labels).double().mean() > 0.8


def test_batch_norm_is_torchs():
    rows, _ = data()
    heads = trained([0.1], batch_norm=True)
    norm = heads.norm
    expected = (rows - norm.running_mean) / (norm.running_var + 1e-6).sqrt() @ heads.weight[:, 0].T + heads.bias[:, 0]
    torch.testing.assert_close(heads.scores(rows)[0], expected)


def test_shares():
    cosine = Training(epochs=90, warmup_epochs=10.0)
    assert cosine.share(5.0) == 0.5 and cosine.share(10.0) == 1.0
    assert cosine.share(50.0) == pytest.approx(0.5) and cosine.share(90.0) == pytest.approx(0)
    by_epoch = Training(epochs=10, shape="cosine_by_epoch")
    assert by_epoch.share(3.9) == by_epoch.share(3.0) == 0.5 * (1 + math.cos(math.pi * 0.3))
    steps = Training(epochs=60, shape="step", milestones=(30.0, 40.0, 50.0), gamma=0.2)
    assert [steps.share(e) for e in (29.9, 30.0, 55.0)] == pytest.approx([1.0, 0.2, 0.008])


def test_a_head_whose_rate_is_too_high_is_told_apart():
    heads = trained([0.1, 1e38])
    assert heads.finite.tolist() == [True, False]

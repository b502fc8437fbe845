"""Groups, rates and clipping against their definitions; LARS against the published update."""

import math

import pytest
import torch
from torch import nn

from ssl_ib import ParamGroup, Part, UserError
from ssl_ib.config.config import OptimConfig
from ssl_ib.optim import build_optimizer, clip_gradients, learning_rate, linear_scale, set_rates


class Net(Part):
    """A matrix, a bias, a norm's vectors, a 2-D parameter called bias, and one that is frozen."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Module()
        self.table.bias = nn.Parameter(torch.randn(2, 3))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


class Grouped(Net):
    """The same net with rates of its own."""

    def param_groups(self):
        return [
            ParamGroup("scaled", list(self.linear.named_parameters()), lr_scale=0.1, weight_decay=0.3),
            ParamGroup("own", [("token", self.token), ("norm.weight", self.norm.weight)], lr=0.5, weight_decay=0.0),
        ]


def config(**values):
    return OptimConfig.model_validate({"weight_decay": 0.05, "name": "adamw", **values})


def owner(optimizer, parameter):
    """The torch group that holds a parameter."""
    found = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    assert len(found) == 1
    return found[0]


def set_gradients(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_only_matrices_decay():
    net = Net()
    optimizer = build_optimizer(config(), [net])
    set_rates(optimizer, config(), 1.0, 1.0, 10)
    for parameter in (net.linear.weight, net.token):
        assert owner(optimizer, parameter)["weight_decay"] == 0.05
    for parameter in (net.linear.bias, net.norm.weight, net.norm.bias, net.table.bias):
        assert owner(optimizer, parameter)["weight_decay"] == 0.0


def test_what_is_frozen_is_left_out():
    net = Net()
    optimizer = build_optimizer(config(), [net])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters() if p.requires_grad} and len(held) == 6


def test_parts_within_parts_are_trained_once():
    outer = Net()
    outer.inner = Grouped(seed=1)
    optimizer = build_optimizer(config(), [outer])
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["net", "net", "scaled", "scaled", "own", "own"]
    assert owner(optimizer, outer.inner.token)["name"] == "own"
    # What the inner part trains under no group of its is not trained: that is its say.
    assert not any(p is outer.inner.table.bias for group in optimizer.param_groups for p in group["params"])


def test_rates_of_their_own():
    net, settings = Grouped(), config(lr=0.2, warmup_epochs=2, bias_lr_scale=3.0)
    optimizer = build_optimizer(settings, [net])
    for epoch in (0.0, 1.0, 2.0, 5.0, 9.5):
        rate = set_rates(optimizer, settings, scale=2.0, epoch=epoch, epochs=10)
        assert rate == learning_rate(settings, 0.4, epoch, 10)
        assert owner(optimizer, net.linear.weight)["lr"] == pytest.approx(rate * 0.1)
        assert owner(optimizer, net.linear.bias)["lr"] == pytest.approx(rate * 0.1 * 3.0)
        # A rate of its own follows the shape, and neither the run's rate nor its scale.
        assert owner(optimizer, net.token)["lr"] == pytest.approx(0.5 * rate / 0.4)
        assert owner(optimizer, net.norm.weight)["lr"] == pytest.approx(1.5 * rate / 0.4)
    assert owner(optimizer, net.linear.weight)["weight_decay"] == 0.3
    assert owner(optimizer, net.linear.bias)["weight_decay"] == 0.0
    assert owner(optimizer, net.token)["weight_decay"] == 0.0


def test_nothing_to_train():
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(config(), [Net().requires_grad_(False)])


def test_the_settings_reach_the_optimiser():
    for name, key, value in (
        ("adamw", "betas", (0.8, 0.7)),
        ("lamb", "betas", (0.8, 0.7)),
        ("lars", "momentum", 0.6),
        ("momentum", "momentum", 0.6),
    ):
        optimizer = build_optimizer(config(name=name, betas=(0.8, 0.7), momentum=0.6), [Net()])
        assert all(group[key] == value for group in optimizer.param_groups)
    optimizer = build_optimizer(config(args={"eps": 1e-3, "betas": [0.5, 0.6]}), [Net()])
    assert all(group["eps"] == 1e-3 and list(group["betas"]) == [0.5, 0.6] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "larss"}, "optim.name: unknown optimiser 'larss'; did you mean 'lars'"),
        ({"args": {"foo": 1}}, "optim: 'adamw' cannot be built: .*foo"),
        ({"args": {"lr": 1.0}}, "optim: 'adamw' cannot be built: .*lr"),
        ({"betas": (1.5, 0.9)}, "optim: 'adamw' cannot be built: .*beta"),
        ({"name": "momentum", "momentum": -1.0}, "optim: 'momentum' cannot be built: .*momentum"),
    ],
)
def test_mistakes(values, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(config(**values), [Net()])


# --- LARS -------------------------------------------------------------------------------------------------------------


def published_lars(parameter, gradient, momentum, lr, decay):
    """One step, in float64: You et al. 2017 as MAE, MoCo v3 and Barlow Twins have it. Returns parameter, momentum."""
    if parameter.ndim > 1:
        gradient = gradient + decay * parameter
        p, g = parameter.norm(), gradient.norm()
        if p > 0 and g > 0:
            gradient = gradient * (0.001 * p / g)
    momentum = 0.9 * momentum + gradient
    return parameter - lr * momentum, momentum


def lars_steps(decay, steps):
    """Parameters of a net and of the formula after some steps of timm's LARS."""
    net, settings = Net(), config(name="lars", weight_decay=decay, shape="constant", lr=4.8)
    with torch.no_grad():
        net.norm.bias.zero_()
        net.token.zero_()
    net.double()
    optimizer = build_optimizer(settings, [net])
    # The 2-D `bias` is not adapted: it belongs to those that do not decay.
    trained = [p for p in net.parameters() if p.requires_grad and p is not net.table.bias]
    expected = [p.detach().clone() for p in trained]
    momenta = [torch.zeros_like(p) for p in expected]
    for step in range(steps):
        set_rates(optimizer, settings, 1.0, step, 10)
        set_gradients(net, seed=step)
        for i, p in enumerate(trained):
            expected[i], momenta[i] = published_lars(expected[i], p.grad, momenta[i], 4.8, decay)
        optimizer.step()
    return trained, expected


@pytest.mark.parametrize("steps", [1, 4])
def test_lars_without_decay_is_the_published_one(steps):
    trained, expected = lars_steps(0.0, steps)
    for p, q in zip(trained, expected, strict=True):
        # timm adds 1e-8 to the denominator.
        torch.testing.assert_close(p.detach(), q, rtol=1e-7, atol=1e-9)
    assert any(p.ndim > 1 for p in trained) and any(p.ndim == 1 for p in trained)


def test_lars_with_decay_divides_by_another_norm():
    """timm divides by |g| + wd |p| where the published LARS divides by |g + wd p|, which is never larger."""
    decay = 0.5
    net, settings = Net().double(), config(name="lars", weight_decay=decay, shape="constant", lr=1.0)
    optimizer = build_optimizer(settings, [net])
    set_rates(optimizer, settings, 1.0, 0, 10)
    set_gradients(net)
    p, g = net.linear.weight.detach().clone(), net.linear.weight.grad.clone()
    optimizer.step()
    step = p - net.linear.weight.detach()
    timm = 0.001 * p.norm() / (g.norm() + decay * p.norm()) * (g + decay * p)
    published = 0.001 * p.norm() / (g + decay * p).norm() * (g + decay * p)
    torch.testing.assert_close(step, timm, rtol=1e-7, atol=1e-9)
    assert step.norm() < 0.95 * published.norm()
    # The direction is the same.
    torch.testing.assert_close(step / step.norm(), published / published.norm())


# --- rates ------------------------------------------------------------------------------------------------------------


def test_warmup_and_cosine():
    settings = config(warmup_epochs=10, min_lr=1e-3)
    assert [learning_rate(settings, 0.4, e, 50) for e in (0, 2.5, 5, 10)] == pytest.approx([0, 0.1, 0.2, 0.4])
    for epoch in (10, 13.7, 30, 49.9, 50):
        t = (epoch - 10) / 40
        expected = 1e-3 + (0.4 - 1e-3) * 0.5 * (1 + math.cos(math.pi * t))
        assert learning_rate(settings, 0.4, epoch, 50) == pytest.approx(expected)
    assert learning_rate(settings, 0.4, 50, 50) == pytest.approx(1e-3)
    assert learning_rate(config(), 0.4, 0, 50) == 0.4
    steps = config(shape="step", milestones=(30, 60), gamma=0.5, warmup_epochs=10)
    rates = [learning_rate(steps, 0.4, epoch, 100) for epoch in (5, 10, 29.9, 30, 59.9, 60, 100)]
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1])
    constant = config(shape="constant", warmup_epochs=10)
    assert [learning_rate(constant, 0.4, e, 50) for e in (5, 10, 49)] == [0.2, 0.4, 0.4]


def test_a_warmup_within_the_cosine():
    """InfoMin's code at batch 512: from .01 to where the cosine of the whole run is after 5 epochs."""
    settings = config(warmup_epochs=5, start_lr=0.01, cosine_from="start", min_lr=6e-5)

    def cosine(epoch):
        return 6e-5 + (0.06 - 6e-5) * 0.5 * (1 + math.cos(math.pi * epoch / 200))

    rates = [learning_rate(settings, 0.06, epoch, 200) for epoch in (0, 2.5, 5, 120, 200)]
    assert rates == pytest.approx([0.01, (0.01 + cosine(5)) / 2, cosine(5), cosine(120), 6e-5])
    assert learning_rate(config(warmup_epochs=5, start_lr=0.01), 0.06, 2.5, 200) == pytest.approx(0.035)
    with pytest.raises(ValueError, match="no cosine with another shape"):
        config(shape="constant", cosine_from="start")


def test_a_warmup_as_long_as_the_run():
    settings = config(warmup_epochs=10)
    assert [learning_rate(settings, 1.0, e, 10) for e in (0, 5, 9.9)] == pytest.approx([0, 0.5, 0.99])


def test_schedules_in_place_of_numbers():
    settings = config(
        lr={"from": 0.1, "to": 0.4}, weight_decay={"from": 0.04, "to": 0.4, "shape": "cosine"}, warmup_epochs=5
    )
    net = Grouped()
    optimizer = build_optimizer(settings, [net])
    assert set_rates(optimizer, settings, 2.0, 5, 10) == pytest.approx(0.5)
    assert owner(optimizer, net.linear.weight)["lr"] == pytest.approx(0.05)
    # The rate of its own follows the schedule's shape too: 0.5 at the peak.
    assert owner(optimizer, net.token)["lr"] == pytest.approx(0.5 * 0.25 / 0.4)
    plain = Net()
    optimizer = build_optimizer(settings, [plain])
    for epoch, decay in ((0, 0.04), (5, 0.22), (10, 0.4)):
        set_rates(optimizer, settings, 1.0, epoch, 10)
        assert owner(optimizer, plain.linear.weight)["weight_decay"] == pytest.approx(decay)
        assert owner(optimizer, plain.linear.bias)["weight_decay"] == 0.0


def test_linear_scaling():
    assert linear_scale(config(linear_scaling=True), 1024) == 4.0
    assert linear_scale(config(), 1024) == 1.0
    settings = config(lr=0.3, linear_scaling=True, shape="constant")
    optimizer = build_optimizer(settings, [Net()])
    assert set_rates(optimizer, settings, linear_scale(settings, 128), 0, 1) == pytest.approx(0.15)


def test_a_rate_of_zero():
    settings, net = config(lr=0.0), Grouped()
    optimizer = build_optimizer(settings, [net])
    assert set_rates(optimizer, settings, 1.0, 3, 10) == 0.0 and owner(optimizer, net.token)["lr"] == 0.0


# --- clipping ---------------------------------------------------------------------------------------------------------


def norm(*gradients):
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def clipped(mode, limit, part=Net):
    """Gradients before and after clipping of two parts, whose groups have one name, and the norm that is returned."""
    first, second = part(), part(seed=1)
    optimizer = build_optimizer(config(), [first, second])
    set_gradients(first)
    set_gradients(second, seed=2)
    with torch.no_grad():
        for p in second.parameters():
            if p.grad is not None:
                p.grad *= 1e-3
    first.norm.bias.grad = None
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    nets = [[p for p in net.parameters() if p.grad is not None and id(p) in held] for net in (first, second)]
    before = [[p.grad.clone() for p in net] for net in nets]
    total = clip_gradients(optimizer, limit, mode)
    return before, [[p.grad for p in net] for net in nets], total.item()


@pytest.mark.parametrize("mode", ["part", "param"])
def test_no_limit_changes_nothing(mode):
    before, after, total = clipped(mode, None)
    assert all(torch.equal(b, a) for x, y in zip(before, after, strict=True) for b, a in zip(x, y, strict=True))
    assert total == pytest.approx(norm(*before[0], *before[1]), rel=1e-5)


@pytest.mark.parametrize("part", [Net, Grouped])
def test_a_part_is_clipped_as_a_whole(part):
    """One norm over all its groups, as published codes clip a model; the part with small gradients is left alone."""
    before, after, total = clipped("part", 1.0, part)
    assert norm(*after[0]) == pytest.approx(1.0, rel=1e-4)
    scale = 1.0 / norm(*before[0])
    for b, a in zip(before[0], after[0], strict=True):
        torch.testing.assert_close(a, b * scale, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(b, a) for b, a in zip(before[1], after[1], strict=True))


def test_a_part_is_clipped_with_those_inside_it():
    outer, other = Net(), Net(seed=1)
    outer.inner = Net(seed=2)
    optimizer = build_optimizer(config(), [outer, other])
    for seed, net in enumerate((outer, outer.inner, other), start=1):
        set_gradients(net, seed)
    clip_gradients(optimizer, 1.0, "part")
    for root in (outer, other):
        assert norm(*(p.grad for p in root.parameters() if p.grad is not None)) == pytest.approx(1.0, rel=1e-4)


def test_each_parameter_is_clipped_alone():
    before, after, _ = clipped("param", 0.5)
    for b, a in zip(before[0] + before[1], after[0] + after[1], strict=True):
        expected = b * min(1.0, 0.5 / (b.norm().item() + 1e-6))
        torch.testing.assert_close(a, expected, rtol=1e-5, atol=1e-8)
    assert all(norm(g) <= 0.5 for g in after[0]) and all(norm(g) < 0.1 for g in after[1])

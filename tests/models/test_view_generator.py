"""The game of learned views: who plays against whom, at which rates, and what is asked of whom."""

import pytest
import torch
from torch import nn

from ssl_ib import Batch, Progress, RunInfo, UserError
from ssl_ib.criterions.view_game import ViewGame
from ssl_ib.models.reversal import reverse
from ssl_ib.models.view_generator import Standardised, ViewGenerator

SMALL = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3},
    "projector_hidden": 8,
    "projector_dim": 4,
}


def info(shapes=((3, 8, 8),), classes=("a", "b", "c")):
    return RunInfo(shapes, 6, classes=lambda: classes, mean=lambda: (0.5,) * 3, deviation=lambda: (0.25,) * 3)


def game(criterion, **more):
    """A model whose generator is no identity any more, told what the criterion reads."""
    torch.manual_seed(0)
    model = ViewGenerator(info(), **{**SMALL, **more})
    for parameter in model.generator.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.select(criterion.requires)
    return model


def batch():
    torch.manual_seed(1)
    return Batch([torch.randn(6, 3, 8, 8)], [None], torch.arange(6), torch.tensor([-1, -1, -1, 0, 2, 1]))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def of(found, part):
    return {n: g for n, g in found.items() if n.startswith(part)}


def test_reversal_is_exact():
    x = torch.randn(3, 4, requires_grad=True)
    y = reverse(x, 0.5)
    assert torch.equal(y, x)
    weight = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(gradient, -0.5 * weight)


@pytest.mark.parametrize("flow", ["vp", "nvp"])
def test_the_generator_maximises_what_its_critics_minimise(flow, monkeypatch):
    criterion = ViewGame(supervised=False)
    model = game(criterion, flow=flow)
    against = gradients(model, criterion(model(batch()), batch(), Progress(0, 0, 1, 1)).total)
    monkeypatch.setattr("ssl_ib.models.view_generator.reverse", lambda x: x)
    together = gradients(model, criterion(model(batch()), batch(), Progress(0, 0, 1, 1)).total)
    generator, critics = of(against, "generator"), of(against, "critics")
    assert all(torch.equal(g, -together[n]) for n, g in generator.items())
    assert any(g.abs().max() > 1e-4 for g in generator.values())
    assert all(torch.equal(g, together[n]) for n, g in critics.items() if g is not None)
    # The classifiers have no part in it.
    assert all(g is None for g in of(against, "classifiers").values())


def test_generator_and_classifiers_learn_from_labels_together():
    whole, labels, nce = ViewGame(), ViewGame(nce=False), ViewGame(supervised=False)
    model, progress = game(whole), Progress(0, 0, 1, 1)
    outputs = model(batch())
    both, supervised, contrastive = (
        gradients(model, criterion(model(batch()), batch(), progress).total) for criterion in (whole, labels, nce)
    )
    assert outputs["logits"][0].shape == (3, 3) and outputs["projection"][1].shape == (6, 4)
    for name, gradient in of(both, "generator").items():
        torch.testing.assert_close(gradient, supervised[name] + contrastive[name], rtol=1e-4, atol=1e-6)
    for name, gradient in of(both, "classifiers").items():
        assert gradient is None or torch.equal(gradient, supervised[name])
    assert max(float(g.abs().max()) for g in of(supervised, "generator").values()) > 1e-4


def test_groups_and_what_is_skipped():
    def groups(criterion):
        return {group.name: group.lr for group in game(criterion, lr_g=1e-3).param_groups()}

    assert groups(ViewGame()) == {"generator": 1e-3, "critics": 6e-4, "classifiers": 6e-4}
    assert groups(ViewGame(supervised=False)) == {"generator": 1e-3, "critics": 6e-4}
    assert groups(ViewGame(nce=False)) == {"generator": 1e-3, "classifiers": 6e-4}
    assert set(game(ViewGame(nce=False))(batch())) == {"logits"}


@pytest.mark.parametrize("switches", [{}, {"nce": False}])
def test_the_representation_is_of_the_networks_that_learned(switches):
    model = game(ViewGame(**switches)).eval()
    readers = model.classifiers if switches else model.critics
    x = batch().views[0]
    first, second = model.views_of(x)
    expected = torch.cat([readers[0].features(first), readers[1].features(second)], 1)
    assert first.shape == (6, 1, 8, 8) and second.shape == (6, 2, 8, 8)
    assert torch.equal(model.encode(x), expected)
    # An image's representation does not depend on those beside it.
    torch.testing.assert_close(model.encode(x[:2]), expected[:2])


def test_standardised_views():
    norm, x = Standardised(2, momentum=1.0), 3 + 2 * torch.randn(4, 2, 5, 5, requires_grad=True)
    y = norm(x)
    torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(dim=(0, 2, 3), unbiased=False), torch.ones(2), atol=1e-4, rtol=0)
    # The statistics are constants: the gradient is a mere factor.
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(
        gradient, x.new_ones(()).expand_as(x) / x.std(dim=(0, 2, 3), unbiased=False)[:, None, None]
    )
    torch.testing.assert_close(norm.eval()(x), y)


def test_mistakes():
    with pytest.raises(UserError, match=r"\[1, 8, 8\], \[2, 8, 8\]: use views=plain"):
        ViewGenerator(info(((1, 8, 8), (2, 8, 8))), **SMALL)
    unlabelled = ViewGenerator(info(classes=()), **SMALL)
    unlabelled.select({"projection"})
    with pytest.raises(UserError, match="at least 2 known classes, and the source has 0"):
        unlabelled.select({"projection", "logits"})

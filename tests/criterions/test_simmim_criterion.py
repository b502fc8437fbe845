"""SimMIM's criterion against the published formula on whole images, in float64, and the recipes it refuses."""

import pytest
import torch
from torch.autograd import gradcheck

from ssl_ib import Batch, Masks, Progress, RunInfo, UserError
from ssl_ib.config.config import resolve
from ssl_ib.criterions.simmim import SimMIM
from ssl_ib.ops import patchify
from ssl_ib.run import build_run

INFO, PROGRESS = RunInfo(((3, 8, 12),), batch_size=2), Progress(0, 0, 10, 1)
#: Images of 8 x 12 pixels with 3 channels: mask units of 4 x 4, in 2 rows of 3.
B, C, L, SIDE, COLUMNS = 2, 3, 6, 4, 3
KEPT = 2


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_batch(masks=1, views=1):
    keep = [draw(B, masks, L, seed=v).argsort(dim=2)[..., :KEPT] for v in range(views)]
    images = [draw(B, C, 8, 12, seed=10 + v) for v in range(views)]
    return Batch(images, [Masks.from_keep(k, L) for k in keep], torch.arange(B), -torch.ones(B))


def draw_outputs(masks=1, views=1):
    """Whole predicted images [B*N, C, 8, 12], and the same cut into patches."""
    images = [draw(B * masks, C, 8, 12, seed=20 + v) for v in range(views)]
    return images, {"reconstruction": [patchify(image, SIDE) for image in images]}


def published(image, pred, mask):
    """image and pred [B, C, H, W], mask bool [B, L]: the published loss, on the mask scaled up to pixels."""
    pixels = mask.unflatten(1, (-1, COLUMNS)).repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)[:, None].double()
    return ((image - pred).abs() * pixels).sum() / (pixels.sum() + 1e-5) / C


@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("views", [1, 2])
def test_it_is_the_published_loss(masks, views):
    batch, (images, outputs) = draw_batch(masks, views), draw_outputs(masks, views)
    loss = SimMIM(INFO)(outputs, batch, PROGRESS)
    losses = [
        published(view, image.unflatten(0, (B, masks))[:, n], masked.mask[:, n])
        for view, image, masked in zip(batch.views, images, batch.masks, strict=True)
        for n in range(masks)
    ]
    # The published 1e-5 in the denominator is that share of its B * 4 * 16 hidden pixels.
    hidden = B * (L - KEPT) * SIDE**2
    expected = sum(losses).item() / len(losses) * (1 + 1e-5 / hidden)
    assert loss.total.dtype == torch.float64
    assert loss.total.item() == pytest.approx(expected, rel=1e-12)
    assert loss.total.item() == pytest.approx(sum(losses).item() / len(losses), rel=1e-6)
    assert loss.terms.keys() == {"reconstruction"} and loss.terms["reconstruction"] == loss.total


def test_norm_pix():
    batch, (_, outputs) = draw_batch(2), draw_outputs(2)
    loss = SimMIM(INFO, norm_pix=True)(outputs, batch, PROGRESS).total.item()
    errors = []
    for row, pred in enumerate(outputs["reconstruction"][0]):
        image, mask = batch.views[0][row // 2], batch.masks[0].mask[row // 2, row % 2]
        for patch in range(L):
            top, left = SIDE * (patch // COLUMNS), SIDE * (patch % COLUMNS)
            pixels = image[:, top : top + SIDE, left : left + SIDE].permute(1, 2, 0).flatten()
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors += (pred[patch] - target).abs().tolist() if mask[patch] else []
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-12)


def test_the_loss_is_of_the_prediction():
    """A brighter, stronger view is another target unless it is standardised."""
    batch, (_, outputs) = draw_batch(), draw_outputs()
    brighter = Batch([3 * batch.views[0] + 1], batch.masks, batch.index, batch.label)
    plain, norm = (
        [SimMIM(INFO, norm_pix)(outputs, b, PROGRESS).total.item() for b in (batch, brighter)]
        for norm_pix in (False, True)
    )
    assert plain[0] != pytest.approx(plain[1], rel=0.1) and norm[0] == pytest.approx(norm[1], rel=1e-4)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_gradients(norm_pix):
    batch, (_, outputs) = draw_batch(2), draw_outputs(2)
    batch.views[0].requires_grad_(False)
    pred = outputs["reconstruction"][0].requires_grad_()
    criterion = SimMIM(INFO, norm_pix)
    assert gradcheck(lambda x: criterion({"reconstruction": [x]}, batch, PROGRESS).total, pred)
    (gradient,) = torch.autograd.grad(criterion(outputs, batch, PROGRESS).total, pred)
    touched = (gradient != 0).any(dim=2)
    assert torch.equal(touched, batch.masks[0].mask.flatten(0, 1))


def test_half_precision_is_summed_in_single():
    batch, (_, outputs) = draw_batch(), draw_outputs()
    half = {"reconstruction": [x.bfloat16() for x in outputs["reconstruction"]]}
    loss = SimMIM(INFO)(half, batch, PROGRESS).total
    rounded = {"reconstruction": [x.double() for x in half["reconstruction"]]}
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(SimMIM(INFO)(rounded, batch, PROGRESS).total.item(), rel=1e-5)


@pytest.mark.parametrize("masks", [1, 2])
def test_pixels(masks):
    batch, (_, outputs) = draw_batch(masks), draw_outputs(masks)
    target = patchify(batch.views[0], SIDE).repeat_interleave(masks, dim=0)
    hidden = batch.masks[0].mask.flatten(0, 1)
    (shown,) = SimMIM(INFO).pixels(outputs, batch)
    assert torch.equal(shown[hidden], outputs["reconstruction"][0][hidden])
    assert torch.equal(shown[~hidden], target[~hidden])
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    exact = {"reconstruction": [(target - mean) / (variance + 1e-6).sqrt()]}
    assert SimMIM(INFO, norm_pix=True)(exact, batch, PROGRESS).total.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(SimMIM(INFO, norm_pix=True).pixels(exact, batch)[0], target)


@pytest.mark.parametrize("masker", ["masker=none", "masker.ratio=0.0"])
def test_nothing_hidden_is_refused_before_data_is_read(masker):
    with pytest.raises(UserError, match="criterion 'simmim' scores hidden patches"):
        build_run(resolve("simmim_cifar10", ["source=digits", "device=cpu", masker]), dry=True)

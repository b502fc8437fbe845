"""MAE's criterion against Python loops in float64, and the recipes it refuses."""

import pytest
import torch
from torch.autograd import gradcheck

from ssl_ib import Batch, Masks, Progress, RunInfo, UserError
from ssl_ib.config.config import resolve
from ssl_ib.criterions.mae import MAE
from ssl_ib.ops import patchify
from ssl_ib.run import build_run

INFO, PROGRESS = RunInfo(((3, 4, 6),), batch_size=2), Progress(0, 0, 10, 1)
#: Images of 4 x 6 pixels with 3 channels: patches of 2 x 2, in 2 rows of 3.
B, L, P, SIDE, COLUMNS = 2, 6, 12, 2, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_batch(masks=1, views=1, kept=2):
    noise = [torch.rand(B, masks, L, generator=torch.Generator().manual_seed(v)) for v in range(views)]
    images = [draw(B, 3, 4, 6, seed=10 + v) for v in range(views)]
    return Batch(images, [Masks.from_noise(x, kept) for x in noise], torch.arange(B), -torch.ones(B))


def draw_outputs(masks=1, views=1):
    return {"reconstruction": [draw(B * masks, L, P, seed=20 + v) for v in range(views)]}


def target_of(image, patch, norm_pix):
    """Pixels of one patch, row by row, channels fastest."""
    top, left = SIDE * (patch // COLUMNS), SIDE * (patch % COLUMNS)
    pixels = [image[c, top + y, left + x].item() for y in range(SIDE) for x in range(SIDE) for c in range(3)]
    if norm_pix:
        mean = sum(pixels) / P
        variance = sum((x - mean) ** 2 for x in pixels) / (P - 1)
        pixels = [(x - mean) / (variance + 1e-6) ** 0.5 for x in pixels]
    return pixels


def mae_loss(view, pred, mask, norm_pix):
    """MAE's loss of one mask an image: pred [B][L][P], mask [B][L]."""
    errors = [
        sum((x - y) ** 2 for x, y in zip(pred[b][patch].tolist(), target_of(view[b], patch, norm_pix), strict=True)) / P
        for b in range(B)
        for patch in range(L)
        if mask[b][patch]
    ]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("views", [1, 2])
def test_the_mean_of_the_masks_mae_losses(norm_pix, masks, views):
    outputs, batch = draw_outputs(masks, views), draw_batch(masks, views)
    loss = MAE(INFO, norm_pix)(outputs, batch, PROGRESS)
    losses = [
        mae_loss(view, pred.unflatten(0, (B, masks))[:, n], masked.mask[:, n], norm_pix)
        for view, pred, masked in zip(batch.views, outputs["reconstruction"], batch.masks, strict=True)
        for n in range(masks)
    ]
    assert loss.total.dtype == torch.float64
    assert loss.total.item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert loss.terms.keys() == {"reconstruction"} and loss.terms["reconstruction"] == loss.total


@pytest.mark.parametrize("norm_pix", [True, False])
def test_gradients(norm_pix):
    batch, criterion = draw_batch(2), MAE(INFO, norm_pix)
    pred = draw(2 * B, L, P).requires_grad_()
    assert gradcheck(lambda x: criterion({"reconstruction": [x]}, batch, PROGRESS).total, (pred,))
    criterion({"reconstruction": [pred]}, batch, PROGRESS).total.backward()
    # What is shown is not scored.
    hidden = batch.masks[0].mask.flatten(0, 1)
    assert (pred.grad[hidden] != 0).all() and not pred.grad[~hidden].any()


def test_norm_pix_is_blind_to_a_patchs_brightness_and_contrast():
    outputs, batch = draw_outputs(), draw_batch()
    other = Batch([1000 * batch.views[0] + 5], batch.masks, batch.index, batch.label)
    losses = [
        [MAE(INFO, norm_pix)(outputs, b, PROGRESS).total.item() for b in (batch, other)] for norm_pix in (True, False)
    ]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-4) and losses[1][1] > 1000 * losses[1][0]


def test_an_even_patch_has_the_target_zero():
    batch = draw_batch()
    even = Batch([torch.full_like(batch.views[0], 0.3)], batch.masks, batch.index, batch.label)
    pred = torch.full((B, L, P), 2.0, dtype=torch.float64)
    assert MAE(INFO)({"reconstruction": [pred]}, even, PROGRESS).total.item() == pytest.approx(4.0)


@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_pixels_are_the_hidden_patches_rebuilt_among_the_visible_ones(norm_pix, masks):
    outputs, batch = draw_outputs(masks, views=2), draw_batch(masks, views=2)
    found = MAE(INFO, norm_pix).pixels(outputs, batch)
    for v, view in enumerate(batch.views):
        for row in range(B * masks):
            for patch in range(L):
                expected = torch.tensor(target_of(view[row // masks], patch, False), dtype=torch.float64)
                if batch.masks[v].mask[row // masks, row % masks, patch]:
                    pred = outputs["reconstruction"][v][row, patch]
                    mean, variance = expected.mean(), ((expected - expected.mean()) ** 2).sum() / (P - 1)
                    expected = pred * (variance + 1e-6).sqrt() + mean if norm_pix else pred
                torch.testing.assert_close(found[v][row, patch], expected)


def test_pixels_of_a_perfect_prediction_are_the_image():
    batch = draw_batch(3)
    image = batch.views[0]
    pred = [[target_of(picture, patch, True) for patch in range(L)] for picture in image for _ in range(3)]
    found = MAE(INFO).pixels({"reconstruction": [torch.tensor(pred, dtype=torch.float64)]}, batch)[0]
    torch.testing.assert_close(found, patchify(image, SIDE).repeat_interleave(3, dim=0))


@pytest.mark.parametrize(
    "masker, message",
    [("none", "masker=none hides nothing"), ("{name: random, ratio: 0.0}", "its mask ratio hides no patch")],
)
def test_nothing_hidden_is_refused_before_data_is_read(masker, message):
    config = resolve("mi_mae_digits", ["criterion=mae", f"masker={masker}"])
    with pytest.raises(UserError, match=f"criterion 'mae' scores hidden patches, and {message}"):
        build_run(config, dry=True)


@pytest.mark.parametrize("masker", ["random", "orthogonal", "{name: independent, n_masks: 3}"])
def test_what_hides_something_is_not(masker):
    run = build_run(resolve("mi_mae_digits", ["criterion=mae", f"masker={masker}"]), dry=True)
    assert isinstance(run.criterion, MAE) and run.model.wanted == {"reconstruction"}


def test_a_model_that_reconstructs_nothing_is_refused():
    config = resolve("simclr_digits", ["criterion=mae", "masker=random"])
    with pytest.raises(UserError, match="missing reconstruction"):
        build_run(config, dry=True)

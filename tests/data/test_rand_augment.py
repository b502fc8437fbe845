"""RandAugment's operations against timm's on Pillow's images, and how they are drawn."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from ssl_ib import UserError, random
from ssl_ib.data.views.rand_augment import OPS, PLAIN_OPS, STRENGTHS, RandAugment
from ssl_ib.ops.pixels import levels

THEIRS = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "solarize_add": "SolarizeAdd",
    "colour": "Color",
    "contrast": "Contrast",
    "brightness": "Brightness",
    "sharpness": "Sharpness",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
#: Grey levels by which a pixel may differ; 0 for the other operations. Pillow computes these in float64 and then drops
#: the digits after the point, so a value that is whole but for rounding can come out a level lower.
OFF_BY = dict.fromkeys(["autocontrast", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"], 1)
B = 16


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Whole levels [B, 3, 21, 34]: noise, smooth shades, few levels, one level, black and white, grey."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(B, 3, 21, 34, generator=generator)
    x = torch.nn.functional.interpolate(noise[..., :4, :5], (21, 34), mode="bilinear")
    x[:4] = noise[:4]
    x[4] = (x[4] * 5).round() / 5 * 0.7
    x[5] = 0.3
    x[6] = (noise[6] > 0.5).float()
    x[7] = noise[7, :1]
    x[8, 1] = 0.9
    return (x * 255).round() / 255


def keys(n: int) -> torch.Tensor:
    return random.image_keys(seed=0, epoch=0, index=torch.arange(n))


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("magnitude", [0.0, 2.5, 5.0, 7.3, 10.0])
@pytest.mark.parametrize("name", OPS)
def test_an_operation_is_timms(images, name, magnitude):
    augment = RandAugment(1, magnitude, magnitude_std=0.0, op_p=1.0, ops=(name,))
    drawn = augment.draw(keys(B))
    if name in STRENGTHS:
        [level] = auto_augment.LEVEL_TO_ARG[THEIRS[name]](magnitude, {})
        assert drawn.value.abs().allclose(torch.tensor(abs(float(level)), dtype=torch.float64), atol=1e-12)
    if name == "posterize" and magnitude == 0:
        return  # Pillow refuses to keep no bit; see below
    fill = tuple(round(255 * share) for share in augment.fill)
    for i, ours in enumerate(augment.apply(images.clone(), drawn) * 255):
        value = drawn.value[i, 0].item()
        resample = Image.Resampling.BICUBIC if drawn.bicubic[i, 0] else Image.Resampling.BILINEAR
        arguments = [int(value) if value.is_integer() and name.startswith(("poster", "solar")) else value]
        theirs = auto_augment.NAME_TO_OP[THEIRS[name]](
            pil(images[i]), *arguments[: name in STRENGTHS], fillcolor=fill, resample=resample
        )
        off = (ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs()
        assert off.max() <= OFF_BY.get(name, 0) + 1e-3, (i, value)


def test_posterize_keeps_no_bit_at_small_magnitudes(images):
    changed = RandAugment(1, 2.0, 0.0, 1.0, ("posterize",))
    assert changed.apply(images.clone(), changed.draw(keys(B))).max() == 0.0


def test_identity_and_a_number_of_none_change_nothing(images):
    for augment in (RandAugment(3, op_p=1.0, ops=("identity",)), RandAugment(0)):
        assert torch.equal(augment.apply(images.clone(), augment.draw(keys(B))), images)


def test_draws_are_uniform_and_magnitudes_normal_and_clipped():
    n = 20_000
    augment = RandAugment(number=2, magnitude=9.5, magnitude_std=0.5, op_p=0.3)
    drawn = augment.draw(keys(n))
    fired = drawn.op >= 0
    assert abs(fired.double().mean() - 0.3) < 4 * math.sqrt(0.21 / (2 * n))
    shares = torch.bincount(drawn.op[fired], minlength=len(OPS)) / fired.sum()
    assert (shares - 1 / len(OPS)).abs().max() < 4 * math.sqrt(1 / len(OPS) / fired.sum())
    rotated = drawn.value[drawn.op == OPS.index("rotate")]
    assert abs((rotated < 0).double().mean() - 0.5) < 2 / math.sqrt(len(rotated))
    magnitudes = rotated.abs() / STRENGTHS["rotate"] * 10
    # Of a normal number, the share above one deviation is 0.159, and above two, here clipped at none, 0.023.
    assert magnitudes.max() == 10.0 and abs((magnitudes == 10.0).double().mean() - 0.159) < 2 / math.sqrt(len(rotated))
    assert abs((magnitudes < 8.5).double().mean() - 0.023) < 2 / math.sqrt(len(rotated))
    assert drawn.value[drawn.op == OPS.index("colour")].max() == pytest.approx(1.9)
    geometric = drawn.op == OPS.index("rotate")
    assert abs(drawn.bicubic[geometric].double().mean() - 0.5) < 2 / math.sqrt(geometric.sum())
    assert not drawn.bicubic[drawn.op == OPS.index("invert")].any()
    assert torch.corrcoef(torch.stack([drawn.op[:, 0], drawn.op[:, 1]]).double())[0, 1].abs() < 4 / math.sqrt(n)


def test_an_image_depends_on_its_key_alone(images):
    augment = RandAugment(number=3, op_p=0.9)
    together = augment.apply(images.clone(), augment.draw(keys(B)))
    assert (together != images).flatten(1).any(1).sum() > B // 2
    for rows in (torch.arange(B).flip(0), *torch.arange(B)[:, None]):
        assert torch.equal(augment.apply(images[rows].clone(), augment.draw(keys(B)[rows])), together[rows])


def test_strengths_are_those_at_magnitude_10():
    augment = RandAugment(1, 5.0, 0.0, 1.0, ("rotate", "brightness"), {"rotate": 12.0, "brightness": 0.4})
    drawn = augment.draw(keys(50))
    assert drawn.value[drawn.op == 0].abs().unique().tolist() == [6.0]
    assert drawn.value[drawn.op == 1].unique().tolist() == pytest.approx([0.3])


def test_cmcs_list_leaves_colours_alone():
    assert len(OPS) == 15 and len(PLAIN_OPS) == 8
    assert not {"colour", "brightness", "contrast", "invert", "solarize", "equalize", "posterize"} & {*PLAIN_OPS}
    assert {*OPS} | {*PLAIN_OPS} == {*levels.FUNCTIONS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ("rotat",)}, "ops: unknown operation 'rotat'; did you mean 'rotate'"),
        ({"ops": ()}, "ops: expected the name of an operation"),
        ({"op_strengths": {"shear": 0.1}}, "op_strengths: operation 'shear' is unknown; did you mean 'shear_"),
        ({"op_strengths": {"invert": 0.1}}, "op_strengths: operation 'invert' has no strength"),
        ({"op_strengths": {"rotate": -1.0}}, r"op_strengths: expected a strength in \[0, 180\] for 'rotate', got -1"),
        ({"op_strengths": {"shear_x": -9.0}}, "op_strengths: expected a strength of 0 or more for 'shear_x', got -9"),
        ({"magnitude": 11.0}, r"magnitude: expected a number in \[0, 10\], got 11"),
        ({"magnitude_std": -0.5}, "magnitude_std: expected 0 or more, got -0.5"),
        ({"op_p": 1.5}, "op_p: expected a probability, got 1.5"),
        ({"number": -1}, "rand_augment: expected 0 operations an image or more, got -1"),
    ],
)
def test_impossible_numbers_are_the_users_mistake(arguments, message):
    with pytest.raises(UserError, match=message):
        RandAugment(**arguments)

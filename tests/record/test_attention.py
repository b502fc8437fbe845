"""Where the class token looks, and the figures of it and of prototypes."""

import numpy as np
import timm
import torch
from PIL import Image

from ssl_ib.record import figures
from ssl_ib.record.attention import class_attention, has_class_attention

ARGUMENTS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


def vit(**more) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **ARGUMENTS | more).eval()


def test_it_is_what_the_last_block_multiplies_values_by():
    """Brute force: the weights, applied to the values and projected, are the block's own output for the class token."""
    torch.manual_seed(0)
    for more in ({}, {"reg_tokens": 2}):
        model, images = vit(**more), torch.randn(2, 3, 16, 16)
        maps = class_attention(model, images)
        assert maps.shape == (2, 3, 4, 4) and (maps > 0).all() and (maps.sum(dim=(2, 3)) < 1).all()
        seen = {}
        block = model.blocks[-1].attn
        handle = block.register_forward_hook(lambda module, given, out, seen=seen: seen.update(x=given[0], out=out))
        with torch.no_grad():
            model.forward_features(images)
            handle.remove()
            q, k, v = block.qkv(seen["x"]).unflatten(2, (3, 3, 8)).unbind(2)
            expected = torch.empty(2, 3, seen["x"].shape[1])
            for b in range(2):
                for head in range(3):
                    scores = torch.stack([q[b, 0, head] @ k[b, j, head] for j in range(expected.shape[2])]) / 8**0.5
                    expected[b, head] = scores.exp() / scores.exp().sum()
            out = block.proj(torch.einsum("bhj,bjhd->bhd", expected, v).flatten(1))
            torch.testing.assert_close(out, seen["out"][:, 0], atol=1e-5, rtol=1e-4)
        patches = expected[:, :, model.num_prefix_tokens :]
        torch.testing.assert_close(maps.flatten(2), patches, atol=1e-6, rtol=1e-4)


def test_only_a_plain_vision_transformer_with_a_class_token_has_one():
    assert has_class_attention(vit())
    assert not has_class_attention(vit(class_token=False, global_pool="avg"))
    assert not has_class_attention(timm.create_model("resnet18", num_classes=0)) and not has_class_attention(None)


def test_the_figures(tmp_path, monkeypatch):
    sheets, sheet = [], figures.contact_sheet
    monkeypatch.setattr(figures, "contact_sheet", lambda *a, **k: sheets.append(sheet(*a, **k)) or sheets[0])
    images, maps = torch.rand(3, 3, 16, 16), torch.zeros(3, 2, 4, 4)
    maps[:, 0, 1, 2] = 0.3
    maps[1, 1, 0, 0] = 0.1
    figures.attention(images, maps, tmp_path / "attention.png", num=3)
    drawn = Image.open(tmp_path / "attention.png")
    # A row for the images, the mean and each of the two heads, of 7 times 16 pixels.
    assert drawn.height > 4 * 112 and drawn.width > 3 * 112
    # What the colours mean is stated: by row, with a bar of them below.
    texts = [text.get_text() for text in sheets[0].texts]
    assert texts[-3:] == ["mean of heads\n0 to 15 %", "head 1\n0 to 30 %", "head 2\n0 to 10 %"]
    assert "evenly over the patches would be 6.25 %" in texts[1] and len(sheets[0].axes) == 1
    # One scale for all images of a row: the second head looks nowhere in the first image.
    pixels = np.asarray(drawn.convert("RGB")).astype(int)
    top = drawn.height - 64 - 6 - 118
    first, second = (pixels[top : top + 112, 148 + 118 * n : 148 + 118 * n + 112] for n in (0, 1))
    assert first.max() < 10 < 200 < second.max()
    shares = torch.eye(16)[:5]
    figures.occupancy(shares, 8.0, tmp_path / "few.png")
    figures.occupancy(shares.flip(1), 8.0, tmp_path / "many.png")
    assert (tmp_path / "few.png").read_bytes() != (tmp_path / "many.png").read_bytes()

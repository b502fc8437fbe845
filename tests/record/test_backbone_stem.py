"""A ResNet's stem for small images, and the backbone it leaves behind."""

import json

import pytest
import torch

from ssl_ib.record import backbone


def test_the_stem_keeps_the_resolution():
    model = backbone.create("resnet18", {"num_classes": 0, "stem": "cifar"})
    images = torch.randn(2, 3, 32, 32)
    assert [f.shape[-1] for f in model.forward_intermediates(images, intermediates_only=True)][1:] == [32, 16, 8, 4]
    assert model(images).shape == (2, 512)
    plain = backbone.create("resnet18", {"num_classes": 0})
    assert plain.conv1.stride == (2, 2) and model.conv1.kernel_size == (3, 3)


def test_it_is_saved_and_rebuilt(tmp_path):
    arguments = {"num_classes": 0, "in_chans": 3, "stem": "cifar"}
    model = backbone.create("resnet18", arguments).eval()
    description = backbone.describe("resnet18", arguments, ((0.5,) * 3, (0.2,) * 3))
    backbone.save_backbone(model, description, tmp_path)
    saved = json.loads((tmp_path / "backbone.json").read_text())
    assert saved["stem"] == "cifar" and "stem" not in saved["arguments"]
    images = torch.randn(2, 3, 32, 32)
    found = {}
    # What a reader without this package types.
    exec(backbone.snippet(tmp_path), found)
    with torch.no_grad():
        expected = model(images)
        for again in (backbone.load_backbone(tmp_path), found["model"].eval()):
            torch.testing.assert_close(again(images), expected)


@pytest.mark.parametrize("name, stem", [("resnet18", "tiny"), ("vit_tiny_patch16_224", "cifar")])
def test_no_such_stem(name, stem):
    with pytest.raises(ValueError, match=f"stem='{stem}': expected 'cifar'"):
        backbone.create(name, {"stem": stem})

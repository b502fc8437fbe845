"""Feature maps of encoders: their shapes and strides, positions, and rates by layer."""

import pytest
import torch
from harness import save_encoder

from ssl_ib import UserError
from ssl_ib.evals.maps import FeatureMaps
from ssl_ib.evals.subject import Subject, origin

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2}
RESNET = {"channels": [8, 16, 24, 32]}


def subject(folder, name="vit_tiny_patch16_224", arguments=VIT):
    where = save_encoder(folder, name, **arguments)
    return Subject(where, origin(where))


def shapes(maps, height, width):
    return [list(found.shape[1:]) for found in maps.eval()(torch.randn(2, 3, height, width))]


def test_a_vision_transformer_has_four_scales(tmp_path):
    maps = FeatureMaps(subject(tmp_path), (32, 48))
    assert (maps.strides, maps.channels, maps.levels) == ([1, 2, 4, 8], [32] * 4, [1, 2, 3, 5])
    assert maps.encoder.pos_embed.shape[1] == 1 + 8 * 12
    assert shapes(maps, 32, 48) == [[32, 32, 48], [32, 16, 24], [32, 8, 12], [32, 4, 6]]
    # Another size, which is no multiple of the patch: it is filled up to 20 x 28.
    assert shapes(maps, 18, 25) == [[32, 20, 28], [32, 10, 14], [32, 5, 7], [32, 3, 4]]


def test_the_taps_are_the_blocks_tokens(tmp_path):
    given = subject(tmp_path)
    maps, images = FeatureMaps(given, 32, scales=(16, 16), blocks=[2, 5]).eval(), torch.randn(2, 3, 32, 32)
    for found, expected in zip(maps(images), given.model.forward_intermediates(images, [2, 5])[1], strict=True):
        assert torch.equal(found, expected)
    (last,) = FeatureMaps(given, 32, scales=(16,), norm=True).eval()(images)
    tokens = given.model.forward_features(images)[:, 1:]
    assert torch.allclose(last.flatten(2).mT, tokens, atol=1e-6)


def test_the_pyramid_is_of_the_last_block(tmp_path):
    maps = FeatureMaps(subject(tmp_path), 32, mode="pyramid", width=24, drop_path=0.1)
    assert shapes(maps, 32, 32) == [[24, 32, 32], [24, 16, 16], [24, 8, 8], [24, 4, 4]]
    assert maps.levels == [5] * 4 and maps.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_positions_are_resampled_to_the_size_of_the_images(tmp_path):
    given = subject(tmp_path)
    images = torch.randn(1, 3, 64, 32)
    made, resampled = FeatureMaps(given, (64, 32), scales=(16,)).eval(), FeatureMaps(given, 32, scales=(16,)).eval()
    assert made.encoder.pos_embed.shape[1] == 1 + 16 * 8 and resampled.encoder.pos_embed.shape[1] == 1 + 8 * 8
    assert torch.allclose(made(images)[0], resampled(images)[0], atol=1e-5)


@pytest.mark.parametrize("stem, strides", [({}, [4, 8, 16, 32]), ({"stem": "cifar"}, [1, 2, 4, 8])])
def test_a_resnet_has_its_own_maps(tmp_path, stem, strides):
    given = subject(tmp_path, "resnet18", RESNET | stem)
    maps = FeatureMaps(given, 64)
    assert (maps.strides, maps.channels) == (strides, [8, 16, 24, 32])
    assert shapes(maps, 64, 80) == [[c, 64 // s, -(-80 // s)] for c, s in zip(maps.channels, strides, strict=True)]
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(maps(images)[-1], given.model.forward_features(images), atol=1e-6)


def test_a_swin_takes_the_size_that_is_given(tmp_path):
    how = {"img_size": 32, "window_size": 2, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    maps = FeatureMaps(subject(tmp_path, "swin_tiny_patch4_window7_224", how), 128, scales=(8, 32))
    assert shapes(maps, 128, 128) == [[16, 16, 16], [64, 4, 4]] and maps.strides == [8, 32]
    with pytest.raises(UserError, match="cannot encode views of 96 x 96 pixels"):
        maps(torch.zeros(1, 3, 96, 96))


def test_rates_fall_layer_by_layer_below_the_new_ones(tmp_path):
    maps = FeatureMaps(subject(tmp_path), 32)
    groups = maps.groups(0.1, 0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    assert set(of) == {id(p) for p in maps.parameters()}
    encoder = maps.encoder
    for module, scale in ((encoder.patch_embed, 0.5**7), (encoder.blocks[0], 0.5**6), (encoder.blocks[-1], 0.5)):
        assert {of[id(p)]["lr_scale"] for p in module.parameters()} == {scale}
    assert {of[id(p)]["lr_scale"] for p in maps.necks.parameters()} == {1.0}
    assert {p.ndim > 1 for p in maps.necks.parameters() if of[id(p)]["weight_decay"]} == {True}
    assert of[id(encoder.pos_embed)]["weight_decay"] == 0


def test_mistakes(tmp_path):
    given = subject(tmp_path)
    with pytest.raises(UserError, match=r"blocks: expected 4 numbers from 0 to 5, got \[3, 5, 7, 11\]"):
        FeatureMaps(given, 32, blocks=[3, 5, 7, 11])
    with pytest.raises(UserError, match="only a vision transformer has them"):
        FeatureMaps(subject(tmp_path / "r", "resnet18", RESNET), 64, mode="pyramid")
    with pytest.raises(UserError, match="eva02_tiny_patch14_224: the maps of Eva have one stride"):
        FeatureMaps(Subject("timm:eva02_tiny_patch14_224", origin("timm:")), 96)
    given.backbone.model.feature_info = []
    with pytest.raises(UserError, match="timm gives no feature maps of a VisionTransformer"):
        FeatureMaps(given, 32)

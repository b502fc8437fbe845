"""The encoder is timm's, on all patches or on the visible ones alone."""

import math

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from ssl_ib import UserError
from ssl_ib.models.encoder import Encoder
from ssl_ib.models.positions import sincos_positions

VIT = "vit_tiny_patch16_224"
SIZE = {"embed_dim": 24, "depth": 2, "num_heads": 2}
SHAPE = (3, 16, 24)

#: Name, arguments, pool. Layer scale is switched on at 1, so that every block counts.
VITS = {
    "class token": (VIT, {"patch_size": 4}, "cls"),
    "large patches": (VIT, {"patch_size": 8}, "cls"),
    "mean": (VIT, {"patch_size": 4}, "mean"),
    "no class token": (VIT, {"patch_size": 4, "class_token": False, "global_pool": "avg"}, "mean"),
    "norm after pooling": (VIT, {"patch_size": 4, "global_pool": "avg"}, "mean"),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 4, "init_values": 1.0}, "cls"),
    "registers with positions": (
        "vit_small_patch14_reg4_dinov2",
        {"patch_size": 4, "init_values": 1.0, "no_embed_class": False},
        "mean",
    ),
    "class token without position": (VIT, {"patch_size": 4, "no_embed_class": True}, "cls"),
    "norm before the blocks": ("vit_base_patch16_clip_224.openai", {"patch_size": 4}, "cls"),
    "patches with a norm": (VIT, {"patch_size": 4, "embed_norm_layer": torch.nn.LayerNorm}, "cls"),
    "attention pooling": (VIT, {"patch_size": 4, "global_pool": "map"}, "cls"),
    "a classifier": (VIT, {"patch_size": 4, "num_classes": 10}, "mean"),
    "any size": (VIT, {"patch_size": 4, "dynamic_img_size": True}, "cls"),
}
each_vit = pytest.mark.parametrize("kind", VITS)


def encoder(kind="class token", shape=SHAPE, seed=0, **arguments):
    """An encoder in evaluation mode, none of whose parameters is 0 or 1."""
    name, extra, pool = VITS[kind]
    torch.manual_seed(seed)
    net = Encoder(name, {**SIZE, **extra, **arguments}, shape, pool).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def images(batch=2, shape=SHAPE, seed=1):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def orders(batch, num_patches, kept=None, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_patches, generator=generator)[:kept] for _ in range(batch)])


def patches(net, shape=SHAPE):
    rows, columns = net.grid(shape)
    return rows * columns


# --- all patches ------------------------------------------------------------------------------------------------------


@each_vit
def test_whole_images_are_timms(kind):
    net, x = encoder(kind), images()
    with torch.no_grad():
        torch.testing.assert_close(net.tokens(x), net.backbone.forward_features(x))
        tokens, pooled = net(x)
        assert torch.equal(tokens, net.tokens(x)) and pooled.shape == (2, net.width) == (2, 24)


@each_vit
def test_the_backbone_itself_pools_as_evaluated(kind):
    net, x = encoder(kind), images()
    rebuilt = timm.create_model(net.name, **net.arguments).eval()
    rebuilt.load_state_dict(net.backbone.state_dict())
    with torch.no_grad():
        for backbone in (net.backbone, rebuilt):
            torch.testing.assert_close(backbone(x), net(x)[1])


def test_the_mean_leaves_the_prefix_out():
    net, x = encoder("registers with positions"), images()
    with torch.no_grad():
        tokens, pooled = net(x)
        assert tokens.shape[1] == 5 + 24
        torch.testing.assert_close(pooled, tokens[:, 5:].mean(dim=1))


def test_grids():
    net = encoder()
    assert net.grid(SHAPE) == (4, 6) and net.backbone.patch_embed.grid_size == (4, 6)
    assert encoder("large patches").grid(SHAPE) == (2, 3)
    with pytest.raises(UserError, match="a view of 16 x 18 pixels cannot be cut into patches of 4"):
        net.grid((3, 16, 18))


def test_one_channel():
    net = encoder(shape=(1, 16, 16))
    assert net(images(shape=(1, 16, 16)))[1].shape == (2, 24) and net.arguments["in_chans"] == 1


def test_views_of_another_size():
    """Positions are resampled, from a grid that is not square to one that is."""
    net, x = encoder(), images(shape=(3, 16, 16))
    grid = [4, 4]
    own = net.backbone.pos_embed
    # Interpolated by torch itself: [1, D, rows, columns].
    table = own[:, 1:].reshape(1, 4, 6, 24).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, size=grid, mode="bicubic", antialias=True)
    expected = table.permute(0, 2, 3, 1).flatten(1, 2)[0]
    with torch.no_grad():
        positions, prefix = net._embedding((4, 4))
        torch.testing.assert_close(positions, expected)
        torch.testing.assert_close(prefix, (net.backbone.cls_token + own[:, :1])[0])
        whole = net.tokens(x)
        order = orders(2, 16)
        visible = net.tokens(x, order)
    assert whole.shape == (2, 17, 24)
    torch.testing.assert_close(visible[:, 1:], whole[:, 1:].gather(1, order[..., None].expand(-1, -1, 24)))


def test_timm_resamples_alike():
    net, x = encoder(shape=(3, 16, 16)), images(shape=(3, 24, 24))
    other = timm.create_model(VIT, patch_size=4, img_size=24, num_classes=0, **SIZE).eval()
    state = net.backbone.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [6, 6])
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(net.tokens(x), other.forward_features(x))


# --- visible patches --------------------------------------------------------------------------------------------------


@each_vit
def test_all_patches_in_any_order_are_the_whole_image(kind):
    net, x = encoder(kind), images()
    order = orders(2, patches(net))
    prefix = net.num_prefix_tokens
    with torch.no_grad():
        whole, visible = net.tokens(x), net.tokens(x, order)
        expected = whole[:, prefix:].gather(1, order[..., None].expand(-1, -1, 24))
        torch.testing.assert_close(visible[:, prefix:], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(visible[:, :prefix], whole[:, :prefix], rtol=1e-4, atol=1e-5)


def test_the_patches_in_order_are_the_whole_image():
    net, x = encoder(), images()
    keep = torch.arange(24).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(net.tokens(x, keep), net.tokens(x))


@each_vit
def test_visible_patches_alone_are_embedded(kind):
    """Against timm's own embedding of all patches, gathered before the blocks."""
    net, x = encoder(kind), images()
    vit, keep = net.backbone, orders(2, patches(net), 5)
    with torch.no_grad():
        embedded = vit._pos_embed(vit.patch_embed(x))
        index = torch.cat([torch.arange(net.num_prefix_tokens).expand(2, -1), keep + net.num_prefix_tokens], dim=1)
        y = vit.norm_pre(embedded.gather(1, index[..., None].expand(-1, -1, 24)))
        for block in vit.blocks:
            y = block(y)
        torch.testing.assert_close(net.tokens(x, keep), vit.norm(y), rtol=1e-4, atol=1e-5)


@each_vit
def test_hidden_patches_have_no_influence(kind):
    net, x = encoder(kind), images()
    keep = orders(2, patches(net), 5)
    side = net.patch_size
    rows, columns = net.grid(SHAPE)
    other = x.clone()
    hidden = 0
    for b in range(2):
        for patch in range(rows * columns):
            if patch not in keep[b].tolist():
                top, left = patch // columns * side, patch % columns * side
                other[b, :, top : top + side, left : left + side] = 1e3
                hidden += 1
    assert hidden == 2 * (rows * columns - 5)
    with torch.no_grad():
        assert torch.equal(net.tokens(x, keep), net.tokens(other, keep))
        assert not torch.equal(net.tokens(x), net.tokens(other))


def test_trivial_attention_makes_patches_independent():
    """With attention switched off a token is a function of its patch: masking restricts the sequence, no more."""
    net, x = encoder("mean"), images()
    with torch.no_grad():
        for block in net.backbone.blocks:
            block.attn.proj.weight.zero_()
    keep = orders(2, 24, 7)
    with torch.no_grad():
        whole, visible = net.tokens(x), net.tokens(x, keep)
    torch.testing.assert_close(visible[:, 1:], whole[:, 1:].gather(1, keep[..., None].expand(-1, -1, 24)))


def test_both_paths_of_the_embedding_agree():
    """The gather of pixels, and the convolution that serves embeddings it does not know."""
    net, x, keep = encoder(), images(), orders(2, 24, 5)

    class Other(type(net.backbone.patch_embed)):
        pass

    gradients, tokens = [], []
    for kind in (type(net.backbone.patch_embed), Other):
        net.backbone.patch_embed.__class__ = kind
        net.zero_grad()
        tokens.append(net.tokens(x, keep))
        tokens[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(tokens[0], tokens[1])
    assert len(gradients[0]) == len(gradients[1]) == len(list(net.parameters()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# --- positions --------------------------------------------------------------------------------------------------------


def test_fixed_positions():
    net = Encoder(VIT, {**SIZE, "patch_size": 4}, SHAPE, positions="sincos")
    table = net.backbone.pos_embed
    assert not table.requires_grad and not table[0, 0].any()
    assert torch.equal(table[0, 1:], sincos_positions(24, (4, 6)))
    no_class = Encoder(VIT, {**SIZE, "patch_size": 4, "no_embed_class": True}, SHAPE, positions="sincos")
    assert torch.equal(no_class.backbone.pos_embed[0], sincos_positions(24, (4, 6)))
    with pytest.raises(UserError, match="positions=sincos needs a width divisible by 4, and .* has 26"):
        Encoder(VIT, {**SIZE, "embed_dim": 26, "patch_size": 4}, SHAPE, positions="sincos")


def test_freezing_the_patches():
    net = encoder()
    net.freeze_patch_embed()
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    # MoCo v3's start: uniform within sqrt(6 / (fan in + fan out)).
    weight = net.backbone.patch_embed.proj.weight
    limit = math.sqrt(6 / (weight[0].numel() + len(weight)))
    assert 0.95 * limit < weight.abs().max() <= limit
    assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert not net.backbone.patch_embed.proj.bias.any()
    # Pretrained weights stay.
    loaded = encoder()
    loaded.pretrained, before = True, loaded.backbone.patch_embed.proj.weight.clone()
    loaded.freeze_patch_embed()
    assert torch.equal(loaded.backbone.patch_embed.proj.weight, before) and not encoder().pretrained


# --- other backbones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("resnet18", {}),
        # Its features are wider than its last stage.
        ("mobilenetv3_small_050", {}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}),
        # Relatives of the vision transformer, with tokens or an embedding of their own.
        ("deit_tiny_distilled_patch16_224", {**SIZE, "patch_size": 8}),
        ("vit_small_r26_s32_224", SIZE),
        (VIT, {**SIZE, "patch_size": 8, "pos_embed": "none"}),
    ],
)
def test_backbones_that_cannot_be_masked(name, arguments):
    net = Encoder(name, arguments, (3, 32, 32), "mean").eval()
    x = images(shape=(3, 32, 32))
    with torch.no_grad():
        tokens, features = net(x)
        assert tokens is None and features.shape == (2, net.width)
        assert torch.equal(features, net.backbone(x))
    assert not net.is_vit and net.grid((3, 32, 32)) is None
    with pytest.raises(UserError, match=f"masking needs a vision transformer, and '{name}' is none: use masker=none"):
        net(x, orders(2, 4))
    for refused in (net.freeze_patch_embed, lambda: Encoder(name, arguments, (3, 32, 32), "mean", "sincos")):
        with pytest.raises(UserError, match=f"needs a vision transformer, and '{name}' is none"):
            refused()


@pytest.mark.parametrize("name, arguments", [(VIT, {**SIZE, "patch_size": 4}), ("resnet18", {})])
def test_name_and_arguments_rebuild_the_backbone(name, arguments):
    net = Encoder(name, arguments, SHAPE).eval()
    again = timm.create_model(net.name, **net.arguments).eval()
    again.load_state_dict(net.backbone.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images()), net.backbone(images()))


def test_where_its_first_weights_came_from_is_not_what_rebuilds_it(tmp_path):
    arguments = {**SIZE, "patch_size": 4}
    torch.save(Encoder(VIT, arguments, SHAPE).backbone.state_dict(), tmp_path / "first.pt")
    net = Encoder(VIT, {**arguments, "checkpoint_path": str(tmp_path / "first.pt")}, SHAPE)
    assert net.pretrained and net.arguments == Encoder(VIT, arguments, SHAPE).arguments


def test_feature_maps():
    for net, width in ((encoder(), 24), (Encoder("resnet18", {}, (3, 64, 64)).eval(), None)):
        x = images(shape=SHAPE if net.is_vit else (3, 64, 64))
        with torch.no_grad():
            maps = net.feature_maps(x, [0, 1])
        assert len(maps) == 2 and all(m.ndim == 4 and len(m) == 2 for m in maps)
        if width:
            assert all(m.shape[1:] == (24, 4, 6) for m in maps)


def test_a_view_that_the_backbone_cannot_read():
    encoder = Encoder("convnext_atto", {}, (3, 32, 32))
    encoder.check((3, 32, 32))
    assert encoder.backbone.training
    with pytest.raises(UserError, match=r"cannot read a view of 16 x 16 pixels \(.*\): choose larger views"):
        encoder.check((3, 16, 16))
    vit = Encoder("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24}, (3, 16, 16))
    # What divides this view and the other one, into 2 x 2 patches at least.
    with pytest.raises(UserError, match="cannot be cut into patches of 16: use backbone_args.patch_size=4, or change"):
        vit.check((3, 8, 8))


@pytest.mark.parametrize(
    "name, arguments, shape, message",
    [
        (
            "vit_tinny_patch16_224",
            {},
            SHAPE,
            "no backbone 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'",
        ),
        (
            VIT,
            {"patch_size": 5},
            SHAPE,
            "a view of 16 x 24 pixels cannot be cut into patches of 5: use backbone_args.patch_size=4, or change",
        ),
        (VIT, {}, SHAPE, "a view of 16 x 24 pixels cannot be cut into patches of 16"),
        (VIT, {**SIZE, "num_heads": 5}, SHAPE, "timm could not build .*divisible"),
        (VIT, {"depht": 2}, SHAPE, "timm could not build .*depht"),
        (VIT, {**SIZE, "patch_size": 4, "class_token": False, "global_pool": "avg"}, SHAPE, "pool=cls needs a class"),
    ],
)
def test_mistakes(name, arguments, shape, message):
    with pytest.raises(UserError, match=message):
        Encoder(name, arguments, shape)

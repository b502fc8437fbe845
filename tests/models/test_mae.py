"""The masked autoencoder against one written out on plain torch functions; its checkpoints, start, and economy."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

from ssl_ib import Batch, Masks, Model, Progress, RunInfo, UserError, ops
from ssl_ib.config.config import resolve
from ssl_ib.criterions.mae import MAE as Criterion
from ssl_ib.models import official
from ssl_ib.models.mae import MAE
from ssl_ib.run import build_run

PATCH, WIDTH, HEADS, DECODER_WIDTH, DECODER_HEADS = 4, 24, 2, 16, 4
SHAPES = [(3, 16, 16), (3, 8, 16)]
SHAPE, L, KEPT = SHAPES[0], 16, 5
BACKBONE = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}
PROGRESS = Progress(0, 0, 10, 1)


def mae(shape=SHAPE, seed=0, views=1, masks=(1, KEPT), **arguments):
    torch.manual_seed(seed)
    settings = {"decoder_dim": DECODER_WIDTH, "decoder_depth": 1, "decoder_heads": DECODER_HEADS, **arguments}
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": BACKBONE, **settings}
    return MAE(RunInfo((shape,) * views, batch_size=4, masks=lambda grid: masks), **settings)


def batch(masks=1, size=3, shape=SHAPE, views=1, kept=KEPT):
    """Views with `masks` masks an image each (0: None)."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(size, *shape, generator=generator) for _ in range(views)]
    patches = shape[1] * shape[2] // PATCH**2
    drawn = [Masks.from_noise(torch.rand(size, masks, patches, generator=generator), kept) for _ in range(views)]
    index = torch.arange(size)
    return Batch(images, drawn if masks else [None] * views, index, -torch.ones_like(index))


# --- the official model, in its own names -----------------------------------------------------------------------------


def official_positions(width, shape):
    """[1, 1 + L, width]: a zero row for the class token; first the column, then the row; sines before cosines."""
    table = [[0.0] * width]
    for place in ((column, row) for row in range(shape[1] // PATCH) for column in range(shape[2] // PATCH)):
        angles = [[x / 10000 ** (i / (width / 4)) for i in range(width // 4)] for x in place]
        table.append([f(a) for half in angles for f in (math.sin, math.cos) for a in half])
    return torch.tensor([table])


def official_state(shape=SHAPE, depth=2, decoder_depth=1):
    """Random weights under the official names."""
    generator = torch.Generator().manual_seed(7)
    state = {}

    def draw(*size, scale=0.2, mean=0.0):
        return mean + scale * torch.randn(*size, generator=generator)

    def linear(name, inputs, outputs):
        state[f"{name}.weight"] = draw(outputs, inputs, scale=inputs**-0.5)
        state[f"{name}.bias"] = draw(outputs)

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(width, mean=1.0), draw(width)

    def blocks(name, count, width):
        for block in (f"{name}.{i}" for i in range(count)):
            norm(f"{block}.norm1", width)
            linear(f"{block}.attn.qkv", width, 3 * width)
            linear(f"{block}.attn.proj", width, width)
            norm(f"{block}.norm2", width)
            linear(f"{block}.mlp.fc1", width, 4 * width)
            linear(f"{block}.mlp.fc2", 4 * width, width)

    state["cls_token"], state["pos_embed"] = draw(1, 1, WIDTH), official_positions(WIDTH, shape)
    linear("patch_embed.proj", 3 * PATCH**2, WIDTH)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].reshape(WIDTH, 3, PATCH, PATCH)
    blocks("blocks", depth, WIDTH)
    norm("norm", WIDTH)
    linear("decoder_embed", WIDTH, DECODER_WIDTH)
    state["mask_token"] = draw(1, 1, DECODER_WIDTH)
    state["decoder_pos_embed"] = official_positions(DECODER_WIDTH, shape)
    blocks("decoder_blocks", decoder_depth, DECODER_WIDTH)
    norm("decoder_norm", DECODER_WIDTH)
    linear("decoder_pred", DECODER_WIDTH, 3 * PATCH**2)
    return state


def official_blocks(state, name, x, heads):
    def norm(at, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{at}.weight"], state[f"{at}.bias"], 1e-6)

    def linear(at, x):
        return F.linear(x, state[f"{at}.weight"], state[f"{at}.bias"])

    for number in sorted({int(key.split(".")[1]) for key in state if key.startswith(f"{name}.")}):
        at = f"{name}.{number}"
        rows, length, width = x.shape
        q, k, v = linear(f"{at}.attn.qkv", norm(f"{at}.norm1", x)).reshape(rows, length, 3, heads, -1).unbind(2)
        weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(width // heads)).softmax(dim=-1)
        mixed = torch.einsum("bhlm,bmhd->blhd", weights, v).reshape(rows, length, width)
        x = x + linear(f"{at}.attn.proj", mixed)
        x = x + linear(f"{at}.mlp.fc2", F.gelu(linear(f"{at}.mlp.fc1", norm(f"{at}.norm2", x))))
    last = "norm" if name == "blocks" else "decoder_norm"
    return norm(last, x)


def official_mae(state, images, noise, kept, norm_pix):
    """The published forward: images [B, 3, H, W], noise [B, L] -> loss, prediction [B, L, p*p*3], mask [B, L]."""
    rows, patches = noise.shape

    def take(x, order):
        return torch.gather(x, 1, order[..., None].expand(-1, -1, x.shape[-1]))

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    mask = torch.ones(rows, patches)
    mask[:, :kept] = 0
    mask = mask.gather(1, restore)
    class_token = (state["cls_token"] + state["pos_embed"][:, :1]).expand(rows, -1, -1)
    x = official_blocks(state, "blocks", torch.cat([class_token, take(x, shuffle[:, :kept])], dim=1), HEADS)

    x = F.linear(x, state["decoder_embed.weight"], state["decoder_embed.bias"])
    hidden = state["mask_token"].expand(rows, patches - kept, -1)
    x = torch.cat([x[:, :1], take(torch.cat([x[:, 1:], hidden], dim=1), restore)], dim=1)
    x = official_blocks(state, "decoder_blocks", x + state["decoder_pos_embed"], DECODER_HEADS)
    pred = F.linear(x, state["decoder_pred.weight"], state["decoder_pred.bias"])[:, 1:]

    high, wide = images.shape[2] // PATCH, images.shape[3] // PATCH
    target = images.reshape(rows, 3, high, PATCH, wide, PATCH)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(rows, patches, -1)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = (pred - target).square().mean(-1)
    return (error * mask).sum() / mask.sum(), pred, mask


@pytest.fixture(params=["state dict", "model and args", "bare file"])
def loaded(request, tmp_path):
    """Gives the model of a view shape with `official_state` in it, in each way it can come."""

    def load(shape):
        net, state = mae(shape).eval(), official_state(shape)
        if request.param == "state dict":
            official.load_state_dict(net, state)
            return net
        args = argparse.Namespace(mask_ratio=0.75, model="mae_vit_base_patch16", output_dir=None)
        torch.save({"model": state, "args": args} if request.param == "model and args" else state, tmp_path / "w.pth")
        official.load(net, str(tmp_path / "w.pth"))
        return net

    return load


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm_pix", [True, False])
def test_it_is_the_official_mae(loaded, shape, norm_pix):
    """One noise, the same masks, predictions of all patches, and loss."""
    generator = torch.Generator().manual_seed(3)
    patches = shape[1] * shape[2] // PATCH**2
    images, noise = torch.randn(4, *shape, generator=generator), torch.rand(4, patches, generator=generator)
    kept = patches // 4
    loss, pred, mask = official_mae(official_state(shape), images, noise, kept, norm_pix)
    masks = Masks.from_noise(noise, kept)
    b = Batch([images], [masks], torch.arange(4), -torch.ones(4))
    with torch.no_grad():
        outputs = loaded(shape)(b)
        ours = Criterion(RunInfo((shape,), batch_size=4), norm_pix)(outputs, b, PROGRESS)
    assert torch.equal(masks.mask[:, 0].float(), mask)
    torch.testing.assert_close(outputs["reconstruction"][0], pred, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.total, loss, rtol=1e-6, atol=0)


def test_masks_from_noise():
    noise = torch.tensor([[0.4, 0.2, 0.3, 0.1], [0.7, 0.9, 0.8, 0.0]])
    masks = Masks.from_noise(noise, 2)
    assert masks.keep.tolist() == [[[1, 3]], [[0, 3]]]
    assert masks.mask.tolist() == [[[True, False, True, False]], [[False, True, True, False]]]
    several = Masks.from_noise(torch.stack([noise, 1 - noise], dim=1), 2)
    assert several.keep.tolist() == [[[1, 3], [0, 2]], [[0, 3], [1, 2]]]
    # Every mask of an image that has several is its own.
    assert torch.equal(several.mask[:, :1], masks.mask) and torch.equal(several.mask[:, 1:], ~masks.mask)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def without_decoder(state):
    return {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))}


def test_a_file_without_a_decoder_leaves_ours_as_it_starts(tmp_path):
    torch.save({"model": without_decoder(official_state())}, tmp_path / "w.pth")
    net, fresh = mae(checkpoint=str(tmp_path / "w.pth")), mae()
    torch.testing.assert_close(net.backbone.state_dict(), without_decoder(official_state()), rtol=0, atol=0)
    torch.testing.assert_close(net.decoder.state_dict(), fresh.decoder.state_dict(), rtol=0, atol=0)


def test_a_head_is_left_out():
    head = {"head.weight": torch.ones(10, WIDTH), "head.bias": torch.ones(10), "fc_norm.weight": torch.ones(WIDTH)}
    net, given = mae(), without_decoder(official_state()) | head
    official.load_state_dict(net, given)
    torch.testing.assert_close(net.backbone.state_dict(), without_decoder(official_state()), rtol=0, atol=0)
    # The caller's dictionary stays whole.
    assert given.keys() == (without_decoder(official_state()) | head).keys()


def test_a_checkpoint_in_a_recipe(tmp_path):
    """It survives the configuration and its copy in the run's folder, and is what the encoder starts from."""
    torch.save({"model": official_state()}, tmp_path / "w.pth")
    sizes = f"{{name: mae, backbone: vit_tiny_patch16_224, backbone_args: {BACKBONE}, decoder_dim: {DECODER_WIDTH}, "
    sizes += f"decoder_depth: 1, decoder_heads: {DECODER_HEADS}}}"
    overrides = [f"model={sizes}", f"model.checkpoint={tmp_path / 'w.pth'}", "criterion=mae"]
    config = resolve("mi_mae_digits", overrides)
    assert config.model["checkpoint"] == str(tmp_path / "w.pth")
    (tmp_path / "config.yaml").write_text(config.yaml())
    again = resolve(str(tmp_path / "config.yaml"))
    assert again.model == config.model
    net = build_run(again, dry=True).model
    torch.testing.assert_close(net.backbone.state_dict(), without_decoder(official_state()), rtol=0, atol=0)
    (tmp_path / "w.pth").unlink()
    with pytest.raises(UserError, match="model: checkpoint: there is no file .*w.pth"):
        build_run(again, dry=True)


def wider(state, key):
    return state | {key: torch.zeros(*state[key].shape[:-1], state[key].shape[-1] + 4)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, "norm.bias"),
        (lambda s: s | {"blocks.2.norm1.weight": torch.ones(WIDTH)}, r"blocks\.2\.norm1\.weight"),
        (lambda s: wider(s, "pos_embed"), "size mismatch for pos_embed"),
        (lambda s: wider(s, "decoder_pred.weight"), "size mismatch for predict.weight"),
        (lambda s: wider(s, "mask_token"), "size mismatch for mask_token"),
        (lambda s: {k: v for k, v in s.items() if k != "decoder_norm.weight"}, "norm.weight"),
        (lambda s: wider(s, "decoder_pos_embed"), "positions are not those of the model's grid"),
        (lambda s: s | {"decoder_pos_embed": s["decoder_pos_embed"].flip(1)}, "positions are not those"),
    ],
)
def test_weights_that_do_not_fit(change, message, tmp_path):
    torch.save({"model": change(official_state())}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"(?s)w\.pth.*{message}"):
        mae(checkpoint=str(tmp_path / "w.pth"))


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match="there is no file"):
            mae(checkpoint=str(path))


# An empty file's exception has no message.
@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 no archive", b"\x80\x02.", b"\x80\x02}u."])
def test_a_file_that_is_no_checkpoint(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth' cannot be read: \S"):
        mae(checkpoint=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model": 3}, {"epoch": 4}, {"model": {0: torch.ones(2)}}])
def test_a_file_of_something_else(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="expected a state dict, or one under 'model'"):
        mae(checkpoint=str(tmp_path / "w.pth"))


# --- where it starts --------------------------------------------------------------------------------------------------


def test_the_official_start():
    net = mae(backbone_args=BACKBONE | {"embed_dim": 64}, decoder_dim=64)
    linears = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 2 * 4 + 4 + 2  # encoder, decoder, and the decoder's first and last
    matrices = [m.weight for m in linears] + [net.backbone.patch_embed.proj.weight.flatten(1)]
    for matrix in matrices:
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.97 * bound < matrix.abs().max() <= bound
        # Uniform between the bounds.
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not any(m.bias.any() for m in linears)
    for token in (net.backbone.cls_token, net.decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.3)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 2 + 2 + 2
    assert all((m.weight == 1).all() and not m.bias.any() and m.eps == 1e-6 for m in norms)


def test_positions_are_fixed():
    net = mae()
    torch.testing.assert_close(net.backbone.pos_embed.data, official_positions(WIDTH, SHAPE))
    torch.testing.assert_close(net.decoder.positions[None], official_positions(DECODER_WIDTH, SHAPE))
    assert not net.backbone.pos_embed.requires_grad
    trained = {name for group in net.param_groups() for name, _ in group.params}
    assert trained == {name for name, _ in net.named_parameters()} - {"encoder.backbone.pos_embed"}


def test_the_default_sizes():
    """MAE's ViT-B: 85.8M of an encoder and 26.0M of a decoder, its positions no parameters here."""
    with torch.device("meta"):
        net = MAE(RunInfo(((3, 224, 224),), batch_size=4))
    millions = [round(sum(p.numel() for p in part.parameters()) / 1e6, 1) for part in (net.encoder, net.decoder)]
    assert millions == [85.8, 26.0]


# --- what it gives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [0, 1, 3])
@pytest.mark.parametrize("views", [1, 2])
def test_shapes(masks, views):
    net = mae(views=views)
    outputs = net(batch(masks, views=views))
    rows, kept = 3 * max(masks, 1), KEPT if masks else L
    assert isinstance(net, Model) and set(outputs) == net.provides == net.wanted == set(net.widths)
    for name, shape in {
        "tokens": (rows, 1 + kept, WIDTH),
        "visible": (rows, kept, WIDTH),
        "latents": (3, max(masks, 1), WIDTH),
        "reconstruction": (rows, L, 3 * PATCH**2),
    }.items():
        assert [x.shape for x in outputs[name]] == [shape] * views
        assert net.widths[name] == shape[-1]


def test_views_do_not_meet():
    net, both = mae(views=2).eval(), batch(2, views=2)
    outputs = net(both)
    for v in range(2):
        alone = net(Batch([both.views[v]], [both.masks[v]], both.index, both.label))
        for name in net.provides:
            torch.testing.assert_close(outputs[name][v], alone[name][0], rtol=0, atol=0)


def test_two_masks_are_two_batches_of_one():
    net, b = mae().eval(), batch(2)
    both = net(b)
    for n in range(2):
        one = Masks.from_keep(b.masks[0].keep[:, n], L)
        alone = net(Batch(b.views, [one], b.index, b.label))
        for name in ("tokens", "visible", "reconstruction"):
            torch.testing.assert_close(both[name][0].unflatten(0, (3, 2))[:, n], alone[name][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both["latents"][0][:, n], alone["latents"][0][:, 0], rtol=1e-5, atol=1e-6)


def test_several_masks_share_the_work(monkeypatch):
    calls = []

    def watched(name, op):
        def call(x, keep, *rest, **more):
            calls.append((name, tuple(x.shape), tuple(keep.shape)))
            return op(x, keep, *rest, **more)

        return call

    for name in ("patch_embed_gather", "token_scatter"):
        monkeypatch.setattr(ops, name, watched(name, getattr(ops, name)))
    net = mae()
    net.encoder.backbone.patch_embed.register_forward_hook(lambda *_: pytest.fail("hidden patches were embedded"))
    with ops.record() as ran:
        net(batch(3))
    assert calls == [
        ("patch_embed_gather", (3, *SHAPE), (3, 3 * KEPT)),
        ("token_scatter", (9, 1 + KEPT, DECODER_WIDTH), (9, KEPT)),
    ]
    assert {name for name, _ in ran} == {"patch_embed_gather", "token_scatter"}


def test_no_masks_is_every_patch_shown():
    net, b = mae().eval(), batch(0)
    everything = Masks.from_keep(torch.arange(L).expand(3, L), L)
    unmasked, shown = net(b), net(Batch(b.views, [everything], b.index, b.label))
    for name in net.provides:
        torch.testing.assert_close(unmasked[name], shown[name], rtol=1e-5, atol=1e-6)


def test_hidden_pixels_have_no_influence():
    net, b = mae().eval(), batch(2)
    mask = b.masks[0].mask.unflatten(2, (4, 4)).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    before = net(b)
    for n in range(2):
        other = torch.where(mask[:, n, None], torch.full_like(b.views[0], 9.0), b.views[0])
        after = net(Batch([other], b.masks, b.index, b.label))
        for name in net.provides:
            old, new = (x[name][0].reshape(3, 2, -1) for x in (before, after))
            assert torch.equal(old[:, n], new[:, n]), name
            # The other mask shows patches that this one hides.
            assert (old[:, 1 - n] != new[:, 1 - n]).any(dim=1).all(), name


@pytest.mark.parametrize("registers", [False, True])
def test_what_stands_for_a_mask(registers):
    more = {"backbone": "vit_small_patch14_reg4_dinov2"} if registers else {}
    for z in ("cls", "mean", "flat"):
        net, b = mae(masks=(2, KEPT), z=z, **more).eval(), batch(2)
        outputs = net(b)
        tokens, latents = outputs["tokens"][0].unflatten(0, (3, 2)), outputs["latents"][0]
        prefix = tokens.shape[2] - KEPT
        assert prefix == (5 if registers else 1) and latents.shape == (3, 2, net.widths["latents"])
        expected = {
            "cls": tokens[:, :, 0],
            "mean": sum(tokens[:, :, prefix + k] for k in range(KEPT)) / KEPT,
            "flat": torch.cat([tokens[:, :, prefix + k] for k in range(KEPT)], dim=-1),
        }
        torch.testing.assert_close(latents, expected[z])


def test_flat_latents_without_a_masker_are_of_all_patches():
    net = mae(masks=None, z="flat")
    assert net(batch(0))["latents"][0].shape == (3, 1, net.widths["latents"]) == (3, 1, L * WIDTH)


def test_the_visible_patches_are_those_that_enter_the_first_block():
    net, b, seen = mae().eval(), batch(2), []
    net.backbone.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    visible = net(b)["visible"][0]
    assert torch.equal(seen[0][:, 1:], visible) and len(seen) == 1


def test_what_is_evaluated():
    images = torch.randn(2, *SHAPE)
    for pool in ("cls", "mean"):
        net = mae(pool=pool).eval()
        tokens = net.backbone.forward_features(images)
        expected = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
        torch.testing.assert_close(net.encode(images), expected)


# --- what is not asked for --------------------------------------------------------------------------------------------


def test_the_decoder_rests_where_nothing_is_reconstructed():
    net = mae()
    net.select({"latents", "visible"})
    hook = net.decoder.register_forward_hook(lambda *_: pytest.fail("the decoder was run"))
    outputs = net(batch(2))
    assert set(outputs) == {"tokens", "latents", "visible"}
    assert not any("decoder" in name for group in net.param_groups() for name, _ in group.params)
    outputs["latents"][0].square().sum().backward()
    assert all(p.grad is None for p in net.decoder.parameters())
    # Asked for again, it is trained again.
    hook.remove()
    net.select({"reconstruction"})
    net(batch(2))["reconstruction"][0].square().sum().backward()
    assert all(p.grad is not None for p in net.decoder.parameters())


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"])
def test_a_backbone_that_is_no_plain_vision_transformer(name):
    with pytest.raises(UserError, match=f"needs a plain vision transformer of timm's, and '{name}' is none"):
        mae((3, 32, 32), backbone=name, backbone_args={})


def test_a_backbone_without_a_class_token():
    bare = BACKBONE | {"class_token": False, "global_pool": "avg", "fc_norm": False}
    with pytest.raises(UserError, match="z=cls needs a class token, .* use z=mean"):
        mae(backbone_args=bare, pool="mean")
    net = mae(backbone_args=bare, pool="mean", z="mean")
    assert net(batch(2))["latents"][0].shape == (3, 2, WIDTH)


def test_views_of_two_sizes():
    with pytest.raises(UserError, match="model 'mae' reconstructs views of one shape"):
        MAE(RunInfo(tuple(SHAPES), batch_size=4), "vit_tiny_patch16_224", BACKBONE)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_graph_and_the_same_outputs():
    net, b = mae().eval(), batch(2)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(net)(b)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    eager, compiled = net(b), torch.compile(net)(b)
    for name, values in eager.items():
        torch.testing.assert_close(values, compiled[name], rtol=1e-4, atol=1e-5)

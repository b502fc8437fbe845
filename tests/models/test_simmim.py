"""SimMIM on Swin and on the plain vision transformer: where mask tokens go, how pixels come out, what is shared."""

import pytest
import timm
import torch

from ssl_ib import Batch, Masks, Progress, RunInfo, UserError
from ssl_ib.config.config import resolve
from ssl_ib.config.registry import build_part, check_part
from ssl_ib.maskers.orthogonal import OrthogonalMasker
from ssl_ib.models.simmim import SimMIM
from ssl_ib.part import Step
from ssl_ib.random import image_keys
from ssl_ib.run import build_run

#: Views that are not square, of 2 x 4 mask units; B images.
SHAPE, UNIT, UNITS, B = (3, 16, 32), 8, 8, 3
ROWS, COLUMNS = 2, 4
SWIN = {"patch_size": 2, "embed_dim": 12, "depths": [1, 2], "num_heads": [2, 2]}
SWIN |= {"window_size": 4, "drop_path_rate": 0.0}
VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
#: Name, arguments, patch size, width of an embedded patch, total stride; the final map is 24 wide in both.
KINDS = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 2, 12, 4),
    "vit": ("vit_tiny_patch16_224", VIT, 4, 24, 4),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def simmim(kind="swin", seed=0, views=(SHAPE,), **arguments):
    """A model in evaluation mode none of whose parameters is 0 or 1."""
    torch.manual_seed(seed)
    name, backbone_args, *_ = KINDS[kind]
    settings = {"backbone": name, "backbone_args": backbone_args, "mask_unit": UNIT, **arguments}
    net = SimMIM(RunInfo(views, batch_size=B), **settings).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def batch(masks=2, views=1, shape=SHAPE):
    """Views with complementary masks: two an image, the first of them alone, or (0) none."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(B, *shape, generator=generator) for _ in range(views)]
    index = torch.arange(B)
    grid = (shape[1] // UNIT, shape[2] // UNIT)
    drawn = [OrthogonalMasker(0.5, 2)(image_keys(0, 0, index, v), grid) for v in range(views)]
    drawn = [Masks(m.keep[:, :masks], m.mask[:, :masks]) if masks else None for m in drawn]
    return Batch(images, drawn, index, -torch.ones_like(index))


def unit_of(y, x):
    """Number of the mask unit that holds a pixel."""
    return (y // UNIT) * COLUMNS + x // UNIT


def pixels_of(unit):
    """Where a mask unit lies in a view: slices of rows and columns."""
    top, left = UNIT * (unit // COLUMNS), UNIT * (unit % COLUMNS)
    return slice(top, top + UNIT), slice(left, left + UNIT)


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# --- outputs ----------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("masks, views", [(0, 1), (1, 1), (2, 2)])
def test_shapes(kind, masks, views):
    patch, embedded, stride = KINDS[kind][2:]
    net = simmim(kind, views=(SHAPE,) * views)
    outputs = net(batch(masks, views))
    rows, patches = B * max(masks, 1), UNITS * (UNIT // patch) ** 2
    assert net.grid(SHAPE) == (ROWS, COLUMNS) and set(outputs) == net.provides
    for name, shape in {
        "tokens": (rows, 16 * 32 // stride**2, 24),
        "visible": (rows, patches // 2 if masks else patches, embedded),
        "latents": (B, max(masks, 1), 24),
        "reconstruction": (rows, UNITS, UNIT * UNIT * 3),
    }.items():
        assert [x.shape for x in outputs[name]] == [shape] * views
        assert net.widths[name] == shape[-1]


@each_kind
def test_with_nothing_hidden_it_is_timms(kind):
    net, b = simmim(kind), batch(masks=0)
    everything = Masks.from_keep(torch.arange(UNITS).expand(B, -1), UNITS)
    whole = Batch(b.views, [everything], b.index, b.label)
    with torch.no_grad():
        expected = net.backbone.forward_features(b.views[0])
        expected = expected.flatten(1, 2) if kind == "swin" else expected[:, 1:]
        plain, shown = net(b), net(whole)
        close(plain["tokens"][0], expected)
        close(net.encode(b.views[0]), plain["latents"][0][:, 0])
        # What is visible comes unit by unit, so that it is another order of the same.
        for name in ("tokens", "latents", "reconstruction"):
            close(shown[name][0], plain[name][0])


@each_kind
def test_two_masks_are_two_runs_of_one(kind):
    net, b = simmim(kind), batch()
    with torch.no_grad():
        both = net(b)
        for n in range(2):
            one = Masks(b.masks[0].keep[:, n : n + 1], b.masks[0].mask[:, n : n + 1])
            alone = net(Batch(b.views, [one], b.index, b.label))
            close(both["latents"][0][:, n : n + 1], alone["latents"][0])
            for name in ("tokens", "visible", "reconstruction"):
                close(both[name][0][n::2], alone[name][0])


def test_views_do_not_meet():
    net, b = simmim(views=(SHAPE, SHAPE)), batch(views=2)
    with torch.no_grad():
        outputs = net(b)
        for v in range(2):
            alone = net(Batch([b.views[v]], [b.masks[v]], b.index, b.label))
            for name, (value,) in alone.items():
                close(outputs[name][v], value)


def test_what_stands_for_a_mask():
    b = batch()
    with torch.no_grad():
        for z in ("mean", "cls"):
            net, last = simmim("vit", z=z), []
            net.backbone.norm.register_forward_hook(lambda module, given, out, last=last: last.append(out))
            latents = net(b)["latents"][0].flatten(0, 1)
            close(latents, last[0][:, 0] if z == "cls" else last[0][:, 1:].mean(dim=1))


# --- mask tokens ------------------------------------------------------------------------------------------------------


@each_kind
def test_what_enters_the_first_block(kind):
    """Patch by patch: its embedding, or the mask token; a vision transformer's positions come on top of either."""
    patch = KINDS[kind][2]
    net, b = simmim(kind), batch()
    entered = []
    first = net.backbone.layers if kind == "swin" else net.backbone.blocks[0]
    first.register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    with torch.no_grad():
        visible = net(b)["visible"][0]
        embedded = net.backbone.patch_embed(b.views[0]).reshape(B, 16 // patch, 32 // patch, -1)
    x = entered[0]
    if kind == "vit":
        table = net.backbone.pos_embed[0]
        assert torch.equal(x[:, 0], (net.backbone.cls_token[0, 0] + table[0]).expand(2 * B, -1))
        x = (x[:, 1:] - table[1:]).reshape(2 * B, 16 // patch, 32 // patch, -1)
    for image in range(B):
        for n in range(2):
            shown = {unit: [] for unit in b.masks[0].keep[image, n].tolist()}
            for i in range(16 // patch):
                for j in range(32 // patch):
                    unit = unit_of(patch * i, patch * j)
                    assert b.masks[0].mask[image, n, unit] == (unit not in shown)
                    expected = embedded[image, i, j] if unit in shown else net.mask_token
                    torch.testing.assert_close(x[2 * image + n, i, j], expected, rtol=1e-6, atol=1e-6)
                    shown.get(unit, []).append(embedded[image, i, j])
            assert torch.equal(visible[2 * image + n], torch.stack(sum(shown.values(), [])))


@each_kind
def test_a_mask_sees_its_visible_pixels_alone(kind):
    net, b = simmim(kind), batch()
    with torch.no_grad():
        before = net(b)
        for n in range(2):
            changed = b.views[0].clone()
            for image in range(B):
                unit = b.masks[0].keep[image, n, -1].item()
                rows, columns = pixels_of(unit)
                changed[image, :, rows, columns] += 1
                # The masks are complementary: what one shows, the other hides.
                assert b.masks[0].mask[image, 1 - n, unit] and not b.masks[0].mask[image, n, unit]
            after = net(Batch([changed], b.masks, b.index, b.label))
            for name in ("tokens", "visible", "reconstruction"):
                seeing, blind = (after[name][0][m::2] != before[name][0][m::2] for m in (n, 1 - n))
                assert seeing.flatten(1).any(dim=1).all() and not blind.any()


# --- the head ---------------------------------------------------------------------------------------------------------


def test_pixels_come_out_where_they_belong():
    """Each position of the final map gives a square of 4 x 4 pixels; channel 16 c + 4 y + x of the convolution is
    channel c of the square's pixel (y, x), as in the published head."""
    net, stride = simmim(), 4
    with torch.no_grad():
        convolution = net.decoder[0]
        assert convolution.weight.shape == (stride**2 * 3, 24, 1, 1)
        convolution.weight.zero_()
        convolution.weight[:, 0] = 1000
        convolution.bias.copy_(torch.arange(stride**2 * 3))
        # A final map that holds its positions' numbers.
        numbers = torch.arange(4 * 8.0)[None, :, None].expand(B, -1, 24)
        net._encoded = lambda x, size: (x[:, :0], numbers)
        patches = net(batch(masks=0))["reconstruction"][0]
    for y in range(16):
        for x in range(32):
            for c in range(3):
                number = (y // stride) * 8 + x // stride
                value = 1000 * number + 16 * c + 4 * (y % stride) + x % stride
                place = ((y % UNIT) * UNIT + x % UNIT) * 3 + c
                assert patches[0, unit_of(y, x), place].item() == value


def test_the_names_of_the_published_weights():
    state = simmim().state_dict()
    assert {name: tuple(value.shape) for name, value in state.items() if not name.startswith("encoder.")} == {
        "mask_token": (12,),
        "decoder.0.weight": (48, 24, 1, 1),
        "decoder.0.bias": (48,),
    }


def test_the_mask_token_starts_small():
    torch.manual_seed(0)
    net = SimMIM(RunInfo(((3, 32, 32),), batch_size=1), "vit_tiny_patch16_224", {"embed_dim": 768, "depth": 1})
    assert 0.018 < net.mask_token.std() < 0.022 and net.mask_unit == 32


@each_kind
def test_the_head_rests_where_nothing_is_reconstructed(kind):
    net = simmim(kind)
    calls = []
    net.decoder.register_forward_hook(lambda *_: calls.append(1))
    net.select({"latents", "visible"})
    assert "reconstruction" not in net(batch()) and not calls
    names = {name for group in net.param_groups() for name, _ in group.params}
    assert "mask_token" in names and not any(name.startswith("decoder") for name in names)
    net.select({"reconstruction"})
    assert "reconstruction" in net(batch()) and calls and all(p.requires_grad for p in net.decoder.parameters())


@each_kind
def test_absolute_positions_do_not_decay(kind):
    """As in the published code, where Swin's relative position tables do decay."""
    net = simmim(kind)
    rest, *positions = net.param_groups()
    spared = [pair for group in positions for pair in group.params]
    assert {name.rpartition(".")[2] for name, _ in spared} == (set() if kind == "swin" else {"cls_token", "pos_embed"})
    assert rest.weight_decay is None and all(group.weight_decay == 0.0 for group in positions)
    assert sorted(name for name, _ in rest.params + spared) == sorted(name for name, _ in net.named_parameters())


# --- MI-SimMIM --------------------------------------------------------------------------------------------------------


def mi_simmim(kind, xj="token_mlp"):
    """Model and criterion as a run builds them, with `reconstruction: simmim`."""
    net = simmim(kind).train()
    problems = []
    given = {"name": "mi_mae", "reconstruction": "simmim", "gate": "instant", "gate_eps": 100.0, "xj": xj}
    spec = check_part("criterion", given, "criterion", problems)
    assert not problems
    info = RunInfo(
        (SHAPE,), batch_size=B, grid=net.grid, width=net.widths.__getitem__, masks=lambda grid: (2, UNITS // 2)
    )
    return net, build_part("criterion", spec, info=info).part


@each_kind
@pytest.mark.parametrize("xj", ["token_mlp", "pixels"])
def test_a_step_reads_an_image_once_for_both_masks(kind, xj):
    net, criterion = mi_simmim(kind, xj)
    net.select(criterion.requires)
    calls = []
    net.backbone.patch_embed.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    b = batch()
    assert torch.equal(b.masks[0].mask[:, 0], ~b.masks[0].mask[:, 1])
    _, loss = Step(net, criterion)(b, Progress(0, 0, 10, 1))
    assert calls == [B]
    assert {"reconstruction", "max", "min", "approximation"} <= loss.terms.keys()
    loss.total.backward()
    assert loss.total.isfinite()
    missing = {name for name, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not missing


@each_kind
def test_the_information_terms_alone_reach_the_encoder(kind):
    net, criterion = mi_simmim(kind)
    _, loss = Step(net, criterion)(batch(), Progress(0, 0, 10, 1))
    for term in ("max", "min"):
        net.zero_grad()
        loss.terms[term].backward(retain_graph=True)
        assert all(p.grad.any() for p in (net.mask_token, net.backbone.patch_embed.proj.weight))
        assert all(p.grad is None for p in net.decoder.parameters())


# --- recipes and mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, masks, kept", [("simmim_cifar10", 1, 25), ("mi_simmim_cifar10", 2, 32)])
def test_recipes_mask_units(name, masks, kept):
    run = build_run(resolve(name, ["source=digits", "device=cpu"]), dry=True)
    assert run.task.grids == [(8, 8)] and run.model.wanted == run.criterion.requires
    keys = image_keys(0, 0, torch.arange(2), 0)
    assert run.task.masker(keys, (8, 8)).keep.shape == (2, masks, kept)
    assert run.model.stride == run.model.mask_unit == 4


@each_kind
def test_the_backbone_it_leaves_is_timms(kind):
    net = simmim(kind)
    name, arguments = net.export()
    other = timm.create_model(name, **arguments, **({"global_pool": "avg"} if kind == "swin" else {})).eval()
    other.load_state_dict(net.backbone.state_dict())
    images = batch(0).views[0]
    with torch.no_grad():
        assert torch.equal(other.forward_features(images), net.backbone.forward_features(images))
        maps = net.feature_maps(images, [0, 1])
    side = (8, 16) if kind == "swin" else (4, 8)
    assert maps[0].shape[2:] == side and maps[1].shape[1:] == (24, 4, 8)


def swin(**changes):
    return {"backbone_args": {**SWIN, **changes}}


@pytest.mark.parametrize(
    "kind, arguments, shape, message",
    [
        ("swin", {"mask_unit": 5}, SHAPE, "mask_unit=5 is not a multiple of the patch size 2"),
        ("vit", {"mask_unit": 6}, SHAPE, "mask_unit=6 is not a multiple of the patch size 4"),
        ("vit", {}, (3, 12, 32), "a view of 12 x 32 pixels is not a multiple of mask units of 8"),
        ("vit", {}, (3, 18, 32), "a view of 18 x 32 pixels cannot be cut into patches of 4"),
        ("swin", {"mask_unit": 2}, (3, 18, 32), "18 x 32 pixels is not a multiple of the backbone's total stride of 4"),
        ("swin", swin(window_size=3), SHAPE, "windows of 3 x 3 do not tile the 8 x 16 positions of stage 0"),
        ("swin", swin(window_size=[[4, 4], [3, 4]]), SHAPE, "windows of 3 x 4 do not tile the 4 x 8 positions of"),
        ("swin", {"z": "cls"}, SHAPE, "z=cls needs a class token, and 'swin_tiny.*' has none: use z=mean"),
        ("swin", {"pool": "cls"}, SHAPE, "pool=cls needs a class token"),
        (
            "vit",
            {"z": "cls", "backbone_args": {**VIT, "class_token": False, "global_pool": "avg"}},
            SHAPE,
            "z=cls needs a class token",
        ),
        ("vit", {"backbone": "resnet18", "backbone_args": {}}, SHAPE, "'resnet18' is neither"),
        (
            "vit",
            {"backbone": "deit_tiny_distilled_patch16_224", "backbone_args": {}},
            (3, 32, 32),
            "a Swin or a plain vision transformer of timm.s, and 'deit_tiny_distilled_patch16_224' is neither",
        ),
    ],
)
def test_mistakes(kind, arguments, shape, message):
    with pytest.raises(UserError, match=message):
        simmim(kind, views=(shape,), **arguments)


def test_views_of_two_sizes():
    with pytest.raises(UserError, match="views of one shape"):
        simmim(views=(SHAPE, (3, 16, 16)))


@each_kind
def test_one_graph(kind):
    torch._dynamo.reset()
    explained = torch._dynamo.explain(simmim(kind))(batch())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.slow
def test_compiled_is_eager():
    net, b = simmim(), batch()
    torch._dynamo.reset()
    compiled = torch.compile(net)(b)
    for name, values in net(b).items():
        close(compiled[name][0], values[0])

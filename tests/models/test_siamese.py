"""Views through one encoder, its heads and its momentum target."""

import pytest
import torch

from ssl_ib import Batch, Context, Masks, Progress, RunInfo, UserError
from ssl_ib.models.heads import mlp_head
from ssl_ib.models.momentum import MomentumCopy
from ssl_ib.models.siamese import Siamese, encode_views
from ssl_ib.random import image_keys, permutation

SIZE = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SHAPE = (3, 16, 16)
INFO = RunInfo((SHAPE, SHAPE), batch_size=4)
CONTEXT = Context(Progress(0, 0, 10, 1), lambda name, n: None, lambda p: None)


def siamese(info=INFO, seed=0, **arguments):
    torch.manual_seed(seed)
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": SIZE, "projector_hidden": 16, "projector_dim": 8}
    return Siamese(info, **{**settings, "predictor_hidden": 12, **arguments})


def batch(masks=1, kept=6, size=4, views=2, shape=SHAPE):
    """Views with `masks` masks an image each (0: None)."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(size, *shape, generator=generator) for _ in range(views)]
    index = torch.arange(size)
    every = [None] * views
    if masks:
        keys = [[image_keys(0, 0, index, 10 * v + n) for n in range(masks)] for v in range(views)]
        keeps = [torch.stack([permutation(k, 16)[:, :kept] for k in of_view], dim=1) for of_view in keys]
        every = [Masks.from_keep(keep, 16) for keep in keeps]
    return Batch(images, every, index, -torch.ones_like(index))


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks, kept", [(0, 16), (1, 6), (3, 6)])
def test_shapes(masks, kept):
    net = siamese(predictor_layers=2, momentum=0.9)
    outputs = net(batch(masks, kept))
    rows = 4 * max(masks, 1)
    assert set(outputs) == net.provides == {"tokens", "features", "projection", "prediction", "target"}
    for name, shape in {
        "tokens": (rows, 1 + kept, 24),
        "features": (rows, 24),
        "projection": (rows, 8),
        "prediction": (rows, 8),
        "target": (rows, 8),
    }.items():
        assert [x.shape for x in outputs[name]] == [shape, shape]


def test_what_a_model_provides_is_what_it_has():
    assert siamese().provides == {"tokens", "features", "projection"}
    assert siamese(predictor_layers=1).provides == {"tokens", "features", "projection", "prediction"}
    assert siamese(momentum=0.5).provides == {"tokens", "features", "projection", "target"}
    resnet = siamese(backbone="resnet18", backbone_args={})
    assert resnet.provides == {"features", "projection"} and resnet.grid(SHAPE) is None
    assert set(resnet(batch(0))) == resnet.provides


def test_views_are_what_each_alone_would_give():
    """Rows of the encoder; the heads see one view at a time, as their batch norms should."""
    net = siamese(predictor_layers=2)
    b = batch(masks=2)
    outputs = net(b)
    for v in range(2):
        x = b.views[v].repeat_interleave(2, dim=0)
        tokens, features = net.encoder(x, b.masks[v].keep.flatten(0, 1))
        torch.testing.assert_close(outputs["tokens"][v], tokens)
        torch.testing.assert_close(outputs["features"][v], features)
        projection = net.projector(features)
        torch.testing.assert_close(outputs["projection"][v], projection, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs["prediction"][v], net.predictor(projection), rtol=1e-4, atol=1e-5)


def test_rows_of_an_image_with_several_masks_follow_each_other():
    net = siamese().eval()
    b = batch(masks=3)
    with torch.no_grad():
        tokens = net(b)["tokens"][1]
        for image in range(4):
            for n in range(3):
                alone = net.encoder.tokens(b.views[1][image : image + 1], b.masks[1].keep[image, n][None])
                torch.testing.assert_close(tokens[3 * image + n], alone[0])


def test_a_ratio_of_zero_is_the_plain_method():
    b = batch(masks=0)
    everything = torch.arange(16).expand(4, 1, -1)
    whole = Batch(b.views, [Masks.from_keep(everything, 16)] * 2, b.index, b.label)
    net = siamese()
    for name, values in net(b).items():
        for plain, masked in zip(values, net(whole)[name], strict=True):
            torch.testing.assert_close(masked, plain, rtol=1e-4, atol=1e-5)


class Counting:
    """An encoder that records the batches it is given."""

    def __init__(self, is_vit):
        self.is_vit, self.calls = is_vit, []

    def __call__(self, images, keep=None):
        self.calls.append((tuple(images.shape), None if keep is None else tuple(keep.shape)))
        return (images.flatten(1)[:, :, None] if self.is_vit else None), images.flatten(1)


def test_views_of_one_shape_go_together():
    small, large = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16)
    views = [large, large + 1, small, small + 1, small + 2]
    counting = Counting(is_vit=True)
    tokens, features = encode_views(counting, views, [None] * 5)
    assert counting.calls == [((4, 3, 16, 16), None), ((6, 3, 8, 8), None)]
    assert all(torch.equal(f, v.flatten(1)) for f, v in zip(features, views, strict=True)) and len(tokens) == 5
    # Masks of another number of patches are another shape.
    keeps = [torch.zeros(2, 1, 3, dtype=torch.int64), torch.zeros(2, 1, 4, dtype=torch.int64), None, None, None]
    counting = Counting(is_vit=True)
    encode_views(counting, views, keeps)
    assert [keep for _, keep in counting.calls] == [(2, 1, 3), (2, 1, 4), None]


def test_other_backbones_see_one_view_at_a_time():
    """Batch norm takes its statistics within a view; the same tensor given twice is two views as well."""
    view = torch.randn(2, 3, 8, 8)
    counting = Counting(is_vit=False)
    tokens, features = encode_views(counting, [view, view + 1, view, view], [None] * 4)
    assert len(counting.calls) == 4 and tokens == [None] * 4 and len(features) == 4


def test_views_of_two_sizes():
    net = siamese(info=RunInfo((SHAPE, (3, 8, 8)), batch_size=4), predictor_layers=1, momentum=0.9)
    views = [torch.randn(4, *SHAPE), torch.randn(4, 3, 8, 8)]
    outputs = net(Batch(views, [None, None], torch.arange(4), torch.arange(4)))
    assert [t.shape[1] for t in outputs["tokens"]] == [17, 5]
    assert [z.shape for z in outputs["target"]] == [(4, 8)] * 2


@pytest.mark.parametrize("depth, norm", [(1, True), (1, False), (3, True), (3, False)])
def test_heads(depth, norm):
    head = mlp_head(6, 5, 4, depth, norm)
    kinds = [type(m).__name__ for m in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * (depth - 1) + ["Linear"] + ["BatchNorm1d"] * norm
    linear = [m for m in head if isinstance(m, torch.nn.Linear)]
    widths = {1: [(6, 4)], 3: [(6, 5), (5, 5), (5, 4)]}[depth]
    assert [(m.in_features, m.out_features) for m in linear] == widths
    assert [m.bias for m in linear] == [None] * depth
    out = head(torch.randn(64, 6))
    assert out.shape == (64, 4)
    if norm:
        torch.testing.assert_close(out.mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
        assert not head[-1].affine


def test_a_head_without_batch_norm_has_biases():
    head = mlp_head(6, 5, 4, 3, last_norm=False, hidden_norm=False)
    assert [type(m).__name__ for m in head] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert all(m.bias is not None for m in head[::2])


@pytest.mark.parametrize("shape", [(9, 3, 16, 16), (1, 16, 16)])
def test_a_view_that_the_encoder_cannot_read(shape):
    message = r"reads views \[C, H, W\]|reads views of 3 channels, and this one has 1|needs views with equal channels"
    with pytest.raises(UserError, match=message):
        siamese(info=RunInfo((SHAPE, shape), batch_size=4))
    with pytest.raises(UserError, match=r"reads views of 3 channels|reads views \[C, H, W\]"):
        siamese().encoder.check(shape)


# --- what the criterion asks for --------------------------------------------------------------------------------------


def test_what_is_not_wanted_is_neither_run_nor_trained():
    net = siamese(predictor_layers=2, momentum=0.9)
    net.select({"projection"})
    calls = []
    net.predictor.register_forward_hook(lambda *_: calls.append("predictor"))
    net.target.networks[0].register_forward_hook(lambda *_: calls.append("target"))
    outputs = net(batch())
    assert calls == [] and set(outputs) == {"tokens", "features", "projection"}
    assert not any(p.requires_grad for p in net.predictor.parameters())
    names = {name for group in net.param_groups() for name, _ in group.params}
    assert names and not any(name.startswith(("predictor", "target")) for name in names)


def test_what_is_wanted_is():
    net = siamese(predictor_layers=2, momentum=0.9)
    net.select({"prediction", "target"})
    assert {"prediction", "target"} <= set(net(batch()))
    names = {name for group in net.param_groups() for name, _ in group.params}
    assert any(name.startswith("predictor") for name in names)
    assert not any(name.startswith("target") for name in names)


# --- the momentum target ----------------------------------------------------------------------------------------------


def test_the_target_starts_as_a_copy():
    net = siamese(momentum=0.9, predictor_layers=2)
    encoder, projector = net.target.networks
    for copy, source in ((encoder, net.encoder), (projector, net.projector)):
        for p, q in zip(copy.parameters(), source.parameters(), strict=True):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
    outputs = net(batch())
    for target, projection in zip(outputs["target"], outputs["projection"], strict=True):
        torch.testing.assert_close(target, projection.detach())


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_target_follows(momentum):
    net = siamese(momentum=momentum)
    with torch.no_grad():
        for p in net.encoder.parameters():
            p.add_(torch.randn_like(p))
    pairs = [
        (before.clone(), target, source)
        for copy, online in zip(net.target.networks, (net.encoder, net.projector), strict=True)
        for before, target, source in zip(copy.parameters(), copy.parameters(), online.parameters(), strict=True)
    ]
    sources = [source.clone() for _, _, source in pairs]
    net.after_step(CONTEXT)
    for (before, target, source), kept in zip(pairs, sources, strict=True):
        torch.testing.assert_close(target, momentum * before + (1 - momentum) * kept)
        assert torch.equal(source, kept)


def test_a_scheduled_momentum_is_read_when_it_is_used():
    net = siamese(momentum=1.0)
    with torch.no_grad():
        net.projector[0].weight.add_(1)
    net.momentum = 0.0
    net.after_step(CONTEXT)
    assert torch.equal(net.target.networks[1][0].weight, net.projector[0].weight)


def test_two_steps_of_the_average():
    a, b = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        a.weight.fill_(1.0)
        b.weight.fill_(10.0)
        copy = MomentumCopy(a, b)
        a.weight.fill_(3.0)
        copy.update(a, b, momentum=0.75)
        copy.update(a, b, momentum=0.5)
    assert copy.networks[0].weight.item() == 0.5 * (0.75 * 1 + 0.25 * 3) + 0.5 * 3
    assert copy.networks[1].weight.item() == 10.0


def test_no_gradient_reaches_the_target():
    net = siamese(momentum=0.9, predictor_layers=2)
    outputs = net(batch())
    assert not any(z.requires_grad for z in outputs["target"])
    (sum(p.sum() for p in outputs["prediction"]) + sum(z.sum() for z in outputs["target"])).backward()
    assert all(p.grad is None and not p.requires_grad for p in net.target.parameters())
    assert all(p.grad is not None for p in net.encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("masked", [True, False])
def test_whether_the_target_sees_masks(masked):
    net = siamese(momentum=0.9, target_masked=masked)
    b = batch()
    seen = []
    net.target.networks[0].register_forward_hook(lambda module, arguments, out: seen.append(arguments[1]))
    target = net(b)["target"]
    assert all((keep is not None) == masked for keep in seen) and seen
    expected = siamese(momentum=0.9)(b if masked else b.unmasked())["target"]
    for z, e in zip(target, expected, strict=True):
        torch.testing.assert_close(z, e)
    # The online side sees them in either case.
    assert net(b)["tokens"][0].shape[1] == 7


def test_masks_of_several_rows_an_image_and_a_whole_target():
    net = siamese(momentum=0.9, target_masked=False)
    outputs = net(batch(masks=3))
    assert len(outputs["projection"][0]) == 12 and len(outputs["target"][0]) == 4


def test_state_is_in_the_state_dict():
    net, other = siamese(momentum=0.9, predictor_layers=1), siamese(momentum=0.9, predictor_layers=1, seed=3)
    with torch.no_grad():
        net.target.networks[0].backbone.cls_token.add_(1)
    other.load_state_dict(net.state_dict())
    b = batch()
    for name, values in net.eval()(b).items():
        assert all(torch.equal(x, y) for x, y in zip(values, other.eval()(b)[name], strict=True))


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_freezing_the_patch_embedding():
    net = siamese(freeze_patch_embed=True, momentum=0.5)
    frozen = {name for name, p in net.encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    names = {name for group in net.param_groups() for name, _ in group.params}
    assert not any("patch_embed" in name for name in names) and "encoder.backbone.cls_token" in names


def test_encode_is_the_encoder():
    net = siamese(pool="mean").eval()
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        tokens, features = net.encoder(x)
        assert torch.equal(net.encode(x), features)
        torch.testing.assert_close(features, tokens[:, 1:].mean(dim=1))
        assert [m.shape for m in net.feature_maps(x, [0, 1])] == [(3, 24, 4, 4)] * 2
    assert net.backbone is net.encoder.backbone and net.grid(SHAPE) == (4, 4)
    name, arguments = net.export()
    assert name == "vit_tiny_patch16_224" and arguments["img_size"] == 16 and arguments["embed_dim"] == 24


def test_the_permutation_of_a_batch_changes_nothing_but_the_order():
    net, b = siamese(predictor_layers=2).eval(), batch()
    order = torch.tensor([2, 0, 3, 1])
    masks = [Masks(m.keep[order], m.mask[order]) for m in b.masks]
    shuffled = Batch([v[order] for v in b.views], masks, b.index[order], b.label)
    for name, values in net(b).items():
        for x, y in zip(values, net(shuffled)[name], strict=True):
            torch.testing.assert_close(x[order], y)


@pytest.mark.parametrize(
    "arguments, shapes, message",
    [
        ({}, (SHAPE, (1, 16, 16)), "needs views with equal channels"),
        ({}, (SHAPE, (3, 18, 16)), "a view of 18 x 16 pixels cannot be cut into patches of 4"),
        ({"backbone": "resnet18", "backbone_args": {}, "freeze_patch_embed": True}, (SHAPE,), "freeze_patch_embed"),
        ({"backbone": "resnet18", "backbone_args": {}, "positions": "sincos"}, (SHAPE,), "positions=sincos"),
    ],
)
def test_mistakes(arguments, shapes, message):
    with pytest.raises(UserError, match=message):
        siamese(info=RunInfo(shapes, batch_size=4), **arguments)


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_one_graph():
    net = siamese(predictor_layers=2, momentum=0.9)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(net)(batch())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.slow
def test_compiled_is_eager():
    net = siamese(predictor_layers=2, momentum=0.9).eval()
    b = batch()
    eager, compiled = net(b), torch.compile(net)(b)
    for name, values in eager.items():
        for x, y in zip(values, compiled[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

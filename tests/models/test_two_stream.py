"""One encoder a view: who reads which channels, what is trained and what is exported.

Shapes: B images, D encoder width.
"""

import pytest
import torch

from ssl_ib import Batch, RunInfo, UserError
from ssl_ib.criterions.bank_nce import BankNCE
from ssl_ib.models.two_stream import TwoStream
from ssl_ib.part import Context, Progress

B, D = 4, 24
VIT = dict(backbone="vit_tiny_patch16_224", backbone_args=dict(patch_size=8, embed_dim=D, depth=1, num_heads=3))
SPLIT, WHOLE = ((1, 16, 16), (2, 16, 16)), ((3, 16, 16), (3, 16, 16))
BOTH = {"projection": (0, 1)}


def build(shapes=SPLIT, reads=BOTH, **given) -> TwoStream:
    torch.manual_seed(0)
    model = TwoStream(RunInfo(shapes, B), **{**VIT, "head_dim": 6, **given}).eval()
    model.wanted_views = reads
    model.select(reads)
    return model


def batch(shapes) -> Batch:
    index = torch.arange(B)
    return Batch([torch.randn(B, *shape) for shape in shapes], [None] * len(shapes), index, index)


@torch.no_grad()
def test_each_encoder_reads_its_own_channels():
    model, plain = build(), torch.randn(B, 3, 16, 16)
    first, second = model.encoders
    expected = torch.cat([first(plain[:, :1])[1], second(plain[:, 1:])[1]], dim=1)
    assert torch.equal(model.encode(plain), expected) and expected.shape == (B, 2 * D)
    maps = model.feature_maps(plain, [0])
    assert [tuple(m.shape) for m in maps] == [(B, 2 * D, 2, 2)]
    outputs = model(Batch([plain[:, :1], plain[:, 1:]], [None, None], torch.arange(B), torch.arange(B)))
    for number, (encoder, part) in enumerate(((first, plain[:, :1]), (second, plain[:, 1:]))):
        torch.testing.assert_close(outputs["projection"][number], model.heads[number](encoder(part)[1]))
    with pytest.raises(UserError, match="views of 1 . 2 channels, and the plain view has 4"):
        model.encode(torch.randn(B, 4, 16, 16))


@torch.no_grad()
@pytest.mark.parametrize("share", [False, True])
def test_views_of_whole_images(share):
    model, plain = build(WHOLE, share=share), torch.randn(B, 3, 16, 16)
    assert len(model.encoders) == (1 if share else 2) and len(model.heads) == 2
    expected = torch.cat([encoder(plain)[1] for encoder in model.encoders], dim=1)
    assert torch.equal(model.encode(plain), expected)
    names = ["backbone"] if share else ["backbone_1", "backbone_2"]
    assert list(model.exports()) == names
    assert [module for module, *_ in model.exports().values()] == [e.backbone for e in model.encoders]
    found = build().exports().values()
    assert [(e.arguments["in_chans"], e.channels) for e in found] == [(1, (0, 1)), (2, (1, 3))]


def test_every_trained_parameter_gets_a_gradient():
    for shapes, given in ((SPLIT, {}), (WHOLE, {"share": True, "momentum": 0.9})):
        model = build(shapes, **given)
        sum(z.square().sum() for z in model(batch(shapes))["projection"]).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_the_copies_follow():
    model = build(WHOLE, {"projection": (0,), "target": (1,)}, share=True, momentum=0.5)
    outputs = model(batch(WHOLE))
    assert outputs["projection"][1] is None and outputs["target"][0] is None
    assert not outputs["target"][1].requires_grad and outputs["target"][1].shape == (B, 6)
    before = model.target.networks[0][0].backbone.pos_embed.clone()
    with torch.no_grad():
        model.encoders[0].backbone.pos_embed.add_(1.0)
    model.after_step(Context(Progress(0, 0, 1, 1), lambda *a: None, lambda p: None))
    torch.testing.assert_close(model.target.networks[0][0].backbone.pos_embed, before + 0.5)


def test_contrastive_multiview_coding_step():
    criterion = BankNCE(RunInfo(SPLIT, B, images=lambda: 9, width=lambda name: 6), queries=(0, 1), banks=(1, 0))
    model = build(reads=criterion.reads)
    views = batch(SPLIT)
    criterion(model(views), views, Progress(0, 0, 1, 1)).total.backward()
    assert all(encoder.backbone.patch_embed.proj.weight.grad.abs().sum() > 0 for encoder in model.encoders)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(shapes=SPLIT[:1]), "an encoder for each of several views, and there is 1"),
        (dict(share=True), "share=true needs views with equal channels"),
        (dict(shapes=(SPLIT[0], (9, 3, 8, 8))), r"reads views \[C, H, W\]"),
        (
            dict(shapes=WHOLE, reads={"projection": (0,), "target": (1,)}, momentum=0.9),
            "reads no projection of the views 1, so that their encoders would learn nothing",
        ),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(UserError, match=message):
        build(**given)

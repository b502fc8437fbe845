"""MRCL's model: a contrastive one with a decoder, and that one alone where nothing is reconstructed."""

from dataclasses import replace

import pytest
import torch

from ssl_ib import Batch, Masks, Model, Progress, RunInfo, UserError
from ssl_ib.config.registry import MASKERS, MODELS, build_part, check_part
from ssl_ib.models.mrcl import MRCL
from ssl_ib.models.siamese import Siamese
from ssl_ib.ops import patchify
from ssl_ib.random import image_keys

SHAPE = (3, 16, 16)
INFO = RunInfo((SHAPE, SHAPE), batch_size=6)
PROGRESS = Progress(0, 0, 10, 1)
SIAMESE = {
    "name": "siamese",
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "projector_hidden": 16,
    "projector_dim": 8,
    "predictor_hidden": 12,
}
TARGET = {**SIAMESE, "predictor_layers": 2, "momentum": 0.9}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def build(kind, spec, seed=0):
    problems = []
    checked = check_part(kind, spec, kind, problems)
    assert problems == []
    torch.manual_seed(seed)
    return build_part(kind, checked, info=INFO).part


def mrcl(contrastive=SIAMESE, **decoder):
    return build("model", {"name": "mrcl", "contrastive": contrastive, **DECODER, **decoder})


def batch(ratio=None, size=6):
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(size, *SHAPE, generator=generator) for _ in range(2)]
    index = torch.arange(size)
    masks = [None, None]
    if ratio is not None:
        masks = [MASKERS["random"](ratio)(image_keys(0, 0, index, 1000 + v), (4, 4)) for v in range(2)]
    return Batch(views, masks, index, -torch.ones_like(index))


def gradients(model, criterion, b):
    """Loss and gradient of each parameter that has one, in float64."""
    model.double().select(criterion.requires)
    b = replace(b, views=[view.double() for view in b.views])
    loss = criterion(model(b), b, PROGRESS)
    loss.total.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- what it gives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [None, 0.0, 0.5])
def test_shapes(ratio):
    net = mrcl(TARGET)
    outputs = net(batch(ratio))
    assert set(outputs) == net.provides == net.contrastive.provides | {"reconstruction"}
    assert [r.shape for r in outputs["reconstruction"]] == [(6, 16, 48)] * 2


def test_several_masks_an_image():
    keep = torch.stack([torch.stack([torch.randperm(16)[:5] for _ in range(3)]) for _ in range(6)])
    b = batch()
    outputs = mrcl()(Batch(b.views, [Masks.from_keep(keep, 16)] * 2, b.index, b.label))
    assert [r.shape for r in outputs["reconstruction"]] == [(18, 16, 48)] * 2


def test_the_reconstruction_is_the_decoders():
    net, b = mrcl(), batch(0.5)
    outputs = net(b)
    for v in range(2):
        expected = net.decoder(outputs["tokens"][v], b.masks[v].keep[:, 0])
        torch.testing.assert_close(outputs["reconstruction"][v], expected)


def test_it_can_learn_to_reconstruct():
    """The patches of the decoder are in the order of `patchify`: overfitting one image finds it again."""
    net, b = mrcl(), batch(0.5, size=1)
    net.select({"projection", "reconstruction"})
    net.eval()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    truth = patchify(b.views[0], 4)
    for _ in range(60):
        optimizer.zero_grad()
        error = (net(b)["reconstruction"][0] - truth).square().mean()
        error.backward()
        optimizer.step()
    assert error < 0.1 * truth.square().mean()


def test_it_is_the_contrastive_model_elsewhere():
    net, x = mrcl().eval(), torch.randn(2, *SHAPE)
    inner = net.contrastive
    with torch.no_grad():
        assert torch.equal(net.encode(x), inner.encode(x))
        assert torch.equal(net.feature_maps(x, [1])[0], inner.feature_maps(x, [1])[0])
    assert net.backbone is inner.backbone and net.export() == inner.export() and net.grid(SHAPE) == (4, 4)


# --- what is not asked for --------------------------------------------------------------------------------------------


def test_the_decoder_rests_where_nothing_is_reconstructed():
    net = mrcl()
    net.select({"projection"})
    net.decoder.register_forward_hook(lambda *_: pytest.fail("the decoder was run"))
    outputs = net(batch(0.5))
    assert "reconstruction" not in outputs
    assert not any(p.requires_grad for p in net.decoder.parameters())
    assert not any("decoder" in name for group in net.param_groups() for name, _ in group.params)
    # Asked for again, it is trained again.
    net.select({"projection", "reconstruction"})
    assert all(p.requires_grad for p in net.decoder.parameters())


def test_tokens_are_asked_for_where_they_are_decoded():
    """A contrastive model of a user's may give only what it is asked for."""

    class Frugal(Siamese):
        def forward(self, batch):
            return {name: value for name, value in super().forward(batch).items() if name in self.wanted}

    arguments = {key: value for key, value in SIAMESE.items() if key != "name"}
    net = MRCL(INFO, Frugal(INFO, **arguments), **DECODER)
    net.select({"projection", "reconstruction"})
    assert set(net(batch(0.5))) == {"projection", "tokens", "reconstruction"}
    net.select({"projection"})
    assert set(net(batch(0.5))) == {"projection"}


@pytest.mark.parametrize(
    "contrastive, criterion",
    [(SIAMESE, "info_nce"), (SIAMESE, "barlow_twins"), (TARGET, "byol"), (TARGET, "moco_v3")],
)
@pytest.mark.parametrize("ratio", [None, 0.0])
def test_without_weights_and_masks_it_is_the_plain_method(contrastive, criterion, ratio):
    """Loss, terms, gradients and what is trained: those of the contrastive model and criterion alone."""
    plain = build("model", contrastive)
    loss, expected = gradients(plain, build("criterion", {"name": criterion}), batch())
    ours = mrcl(contrastive)
    regularised = build(
        "criterion", {"name": "mrcl", "contrastive": criterion, "w_masked": 0.0, "w_unmasked": 0.0, "norm_pix": True}
    )
    our_loss, found = gradients(ours, regularised, batch(ratio))
    torch.testing.assert_close(our_loss.total, loss.total, rtol=1e-12, atol=0)
    assert our_loss.terms.keys() == loss.terms.keys() and our_loss.weights == loss.weights
    assert {name.removeprefix("contrastive.") for name in found} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"contrastive.{name}"], gradient, rtol=1e-9, atol=1e-12)


def test_with_weights_the_encoder_learns_from_both():
    criterion = {"name": "mrcl", "contrastive": "info_nce"}
    _, both = gradients(mrcl(), build("criterion", criterion), batch(0.5))
    _, contrastive = gradients(mrcl(), build("criterion", {**criterion, "w_masked": 0, "w_unmasked": 0}), batch(0.5))
    assert any(name.startswith("decoder.") for name in both)
    name = "contrastive.encoder.backbone.patch_embed.proj.weight"
    assert not torch.allclose(both[name], contrastive[name], rtol=1e-2)
    # The heads do not see the pixels.
    name = "contrastive.projector.0.weight"
    torch.testing.assert_close(both[name], contrastive[name])


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_backbone_without_tokens():
    with pytest.raises(UserError, match="needs a contrastive model that gives 'tokens'.*features, projection"):
        mrcl({**SIAMESE, "backbone": "resnet18", "backbone_args": {}})


def test_views_of_two_sizes():
    info = RunInfo((SHAPE, (3, 8, 8)), batch_size=4)
    spec = check_part("model", {"name": "mrcl", "contrastive": SIAMESE, **DECODER}, "model", [])
    with pytest.raises(UserError, match="reconstructs views of one shape"):
        build_part("model", spec, info=info)


def test_every_built_in_model_keeps_the_contract():
    assert set(MODELS.names()) >= {"mrcl", "siamese"}
    for net in (build("model", SIAMESE), mrcl()):
        assert isinstance(net, Model) and net.wanted == net.provides


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_graph_and_the_same_outputs():
    net, b = mrcl(TARGET).eval(), batch(0.5)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(net)(b)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    eager, compiled = net(b), torch.compile(net)(b)
    for name, values in eager.items():
        for x, y in zip(values, compiled[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

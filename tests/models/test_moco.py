"""MoCo's encoder, heads and momentum copy: what is computed, and how batches are normalised.

Shapes: B images, D encoder width.
"""

from collections import Counter

import pytest
import torch
from ranks import answers_of, join
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_ib import Batch, Model, Progress, RunInfo, UserError, distributed
from ssl_ib.criterions.queue_nce import QueueNCE
from ssl_ib.models.batch_norm import BatchNormGroups
from ssl_ib.models.moco import MoCo
from ssl_ib.part import Context, Step

B = 8
PLAIN, JIGSAW = (3, 16, 16), (4, 3, 8, 8)
VIT = dict(backbone="vit_tiny_patch16_224", backbone_args=dict(patch_size=8, embed_dim=24, depth=1, num_heads=3))
RESNET = dict(backbone="resnet10t", backbone_args=dict(stem_width=8, channels=(8, 8, 8, 8), stem_type=""))
SHAPES = PLAIN, PLAIN, JIGSAW
#: What InfoMin's loss reads.
READS = {"projection": (0, 2), "target": (1,)}


def build(shapes=SHAPES, reads=READS, world: int = 1, cap: int | None = None, **given) -> MoCo:
    torch.manual_seed(0)
    model = MoCo(RunInfo(shapes, B, world, cap=cap), **{**VIT, "head_dim": 6, **given})
    model.wanted_views = reads
    model.select(reads)
    return model


def batch(shapes=SHAPES, rows: slice = slice(None)) -> Batch:
    generator, index = torch.Generator().manual_seed(1), torch.arange(B)
    views = [torch.randn(B, *shape, generator=generator)[rows] for shape in shapes]
    return Batch(views, [None] * len(shapes), index[rows], index[rows])


def passes(model: Model, views: Batch) -> Counter:
    """How many images each encoder of a model has read, by (name, number of passes' images)."""
    seen: Counter = Counter()
    names = {"online": model.encoder} | ({} if model.target is None else {"copy": model.target.networks[0]})
    handles = [
        module.backbone.patch_embed.register_forward_hook(
            lambda _, images, __, name=name: seen.update([(name, len(images[0]))])
        )
        for name, module in names.items()
    ]
    model(views)
    for handle in handles:
        handle.remove()
    return seen


# --- what is computed


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ({"projection": (0,), "target": (1,)}, {("online", B): 1, ("copy", B): 1}),
        (READS, {("online", B): 1, ("online", 4 * B): 1, ("copy", B): 1}),
        ({"projection": (0, 1), "target": (0, 1)}, {("online", B): 2, ("copy", B): 2}),
        ({"features": (1,)}, {("online", B): 1}),
    ],
)
def test_only_what_is_read_is_computed(reads, expected):
    model = build(reads=reads)
    assert passes(model, batch()) == expected
    outputs = model(batch())
    assert set(outputs) == set(reads)
    for name, entries in outputs.items():
        assert [view for view, entry in enumerate(entries) if entry is not None] == list(reads[name])
        assert all(entry.shape == (B, model.widths[name]) for entry in entries if entry is not None)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    heads = {("jigsaw" if view == 2 else "projector") for view in reads.get("projection", ())}
    assert trained == {"encoder"} | heads
    # Each trained parameter gets a gradient, which several processes wait for.
    sum(entry.sum() for entries in outputs.values() for entry in entries if entry is not None).backward()
    if heads:
        assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_without_a_copy():
    model = build(momentum=None, reads={"projection": (0,)})
    assert model.target is None and model.provides == {"features", "projection"}
    assert passes(model, batch()) == {("online", B): 1}


def test_the_heads():
    for layers, kinds in ((1, ["Linear"]), (2, ["Linear", "ReLU", "Linear"])):
        model = build(head_layers=layers)
        for head in (model.projector, model.jigsaw.patch):
            assert [type(m).__name__ for m in head] == kinds and head[0].bias is not None
    assert build(head_layers=2, head_hidden=11).projector[0].out_features == 11
    assert (model.jigsaw.together.in_features, model.jigsaw.together.out_features) == (4 * 6, 6)


def test_the_jigsaw_head_reads_patches_in_order():
    model, views = build(reads={"projection": (2,)}), batch()
    patches = views.views[2]
    parts = [model.jigsaw.patch(model.encoder(patches[:, p])[1]) for p in range(4)]
    expected = model.jigsaw.together(torch.cat(parts, dim=1))
    torch.testing.assert_close(model(views)["projection"][2], expected, rtol=1e-4, atol=1e-5)
    # Another order is another input, and no image sees another's patches.
    other = patches.clone()
    other[0] = patches[0].flip(0)
    views.views[2] = other
    changed = (model(views)["projection"][2] - expected).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == [True] + [False] * (B - 1)


def test_the_copy_follows():
    model = build(momentum=0.9)
    before = [p.clone() for p in model.target.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p)) if p.requires_grad else None
    model.after_step(Context(Progress(0, 0, 1, 1), lambda *a: None, lambda p: None))
    online = [*model.encoder.parameters(), *model.projector.parameters()]
    for p, old, new in zip(model.target.parameters(), before, online, strict=True):
        torch.testing.assert_close(p, 0.9 * old + 0.1 * new)
        assert not p.requires_grad


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(shapes=(PLAIN, JIGSAW), reads={"target": (1,)}), "a jigsaw view cannot be a key"),
        (dict(shapes=(PLAIN, JIGSAW, (9, 3, 8, 8))), r"one jigsaw head, and jigsaw views have \[4, 9\] patches"),
        (dict(shapes=(PLAIN, (1, 16, 16))), "reads views of 3 channels, and this one has 1"),
        (dict(RESNET, bn_groups=3), "bn_groups=3: the 8 images of a process cannot be cut into 3 equal groups"),
        (dict(RESNET, bn_groups=8), "bn_groups=8: .* 8 equal groups of two or more"),
        (dict(RESNET, bn_groups=3, world=2), "bn_groups=3: expected a multiple of the 2 processes, or 1"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(UserError, match=message):
        build(**given)


def test_masked_views_are_refused():
    info = RunInfo((PLAIN, PLAIN), B, masks=lambda grid: (1, 2))
    with pytest.raises(UserError, match="model 'moco' reads whole views: use masker=none"):
        MoCo(info, **VIT)


# --- batch norm


def test_groups_are_shared_by_the_processes():
    for groups, world, expected in ((8, 1, 8), (8, 4, 2), (8, 8, 1), (1, 2, 1)):
        found = BatchNormGroups(groups, RunInfo((PLAIN,), 32, world), [nn.BatchNorm1d(3)])
        assert found.groups == expected
    assert BatchNormGroups(8, RunInfo((PLAIN,), 8, cap=32), [nn.BatchNorm1d(3)]).groups == 4
    assert BatchNormGroups(8, RunInfo((PLAIN,), 8), [nn.LayerNorm(3)]).groups == 1


def test_queries_are_normalised_by_group_and_keys_shuffled_before():
    norm, x = nn.BatchNorm1d(3, affine=False), torch.randn(B, 3, generator=torch.Generator().manual_seed(0))
    groups = BatchNormGroups(2, RunInfo((PLAIN,), B), [norm])
    halves = torch.cat([nn.functional.batch_norm(half, None, None, training=True) for half in x.chunk(2)])
    torch.testing.assert_close(groups.queries(norm, x, True), halves)
    torch.manual_seed(5)
    order = torch.randperm(B)
    expected = torch.empty_like(x)
    for places in order.chunk(2):
        expected[places] = nn.functional.batch_norm(x[places], None, None, training=True)
    torch.manual_seed(5)
    torch.testing.assert_close(groups.keys(norm, x, True), expected)
    assert (expected - halves).abs().max() > 0.1
    # In evaluation there is one pass, in the images' order, and no draw.
    state = torch.get_rng_state()
    torch.testing.assert_close(groups.keys(norm.eval(), x, False), norm(x))
    assert torch.equal(torch.get_rng_state(), state)


def learn(rows: slice, world: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of MoCo on a ResNet whose batch norm sees two groups."""
    info = RunInfo((PLAIN, PLAIN), B // world, world, width=lambda name: 6)
    torch.manual_seed(0)
    model, criterion = MoCo(info, **RESNET, head_dim=6, bn_groups=2).double(), QueueNCE(info, size=4 * B).double()
    model.wanted_views = criterion.reads
    model.select(criterion.requires)
    step = Step(model, criterion)
    wrapped = DistributedDataParallel(step, broadcast_buffers=False) if world > 1 else step
    views = batch((PLAIN, PLAIN), rows)
    views = Batch([view.double() for view in views.views], views.masks, views.index, views.label)
    torch.manual_seed(3 + distributed.rank())
    loss = wrapped(views, Progress(0, 0, 1, 1))[1].total
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return distributed.all_reduce_mean(loss.detach()), found


def work(rank: int, port: int, path: str) -> None:
    join(rank, 2, port)
    loss, gradients = learn(slice(B // 2 * rank, B // 2 * (rank + 1)), 2)
    torch.save({"loss": loss, "gradients": gradients}, f"{path}/{rank}.pt")
    distributed.shutdown()


def test_two_processes_are_two_groups_of_one(tmp_path):
    """The keys change places between the processes, so the two learn what one does with as many groups."""
    loss, gradients = learn(slice(None), 1)
    assert max(g.abs().max() for g in gradients.values()) > 1e-3
    for answer in answers_of(work, 2, tmp_path):
        torch.testing.assert_close(answer["loss"], loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(answer["gradients"], gradients, rtol=1e-8, atol=1e-10)

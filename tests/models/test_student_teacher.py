"""Student and teacher: who sees which crop, who follows whom, and which of them is kept.

Shapes: B images, V views of which the first G are global crops.
"""

import pytest
import timm
import torch
import torch.nn.functional as F
from harness import PARTS, TINY
from timm.layers import DropPath
from torch import nn

from ssl_ib import Batch, ConfigError, Context, Progress, RunInfo, UserError, random
from ssl_ib.config.config import resolve
from ssl_ib.config.plugins import load_plugins
from ssl_ib.models.momentum import MomentumCopy
from ssl_ib.models.student_teacher import StudentTeacher
from ssl_ib.part import parts
from ssl_ib.run import build_run
from ssl_ib.trainer import Trainer

B, GLOBAL, LOCAL = 3, (3, 16, 16), (3, 8, 8)
SHAPES = (GLOBAL, GLOBAL, LOCAL, LOCAL, LOCAL)
VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
PROGRESS = Progress(3, 1, 20, 10)


def info(shapes=SHAPES, num_global: int | None = 2) -> RunInfo:
    return RunInfo(shapes, B, num_global=num_global)


def build(shapes=SHAPES, num_global: int | None = 2, seed: int = 0, **given) -> StudentTeacher:
    torch.manual_seed(seed)
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT, "head_hidden": 10, "head_dim": 6}
    return StudentTeacher(info(shapes, num_global), **{**settings, **given})


def draw_batch(shapes=SHAPES, images: int = B, seed: int = 1) -> Batch:
    generator, index = torch.Generator().manual_seed(seed), torch.arange(images)
    views = [torch.randn(images, *shape, generator=generator) for shape in shapes]
    return Batch(views, [None] * len(views), index, -torch.ones_like(index))


def context(epoch: int = 1) -> Context:
    return Context(Progress(3, epoch, 20, 10), lambda *a: None, lambda p: None)


def seen_by(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what goes into a module, from now on."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    return shapes


def apart(model: StudentTeacher) -> StudentTeacher:
    """Moves the student away from the teacher."""
    with torch.no_grad():
        for number, p in enumerate([*model.student.parameters(), *model.head.parameters()]):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    return model


# --- outputs


@pytest.mark.parametrize("prototypes", [0, 11])
def test_outputs(prototypes):
    model = build(prototypes=prototypes)
    outputs = model(draw_batch())
    widths = {"features": 24, "student": 6, "teacher": 6}
    widths |= {"student_logits": 11, "teacher_logits": 11} if prototypes else {}
    assert set(outputs) == model.provides == set(widths) and model.widths == widths
    for name, width in widths.items():
        assert [tuple(z.shape) for z in outputs[name]] == [(B, width)] * (2 if "teacher" in name else 5)
    for z in (*outputs["student"], *outputs["teacher"]):
        torch.testing.assert_close(z.norm(dim=1), torch.ones(B))
    for name, head in (("student", model.head), ("teacher", model.teacher.networks[1])):
        for z, logits in zip(outputs[name], outputs.get(f"{name}_logits", []), strict=False):
            torch.testing.assert_close(logits, z @ F.normalize(head.last.weight, dim=1).T)


def test_student_and_teacher_start_alike():
    outputs = build()(draw_batch())
    for mine, theirs in zip(outputs["student"], outputs["teacher"], strict=False):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("num_global, teachers", [(1, 1), (2, 2), (None, 5)])
def test_the_teacher_sees_the_global_crops_alone(num_global, teachers):
    model = build(num_global=num_global)
    seen = seen_by(model.teacher.networks[0])
    outputs = model(draw_batch())
    assert len(outputs["teacher"]) == teachers
    assert sum(shape[0] for shape in seen) == teachers * B
    # Other local crops, the same teacher.
    batch, other = draw_batch(), draw_batch(seed=2)
    mixed = Batch(batch.views[:teachers] + other.views[teachers:], batch.masks, batch.index, batch.label)
    for a, b in zip(outputs["teacher"], model(mixed)["teacher"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "backbone, arguments", [("vit_tiny_patch16_224", VIT), ("resnet18", {"stem": "cifar"}), ("resnet18", {})]
)
def test_one_pass_a_resolution(backbone, arguments):
    shapes = ((3, 32, 32),) * 2 + ((3, 16, 16),) * 3
    model = build(shapes, backbone=backbone, backbone_args=arguments)
    student, teacher, head = seen_by(model.student), seen_by(model.teacher.networks[0]), seen_by(model.head)
    outputs = model(draw_batch(shapes))
    assert student == [(2 * B, 3, 32, 32), (3 * B, 3, 16, 16)] and teacher == [(2 * B, 3, 32, 32)]
    assert head == [(5 * B, model.student.width)]
    assert len(outputs["student"]) == 5 and all(z.shape == (B, 6) for z in outputs["student"])


def test_the_order_of_the_crops_is_kept():
    shapes = (GLOBAL, LOCAL, GLOBAL, LOCAL)
    model, batch = build(shapes, num_global=1).eval(), draw_batch(shapes)
    outputs = model(batch)
    for view, found in zip(batch.views, outputs["features"], strict=True):
        torch.testing.assert_close(found, model.student(view)[1])


def test_small_crops_get_bicubic_positions():
    model = build().eval()
    vit, local = model.student.backbone, draw_batch().views[2]
    own, grid = 4, 2
    table = vit.pos_embed.detach()
    patches = table[:, 1:].reshape(1, own, own, 24).permute(0, 3, 1, 2)
    small = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    x = vit.patch_embed.proj(local).flatten(2).transpose(1, 2) + small.permute(0, 2, 3, 1).reshape(1, -1, 24)
    x = torch.cat([(vit.cls_token + table[:, :1]).expand(B, -1, -1), x], dim=1)
    expected = vit.norm(vit.blocks(x))[:, 0]
    torch.testing.assert_close(model(draw_batch())["features"][2], expected)


# --- gradients and the moving average


def test_the_teacher_gets_no_gradient():
    model = apart(build(prototypes=11))
    outputs = model(draw_batch())
    assert not any(z.requires_grad for z in outputs["teacher"])
    sum(z.square().sum() for name in outputs for z in outputs[name]).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert all(p.grad is not None for p in (*model.student.parameters(), *model.head.parameters()))
    trained = {id(p) for part in parts(model) for group in part.param_groups() for _, p in group.params}
    assert trained == {id(p) for p in (*model.student.parameters(), *model.head.parameters())}


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_teacher_follows_the_student(momentum):
    model = apart(build(prototypes=11, momentum=momentum))
    before = [p.clone() for p in model.teacher.networks.parameters()]
    model.after_step(context())
    students = [*model.student.parameters(), *model.head.parameters()]
    after = list(model.teacher.networks.parameters())
    assert len(before) == len(students) == len(after)
    for old, new, student in zip(before, after, students, strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * student)
    assert torch.equal(before[0], after[0]) == (momentum == 1.0)


def test_the_momentum_is_read_when_it_is_used():
    model = apart(build(momentum=0.9))
    before = model.teacher.networks[0].backbone.cls_token.clone()
    model.momentum = 1.0
    model.after_step(context())
    assert torch.equal(model.teacher.networks[0].backbone.cls_token, before)


def test_a_copy_of_several_networks():
    a, b = nn.Linear(2, 3), nn.Linear(3, 2)
    copy = MomentumCopy(a, b)
    with torch.no_grad():
        b.weight += 1.0
    copy.update(a, b, momentum=0.75)
    torch.testing.assert_close(copy.networks[0].weight, a.weight.detach())
    torch.testing.assert_close(copy.networks[1].weight, b.weight.detach() - 0.75)


def test_drop_path_is_the_students_alone():
    model = build(backbone_args={**VIT, "drop_path_rate": 0.5}).train()
    paths = [m for m in model.student.modules() if isinstance(m, DropPath)]
    assert paths and all(m.drop_prob > 0 for m in paths)
    batch = draw_batch(images=8)
    first, second = model(batch), model(batch)
    assert all(torch.equal(a, b) for a, b in zip(first["teacher"], second["teacher"], strict=True))
    assert not torch.equal(first["student"][0], second["student"][0])


def test_dropout_is_the_students_alone():
    model = build(backbone_args={**VIT, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "pos_drop_rate": 0.5}).train()
    batch = draw_batch(images=8)
    first, second = model(batch), model(batch)
    assert all(torch.equal(a, b) for a, b in zip(first["teacher"], second["teacher"], strict=True))
    assert not torch.equal(first["student"][0], second["student"][0])


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_last_layer_waits(epoch):
    model = build(prototypes=11, freeze_last_epochs=2)
    sum(z.square().sum() for z in model(draw_batch())["student_logits"]).backward()
    model.before_step(context(epoch))
    assert (model.head.last.weight.grad is None) == (epoch < 2)
    assert model.head.mlp[0].weight.grad is not None


# --- what is kept


@pytest.mark.parametrize("eval_net", ["teacher", "student"])
def test_the_evaluated_network(eval_net):
    model = apart(build(eval_net=eval_net)).eval()
    chosen = model.teacher.networks[0] if eval_net == "teacher" else model.student
    other = model.student if eval_net == "teacher" else model.teacher.networks[0]
    images = draw_batch().views[0]
    assert torch.equal(model.encode(images), chosen(images)[1])
    assert not torch.equal(model.encode(images), other(images)[1])
    assert model.backbone is chosen.backbone and model.encoder is chosen
    assert torch.equal(model.feature_maps(images, [1])[0], chosen.feature_maps(images, [1])[0])
    name, arguments = model.export()
    timm.create_model(name, **arguments).load_state_dict(model.backbone.state_dict())


def test_without_a_teacher():
    model = build(momentum=None, eval_net="student")
    assert model.teacher is None and model.provides == {"features", "student"}
    assert set(model(draw_batch())) == {"features", "student"}
    model.after_step(context())
    with pytest.raises(UserError, match="eval_net=teacher, but momentum is null"):
        build(momentum=None)


def test_only_what_is_wanted_is_run():
    model = build()
    student, teacher = seen_by(model.student), seen_by(model.teacher.networks[0])
    model.select({"student"})
    assert set(model(draw_batch())) >= {"student"} and not teacher and len(student) == 2
    student.clear()
    model.select({"teacher"})
    assert set(model(draw_batch())) == {"teacher"} and not student and len(teacher) == 1


def test_the_heads_first_weights():
    """DINO's: a normal distribution of width .02, cut at 2."""
    for module in build(head_hidden=200, head_dim=50).head.mlp:
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05) and not module.bias.any()


def test_what_nobody_reads_is_not_trained():
    model = build(prototypes=11)
    model.select({"student", "teacher"})
    assert not model.head.last.weight.requires_grad and model.head.mlp[0].weight.requires_grad
    assert set(model(draw_batch())) == {"features", "student", "teacher"}
    model.select({"student_logits", "teacher_logits"})
    assert model.head.last.weight.requires_grad
    model.select({"features"})
    head = seen_by(model.head)
    assert set(model(draw_batch())) == {"features"} and not head
    assert not any(p.requires_grad for p in model.head.parameters())
    assert not any(p.requires_grad for p in model.teacher.parameters())


@pytest.mark.parametrize("norm", [False, True])
def test_a_teacher_that_is_never_run_is_not_evaluated_with_batch_norm(norm):
    model = build(head_norm=norm)
    if norm:
        with pytest.raises(UserError, match="does not read the teacher"):
            model.select({"student"})
    else:
        model.select({"student"})
    model.select({"student", "teacher"})
    build(head_norm=norm, eval_net="student").select({"student"})


def test_a_crop_that_the_patches_do_not_divide():
    for shapes in (((3, 18, 18), LOCAL), (GLOBAL, (3, 10, 10))):
        side = 18 if shapes[0] != GLOBAL else 10
        with pytest.raises(UserError, match=f"{side} x {side} pixels cannot be cut into patches of 4"):
            build(shapes)


def test_a_backbone_of_one_size_takes_no_smaller_crops():
    swin = {"window_size": 2, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    build(((3, 16, 16),) * 2, backbone="swin_tiny_patch4_window7_224", backbone_args=swin)
    with pytest.raises(UserError, match="swin_tiny.* takes views of one size"):
        build(backbone="swin_tiny_patch4_window7_224", backbone_args=swin)


# --- in a run

MODEL = "model={name: student_teacher, backbone: vit_tiny_patch16_224, head_hidden: 16, head_dim: 8%s, "
MODEL += "backbone_args: {patch_size: 4, embed_dim: 24, depth: 1, num_heads: 3}}"
VIEWS = "views={name: multi_crop, size: 8, local_size: 4, num_local: 2, blur_p: [0.0, 0.0, 0.0], crop_ratio: 1.0}"


def run(*overrides: str):
    return build_run(resolve(TINY, ["masker=none", VIEWS, *overrides], load_plugins([PARTS])))


@pytest.mark.parametrize("criterion", ["svib", "dino"])
def test_a_teacher_is_asked_of_a_model_without_one(criterion):
    wrong = MODEL % ", momentum: null, eval_net: student", f"criterion={{name: {criterion}}}"
    with pytest.raises(ConfigError) as error:
        run(*wrong)
    end = "_logits" if criterion == "dino" else ""
    assert f"criterion '{criterion}' requires student{end}, teacher{end}" in str(error.value)
    assert f"teacher{end}" in str(error.value).partition("missing")[2]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["views.local_size=6"], "6 x 6 pixels cannot be cut into patches of 4: change the size of the views"),
        (["views.local_size=6"], "views.local_size"),
        (["criterion={name: dino}"], "missing student_logits, teacher_logits"),
        (
            ["criterion={name: swav}", "model.head_norm=true"],
            "model: eval_net=teacher, but the criterion does not read",
        ),
        (["views.num_global=0"], "views.num_global"),
        (["views.num_global=1", "views.num_local=0"], "at least 2 views"),
        (["criterion.K=1"], "criterion.K"),
        (["criterion={name: dino}", "model.prototypes=1"], "model: one prototype would be every image's"),
        (["criterion={name: svib, K: 16, gauss_factor: {from: 1, to: 2}}"], "expected 1 | 2, got a schedule"),
        (
            ["criterion={name: swav, queue: {from: 8, to: 16}}"],
            "criterion.queue: 'swav' cannot follow a schedule here: it keeps no such number to change",
        ),
        (["criterion.sigma_t=0.0"], "criterion.sigma_t"),
        (["model.momentum=null"], "eval_net=teacher"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(UserError) as error:
        run(MODEL % "", "criterion={name: svib, K: 16}", *overrides)
    assert message in str(error.value)


def test_collecting_from_the_teacher_runs_no_student():
    trainer = Trainer(run(MODEL % "", "criterion={name: svib, K: 16}"), None)
    model = apart(trainer.run.model)
    student, teacher = seen_by(model.student), seen_by(model.teacher.networks[0])
    wanted, training = model.wanted, model.train().training
    found = trainer.context().collect("teacher", 700, 3)
    assert not student and sum(shape[0] for shape in teacher) == 700
    assert model.wanted == wanted and model.training == training
    # Whole images, without augmentation, each at most once.
    order = random.shuffled(trainer.config.seed, 3, 1438)[:700]
    assert len(set(order.tolist())) == 700
    sample = trainer.images.gather(order[:5])
    with torch.no_grad():
        encoder, head = model.eval().teacher.networks
        expected = head(encoder(trainer.run.views.center(sample))[1])
    torch.testing.assert_close(found[:5], expected)
    assert not torch.equal(trainer.context().collect("teacher", 5, 4), found[:5])
    assert torch.equal(trainer.context().collect("teacher", 5, 3), found[:5])
    with torch.no_grad():
        assert not torch.equal(trainer.context().collect("student", 5, 3), found[:5])
    assert student

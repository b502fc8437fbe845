"""DINO against softmaxes in float64, and its schedules in a real run.

Shapes: B images, V student views of which the first G are also the teacher's, K prototypes.
"""

import math
from functools import partial

import pytest
import torch
from harness import PARTS, TINY
from ranks import RANKS, answers_of, join

from ssl_ib import Batch, Progress, RunInfo, UserError, distributed
from ssl_ib.config.config import resolve
from ssl_ib.config.plugins import load_plugins
from ssl_ib.config.registry import check_part
from ssl_ib.criterions.crops import pairs
from ssl_ib.criterions.dino import DINO
from ssl_ib.models.student_teacher import StudentTeacher
from ssl_ib.part import Context, detached
from ssl_ib.run import build_run
from ssl_ib.trainer import Trainer

B, K = 6, 5
PROGRESS = Progress(3, 1, 20, 10)
CONTEXT = Context(PROGRESS, lambda *a: None, lambda p: None)
BATCH = Batch([], [], torch.arange(B), torch.arange(B))
#: By hand: (teacher's view, student's view).
PAIRS = {(2, 4): [(0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)], (1, 3): [(0, 1), (0, 2)], (2, 2): [(0, 1), (1, 0)]}
SMALL = (
    "model={name: student_teacher, backbone: vit_tiny_patch16_224, head_hidden: 16, head_dim: 8, prototypes: 12, "
    "freeze_last_epochs: 1, momentum: {from: 0.9, to: 1.0, shape: cosine}, "
    "backbone_args: {patch_size: 4, embed_dim: 24, depth: 1, num_heads: 3}}",
    "criterion={name: dino, tau_t: {from: 0.04, to: 0.07, epochs: 1}}",
    "views={name: multi_crop, size: 8, local_size: 4, num_local: 2, blur_p: [0.0, 0.0, 0.0], crop_ratio: 1.0}",
    "optim={lr: 1e-3, weight_decay: {from: 0.04, to: 0.4, shape: cosine}, clip: 3.0, clip_mode: param}",
    "masker=none",
    "epochs=3",
    "batch_size=256",
)
STEPS = 5  # an epoch, of 1438 images


def draw_outputs(teachers: int = 2, students: int = 4, seed: int = 0) -> dict[str, list[torch.Tensor]]:
    """Cosines with the prototypes."""
    generator = torch.Generator().manual_seed(seed)

    def cosines():
        return 2 * torch.rand(B, K, generator=generator, dtype=torch.float64) - 1

    return {
        "student_logits": [cosines().requires_grad_() for _ in range(students)],
        "teacher_logits": [cosines() for _ in range(teachers)],
    }


def build(views: int = 4, **given) -> DINO:
    return DINO(RunInfo(((3, 8, 8),) * views, B, width=lambda name: K), **given).double()


def by_loops(outputs, center, tau_s, tau_t) -> torch.Tensor:
    student, teacher = outputs["student_logits"], outputs["teacher_logits"]
    losses = []
    for t, s in PAIRS[len(teacher), len(student)]:
        for b in range(B):
            weights = ((teacher[t][b] - center) / tau_t).exp()
            p_t, e_s = weights / weights.sum(), (student[s][b] / tau_s).exp()
            losses.append(-sum(p_t[k] * (e_s[k] / e_s.sum()).log() for k in range(K)))
    return sum(losses) / len(losses)


def step(criterion, outputs):
    loss = criterion(outputs, BATCH, PROGRESS)
    with torch.no_grad():
        criterion.after_forward(detached(outputs), BATCH, detached(loss.terms), CONTEXT)


@pytest.mark.parametrize("views", PAIRS)
def test_pairs(views):
    assert pairs(views[1], views[0]) == PAIRS[views]


@pytest.mark.parametrize("tau_s, tau_t", [(0.1, 0.04), (0.2, 0.07)])
@pytest.mark.parametrize("views", PAIRS)
def test_the_loss_and_its_gradient(views, tau_s, tau_t):
    outputs, criterion = draw_outputs(*views), build(tau_s=tau_s, tau_t=tau_t)
    criterion.center.copy_(torch.linspace(-0.2, 0.3, K))
    loss, expected = criterion(outputs, BATCH, PROGRESS).total, by_loops(outputs, criterion.center, tau_s, tau_t)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    used = outputs["student_logits"] if views[0] > 1 else outputs["student_logits"][1:]
    for found, wanted in zip(torch.autograd.grad(loss, used), torch.autograd.grad(expected, used), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        assert wanted.abs().max() > 1e-3


def test_the_teacher_gets_no_gradient():
    outputs = draw_outputs()
    outputs["teacher_logits"] = [t.requires_grad_() for t in outputs["teacher_logits"]]
    build()(outputs, BATCH, PROGRESS).total.backward()
    assert all(t.grad is None for t in outputs["teacher_logits"])


def test_the_centre_is_a_running_mean_and_counts_from_the_next_step():
    criterion, center = build(center_momentum=0.9), torch.zeros(K, dtype=torch.float64)
    for seed in range(3):
        outputs = draw_outputs(seed=seed)
        expected = by_loops(outputs, center, 0.1, 0.04)
        assert criterion(outputs, BATCH, PROGRESS).total.item() == pytest.approx(expected.item(), rel=1e-6)
        step(criterion, outputs)
        center = 0.9 * center + 0.1 * torch.cat(outputs["teacher_logits"]).mean(dim=0)
        torch.testing.assert_close(criterion.center, center, rtol=1e-6, atol=1e-8)
    assert "center" in criterion.state_dict()


def test_what_is_watched():
    outputs, criterion = draw_outputs(), build()
    p = torch.cat([(t / 0.04).softmax(1) for t in outputs["teacher_logits"]])
    found = criterion.eval()(outputs, BATCH, PROGRESS).terms
    assert found["assignment_entropy"].item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)
    assert found["marginal_entropy"].item() == pytest.approx(-(p.mean(0) * p.mean(0).log()).sum().item(), rel=1e-5)
    kl = (math.log(K) + (p * p.log()).sum(1)).mean()
    assert found["kl_to_uniform"].item() == pytest.approx(kl.item(), rel=1e-5)
    tops = {name: [z.argmax(dim=1) for z in views] for name, views in outputs.items()}
    same = [(tops["teacher_logits"][t] == tops["student_logits"][s]).double().mean() for t, s in PAIRS[2, 4]]
    assert found["top_agreement"].item() == pytest.approx(sum(same).item() / 6)
    assert 0 < found["top_agreement"] < 1


def test_collapse_is_named(caplog, tmp_path):
    """Of both kinds; the teacher's outputs count less their running mean."""
    for kind in ("uniform", "one prototype"):
        criterion, outputs = build(center_momentum=1.0), draw_outputs()
        step(criterion, outputs)
        criterion.on_epoch_end(CONTEXT)
        assert "collapse" not in caplog.text
        rows = torch.zeros(K) if kind == "uniform" else torch.eye(K)[2]
        outputs["teacher_logits"] = [rows.double().expand(B, K)] * 2
        for _ in range(500):
            step(criterion, outputs)
        criterion.on_epoch_end(CONTEXT)
        assert "dino: collapse to " in caplog.text and kind in caplog.text
        caplog.clear()
    criterion.assignments.draw(tmp_path)
    assert (tmp_path / "occupancy.png").stat().st_size > 1000


@pytest.mark.parametrize("key", ["tau_s", "tau_t"])
@pytest.mark.parametrize("value", [0.0, -0.1])
def test_mistakes(key, value):
    problems: list[str] = []
    check_part("criterion", {"name": "dino", key: value}, "criterion", problems)
    assert len(problems) == 1 and problems[0].startswith(f"criterion.{key}: expected greater than 0")


def test_one_view_has_nobody_to_teach_it():
    with pytest.raises(UserError, match="at least 2 views"):
        build(views=1)
    for students, teachers in ((1, 1), (1, 2)):
        with pytest.raises(UserError, match=f"got {students} of the student and {teachers} of the teacher"):
            pairs(students, teachers)


# --- several processes


def learned(images: slice) -> dict[str, torch.Tensor]:
    """The loss after two steps, its gradient to one view of the student, and the running statistics."""
    criterion = build(center_momentum=0.5)
    for seed in range(2):
        step(criterion, {name: [z[images] for z in views] for name, views in draw_outputs(seed=seed).items()})
    outputs = {name: [z.detach()[images] for z in views] for name, views in draw_outputs(seed=5).items()}
    logits = outputs["student_logits"][1].requires_grad_()
    loss = criterion(outputs, BATCH, PROGRESS).total
    (gradient,) = torch.autograd.grad(loss, logits)
    shares = distributed.gather(gradient) / distributed.world_size()
    return {"loss": distributed.all_reduce_mean(loss.detach()), "gradient": shares, **criterion.state_dict()}


def work(rank: int, port: int, folder: str, ranks: int) -> None:
    join(rank, ranks, port)
    share = B // ranks
    torch.save(learned(slice(share * rank, share * (rank + 1))), f"{folder}/{rank}.pt")
    distributed.shutdown()


@pytest.mark.parametrize("ranks", RANKS)
def test_processes_are_one(tmp_path, ranks):
    expected = learned(slice(0, B))
    assert expected["center"].abs().max() > 0.01
    for found in answers_of(partial(work, ranks=ranks), ranks, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


# --- a run


@pytest.fixture(scope="module")
def steps():
    """What stood at every step of a real run: before_step's and after_step's view of model and optimiser."""
    found = []
    before_step, after_step = StudentTeacher.before_step, StudentTeacher.after_step
    with pytest.MonkeyPatch.context() as patch:

        def before(part, ctx):
            before_step(part, ctx)
            last, teacher = part.head.last.weight, part.teacher.networks
            weights = [p.detach().clone() for p in teacher.parameters()]
            found.append({"epoch": ctx.progress.epoch, "frozen": last.grad is None, "last": last.detach().clone()})
            found[-1] |= {"teacher": weights, "decay": [g["weight_decay"] for g in trainer.optimizer.param_groups]}
            found[-1] |= {"momentum": part.momentum, "tau_t": trainer.run.criterion.tau_t}

        def after(part, ctx):
            students = [*part.student.parameters(), *part.head.parameters()]
            found[-1]["student"] = [p.detach().clone() for p in students]
            after_step(part, ctx)
            found[-1]["moved"] = [p.detach().clone() for p in part.teacher.networks.parameters()]
            found[-1]["last_after"] = part.head.last.weight.detach().clone()

        patch.setattr(StudentTeacher, "before_step", before)
        patch.setattr(StudentTeacher, "after_step", after)
        trainer = Trainer(build_run(resolve(TINY, SMALL, load_plugins([PARTS]))), None)
        trainer.last_step = trainer.total_steps
        trainer.fit()
    assert len(found) == 3 * STEPS
    return found


def test_the_last_layer_is_frozen_for_an_epoch(steps):
    for number, found in enumerate(steps):
        assert found["frozen"] == (number < STEPS)
        assert torch.equal(found["last"], found["last_after"]) == (number < STEPS)


@pytest.mark.parametrize("number", [0, 1, 7, 14])
def test_the_teacher_follows_with_the_scheduled_momentum(steps, number):
    found, share = steps[number], number / (3 * STEPS)
    momentum = 1 - 0.1 * (1 + math.cos(math.pi * share)) / 2
    assert found["momentum"] == pytest.approx(momentum)
    for old, source, new in zip(found["teacher"], found["student"], found["moved"], strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * source)
    # The learning rate starts at 0, and the teacher as the student.
    assert any(not torch.equal(a, b) for a, b in zip(found["teacher"], found["moved"], strict=True)) == (number > 0)


def test_weight_decay_and_temperature_are_scheduled(steps):
    for number, found in enumerate(steps):
        share = number / (3 * STEPS)
        decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * share)) / 2
        # Biases and other vectors never decay.
        assert sorted(set(found["decay"])) == pytest.approx([0.0, decay])
        assert found["tau_t"] == pytest.approx(0.04 + 0.03 * min(number / STEPS, 1.0))

"""SVIB against softmaxes written out in float64, and its prototypes' second birth in real runs.

Shapes: B images, V student views of which the first G are also the teacher's, K prototypes, D embedding.
"""

import itertools
import math
import os
import shutil
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import PARTS, TINY, assert_same_run, checkpoint, losses, train
from ranks import RANKS, answers_of, join

from ssl_ib import Batch, Progress, RunInfo, UserError, distributed, ops, random
from ssl_ib.config.config import resolve
from ssl_ib.config.plugins import load_plugins
from ssl_ib.config.registry import build_part, check_part
from ssl_ib.criterions.svib import SVIB
from ssl_ib.part import Context, detached
from ssl_ib.run import build_run
from ssl_ib.trainer import Trainer

B, K, D = 3, 7, 5
PROGRESS = Progress(3, 1, 20, 10)
CONTEXT = Context(PROGRESS, lambda *a: None, lambda p: None)
BATCH = Batch([], [], torch.arange(B), torch.arange(B))
#: By hand: (teacher's view, student's view).
PAIRS = {
    (2, 4): [(0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)],
    (1, 3): [(0, 1), (0, 2)],
    (2, 2): [(0, 1), (1, 0)],
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_outputs(
    teachers: int = 2, students: int = 4, images: int = B, width: int = D
) -> dict[str, list[torch.Tensor]]:
    """Unit vectors; the student's take gradients."""
    student = [F.normalize(draw(images, width, seed=v), dim=1).requires_grad_() for v in range(students)]
    return {
        "student": student,
        "teacher": [F.normalize(draw(images, width, seed=50 + v), dim=1) for v in range(teachers)],
    }


def info(views: int = 4, images: int = 1000, width: int = D, **more) -> RunInfo:
    return RunInfo(((3, 8, 8),) * views, B, images=lambda: images, width=lambda name: width, **more)


def build(views: int = 4, width: int = D, images: int = 1000, **given) -> SVIB:
    """Prototypes and all else in float64."""
    criterion = SVIB(info(views, images, width), **{"K": K, **given}).double()
    with torch.no_grad():
        criterion.prototypes.weight.copy_(draw(criterion.num_prototypes, width, seed=99))
    criterion.prototypes.rescale()
    return criterion


def explicit(
    outputs,
    c,
    beta=0.5,
    tau_s=0.1024,
    tau_t=0.04,
    kl_grad="prototypes",
    detach=True,
    q=None,
    mean=None,
    pairs=None,
):
    """(cross-entropy, divergence) from explicit softmaxes over the unit prototypes c, image by image."""
    student, teacher = outputs["student"], outputs["teacher"]
    q = torch.full((len(c),), 1 / len(c), dtype=torch.float64) if q is None else q

    none = torch.zeros(len(c), dtype=torch.float64)
    shift = none if mean is None else torch.stack([mean @ row for row in c])

    def p(z, tau, shift=none):
        weights = [((z @ c[k] - shift[k]) / tau).exp() for k in range(len(c))]
        return torch.stack(weights) / sum(weights)

    def teachers(t, b):
        return p(teacher[t][b].detach(), tau_t, shift)

    entropies, images = [], len(student[0])
    for t, s in pairs or PAIRS[len(teacher), len(student)]:
        for b in range(images):
            target = teachers(t, b)
            target = target.detach() if detach else target
            entropies.append(-(target * p(student[s][b], tau_s).log()).sum())
    divergences = []
    for t in range(len(teacher)):
        for b in range(images):
            found = p(student[t][b], tau_s) if kl_grad == "student" else teachers(t, b)
            divergences.append((found * (found / q).log()).sum())
    divergence = sum(divergences) / len(divergences)
    return sum(entropies) / len(entropies), divergence.detach() if kl_grad == "none" else divergence


def gradients(value, outputs, criterion) -> list[torch.Tensor]:
    leaves = [*outputs["student"], criterion.prototypes.weight]
    found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def step(criterion: SVIB, outputs, ctx=CONTEXT) -> dict[str, torch.Tensor]:
    """A forward and its hook, as the trainer has them; the terms."""
    loss = criterion(outputs, BATCH, PROGRESS)
    with torch.no_grad():
        criterion.after_forward(detached(outputs), BATCH, detached(loss.terms), ctx)
    return loss.terms


# --- equations 17 to 20


@pytest.mark.parametrize("views", PAIRS)
def test_the_loss_and_its_gradients(views):
    outputs, criterion = draw_outputs(*views), build(views[1], beta=0.3)
    loss = criterion(outputs, BATCH, PROGRESS)
    cross_entropy, divergence = explicit(outputs, criterion.prototypes.weight)
    torch.testing.assert_close(loss.terms["cross_entropy"], cross_entropy)
    torch.testing.assert_close(loss.terms["kl_to_prior"], divergence)
    torch.testing.assert_close(loss.total, cross_entropy + 0.3 * divergence)
    ours = gradients(loss.total, outputs, criterion)
    for found, expected in zip(ours, gradients(cross_entropy + 0.3 * divergence, outputs, criterion), strict=True):
        torch.testing.assert_close(found, expected)
    # The only global crop has no teacher but itself.
    assert [float(g.abs().max()) > 1e-3 for g in ours] == [views[0] > 1] + [True] * views[1]


def test_a_view_is_not_compared_with_itself():
    outputs, criterion = draw_outputs(1, 3), build(3)
    before = criterion(outputs, BATCH, PROGRESS).terms["cross_entropy"]
    outputs["student"][0] = F.normalize(draw(B, D, seed=7), dim=1)
    assert torch.equal(criterion(outputs, BATCH, PROGRESS).terms["cross_entropy"], before)
    outputs["student"][1] = outputs["student"][0]
    assert not torch.equal(criterion(outputs, BATCH, PROGRESS).terms["cross_entropy"], before)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 2.0])
def test_identity(beta):
    """L = KL(p_t || p_s) + (1 - beta) H(p_t) + beta log K for a uniform q and one pair."""
    outputs, criterion = draw_outputs(1, 2), build(2, beta=beta)
    c = F.normalize(criterion.prototypes.weight, dim=1)
    p_t, p_s = (
        (z @ c.T / tau).softmax(1) for z, tau in ((outputs["teacher"][0], 0.04), (outputs["student"][1], 0.1024))
    )
    divergence = (p_t * (p_t / p_s).log()).sum(1).mean()
    entropy = -(p_t * p_t.log()).sum(1).mean()
    total = criterion(outputs, BATCH, PROGRESS).total
    torch.testing.assert_close(total, divergence + (1 - beta) * entropy + beta * math.log(K))


@pytest.mark.parametrize(
    "kl_grad, detach, q, center",
    [*itertools.product(["prototypes", "student", "none"], [True, False], ["uniform", "ema_marginal"], [False, True])],
)
def test_every_switch_moves_what_its_equation_says(kl_grad, detach, q, center):
    """Loss and both gradients after a step that moved the running mean assignment and the centre."""
    outputs = draw_outputs()
    criterion = build(kl_grad=kl_grad, ce_target_detach=detach, q=q, center=center, usage_momentum=0.6)
    step(criterion, {name: [z.detach().roll(1, 1) for z in views] for name, views in outputs.items()})
    prior = criterion.assignments.usage.clone() if q == "ema_marginal" else None
    mean = criterion.mean_teacher.clone() if center else None
    weight = criterion.prototypes.weight
    expected = explicit(outputs, weight, kl_grad=kl_grad, detach=detach, q=prior, mean=mean)
    loss = criterion(outputs, BATCH, PROGRESS)
    torch.testing.assert_close(loss.terms["cross_entropy"], expected[0])
    torch.testing.assert_close(loss.terms["kl_to_prior"], expected[1])
    for name, term in zip(("cross_entropy", "kl_to_prior"), expected, strict=True):
        if not term.requires_grad:
            assert not loss.terms[name].requires_grad
            continue
        for found, wanted in zip(
            gradients(loss.terms[name], outputs, criterion), gradients(term, outputs, criterion), strict=True
        ):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "kl_grad, student, prototypes", [("prototypes", False, True), ("student", True, True), ("none", False, False)]
)
def test_what_the_divergence_moves(kl_grad, student, prototypes):
    outputs, criterion = draw_outputs(), build(kl_grad=kl_grad)
    # The teacher's embeddings are a graph here, which no gradient may enter.
    leaf = draw(B, D, seed=5).requires_grad_()
    outputs["teacher"][0] = F.normalize(leaf, dim=1)
    loss = criterion(outputs, BATCH, PROGRESS)
    total = 0.0 * loss.total + loss.terms["kl_to_prior"]
    found = torch.autograd.grad(total, [*outputs["student"], criterion.prototypes.weight, leaf], allow_unused=True)
    sizes = [0.0 if g is None else float(g.abs().max()) for g in found]
    assert [size > 1e-4 for size in sizes[:2]] == [student, student]
    assert sizes[2:4] == [0.0, 0.0] and sizes[5] == 0.0
    assert (sizes[4] > 1e-4) == prototypes
    if not student:
        assert sizes[:2] == [0.0, 0.0]
    if not prototypes:
        assert sizes[4] == 0.0


@pytest.mark.parametrize("kl_grad", ["prototypes", "none"])
def test_beta_does_not_reach_the_encoder_unless_asked(kl_grad):
    """The student's gradient is the cross-entropy's, whatever beta; the prototypes' is only under `none`."""
    found = {}
    for beta in (0.0, 5.0):
        outputs, criterion = draw_outputs(), build(kl_grad=kl_grad, beta=beta)
        found[beta] = gradients(criterion(outputs, BATCH, PROGRESS).total, outputs, criterion)
    assert all(torch.equal(a, b) for a, b in zip(found[0.0][:-1], found[5.0][:-1], strict=True))
    assert torch.equal(found[0.0][-1], found[5.0][-1]) == (kl_grad == "none")


# --- temperatures, prior, centre


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("tau_from", ["sigma2", "sigma"])
def test_temperatures(tau_from, factor):
    """Softmax of -(z - c)^2 / 2 sigma^2 for a factor of 1, and of -(z - c)^2 / sigma^2 for 2."""
    outputs, criterion = draw_outputs(), build(tau_from=tau_from, gauss_factor=factor, sigma_s=0.5, sigma_t=0.3)
    power = 2 if tau_from == "sigma2" else 1
    expected = explicit(outputs, criterion.prototypes.weight, tau_s=0.5**power / factor, tau_t=0.3**power / factor)
    loss = criterion(outputs, BATCH, PROGRESS)
    torch.testing.assert_close(loss.terms["cross_entropy"], expected[0])
    torch.testing.assert_close(loss.terms["kl_to_prior"], expected[1])
    if tau_from == "sigma2":
        c = F.normalize(criterion.prototypes.weight, dim=1)
        squares = torch.cdist(outputs["teacher"][0], c).square()
        p = (-squares * factor / (2 * 0.3**2)).softmax(1)
        torch.testing.assert_close(p, (outputs["teacher"][0] @ c.T / criterion.tau(0.3)).softmax(1))


def test_the_papers_temperatures_are_dinos():
    criterion = build()
    assert criterion.tau(criterion.sigma_t) == pytest.approx(0.04)
    assert criterion.tau(criterion.sigma_s) == pytest.approx(0.1024)


def test_the_running_prior():
    criterion, uniform = build(q="ema_marginal", usage_momentum=0.9), build(q="uniform")
    outputs = draw_outputs()
    # Until something was seen it is the uniform one.
    torch.testing.assert_close(criterion(outputs, BATCH, PROGRESS).total, uniform(outputs, BATCH, PROGRESS).total)
    c = F.normalize(criterion.prototypes.weight.detach(), dim=1)
    expected = torch.full((K,), 1 / K, dtype=torch.float64)
    for shift in range(3):
        moved = {name: [z.detach().roll(shift, 1) for z in views] for name, views in outputs.items()}
        step(criterion, moved)
        mean = torch.stack([(z @ c.T / 0.04).softmax(1).mean(0) for z in moved["teacher"]]).mean(0)
        expected = 0.9 * expected + 0.1 * mean
    torch.testing.assert_close(criterion.assignments.usage, expected)
    assert criterion.assignments.usage.sum().item() == pytest.approx(1.0)
    assert not torch.isclose(
        criterion(outputs, BATCH, PROGRESS).terms["kl_to_prior"], uniform(outputs, BATCH, PROGRESS).terms["kl_to_prior"]
    )


def test_the_centre_is_the_running_mean_of_the_teachers_cosines():
    criterion, outputs = build(center=True, center_momentum=0.9, kl_grad="none"), draw_outputs()
    c = F.normalize(criterion.prototypes.weight.detach(), dim=1)
    mean = torch.zeros(K, dtype=torch.float64)
    for shift in range(3):
        moved = {name: [z.detach().roll(shift, 1) for z in views] for name, views in outputs.items()}
        step(criterion, moved)
        mean = 0.9 * mean + 0.1 * (torch.cat(moved["teacher"]) @ c.T).mean(0)
    p_t = [((z @ c.T - mean) / 0.04).softmax(1) for z in outputs["teacher"]]
    log_p = [(z @ c.T / 0.1024).log_softmax(1) for z in outputs["student"]]
    expected = sum(-(p_t[t] * log_p[s]).sum(1).mean() for t, s in PAIRS[2, 4]) / 6
    found = criterion(outputs, BATCH, PROGRESS).terms
    torch.testing.assert_close(found["cross_entropy"], expected)
    entropy = torch.stack([-(p * p.log()).sum(1).mean() for p in p_t]).mean()
    torch.testing.assert_close(found["assignment_entropy"], entropy)
    assert not torch.isclose(build()(outputs, BATCH, PROGRESS).terms["cross_entropy"], expected)


def test_what_is_watched():
    outputs, criterion = draw_outputs(), build()
    c = F.normalize(criterion.prototypes.weight.detach(), dim=1)
    p = torch.cat([(z @ c.T / 0.04).softmax(1) for z in outputs["teacher"]])
    found = criterion.eval()(outputs, BATCH, PROGRESS).terms
    torch.testing.assert_close(found["assignment_entropy"], -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(found["marginal_entropy"], -(p.mean(0) * p.mean(0).log()).sum())
    cosines = [(outputs["student"][s] * outputs["teacher"][t]).sum(1).mean() for t, s in PAIRS[2, 4]]
    torch.testing.assert_close(found["agreement"], (sum(cosines) / 6).detach())
    assert not any(
        found[n].requires_grad for n in ("assignment_entropy", "marginal_entropy", "dead_prototypes", "agreement")
    )


def test_dead_prototypes_show_within_few_steps():
    outputs, criterion = draw_outputs(), build()
    with torch.no_grad():
        # Two prototypes far from everything, the others where the teacher's embeddings are.
        criterion.prototypes.weight[:5] = torch.cat(outputs["teacher"])[:5]
        criterion.prototypes.weight[5:] = -outputs["teacher"][0].sum(0)
    criterion.prototypes.rescale()
    assert step(criterion, outputs)["dead_prototypes"] == 0.0
    assert step(criterion, outputs)["dead_prototypes"].item() == pytest.approx(2 / 7)


# --- the schedule, the number of prototypes, mistakes


def test_beta_follows_the_papers_schedule():
    given = {"name": "svib", "K": 8, "beta": {"from": 0.5, "to": 0.01, "shape": "exponential"}}
    problems: list[str] = []
    answer = build_part("criterion", check_part("criterion", given, "criterion", problems), info=info())
    assert not problems
    ((owner, name, schedule),) = answer.schedules
    assert owner is answer.part and name == "beta"
    for epoch in (0.0, 0.5, 50.0, 99.5, 100.0):
        assert schedule.at(epoch, 100) == pytest.approx(0.5 * 0.02 ** (epoch / 100))
    owner.double().beta = schedule.at(50, 100)
    terms = (loss := owner(draw_outputs(), BATCH, PROGRESS)).terms
    assert loss.total.item() == pytest.approx((terms["cross_entropy"] + 0.070710678 * terms["kl_to_prior"]).item())


def test_a_prototype_that_the_prior_does_not_know_keeps_the_divergence_finite():
    criterion, outputs = build(q="ema_marginal"), draw_outputs()
    usage = torch.tensor([0.0, *[1 / (K - 1)] * (K - 1)], dtype=torch.float64)
    criterion.assignments.usage.copy_(usage)
    c = F.normalize(criterion.prototypes.weight.detach(), dim=1)
    p = torch.cat([(z @ c.T / 0.04).softmax(1) for z in outputs["teacher"]])
    expected = (p * (p / usage.clamp(min=1e-12)).log()).sum(1).mean()
    assert criterion(outputs, BATCH, PROGRESS).terms["kl_to_prior"].item() == pytest.approx(expected.item())


def test_the_centre_counts_in_evaluation_too():
    criterion, outputs = build(center=True, center_momentum=0.5), draw_outputs()
    step(criterion, outputs)
    training = criterion(outputs, BATCH, PROGRESS).total
    assert torch.equal(criterion.eval()(outputs, BATCH, PROGRESS).total, training)
    criterion.mean_teacher.zero_()
    assert not torch.isclose(criterion(outputs, BATCH, PROGRESS).total, training)


def test_there_are_no_more_prototypes_than_images(caplog):
    caplog.set_level("INFO")
    assert SVIB(info(images=40), K=65).num_prototypes == 40
    assert SVIB(info(images=40), K=39).prototypes.weight.shape == (39, D)
    assert SVIB(info(images=40, cap=12), K=39).num_prototypes == 12
    assert "svib: 40 prototypes in place of K=65, one a training image" in caplog.text
    assert "K=39" not in caplog.text
    with pytest.raises(UserError, match="at least 2 of them, got 1"):
        SVIB(info(images=1), K=65)
    assert SVIB(info(images=40)).assignments.usage.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong", ["K: 1", "sigma_t: 0.0", "sigma_s: -0.1", "gauss_factor: 3", "q: other", "beta: -1.0"]
)
def test_mistakes(wrong):
    key, value = wrong.split(": ")
    problems: list[str] = []
    value = value if key == "q" else float(value) if "." in value else int(value)
    check_part("criterion", {"name": "svib", key: value}, "criterion", problems)
    assert len(problems) == 1 and problems[0].startswith(f"criterion.{key}: expected")


def test_one_view_has_nobody_to_teach_it():
    with pytest.raises(UserError, match="at least 2 views"):
        SVIB(info(views=1))


# --- cost


def largest_allocation(criterion: SVIB, outputs) -> int:
    """Bytes of the largest allocation of one operation, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        criterion(outputs, BATCH, PROGRESS).total.backward()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_no_tensor_of_images_by_prototypes():
    many, images, width = 65536, 64, 4
    torch.manual_seed(0)
    criterion = SVIB(info(2, 10**6, width), K=many)
    outputs = {name: [z.detach().float() for z in v] for name, v in draw_outputs(2, 2, images, width).items()}
    outputs["student"] = [z.requires_grad_() for z in outputs["student"]]
    found = {}
    for backend in ("chunked", "reference"):
        with ops.use_backend(backend), ops.record() as ran:
            found[backend] = largest_allocation(criterion, outputs)
        assert {used for _, used in ran} == {backend}
    # A view's matrix would have 16 MB.
    assert found["reference"] >= 4 * 2 * images * many and found["chunked"] < 4 * images * many
    with ops.record() as ran:
        criterion(outputs, BATCH, PROGRESS).total.backward()
    assert {used for _, used in ran} == {"chunked"}


@pytest.mark.parametrize("kl_grad, of_student", [("prototypes", 0), ("student", 1), ("none", 0)])
def test_the_teacher_is_scored_once(monkeypatch, kl_grad, of_student):
    both, alone, crops, posterior = [], [], ops.gmm_crops, ops.gmm_posterior
    monkeypatch.setattr(ops, "gmm_crops", lambda s, t, *rest: both.append(t) or crops(s, t, *rest))
    monkeypatch.setattr(ops, "gmm_posterior", lambda t, *rest, **more: alone.append(t) or posterior(t, *rest, **more))
    outputs, criterion = draw_outputs(), build(kl_grad=kl_grad)
    criterion(outputs, BATCH, PROGRESS)
    assert len(both) == 1 and len(alone) == of_student
    assert torch.equal(both[0], torch.cat(outputs["teacher"]))
    assert not alone or torch.equal(alone[0], torch.cat(outputs["student"][:2]))


@pytest.mark.parametrize("center", [False, True])
def test_chunked_is_reference(center):
    found = {}
    for backend in ("reference", "chunked"):
        outputs, criterion = draw_outputs(), build(q="ema_marginal", center=center, ce_target_detach=False)
        with ops.use_backend(backend):
            step(criterion, draw_outputs())
            found[backend] = gradients(criterion(outputs, BATCH, PROGRESS).total, outputs, criterion)
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)


# --- collapse


def test_collapse_to_one_assignment_is_named():
    criterion, outputs = build(), draw_outputs()
    assert criterion.assignments.collapse() is None
    step(criterion, outputs)
    assert criterion.assignments.collapse() is None
    with torch.no_grad():
        criterion.prototypes.weight[:] = criterion.prototypes.weight[0]
    step(criterion, outputs)
    assert "uniform assignment: 1.946 of at most 1.946 nats" in criterion.assignments.collapse()


def test_collapse_to_one_prototype_is_named_within_a_short_epoch(caplog):
    """The running mean starts at the uniform assignment, which at a momentum of .99 takes hundreds of steps to fade."""
    criterion, outputs = build(kl_grad="none"), draw_outputs()
    one = torch.cat([torch.ones(1, D), -torch.eye(D), -torch.ones(1, D)])
    for _ in range(20):
        step(criterion, outputs)
    with torch.no_grad():
        criterion.on_epoch_end(Context(PROGRESS, lambda *asked: one, lambda p: None))
    assert not caplog.text
    outputs["teacher"] = [F.normalize(torch.ones(B, D, dtype=torch.float64), dim=1)] * 2
    for _ in range(3):
        step(criterion, outputs)
    assert "one prototype" in criterion.assignments.collapse()
    criterion.on_epoch_end(Context(replace(PROGRESS, epoch=9), lambda *asked: one, lambda p: None))
    assert "svib: collapse to one prototype: 1.0 of 7 in use" in caplog.text


# --- new prototypes


def test_new_prototypes_come_from_whom_was_asked():
    asked, forgotten = [], []

    def collect(name, n, draw):
        asked.append((name, n, draw))
        return F.normalize(draw_of(n, draw), dim=1)

    def draw_of(n, seed):
        return draw(n, D, seed=seed)

    ctx = Context(replace(PROGRESS, epoch=4), collect, forgotten.append)
    for source, reset in (("teacher", True), ("student", False)):
        criterion = build(reinit_src=source, reinit_reset_opt=reset)
        step(criterion, draw_outputs())
        with torch.no_grad():
            criterion.on_epoch_end(ctx)
        assert asked.pop() == (source, K, 4)
        torch.testing.assert_close(criterion.prototypes.weight.detach(), F.normalize(draw(K, D, seed=4), dim=1))
        torch.testing.assert_close(criterion.assignments.usage, torch.full((K,), 1 / K, dtype=torch.float64))
        assert [p is criterion.prototypes.weight for p in forgotten] == [True] * reset
        forgotten.clear()
    criterion = build(reinit=False)
    criterion.on_epoch_end(ctx)
    build().on_epoch_end(Context(replace(PROGRESS, epoch=9), collect, forgotten.append))  # the last of 10
    assert not asked and not forgotten


MODEL = (
    "model={name: student_teacher, backbone: vit_tiny_patch16_224, head_hidden: 16, head_dim: 8, momentum: 0.9, "
    "backbone_args: {patch_size: 4, embed_dim: 24, depth: 1, num_heads: 3}}"
)
SMALL = (
    MODEL,
    "criterion={name: svib, K: 20, beta: {from: 0.5, to: 0.01, shape: exponential}}",
    "views={name: multi_crop, size: 8, local_size: 4, num_local: 2, blur_p: [0.0, 0.0, 0.0], crop_ratio: 1.0}",
    "masker=none",
    "epochs=3",
    "batch_size=256",
    "eval.linear.enabled=false",
)
STEPS = 5  # of 1438 images


class Watch:
    """What `on_epoch_end` did: by epoch, the prototypes before and after, and the optimiser's state of them."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.found, self.stop_at = {}, None
        original, fit = SVIB.on_epoch_end, Trainer.fit

        def on_epoch_end(part, ctx):
            weight, state = part.prototypes.weight, self.trainer.optimizer.state
            before, known, usage = weight.detach().clone(), weight in state, part.assignments.usage.clone()
            original(part, ctx)
            features = None
            if not torch.equal(before, weight):
                features = ctx.collect("teacher", 1438, ctx.progress.epoch)
            entry = (
                before,
                weight.detach().clone(),
                (known, weight in state),
                (usage, part.assignments.usage.clone()),
                features,
            )
            self.found.setdefault(ctx.progress.epoch, []).append(entry)

        def after_step(part, ctx):
            if ctx.progress.step == self.stop_at:
                self.stop_at = None
                os.kill(os.getpid(), signal.SIGTERM)

        def watched(trainer):
            self.trainer = trainer
            return fit(trainer)

        patch.setattr(SVIB, "on_epoch_end", on_epoch_end)
        patch.setattr(SVIB, "after_step", after_step)
        patch.setattr(Trainer, "fit", watched)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("svib") / "run"
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        assert train(out, *SMALL) == 0
    return out, watch.found


def test_prototypes_become_features_of_other_images_each_epoch(whole):
    _, found = whole
    assert [len(found[epoch]) for epoch in range(3)] == [1, 1, 1]
    fresh = {}
    for epoch in (0, 1):
        before, after, (known, kept), (usage, reset), features = found[epoch][0]
        assert known and not kept and not torch.equal(before, after)
        torch.testing.assert_close(after.norm(dim=1), torch.ones(20))
        assert usage.std() > 0 and torch.equal(reset, torch.full((20,), 0.05))
        # The first rows of the same draw: features of 20 training images, without augmentation.
        torch.testing.assert_close(after, features[:20])
        fresh[epoch] = after
    assert not torch.isclose(fresh[0], fresh[1]).any(dim=1).all()
    before, after, (known, kept), *_ = found[2][0]
    assert torch.equal(before, after) and known and kept
    orders = [random.shuffled(0, epoch, 1438)[:20] for epoch in (0, 1)]
    assert len(set(orders[0].tolist())) == 20 and set(orders[0].tolist()) != set(orders[1].tolist())


@pytest.mark.parametrize("at", [STEPS + 2, STEPS])
def test_a_resumed_run_does_not_repeat_it(whole, tmp_path, monkeypatch, at):
    """Stopped in the middle of the second epoch, and in the last step of the first."""
    out, watch = tmp_path / "run", Watch(monkeypatch)
    watch.stop_at = at
    assert train(out, *SMALL) == 143
    assert checkpoint(out)["step"] == at and list(watch.found) == [0]
    assert train(out, "--resume", *SMALL) == 0
    assert [len(watch.found[epoch]) for epoch in range(3)] == [1, 1, 1]
    assert_same_run(out, whole[0])
    for epoch in (0, 1):
        assert torch.equal(watch.found[epoch][0][1], whole[1][epoch][0][1])
    assert len(losses(out)) == 3 * STEPS
    shutil.rmtree(out)


# --- several processes


def learned(parallel: bool, rows: slice) -> dict[str, torch.Tensor]:
    """The loss, the student's gradient, and the running statistics of two steps."""
    outputs = draw_outputs(images=6)
    outputs = {name: [z.detach()[rows].requires_grad_(name == "student") for z in v] for name, v in outputs.items()}
    criterion = build(center=True, q="ema_marginal", usage_momentum=0.5)
    step(criterion, outputs)
    loss = criterion(outputs, BATCH, PROGRESS).total
    loss.backward()
    weight = distributed.all_reduce_mean(criterion.prototypes.weight.grad)
    return {
        "loss": distributed.all_reduce_mean(loss.detach()),
        "weight": weight,
        **{name: buffer.clone() for name, buffer in criterion.named_buffers()},
    }


def work(rank: int, port: int, path: str, ranks: int) -> None:
    join(rank, ranks, port)
    share = 6 // ranks
    answers = learned(True, slice(share * rank, share * (rank + 1)))
    trainer = Trainer(build_run(resolve(TINY, (*SMALL, "batch_size=192"), load_plugins([PARTS]))), None)
    # Two steps end the first epoch, of three, as in a dry run.
    trainer.last_step = 2
    trainer.fit()
    assert trainer.step == 2
    answers |= {
        "prototypes": trainer.run.criterion.prototypes.weight.detach(),
        "usage_of_run": trainer.run.criterion.assignments.usage,
        "features": trainer.online.collect("teacher", 20, 0),
        "state": torch.tensor(trainer.run.criterion.prototypes.weight in trainer.optimizer.state),
    }
    torch.save(answers, f"{path}/{rank}.pt")
    distributed.shutdown()


@pytest.fixture(scope="module", params=RANKS)
def ranks(request, tmp_path_factory) -> list[dict]:
    return answers_of(partial(work, ranks=request.param), request.param, tmp_path_factory.mktemp("ranks"))


def test_processes_learn_what_one_does(ranks):
    for name, expected in learned(False, slice(0, 6)).items():
        for answer in ranks:
            torch.testing.assert_close(answer[name], expected, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_processes_get_the_same_new_prototypes(ranks):
    first, *others = ranks
    assert all(torch.equal(first["prototypes"], other["prototypes"]) for other in others)
    torch.testing.assert_close(first["prototypes"], first["features"])
    for answer in ranks:
        assert torch.equal(answer["usage_of_run"], torch.full((20,), 0.05)) and not answer["state"]


def test_the_occupancy_is_kept_and_drawn(tmp_path):
    """A prototype that has 4 equal shares is in bin log2(4), those that have none are in the last one."""
    criterion = SVIB(RunInfo(((3, 16, 16),) * 2, batch_size=4, width=lambda name: 8), K=8, reinit=False)
    criterion.assignments.draw(tmp_path)
    criterion.assignments.usage.copy_(torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]))
    criterion.assignments.seen.fill_(1.0)
    for epoch in (0, 3):
        progress = Progress(epoch, epoch, 5, 5)
        criterion.on_epoch_end(Context(progress, lambda *given: None, lambda param: None))
    filled = criterion.assignments.occupancy[:, 0] >= 0
    assert filled.nonzero().flatten().tolist() == [0, 3]
    expected = torch.zeros(16)
    expected[0], expected[10] = 6 / 8, 2 / 8
    assert torch.equal(criterion.assignments.occupancy[3], expected)
    criterion.assignments.draw(tmp_path)
    assert (tmp_path / "occupancy.png").stat().st_size > 1000

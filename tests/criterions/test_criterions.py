"""The contrastive criterions and MRCL against Python loops in float64, with their invariants and gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from ssl_ib import Batch, Criterion, Loss, Masks, Progress, RunInfo, UserError, ops
from ssl_ib.config.registry import CRITERIONS, build_part, check_part
from ssl_ib.criterions.barlow_twins import BarlowTwins
from ssl_ib.criterions.byol import BYOL
from ssl_ib.criterions.info_nce import InfoNCE
from ssl_ib.criterions.moco_v3 import MoCoV3
from ssl_ib.criterions.mrcl import MRCL
from ssl_ib.part import parts

B, D, PROGRESS = 5, 4, Progress(0, 0, 10, 1)
ALL = [
    InfoNCE(),
    InfoNCE(negatives="cross"),
    InfoNCE(symmetric=False),
    InfoNCE(negatives="cross", symmetric=False),
    BarlowTwins(),
    BYOL(),
    MoCoV3(),
    MRCL(),
]
SYMMETRIC = [c for c in ALL if getattr(c, "symmetric", True)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_outputs(batch: int = B) -> dict[str, list[torch.Tensor]]:
    """Two views of every output, patches of 2 x 2 pixels with one channel on images of 4 x 4."""
    names = ("projection", "prediction", "target")
    outputs = {name: [draw(batch, D, seed=10 * i + v) for v in range(2)] for i, name in enumerate(names)}
    outputs["reconstruction"] = [draw(batch, 4, 4, seed=50 + v) for v in range(2)]
    return outputs


def draw_batch(batch: int = B, keeps=((0,), (2, 3))) -> Batch:
    """Two views of 4 x 4 pixels; `keeps` names the visible patches of each, None for a view without masks."""
    masks = [None if k is None else Masks.from_keep(torch.tensor([k] * batch, dtype=torch.int64), 4) for k in keeps]
    number = torch.arange(batch)
    return Batch([draw(batch, 1, 4, 4, seed=70 + v) for v in range(2)], masks, number, -torch.ones_like(number))


def score(criterion: Criterion, outputs, batch: Batch | None = None) -> Loss:
    return criterion(outputs, draw_batch() if batch is None else batch, PROGRESS)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.tolist(), b.tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def cross_entropy(row: torch.Tensor, candidates: list[torch.Tensor], positive: int, temperature: float) -> float:
    logits = [cosine(row, c) / temperature for c in candidates]
    return math.log(sum(math.exp(x) for x in logits)) - logits[positive]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("negatives", ["both", "cross"])
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_info_nce(symmetric, negatives, temperature):
    outputs = draw_outputs()
    directions = []
    for first, second in (outputs["projection"], outputs["projection"][::-1])[: 2 if symmetric else 1]:
        for i in range(B):
            others = [first[j] for j in range(B) if j != i] if negatives == "both" else []
            directions.append(cross_entropy(first[i], [*second, *others], i, temperature))
    loss = score(InfoNCE(temperature, negatives, symmetric), outputs)
    assert loss.total.item() == pytest.approx(mean(directions), rel=1e-12)
    assert loss.terms["info_nce"].item() == loss.total.item() and loss.weights == {"info_nce": 1.0}
    candidates = 2 * B - 1 if negatives == "both" else B
    assert loss.terms["mi_nats"].item() == pytest.approx(math.log(candidates) - mean(directions))
    similarity = mean(cosine(a, b) for a, b in zip(*outputs["projection"], strict=True))
    assert loss.terms["positive_similarity"].item() == pytest.approx(similarity)


def test_info_nce_of_indistinguishable_views_is_log_of_the_candidates():
    same = {"projection": [torch.ones(B, D).double()] * 2}
    for negatives, candidates in (("both", 2 * B - 1), ("cross", B)):
        loss = score(InfoNCE(0.1, negatives), same)
        assert loss.total.item() == pytest.approx(math.log(candidates))
        assert loss.terms["mi_nats"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("lambd", "scale"), [(0.0051, 1.0), (0.3, 0.1)])
def test_barlow_twins(lambd, scale):
    first, second = draw_outputs()["projection"]

    def column(z: torch.Tensor, i: int) -> list[float]:
        values = z[:, i].tolist()
        variance = mean((x - mean(values)) ** 2 for x in values)
        return [(x - mean(values)) / math.sqrt(variance + 1e-5) for x in values]

    diagonal = off_diagonal = 0.0
    for i in range(D):
        for j in range(D):
            c = mean(a * b for a, b in zip(column(first, i), column(second, j), strict=True))
            diagonal += (1 - c) ** 2 if i == j else 0
            off_diagonal += c**2 if i != j else 0
    loss = score(BarlowTwins(lambd, scale), {"projection": [first, second]})
    assert loss.total.item() == pytest.approx(scale * (diagonal + lambd * off_diagonal), rel=1e-12)
    assert loss.terms["invariance"].item() == pytest.approx(diagonal)
    assert loss.terms["redundancy"].item() == pytest.approx(off_diagonal)


def test_barlow_twins_standardises_as_batch_norm_does():
    first, second = (z * 3 + 7 for z in draw_outputs()["projection"])
    norm = torch.nn.BatchNorm1d(D, affine=False).double()
    c = norm(first).T @ norm(second) / B
    loss = score(BarlowTwins(lambd=1.0), {"projection": [first, second]})
    assert loss.total.item() == pytest.approx((c - torch.eye(D)).square().sum().item(), rel=1e-12)


def test_byol():
    outputs = draw_outputs()
    expected = 0.0
    for p, z in zip(outputs["prediction"], reversed(outputs["target"]), strict=True):
        expected += mean(2 - 2 * cosine(p[i], z[i]) for i in range(B))
    loss = score(BYOL(), outputs)
    assert loss.total.item() == pytest.approx(expected, rel=1e-12)
    assert loss.terms["positive_similarity"].item() == pytest.approx(1 - expected / 4)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_moco_v3(temperature):
    outputs = draw_outputs()
    pairs = zip(outputs["prediction"], reversed(outputs["target"]), strict=True)
    directions = [mean(cross_entropy(q[i], list(k), i, temperature) for i in range(B)) for q, k in pairs]
    loss = score(MoCoV3(temperature), outputs)
    assert loss.total.item() == pytest.approx(2 * temperature * sum(directions), rel=1e-12)
    assert loss.terms["mi_nats"].item() == pytest.approx(math.log(B) - mean(directions))


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: type(c).__name__)
def test_gradients_are_those_of_the_value(criterion):
    outputs = draw_outputs()
    names = [name for name in ("projection", "prediction", "reconstruction") if name in criterion.requires]

    def total(*leaves: torch.Tensor) -> torch.Tensor:
        given = {name: list(leaves[2 * i : 2 * i + 2]) for i, name in enumerate(names)}
        return score(criterion, outputs | given).total

    assert gradcheck(total, tuple(t.clone().requires_grad_() for name in names for t in outputs[name]))


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: type(c).__name__)
def test_targets_and_views_get_no_gradient_and_watched_terms_no_graph(criterion):
    outputs, batch = draw_outputs(), draw_batch()
    leaves = [t.requires_grad_() for t in (*outputs["target"], *batch.views)]
    for t in (*outputs["projection"], *outputs["prediction"], *outputs["reconstruction"]):
        t.requires_grad_()
    loss = score(criterion, outputs, batch)
    assert torch.autograd.grad(loss.total, leaves, allow_unused=True) == (None,) * len(leaves)
    for name, term in loss.terms.items():
        assert term.shape == () and term.requires_grad == (name in loss.weights)
    total = sum(weight * loss.terms[name].item() for name, weight in loss.weights.items())
    assert loss.total.item() == pytest.approx(total)


@pytest.mark.parametrize("criterion", SYMMETRIC, ids=lambda c: type(c).__name__)
def test_swapping_the_views_changes_nothing(criterion):
    outputs, batch = draw_outputs(), draw_batch()
    swapped = {name: views[::-1] for name, views in outputs.items()}
    mirrored = Batch(batch.views[::-1], batch.masks[::-1], batch.index, batch.label)
    assert score(criterion, swapped, mirrored).total.item() == pytest.approx(
        score(criterion, outputs, batch).total.item()
    )


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: type(c).__name__)
def test_permuting_the_batch_changes_nothing_but_mixing_pairs_does(criterion):
    outputs, batch, order = draw_outputs(), draw_batch(), torch.tensor([3, 0, 4, 1, 2])

    def shuffled(which: list[int]) -> float:
        given = {name: [t[order] if v in which else t for v, t in enumerate(views)] for name, views in outputs.items()}
        views = [t[order] if v in which else t for v, t in enumerate(batch.views)]
        return score(criterion, given, Batch(views, batch.masks, batch.index, batch.label)).total.item()

    assert shuffled([0, 1]) == pytest.approx(shuffled([]), rel=1e-12)
    assert abs(shuffled([0]) - shuffled([])) > 1e-4


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: type(c).__name__)
def test_losses_are_float32_under_autocast(criterion):
    outputs = {name: [t.float() for t in views] for name, views in draw_outputs().items()}
    rounded = {name: [t.bfloat16() for t in views] for name, views in outputs.items()}
    exact = {name: [t.double() for t in views] for name, views in rounded.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = score(criterion, rounded).total
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(score(criterion, exact).total.item(), rel=1e-5)


def test_two_views_are_needed():
    outputs = {name: [*views, views[0]] for name, views in draw_outputs().items()}
    for criterion in (InfoNCE(), BarlowTwins(), BYOL(), MoCoV3()):
        with pytest.raises(UserError, match="of 2 views, got 3"):
            score(criterion, outputs)


# --- MRCL


def patches_by_hand(pred, view, mask, rec_reduce):
    """(masked, unmasked) of one view; patches of 2 x 2 pixels, 2 a row."""
    groups, batch = {True: [], False: []}, len(pred)
    for b in range(batch):
        for patch in range(4):
            row, column = divmod(patch, 2)
            pixels = view[b, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten().tolist()
            error = sum((x - y) ** 2 for x, y in zip(pred[b, patch].tolist(), pixels, strict=True))
            groups[bool(mask[b, patch])].append(error)
    if rec_reduce == "group":
        return [mean(groups[g]) / 4 if groups[g] else 0.0 for g in (True, False)]
    return [sum(groups[g]) / batch / (4 * 4 if rec_reduce == "all" else 1) for g in (True, False)]


@pytest.mark.parametrize("rec_reduce", ["group", "all", "sum"])
@pytest.mark.parametrize("keeps", [((0,), (2, 3)), ((1, 2, 0), None), ((), (0, 1, 2, 3))])
def test_mrcl(rec_reduce, keeps):
    outputs, batch = draw_outputs(), draw_batch(keeps=keeps)
    masked = unmasked = 0.0
    for pred, view, masks in zip(outputs["reconstruction"], batch.views, batch.masks, strict=True):
        mask = torch.zeros(B, 4) if masks is None else masks.mask[:, 0]
        m, u = patches_by_hand(pred, view, mask, rec_reduce)
        masked, unmasked = masked + m, unmasked + u
    loss = score(MRCL(w_masked=3.0, w_unmasked=0.5, rec_reduce=rec_reduce), outputs, batch)
    inner = score(InfoNCE(0.2), outputs, batch)
    assert loss.total.item() == pytest.approx(inner.total.item() + 3 * masked + 0.5 * unmasked, rel=1e-12)
    assert loss.terms["reconstruction_masked"].item() == pytest.approx(masked)
    assert loss.terms["reconstruction_unmasked"].item() == pytest.approx(unmasked)
    assert loss.weights == {"info_nce": 1.0, "reconstruction_masked": 3.0, "reconstruction_unmasked": 0.5}
    assert set(inner.terms) <= set(loss.terms)


def test_mrcl_in_units_of_pixels():
    """The errors are those of the pixels that the views were standardised from, channel by channel."""
    mean, deviation = torch.tensor([0.4, 0.5, 0.3]), torch.tensor([0.25, 0.5, 0.125])  # powers of 2: exact
    pixels = [torch.rand(2, 3, 4, 4, dtype=torch.float64) for _ in range(2)]
    rebuilt = [torch.rand(2, 4, 12, dtype=torch.float64) for _ in range(2)]
    keep = Masks.from_keep(torch.tensor([[0, 3], [1, 2]]), 4)
    info = RunInfo(((3, 4, 4),) * 2, batch_size=2, deviation=deviation.tolist)

    def errors(criterion, views, patches):
        batch = Batch(views, [keep, keep], torch.arange(2), torch.zeros(2))
        terms = score(criterion, draw_outputs(2) | {"reconstruction": patches}, batch).terms
        return torch.stack([terms["reconstruction_masked"], terms["reconstruction_unmasked"]])

    standardised = [(x - mean[:, None, None]) / deviation[:, None, None] for x in pixels]
    patches = [(x - mean.repeat(4)) / deviation.repeat(4) for x in rebuilt]
    plain = errors(MRCL(rec_unit="standardised"), pixels, rebuilt)
    torch.testing.assert_close(errors(MRCL(info=info), standardised, patches), plain)
    torch.testing.assert_close(errors(MRCL(), pixels, rebuilt), plain)  # alone, it takes its views for pixels
    assert (errors(MRCL(info=info, rec_unit="standardised"), standardised, patches) > 3 * plain).all()
    # Standardised within their patch, pixels have no unit.
    a, b = (errors(MRCL(norm_pix=True, info=i), standardised, patches) for i in (info, None))
    assert torch.equal(a, b)


def test_mrcl_with_norm_pix_reconstructs_standardised_patches():
    outputs, batch = draw_outputs(), draw_batch()
    targets = []
    for view in batch.views:
        patches = ops.patchify(view, 2)
        targets.append((patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt())
    perfect = score(MRCL(norm_pix=True), outputs | {"reconstruction": targets}, batch)
    assert perfect.total.item() == pytest.approx(score(InfoNCE(0.2), outputs).total.item())
    assert score(MRCL(norm_pix=False), outputs | {"reconstruction": targets}, batch).total > perfect.total + 0.1


def test_mrcl_draws_standardised_reconstructions_in_the_views_units():
    view = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    target = ops.patchify(view, 4).repeat_interleave(2, dim=0)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    perfect = {"reconstruction": [(target - mean) / (variance + 1e-6).sqrt()]}
    batch = Batch([view], [None], torch.arange(2), torch.zeros(2))
    (drawn,) = MRCL(norm_pix=True).pixels(perfect, batch)
    assert torch.allclose(drawn, target, atol=1e-12)
    assert MRCL().pixels(perfect, batch) is perfect["reconstruction"]


def test_mrcl_with_equal_weights_over_all_patches_is_the_plain_mse():
    outputs, batch = draw_outputs(), draw_batch()
    loss = score(MRCL(w_masked=2.5, w_unmasked=2.5, rec_reduce="all"), outputs, batch)
    plain = sum(
        torch.nn.functional.mse_loss(pred, ops.patchify(view, 2))
        for pred, view in zip(outputs["reconstruction"], batch.views, strict=True)
    )
    inner = score(InfoNCE(0.2), outputs, batch)
    assert loss.total.item() == pytest.approx(inner.total.item() + 2.5 * plain.item(), rel=1e-12)


@pytest.mark.parametrize("inner", [InfoNCE(0.5), BarlowTwins(), BYOL(), MoCoV3()], ids=lambda c: type(c).__name__)
def test_mrcl_without_weights_is_its_contrastive_criterion(inner):
    outputs = draw_outputs()
    del outputs["reconstruction"]
    criterion = MRCL(inner, w_masked=0.0, w_unmasked=0.0)
    assert criterion.requires == inner.requires
    assert MRCL(inner, 0.0, 1.0).requires == MRCL(inner, 1.0, 0.0).requires == inner.requires | {"reconstruction"}
    alone, held = score(inner, outputs), score(criterion, outputs)
    assert torch.equal(held.total, alone.total) and held.terms == alone.terms and held.weights == alone.weights


def test_mrcl_keeps_the_decoder_in_the_graph_while_a_scheduled_weight_is_zero():
    problems: list[str] = []
    spec = {"name": "mrcl", "w_masked": {"from": 0.0, "to": 2.0}, "w_unmasked": 0.0, "contrastive": "byol"}
    built = build_part("criterion", check_part("criterion", spec, "criterion", problems))
    assert not problems and built.part.requires == {"prediction", "target", "reconstruction"}
    for owner, attribute, schedule in built.schedules:
        setattr(owner, attribute, schedule.at(0, 10))
    outputs = draw_outputs()
    pred = outputs["reconstruction"][0].requires_grad_()
    loss = score(built.part, outputs)
    assert torch.equal(loss.total, score(BYOL(), outputs).total) and loss.terms["reconstruction_masked"] > 0
    (gradient,) = torch.autograd.grad(loss.total, pred)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("rec_reduce", ["group", "all", "sum"])
@pytest.mark.parametrize(("keeps", "empty"), [(((), ()), "unmasked"), ((None, (0, 1, 2, 3)), "masked")])
def test_mrcl_of_an_empty_group_is_zero_with_finite_gradients(rec_reduce, keeps, empty):
    outputs = draw_outputs()
    leaves = [t.requires_grad_() for t in outputs["reconstruction"]]
    loss = score(MRCL(rec_reduce=rec_reduce), outputs, draw_batch(keeps=keeps))
    assert loss.terms[f"reconstruction_{empty}"].item() == 0
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in torch.autograd.grad(loss.total, leaves))


def test_mrcl_equation_16_is_one_directional_with_cross_view_candidates():
    outputs = draw_outputs()
    loss = score(MRCL(InfoNCE(0.3), w_masked=0.0, w_unmasked=0.0, con="eq16"), outputs)
    first, second = outputs["projection"]
    expected = mean(cross_entropy(first[i], list(second), i, 0.3) for i in range(B))
    assert loss.total.item() == pytest.approx(expected, rel=1e-12)
    assert score(MRCL(InfoNCE(0.3), 0.0, 0.0), outputs).total.item() != pytest.approx(expected)
    with pytest.raises(UserError, match="eq16.*contrastive criterion is a BYOL"):
        MRCL(BYOL(), con="eq16")


class Queue(Criterion):
    """A user's criterion with state, a parameter and hooks."""

    requires = frozenset({"projection"})

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(B, D))
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, outputs, batch, progress):
        return Loss.weighted(queue=(self.scale * (outputs["projection"][0] * self.queue).sum(), 1.0))

    def after_forward(self, outputs, batch, terms, ctx):
        self.queue.copy_(outputs["projection"][1])


def test_mrcl_holds_a_users_criterion_with_state():
    """Its state, parameter and hooks are found in the tree; MRCL adds no parameter of its own."""
    criterion, outputs = MRCL(Queue()), draw_outputs()
    assert set(criterion.state_dict()) == {"contrastive.queue", "contrastive.scale"}
    outer, inner = parts(criterion)
    assert outer is criterion and inner is criterion.contrastive
    assert not list(outer.param_groups()) and [len(g.params) for g in inner.param_groups()] == [1]
    assert score(criterion, outputs).terms["queue"].item() == 0
    for part in parts(criterion):
        part.after_forward(outputs, draw_batch(), {}, None)
    first, second = outputs["projection"]
    assert score(criterion, outputs).terms["queue"].item() == pytest.approx((first * second).sum().item(), rel=1e-5)


def test_mrcl_scores_several_masks_an_image():
    """Two masks an image: rows 2b and 2b + 1 of the reconstruction belong to image b."""
    batch = draw_batch()
    keep = torch.tensor([[[0], [3]]] * B)
    masks = Masks.from_keep(keep, 4)
    outputs = draw_outputs() | {"reconstruction": [draw(2 * B, 4, 4, seed=v) for v in range(2)]}
    loss = score(MRCL(), outputs, Batch(batch.views, [masks, masks], batch.index, batch.label))
    masked = 0.0
    for pred, view in zip(outputs["reconstruction"], batch.views, strict=True):
        masked += patches_by_hand(pred, view.repeat_interleave(2, dim=0), masks.mask.flatten(0, 1), "group")[0]
    assert loss.terms["reconstruction_masked"].item() == pytest.approx(masked)


def test_recipes_build_criterions():
    assert {"info_nce", "barlow_twins", "byol", "moco_v3", "mrcl"} <= set(CRITERIONS.names())
    problems: list[str] = []
    spec = {"name": "mrcl", "contrastive": {"name": "info_nce", "temperature": {"from": 0.5, "to": 0.1}}}
    built = build_part("criterion", check_part("criterion", spec, "criterion", problems))
    assert not problems and built.part.contrastive.temperature == 0.5
    assert [(owner, name) for owner, name, _ in built.schedules] == [(built.part.contrastive, "temperature")]
    check_part("criterion", {"name": "info_nce", "temperature": 0.0, "negatives": "none"}, "criterion", problems)
    check_part("criterion", {"name": "mrcl", "contrastive": {"name": "barlow_twins", "lambd": -1.0}}, "c", problems)
    assert [p.split(":")[0] for p in problems] == [
        "criterion.temperature",
        "criterion.negatives",
        "c.contrastive.lambd",
    ]

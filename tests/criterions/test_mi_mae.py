"""MI-MAE against loops in float64 written from equations 7 to 10.

Shapes: B images, N masks an image, K visible patches of L, Dx width of a visible token, D width of a latent.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.distributions import Normal

from ssl_ib import Batch, Masks, Progress, RunInfo, UserError, ops
from ssl_ib.config.registry import build_part, check_part
from ssl_ib.criterions.mae import MAE
from ssl_ib.criterions.mi_mae import MIMAE
from ssl_ib.maskers.independent import IndependentMasker
from ssl_ib.part import Context, detached, parts
from ssl_ib.random import image_keys

B, N, K, L, DX, D, SIDE = 3, 4, 4, 16, 6, 5, 2
PROGRESS = Progress(3, 1, 20, 10)
#: The weights of one term alone.
ALONE = {
    "rec": {"w_max": 0.0, "w_min": 0.0, "w_approx": 0.0},
    "max": {"w_rec": 0.0, "w_min": 0.0, "w_approx": 0.0, "gate": "none"},
    "min": {"w_rec": 0.0, "w_max": 0.0, "w_approx": 0.0, "gate": "none"},
    # Something must train the encoder: what reaches it is taken from the term and not from the total.
    "approximation": {"w_rec": 0.0, "w_max": 0.0, "w_min": 1e-30, "gate": "none"},
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_batch(views: int = 1, images: int = B) -> Batch:
    index = torch.arange(images)
    masks = [IndependentMasker(0.75, N)(image_keys(0, 0, index, v), (4, 4)) for v in range(views)]
    return Batch([draw(images, 1, 8, 8, seed=70 + v) for v in range(views)], masks, index, -torch.ones_like(index))


def draw_outputs(views: int = 1, images: int = B) -> dict[str, list[torch.Tensor]]:
    shapes = {"latents": (images, N, D), "visible": (images * N, K, DX), "reconstruction": (images * N, L, SIDE**2)}
    return {n: [draw(*s, seed=10 * i + v) for v in range(views)] for i, (n, s) in enumerate(shapes.items())}


def info(masks=(N, K), views: int = 1) -> RunInfo:
    widths = {"latents": D, "visible": DX, "reconstruction": SIDE**2}
    return RunInfo(((1, 8, 8),) * views, B, grid=lambda s: (4, 4), width=widths.__getitem__, masks=lambda g: masks)


def build(**given) -> MIMAE:
    torch.manual_seed(0)
    return MIMAE(info(), **given).double()


def terms(criterion: MIMAE, outputs=None, batch=None, progress=PROGRESS) -> dict[str, torch.Tensor]:
    return criterion(outputs or draw_outputs(), batch or draw_batch(), progress).terms


# --- equations 7 and 8


def nce_by_loops(z: torch.Tensor, temperature: float, denom: str, norm: str) -> torch.Tensor:
    """-log of a sibling's share among the candidates, for every ordered pair of an image's latents."""
    images, masks, _ = z.shape
    losses = []
    for b in range(images):
        total = 0.0
        for i in range(masks):
            for k in range(masks):
                if i == k:
                    continue
                similarity = {
                    (c, m): F.cosine_similarity(z[b, i], z[c, m], dim=0) / temperature
                    for c in range(images)
                    for m in range(masks)
                    if (c, m) != (b, i) and (denom == "all" or c != b or m == k)
                }
                total = total - (similarity[b, k].exp() / sum(s.exp() for s in similarity.values())).log()
        losses.append(total / (masks**2 if norm == "n2" else masks * (masks - 1)))
    return sum(losses) / images


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("norm", ["n2", "pairs"])
@pytest.mark.parametrize("denom", ["all", "no_siblings"])
def test_l_max(denom, norm, temperature):
    z = draw(B, N, D)
    criterion = build(temperature=temperature, nce_denom=denom, nce_norm=norm)
    found = terms(criterion, draw_outputs() | {"latents": [z]})
    expected = nce_by_loops(z, temperature, denom, norm)
    assert found["max"].item() == pytest.approx(expected.item(), rel=1e-7)
    candidates = B * N - 1 if denom == "all" else (B - 1) * N + 1
    per_pair = nce_by_loops(z, temperature, denom, "pairs").item()
    assert found["nce_nats"].item() == pytest.approx(math.log(candidates) - per_pair, rel=1e-6)
    criterion.gather = False  # from one process there is nothing to gather
    assert torch.equal(terms(criterion, draw_outputs() | {"latents": [z]})["max"], found["max"])


@pytest.mark.parametrize("denom", ["all", "no_siblings"])
def test_the_gradient_of_l_max_is_that_of_the_loops_and_reaches_both_sides_of_a_pair(denom):
    z = draw(B, N, D).requires_grad_()
    criterion = build(**ALONE["max"], nce_denom=denom, temperature=0.3)
    (ours,) = torch.autograd.grad(terms(criterion, {"latents": [z]})["max"], z)
    (loops,) = torch.autograd.grad(nce_by_loops(z, 0.3, denom, "n2"), z)
    torch.testing.assert_close(ours, loops, rtol=1e-6, atol=1e-8)


def test_the_floor_and_the_collapse_of_l_max():
    latents = torch.eye(8, dtype=torch.float64)[:, None].expand(-1, 4, -1)  # one direction an image
    outputs, batch = {"latents": [latents]}, draw_batch(images=8)

    def value(z: torch.Tensor, temperature: float = 0.01, **given) -> float:
        criterion = build(**ALONE["max"], temperature=temperature, **given)
        return terms(criterion, outputs | {"latents": [z]}, batch)["max"].item()

    assert value(latents) == pytest.approx(3 / 4 * math.log(3)) == pytest.approx(0.824, abs=5e-4)
    assert value(latents, nce_norm="pairs") == pytest.approx(math.log(3))
    assert value(latents, nce_denom="no_siblings") == pytest.approx(0, abs=1e-9)
    collapsed = torch.ones_like(latents)
    for temperature in (0.07, 1.0):
        assert value(collapsed, temperature) == pytest.approx(3 / 4 * math.log(8 * 4 - 1))
        assert value(collapsed, temperature, nce_denom="no_siblings") == pytest.approx(3 / 4 * math.log(7 * 4 + 1))
    assert value(-3 * latents) == pytest.approx(value(latents))  # angles alone count


def test_a_projection_head_stands_between_latents_and_l_max_alone():
    criterion, z = build(proj="mlp", proj_dim=7), draw(B, N, D)
    first, _, second = criterion.projection
    assert second.out_features == 7
    found = terms(criterion, draw_outputs() | {"latents": [z]})
    projected = second(F.gelu(first(z)))
    assert found["max"].item() == pytest.approx(nce_by_loops(projected, 0.07, "all", "n2").item(), rel=1e-7)
    plain = build()
    plain.approximation.load_state_dict(criterion.approximation.state_dict())
    bare = terms(plain, draw_outputs() | {"latents": [z]})
    assert found["min"] == bare["min"] and found["approximation"] == bare["approximation"]
    assert build(proj="mlp", w_max=0.0).projection is None and build().projection is None


# --- equations 9 and 10


def gaussian_by_hand(criterion: MIMAE, x: torch.Tensor) -> list[torch.Tensor]:
    """Mean and variance [B, N, D] of the default network: an MLP on each token of x [B*N, K, .], mean, Linear."""
    answers = []
    for first, second, last in (criterion.approximation.mean, criterion.approximation.variance):
        hidden = torch.stack([torch.stack([second(F.gelu(first(token))) for token in row]) for row in x])
        answers.append(last(hidden.mean(dim=1)).unflatten(0, (-1, N)))
    mean, raw = answers
    return [torch.where(mean > 0, mean, 0.01 * mean), raw.clamp(min=0) + 1e-3]


def club_by_loops(z, mean, variance, negatives: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-likelihoods, CLUB's summands), summed over dimensions: each [B, N]."""
    images = len(z)
    likelihood, bound = z.new_zeros(images, N), z.new_zeros(images, N)
    for b in range(images):
        for j in range(N):
            q = Normal(mean[b, j], variance[b, j].sqrt())
            own = q.log_prob(z[b, j]).sum()
            among = [b] if negatives == "siblings" else range(images)
            others = torch.stack([q.log_prob(z[i, k]).sum() for i in among for k in range(N)])
            likelihood[b, j], bound[b, j] = own, own - others.mean()
    return likelihood, bound


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("negatives", ["siblings", "batch"])
def test_l_min_and_l_approx(negatives, reduce):
    outputs, criterion = draw_outputs(), build(club_neg=negatives, club_reduce=reduce, hidden=7)
    z = outputs["latents"][0]
    mean, variance = gaussian_by_hand(criterion, outputs["visible"][0])
    likelihood, bound = club_by_loops(z, mean, variance, negatives)
    found, dims = terms(criterion, outputs), D if reduce == "mean" else 1
    assert found["min"].item() == pytest.approx(bound.mean().item() / dims, rel=1e-9)
    assert found["approximation"].item() == pytest.approx(-likelihood.mean().item() / dims, rel=1e-9)
    # What is watched is in nats, whatever the loss is.
    assert found["club_nats"].item() == pytest.approx(bound.mean().item(), rel=1e-9)
    assert found["log_likelihood"].item() == pytest.approx(likelihood.mean().item(), rel=1e-9)
    share = (bound.mean(dim=1) < 0).double().mean().item()
    assert found["negative_bounds"].item() == pytest.approx(share)
    assert found["variance_floor"].item() == pytest.approx((variance <= 1e-3).double().mean().item())


@pytest.mark.parametrize("negatives", ["siblings", "batch"])
def test_the_gradients_of_l_min_and_l_approx_are_those_of_the_loops(negatives):
    outputs, criterion = draw_outputs(), build(club_neg=negatives)
    z, x = outputs["latents"][0].requires_grad_(), outputs["visible"][0].requires_grad_()
    found, network = terms(criterion, outputs), list(criterion.approximation.parameters())
    mean, variance = gaussian_by_hand(criterion, x)
    _, bound = club_by_loops(z, mean.detach(), variance.detach(), negatives)
    (loops,) = torch.autograd.grad(bound.mean() / D, z)
    ours = torch.autograd.grad(found["min"], [z, x, *network], retain_graph=True, allow_unused=True)
    torch.testing.assert_close(ours[0], loops)
    assert ours[1:] == (None,) * (1 + len(network))
    likelihood, _ = club_by_loops(z.detach(), mean, variance, negatives)
    loops = torch.autograd.grad(-likelihood.mean() / D, network)
    ours = torch.autograd.grad(found["approximation"], [z, x, *network], allow_unused=True)
    assert ours[:2] == (None, None)
    for given, expected in zip(ours[2:], loops, strict=True):
        torch.testing.assert_close(given, expected)


def test_a_clamped_l_min_counts_for_no_less_than_zero():
    signs = set()
    for seed in range(8):
        latents = draw(B, N, D, seed=100 + seed).requires_grad_()
        outputs = draw_outputs() | {"latents": [latents]}
        free, clamped = (build(club_clamp0=on)(outputs, draw_batch(), PROGRESS).terms["min"] for on in (False, True))
        assert clamped.item() == pytest.approx(max(free.item(), 0.0))
        (gradient,) = torch.autograd.grad(clamped, latents)
        assert (gradient.abs().sum() > 0) == (free > 0)
        signs.add(free.item() > 0)
    assert signs == {True, False}


def test_xj_is_what_the_network_sees():
    outputs, batch = draw_outputs(), draw_batch()
    x = outputs["visible"][0]
    criterion = build(xj="pooled")
    mean, variance = gaussian_by_hand(criterion, x.mean(dim=1, keepdim=True))
    likelihood, _ = club_by_loops(outputs["latents"][0], mean, variance, "siblings")
    assert terms(criterion, outputs)["approximation"].item() == pytest.approx(-likelihood.mean().item() / D)

    criterion = build(xj="pixels")
    assert criterion.requires == {"latents", "reconstruction"} and build().requires - criterion.requires == {"visible"}
    patches = []
    for image, keeps in zip(batch.views[0], batch.masks[0].keep.tolist(), strict=True):
        for keep in keeps:
            corners = [(2 * (p // 4), 2 * (p % 4)) for p in keep]
            patches.append(torch.stack([image[0, r : r + 2, c : c + 2].flatten() for r, c in corners]))
    mean, variance = gaussian_by_hand(criterion, torch.stack(patches))
    likelihood, bound = club_by_loops(outputs["latents"][0], mean, variance, "siblings")
    del outputs["visible"]
    found = terms(criterion, outputs, batch)
    assert found["approximation"].item() == pytest.approx(-likelihood.mean().item() / D)
    assert found["min"].item() == pytest.approx(bound.mean().item() / D)


def test_hidden_and_form_of_the_network():
    assert build().approximation.mean[0].out_features == build().approximation.mean[0].in_features
    assert build(hidden=9).approximation.mean[1].out_features == 9
    values = {form: terms(build(var=form)) for form in ("relu_floor", "softplus", "tanh_logvar")}
    assert len({v["approximation"].item() for v in values.values()}) == 3
    assert len({v["min"].item() for v in values.values()}) == 3


# --- the sum of them


def test_the_total_is_the_weighted_sum():
    criterion = build(w_rec=2.0, w_max=3.0, w_min=5.0, w_approx=7.0, gate="none")
    outputs, batch = draw_outputs(), draw_batch()
    loss = criterion(outputs, batch, PROGRESS)
    reconstruction = MAE(info())(outputs, batch, PROGRESS).total
    assert torch.equal(loss.terms["reconstruction"], reconstruction)
    expected = 2 * reconstruction + sum(w * loss.terms[n] for n, w in (("max", 3), ("min", 5), ("approximation", 7)))
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, term in loss.terms.items():
        assert term.shape == () and (name in loss.weights or not term.requires_grad)


def test_the_reconstruction_is_the_mean_of_n_mae_losses_on_hidden_patches():
    outputs, batch = draw_outputs(), draw_batch()
    errors = []
    for b in range(B):
        for n in range(N):
            pred, target = outputs["reconstruction"][0][b * N + n], ops.patchify(batch.views[0][b : b + 1], SIDE)[0]
            target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
            error = (pred - target).square().mean(dim=1)
            errors.append(error[batch.masks[0].mask[b, n]].mean())
    assert terms(build())["reconstruction"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-10)


def test_terms_are_the_mean_of_two_views():
    criterion, outputs, batch = build(gate="none"), draw_outputs(2), draw_batch(2)
    both = criterion(outputs, batch, PROGRESS)
    each = []
    for v in range(2):
        alone = Batch([batch.views[v]], [batch.masks[v]], batch.index, batch.label)
        each.append(criterion({name: [values[v]] for name, values in outputs.items()}, alone, PROGRESS))
    assert both.total.item() == pytest.approx((each[0].total + each[1].total).item() / 2)
    for name, term in both.terms.items():
        expected = (each[0].terms[name] + each[1].terms[name]) / 2
        assert term.item() == pytest.approx(expected.item(), abs=1e-12), name


@pytest.mark.parametrize("what", ["images", "masks"])
@pytest.mark.parametrize("negatives", ["siblings", "batch"])
def test_the_order_of_images_and_of_masks_changes_nothing(what, negatives):
    criterion, outputs, batch = build(gate="none", club_neg=negatives), draw_outputs(), draw_batch()
    images = torch.tensor([2, 0, 1]) if what == "images" else torch.arange(B)
    masks = torch.tensor([1, 3, 0, 2]) if what == "masks" else torch.arange(N)
    moved = {
        "latents": [outputs["latents"][0][images][:, masks]],
        **{n: [outputs[n][0].unflatten(0, (B, N))[images][:, masks].flatten(0, 1)] for n in outputs if n != "latents"},
    }
    m = batch.masks[0]
    shuffled = replace(
        batch,
        views=[batch.views[0][images]],
        masks=[Masks(m.keep[images][:, masks], m.mask[images][:, masks])],
    )
    before, after = criterion(outputs, batch, PROGRESS), criterion(moved, shuffled, PROGRESS)
    assert after.total.item() == pytest.approx(before.total.item(), rel=1e-12)
    wrong = moved | {"latents": outputs["latents"]}  # latents that no longer belong to their patches
    assert abs(criterion(wrong, shuffled, PROGRESS).total.item() - before.total.item()) > 1e-4


@pytest.mark.parametrize("denom", ["all", "no_siblings"])
def test_losses_are_float32_under_autocast(denom):
    outputs, batch = draw_outputs(), draw_batch()
    rounded = {n: [t.bfloat16() for t in values] for n, values in outputs.items()}
    exact = {n: [t.double() for t in values] for n, values in rounded.items()}
    single = replace(batch, views=[v.float() for v in batch.views])
    criterion = build(nce_denom=denom, gate="none")
    expected = terms(criterion, exact, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion.float()(rounded, single, PROGRESS)
    assert loss.total.dtype == torch.float32
    assert loss.terms["max"].item() == pytest.approx(expected["max"].item(), rel=1e-5)
    assert loss.terms["approximation"].item() == pytest.approx(expected["approximation"].item(), rel=2e-2)


def test_gradients_are_those_of_the_value():
    """Without L_approx, whose z is a constant, the total is a function of z and pixels."""
    criterion, batch, outputs = build(gate="none", w_approx=0.0, temperature=0.3), draw_batch(), draw_outputs()
    leaves = [outputs[n][0].clone().requires_grad_() for n in ("latents", "reconstruction")]

    def total(z, pixels):
        given = outputs | {"latents": [z], "reconstruction": [pixels]}
        return criterion(given, batch, PROGRESS).total

    assert gradcheck(total, leaves, fast_mode=True)


def test_coverage_and_overlap_of_the_masks():
    keep = torch.tensor([[[0, 1], [1, 2]], [[0, 1], [2, 3]]])
    batch = replace(draw_batch(images=2), masks=[Masks.from_keep(keep, 16)])
    outputs = {"latents": [draw(2, 2, D)]}
    found = terms(build(**ALONE["max"]), outputs, batch)
    assert found["mask_coverage"].item() == pytest.approx((3 / 16 + 4 / 16) / 2)
    assert found["mask_overlap"].item() == pytest.approx((1 / 2 + 0) / 2)


# --- weights, gate, groups


def test_what_the_weights_leave_out():
    assert MIMAE(info(), **ALONE["rec"]).requires == {"latents", "reconstruction"}
    assert MIMAE(info(), **ALONE["max"]).requires == {"latents"}
    assert MIMAE(info(), **ALONE["min"]).requires == {"latents", "visible"}
    outputs = {n: [t.requires_grad_() for t in values] for n, values in draw_outputs().items()}
    only = terms(build(**ALONE["rec"]), outputs)
    assert "min" not in only and "approximation" not in only and "gate" not in only
    assert not only["max"].requires_grad
    assert only["reconstruction"] == MAE(info())(draw_outputs(), draw_batch(), PROGRESS).total
    watched = build(w_max=0.0, w_min=0.0)(draw_outputs(), draw_batch(), PROGRESS)
    assert watched.weights == {"reconstruction": 1.0, "max": 0.0, "approximation": 1.0}
    for gate in ("latch", "instant", "none"):  # nothing to gate
        assert "gate" not in terms(build(w_rec=0.0, w_min=0.0, gate=gate, gate_terms="min"), draw_outputs())
    for gate in ("latch", "instant"):  # nothing to wait for
        with pytest.raises(UserError, match="waits for the reconstruction, which w_rec=0 leaves out: use gate=none"):
            build(w_rec=0.0, w_min=0.0, gate=gate)


def test_scheduled_weights_that_are_zero_keep_everything_in_the_graph():
    """DDP waits for the gradient of all parameters, in steps with a weight of 0 too."""
    names = ("w_rec", "w_max", "w_min", "w_approx")
    spec = {"name": "mi_mae", "proj": "mlp", "gate": "none"} | {n: {"from": 0.0, "to": 1.0} for n in names}
    problems: list[str] = []
    built = build_part("criterion", check_part("criterion", spec, "criterion", problems), info=info())
    assert not problems and [name for _, name, _ in built.schedules] == list(names)
    for owner, attribute, schedule in built.schedules:
        setattr(owner, attribute, schedule.at(0, 10))
    outputs = {n: [t.requires_grad_() for t in values] for n, values in draw_outputs().items()}
    loss = built.part.double()(outputs, draw_batch(), PROGRESS)
    loss.total.backward()
    assert loss.total == 0 and set(loss.weights) == {"reconstruction", "max", "min", "approximation"}
    gradients = [p.grad for p in built.part.parameters()] + [outputs[n][0].grad for n in ("latents", "reconstruction")]
    assert all(g is not None and not g.any() for g in gradients)


def test_the_networks_rate_is_not_a_schedule():
    spec = {"name": "mi_mae", "approx_lr": {"from": 1e-3, "to": 1e-4}}
    with pytest.raises(UserError, match=r"criterion\.approx_lr: 'mi_mae' cannot follow a schedule"):
        build_part("criterion", check_part("criterion", spec, "criterion", []), info=info())


def context(step: int) -> Context:
    return Context(replace(PROGRESS, step=step, epoch=step // 2), lambda name, n: torch.empty(0), lambda p: None)


def steps(criterion: MIMAE, scales: list[float]) -> list[tuple[float, float, float]]:
    """(weight of L_min, gate, gate_step) of steps whose reconstruction is `scale` times as good as zeros."""
    answers, batch = [], draw_batch()
    target = ops.patchify(batch.views[0], SIDE).repeat_interleave(N, dim=0)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    for step, scale in enumerate(scales):
        outputs = draw_outputs() | {"reconstruction": [(1 - scale) * target]}
        loss = criterion(outputs, batch, context(step).progress)
        answers.append((float(loss.weights["min"]), loss.terms["gate"].item(), loss.terms["gate_step"].item()))
        # The paper's rule (section 5.1): before the gate opens there is L_rec only.
        held_back = criterion.gate_terms == "all" and not loss.terms["gate"]
        assert float(loss.weights["max"]) == (0.0 if held_back else 1.0) and loss.weights["approximation"] == 1.0
        assert loss.terms["reconstruction"].item() == pytest.approx(scale**2 * 0.75, rel=1e-4)
        with_gate = sum(float(w) * loss.terms[n].item() for n, w in loss.weights.items())
        assert loss.total.item() == pytest.approx(with_gate)
        criterion.after_forward(detached(outputs), batch, detached(loss.terms), context(step))
        criterion.on_epoch_end(context(step))
    return answers


@pytest.mark.parametrize("gate_terms, waiting", [("all", "L_max and L_min"), ("min", "L_min")])
def test_the_gate_decides_what_counts(caplog, gate_terms, waiting):
    make = partial(build, gate_terms=gate_terms)
    caplog.set_level("INFO")
    losses = [1.0, 0.5, 1.0, 1.0]  # L_rec .75, .19, .75, .75
    open_, shut = 10.0, 0.0
    assert [w for w, _, _ in steps(make(gate="none"), losses)] == [open_] * 4
    assert [w for w, _, _ in steps(make(gate="instant"), losses)] == [shut, open_, shut, shut]
    assert [w for w, _, _ in steps(make(gate="latch"), losses)] == [shut] * 4
    assert not caplog.records
    latched = steps(make(gate="latch", gate_momentum=0.2), losses)
    assert latched == [(shut, 0, -1), (shut, 0, -1), (open_, 1, 1), (open_, 1, 1)]
    assert [r.getMessage() for r in caplog.records] == [
        f"mi_mae: the gate opened at step 1: {waiting} count from here on"
    ]
    assert [w for w, _, _ in steps(make(gate_eps=0.8), losses)] == [shut] + [open_] * 3
    assert [w for w, _, _ in steps(make(gate_max_epoch=1), losses)] == [shut, shut, open_, open_]  # two steps an epoch


def test_before_the_gate_opens_the_encoder_learns_from_the_reconstruction_alone():
    latents, visible = draw_outputs()["latents"][0], draw_outputs()["visible"][0]
    for gate_terms, moved in (("all", False), ("min", True)):
        z = latents.clone().requires_grad_()
        outputs = draw_outputs() | {"latents": [z], "visible": [visible]}
        build(gate_terms=gate_terms)(outputs, draw_batch(), PROGRESS).total.backward()
        assert bool(z.grad.any()) == moved


def test_the_gates_state_is_in_the_checkpoint():
    criterion, resumed = build(gate_momentum=0.2), build(gate_momentum=0.2)
    steps(criterion, [1.0, 0.5])
    resumed.load_state_dict(criterion.state_dict())
    assert terms(resumed)["gate"] == 1 and terms(build())["gate"] == 0


def test_parameter_groups():
    def groups(**given) -> dict[str, tuple]:
        return {
            g.name: (len(g.params), g.lr, g.weight_decay)
            for p in parts(MIMAE(info(), **given))
            for g in p.param_groups()
        }

    assert groups() == {"approximation": (12, None, 0.0)}
    assert groups(proj="mlp", approx_lr=0.3) == {"approximation": (12, 0.3, 0.0), "projection": (4, None, None)}
    assert groups(w_approx=0.0) == groups(w_approx=0.0, w_min=0.0) == {}
    assert groups(w_min=0.0) == {"approximation": (12, None, 0.0)}


def test_without_its_weight_the_network_stays_at_its_start_and_still_bounds():
    criterion, trained = build(w_approx=0.0, gate="none"), build(gate="none")
    assert not any(p.requires_grad for p in criterion.approximation.parameters())
    loss, other = (c(draw_outputs(), draw_batch(), PROGRESS) for c in (criterion, trained))
    assert "approximation" not in loss.weights and torch.equal(loss.terms["min"], other.terms["min"])
    assert "log_likelihood" in loss.terms and other.weights["approximation"] == 1.0

"""MI-MAE in a run: what each term trains of the model, mistakes of a recipe, and several processes against one.

Shapes: B images, N masks an image, K visible patches of L, Dx width of a visible token, D width of a latent.
"""

from functools import partial

import pytest
import torch
from ranks import RANKS, answers_of, join
from test_mi_mae import (
    ALONE,
    DX,
    PROGRESS,
    SIDE,
    D,
    L,
    club_by_loops,
    context,
    draw,
    draw_batch,
    gaussian_by_hand,
    info,
)
from torch.nn.parallel import DistributedDataParallel

from ssl_ib import Batch, ConfigError, Masks, Model, distributed, ops
from ssl_ib.criterions.mi_mae import MIMAE
from ssl_ib.part import Step, detached
from ssl_ib.random import image_keys

# The processes that are started import this file: what they do not need, and is slow to import, comes where it is used.


# --- on the model itself


VIT = "{patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}"


def tiny_run(*overrides: str):
    """The run of mi_mae_digits with a tiny model; overrides that swap the model leave the decoder out."""
    from ssl_ib.config.config import resolve
    from ssl_ib.run import build_run

    small = [f"model.backbone_args={VIT}", "device=cpu"]
    small += [] if any(o.startswith("model=") for o in overrides) else ["model.decoder_dim=16"]
    return build_run(resolve("mi_mae_digits", [*small, *overrides]))


def learn(run, images: int = 3) -> dict[str, list[torch.Tensor | None]]:
    """Gradients of one backward of the run's total, by what they train."""
    index = torch.arange(images)
    masks = [run.task.masker(image_keys(0, 0, index), (4, 4))]
    batch = Batch([draw(images, 3, 16, 16)], masks, index, index)
    model, criterion = run.model.double(), run.criterion.double()
    criterion(model(batch), batch, PROGRESS).total.backward()
    held = {"encoder": model.encoder, "decoder": model.decoder, "network": criterion.approximation}
    return {n: [p.grad for p in m.parameters()] for n, m in held.items() if m is not None}


def moved(gradients: list[torch.Tensor | None]) -> bool:
    return any(g is not None and not torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("term", ALONE)
def test_what_each_term_trains(term):
    run = tiny_run(*(f"criterion.{name}={value}" for name, value in ALONE[term].items()))
    if term == "approximation":
        run.criterion.w_min = 0.0
    expected = {"rec": {"encoder", "decoder"}, "max": {"encoder"}, "min": {"encoder"}, "approximation": {"network"}}
    assert {name for name, gradients in learn(run).items() if moved(gradients)} == expected[term]


def test_all_terms_train_everything_and_the_decoder_learns_from_the_reconstruction_alone():
    whole = learn(tiny_run("criterion.gate=none"))
    alone = learn(tiny_run(*(f"criterion.{n}={v}" for n, v in ALONE["rec"].items())))
    assert all(moved(gradients) for gradients in whole.values()) and set(alone) == {"encoder", "decoder"}
    for ours, theirs in zip(whole["decoder"], alone["decoder"], strict=True):
        torch.testing.assert_close(ours, theirs)
    pairs = [pair for pair in zip(whole["encoder"], alone["encoder"], strict=True) if pair[0] is not None]
    assert not any(torch.allclose(ours, theirs) for ours, theirs in pairs if theirs.any())


@pytest.mark.parametrize("z", ["cls", "mean", "flat"])
def test_l_min_reaches_the_encoder_through_z_alone(z):
    """Its gradient is that of the loops with the visible tokens held constant, though they are the encoder's too."""
    run = tiny_run("criterion.gate=none", "criterion.w_rec=0", "criterion.w_max=0", "criterion.w_min=1", f"model.z={z}")
    ours = learn(run)["encoder"]
    index = torch.arange(3)
    batch = Batch([draw(3, 3, 16, 16)], [run.task.masker(image_keys(0, 0, index), (4, 4))], index, index)
    outputs = run.model(batch)
    latents, visible = outputs["latents"][0], outputs["visible"][0]
    assert visible.requires_grad and latents.shape == (3, 4, 4 * 24 if z == "flat" else 24)
    tokens = outputs["tokens"][0].unflatten(0, (3, 4))
    patches = tokens[:, :, 1:]
    expected = {"cls": tokens[:, :, 0], "mean": patches.mean(dim=2), "flat": patches.flatten(2)}[z]
    torch.testing.assert_close(latents, expected)
    mean, variance = gaussian_by_hand(run.criterion, visible.detach())
    _, bound = club_by_loops(latents, mean.detach(), variance.detach(), "siblings")
    trained = [p for p in run.model.encoder.parameters() if p.requires_grad]
    loops = torch.autograd.grad(bound.mean() / latents.shape[2], trained)
    ours = [g for g in ours if g is not None]
    assert moved(ours) and len(ours) == len(loops) == sum(p.grad is not None for p in run.model.parameters())
    for given, by_loops in zip(ours, loops, strict=True):
        torch.testing.assert_close(given, by_loops, rtol=1e-8, atol=1e-12)


def test_one_optimiser_step_moves_the_network_at_its_own_rate():
    from ssl_ib.optim import build_optimizer, set_rates

    run = tiny_run("criterion.approx_lr=0.5", "optim.warmup_epochs=0", "optim.linear_scaling=false", "optim.lr=1e-3")
    before = {name: p.detach().clone() for name, p in run.criterion.named_parameters()}
    optimizer = build_optimizer(run.config.optim, (run.task, run.model, run.criterion))
    set_rates(optimizer, run.config.optim, 1.0, 0.0, 10.0)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups[::-1]}
    assert rates == {"approximation": (0.5, 0.0), "mae": (1e-3, run.config.optim.weight_decay)}
    learn(run)
    optimizer.step()
    steps = [(p - before[name]).abs().max().item() for name, p in run.criterion.named_parameters()]
    assert max(steps) == pytest.approx(0.5, rel=1e-3)  # Adam's first

    still = tiny_run("criterion.w_approx=0")
    names = {g["name"] for g in build_optimizer(still.config.optim, (still.model, still.criterion)).param_groups}
    assert names == {"mae"} and not moved(learn(still)["network"])


# --- mistakes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["masker=none"], "at least 2 masks an image, and the masker gives none: use masker=orthogonal"),
        (["masker=random"], "at least 2 masks an image, and the masker gives 1: use masker=orthogonal"),
        (["criterion.w_rec=0", "criterion.w_max=0", "criterion.w_min=0"], "w_rec, w_max and w_min are all 0"),
        (["criterion.w_rec=0"], "which criterion.w_rec=0 leaves out: use criterion.gate=none"),
        (["criterion.w_rec=0", "criterion.gate=instant"], "gate='instant' waits for the reconstruction"),
        (["model=siamese", "model.backbone=vit_tiny_patch16_224"], "requires latents, reconstruction, visible"),
        (["criterion.temperature=0"], "criterion.temperature: expected greater than 0"),
        (["criterion.gate_eps=0"], "criterion.gate_eps: expected greater than 0"),
        (["criterion.xj=latents"], "criterion.xj: expected 'token_mlp', 'pooled' or 'pixels'"),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given),
)
def test_mistakes(overrides, said):
    with pytest.raises(ConfigError, match=said):
        tiny_run(*overrides)


def test_a_class_token_is_needed_where_it_is_the_latent():
    arguments = f"{VIT[:-1]}, class_token: false, global_pool: avg}}"
    with pytest.raises(ConfigError, match=r"z=cls needs a class token, .* use model.z=mean"):
        tiny_run(f"model.backbone_args={arguments}", "model.pool=mean")
    # timm would then norm the pooled features and no token: L_rec and L_max alike would read what no norm has seen.
    with pytest.raises(ConfigError, match="norms what comes after: set model.backbone_args.fc_norm=false"):
        tiny_run(f"model.backbone_args={arguments}", "model.pool=mean", "model.z=mean")
    arguments = f"{arguments[:-1]}, fc_norm: false}}"
    run = tiny_run(f"model.backbone_args={arguments}", "model.pool=mean", "model.z=mean", "criterion.gate=none")
    assert all(moved(gradients) for gradients in learn(run).values())


# --- several processes


VARIANTS = {
    "default": {"gate": "none"},
    "no_siblings": {"gate": "none", "nce_denom": "no_siblings", "nce_norm": "pairs"},
    "batch": {"gate": "none", "club_neg": "batch", "club_reduce": "sum"},
    "projected": {"gate": "none", "proj": "mlp", "xj": "pixels"},
    "instant": {"gate": "instant"},  # gate_eps: see `threshold`
    "clamped": {"gate": "none", "club_clamp0": True},
    "latch": {"gate": "latch"},
    "apart": {"gate": "none", "gather": False, "club_neg": "batch"},
    "apart_no_siblings": {"gate": "none", "gather": False, "nce_denom": "no_siblings"},
}


class Linear(Model):
    """A linear encoder of the visible patches, one latent a mask, and a linear decoder of it."""

    def __init__(self):
        super().__init__()
        self.embed, self.encode_, self.decode = (
            torch.nn.Linear(4, DX),
            torch.nn.Linear(DX, D),
            torch.nn.Linear(D, L * 4),
        )

    def forward(self, batch: Batch):
        outputs = {"latents": [], "visible": [], "reconstruction": []}
        for view, masks in zip(batch.views, batch.masks, strict=True):
            patches = ops.token_gather(ops.patchify(view, SIDE), masks.keep.flatten(1))
            visible = self.embed(patches.unflatten(1, masks.keep.shape[1:]).flatten(0, 1))
            z = self.encode_(visible).mean(dim=1)
            outputs["visible"].append(visible)
            outputs["latents"].append(z.unflatten(0, (len(view), -1)))
            outputs["reconstruction"].append(self.decode(z).unflatten(1, (L, 4)))
        return {name: outputs[name] for name in outputs}

    def encode(self, images):
        raise NotImplementedError


def share(rank: int | None, ranks: int) -> Batch:
    """One process's part of the batch, or all of it."""
    batch = draw_batch(images=2 * ranks)
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    m = batch.masks[0]
    masks = [Masks(m.keep[rows], m.mask[rows])]
    return Batch([v[rows] for v in batch.views], masks, batch.index[rows], batch.label[rows])


def step_of(name: str, gate_eps: float = 0.5) -> Step:
    torch.manual_seed(0)
    model = Linear()
    torch.manual_seed(2)  # with which one part's L_min is below 0 and another's is not
    criterion = MIMAE(info(), gate_eps=gate_eps, gate_momentum=0.0, **VARIANTS[name])
    return Step(model, criterion).double()


def term_of_parts(name: str, ranks: int) -> tuple[list[float], float]:
    """A term of each process's part of the batch, and of the whole."""
    with torch.no_grad():
        found = [
            step_of("default")(share(part, ranks), PROGRESS)[1].terms[name].item() for part in (*range(ranks), None)
        ]
    return found[:-1], found[-1]


def threshold(ranks: int) -> float:
    """Just above the whole batch's loss, and between those of its parts."""
    parts, whole = term_of_parts("reconstruction", ranks)
    assert min(parts) < whole < whole + 1e-6 < max(parts)
    return whole + 1e-6


def one_step(name: str, batch: Batch, ranks: int, parallel: bool = False) -> dict[str, torch.Tensor]:
    """Terms and gradients of a second step, whose gate has seen the first."""
    step = step_of(name, threshold(ranks))
    wrapped = DistributedDataParallel(step) if parallel else step
    for number in range(2):
        step.zero_grad(set_to_none=True)
        outputs, loss = wrapped(batch, context(number).progress)
        loss.total.backward()
        step.criterion.after_forward(detached(outputs), batch, detached(loss.terms), context(number))
    found = {f"grad/{n}": p.grad for n, p in step.named_parameters()}
    found |= {n: distributed.all_reduce_mean(t.detach().double()) for n, t in loss.terms.items()}
    return found | {"running_mean": step.criterion.gate.running_mean}


def work(rank: int, port: int, path: str, ranks: int) -> None:
    join(rank, ranks, port)
    found = {name: one_step(name, share(rank, ranks), ranks, parallel=True) for name in VARIANTS}
    torch.save(found, f"{path}/{rank}.pt")
    distributed.shutdown()


@pytest.fixture(scope="module", params=RANKS)
def answers(request, tmp_path_factory) -> list[dict]:
    return answers_of(partial(work, ranks=request.param), request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_learn_what_one_process_learns(name, answers):
    ranks = len(answers)
    if name.startswith("apart"):  # each learns from its own images, and the gradients are averaged
        parts = [one_step(name, share(rank, ranks), ranks) for rank in range(ranks)]
        expected = {key: sum(part[key] for part in parts) / ranks for key in parts[0]}
    else:
        expected = one_step(name, share(None, ranks), ranks)
    if name == "clamped":
        parts, whole = term_of_parts("min", ranks)
        assert min(parts) < 0 < max(parts) and expected["min"].item() == pytest.approx(max(whole, 0.0))
    assert expected["grad/model.encode_.weight"].abs().sum() > 0.01
    for answer in answers:
        assert set(answer[name]) == set(expected)
        for key, value in expected.items():
            # Shares of patches are float32, which has halves and no thirds.
            near = 1e-6 if key.startswith("mask_") and ranks == 3 else 1e-9
            torch.testing.assert_close(
                answer[name][key], value, rtol=near, atol=near / 100, msg=lambda m, k=key: f"{k}: {m}"
            )

"""The gradient ledger: its numbers against autograd and by hand, and that taking it moves nothing."""

import math
from dataclasses import replace

import pytest
import timm
import torch
from harness import assert_same_state, checkpoint, finished, losses, rows, train, trainer
from test_distributed import ELSEWHERE, EXAMPLES, Linear, info, whole_batch
from torch import nn

from ssl_ib import Loss, UserError
from ssl_ib.criterions.reconstruction import HiddenPatches
from ssl_ib.data.loader import ordered
from ssl_ib.evals import ledger
from ssl_ib.part import Step
from ssl_ib.types import Progress

VIT = "backbone: vit_tiny_patch16_224, backbone_args: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}"
TEACHER = f"name: student_teacher, {VIT}, head_hidden: 16, head_dim: 8, head_norm: true"
#: Overrides of the tiny recipe that make runs of the criterions which need more than two linear views.
RUNS = {
    "dino": [f"model={{{TEACHER}, prototypes: 16}}", "criterion=dino", "masker=none"],
    "mi_mae": [
        f"model={{name: mae, {VIT}, decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}}",
        "criterion={name: mi_mae, gate: none}",
        "masker={name: orthogonal, ratio: 0.5}",
        "views={name: plain, size: 16}",
    ],
    "svib": [f"model={{{TEACHER}}}", "criterion={name: svib, K: 16, kl_grad: student}", "masker=none"],
    "swav": [f"model={{{TEACHER}, momentum: null, eval_net: student}}", "criterion={name: swav, K: 16}", "masker=none"],
    # A queue, and an encoder with batch norm.
    "queue_nce": [
        "model={name: moco, backbone: resnet10t, head_dim: 8}",
        "criterion={name: queue_nce, size: 64}",
        "masker=none",
    ],
}
SMALL = ("batch_size=32", "eval.ledger=true", "eval.train_images=64", "eval.val_images=64")


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_two_terms_by_hand():
    a, b = (nn.Parameter(torch.tensor(x)) for x in ([1.0, 2.0], [3.0]))
    # Gradients: of the first term (3, 0 | 4), of the second, whose weight is 2, (0, 0 | -10), of the third none.
    terms = {"x": (3 * a[0] + 4 * b.sum(), 1.0), "y": (-5 * b.sum(), 2.0), "z": (torch.tensor(7.0), 1.0)}
    loss = Loss.weighted(**terms)
    found = ledger.products(ledger.trained_terms(loss), [[a], [b]])
    assert found.tolist() == [
        [[9, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[16, -40, 0], [-40, 100, 0], [0, 0, 0]],
    ]
    numbers = ledger.readings(["x", "y", "z"], found)
    # The whole gradient is (3, 0 | -6): 45, of which the first term has 25 - 40 and the second 100 - 40.
    assert numbers == pytest.approx(
        {
            "ledger/norm": math.sqrt(45),
            **{"ledger/x/norm": 5, "ledger/x/depth_1": 3, "ledger/x/depth_2": 4, "ledger/x/share": -15 / 45},
            **{"ledger/y/norm": 10, "ledger/y/depth_1": 0, "ledger/y/depth_2": 10, "ledger/y/share": 60 / 45},
            **{"ledger/z/norm": 0, "ledger/z/depth_1": 0, "ledger/z/depth_2": 0, "ledger/z/share": 0},
            "ledger/cosine/x/y": -0.8,
        }
    )
    assert a.grad is None and b.grad is None
    loss.total.backward()  # The graph is there still.
    assert a.grad.tolist() == [3, 0] and b.grad.tolist() == [-6]


def test_a_loss_that_names_no_terms_is_one():
    w = nn.Parameter(torch.ones(1))
    for loss in (Loss(w.sum(), {"watched": torch.ones(())}), Loss(w.sum(), {"a": w.detach().sum()}, {"a": 1.0})):
        assert list(ledger.trained_terms(loss)) == ["loss"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_terms_of_every_criterion_make_up_the_gradient_of_its_loss(name):
    torch.manual_seed(0)
    step = Step(Linear(), EXAMPLES[name](info(1))).double().eval()
    step.model.select(step.criterion.requires)
    batch = whole_batch(2 if isinstance(step.criterion, HiddenPatches) else 1)
    _, loss = step(batch, Progress(0, 0, 2, 1))
    terms, encoder = ledger.trained_terms(loss), [step.model.project]
    numbers = ledger.readings(list(terms), ledger.products(terms, ledger.by_depth(encoder)))
    assert terms.keys() == loss.weights.keys() and all(math.isfinite(value) for value in numbers.values())
    loss.total.backward()
    whole = math.sqrt(sum(float(p.grad.square().sum()) for p in step.model.project.parameters()))
    assert numbers["ledger/norm"] == pytest.approx(whole, rel=1e-5) and whole > 0
    assert sum(numbers[f"ledger/{term}/share"] for term in terms) == pytest.approx(1)


def whole_gradient(instance) -> float:
    """The norm of the encoder's gradient on the first held-out batch, batch norms as in training; moves the run."""
    run, modules = instance.run, (*instance.run.model.modules(), *instance.run.criterion.modules())
    sample = next(ordered(run.source.val(), run.batch_size, run.batch_size))
    for module in modules:
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    batch = run.task.prepare(sample, replace(instance.progress(), epoch=-1))
    run.criterion(run.model(batch), batch, instance.progress()).total.backward()
    gradients = [p.grad for e in run.model.trained_encoders() for p in e.parameters() if p.grad is not None]
    return float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())


def state_of(instance) -> dict[str, torch.Tensor]:
    found = {k: v.clone() for k, v in instance.state.state_dict().items()} | {"generator": torch.get_rng_state()}
    modes = torch.tensor([m.training for m in instance.state.modules()])
    return found | {"modes": modes, "without": torch.tensor([p.grad is None for p in instance.state.parameters()])}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_not_moved_and_its_gradient_is_that_of_training(name):
    instance, other = (trainer(*SMALL, *RUNS[name]) for _ in range(2))
    instance.train_step(next(instance.loader.epoch(0)))
    instance.optimizer.zero_grad()
    other.state.load_state_dict(instance.state.state_dict())
    other.step, before = instance.step, state_of(instance)
    numbers = instance.online.ledger(instance.progress())
    after = state_of(instance)
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert numbers["ledger/norm"] == pytest.approx(whole_gradient(other), rel=1e-4)
    assert all(math.isfinite(value) for value in numbers.values()) and numbers["ledger/images"] == 32
    assert instance.online.ledger(instance.progress()) == numbers


def test_every_criterion_is_among_them():
    assert set(RUNS) >= set(ELSEWHERE)  # tests/test_distributed.py sees that no other is missing.


def test_a_term_that_trains_other_parts_alone_shows_0():
    instance = trainer(*SMALL, *RUNS["mi_mae"])
    numbers = instance.online.ledger(instance.progress())
    assert numbers["ledger/approximation/norm"] == 0 and numbers["ledger/approximation/share"] == 0
    assert all(numbers[f"ledger/{term}/norm"] > 0 for term in ("reconstruction", "max", "min"))
    assert {key for key in numbers if "cosine" in key} == {
        f"ledger/cosine/{pair}" for pair in ("reconstruction/max", "reconstruction/min", "max/min")
    }


def test_precision_and_accumulation():
    plain = trainer(*SMALL, "batch_size=16")
    numbers = plain.online.ledger(plain.progress())
    # A batch is one of a process, in a forward pass of it.
    accumulated = trainer(*SMALL, "batch_size=32", "accumulate=2")
    assert accumulated.online.ledger(accumulated.progress()) == numbers
    rounded = trainer(*SMALL, "batch_size=16", "precision=bf16")
    found = rounded.online.ledger(rounded.progress())
    assert found["ledger/norm"] == pytest.approx(numbers["ledger/norm"], rel=0.1) and found != numbers


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_norms_go_by_the_batch_and_ask_no_other_process(kind, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 4)
    norm, x = kind(3).eval(), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with ledger.batch_statistics(nn.Sequential(norm)):
        found = norm(x)
    torch.testing.assert_close(found, (x - x.mean(dim=0)) * (x.var(dim=0, unbiased=False) + norm.eps).rsqrt())
    torch.testing.assert_close(norm(x), x / math.sqrt(1 + norm.eps))


def test_a_compiled_model_is_not_compiled_once_more():
    instance = trainer(*SMALL)
    instance.run.model._compiled_call_impl = None.__bool__  # Any call of it fails.
    assert instance.online.ledger(instance.progress())["ledger/norm"] > 0


# --- depths and batches -----------------------------------------------------------------------------------------------


def test_depths_go_from_the_image_to_the_features():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=6, num_heads=3)
    vit.reset_classifier(0)
    vit.pos_embed.requires_grad_(False)
    names = {id(p): name for name, p in vit.named_parameters()}
    found = [{names[id(p)].split(".")[0:2][-1] if "blocks" in names[id(p)] else names[id(p)].split(".")[0] for p in d}
             for d in ledger.by_depth([vit])]  # fmt: skip
    assert found == [{"cls_token", "patch_embed", "0", "1"}, {"2"}, {"3", "4"}, {"5", "norm"}]
    resnet = timm.create_model("resnet10t", num_classes=0)
    depths = ledger.by_depth([resnet])
    assert len(depths) == 4 and {id(p) for p in depths[2]} == {id(p) for p in resnet.layer3.parameters()}
    assert sum(map(len, depths)) == len(list(resnet.parameters()))
    # Side by side, and what two share counts once; a module of another kind has its children as layers.
    other = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert [len(depth) for depth in ledger.by_depth([resnet, resnet, other])] == [
        len(depth) + more for depth, more in zip(depths, (2, 2, 0, 0), strict=True)
    ]


def test_a_run_of_few_steps_reads_few_batches():
    assert [ledger.num_batches(steps) for steps in (0, 110, 400, 1000, 10**6)] == [1, 1, 2, 4, 4]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_with_it_is_the_run_without_it(tmp_path):
    """Bit for bit, in its losses and in its state."""
    assert train(tmp_path / "run", "eval.ledger=true") == 0
    plain = finished()
    assert losses(tmp_path / "run") == losses(plain)
    assert_same_state(checkpoint(tmp_path / "run"), checkpoint(plain))
    evaluations = [row for row in rows(tmp_path / "run") if "health/rankme" in row]
    assert len(evaluations) == 3 and all(row["ledger/info_nce/share"] == pytest.approx(1) for row in evaluations)
    assert not any(key.startswith("ledger/") for row in rows(plain) for key in row)


def test_without_a_held_out_loss_there_is_no_ledger(monkeypatch):
    with pytest.raises(UserError, match="criterion 'bank_nce' has none: use eval.ledger=false"):
        trainer("eval.ledger=true", "criterion=bank_nce")
    monkeypatch.setattr("ssl_ib.data.sources.digits.Digits.val", lambda self: None)
    with pytest.raises(UserError, match="reads gradients on held-out images, and none are held out"):
        trainer("eval.ledger=true")


def test_a_model_that_names_no_encoder(monkeypatch):
    monkeypatch.setattr("ssl_ib.models.siamese.Siamese.trained_encoders", lambda self: [])
    with pytest.raises(UserError, match="model 'siamese' names none that is trained"):
        trainer("eval.ledger=true")
    trainer()

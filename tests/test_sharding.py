"""FSDP: processes that share the weights learn what one process learns, whatever the method."""

import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import without_files
from ranks import answers_of, join
from torch import nn

import ssl_ib
from ssl_ib import RunInfo, api, distributed, sharding
from ssl_ib.config.config import configure
from ssl_ib.config.registry import CRITERIONS, MODELS
from ssl_ib.models.moco import MoCo
from ssl_ib.models.student_teacher import StudentTeacher
from ssl_ib.part import Step, parts
from ssl_ib.run import build_run
from ssl_ib.trainer import Trainer
from ssl_ib.types import Sample

STEPS, BATCH = 10, 12
#: Makes a recipe's model tiny, by what its backbone is.
BACKBONES = {
    "vit": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "resnet": {"stem": "cifar", "channels": [8, 8, 8, 12]},
    "swin": {"patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
}
SMALL = {"hidden": 24, "predictor_hidden": 24, "projector_hidden": 24, "head_hidden": 24, "decoder_dim": 16}
SMALL |= {"decoder_heads": 2, "projector_dim": 12, "head_dim": 12, "prototypes": 21, "K": 21, "size": 48, "blocks": 2}
SMALL |= {"num_negatives": 20, "bn_groups": 1}
#: A recipe of every model and every criterion, and all that hooks do: `test_every_model_and_criterion_is_among_them`.
RECIPES = (
    "svib_digits dino_cifar10 swav_cifar10 simclr_digits barlow_cifar10 byol_cifar10 moco_v3_cifar10 mrcl_digits "
    "mae_digits mi_mae_digits simmim_cifar10 mi_simmim_cifar10 moco_v2_cifar10 cmc_cifar10 "
    "pirl_cifar10 view_generator_semi_rgb moving_mnist_digit moving_mnist_supervised"
).split()
KINDS = {"model": MODELS, "criterion": CRITERIONS}
#: Those with a part that computes in float32: the classifiers' loss, and what SwAV watches of its assignments.
IN_FLOAT32 = ("view_generator_semi_rgb", "swav_cifar10")
#: Beside what a recipe says.
MORE = {
    "svib_digits": ["criterion.reinit=true"],
    "mae_digits": ["accumulate=2"],
    "dino_cifar10": ["model.freeze_last_epochs=0"],
    "swav_cifar10": ["criterion.freeze_epochs=0", "criterion.queue=24", "criterion.queue_epoch=0"],
    "barlow_cifar10": ["optim.name=lars", "optim.lr=0.1"],
    "simclr_digits": ["optim={name: lamb, clip: 0.5}"],
    "byol_cifar10": ["optim={name: sgd, lr: 0.05, clip: 0.5}"],
}


def shrunk(spec):
    """A part of a recipe with the sizes that a test has time for."""
    if not isinstance(spec, dict):
        return spec
    small = {key: SMALL[key] if key in SMALL and value else shrunk(value) for key, value in spec.items()}
    kind = next((kind for kind in BACKBONES if str(spec.get("backbone")).startswith(kind)), None)
    if kind is not None:
        weights = {k: v for k, v in (spec.get("backbone_args") or {}).items() if k in ("weight_init",)}
        small["backbone_args"] = {**BACKBONES[kind], **weights}
    return small


def overrides(recipe: str) -> list[str]:
    config = configure(recipe, without_files(recipe), [])
    parts = {kind: shrunk(getattr(config, kind)) for kind in ("model", "criterion")}
    common = [f"batch_size={BATCH}", f"epochs={2 * STEPS}", "precision=fp32", "workers=0", "device=cpu", "seed=3"]
    return [*without_files(recipe), *(f"{kind}={json.dumps(part)}" for kind, part in parts.items()), *common]


def still(run) -> None:
    """Leaves out what goes by the process: statistics of its own rows, and draws of its own."""
    for module in run.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = partial(frozen, module)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0


def frozen(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Batch norm by running statistics, which no batch moves."""
    return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def doubled(ask):
    """What a task or its views answer, in float64."""

    def answer(*given):
        found = ask(*given)
        if isinstance(found, torch.Tensor):
            return found.double()
        return replace(found, views=[view.double() for view in found.views])

    return answer


def trainer_of(recipe: str, mesh=None, out: Path | None = None) -> Trainer:
    """A tiny run's trainer, in float64, before its first step."""
    run = build_run(configure(recipe, [*overrides(recipe), *MORE.get(recipe, [])], []))
    still(run)
    for part in (run.model, run.criterion):
        part.double()
    run.task.prepare, run.views.center = doubled(run.task.prepare), doubled(run.views.center)
    return Trainer(run, out, mesh=mesh)


def whole(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return (x.full_tensor() if distributed.is_sharded(x) else x).clone()


def evaluated_by_one(trainer: Trainer, sample: Sample) -> None:
    """An evaluation of so little that the other processes have no share in it."""
    with trainer.gathered(), trainer.online.evaluating(), distributed.alone(), torch.no_grad():
        if int(os.environ.get("RANK", 0)) == 0:
            trainer.run.model.encode(trainer.run.views.center(sample[:2]))


def learned(recipe: str, mesh=None) -> dict[str, torch.Tensor]:
    """Losses and norms of some steps, gradients of the first, and all parameters and what hooks keep after the last."""
    trainer = trainer_of(recipe, mesh)
    found, rows = {}, []
    for sample in trainer.loader.epoch(0, 0):
        rows.append(trainer.train_step(sample))
        if trainer.step == 1:
            grads = {name: p.grad for name, p in trainer.state.named_parameters() if p.grad is not None}
            found |= {f"gradient {name}": whole(gradient) for name, gradient in grads.items()}
        if trainer.step == STEPS // 2:
            trainer._hook("on_epoch_end")
            evaluated_by_one(trainer, sample)
        if trainer.step == STEPS:
            break
    for key in ("loss", "gradient_norm"):
        found[key] = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    after = {name: value for name, value in trainer.state.state_dict().items() if isinstance(value, torch.Tensor)}
    return found | {f"after {name}": whole(value) for name, value in after.items()}


def work(rank: int, port: int, path: str) -> None:
    asked = json.loads((Path(path) / "asked.json").read_text())
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    join(rank, asked["ranks"], port)
    mesh = sharding.mesh(asked["parallel"], torch.device("cpu"))
    torch.save({recipe: learned(recipe, mesh) for recipe in asked["recipes"]}, f"{path}/{rank}.pt")
    distributed.shutdown()


def answers(folder: Path, recipes: list[str], parallel: str = "fsdp", ranks: int = 2) -> list[dict]:
    (folder / "asked.json").write_text(json.dumps({"recipes": recipes, "parallel": parallel, "ranks": ranks}))
    return answers_of(work, ranks, folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return answers(tmp_path_factory.mktemp("two"), RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_learn_what_one_does(recipe, two):
    """Losses, gradients, and after the last step all weights, teachers, queues, banks and running statistics."""
    compare(recipe, learned(recipe), two)


def compare(recipe: str, expected: dict, answers: list[dict]) -> None:
    # Of float64, sums in another order leave some 1e-13 after these steps. A part that computes in float32 leaves more.
    near = {"rtol": 1e-6, "atol": 1e-6} if recipe in IN_FLOAT32 else {"rtol": 1e-8, "atol": 1e-11}
    assert sum(name.startswith("gradient") for name in expected) > 5
    for answer in answers:
        assert answer[recipe].keys() == expected.keys()
        for name, value in expected.items():
            try:
                torch.testing.assert_close(answer[recipe][name], value, equal_nan=True, **near)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


@pytest.mark.slow
@pytest.mark.parametrize("parallel, ranks", [("hybrid", 4), ("fsdp", 3)])
def test_replicas_and_uneven_shards(parallel, ranks, tmp_path):
    """Of 4 processes two shard the weights, and the others have them again; of 3 some have no row of a short tensor."""
    recipes = ["svib_digits", "barlow_cifar10"]
    found = answers(tmp_path, recipes, parallel, ranks)
    for recipe in recipes:
        compare(recipe, learned(recipe), found)


def test_every_model_and_criterion_is_among_them():
    seen = {(kind, getattr(configure(r, without_files(r), []), kind)["name"]) for r in RECIPES for kind in KINDS}
    for kind, registry in KINDS.items():
        ours = [name for name in registry.names() if registry[name].__module__.startswith("ssl_ib.")]
        missing = [name for name in ours if (kind, name) not in seen]
        assert not missing, f"no recipe with the {kind} {', '.join(missing)}: add one to RECIPES"


SIZES = ((3, 16, 16),) * 2


def names(part) -> list[str]:
    """What `shards` of the parts inside gives, by name."""
    known = {id(module): name for name, module in part.named_modules()}
    return sorted(known[id(unit)] for each in parts(part) for unit in each.shards())


def test_blocks_and_heads_are_found():
    vit = {"backbone": "vit_tiny_patch16_224", "backbone_args": BACKBONES["vit"]}
    model = StudentTeacher(RunInfo(SIZES, 4), **vit, head_hidden=8, head_dim=4, prototypes=6)
    nets = ["student.backbone", "teacher.networks.0.backbone"]
    assert names(model) == sorted(
        [f"{n}.blocks.{i}" for n in nets for i in (0, 1)] + ["head.mlp", "teacher.networks.1.mlp"]
    )
    # Of blocks inside blocks the inner ones, and of what is inside them nothing more.
    resnet = MoCo(RunInfo(SIZES, 4), backbone="resnet18", backbone_args=BACKBONES["resnet"], momentum=None)
    expected = [f"encoder.backbone.layer{layer}.{i}" for layer in (1, 2, 3, 4) for i in (0, 1)]
    assert names(resnet) == sorted([*expected, "projector"])


class Odd(ssl_ib.Model):
    """Two layers that `shards` finds, and what a test does to them."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.head = kind, nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        if kind == "in common":
            self.tail = nn.Sequential(self.head[0])
        elif kind == "a number":
            self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        x = batch.views[0]
        return {"projection": [x @ self.head[0].weight if self.kind == "read" else self.head(x)]}

    def encode(self, images):
        return self.head(images)


class Mean(ssl_ib.Criterion):
    requires = frozenset({"projection"})

    def forward(self, outputs, batch, progress):
        return ssl_ib.Loss.weighted(mean=(outputs["projection"][0].square().mean(), 1.0))


def oddly(rank: int, port: int, path: str) -> None:
    join(rank, 2, port)
    mesh, said = sharding.mesh("fsdp", torch.device("cpu")), {}
    batch = ssl_ib.Batch([torch.ones(2, 4)], [None], torch.arange(2), torch.zeros(2))
    for kind in ("read", "in common", "a number", "fine"):
        try:
            sharded = sharding.Sharded(Step(Odd(kind), Mean()), mesh, kind == "fine", False)
            _, loss = sharded(batch, ssl_ib.Progress(0, 0, 1, 1))
            loss.total.backward()
            assert sharded.module.model.head[0].weight.grad.to_local().shape == (2, 4)
            with sharded.gathered():
                # Alone, and of bfloat16 where the policy says so.
                assert rank or sharded.module.model.head[0].weight.dtype == torch.bfloat16
                assert rank or sharded.module.model.encode(torch.ones(1, 4)).shape == (1, 4)
            assert sharded.module.model.head[0].weight.dtype == torch.float32
        except ssl_ib.UserError as error:
            said[kind] = str(error)
    torch.save(said, f"{path}/{rank}.pt")
    distributed.shutdown()


def test_what_cannot_be_sharded_is_said(tmp_path):
    first, second = answers_of(oddly, 2, tmp_path)
    assert list(first) == ["read", "in common", "a number"]
    assert "reads weights while they are in shards" in first["read"] and "`shards` of ssl_ib.Part" in first["read"]
    assert "process 0 shows the error" in second["read"]
    assert "model.head and model.tail have a parameter in common" in first["in common"]
    assert "model.gain has no dimension: make it [1]" in first["a number"]


@pytest.mark.parametrize("here, said", [("1", "got 1 of 4"), ("3", "got 3 of 4")])
def test_machines_of_unequal_processes_are_refused(here, said, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(ssl_ib.UserError, match=f"{said} on this one: use parallel=fsdp"):
        sharding.mesh("hybrid", torch.device("cpu"))


def test_one_process_shards_nothing(caplog):
    caplog.set_level("INFO")
    assert sharding.mesh("fsdp", torch.device("cpu")) is None and "nothing is sharded" in caplog.text
    assert sharding.mesh("ddp", torch.device("cpu")) is None


def differs(rank: int, port: int, path: str) -> None:
    """Two processes with other code of one plugin, and two with other configurations."""
    join(rank, 2, port)
    plugin = Path(path) / f"plugin{rank}.py"
    plugin.write_text(f"VERSION = {rank}\n")
    said = {}
    for what, overrides, plugins in (
        ("code", [], [str(plugin)]),
        ("configuration", ["optim.lr=0.5", "device=cpu"] if rank else ["device=auto"], []),
    ):
        try:
            api._check_alike(configure("simclr_digits", overrides, plugins))
        except ssl_ib.UserError as error:
            said[what] = f"{type(error).__name__}: {error}"
    torch.save(said, f"{path}/{rank}.pt")
    distributed.shutdown()


def test_processes_of_different_configurations_or_code_are_refused(tmp_path):
    first, second = answers_of(differs, 2, tmp_path)
    refused = "UserError: process 1 does not run what process 0 runs, and they share one run: "
    assert second["configuration"].startswith(f"{refused}optim.lr: 0.002 -> 0.5.")
    assert second["code"].startswith(refused)
    before, after = re.search(r"code of ssl_ib and plugins: '(.*?)' -> '(.*?)'", second["code"]).groups()
    assert before != after and before.startswith(f"{ssl_ib.__version__}, ")
    assert all(first[what].startswith("EndedElsewhere: process 1 has failed") for what in second)

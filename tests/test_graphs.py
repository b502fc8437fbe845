"""`compile=graphs` without a GPU: what CUDA graphs ask of a step, and what a user is told."""

import pytest
import torch
from harness import without_files
from torch import nn

from ssl_ib import ConfigError
from ssl_ib.config.config import resolve
from ssl_ib.graphs import Graphs
from ssl_ib.run import build_run
from ssl_ib.trainer import Trainer

VIT = "model.backbone_args={patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}"
RESNET = "model.backbone_args={stem: cifar, channels: [8, 8, 8, 8]}"
HEADS = ("model.head_hidden=32", "model.head_dim=16", "views.size=16", "views.local_size=8")
#: Every hook that keeps something, every teacher, crops of two sizes, micro-batches.
RECIPES = [
    ("dino_cifar10", (VIT, *HEADS, "model.prototypes=32")),
    ("svib_digits", (VIT, *HEADS)),
    ("swav_cifar10", (VIT, *HEADS, "criterion.K=32")),
    ("mi_mae_digits", ("accumulate=2",)),
    ("byol_cifar10", (VIT, "views.size=16", "model.projector_hidden=32", "model.predictor_hidden=32")),
    ("moco_v2_cifar10", (RESNET, "views.size=16", "criterion.size=64")),
    ("instdis_cifar10", (RESNET, "views.size=16", "criterion.num_negatives=64")),
]


def trainer(recipe: str, *overrides: str) -> Trainer:
    """With graphs on a CPU, which a configuration would refuse."""
    run = build_run(resolve(recipe, [*without_files(recipe), *overrides, "device=cpu"]), dry=True)
    run.config = run.config.model_copy(update={"compile": "graphs"})
    return Trainer(run, None)


class Replayed:
    """What CUDA graphs do to a step, without any: outputs and gradients are overwritten when the next step begins."""

    def __init__(self, monkeypatch):
        self.held: list[torch.Tensor] = []
        self.steps = self.overwritten = 0
        monkeypatch.setattr(nn.Module, "compile", self.compile)
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self.begin_step)

    def compile(self, model: nn.Module | None = None, *, mode: str) -> None:
        assert mode == "reduce-overhead"

    def watch(self, instance: Trainer) -> None:
        own = {x.untyped_storage().data_ptr() for x in (*instance.state.parameters(), *instance.state.buffers())}

        def keep(module: nn.Module, given: tuple, outputs: dict) -> None:
            found = [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]
            self.held += [x for x in found if x.is_floating_point() and x.untyped_storage().data_ptr() not in own]

        instance.run.model.register_forward_hook(keep)
        for parameter in instance.run.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.held.append(p.grad))

    def begin_step(self) -> None:
        self.steps += 1
        with torch.no_grad():
            for x in self.held:
                x.detach().fill_(torch.nan)
                self.overwritten += 1
        self.held.clear()


@pytest.mark.parametrize(("recipe", "overrides"), RECIPES)
def test_nothing_of_a_step_is_read_in_the_next_and_weights_stay_where_they_are(monkeypatch, recipe, overrides):
    replayed = Replayed(monkeypatch)
    instance = trainer(recipe, *overrides)
    replayed.watch(instance)
    places = {name: x.data_ptr() for name, x in instance.state.state_dict().items()}
    batches = instance.loader.epoch(0)
    for _ in range(3):
        # It raises where the loss or the gradient is not finite.
        instance.train_step(next(batches))
    assert replayed.steps == 3 and replayed.overwritten
    instance.state.load_state_dict(instance.state.state_dict())
    for name, x in instance.state.state_dict().items():
        assert x.isfinite().all() and x.data_ptr() == places[name], name


def test_what_torch_leaves_out_is_said_once(capsys, monkeypatch):
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_utils import log_cudagraph_skip_and_bump_counter

    monkeypatch.setattr(nn.Module, "compile", lambda model, mode: None)
    monkeypatch.setitem(counters["inductor"], "cudagraph_skips", 5)
    graphs = Graphs(nn.Linear(2, 2))
    for step in range(5):
        graphs.begin_step()
        if step == 0:
            log_cudagraph_skip_and_bump_counter("as torch does")
    assert capsys.readouterr().out.count("compile=graphs: torch left 1 of the model's graphs out") == 1


def test_refusals():
    with pytest.raises(ConfigError) as refused:
        build_run(resolve("simclr_digits", ["compile=graphs", "parallel=fsdp", "device=cpu"]))
    found = str(refused.value)
    assert "graphs are a GPU's, and the device is cpu: use compile=true" in found
    assert "parallel=fsdp moves them" in found

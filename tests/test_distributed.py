"""Several processes must learn what one process learns from the whole batch: same loss, same gradients."""

from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import RANKS, answers_of, join
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_ib import Batch, Masks, Model, Progress, RunInfo, distributed
from ssl_ib.config.registry import CRITERIONS
from ssl_ib.criterions.bank_nce import BankNCE
from ssl_ib.criterions.barlow_twins import BarlowTwins
from ssl_ib.criterions.byol import BYOL
from ssl_ib.criterions.info_nce import InfoNCE
from ssl_ib.criterions.mae import MAE
from ssl_ib.criterions.moco_v3 import MoCoV3
from ssl_ib.criterions.mrcl import MRCL
from ssl_ib.criterions.queue_nce import QueueNCE
from ssl_ib.criterions.reconstruction import HiddenPatches
from ssl_ib.criterions.simmim import SimMIM
from ssl_ib.criterions.supervised import Supervised
from ssl_ib.criterions.view_game import ViewGame
from ssl_ib.part import Context, Step, detached

#: Images of a step, of which each of two or three processes has as many.
IMAGES = 6
FACTORS = {"digit": torch.tensor([0, 1, 2, 2, 1, 0]), "place": torch.linspace(-1, 1, 12).view(6, 2).square()}
#: Of every built-in criterion at least one example, which `Linear` gives what it reads...
EXAMPLES = {
    "info_nce": lambda info: InfoNCE(),
    "info_nce_one_way": lambda info: InfoNCE(symmetric=False),
    "info_nce_cross": lambda info: InfoNCE(negatives="cross"),
    "info_nce_eq16": lambda info: InfoNCE(negatives="cross", symmetric=False),
    "barlow_twins": lambda info: BarlowTwins(lambd=0.1),
    "byol": lambda info: BYOL(),
    "moco_v3": lambda info: MoCoV3(),
    "mrcl": lambda info: MRCL(),
    "mrcl_barlow_all": lambda info: MRCL(BarlowTwins(), rec_reduce="all", norm_pix=True),
    "mrcl_byol_sum": lambda info: MRCL(BYOL(), rec_reduce="sum"),
    "mrcl_moco_v3": lambda info: MRCL(MoCoV3()),
    "mae": lambda info: MAE(info),
    "simmim": lambda info: SimMIM(info),
    "queue_nce": lambda info: QueueNCE(info, size=12, queries=(0, 1), temperature=0.2),
    "queue_nce_two_queues": lambda info: QueueNCE(info, size=6, queries=(0, 1), key=(1, 0)),
    "supervised": lambda info: Supervised(info),
    "view_game": lambda info: ViewGame(),
    "bank_nce": lambda info: BankNCE(info, negatives="all", temperature=0.2),
    "bank_nce_cmc": lambda info: BankNCE(info, queries=(0, 1), banks=(1, 0), num_negatives=20),
}
#: ... or a test of its own of several processes: the file and the function.
ELSEWHERE = {
    "dino": ("criterions/test_dino.py", "test_processes_are_one"),
    "mi_mae": ("criterions/test_mi_mae_run.py", "test_ranks_learn_what_one_process_learns"),
    "svib": ("criterions/test_svib.py", "test_processes_learn_what_one_does"),
    "swav": ("criterions/test_swav.py", "test_processes_are_one"),
}


class Linear(Model):
    """One linear layer an output, on images of 4 x 4 pixels with patches of 2 x 2.

    Gives and trains only what is wanted: DDP waits for the gradient of everything its outputs are made of.
    """

    def __init__(self):
        super().__init__()
        self.project, self.predict, self.decode = nn.Linear(16, 5), nn.Linear(5, 5), nn.Linear(5, 16)
        self.classify = nn.Linear(5, 3)

    def select(self, names):
        super().select(names)
        self.predict.requires_grad_("prediction" in names)
        self.decode.requires_grad_("reconstruction" in names)
        self.classify.requires_grad_("logits" in names)

    def forward(self, batch: Batch):
        projection = [self.project(view.flatten(1)) for view in batch.views]
        outputs = {
            "features": projection,
            "projection": projection,
            "logits": [self.classify(z[batch.label >= 0]) for z in projection],
            "prediction": [self.predict(z) for z in projection],
            "target": [z.detach() for z in projection],
            "reconstruction": [self.decode(z).unflatten(1, (4, 4)) for z in projection],
        }
        return {name: outputs[name] for name in self.wanted}

    def encode(self, images):
        return self.project(images.flatten(1))


def test_batch_norm_is_common_on_gpus_and_keeps_names_and_parameters(caplog):
    caplog.set_level("INFO")
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(BatchNormAct2d(4)))
    names, parameters = list(net.state_dict()), list(net.parameters())
    assert distributed.with_common_batch_norm(net, torch.device("cpu")) is net and type(net[1]) is nn.BatchNorm1d
    assert "each process's own" in caplog.text
    caplog.clear()
    net = distributed.with_common_batch_norm(net, torch.device("cuda"))
    assert not caplog.text and all(isinstance(part, nn.SyncBatchNorm) for part in (net[1], net[2][0]))
    # timm's does more than normalise.
    assert isinstance(net[2][0].act, nn.ReLU)
    assert list(net.state_dict()) == names
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))


def whole_batch(masked: int = 1) -> Batch:
    """Two views of all processes' images, the first `masked` of them with masks."""
    generator, index = torch.Generator().manual_seed(0), torch.arange(IMAGES)
    views = [torch.randn(len(index), 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    keep = torch.rand(len(index), 4, generator=generator).argsort(dim=1)[:, :3]
    masks = Masks.from_keep(keep, 4)
    masks = [masks if view < masked else None for view in range(2)]
    # One process has more labelled images than the other.
    return Batch(views, masks, index, torch.tensor([0, 2, 1, -1, 1, -1]), FACTORS)


def share(batch: Batch, rows: slice) -> Batch:
    masks = [None if m is None else Masks(m.keep[rows], m.mask[rows]) for m in batch.masks]
    factors = {name: values[rows] for name, values in batch.factors.items()}
    return Batch([v[rows] for v in batch.views], masks, batch.index[rows], batch.label[rows], factors)


def info(world: int) -> RunInfo:
    given = {"images": lambda: 9, "width": lambda name: 5, "factors": lambda: FACTORS}
    return RunInfo(((1, 4, 4),) * 2, IMAGES // world, world, **given)


def learn(name: str, rows: slice = slice(None)) -> dict[str, dict[str, torch.Tensor]]:
    """Loss and gradients of `Linear` with fixed weights in a second step, and what the criterion remembers after it."""
    torch.manual_seed(0)
    world = distributed.world_size()
    step = Step(Linear(), EXAMPLES[name](info(world))).double()
    step.model.select(step.criterion.requires)
    batch = share(whole_batch(2 if isinstance(step.criterion, HiddenPatches) else 1), rows)
    wrapped = DistributedDataParallel(step) if world > 1 else step
    for number in range(2):
        progress = Progress(number, 0, 2, 1)
        step.zero_grad()
        outputs, loss = wrapped(batch, progress)
        loss.total.backward()
        context = Context(progress, lambda *a: None, lambda p: None)
        with torch.no_grad():
            step.criterion.after_forward(detached(outputs), batch, detached(loss.terms), context)
    gradients = {n: p.grad for n, p in step.named_parameters() if p.grad is not None}
    value = distributed.all_reduce_mean(loss.total.detach())
    return {"loss": {"total": value}, "gradients": gradients, "memory": dict(step.criterion.named_buffers())}


def check_collectives() -> None:
    """The collectives' values, and gradients of the sum of the ranks' losses."""
    me, ranks = distributed.rank(), distributed.world_size()
    everyone = torch.arange(1.0, ranks + 1)
    x = torch.full((2, 3), me + 1.0, dtype=torch.float64, requires_grad=True)
    gathered = distributed.gather(x)
    assert torch.equal(gathered.detach(), everyone.double().repeat_interleave(2)[:, None].expand(-1, 3))
    weight = (me + 1.0) * torch.arange(2 * ranks)[:, None]  # rank r's loss: r-dependent, different for every row
    (weight * gathered).sum().backward()
    expected = everyone.sum() * torch.arange(2 * ranks)[2 * me : 2 * me + 2, None].expand(-1, 3)
    assert torch.equal(x.grad, expected.double())
    # Not contiguous, and integers without gradient.
    assert torch.equal(distributed.gather(x.detach().T), everyone.double().repeat_interleave(3)[:, None].expand(-1, 2))
    assert distributed.gather(torch.tensor([me])).tolist() == list(range(ranks))

    for reduce, share_of in ((distributed.all_reduce_sum, 1.0), (distributed.all_reduce_mean, 1 / ranks)):
        x.grad = None
        total = reduce(x)
        assert torch.equal(total.detach(), torch.full((2, 3), share_of * everyone.sum().item()).double())
        ((me + 1) * total).sum().backward()
        # A third is no binary number.
        expected = torch.full((2, 3), share_of * everyone.sum().item()).double()
        torch.testing.assert_close(x.grad, expected, rtol=1e-15, atol=0)


def work(rank: int, port: int, path: str, ranks: int) -> None:
    join(rank, ranks, port)
    assert (distributed.rank(), distributed.world_size()) == (rank, ranks) and distributed.is_main() == (rank == 0)
    check_collectives()
    rows = slice(IMAGES // ranks * rank, IMAGES // ranks * (rank + 1))
    torch.save({name: learn(name, rows) for name in EXAMPLES}, f"{path}/{rank}.pt")
    distributed.shutdown()
    assert distributed.world_size() == 1


@pytest.fixture(scope="module", params=RANKS)
def answers(request, tmp_path_factory) -> list[dict]:
    return answers_of(partial(work, ranks=request.param), request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_ranks_learn_what_one_process_learns(name, answers):
    expected = learn(name)
    trained = "model.project.weight"
    assert expected["gradients"][trained].abs().sum() > 0.01
    # The labels' part of a game is computed in float32.
    near = {"rtol": 1e-5, "atol": 1e-7} if name == "view_game" else {"rtol": 1e-10, "atol": 1e-12}
    for answer in answers:
        torch.testing.assert_close(answer[name], expected, **near)


def test_every_criterion_is_among_them():
    built_in = {n: CRITERIONS[n] for n in CRITERIONS.names() if CRITERIONS[n].__module__.startswith("ssl_ib.")}
    shown = {type(make(info(1))) for make in EXAMPLES.values()}
    missing = [name for name, criterion in built_in.items() if criterion not in shown and name not in ELSEWHERE]
    assert not missing, f"no example of several processes for {', '.join(missing)}: add one to EXAMPLES or ELSEWHERE"
    for file, function in ELSEWHERE.values():
        assert f"\ndef {function}(" in (Path(__file__).parent / file).read_text()


def test_a_single_process_needs_no_group(monkeypatch):
    for world in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if world:
            monkeypatch.setenv("WORLD_SIZE", world)
        distributed.initialise("cpu")
        x = torch.ones(2, 3, requires_grad=True)
        assert distributed.gather(x) is x and distributed.all_reduce_sum(x) is x
        assert torch.equal(distributed.all_reduce_mean(x), x)
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        distributed.shutdown()

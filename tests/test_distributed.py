"""Two processes must learn what one process learns from the whole batch: same loss, same gradients."""

import pytest
import torch
from ranks import answers_of, join
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_ib import Batch, Masks, Model, Progress, distributed
from ssl_ib.criterions.barlow_twins import BarlowTwins
from ssl_ib.criterions.byol import BYOL
from ssl_ib.criterions.info_nce import InfoNCE
from ssl_ib.criterions.moco_v3 import MoCoV3
from ssl_ib.criterions.mrcl import MRCL
from ssl_ib.part import Step

RANKS, ROWS = 2, 3
CRITERIONS = {
    "info_nce": lambda: InfoNCE(),
    "info_nce_one_way": lambda: InfoNCE(symmetric=False),
    "info_nce_cross": lambda: InfoNCE(negatives="cross"),
    "info_nce_eq16": lambda: InfoNCE(negatives="cross", symmetric=False),
    "barlow_twins": lambda: BarlowTwins(lambd=0.1),
    "byol": lambda: BYOL(),
    "moco_v3": lambda: MoCoV3(),
    "mrcl": lambda: MRCL(),
    "mrcl_barlow_all": lambda: MRCL(BarlowTwins(), rec_reduce="all", norm_pix=True),
    "mrcl_byol_sum": lambda: MRCL(BYOL(), rec_reduce="sum"),
    "mrcl_moco_v3": lambda: MRCL(MoCoV3()),
}


class Linear(Model):
    """One linear layer an output, on images of 4 x 4 pixels with patches of 2 x 2.

    Gives and trains only what is wanted: DDP waits for the gradient of everything its outputs are made of.
    """

    def __init__(self):
        super().__init__()
        self.project, self.predict, self.decode = nn.Linear(16, 5), nn.Linear(5, 5), nn.Linear(5, 16)

    def select(self, names):
        super().select(names)
        self.predict.requires_grad_("prediction" in names)
        self.decode.requires_grad_("reconstruction" in names)

    def forward(self, batch: Batch):
        projection = [self.project(view.flatten(1)) for view in batch.views]
        outputs = {
            "projection": projection,
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


def whole_batch() -> Batch:
    generator, index = torch.Generator().manual_seed(0), torch.arange(RANKS * ROWS)
    views = [torch.randn(len(index), 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    keep = torch.rand(len(index), 4, generator=generator).argsort(dim=1)[:, :3]
    return Batch(views, [Masks.from_keep(keep, 4), None], index, index)


def share(batch: Batch, rows: slice) -> Batch:
    masks = [None if m is None else Masks(m.keep[rows], m.mask[rows]) for m in batch.masks]
    return Batch([v[rows] for v in batch.views], masks, batch.index[rows], batch.label[rows])


def learn(name: str, batch: Batch, parallel: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of `Linear` with fixed weights."""
    torch.manual_seed(0)
    step = Step(Linear(), CRITERIONS[name]()).double()
    step.model.select(step.criterion.requires)
    wrapped = DistributedDataParallel(step) if parallel else step
    _, loss = wrapped(batch, Progress(0, 0, 1, 1))
    loss.total.backward()
    return loss.total.detach(), {n: p.grad for n, p in step.named_parameters() if p.grad is not None}


def check_collectives() -> None:
    """The collectives' values, and gradients of the sum of the ranks' losses."""
    me, everyone = distributed.rank(), torch.arange(1.0, RANKS + 1)
    x = torch.full((2, 3), me + 1.0, dtype=torch.float64, requires_grad=True)
    gathered = distributed.gather(x)
    assert torch.equal(gathered.detach(), everyone.double().repeat_interleave(2)[:, None].expand(-1, 3))
    weight = (me + 1.0) * torch.arange(2 * RANKS)[:, None]  # rank r's loss: r-dependent, different for every row
    (weight * gathered).sum().backward()
    expected = everyone.sum() * torch.arange(2 * RANKS)[2 * me : 2 * me + 2, None].expand(-1, 3)
    assert torch.equal(x.grad, expected.double())
    # Not contiguous, and integers without gradient.
    assert torch.equal(distributed.gather(x.detach().T), everyone.double().repeat_interleave(3)[:, None].expand(-1, 2))
    assert distributed.gather(torch.tensor([me])).tolist() == list(range(RANKS))

    for reduce, share_of in ((distributed.all_reduce_sum, 1.0), (distributed.all_reduce_mean, 1 / RANKS)):
        x.grad = None
        total = reduce(x)
        assert torch.equal(total.detach(), torch.full((2, 3), share_of * everyone.sum().item()).double())
        ((me + 1) * total).sum().backward()
        assert torch.equal(x.grad, torch.full((2, 3), share_of * everyone.sum().item()).double())


def work(rank: int, port: int, path: str) -> None:
    join(rank, RANKS, port)
    assert (distributed.rank(), distributed.world_size()) == (rank, RANKS) and distributed.is_main() == (rank == 0)
    check_collectives()
    batch = share(whole_batch(), slice(ROWS * rank, ROWS * (rank + 1)))
    answers = {}
    for name in CRITERIONS:
        loss, gradients = learn(name, batch, parallel=True)
        answers[name] = (distributed.all_reduce_mean(loss), gradients)
    torch.save(answers, f"{path}/{rank}.pt")
    distributed.shutdown()
    assert distributed.world_size() == 1


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict]:
    return answers_of(work, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CRITERIONS)
def test_two_ranks_learn_what_one_process_learns(name, answers):
    loss, gradients = learn(name, whole_batch(), parallel=False)
    assert gradients["model.project.weight"].abs().sum() > 0.01
    for answer in answers:
        torch.testing.assert_close(answer[name][0], loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(answer[name][1], gradients, rtol=1e-10, atol=1e-12)


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

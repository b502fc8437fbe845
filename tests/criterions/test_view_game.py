"""The objective of learned views: its switches, its labelled rows, and several processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import answers_of, join
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_ib import Batch, Model, Progress, UserError, distributed
from ssl_ib.criterions.info_nce import InfoNCE
from ssl_ib.criterions.view_game import ViewGame
from ssl_ib.part import Step

LABELS = torch.tensor([-1, 2, -1, 0, -1, -1, 1, -1])
PROGRESS = Progress(0, 0, 1, 1)


class Linear(Model):
    """Two views of a row, each projected and classified by a layer."""

    provides = frozenset({"projection", "logits"})
    counts = {"projection": 2, "logits": 2}

    def __init__(self):
        super().__init__()
        self.project = nn.ModuleList([nn.Linear(5, 4) for _ in range(2)])
        self.classify = nn.ModuleList([nn.Linear(5, 3) for _ in range(2)])

    def forward(self, batch):
        x, known = batch.views[0], batch.label >= 0
        return {
            "projection": [layer(x) for layer in self.project],
            "logits": [layer(x[known]) for layer in self.classify],
        }

    def encode(self, images):
        return images


def batch(rows=slice(None)):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch([x[rows]], [None], torch.arange(8)[rows], LABELS[rows])


def model():
    torch.manual_seed(0)
    return Linear().double()


def test_the_parts_add_up():
    outputs = model()(batch())
    whole, nce, labels = (
        ViewGame(**switches)(outputs, batch(), PROGRESS) for switches in ({}, {"supervised": False}, {"nce": False})
    )
    torch.testing.assert_close(whole.total, nce.total + labels.total)
    plain = InfoNCE(0.15, negatives="cross")(outputs)
    torch.testing.assert_close(nce.total, plain.total)
    known = LABELS[LABELS >= 0]
    for number, logits in enumerate(outputs["logits"], start=1):
        torch.testing.assert_close(labels.terms[f"ce_{number}"], F.cross_entropy(logits.float(), known))
        right = (logits.argmax(1) == known).float().mean()
        torch.testing.assert_close(labels.terms[f"accuracy_{number}"], right)
    assert set(whole.terms) == set(nce.terms) | set(labels.terms)
    assert whole.weights == {"info_nce": 1.0, "ce_1": 1.0, "ce_2": 1.0}
    assert float(whole.terms["mi_ceiling"]) == pytest.approx(math.log(8))
    # What it asks for is what it reads.
    assert ViewGame(nce=False).requires == {"logits"} and ViewGame(supervised=False).requires == {"projection"}


def test_without_a_labelled_row_there_is_nothing_to_learn_from_labels():
    unlabelled = batch([0, 2])
    loss = ViewGame(nce=False)(model()(unlabelled), unlabelled, PROGRESS)
    assert float(loss.total.detach()) == 0.0 and float(loss.terms["accuracy_1"]) == 0.0


def test_both_parts_off():
    with pytest.raises(UserError, match="leave nothing to learn"):
        ViewGame(nce=False, supervised=False)


def answer(module, rows):
    loss = module(batch(rows), PROGRESS)[1]
    loss.total.backward()
    terms = {name: distributed.all_reduce_mean(term.detach().double()) for name, term in loss.terms.items()}
    return {**terms, **{n: p.grad for n, p in module.named_parameters()}}


def work(rank, port, folder):
    join(rank, 2, port)
    module = DistributedDataParallel(Step(model(), ViewGame()))
    # Of the first process's rows two are labelled, of the second's one.
    found = answer(module, slice(4 * rank, 4 * rank + 4))
    torch.save({name.removeprefix("module."): value for name, value in found.items()}, f"{folder}/{rank}.pt")
    distributed.shutdown()


def test_two_processes_learn_what_one_does(tmp_path):
    alone = answer(Step(model(), ViewGame()), slice(None))
    for found in answers_of(work, 2, tmp_path):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, check_dtype=False, msg=name)

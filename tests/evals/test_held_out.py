"""The loss on held-out images, taken at every evaluation."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from harness import trainer

from ssl_ib import distributed
from ssl_ib.data.loader import ordered
from ssl_ib.evals.online import Online


def by_hand(instance, count: int) -> dict[str, float]:
    """Means of the loss's terms over the first `count` batches."""
    run, sums = instance.run, {}
    progress = replace(instance.progress(), epoch=-1)
    with torch.no_grad(), instance.online.evaluating():
        for sample in islice(ordered(run.source.val(), run.batch_size, 512), count):
            batch = run.task.prepare(sample, progress)
            loss = run.criterion(run.model(batch), batch, progress)
            for name, value in {"loss": loss.total, **loss.terms}.items():
                sums[name] = sums.get(name, 0.0) + float(value) / count
    return {f"held_out/{name}": value for name, value in sums.items()}


def held_out(instance) -> dict[str, float]:
    return {k: v for k, v in Online(instance.run).evaluate(instance.progress()).items() if k.startswith("held_out/")}


def test_it_is_the_mean_of_whole_batches_of_the_runs_size():
    instance = trainer("batch_size=96")
    assert len(instance.run.source.val()) == 359
    # 359 = 3 x 96 + 71: fewer candidates make another loss, so the rest is left out.
    found, expected = held_out(instance), by_hand(instance, 3)
    assert found.keys() == expected.keys() and {"held_out/loss", "held_out/info_nce"} <= found.keys()
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-5), name
    assert found["held_out/loss"] != pytest.approx(by_hand(instance, 4)["held_out/loss"], rel=1e-5)


def test_a_batch_larger_than_the_held_out_images_is_cut():
    instance = trainer("batch_size=400")
    assert held_out(instance)["held_out/loss"] == pytest.approx(by_hand(instance, 1)["held_out/loss"], rel=1e-5)


def test_it_is_of_a_micro_batchs_size():
    """A criterion that compares images gets as many of them as in training."""
    instance = trainer("batch_size=96", "accumulate=4")
    sizes = []
    forward = instance.run.criterion.forward
    instance.run.criterion.forward = lambda outputs, batch, progress: (
        sizes.append(len(batch.index)) or forward(outputs, batch, progress)
    )
    held_out(instance)
    assert set(sizes) == {24}


def test_it_moves_nothing_and_repeats_itself():
    instance = trainer()
    state = {k: v.clone() for k, v in instance.state.state_dict().items()}
    first = held_out(instance)
    instance.step += 5
    assert held_out(instance) == first
    assert all(torch.equal(state[k], v) for k, v in instance.state.state_dict().items())
    assert instance.run.criterion.training and instance.run.model.training


def test_without_held_out_images_there_is_none(monkeypatch):
    instance = trainer()
    monkeypatch.setattr(instance.run.source, "val", lambda: None)
    assert held_out(instance) == {}


def test_alone_is_for_the_moment(monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 2)
    assert (distributed.world_size(), distributed.rank()) == (4, 2)
    with pytest.raises(ZeroDivisionError), distributed.alone():
        assert (distributed.world_size(), distributed.rank()) == (1, 0)
        x = torch.ones(3)
        assert distributed.gather(x) is x and torch.equal(distributed.all_reduce_mean(x), x)
        _ = 1 / 0
    assert (distributed.world_size(), distributed.rank()) == (4, 2)


# --- labels -----------------------------------------------------------------------------------------------------------


def relabel(images, labels: list[int]) -> None:
    images.labels = torch.tensor(labels + [-1] * (len(images) - len(labels)))


def test_chance_is_the_share_of_the_most_frequent_class_among_the_images_that_are_scored():
    instance = trainer()
    source = instance.run.source
    shares = source.val().labels.bincount() / len(source.val())
    assert Online(instance.run).chance() == {"knn/top1": pytest.approx(float(shares.max())), "images": 359}
    relabel(source.val(), [0] * 6 + [1] * 2)
    assert Online(instance.run).chance() == {"knn/top1": 0.75, "images": 8}
    assert Online(instance.run, limit=4).chance() == {"knn/top1": 0.75, "images": 4}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("labels", [[], [3] * 40], ids=["none", "one class"])
def test_less_than_two_classes_give_no_accuracy(split, labels):
    instance = trainer()
    relabel(getattr(instance.run.source, split)(), labels)
    online = instance.online
    assert online.chance() == online.raw_pixels() == {}
    found = online.evaluate(instance.progress(), final=True)
    assert "held_out/loss" in found and "health/rankme" in found and not any("top1" in name for name in found)


def test_the_few_images_with_labels_are_all_scored():
    instance = trainer("eval.train_images=30")
    relabel(instance.run.source.train(), list(range(10)) * 3)
    counts = [len(index) for _, index in Online(instance.run)._splits()]
    assert counts == [30, 359]


def test_a_criterion_without_a_held_out_loss():
    instance = trainer()
    instance.run.criterion.held_out = False
    assert held_out(instance) == {} and "health/rankme" in instance.online.evaluate(instance.progress())

"""What a part of a plugin gets wrong is said once, by its class and place, before anything is written."""

import inspect
from dataclasses import replace

import pytest
import torch
from harness import train, trainer
from torch import nn

from ssl_ib import Batch, Criterion, Loss, Masks, Model, Nats, Part, UserError, contract
from ssl_ib.config import registry
from ssl_ib.config.registry import CRITERIONS


class Answers(Criterion):
    """Returns what it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, outputs, batch, progress):
        return self.answer


class Outer(Criterion):
    """Holds another criterion."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, outputs, batch, progress):
        return Loss.weighted(both=(self.inner(outputs, batch, progress).total, 1.0))


class Gives(Model):
    """Returns what it was given, and encodes as it was told."""

    def __init__(self, answer, features=None):
        super().__init__()
        self.answer, self.features = answer, features
        self.wanted = frozenset({"projection"})

    def encode(self, images):
        return torch.zeros(len(images), 3) if self.features is None else self.features

    def forward(self, batch):
        return self.answer


class Prepares(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def prepare(self, sample, progress):
        return self.answer


@pytest.fixture(scope="module")
def instance():
    return trainer()


ONE, PROJECTION = torch.tensor(1.0), torch.zeros(8, 4)
FINE = {"projection": [PROJECTION, PROJECTION]}


def check(instance, model=None, criterion=None, task=None, num_global=None) -> None:
    run = instance.run
    sample = next(instance.loader.epoch(0))[:8]
    model, criterion = model or Gives(FINE), criterion or Answers(Loss(ONE, {}))
    plain = torch.zeros(2, 3, 16, 16)
    contract.check_step(task or run.task, model, criterion, sample, plain, instance.progress(), num_global)


def where(part: type, method: str) -> str:
    """`file:line` of a method of this file."""
    return f"{__file__}:{inspect.getsourcelines(getattr(part, method))[1]}"


@pytest.mark.parametrize(
    "answer, message",
    [
        (ONE, "returned a Tensor, expected ssl_ib.Loss, such as Loss.weighted"),
        (None, "returned a NoneType, expected ssl_ib.Loss"),
        (
            Loss(torch.zeros(8), {}),
            "expected the loss's total to be a tensor without dimensions, got a tensor of shape",
        ),
        (Loss(ONE, {"d": 0.5}), "expected the loss's d to be a tensor without dimensions, got 0.5"),
        (Loss(ONE, {"d": ONE}, {"e": 1.0}), "the loss has weights of terms that it lacks: e"),
    ],
)
def test_what_a_criterion_returns(instance, answer, message):
    check(instance, criterion=Answers(Loss.weighted(d=(ONE, 1.0))))
    for criterion in (Answers(answer), Outer(Answers(answer))):
        with pytest.raises(UserError) as caught:
            check(instance, criterion=criterion)
        assert str(caught.value).startswith(f"criterion Answers: forward ({where(Answers, 'forward')})")
        assert message in str(caught.value)


def test_what_a_criterion_says_of_numbers_in_nats(instance):
    criterion = Answers(Loss(ONE, {"bound": ONE, "most": ONE}))
    criterion.nats = {"bound": Nats("lower bound", "what is shared", "most"), "most": Nats("estimate", "the same", 1.5)}
    check(instance, criterion=criterion)
    criterion.nats |= {"other": Nats("upper bound", "what is held", "least")}
    with pytest.raises(UserError, match="`nats` is of terms that the loss lacks: least, other"):
        check(instance, criterion=criterion)


@pytest.mark.parametrize(
    "answer, message",
    [
        ([PROJECTION] * 2, "returned a list, expected a dict of lists, one tensor a view"),
        ({"features": [PROJECTION] * 2}, "left out projection, which the criterion reads; it returned ['features']"),
        ({"projection": PROJECTION}, "to be a list of 2 tensors, one a view, got a tensor of shape [8, 4]"),
        ({"projection": [PROJECTION]}, "to be a list of 2 tensors, one a view, got 1 of them: [a tensor of shape"),
        ({"projection": [PROJECTION] * 3}, "to be a list of 2 tensors, one a view, got 3 of them"),
        ({"projection": [PROJECTION, None]}, "got 2 of them: [a tensor of shape [8, 4], None]"),
    ],
)
def test_what_a_model_returns(instance, answer, message):
    with pytest.raises(UserError) as caught:
        check(instance, Gives(answer))
    assert str(caught.value).startswith(f"model Gives: forward ({where(Gives, 'forward')})")
    assert message in str(caught.value)


def test_what_nobody_reads_may_be_missing_and_a_model_may_make_views(instance):
    model = Gives({"projection": [PROJECTION, None]})
    model.wanted_views = {"projection": (0,)}
    assert model.reads("projection", 0) and not model.reads("projection", 1) and not model.reads("features", 0)
    check(instance, model)
    model.wanted_views = {"projection": (1,)}
    with pytest.raises(UserError, match="to be a list of 2 tensors"):
        check(instance, model)
    model = Gives({"projection": [PROJECTION] * 3})
    model.counts = {"projection": 3}
    check(instance, model)


def test_a_task_may_add_rows(instance):
    def batch(rows: int) -> Batch:
        return Batch([torch.zeros(rows, 3, 16, 16)], [None], torch.arange(rows), torch.arange(rows))

    for model, rows in ((Gives({"projection": [torch.zeros(16, 4)]}), 16), (Gives({"projection": [PROJECTION]}), 8)):
        check(instance, model, task=Prepares(batch(rows)))
    with pytest.raises(UserError, match="expected a batch of 8 images, or a multiple of that, got 12"):
        check(instance, task=Prepares(batch(12)))


def test_a_teacher_may_have_seen_the_global_views_alone(instance):
    for count in (1, 2):
        check(instance, Gives({"projection": [PROJECTION] * count}), num_global=1)
    with pytest.raises(UserError, match="a list of 1 or 2 tensors"):
        check(instance, Gives({"projection": [PROJECTION] * 3}), num_global=1)


@pytest.mark.parametrize("features", [torch.zeros(2, 5, 3), torch.zeros(3), [torch.zeros(3)] * 2])
def test_what_a_model_encodes_to(instance, features):
    with pytest.raises(
        UserError, match=r"model Gives: encode \(.*test_contract.py:\d+\): expected one vector an image"
    ):
        check(instance, Gives(FINE, features))


def test_what_a_task_prepares(instance):
    views, index = [torch.zeros(8, 3, 16, 16)], torch.arange(8)
    fine = Batch(views, [None], index, index)
    for batch, message in (
        (views, "returned a list, expected ssl_ib.Batch"),
        (replace(fine, views=views[0]), "expected views to be a list of tensors of 8 images"),
        (replace(fine, views=[views[0][:7]]), "expected views to be a list of tensors of 8 images"),
        (
            replace(fine, masks=None),
            r"expected masks to be a list with one ssl_ib.Masks or None a view \(1\), got None",
        ),
        (replace(fine, masks=[torch.zeros(8, 4)]), "expected masks to be a list with one ssl_ib.Masks or None a view"),
    ):
        with pytest.raises(UserError, match=message):
            check(instance, task=Prepares(batch))


def test_checking_leaves_no_hooks(instance):
    model, criterion = Gives(FINE), Answers(ONE)
    with pytest.raises(UserError):
        check(instance, model, criterion)
    assert not model._forward_hooks and not criterion._forward_hooks
    check(instance, instance.run.model, instance.run.criterion)
    assert not any(module._forward_hooks for module in (*instance.run.model.modules(), instance.run.criterion))


# --- when the run is built --------------------------------------------------------------------------------------------


def test_hooks_that_cannot_be_called():
    class Hooked(Answers):
        def after_step(self):
            pass

        def after_forward(self, outputs, batch, context):
            pass

        def on_epoch_end(self, ctx, more=None):
            pass

        def before_step(self, *anything):
            pass

        @staticmethod
        def draw(folder):
            pass

    for part in (Hooked(ONE), Outer(Hooked(ONE))):
        with pytest.raises(UserError) as caught:
            contract.check_part("criterion", "hooked", part)
        first, second = str(caught.value).split("; ")
        place = where(Hooked, "after_forward")
        assert first == (
            f"criterion Hooked: after_forward ({place}): expected after_forward(outputs, batch, terms, ctx), "
            "got after_forward(outputs, batch, context)"
        )
        assert "expected after_step(ctx), got after_step()" in second
    contract.check_part("criterion", "answers", Answers(ONE))


@pytest.mark.parametrize("kind", ["criterion", "model", "task"])
def test_every_shipped_part_is_as_it_should_be(kind):
    """Its methods could be called as part.py says, before any is built."""
    for name in registry.REGISTRIES[kind].names():
        maker = registry.REGISTRIES[kind][name]
        if inspect.isclass(maker) and issubclass(maker, Part):
            part = maker.__new__(maker)
            nn.Module.__init__(part)
            contract.check_part(kind, name, part)


def test_no_part_of_its_kind(monkeypatch):
    monkeypatch.setitem(CRITERIONS._entries, "prepares", Prepares)
    with pytest.raises(
        UserError, match=r"criterion 'prepares' \(.*\) is a Prepares, expected a subclass of ssl_ib.Cri"
    ):
        contract.check_part("criterion", "prepares", Prepares(None))


def test_a_part_that_lacks_a_method(monkeypatch):
    class Half(Criterion):
        pass

    monkeypatch.setitem(CRITERIONS._entries, "half", Half)
    with pytest.raises(UserError, match=r"criterion 'half' \(.*test_contract.py:\d+\) does not say .*: forward$"):
        registry.build_part("criterion", {"name": "half"})


def test_what_a_masker_answers():
    keys, grid = torch.zeros(2, dtype=torch.int64), (2, 2)
    keep = torch.zeros(2, 1, 3, dtype=torch.int64)

    class Masker:
        def __init__(self, answer):
            self.answer = answer

        def __call__(self, keys, grid):
            return self.answer

    fine = Masks.from_keep(keep, 4)
    assert contract.checked_masks(Masker(fine), keys, grid) is fine
    for answer, message in (
        (fine.mask, "returned a Tensor, expected ssl_ib.Masks"),
        (Masks(keep[:, 0], fine.mask), r"with B = 2 and L = 4, got \[2, 3\] and \[2, 1, 4\]"),
        (Masks(keep, fine.mask[:, :, :3]), r"got \[2, 1, 3\] and \[2, 1, 3\]"),
        (Masks(keep[:1], fine.mask[:1]), r"got \[1, 1, 3\] and \[1, 1, 4\]"),
    ):
        with pytest.raises(UserError, match=rf"masker Masker \(.*test_contract.py:\d+\).*{message}"):
            contract.checked_masks(Masker(answer), keys, grid)
    with pytest.raises(UserError, match=r"masker function \(.*: expected a call with \(keys, grid\)"):
        contract.checked_masks(lambda keys: fine, keys, grid)


# --- as a user sees it ------------------------------------------------------------------------------------------------

PLUGIN = """
import torch
from ssl_ib import Criterion, register_criterion, register_masker


@register_criterion("bare")
class Bare(Criterion):
    requires = frozenset({"projection"})

    def forward(self, outputs, batch, progress):
        first, second = outputs["projection"]
        return (first - second).square().mean()


@register_criterion("hooked")
class Hooked(Bare):
    def after_step(self):
        pass


@register_masker("bare_mask")
class BareMask:
    def __call__(self, keys, grid):
        return torch.zeros(len(keys), grid[0] * grid[1], dtype=torch.bool)
"""


def test_one_message_and_nothing_written(tmp_path, capsys, monkeypatch):
    for kind in registry.REGISTRIES.values():
        kind.names()
        monkeypatch.setattr(kind, "_entries", dict(kind._entries))
    plugin = tmp_path / "bare_parts.py"
    plugin.write_text(PLUGIN)
    for override, line, message in (
        ("criterion=bare", 10, f"ssl-ib-train: criterion Bare: forward ({plugin}:10) returned a Tensor, expected"),
        ("criterion=hooked", 17, f"criterion Hooked: after_step ({plugin}:17): expected after_step(ctx), got"),
        ("masker=bare_mask", 21, f"masker BareMask ({plugin}:21) returned a Tensor, expected ssl_ib.Masks"),
        ("task.lr_batch=images masker=bare_mask", 21, f"  - masker BareMask ({plugin}:21) returned a Tensor"),
    ):
        assert train(tmp_path / "run", "--plugin", str(plugin), *override.split()) == 2
        error = capsys.readouterr().err
        assert message in error and error.count(f":{line}") == 1 and "Traceback" not in error
        assert not (tmp_path / "run").exists()

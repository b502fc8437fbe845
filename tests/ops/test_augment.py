"""The facade of the fused views: what joins the kernels, which backend runs, and what is refused."""

import pytest
import torch

from ssl_ib import UserError, ops, random
from ssl_ib.data.views import Augment, RandAugment
from ssl_ib.ops import backend, crossover
from ssl_ib.ops.views import Steps, joining

PIXELWISE = ("invert", "posterize", "solarize", "solarize_add", "colour", "brightness", "identity")


@pytest.mark.parametrize(
    ("operations", "level_ops", "number"),
    [
        ((), (), 0),
        (("jitter", "grey", "blur", "solarise"), (), 4),
        (("grey", "blur", "jitter", "solarise"), (), 2),
        (("jitter", "blur", "rand_augment", "grey"), PIXELWISE, 4),
        (("jitter", "blur", "rand_augment", "grey"), (*PIXELWISE, "rotate"), 2),
    ],
)
def test_what_joins_the_kernels(operations, level_ops, number):
    assert joining(Steps(8, operations, level_ops=level_ops)) == operations[:number]


def test_operations_that_never_happen_cost_no_pass():
    assert Augment(8).steps.operations == ()
    assert Augment(8, jitter=(0.4,) * 4, blur_p=0.5).steps.operations == ("jitter", "blur")
    assert Augment(8, jitter=(0.4,) * 4, jitter_p=0.0, grey_p=0.1, solarise_p=0.1).steps.operations == (
        "grey",
        "solarise",
    )
    assert Augment(8, rand_augment=RandAugment(0)).steps.operations == ()
    assert Augment(8, rand_augment=RandAugment(1, ops=("invert",))).steps.level_ops == ("invert",)


def view(**arguments) -> torch.Tensor:
    augment = Augment(4, **arguments)
    images = torch.randint(0, 256, (2, 3, 6, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return augment(images, random.image_keys(0, 0, torch.arange(2)))


def test_a_backend_without_it_says_once_what_runs_instead(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_announced", set())
    with caplog.at_level("INFO", logger="ssl_ib"), ops.use_backend("chunked"), ops.record() as ran:
        assert torch.equal(view(), view())
    assert ran == {("augment", "reference")}
    assert caplog.messages == ["ops: augment runs on reference (chunked has no such function)"]
    assert crossover.INSTEAD["augment", "cuda"] == "triton"
    assert crossover.order("augment", "cpu", None) == ("reference",)
    assert crossover.order("augment", "cuda", None) == ("triton", "reference")


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("triton", "cuda"):
        with ops.use_backend(name), pytest.raises(UserError, match=f"augment: the backend '{name}' was asked for"):
            view()


def test_images_that_do_not_fit_are_refused():
    drawn = Augment(4).draw(torch.arange(2), torch.full((2, 2), 6))
    grey = torch.zeros(2, 1, 6, 6, dtype=torch.uint8)
    assert ops.augment(grey, Steps(4), drawn, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UserError, match="jitter needs images of 3 channels, got 1"):
        ops.augment(grey, Steps(4, ("blur", "jitter")), drawn)
    with pytest.raises(UserError, match=r"uint8 or float32, got torch.float64 \[2, 1, 6, 6\]"):
        ops.augment(grey.double(), Steps(4), drawn)


def test_a_view_is_normalised_with_what_is_given():
    drawn = Augment(4).draw(torch.arange(2), torch.full((2, 2), 6))
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    plain = ops.augment(images, Steps(4), drawn)
    expected = (plain - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(ops.augment(images, Steps(4), drawn, mean, std), expected)

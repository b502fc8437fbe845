"""The parts of a run fit together, or everything that does not is said before any image is read."""

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from ssl_ib import ConfigError, UserError, distributed
from ssl_ib.config import registry
from ssl_ib.config.config import resolve
from ssl_ib.config.registry import CRITERIONS, SOURCES
from ssl_ib.criterions.info_nce import InfoNCE
from ssl_ib.data.sources.base import Source
from ssl_ib.device import choose_device
from ssl_ib.run import build_run, parameter_counts

VIT = "{name: siamese, backbone: vit_tiny_patch16_224, backbone_args: {patch_size: 4, embed_dim: 24, depth: 1, "
VIT += "num_heads: 2}, projector_hidden: 16, projector_dim: 8}"
RECIPE = f"""
model: {VIT}
criterion: info_nce
views: {{name: simclr_cifar, size: 16}}
source: unread
batch_size: 64
device: cpu
"""


class Unread(Source):
    """A source that may be built, and not read."""

    def train(self):
        raise AssertionError("the training images were read")

    val = statistics = train


class Banked(InfoNCE):
    """Asks for what a memory bank would."""

    seen: list = []

    def __init__(self, info):
        super().__init__()
        self.seen.append(info)


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    for names, name, maker in ((SOURCES, "unread", Unread), (CRITERIONS, "banked", Banked)):
        names.names()
        monkeypatch.setitem(names._entries, name, maker)
    registry._checker.cache_clear()
    Banked.seen.clear()
    yield
    registry._checker.cache_clear()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: resolve(str(path), overrides)


def problems(config, dry=False):
    with pytest.raises(ConfigError) as caught:
        build_run(config, dry)
    return caught.value.problems


# --- what fits --------------------------------------------------------------------------------------------------------


def test_nothing_is_read(config):
    run = build_run(config("masker=random", "masker.ratio=0.5"))
    assert isinstance(run.source, Unread) and run.batch_size == run.samples_per_step == 64
    assert run.task.grids == [(4, 4)] * 2 and run.task.views is run.views
    assert run.model.wanted == {"projection"} == run.criterion.requires


def test_the_same_seed_the_same_weights(config):
    a, b, other = (build_run(config(f"seed={seed}")).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], other[name]) for name in a)


def test_schedules_are_collected_from_every_part(config):
    run = build_run(
        config(
            "masker=random",
            "masker.ratio={from: 0.1, to: 0.5}",
            "criterion.temperature={from: 0.2, to: 0.1}",
            "model.momentum={from: 0.9, to: 1, shape: cosine}",
        )
    )
    found = {(owner, name) for owner, name, _ in run.schedules}
    assert found == {(run.task.masker, "ratio"), (run.criterion, "temperature"), (run.model, "momentum")}


def test_parameters_are_counted(config):
    plain = build_run(config())
    counts = parameter_counts(plain)
    size = sum(p.numel() for p in plain.model.parameters())
    assert counts == {"all": size, "trained": size}
    target = build_run(config("model.momentum=0.9", "model.freeze_patch_embed=true"))
    counts = parameter_counts(target)
    assert counts["all"] == 2 * size and counts["trained"] == size - 24 * (48 + 1)


def test_what_parts_may_know_of_the_run(config):
    build_run(config("criterion=banked", "accumulate=4"))
    (info,) = Banked.seen
    assert info.view_shapes == ((3, 16, 16),) * 2 and info.batch_size == 16 and info.world_size == 1
    assert info.cap is None and info.capped(10**6) == 10**6
    with pytest.raises(AssertionError, match="were read"):
        info.images()


def test_a_dry_run_is_small(config):
    run = build_run(config("criterion=banked"), dry=True)
    assert run.batch_size == 8 and Banked.seen[0].cap == 32 == Banked.seen[0].capped(10**6)
    assert build_run(config("batch_size=4"), dry=True).batch_size == 4
    # As many images as accumulation needs, and no fewer.
    assert build_run(config("accumulate=16"), dry=True).batch_size == 16
    assert build_run(config("accumulate=3", "batch_size=66"), dry=True).batch_size == 6


def test_a_resnet_without_masks(config):
    run = build_run(config("model.backbone=resnet18", "model.backbone_args=null"))
    assert run.model.grid((3, 16, 16)) is None


# --- what does not ----------------------------------------------------------------------------------------------------


def test_outputs_that_the_model_does_not_give(config):
    (line,) = problems(config("criterion=byol"))
    assert line == (
        "criterion 'byol' requires prediction, target, but model 'siamese' provides features, projection, tokens: "
        "missing prediction, target"
    )
    (line,) = problems(config("criterion=mrcl"))
    assert "requires projection, reconstruction, but" in line and line.endswith("missing reconstruction")


def test_masks_on_a_resnet(config):
    (line,) = problems(config("model.backbone=resnet18", "model.backbone_args=null", "masker=random"))
    assert line.startswith("task: masker RandomMasker needs a model that cuts views of (3, 16, 16) into patches")


def test_views_that_the_patches_do_not_divide(config):
    (line,) = problems(config("views.size=18"))
    assert line.startswith("model: a view of 18 x 18 pixels cannot be cut into patches of 4: use model.")


def test_a_ratio_that_keeps_nothing(config):
    (line,) = problems(config("masker=random", "masker.ratio=0.99"))
    assert line.startswith("task: mask ratio 0.99 on a grid of 4 x 4 patches keeps 0 of them")


def test_batches_that_cannot_be_split(config, monkeypatch):
    expected = "batch_size: 64 images a step cannot be cut into {} equal batches (processes: {}, accumulate: {})"
    assert problems(config("accumulate=3")) == [expected.format(3, 1, 3)]
    assert problems(config("accumulate=3"), dry=True) == [expected.format(3, 1, 3)]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert problems(config()) == [expected.format(3, 3, 1)]
    # Each of 8 processes has 8 images, which 16 batches cannot share.
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    assert problems(config("accumulate=16")) == [expected.format(128, 8, 16)]
    assert build_run(config("accumulate=4")).batch_size == 8
    assert build_run(config("accumulate=4"), dry=True).batch_size == 4


@pytest.mark.parametrize("criterion", ["info_nce", "barlow_twins"])
@pytest.mark.parametrize("drawn", [1, 3])
def test_the_number_of_views(config, criterion, drawn):
    views = f"{{name: plain, size: 16, num_views: {drawn}}}"
    (line,) = problems(config(f"criterion={criterion}", f"views={views}"))
    assert line == f"criterion '{criterion}' compares 2 views, but views 'plain' draws {drawn}"
    build_run(config(f"criterion={criterion}", "views={name: plain, size: 16, num_views: 2}"))


def test_a_criterion_that_holds_another_compares_as_many(config):
    model = f"model={{name: mrcl, decoder_dim: 16, decoder_heads: 2, decoder_depth: 1, contrastive: {VIT}}}"
    (line,) = problems(config(model, "criterion=mrcl", "views={name: plain, size: 16}"))
    assert line == "criterion 'mrcl' compares 2 views, but views 'plain' draws 1"


def test_a_criterion_of_any_number(config, monkeypatch):
    class Any(InfoNCE):
        num_views = None

    monkeypatch.setitem(CRITERIONS._entries, "any", Any)
    for drawn in (1, 3):
        assert len(
            build_run(config("criterion=any", f"views={{name: plain, size: 16, num_views: {drawn}}}")).views.shapes
        )


@pytest.mark.parametrize("name", ["info_nce", "barlow_twins", "byol", "moco_v3", "mrcl"])
def test_criterions_of_pairs_say_so(name):
    assert registry.build_part("criterion", {"name": name}).part.num_views == 2


def test_a_schedule_on_what_is_not_kept(config):
    (line,) = problems(config("model.projector_dim={from: 8, to: 16}"))
    assert line == "model.projector_dim: 'siamese' cannot follow a schedule here: it keeps no such number to change"


def test_devices(config, monkeypatch):
    assert choose_device("cpu").type == "cpu"
    for name in ("gpu", "meta", "mps", ""):
        with pytest.raises(UserError, match="device: expected auto, cpu, cuda or cuda:N, got"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1").index == 1
    with pytest.raises(UserError, match="'cuda:2' was asked for, but torch sees 2 CUDA devices"):
        choose_device("cuda:2")


def test_a_logger_that_is_not_installed(config, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("ssl_ib.run.version", missing)
    build_run(config("logger=[tensorboard]"))
    expected = "logger: wandb is not installed: pip install 'ssl-ib[wandb]', or leave it out of logger"
    assert problems(config("logger=[tensorboard,wandb]")) == [expected]


def test_everything_at_once(config):
    found = problems(
        config(
            "device=gpu",
            "ops.backend=fast",
            "accumulate=7",
            "criterion=mrcl",
            "criterion.con=eq16",
            "criterion.contrastive=barlow_twins",
            "masker=random",
            "masker.ratio=0.99",
        )
    )
    starts = ["device: expected auto", "ops.backend: unknown backend", "batch_size: 64 images", "criterion.con='eq16'"]
    starts.append("task: mask ratio 0.99")
    assert len(found) == len(starts)
    for line, start in zip(found, starts, strict=True):
        assert line.startswith(start)
    found = problems(config("criterion=byol", "views={name: plain, size: 16}", "masker=random", "masker.ratio=0.99"))
    assert [line.split(" ")[0] for line in found] == ["task:", "criterion", "criterion"]


def test_a_view_recipe_that_cannot_be_built(config, monkeypatch):
    (line,) = problems(config("views.scale=[0.9, 0.1]"))
    assert line.startswith("views: scale: expected 0 < low <= high <= 1")

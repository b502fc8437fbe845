"""A run that starts from given weights: what fits is taken, the rest is said, and it exports like any other."""

import json

import pytest
import safetensors.torch
import timm
import torch
from harness import checkpoint, finished, train, trainer

import ssl_ib
from ssl_ib import UserError, initialise
from ssl_ib.record.backbone import snippet

STUDENT = (
    "model={name: student_teacher, backbone: vit_tiny_patch16_224, backbone_args: {patch_size: 8, embed_dim: 24, "
    "depth: 1, num_heads: 3}, head_hidden: 16, head_dim: 8, prototypes: 4}",
    "criterion=dino",
    "masker=none",
)


def started(*overrides):
    """A run of the tiny recipe with its weights put in, and the line about them."""
    run = trainer(*overrides).run
    return run, initialise.initialise(run)


def test_a_run_of_the_same_architecture_fits_whole():
    run, line = started(f"init={finished()}", "seed=5")
    own, given = run.model.backbone.state_dict(), ssl_ib.load_backbone(finished()).state_dict()
    assert all(torch.equal(own[key], given[key]) for key in own)
    assert line == f"{finished()}: {len(own)} of {len(own)} weights fit"
    _, line = started(f"init={finished() / 'checkpoints' / 'last.pt'}", "seed=5")
    assert f"{len(own)} of {len(own)} weights fit" in line


def test_copies_start_from_them_too():
    """A teacher, which is what is evaluated, and its student."""
    run, _ = started(*STUDENT, f"init={_file(*STUDENT)}", "seed=5")
    first = run.model.student.backbone.state_dict()
    assert all(torch.equal(value, first[key]) for key, value in run.model.backbone.state_dict().items())
    assert torch.equal(first["pos_embed"], torch.full_like(first["pos_embed"], 0.5))


def _file(*overrides):
    """A file of weights under timm's names, with a head."""
    module = trainer(*overrides).run.model.backbone
    with torch.no_grad():
        module.pos_embed.fill_(0.5)
    path = finished().parent / "weights.safetensors"
    safetensors.torch.save_file({**module.state_dict(), "head.weight": torch.ones(3, 24)}, path)
    return path


def test_heads_are_dropped_and_positions_resampled():
    _, line = started("init=null")
    assert line is None
    run, line = started(*STUDENT, f"init={_file(*STUDENT)}", "source.size=32", "views.size=32")
    assert run.model.backbone.pos_embed.shape == (1, 17, 24)
    torch.testing.assert_close(run.model.backbone.pos_embed.data, torch.full((1, 17, 24), 0.5))
    assert "positions resampled from 2 x 2 to 4 x 4" in line and line.endswith("dropped: head")


def test_positions_of_a_grid_that_is_not_square():
    table = torch.tensor([7.0, 1, 1, 1, 1, 2, 2, 2, 2]).view(1, 9, 1)
    found = initialise._positions(table, (2, 4), torch.full((1, 2 + 4, 1), 9.0), (2, 2))
    # The class token's, that of a token which the table lacks, and two patches of each row.
    torch.testing.assert_close(found.flatten(), torch.tensor([7.0, 9, 1, 1, 2, 2]))


def test_windows_of_another_size_are_resampled():
    small = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=32, window_size=4, depths=[1, 1])
    large = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=64, window_size=8, depths=[1, 1])
    found = initialise._fit(large, large.state_dict(), initialise._of_module(small))
    assert found.taken.keys() == large.state_dict().keys() and not found.misshapen
    assert found.resampled == ["relative positions resampled to windows of 8 x 8"]


def test_weights_of_timm(monkeypatch):
    asked = []

    def downloaded(name, pretrained):
        asked.append((name, pretrained))
        return timm.create_model(name, num_classes=0, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)

    monkeypatch.setattr(initialise, "of_timm", downloaded)
    run, line = started("init=timm:vit_tiny_patch16_224")
    assert asked == [("vit_tiny_patch16_224", True)] and "weights fit" in line


@pytest.mark.parametrize(
    "source, message",
    [
        ("absent", "init: expected the folder of a run, .* and there is nothing at 'absent'"),
        ("timm:resnet1", "init: timm has no model 'resnet1'"),
        ("junk.pt", "init: 'junk.pt' cannot be read"),
        ("object.pt", "init: 'object.pt' cannot be read: it holds .*Fraction, and loading more than tensors"),
        ("other.pt", "init: the weights of other.pt are of another architecture .*ssl-ib-export --from"),
        ("list.pt", "init: 'list.pt': expected a state dict"),
        (".", "init: .*expected a saved backbone, found no backbone.json"),
    ],
)
def test_what_cannot_be_started_from(tmp_path, monkeypatch, source, message):
    from fractions import Fraction

    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.pt").write_text("mine")
    torch.save({"model": {"a": torch.ones(2)}, "other": Fraction(1, 2)}, tmp_path / "object.pt")
    torch.save({"model": {"conv1.weight": torch.ones(2)}}, tmp_path / "other.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(UserError, match=message):
        started(f"init={source}")


def test_a_run_continued_exports_again(tmp_path, capsys):
    """Also where it began with a file of `backbone_args`; its first evaluation is that of an initial encoder."""
    out, weights = tmp_path / "run", finished() / "backbone.safetensors"
    assert train(out, "--init", str(finished()), "epochs=1", "eval.linear.enabled=false") == 0
    said = capsys.readouterr().out
    assert f"  init       {finished()}: " in said and "initial" in said and "untrained" not in said
    results = json.loads((out / "results.json").read_text())
    assert "initial" in results and "untrained" not in results
    assert (
        results["initial"]["knn/top1"] == json.loads((finished() / "results.json").read_text())["trained"]["knn/top1"]
    )
    assert checkpoint(out)["config"]["init"] == str(finished())
    saved = ssl_ib.load_backbone(out).state_dict()
    scope = {}
    exec(snippet(out), scope)
    assert all(torch.equal(value, saved[key]) for key, value in scope["model"].state_dict().items())
    # What was finished is not evaluated again, and its weights are not those that it started from.
    assert train(out, "--init", str(finished()), "epochs=1", "eval.linear.enabled=false", "--resume") == 0
    assert json.loads((out / "results.json").read_text())["initial"] == results["initial"]
    assert train(out, "epochs=1", "eval.linear.enabled=false", "--resume") == 2
    assert "--resume cannot change init" in capsys.readouterr().err
    instance = trainer(f"model.backbone_args.checkpoint_path={weights}")
    assert instance.run.first_evaluation == "initial"


def test_a_description_of_an_earlier_version_that_names_a_file(tmp_path):
    description = json.loads((finished() / "backbone.json").read_text())
    description["arguments"] |= {"checkpoint_path": str(tmp_path / "gone.pt"), "pretrained": True}
    (tmp_path / "backbone.json").write_text(json.dumps(description))
    (tmp_path / "backbone.safetensors").write_bytes((finished() / "backbone.safetensors").read_bytes())
    saved = ssl_ib.load_backbone(finished()).state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in ssl_ib.load_backbone(tmp_path).state_dict().items())

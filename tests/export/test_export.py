"""Each export is loaded back by the library that it is for, and gives the same features."""

import json

import pytest
import safetensors.torch
import timm
import torch
import yaml
from harness import finished, train
from PIL import Image

import ssl_ib
from ssl_ib.cli.export import main
from ssl_ib.evals.results import fingerprint_of_weights
from ssl_ib.export import card
from ssl_ib.export.formats import FORMATS
from ssl_ib.record.backbone import create, describe, save_backbone

VIT = ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3})
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)
IMAGE = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
HOW = {"size": 16, "crop_ratio": 0.8, "interpolation": "bicubic", "max_side": None}


def saved(tmp_path, name, how=HOW, **arguments):
    """A folder with an encoder, like a run's."""
    torch.manual_seed(0)
    module = create(name, {"num_classes": 0, **arguments})
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    save_backbone(module, describe(name, {"num_classes": 0, **arguments}, (MEAN, STD), how), tmp_path / "encoder")
    return str(tmp_path / "encoder")


def same_features(source, folder, to):
    encoder = ssl_ib.load(source)
    size = encoder.description["preprocessing"]["size"]
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(FORMATS[to].reload(folder)(images), encoder(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", FORMATS)
def test_a_run(to, tmp_path, capsys, monkeypatch):
    """Features, preprocessing, and the model card, whose lines work."""
    for package in FORMATS[to].needs + FORMATS[to].reload_needs:
        pytest.importorskip(package)
    out = tmp_path / to
    assert main([str(finished()), "--to", to, "--out", str(out)]) == 0
    assert "checked: loaded back" in capsys.readouterr().out
    same_features(finished(), out, to)
    text = (out / "README.md").read_text()
    assert "Recipe `tiny`" in text and "| knn/top1 |" in text and "name: digits" in text
    assert "(crop ratio 1)" in text and "## Licence\n\nNone is stated here" in text
    assert "license" not in yaml.safe_load(text.split("---")[1])
    kept = {
        "safetensors": ("backbone.json", lambda content: {**content["preprocessing"], "mean": content["mean"]}),
        "timm": ("config.json", lambda content: _of_timm(content["pretrained_cfg"])),
        "hf": ("config.json", lambda content: _of_timm(content["pretrained_cfg"])),
        "torchvision": ("preprocessing.json", dict),
        "onnx": ("preprocessing.json", dict),
    }
    file, read = kept[to]
    found, description = read(json.loads((out / file).read_text())), ssl_ib.load(finished()).description
    for key in ("size", "crop_ratio", "interpolation"):
        assert found[key] == description["preprocessing"][key]
    assert found["mean"] == description["mean"]
    monkeypatch.chdir(tmp_path)
    scope = {"image": IMAGE}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    if to == "safetensors":
        same = ssl_ib.load(finished()).model.state_dict()
        assert all(torch.equal(value, same[key]) for key, value in scope["model"].state_dict().items())
    else:
        assert scope["features"].shape == (1, 24)


def _of_timm(cfg):
    return {"size": cfg["input_size"][1], "crop_ratio": cfg["crop_pct"], **cfg}


@pytest.mark.parametrize("size, ratio", [(16, 0.8), (32, 0.875), (96, 0.875), (224, 0.9)])
def test_timm_prepares_images_as_it_should(tmp_path, size, ratio):
    """Also where timm rounds the size before the crop to another number."""
    how = {**HOW, "size": size, "crop_ratio": ratio}
    source = saved(tmp_path, VIT[0], how, **VIT[1] | {"img_size": size})
    assert main([source, "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert transform.transforms[0].size in (round(size / ratio), (round(size / ratio),) * 2)
    # Pillow rounds to whole brightnesses where ssl_ib does not.
    torch.testing.assert_close(transform(IMAGE), ssl_ib.load(source).transform(IMAGE), atol=0.03, rtol=0)


def test_transformers_by_its_automatic_classes(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = saved(tmp_path, *VIT[:1], **VIT[1], global_pool="avg", fc_norm=False)
    assert main([source, "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model(**processor(IMAGE)).pooler_output
        expected = ssl_ib.load(source)(processor(IMAGE)["pixel_values"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_torchvisions_resnet(tmp_path):
    source = saved(tmp_path, "resnet18", {**HOW, "size": 32})
    assert main([source, "--to", "torchvision", "--out", str(tmp_path / "out")]) == 0
    same_features(source, tmp_path / "out", "torchvision")


@pytest.mark.parametrize(
    "to, name, arguments, message",
    [
        ("torchvision", VIT[0], VIT[1] | {"global_pool": "avg"}, "has a class token that stands for the image"),
        ("torchvision", VIT[0], VIT[1] | {"init_values": 0.1}, "no norms or scales within the blocks"),
        ("torchvision", VIT[0], VIT[1] | {"reg_tokens": 2}, "no register tokens"),
        ("torchvision", "resnet10t", {}, "'resnet10t' is neither a ResNet of torchvision's nor a plain vision"),
        ("hf", "resnet18", {"stem": "cifar"}, "timm has no ResNet with the stem 'cifar'"),
    ],
)
def test_what_does_not_fit_a_format(to, name, arguments, message, tmp_path, capsys):
    source = saved(tmp_path, name, **arguments)
    assert main([source, "--to", to, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_images_that_are_not_just_resized(tmp_path, capsys):
    source = saved(tmp_path, *VIT[:1], None, **VIT[1])
    assert main([source, "--to", "timm", "--out", str(tmp_path / "out")]) == 2
    assert "are not just resized and cropped" in capsys.readouterr().err
    assert main([source, "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0


def test_a_wrong_export_is_not_left_behind(tmp_path, monkeypatch, capsys):
    source = saved(tmp_path, *VIT[:1], **VIT[1])
    write = safetensors.torch.save_file

    def spoilt(state, *rest, **more):
        write({key: value + 0.1 for key, value in state.items()}, *rest, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", spoilt)
    assert main([source, "--to", "torchvision", "--out", str(tmp_path / "out")]) == 2
    assert "the features come out different" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_where_it_goes(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "epochs=1", "batch_size=512", "eval.linear.enabled=false") == 0
    last = str(run / "checkpoints" / "last.pt")
    assert main([last, "--to", "timm", "--dry-run"]) == 0 and not (run / "export").exists()
    assert main([last, "--to", "timm"]) == 0
    assert sorted(path.name for path in (run / "export" / "timm").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert main([str(run), "--to", "timm"]) == 2
    assert "is not empty: replace it with --overwrite" in capsys.readouterr().err
    card_file = run / "export" / "timm" / "README.md"
    assert "On the run's own images, after" in card_file.read_text()
    # The results of a run that went on are not those of the checkpoint.
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"step": results["step"] + 1}))
    assert main([last, "--to", "timm", "--overwrite"]) == 0 and "## Evaluations\n\nNone." in card_file.read_text()
    assert main([str(run), "--to", "timm", "--overwrite"]) == 0
    assert main([str(run), "--to", "timm", "--overwrite", "--out", str(run)]) == 2
    assert "holds no export, so --overwrite leaves it alone" in capsys.readouterr().err
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("My own.")
    assert main([str(run), "--to", "timm", "--overwrite", "--out", str(project)]) == 2
    assert "holds no export" in capsys.readouterr().err and (project / "README.md").read_text() == "My own."
    assert main([str(run), "--to", "timm", "--out", "."]) == 2
    assert "--out: expected a folder with a name of its own, got ." in capsys.readouterr().err
    assert main([str(run), "--to", "timm", "--to", "onnx"]) == 2
    assert "--to: expected one format, got timm, onnx" in capsys.readouterr().err
    assert main(["timm:test_vit", "--to", "timm"]) == 2
    assert "is not in the folder of a run: say where to write with --out" in capsys.readouterr().err
    # A run that takes the folder removes what was exported of the former one.
    assert train(run, "epochs=1", "batch_size=512", "eval.linear.enabled=false", "--overwrite") == 0
    assert not (run / "export").exists()


def test_a_package_that_is_missing(tmp_path, monkeypatch, capsys):
    source = saved(tmp_path, *VIT[:1], **VIT[1])
    monkeypatch.setattr("ssl_ib.export.formats.find_spec", lambda name: None)
    assert main([source, "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "--to onnx needs onnx and onnxscript: pip install 'ssl-ib[export]'" in capsys.readouterr().err
    assert main([source, "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    assert "not checked, because transformers is not installed" in capsys.readouterr().out


def test_the_card_says_what_was_evaluated_and_no_path(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        yaml.dump({"recipe": "r", "source": {"name": "folder", "path": "/home/me/photos"}})
    )
    results = {"initial": {"knn/top1": 0.25}, "trained": {"knn/top1": 0.5, "held_out/loss": 1.0}, "step": 1200}
    results["seconds"] = 60.0
    (run / "results.json").write_text(json.dumps(results))
    encoder = ssl_ib.load(saved(tmp_path, *VIT[:1], **VIT[1]))
    line = {"protocol": "knn", "metric": "top1", "spread": 0.01, "weights": fingerprint_of_weights(encoder.model)}
    line |= {"ssl_ib": "1.0", "seconds": 2.0}
    lines = [line | {"value": 0.75, "settings": {"k": 5, "source": None}}]
    lines += [line | {"value": 0.5, "settings": {"k": 20, "source": {"path": "/home/me/others"}}}]
    lines += [line | {"value": 0.125, "settings": {}, "weights": "other"}]
    (run / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card.card(encoder, "title", "pass", run, "timm")
    assert "path: photos" in text and "/home" not in text and "after 1,200 steps" in text
    assert "| metric | encoder at the start | this encoder |\n|---|---|---|\n| knn/top1 | 0.2500 | 0.5000 |" in text
    rows = "| knn | k=5, source=None | top1 | 0.7500 | 0.0100 |  |\n"
    rows += "| knn | k=20, source={'path': 'others'} | top1 | 0.5000 | 0.0100 |  |\n\n"
    assert f"| protocol | settings | metric | value | spread | chance |\n|---|---|---|---|---|---|\n{rows}" in text

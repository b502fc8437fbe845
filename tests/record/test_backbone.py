"""A saved backbone is rebuilt bit for bit, without this package."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

import ssl_ib
from ssl_ib import UserError
from ssl_ib.record.backbone import describe, load_backbone, save_backbone, snippet

NAME = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
NORMALISATION = (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(NAME, **ARGUMENTS).eval()
    # A folder whose name needs quoting.
    folder = tmp_path / "it's a run"
    path = save_backbone(model, describe(NAME, ARGUMENTS, NORMALISATION), folder)
    assert path == folder / "backbone.safetensors"
    return model, folder


def test_the_snippet_rebuilds_it_with_timm_alone(saved, tmp_path):
    model, folder = saved
    lines = snippet(folder)
    assert len(lines.splitlines()) == 3 and "ssl_ib" not in lines
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    script = lines + (
        "import sys, torch\n"
        "assert not any(name.startswith('ssl_ib') for name in sys.modules)\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad(): torch.save(model(torch.load('images.pt')), 'features.pt')\n"
    )
    # -I keeps the checkout off the path.
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "features.pt"), model(images))


def test_load(saved):
    model, folder = saved
    loaded = load_backbone(folder)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_the_description(saved):
    _, folder = saved
    assert json.loads((folder / "backbone.json").read_text()) == {
        "model": NAME,
        "arguments": ARGUMENTS,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.25],
        "preprocessing": None,
        "ssl_ib": ssl_ib.__version__,
    }
    assert sorted(path.name for path in folder.iterdir()) == ["backbone.json", "backbone.safetensors"]


def test_shared_and_strided_tensors(tmp_path):
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    module["a"].bias = torch.nn.Parameter(torch.arange(6.0)[::2])
    tensors = safetensors.torch.load_file(save_backbone(module, describe("any", {}, NORMALISATION), tmp_path))
    assert torch.equal(tensors["a.weight"], tensors["b.weight"])
    assert tensors["a.bias"].tolist() == [0, 2, 4]


def test_a_failed_write_leaves_the_old_backbone(saved, monkeypatch):
    model, folder = saved
    before = (folder / "backbone.safetensors").read_bytes()
    with torch.no_grad():
        model.cls_token.add_(1)

    def stop(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(OSError, match="disk full"):
        save_backbone(model, describe(NAME, ARGUMENTS, NORMALISATION), folder)
    assert (folder / "backbone.safetensors").read_bytes() == before


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="no backbone.json and no backbone.safetensors"):
        load_backbone(tmp_path)
    with pytest.raises(UserError, match="fit for JSON"):
        describe("any", {"act_layer": torch.nn.GELU}, NORMALISATION)
    assert list(tmp_path.iterdir()) == []

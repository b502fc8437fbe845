"""Published checkpoints, built here from their published names: the encoder comes out, the heads are named."""

import argparse
import json
import sys
import types

import pytest
import timm
import torch
from harness import trainer

import ssl_ib
from ssl_ib import UserError, initialise
from ssl_ib.cli.export import main
from ssl_ib.models import official

ARGUMENTS = argparse.Namespace(arch="vit_small", lr=1e-3, output_dir=None)


def model(name, **arguments):
    """A random model without a classifier, whose batch norms have seen something."""
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=0, **arguments).eval()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return module


def tiny_vit(**more):
    return model("vit_tiny_patch16_224", **{"img_size": 32, "patch_size": 8, "depth": 1, **more})


def under(prefix, module):
    return {f"{prefix}{key}": value for key, value in module.state_dict().items()}


def weights(*names):
    return {name: torch.ones(2, 2) for name in names}


def mae(tmp_path):
    vit = tiny_vit()
    decoder = weights("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight")
    state = under("", vit) | decoder | weights("decoder_norm.weight", "decoder_pred.weight")
    torch.save({"model": state, "args": ARGUMENTS, "epoch": 1}, tmp_path / "w.pth")
    return vit, ["mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred"]


def mae_finetuned(tmp_path):
    vit = tiny_vit(global_pool="avg")
    torch.save({"model": under("", vit) | weights("head.weight")}, tmp_path / "w.pth")
    return vit, ["head"]


def moco_v3(tmp_path):
    """Twelve heads in ViT-Small; the momentum encoder is not the one that is taken."""
    vit = model("vit_small_patch16_224", img_size=32, depth=1, num_heads=12)
    state = under("module.base_encoder.", vit)
    state |= {key.replace("base", "momentum"): torch.zeros_like(value) for key, value in state.items()}
    state |= weights("module.base_encoder.head.0.weight", "module.predictor.0.weight")
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {}}, tmp_path / "w.pth")
    return vit, ["momentum_encoder", "head", "predictor"]


def dino(tmp_path):
    """The teacher's, not the student's."""
    vit = tiny_vit()
    student = {key: torch.zeros_like(value) for key, value in under("module.backbone.", vit).items()}
    teacher = under("backbone.", vit) | weights("head.mlp.0.weight", "head.last_layer.weight_g")
    saved = {"student": student, "teacher": teacher, "args": ARGUMENTS, "dino_loss": weights("center")}
    torch.save(saved, tmp_path / "w.pth")
    return vit, ["head"]


def dino_alone(tmp_path):
    vit = tiny_vit()
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    return vit, []


def swav(tmp_path):
    resnet = model("resnet18")
    state = under("module.", resnet) | weights("module.projection_head.0.weight", "module.prototypes.weight")
    torch.save(state, tmp_path / "w.pth")
    return resnet, ["projection_head", "prototypes"]


def simmim(tmp_path):
    """Microsoft's Swin: merging at the end of a stage, buffers, and the settings in a class of another package."""
    sizes = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4]}
    swin = model("swin_tiny_patch4_window7_224", **sizes)
    state = {}
    for key, value in under("encoder.", swin).items():
        state[key.replace("layers.1.downsample", "layers.0.downsample")] = value
    shifted = "encoder.layers.0.blocks.1."
    state |= {
        f"{shifted}attn_mask": torch.zeros(16, 16, 16),
        f"{shifted}attn.relative_position_index": torch.zeros(16, 16),
    }
    state |= weights("encoder.mask_token", "decoder.0.weight")
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = module.CfgNode(LR=0.1)
    settings.__dict__["__frozen__"] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", package)
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": state, "config": settings, "max_accuracy": 0.0}, tmp_path / "w.pth")
    return swin, ["mask_token", "decoder"]


def simmim_vit(tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 0.1}
    beit = model(
        "beit_base_patch16_224", **sizes, use_abs_pos_emb=False, use_shared_rel_pos_bias=True,
        use_rel_pos_bias=False, use_fc_norm=False,
    )  # fmt: skip
    with torch.no_grad():
        beit.rel_pos_bias.relative_position_bias_table.normal_()
    state = under("encoder.", beit) | weights("encoder.mask_token", "decoder.0.weight")
    state["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(17, 17)
    torch.save({"model": state}, tmp_path / "w.pth")
    return beit, ["mask_token", "decoder"]


CASES = {
    "mae": ("mae", mae),
    "mae, fine-tuned": ("mae", mae_finetuned),
    "moco_v3": ("moco_v3", moco_v3),
    "dino": ("dino", dino),
    "dino, encoder alone": ("dino", dino_alone),
    "swav": ("swav", swav),
    "simmim": ("simmim", simmim),
    "simmim, vision transformer": ("simmim", simmim_vit),
}


@pytest.mark.parametrize("case", CASES)
def test_a_published_encoder(case, tmp_path, capsys):
    """The command reads it into a folder that `load` takes, and features are those of the model it was made from."""
    layout, build = CASES[case]
    expected, dropped = build(tmp_path)
    assert main(["--from", layout, str(tmp_path / "w.pth"), "--out", str(tmp_path / "encoder")]) == 0
    assert f"dropped: {', '.join(dropped) or 'nothing'}\n" in capsys.readouterr().out
    encoder = ssl_ib.load(tmp_path / "encoder")
    size = encoder.description["preprocessing"]["size"]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), expected(images), atol=1e-6, rtol=1e-5)
    description = json.loads((tmp_path / "encoder" / "backbone.json").read_text())
    assert description["origin"] == {"layout": layout, "file": "w.pth", "dropped": dropped}
    assert description["preprocessing"]["crop_ratio"] == 0.875
    # SwAV's code has .228 for red.
    assert description["std"] == [0.228 if layout == "swav" else 0.229, 0.224, 0.225]
    bilinear = layout in ("moco_v3", "swav")
    assert description["preprocessing"]["interpolation"] == ("bilinear" if bilinear else "bicubic")
    assert "published checkpoint `w.pth`" in (tmp_path / "encoder" / "README.md").read_text()


def test_a_run_starts_from_it(tmp_path):
    dino(tmp_path)
    main(["--from", "dino", str(tmp_path / "w.pth"), "--out", str(tmp_path / "encoder")])
    sizes = "{patch_size: 8, embed_dim: 192, depth: 1, num_heads: 3}"
    run = trainer(f"model.backbone_args={sizes}", f"init={tmp_path / 'encoder'}").run
    assert "positions resampled from 4 x 4 to 2 x 2" in initialise.initialise(run)
    saved = ssl_ib.load_backbone(tmp_path / "encoder").state_dict()
    assert torch.equal(run.model.backbone.blocks[0].attn.qkv.weight, saved["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101"])
def test_a_resnet_is_known_by_its_blocks(name):
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    assert official._resnet(state, state, official.LAYOUTS["swav"]) == (name, {"num_classes": 0})


def twice_as_wide():
    return {"module.conv1.weight": torch.ones(128, 3, 7, 7), "module.layer1.0.conv1.weight": torch.ones(1)}


@pytest.mark.parametrize(
    "layout, saved, message",
    [
        (
            "swav",
            lambda: tiny_vit().state_dict(),
            r"expected the weights of a ResNet under module\.\* or \*, got names",
        ),
        ("swav", twice_as_wide, r"expected a ResNet of the usual width, .* got \(128, 3, 7, 7\)"),
        ("mae", lambda: {"model": {"a": torch.ones(1)}}, "expected the weights of a vision transformer"),
        ("mae", lambda: {"model": tiny_vit().state_dict() | {"extra.weight": torch.ones(1)}}, "extra.weight"),
        ("mae", lambda: {"model": 3}, "expected a state dict"),
        ("dino", lambda: {"teacher": tiny_vit().state_dict() | {"pos_embed": torch.ones(1, 8, 192)}}, "no square grid"),
        (
            "moco_v3",
            lambda: {"state_dict": tiny_vit().state_dict(), "hooks": torch.nn.ReLU()},
            "ReLU, and loading more",
        ),
    ],
)
def test_what_is_not_in_the_layout(layout, saved, message, tmp_path, capsys):
    torch.save(saved(), tmp_path / "w.pth")
    assert main(["--from", layout, str(tmp_path / "w.pth"), "--out", str(tmp_path / "encoder")]) == 2
    said = capsys.readouterr().err
    assert __import__("re").search(message, said), said
    assert not (tmp_path / "encoder").exists()


def test_the_layouts_of_the_command_are_those_there_are():
    from ssl_ib.export import FORMATS, LAYOUTS, formats

    assert tuple(official.LAYOUTS) == LAYOUTS and tuple(formats.FORMATS) == FORMATS
    with pytest.raises(UserError, match="unknown layout 'beit'"):
        official.convert("beit", "w.pth")

"""The formats that an encoder is written in: its files, how they are loaded back, and the lines that tell a user so.

Each format carries the weights and the preprocessing: size in pixels, crop ratio, interpolation, mean and deviation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from timm.models import VisionTransformer
from torch import Tensor, nn

from ..errors import UserError
from ..pretrained import Backbone
from ..record.backbone import load_backbone, save_backbone, snippet

#: Gives the features of images that are prepared: [B, C, h, w] -> [B, D].
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """How an encoder is written to a folder and loaded back.

    write:  writes the files. Raises UserError where the format cannot hold this encoder.
    reload: loads them with the library that the format is for.
    usage:  the lines of Python that do so.
    needs:  packages that `write` needs, and further ones that `reload` needs, besides those that are always there.
    """

    write: Callable[[Backbone, Path], None]
    reload: Callable[[Path], Encode]
    usage: Callable[[Path], str]
    needs: tuple[str, ...] = ()
    reload_needs: tuple[str, ...] = ()


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if find_spec(name) is None]


def _preprocessing(backbone: Backbone) -> dict[str, Any]:
    """All that an image goes through, as the files `preprocessing.json` have it."""
    found = backbone.description
    return {**found["preprocessing"], "mean": found["mean"], "std": found["std"]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that are dense and alone in their storage, as safetensors wants them."""
    return {
        key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in module.state_dict().items()
    }


def _transforms(how: dict[str, Any]) -> str:
    """Lines that prepare a PIL image with torchvision."""
    return (
        "transform = transforms.Compose([\n"
        f"    transforms.Resize({round(how['size'] / how['crop_ratio'])}, "
        f"transforms.InterpolationMode.{how['interpolation'].upper()}),\n"
        f"    transforms.CenterCrop({how['size']}),\n"
        "    transforms.ToTensor(),\n"
        f"    transforms.Normalize({how['mean']}, {how['std']}),\n"
        "])\n"
    )


# --- safetensors: as a run leaves it ----------------------------------------------------------------------------------


def _write_safetensors(backbone: Backbone, folder: Path) -> None:
    save_backbone(backbone.model, backbone.description, folder)


def _use_safetensors(folder: Path) -> str:
    return f"import ssl_ib\n\nencoder = ssl_ib.load({folder.name!r})\n\n# Without ssl_ib:\n" + snippet(folder).replace(
        str(folder), folder.name
    )


# --- timm and hf: the layout of timm's models on the Hugging Face hub, which both libraries load ----------------------


def _write_hub(backbone: Backbone, folder: Path) -> None:
    found, model = backbone.description, backbone.model
    _refuse_stem(found, "timm")
    how, arguments = found["preprocessing"], dict(found["arguments"])
    arguments.pop("num_classes", None)
    cfg, crop_pct, resized = model.pretrained_cfg, how["crop_ratio"], round(how["size"] / how["crop_ratio"])
    if math.floor(how["size"] / crop_pct) != resized:
        # timm rounds down where the views round to the nearest; the little more is for the rounding of the division.
        crop_pct = how["size"] / (resized + 1e-3)
    pretrained_cfg = {
        "input_size": [arguments.get("in_chans", 3), how["size"], how["size"]],
        "fixed_input_size": bool(cfg.get("fixed_input_size")),
        "interpolation": how["interpolation"],
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "mean": found["mean"],
        "std": found["std"],
        "num_classes": 0,
        "first_conv": cfg.get("first_conv"),
        "classifier": cfg.get("classifier"),
    }
    config = {
        "architecture": found["model"].partition(".")[0],
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": pretrained_cfg,
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
    }
    _write_json(folder / "config.json", config)
    safetensors.torch.save_file(_state(model), folder / "model.safetensors", metadata={"format": "pt"})


def _refuse_stem(description: dict[str, Any], library: str) -> None:
    if "stem" in description:
        raise UserError(
            f"{library} has no ResNet with the stem {description['stem']!r} of small images: use --to safetensors, "
            "whose README exchanges the stem in two lines, or --to onnx"
        )


def _load_timm(folder: Path) -> Encode:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _use_timm(folder: Path) -> str:
    return (
        "import timm\n\n"
        f"model = timm.create_model('local-dir:{folder.name}', pretrained=True).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "features = model(transform(image)[None])  # image: PIL, RGB\n"
    )


def _load_hf(folder: Path) -> Encode:
    from transformers import TimmWrapperModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = TimmWrapperModel.from_pretrained(folder).eval()
    return lambda images: model(images).pooler_output


def _use_hf(folder: Path) -> str:
    return (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        f"processor = AutoImageProcessor.from_pretrained({folder.name!r})\n"
        f"model = AutoModel.from_pretrained({folder.name!r}).eval()\n"
        "features = model(**processor(image)).pooler_output  # image: PIL, RGB\n"
    )


# --- torchvision ------------------------------------------------------------------------------------------------------


def _write_torchvision(backbone: Backbone, folder: Path) -> None:
    found, model = backbone.description, backbone.model
    _refuse_stem(found, "torchvision")
    name = found["model"].partition(".")[0]
    if type(model) is VisionTransformer:
        arguments, state = _torchvision_vit(name, model)
        config = {"model": "VisionTransformer", "arguments": arguments}
    elif name.startswith(("resnet", "resnext", "wide_resnet")) and name in torchvision.models.list_models():
        config, state = {"model": name, "arguments": {}}, _state(model)
    else:
        raise _no_torchvision(f"{name!r} is neither a ResNet of torchvision's nor a plain vision transformer")
    try:
        _torchvision_model(config).load_state_dict(state)
    except RuntimeError as error:
        raise _no_torchvision(f"{name!r} with {found['arguments']} has other weights ({error})") from None
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessing.json", _preprocessing(backbone))
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _no_torchvision(reason: str) -> UserError:
    return UserError(f"torchvision has no such encoder: {' '.join(reason.split())[:300]}: use another format")


def _torchvision_vit(name: str, vit: VisionTransformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of torchvision's VisionTransformer, and the weights under its names."""
    block, embed = vit.blocks[0], vit.patch_embed
    plain = {
        "a class token that stands for the image": vit.cls_token is not None and vit.global_pool == "token",
        "no register tokens": vit.num_prefix_tokens == 1,
        "square images and patches": len({*embed.img_size}) == len({*embed.patch_size}) == 1,
        "images of 3 channels": embed.proj.in_channels == 3,
        "a position for the class token": vit.pos_embed is not None and not vit.no_embed_class,
        "a norm after the last block alone": isinstance(vit.norm_pre, nn.Identity)
        and isinstance(vit.fc_norm, nn.Identity)
        and isinstance(embed.norm, nn.Identity),
        "biases in the attention": getattr(block.attn.qkv, "bias", None) is not None and embed.proj.bias is not None,
        "no norms or scales within the blocks": isinstance(getattr(block, "ls1", None), nn.Identity)
        and isinstance(block.attn.q_norm, nn.Identity),
    }
    lacking = [what for what, there in plain.items() if not there]
    if lacking:
        raise _no_torchvision(f"its vision transformer has {', '.join(lacking)}, and this {name!r} is otherwise")
    arguments = {
        "image_size": embed.img_size[0],
        "patch_size": embed.patch_size[0],
        "num_layers": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "hidden_dim": vit.embed_dim,
        "mlp_dim": block.mlp.fc1.out_features,
    }
    fixed = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
    starts = {"patch_embed.proj.": "conv_proj.", "norm.": "encoder.ln."}
    inner = {
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj.": "self_attention.out_proj.",
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.3.",
    }
    state = {}
    for key, value in _state(vit).items():
        if key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            theirs = next((new + rest.removeprefix(old) for old, new in inner.items() if rest.startswith(old)), rest)
            key = f"encoder.layers.encoder_layer_{number}.{theirs}"
        else:
            key = next((new + key.removeprefix(old) for old, new in starts.items() if key.startswith(old)), key)
        state[fixed.get(key, key)] = value
    return arguments, state


def _torchvision_model(config: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        if config["model"] == "VisionTransformer":
            model = torchvision.models.VisionTransformer(**config["arguments"])
            model.heads = nn.Identity()
        else:
            model = torchvision.models.get_model(config["model"], **config["arguments"])
            model.fc = nn.Identity()
    return model.eval()


def _load_torchvision(folder: Path) -> Encode:
    model = _torchvision_model(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model


def _use_torchvision(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    arguments = ", ".join(f"{key}={value}" for key, value in config["arguments"].items())
    head = "heads" if config["model"] == "VisionTransformer" else "fc"
    return (
        "import safetensors.torch, torch\nfrom torchvision import models, transforms\n\n"
        f"model = models.{config['model']}({arguments})\n"
        f"model.{head} = torch.nn.Identity()\n"
        f"model.load_state_dict(safetensors.torch.load_file('{folder.name}/model.safetensors'))\n"
        "model.eval()\n"
        + _transforms(json.loads((folder / "preprocessing.json").read_text()))
        + "features = model(transform(image)[None])  # image: PIL, RGB\n"
    )


# --- onnx -------------------------------------------------------------------------------------------------------------


def _write_onnx(backbone: Backbone, folder: Path) -> None:
    how = _preprocessing(backbone)
    channels = backbone.description["arguments"].get("in_chans", 3)
    images = torch.zeros(2, channels, how["size"], how["size"])
    program = torch.onnx.export(
        backbone.model,
        (images,),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props["preprocessing"] = json.dumps(how)
    program.save(folder / "model.onnx")
    _write_json(folder / "preprocessing.json", how)


def _load_onnx(folder: Path) -> Encode:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def _use_onnx(folder: Path) -> str:
    return (
        "import onnxruntime\nfrom torchvision import transforms\n\n"
        f"session = onnxruntime.InferenceSession('{folder.name}/model.onnx')\n"
        + _transforms(json.loads((folder / "preprocessing.json").read_text()))
        + "features = session.run(['features'], {'images': transform(image)[None].numpy()})[0]  # image: PIL, RGB\n"
    )


#: By name, in the order of ssl_ib.export.FORMATS.
FORMATS = {
    "safetensors": Format(_write_safetensors, load_backbone, _use_safetensors),
    "timm": Format(_write_hub, _load_timm, _use_timm),
    "hf": Format(_write_hub, _load_hf, _use_hf, reload_needs=("transformers",)),
    "torchvision": Format(_write_torchvision, _load_torchvision, _use_torchvision),
    "onnx": Format(_write_onnx, _load_onnx, _use_onnx, ("onnx", "onnxscript"), ("onnxruntime",)),
}

"""Published checkpoints, by the names in them: MAE, MoCo v3, DINO, SwAV and SimMIM.

`convert` makes an encoder under timm's names of any of them. Their layouts:

    layout    file                             encoder                                 heads, which are dropped
    mae       {model: ...} or bare             timm's names                            decoder_*, mask_token, head
    moco_v3   {state_dict: ...}                module.base_encoder.*                   head or fc, predictor,
                                                                                       momentum_encoder
    dino      {teacher: ..., ...} or bare      [module.]backbone.* of the teacher      head
    swav      {state_dict: ...} or bare        module.* (torchvision's ResNet)         projection_head, prototypes
    simmim    {model: ...}                     encoder.* (Microsoft's Swin, or BEiT)   decoder, mask_token, head

Prefixes may be missing, as they are in files that hold an encoder alone or that were fine-tuned. What a state dict does
not tell, such as the number of heads, is that of the published models.

`load` puts an MAE's whole state dict, with its decoder, into our model:
    decoder_embed   -> decoder.embed        decoder_blocks.i -> decoder.blocks.i
    mask_token      -> decoder.mask_token   decoder_norm     -> decoder.norm
    decoder_pred    -> decoder.predict      decoder_pos_embed: fixed, compared with ours
    anything else   -> encoder.backbone.*   (pos_embed too: it takes the place of ours)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.swin_transformer import checkpoint_filter_fn as timms_swin
from torch import Tensor, nn

from ..data.statistics import KNOWN
from ..errors import UserError, nearest
from ..record.weights import read_file, state_dict_of

DECODER = {
    "decoder_embed": "embed",
    "decoder_blocks": "blocks",
    "decoder_norm": "norm",
    "decoder_pred": "predict",
    "mask_token": "mask_token",
}
#: Heads of fine-tuned files; a pretrained encoder has none.
_LEFT_OUT = ("head.", "fc_norm.")


# --- an encoder of any layout -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """An encoder that was read from a published file.

    name, arguments: of timm.create_model.
    module:          the encoder, in evaluation mode.
    mean, std:       what its images were normalised with.
    preprocessing:   as in `backbone.json` (record/backbone.py): what the published evaluation did.
    dropped:         the heads, by the first parts of their names.
    """

    name: str
    arguments: dict[str, Any]
    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocessing: dict[str, Any]
    dropped: list[str]


@dataclass(frozen=True)
class _Layout:
    """How the files of a method are laid out.

    wrappers:   keys under which a file may have its weights.
    prefixes:   with which the encoder's names may begin; the first that is there counts.
    heads:      what of the names behind the prefix is no encoder's.
    kinds:      which encoders there are.
    num_heads:  attention heads of a vision transformer, by its width.
    interpolation, std: of the published evaluation, where they are not bicubic and ImageNet's.
    """

    wrappers: tuple[str, ...]
    prefixes: tuple[str, ...]
    heads: tuple[str, ...]
    kinds: tuple[str, ...]
    num_heads: dict[int, int]
    interpolation: str = "bicubic"
    std: tuple[float, ...] = KNOWN["imagenet"][1]


_NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}

LAYOUTS = {
    "mae": _Layout(("model",), ("",), (*DECODER, "decoder_pos_embed", "head"), ("vit",), _NUM_HEADS),
    "moco_v3": _Layout(
        ("state_dict", "model"),
        ("module.base_encoder.", "base_encoder.", "module.", ""),
        ("head", "fc"),
        ("vit", "resnet"),
        # Its ViT-Small has twelve.
        {**_NUM_HEADS, 384: 12},
        "bilinear",
    ),
    "dino": _Layout(
        ("teacher", "student"),
        ("module.backbone.", "backbone.", ""),
        ("head", "fc"),
        ("vit", "resnet"),
        _NUM_HEADS,
    ),
    "swav": _Layout(
        ("state_dict",),
        ("module.", ""),
        ("projection_head", "prototypes"),
        ("resnet",),
        {},
        "bilinear",
        # Not ImageNet's .229: the published code has it so, in training and in evaluation.
        (0.228, 0.224, 0.225),
    ),
    "simmim": _Layout(("model",), ("encoder.", ""), ("decoder", "mask_token", "head"), ("swin", "beit"), {}),
}
#: Buffers that are computed, and that timm does not save.
_COMPUTED = ("relative_position_index", "attn_mask", "relative_coords_table")


def convert(layout: str, path: Path | str) -> Converted:
    """The encoder in a published checkpoint.

    layout: one of LAYOUTS. Raises UserError where the file cannot be read, is not in that layout, or holds an
    architecture that timm has no match for.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}{nearest(layout, LAYOUTS)}")
    how, content = LAYOUTS[layout], read_file(path)
    try:
        name, arguments, module, dropped = _encoder(how, _weights(content, how, path))
    except UserError as error:
        raise UserError(f"{path} is not in the layout {layout!r}: {error}") from None
    size = arguments.get("img_size", 224)
    preprocessing = {"size": size, "crop_ratio": 0.875, "interpolation": how.interpolation, "max_side": None}
    mean = KNOWN["imagenet"][0]
    return Converted(name, arguments, module.eval(), mean, how.std, preprocessing, dropped)


def _weights(content: Any, how: _Layout, path: Path | str) -> dict[str, Tensor]:
    if isinstance(content, dict):
        content = next((content[key] for key in how.wrappers if key in content), content)
    return state_dict_of(content, path)


def _encoder(how: _Layout, weights: dict[str, Tensor]) -> tuple[str, dict[str, Any], nn.Module, list[str]]:
    prefix = next(prefix for prefix in how.prefixes if any(key.startswith(prefix) for key in weights) or not prefix)
    state, dropped = {}, []
    for key, value in weights.items():
        inner = key.removeprefix(prefix)
        top = inner.split(".")[0]
        if not key.startswith(prefix):
            dropped.append(key.removeprefix("module.").split(".")[0])
        elif top in how.heads:
            dropped.append(top)
        elif not key.endswith(_COMPUTED):
            state[inner] = value
    kinds = {
        "vit": "blocks.0.attn.qkv.bias" in state,
        "beit": "blocks.0.attn.q_bias" in state,
        "swin": "layers.0.blocks.0.attn.relative_position_bias_table" in state,
        "resnet": "layer1.0.conv1.weight" in state,
    }
    kind = next((kind for kind in how.kinds if kinds[kind]), None)
    if kind is None:
        raise UserError(
            f"expected the weights of a {' or '.join(map(_KINDS.get, how.kinds))} under {_prefixes(how)}, got names "
            f"such as {', '.join(sorted(weights)[:3])}"
        )
    try:
        name, arguments = _READERS[kind](state, weights, how)
    except KeyError as error:
        raise UserError(f"it has no {error}") from None
    try:
        with torch.random.fork_rng(devices=[]):
            module = timm.create_model(name, **arguments)
        module.load_state_dict(timms_swin(state, module) if kind == "swin" else _complete(state, module))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"timm's {name!r} with {arguments} does not fit it: {reason[:300]}") from None
    return name, arguments, module, list(dict.fromkeys(dropped))


_KINDS = {"vit": "vision transformer", "beit": "vision transformer", "swin": "Swin", "resnet": "ResNet"}


def _prefixes(how: _Layout) -> str:
    return " or ".join(f"{prefix}*" for prefix in how.prefixes)


def _complete(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """With the counts of batches, which matter to no feature and which some files lack."""
    counts = {key: value for key, value in module.state_dict().items() if key.endswith("num_batches_tracked")}
    return {**counts, **state}


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """How many different numbers stand in the group of a pattern, over all names."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def _side(tokens: int, what: str) -> int:
    """The side of a square grid of so many tokens."""
    side = math.isqrt(max(tokens, 0))
    if not side or side * side != tokens:
        raise UserError(f"{what} are no square grid's")
    return side


def _patches(state: dict[str, Tensor]) -> tuple[int, int, int]:
    """Width, channels and patch size, by the patch embedding."""
    weight = state.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise UserError("expected patches that are embedded by one convolution, patch_embed.proj")
    return tuple(weight.shape[:3])


def _heads(width: int, how: _Layout) -> int:
    if width not in how.num_heads and width % 64:
        raise UserError(f"cannot tell the number of attention heads of a width of {width}")
    return how.num_heads.get(width, width // 64)


def _vit(state: dict[str, Tensor], weights: dict[str, Tensor], how: _Layout) -> tuple[str, dict[str, Any]]:
    width, channels, patch = _patches(state)
    grid = _side(state["pos_embed"].shape[1] - 1, "its positions") if "pos_embed" in state else 0
    if not grid:
        raise UserError("expected positions, pos_embed")
    named = f"vit_{_SIZES.get(width)}_patch{patch}_224"
    arguments = {
        "img_size": grid * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": _count(state, r"blocks\.(\d+)\."),
        "num_heads": _heads(width, how),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "in_chans": channels,
        "num_classes": 0,
    }
    if "fc_norm.weight" in state:
        # Fine-tuned on the mean of the patches, which is normed in place of the tokens.
        arguments |= {"global_pool": "avg", "fc_norm": True}
    return (named if timm.is_model(named) else "vit_base_patch16_224"), arguments


def _beit(state: dict[str, Tensor], weights: dict[str, Tensor], how: _Layout) -> tuple[str, dict[str, Any]]:
    """SimMIM's vision transformer. Features are the mean of the patches, as where it was fine-tuned."""
    width, channels, patch = _patches(state)
    shared, own = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
    table = state.get(shared, state.get(own))
    if table is None:
        raise UserError("expected relative positions, relative_position_bias_table")
    arguments = {
        "img_size": (_side(len(table) - 3, "its relative positions") + 1) // 2 * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": _count(state, r"blocks\.(\d+)\."),
        "num_heads": table.shape[1],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "in_chans": channels,
        "num_classes": 0,
        "init_values": 0.1 if "blocks.0.gamma_1" in state else None,
        "use_abs_pos_emb": "pos_embed" in state,
        "use_shared_rel_pos_bias": shared in state,
        "use_rel_pos_bias": own in state,
        "global_pool": "avg",
        "use_fc_norm": "fc_norm.weight" in state,
    }
    return ("beit_large_patch16_224" if width == 1024 else "beit_base_patch16_224"), arguments


def _swin(state: dict[str, Tensor], weights: dict[str, Tensor], how: _Layout) -> tuple[str, dict[str, Any]]:
    width, channels, patch = _patches(state)
    stages = range(_count(state, r"layers\.(\d+)\."))
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    window = (_side(len(tables[0]), "its relative positions") + 1) // 2
    depths = [_count(state, rf"layers\.{i}\.blocks\.(\d+)\.") for i in stages]
    # A mask of shifted windows [windows, ...] tells the image's size; without one, it is that of the published models.
    mask = next((v for k, v in weights.items() if k.endswith("layers.0.blocks.1.attn_mask")), None)
    windows = _side(len(mask), "its windows") if mask is not None else 2 ** (len(depths) - 1)
    size = {96: "small" if depths[2:3] == [18] else "tiny", 192: "large"}.get(width, "base")
    return f"swin_{size}_patch4_window7_224", {
        "img_size": windows * window * patch,
        "patch_size": patch,
        "window_size": window,
        "embed_dim": width,
        "depths": depths,
        "num_heads": [table.shape[1] for table in tables],
        "in_chans": channels,
        "num_classes": 0,
    }


def _resnet(state: dict[str, Tensor], weights: dict[str, Tensor], how: _Layout) -> tuple[str, dict[str, Any]]:
    stem = tuple(state["conv1.weight"].shape) if "conv1.weight" in state else None
    if stem != (64, 3, 7, 7):
        raise UserError(f"expected a ResNet of the usual width, with a stem of 64 x 3 x 7 x 7, got {stem or 'none'}")
    blocks = tuple(_count(state, rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in state
    names = {
        (False, (2, 2, 2, 2)): "resnet18",
        (False, (3, 4, 6, 3)): "resnet34",
        (True, (3, 4, 6, 3)): "resnet50",
        (True, (3, 4, 23, 3)): "resnet101",
        (True, (3, 8, 36, 3)): "resnet152",
    }
    if (bottleneck, blocks) not in names:
        raise UserError(f"expected a ResNet-18, 34, 50, 101 or 152, got one of {blocks} blocks")
    return names[bottleneck, blocks], {"num_classes": 0}


_READERS: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
    "vit": _vit,
    "beit": _beit,
    "swin": _swin,
    "resnet": _resnet,
}


# --- an MAE with its decoder, in our model ----------------------------------------------------------------------------


def load(model: nn.Module, path: str) -> None:
    """Puts the weights of an official MAE file into `model.encoder.backbone` and `model.decoder`.

    Raises UserError where the file cannot be read or its names or shapes do not fit the model.
    """
    try:
        state = state_dict_of(read_file(path), path)
    except UserError as error:
        raise UserError(f"checkpoint: {error}") from None
    load_state_dict(model, state, path)


def load_state_dict(model: nn.Module, state: dict[str, Tensor], name: str = "state_dict") -> None:
    """The same for a state dict in the official names; `name` is what an error calls it."""
    state = {key: value for key, value in state.items() if not key.startswith(_LEFT_OUT)}
    positions = state.pop("decoder_pos_embed", None)
    decoder = {}
    for theirs, ours in DECODER.items():
        for key in [key for key in state if key.split(".")[0] == theirs]:
            decoder[ours + key[len(theirs) :]] = state.pop(key)
    if "mask_token" in decoder:
        decoder["mask_token"] = decoder["mask_token"].flatten()
    try:
        model.encoder.backbone.load_state_dict(state)
        if decoder:
            model.decoder.load_state_dict(decoder)
    except RuntimeError as error:
        raise UserError(f"{name} does not fit the model: {error}") from None
    ours = model.decoder.positions[None]
    # Computed in another order, sines and cosines differ in their last bits.
    if positions is not None and not (
        positions.shape == ours.shape and torch.allclose(positions.to(ours), ours, atol=1e-5)
    ):
        raise UserError(f"{name}: its decoder's positions are not those of the model's grid")

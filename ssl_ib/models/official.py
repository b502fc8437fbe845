"""Weights of the official MAE, by their published names.

An official state dict has the encoder under timm's own names and the decoder under these:
    decoder_embed   -> decoder.embed        decoder_blocks.i -> decoder.blocks.i
    mask_token      -> decoder.mask_token   decoder_norm     -> decoder.norm
    decoder_pred    -> decoder.predict      decoder_pos_embed: fixed, compared with ours
    anything else   -> encoder.backbone.*   (pos_embed too: it takes the place of ours)
A file may hold it under `model`, as the published ones do, and with the decoder or without.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError

DECODER = {
    "decoder_embed": "embed",
    "decoder_blocks": "blocks",
    "decoder_norm": "norm",
    "decoder_pred": "predict",
    "mask_token": "mask_token",
}
#: Heads of fine-tuned files; a pretrained encoder has none.
_LEFT_OUT = ("head.", "fc_norm.")


def load(model: nn.Module, path: str) -> None:
    """Puts the weights of an official file into `model.encoder.backbone` and `model.decoder`.

    Raises UserError where the file cannot be read or its names or shapes do not fit the model.
    """
    load_state_dict(model, _read(path), path)


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


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"checkpoint: there is no file {path!r}")
    try:
        # The published files carry the arguments they were trained with.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Unpickling a foreign file can raise anything, and without a word.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {path!r} cannot be read: {reason}") from None
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"checkpoint {path!r}: expected a state dict, or one under 'model'")
    return state

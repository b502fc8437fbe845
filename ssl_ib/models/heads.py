"""Projection and prediction heads."""

from __future__ import annotations

from torch import nn


def mlp_head(
    in_width: int, hidden: int, out_width: int, layers: int, last_norm: bool, hidden_norm: bool = True
) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between them: [B, in_width] -> [B, out_width].

    No layer has a bias: a batch norm that follows has its own shift, and the published code of BYOL, Barlow Twins and
    MoCo v3 gives the last layer none either. Without hidden_norm there is ReLU alone between the layers, and all have
    biases (MoCo v2). last_norm ends it with a batch norm that has no affine part (SimCLR v2, MoCo v3). `layers` >= 1;
    one layer is a linear head.
    """
    widths = [in_width] + [hidden] * (layers - 1)
    modules: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        norm = [nn.BatchNorm1d(b)] if hidden_norm else []
        modules += [nn.Linear(a, b, bias=not hidden_norm), *norm, nn.ReLU(inplace=True)]
    modules.append(nn.Linear(widths[-1], out_width, bias=not hidden_norm))
    if last_norm:
        modules.append(nn.BatchNorm1d(out_width, affine=False))
    return nn.Sequential(*modules)

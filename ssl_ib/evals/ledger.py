"""The gradient ledger: how strongly each term of the loss moves the encoder, at what depth, and which terms fight.

The gradients are those of held-out batches, always the same ones. The parts are in evaluation mode, so that nothing is
dropped at random, but batch norms go by the batch, as in training. Nothing of the run is moved.

Shapes: T terms, P depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from ..types import Loss

#: Into how many depths an encoder is divided at most, from the image to the features.
DEPTHS = 4
#: Batches at most; a run of few steps takes fewer: one for each so many steps from one evaluation to the next.
BATCHES, STEPS_A_BATCH = 4, 200


def num_batches(steps: int) -> int:
    """How many batches a ledger reads where `steps` steps lie between evaluations: so many that it costs little."""
    return max(1, min(BATCHES, steps // STEPS_A_BATCH))


def by_depth(encoders: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """The trained parameters of the encoders from the image to the features, in at most DEPTHS runs of equal layers.

    Layers are timm's: the blocks of a vision transformer, the stages of other networks. The stem counts for the first,
    a final norm for the last. A module that is no timm model has its children as layers.
    """
    found: list[list[nn.Parameter]] = []
    seen: set[int] = set()
    for encoder in encoders:
        layers = _layers(encoder)
        count = min(DEPTHS, len(layers))
        found += [[] for _ in range(count - len(found))]
        for number, layer in enumerate(layers):
            # Encoders may share some.
            found[number * count // len(layers)] += [p for p in layer if p.requires_grad and id(p) not in seen]
            seen |= {id(p) for p in layer}
    return found


def _layers(encoder: nn.Module) -> list[list[nn.Parameter]]:
    if not hasattr(encoder, "group_matcher"):
        children = [list(child.parameters()) for child in encoder.children()]
        return [layer for layer in children if layer] or [list(encoder.parameters())]
    numbers = group_parameters(encoder, encoder.group_matcher(coarse=True), reverse=True)
    layers: list[list[nn.Parameter]] = [[] for _ in range(max(numbers.values()) + 1)]
    for name, parameter in encoder.named_parameters():
        layers[numbers[name]].append(parameter)
    if len(layers) > 2:
        stem, first, *rest = layers
        layers = [stem + first, *rest]
        if all(p.ndim < 2 for p in layers[-1]):
            layers[-2:] = [layers[-2] + layers[-1]]
    return layers


def trained_terms(loss: Loss) -> dict[str, Tensor]:
    """The weighted terms whose sum is the loss, by name; the loss itself as the only one, `loss`, where it names none
    or its terms are constants."""
    terms = {name: loss.terms[name] * weight for name, weight in loss.weights.items()}
    return terms if any(term.requires_grad for term in terms.values()) else {"loss": loss.total}


def products(terms: dict[str, Tensor], depths: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """The inner products of the terms' gradients with one another, at each depth: float64 [P, T, T].

    Only the graph of the terms is read: no `.grad` is written, and it can be used again. A term that the parameters
    have no part in has products of 0.
    """
    parameters = [p for depth in depths for p in depth]
    gradients = [
        torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        if term.requires_grad
        else [None] * len(parameters)
        for term in terms.values()
    ]
    found = parameters[0].new_zeros(len(depths), len(terms), len(terms), dtype=torch.float64)
    each = iter(zip(*gradients, strict=True))
    for depth, group in enumerate(depths):
        for parameter, asked in zip(group, each, strict=False):
            rows = [torch.zeros_like(parameter) if g is None else g for g in asked]
            rows = torch.stack(rows).flatten(1).double()
            found[depth] += rows @ rows.T
    return found


def readings(names: Sequence[str], found: Tensor) -> dict[str, float]:
    """The numbers of a ledger, from the terms' `products` float64 [P, T, T], a mean over batches.

    `ledger/norm`, of the whole loss's gradient; for each term `ledger/<term>/norm`, and of its parts
    `ledger/<term>/depth_1` (at the image) and so on; `ledger/<term>/share`, its projection on the whole gradient as a
    share of that: shares add up to 1, and one below 0 belongs to a term that asks the opposite of the sum.
    `ledger/cosine/<a>/<b>`, from -1 to 1, of every two terms. Shares and cosines are left out where a gradient is 0.
    """
    whole = found.sum(dim=0)
    total, norms = float(whole.sum()), whole.diagonal().sqrt()
    # Rounding may leave a sum that is all but 0 below it.
    numbers = {"ledger/norm": max(total, 0.0) ** 0.5 if total == total else total}
    for row, name in enumerate(names):
        numbers[f"ledger/{name}/norm"] = float(norms[row])
        for depth, part in enumerate(found[:, row, row].sqrt().tolist(), start=1):
            numbers[f"ledger/{name}/depth_{depth}"] = part
        if total > 0:
            numbers[f"ledger/{name}/share"] = float(whole[row].sum()) / total
    for a, b in combinations(range(len(names)), 2):
        if norms[a] and norms[b]:
            numbers[f"ledger/cosine/{names[a]}/{names[b]}"] = float(whole[a, b] / (norms[a] * norms[b]))
    return numbers


@contextmanager
def batch_statistics(*roots: nn.Module) -> Iterator[None]:
    """In evaluation mode, batch norms go by the batch and remember nothing of it; afterwards by what they had."""
    kept = [
        (module, module.running_mean, module.running_var)
        for root in roots
        for module in root.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    for module, _, _ in kept:
        # Without running statistics a batch norm in evaluation mode takes the batch's. In training mode it would count
        # the batch, and between GPUs ask the other processes.
        module.running_mean = module.running_var = None
    try:
        yield
    finally:
        for module, mean, variance in kept:
            module.running_mean, module.running_var = mean, variance

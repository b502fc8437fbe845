"""The kernel functions of a backend, called without tensors that they may do without.

An absent tensor means what a neutral one does: zeros that are added, a column -1 that is left out, labels that no
pair shares. So the answer without it is compared with the answer, in plain torch, with the neutral tensor.

Which tensors are optional is read from the function itself: from Python's annotations, or from the signature that
pybind11 writes into a docstring. A new function, or a new optional tensor, fails here until ARGUMENTS and NEUTRAL
have it.

Shapes: B images, L tokens, K kept or prototypes, P prefix tokens, D width, N rows, M columns, d embedding.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor

from ssl_ib.ops import chunked

TEMPERATURE = 0.1


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def _unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(_draw(*shape, seed=seed), dim=1)


KEEP = torch.tensor([[3, 0, 5], [1, 1, 2]])
ROWS, COLS = _unit(20, 24, seed=1), _unit(70, 24, seed=2)
#: Above every logit of its row, whatever is left out of them.
LSE = (ROWS @ COLS.T / TEMPERATURE).logsumexp(dim=1)
LSE_OF_COLS = (COLS @ COLS.T / TEMPERATURE).logsumexp(dim=1)
MASKS = {
    "self_index": _integers(-1, 70, 20, seed=3),
    "row_label": _integers(0, 4, 20, seed=4),
    "col_label": _integers(0, 4, 70, seed=5),
    "drop": True,
}

#: Every argument of every kernel function, the optional ones too. Of the tensors, float ones that are named in OPERANDS
#: are given in the dtype under test.
ARGUMENTS = {
    "token_gather": {"x": _draw(2, 6, 24), "keep": KEEP},
    "token_gather_backward": {"grad": _draw(2, 3, 24), "keep": KEEP, "num_tokens": 6},
    "token_scatter": {
        "latents": _draw(2, 4, 24),
        "keep": KEEP,
        "mask_token": _draw(24, seed=1),
        "num_tokens": 6,
        "pos": _draw(7, 24, seed=2),
        "num_prefix": 1,
    },
    "token_scatter_backward": {
        "grad": _draw(2, 7, 24),
        "keep": KEEP,
        "num_prefix": 1,
        "want_latents": True,
        "want_mask_token": True,
        "want_pos": True,
    },
    "patch_embed_gather": {
        "images": _draw(2, 3, 8, 12),
        "keep": KEEP,
        "weight": _draw(20, 3, 4, 4, seed=1) / 7,
        "bias": _draw(20, seed=2),
        "pos": _draw(6, 20, seed=3),
        "prefix": _draw(1, 20, seed=4),
    },
    "patch_embed_gather_backward": {
        "grad": _draw(2, 4, 20),
        "images": _draw(2, 3, 8, 12, seed=1),
        "keep": KEEP,
        "weight": _draw(20, 3, 4, 4, seed=2) / 7,
        "num_prefix": 1,
        "want_images": True,
        "want_weight": True,
        "want_pos": True,
    },
    "masked_patch_mse": {
        "pred": _draw(2, 6, 48),
        "images": _draw(2, 3, 8, 12, seed=1),
        "mask": _draw(2, 6, seed=2) > 0,
        "norm_pix": True,
    },
    "masked_patch_mse_backward": {
        "scale": torch.tensor([0.7, -0.3]),
        "pred": _draw(2, 6, 48),
        "images": _draw(2, 3, 8, 12, seed=1),
        "mask": _draw(2, 6, seed=2) > 0,
        "norm_pix": True,
    },
    "lse": {"rows": ROWS, "cols": COLS, "temperature": TEMPERATURE, **MASKS, "with_mean": True},
    "lse_backward": {
        "grad": _draw(20, seed=6),
        "lse": LSE,
        "pull": _draw(20, seed=7),
        "mean": torch.empty(0),
        "rows": ROWS,
        "cols": COLS,
        "temperature": TEMPERATURE,
        **MASKS,
        "want_rows": True,
        "want_cols": True,
    },
    "lse_backward_symmetric": {
        "rows": COLS[8:28],
        "cols": COLS,
        "grad_rows": _draw(70, seed=6)[8:28],
        "lse_rows": LSE_OF_COLS[8:28],
        "pull_rows": _draw(70, seed=7)[8:28],
        "grad_cols": _draw(70, seed=6),
        "lse_cols": LSE_OF_COLS,
        "pull_cols": _draw(70, seed=7),
        "temperature": TEMPERATURE,
        "self_rows": torch.arange(8, 28),
        "self_cols": torch.arange(70),
        "row_label": MASKS["col_label"][8:28],
        "col_label": MASKS["col_label"],
        "drop": True,
        "first": 8,
    },
    "posterior": {
        "t": ROWS,
        "c": COLS,
        "temperature": TEMPERATURE,
        "log_prior": _draw(70, seed=6).log_softmax(dim=0),
        "want_marginal": True,
    },
    "posterior_backward": {
        "t": ROWS,
        "c": COLS,
        "temperature": TEMPERATURE,
        "lse": LSE,
        "r": _draw(20, seed=6),
        "h": _draw(20, seed=7) / 10,
        "a": _draw(20, 24, seed=8),
        "v": _draw(20, 24, seed=9),
        "e": _draw(20, seed=10),
        "u": _draw(70, seed=11),
        "w": _draw(70, seed=12),
        "want_t": True,
        "want_c": True,
    },
}

#: Given in the dtype under test.
OPERANDS = {"x", "latents", "weight", "images", "pred", "rows", "cols", "t", "c"}
#: Float32, and rounded to the dtype under test, as a kernel may round them. The gradient of tokens is given in it.
ROUNDED = {"a", "v"}

#: Optional tensor -> the tensor that changes nothing.
NEUTRAL: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("pos", "bias", "log_prior", "r", "h", "a", "v", "e", "u", "w"), torch.zeros_like),
    **dict.fromkeys(("pull", "pull_rows", "pull_cols"), torch.zeros_like),
    **dict.fromkeys(("self_index", "self_rows", "self_cols"), lambda x: torch.full_like(x, -1)),
    "row_label": lambda x: torch.full_like(x, -1),
    "col_label": lambda x: torch.full_like(x, -2),
    "prefix": lambda x: x[:0],
}


def optional_tensors(function: Callable) -> list[str]:
    """The parameters that may be None."""
    kinds = {k: str(v) for k, v in getattr(function, "__annotations__", {}).items() if k != "return"}
    if not kinds:
        signature = re.search(r"\((.*)\) ->", function.__doc__.splitlines()[0])[1]
        kinds = dict(re.findall(r"(\w+): (.*?)(?=, \w+: |$)", signature))
    return [name for name, kind in kinds.items() if "None" in kind or "Optional" in kind]


def absences(function: Callable) -> list[list[str]]:
    """The tensors to leave out of a call: none, each on its own, and all at once."""
    optional = optional_tensors(function)
    return [[], *([name] for name in optional), *([optional] if len(optional) > 1 else [])]


def extremes(function: Callable) -> list[list[str]]:
    """Of `absences` the first and the last: with everything given, and without all that may be absent."""
    every = absences(function)
    return every if len(every) == 1 else [every[0], every[-1]]


def check(function: Callable, name: str, absent: list[str], device: str, dtype: torch.dtype) -> None:
    """The function's answer without some tensors against that of plain torch in float64 with neutral ones."""

    def given(key: str, value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        tokens = key == "grad" and not name.startswith("lse")
        return value.to(dtype) if key in OPERANDS or tokens else value.to(dtype).float() if key in ROUNDED else value

    whole = {key: given(key, value) for key, value in ARGUMENTS[name].items()}
    neutral = whole | {key: NEUTRAL[key](whole[key]) for key in absent}
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in neutral.items()}
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in (whole | dict.fromkeys(absent)).items()}
    plain = getattr(chunked, name)
    found = function(**moved), plain(**neutral), plain(**wide)
    answers, references, truths = (x if isinstance(x, tuple) else (x,) for x in found)
    softmax = "temperature" in whole
    for number, (answer, reference, truth) in enumerate(zip(answers, references, truths, strict=True)):
        if name == "lse" and number > 1 and not {"row_label", "col_label"}.isdisjoint(absent):
            assert answer.numel() == 0, "positives without labels"
            continue
        what = f"{name} without {', '.join(absent) or 'nothing'}: answer {number}"
        logits = 1 / TEMPERATURE if softmax else 0.0
        assert_close(what, answer.cpu(), reference, truth, dtype, logits, max(logits, 1.0))

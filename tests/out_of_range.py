"""What the kernel functions make of indices out of range: they name no token, column or patch, whatever the backend.

The public ops refuse such indices where they can look at them without waiting; a GPU's kernels cannot.
"""

import torch
from optional_tensors import ARGUMENTS
from torch import Tensor

#: Beyond the tokens, beyond 32 bits, and such that their low 32 bits are a token.
FAR = (-1, 6, 100, -(2**31), 2**31 - 1, 2**40, 2**32 + 3, -(2**63) + 2)
KEEP = torch.tensor([[3, 0, 5], [1, 1, 2]])


def answers(function, name: str, keep: Tensor, device: str) -> list[Tensor]:
    given = ARGUMENTS[name] | {"keep": keep}
    if "grad" in given and name.startswith("patch_embed"):
        given["want_images"] = given["want_weight"] = given["want_pos"] = True
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    found = function(**moved)
    return [x.cpu() for x in (found if isinstance(found, tuple) else (found,))]


def check_gather(function, name: str, device: str = "cpu") -> None:
    """The place of an index out of range is zeros; all else is as if it were not there."""
    for far in FAR:
        keep = KEEP.clone()
        keep[1, 1] = far
        found = answers(function, name, keep, device)
        if name in ("token_gather", "patch_embed_gather"):
            first = found[0].shape[1] - keep.shape[1]
            assert not found[0][1, first + 1].any(), f"{name}: {far} gives something"
            expected = answers(function, name, KEEP, device)[0]
            expected[1, first + 1] = 0
            assert torch.equal(found[0], expected), f"{name}: {far} changes another row"
            continue
        # Gradients: those of the same call, but for nothing that comes in by the place.
        given = dict(ARGUMENTS[name])
        if name == "token_scatter":
            # 1 is named by the first place alone: the one before it has the token now.
            latents = given["latents"].clone()
            latents[1, 1 + 1] = latents[1, 1 + 0]
            expected = function(**{k: v.to(device) if isinstance(v, Tensor) else v
                                   for k, v in (given | {"latents": latents, "keep": KEEP}).items()})  # fmt: skip
            assert torch.equal(found[0], expected.cpu()), f"{name}: {far} puts a token somewhere"
            continue
        assert all(x.isfinite().all() for x in found), f"{name}: {far}"
        if name == "token_scatter_backward":
            assert not found[0][1, 1 + 1].any() and found[0][1, 1].any(), f"{name}: {far} takes a gradient"
            everywhere = answers(function, name, KEEP, device)
            assert torch.equal(found[1], everywhere[1]) and torch.equal(found[2], everywhere[2])
            continue
        # A gradient of zero in its place, which is as good as nothing.
        grad = given["grad"].clone()
        grad[1, grad.shape[1] - 3 + 1] = 0
        expected = function(**{k: v.to(device) if isinstance(v, Tensor) else v
                               for k, v in (given | {"grad": grad, "keep": KEEP}).items()})  # fmt: skip
        for x, y in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
            torch.testing.assert_close(x, y.cpu(), msg=f"{name}: {far} gives a gradient")


#: The functions that take `keep`.
GATHERS = [name for name, arguments in ARGUMENTS.items() if "keep" in arguments]


def check_columns(lse, device: str = "cpu") -> None:
    """A row whose own column is out of range sees all columns, and all of its label are its positives."""
    given = ARGUMENTS["lse"] | {"drop": False}
    for far in (-1, 70, 2**31 - 1, -(2**31), 2**32 + 3):
        calls = ({"self_index": torch.full((20,), far)}, {"self_index": None})
        found, expected = (
            lse(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in (given | call).items()})
            for call in calls
        )
        assert all(map(torch.equal, found, expected)), f"a column {far} is left out"

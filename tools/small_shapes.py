"""Runs every op, forward and backward, on small ragged shapes: for compute-sanitizer to look over.

    compute-sanitizer --tool memcheck python3 tools/small_shapes.py cuda triton
    python3 tools/small_shapes.py chunked --device cpu
    TRITON_INTERPRET=1 python3 tools/small_shapes.py triton --device cpu
    python3 tools/small_shapes.py cuda --device cpu --emulate

Answers are compared with the reference's on the CPU, coarsely: the tests do it well. A line for each op, as soon as it
is done. Exits 1 where an answer differs or an op fails.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ssl_ib import ops  # noqa: E402
from ssl_ib.ops import backend as backends  # noqa: E402
from ssl_ib.ops import crossover, extension  # noqa: E402
from ssl_ib.ops.views import Parameters, Steps  # noqa: E402


def problems(device: str, dtype: torch.dtype) -> dict:
    """Name -> (function, leaves), the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1).to(device, dtype)

    keep = torch.rand(3, 15, generator=generator).argsort(dim=1)[:, :7].to(device)
    mask = (torch.rand(6, 15, generator=generator) < 0.6).to(device)
    images = draw(3, 3, 12, 20)
    pictures = torch.randint(0, 256, (3, 3, 12, 20), generator=generator).to(torch.uint8).to(device)
    drawn = Parameters(
        torch.tensor([[0, 0, 12, 20], [3, 5, 8, 9], [11, 0, 1, 20]]),
        torch.tensor([True, False, True]),
        torch.tensor([[1.3, 0.7, 1.2, 0.1], [1.0, 1.0, 1.0, 0.0], [0.6, 1.4, 0.5, -0.2]]),
        torch.tensor([[1, 3, 0, 2], [0, 1, 2, 3], [3, 2, 1, 0]]),
        torch.tensor([False, True, False]),
        torch.tensor([0.0, 0.8, 1.7]),
        torch.tensor([True, False, False]),
    )
    view = Steps(37, ("jitter", "grey", "blur", "solarise"), "bicubic", 2)
    labels, itself = torch.arange(70, device=device) // 2, torch.arange(70, device=device)
    return {
        "token_gather": (lambda x: ops.token_gather(x, keep), [draw(3, 15, 37)]),
        "token_scatter": (
            lambda x, m, p: ops.token_scatter(x, keep, m, 15, p, 1),
            [draw(3, 8, 37), draw(37), draw(16, 37)],
        ),
        "patch_embed_gather": (
            lambda w, b, p: ops.patch_embed_gather(images, keep, w, b, p),
            [draw(37, 3, 4, 4), draw(37), draw(15, 37)],
        ),
        "masked_patch_mse": (lambda x: ops.masked_patch_mse(x, images, mask, True), [draw(6, 15, 48)]),
        "nt_xent": (lambda z: ops.info_nce(z, None, labels, None, 0.1, itself), [unit(70, 40)]),
        "info_nce": (lambda q, k: ops.info_nce(q, k, labels, labels, 0.1), [unit(70, 40), unit(70, 40)]),
        "drop_group": (
            lambda z: ops.info_nce_parts(z, None, labels, None, 0.1, itself, drop_group=True),
            [unit(70, 40)],
        ),
        "gmm_lse": (lambda x, c: ops.gmm_lse(x, c, 0.1), [unit(33, 40), unit(150, 40)]),
        "gmm_posterior": (lambda t, c: ops.gmm_posterior(t, c, 0.1), [unit(33, 40), unit(150, 40)]),
        # What a student-teacher loss uses of them: no term of the gradient but the mean's values.
        "mean_alone": (lambda t, c: ops.gmm_posterior(t, c, 0.1, detach_p=True)[0], [unit(33, 40), unit(150, 40)]),
        "cross_entropy_alone": (
            lambda s, t, c: ops.gmm_assign(s, t, c, 0.1, 0.04, detach_p=True)[0],
            [unit(33, 40), unit(33, 40), unit(150, 40)],
        ),
        "augment": (lambda: ops.augment(pictures, view, drawn, dtype=dtype), []),
        "wide": (lambda x, c: ops.gmm_lse(x, c, 0.1), [unit(17, 300), unit(70, 300)]),
    }


def answer(function, leaves: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    """The sum of squares of the outputs, and its gradients; on the CPU."""
    inputs = [x.clone().requires_grad_() for x in leaves]
    with ops.use_backend(backend):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum(x.float().square().sum() for x in outputs)
        gradients = torch.autograd.grad(total, inputs, materialize_grads=True) if inputs else ()
        return [x.detach().cpu().float() for x in (total, *gradients)]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("backends", nargs="+", choices=ops.BACKENDS)
    p.add_argument("--device", default="cuda")
    p.add_argument("--emulate", action="store_true", help="run csrc's kernels on CPU tensors")
    options = p.parse_args()
    if options.emulate:
        module = extension.load_emulated()
        extension.load = lambda: module
        backends.why_not = lambda backend, device, dtype=None: None
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        # The reference stays on the CPU: a sanitizer then sees our kernels, and few others.
        expected = {name: answer(*problem, "reference") for name, problem in problems("cpu", dtype).items()}
        for name, problem in problems(options.device, dtype).items():
            for backend in options.backends:
                if (name, backend) in crossover.INSTEAD:
                    continue
                line = f"{name} {str(dtype).removeprefix('torch.')} {backend}"
                try:
                    pairs = list(zip(answer(*problem, backend), expected[name], strict=True))
                except Exception as error:
                    traceback.print_exc(limit=-4)
                    off, allowed = f"failed: {error}", None
                else:
                    # A gradient that is nothing but zeros has to be one here too.
                    off = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)
                    allowed = 1e-4 if dtype == torch.float32 else 5e-2
                if allowed is None or not off < allowed:
                    wrong += 1
                    print(f"{line}: wrong, {off}", flush=True)
                else:
                    print(f"{line}: off by {off:.2g}", flush=True)
    print("wrong:", wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

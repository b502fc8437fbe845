"""What `auto` picks: for every kernel, the backends in order of preference and the size from which the first ones pay.

CPU: measured by `tools/crossover.py` on the machine and date that docs/kernels.md states under "Measured".
GPU: not measured. The order is a prediction from the work each kernel does. On a GPU `tools/gpu_check.sh` prints for
every shape what `auto` took and which backend was the fastest.

The size is counted in numbers: of the output for gather and scatter, of the prediction for the reconstruction error,
of the logits (rows x columns) for the softmax ops.
"""

from __future__ import annotations

#: Sizes from which "chunked" beats "reference" on a CPU, forward and backward together.
CPU = {
    "token_gather": 786_432,
    "token_scatter": 98_304,
    "patch_embed_gather": 786_432,
    "masked_patch_mse": 49_152,
    "lse": 262_144,
    "posterior": 524_288,
}

#: Not measured. Predicted: moving bytes needs no scheduling of tensor cores, where hand-written CUDA is at its best.
#: The products need it, and Triton's tiles are larger than csrc's, with more stages of copies under way.
GPU = {
    "token_gather": ("cuda", "triton", "chunked"),
    "token_scatter": ("cuda", "triton", "chunked"),
    "masked_patch_mse": ("triton", "chunked"),
    "patch_embed_gather": ("triton", "chunked"),
    "lse": ("triton", "cuda", "chunked"),
    "posterior": ("triton", "cuda", "chunked"),
    "augment": ("triton", "reference"),
}

#: What runs in place of a backend that has no such function.
INSTEAD = {
    ("augment", "chunked"): "reference",
    ("augment", "cuda"): "triton",
    ("patch_embed_gather", "cuda"): "triton",
    ("masked_patch_mse", "cuda"): "triton",
}

#: The kernel behind an op, where it is not the op's own.
KERNELS = {"info_nce": "lse", "gmm_lse": "lse", "gmm_posterior": "posterior", "gmm_assign": "posterior"}


def order(op: str, device: str, work: int | None) -> tuple[str, ...]:
    """Backends of an op or kernel in order of preference; work: its size, None for a large one."""
    kernel = KERNELS.get(op, op)
    if device == "cuda":
        return GPU[kernel]
    if kernel not in CPU:
        return ("reference",)
    return ("chunked",) if work is None or work >= CPU[kernel] else ("reference",)

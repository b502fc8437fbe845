"""What `auto` picks: for every kernel, the backends in order of preference and the size from which the first ones pay.

CPU: measured with `tools/crossover.py` (the machine and date stand in docs/kernels.md). GPU: predicted from the
work each kernel does and not yet measured; `tools/gpu_check.sh` measures it and says where the prediction is wrong.

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

#: Moving bytes needs no tensor-core scheduling, where hand-written CUDA is at its best; the products do, and Triton's
#: run on Hopper's wgmma while csrc's run on mma.sync.
GPU = {
    "token_gather": ("cuda", "triton", "chunked"),
    "token_scatter": ("cuda", "triton", "chunked"),
    "masked_patch_mse": ("cuda", "triton", "chunked"),
    "patch_embed_gather": ("triton", "cuda", "chunked"),
    "lse": ("triton", "cuda", "chunked"),
    "posterior": ("triton", "cuda", "chunked"),
    "augment": ("triton", "reference"),
}

#: What runs in place of a backend that has no such function.
INSTEAD = {("augment", "chunked"): "reference", ("augment", "cuda"): "triton"}


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

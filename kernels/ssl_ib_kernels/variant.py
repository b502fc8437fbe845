"""What a Triton kernel is compiled for, and launches that can be listed instead of made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: A launch's pointers in Triton's spelling.
SPELLINGS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, as a launch would make it.

    name:      the kernel's name and what sets this variant apart ("lse_forward bf16 d=256").
    kernel:    the @triton.jit function.
    signature: type of every argument that is no constant, in Triton's spelling ("*bf16", "i32", "fp32").
    constants: the tl.constexpr arguments, and the arguments that are None.
    divisible: the arguments that a launch finds divisible by 16 (aligned pointers, strides).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible: frozenset[str] = field(default_factory=frozenset)


_recording: ContextVar[tuple[int, list[Variant]] | None] = ContextVar("recording", default=None)


@contextmanager
def recording(capability: int) -> Iterator[list[Variant]]:
    """Within, `launch` makes no launch but lists, each once, what it would compile for that compute capability.

    So a module lists its variants by calling its own functions with tensors on the "meta" device: what is checked
    ahead of time is what runs.
    """
    variants: list[Variant] = []
    token = _recording.set((capability, variants))
    try:
        yield variants
    finally:
        _recording.reset(token)


def capability_of(device: torch.device) -> int:
    """Compute capability as one number (90 for 9.0): of the device, or the recorded one; 90 in the interpreter."""
    recorded = _recording.get()
    if recorded is not None:
        return recorded[0]
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Runs `kernel` with its arguments, given by name, on the device of the tensors among them.

    Integers among the arguments must be constants or exempt from specialisation: what is compiled then depends on
    types, constants and the pointers' alignment alone.
    """
    recorded = _recording.get()
    if recorded is not None:
        variant = _variant(kernel, num_warps, num_stages, arguments)
        if variant not in recorded[1]:
            recorded[1].append(variant)
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def _variant(kernel: Any, num_warps: int, num_stages: int, arguments: dict[str, Any]) -> Variant:
    signature, constants, divisible = {}, {}, set()
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = SPELLINGS[value.dtype]
            divisible.add(parameter.name)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            assert parameter.do_not_specialize, f"{parameter.name} is specialised: variants depend on its value"
            signature[parameter.name] = "i32"
    types = list(dict.fromkeys(spelling.removeprefix("*") for spelling in signature.values() if "*" in spelling))
    absent = [name.removesuffix("_pointer") for name, value in constants.items() if value is None]
    name = f"{kernel.fn.__name__} {' '.join(types)} " + " ".join(
        f"{k}={v}" for k, v in constants.items() if v is not None
    )
    name += f" without {' '.join(absent)}" if absent else ""
    return Variant(name, kernel, signature, constants, num_warps, num_stages, frozenset(divisible))

"""How many floating-point operations a step needs, and how many a GPU could do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

#: Dense bfloat16 products a second at most, by what torch calls the GPU; from NVIDIA's data sheets, without sparsity.
PEAK_BF16 = {
    "A100": 312e12,
    "A10G": 70e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}


def peak(device: torch.device, precision: str) -> float | None:
    """Floating-point operations a second of which `device` is capable at most; None where that is not known.

    precision: of the run; "bf16" alone is known.
    """
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    known = [model for model in PEAK_BF16 if set(model.split()) <= set(name.replace("-", " ").split())]
    return PEAK_BF16[max(known, key=len)] if known else None


#: The operations of the backward pass of an operator that is more than one product, as a function of its arguments, by
#: the operator (an OpOverloadPacket); `ssl_ib.ops` puts its own there.
BACKWARD: dict[Any, Callable[..., float]] = {}


class FlopCount(TorchDispatchMode):
    """Counts, while it is entered, the operations of products, convolutions and attention, two a multiply-add.

    total: of the forward pass, and of the backward pass that would follow it: as many again for each of a product's
           two operands that needs a gradient. What is computed without gradient, as a teacher is, counts once.
           Recomputing is not counted: this is what the model needs, not what a kernel does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0
        self._backwards = _Backwards(self)

    def __enter__(self) -> FlopCount:
        self._backwards.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._backwards.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            needed = 0
            if torch.is_grad_enabled() and func.overloadpacket not in BACKWARD:
                needed = sum(x.requires_grad for x in args if isinstance(x, Tensor) and x.ndim > 1)
            self.total += formula(*args, **kwargs, out_val=answer) * (1 + min(needed, 2))
        return answer


class _Backwards(TorchFunctionMode):
    """Adds the backward passes of BACKWARD, in the only place where it is known whether there will be one: an operator
    with a gradient of its own runs without autograd further inside."""

    def __init__(self, count: FlopCount):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = BACKWARD.get(getattr(func, "overloadpacket", None))
        if formula is not None and torch.is_grad_enabled():
            self.count.total += formula(*args, **kwargs)
        return func(*args, **kwargs)

"""What InfoNCE takes on a GPU, seen without one: bytes and calls, at full size, with Triton's kernels not launched.

Triton's backend runs on CPU tensors with its launches left out: every tensor is made as on a GPU, and no product is
computed. Torch's profiler counts the bytes of all tensors, also those inside torch's own functions.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_ib import ops
from ssl_ib.ops import backend, contrastive
from ssl_ib.ops.chunked import gather

pytest.importorskip("triton")
from ssl_ib_kernels import softmax, variant

#: The promise of docs/kernels.md, for N=32,768 and d=256 in bfloat16.
MOST_BYTES = 64e6
#: Calls of torch that a GPU would launch kernels for, and launches of Triton's kernels; forward and backward together.
MOST_CALLS, MOST_LAUNCHES = 20, 7


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels that would have been launched."""
    names = []
    monkeypatch.setattr(backend, "why_not", lambda *_: None)
    # Pieces are a GPU's.
    monkeypatch.setattr(gather, "CPU_PIECE", gather.GPU_PIECE)
    # Looked at on a CPU alone.
    monkeypatch.setattr(contrastive, "check_range", lambda *_: None)

    def launch(kernel, *rest, **arguments):
        names.append(kernel.fn.__name__)
        return original(kernel, *rest, **arguments)

    original = softmax.launch
    monkeypatch.setattr(softmax, "launch", launch)
    with variant.recording(90), ops.use_backend("triton"):
        yield names


def one_way(rows: int, cols: int):
    labels = torch.arange(rows) % cols, torch.arange(cols)
    return lambda x, y: ops.info_nce(x, y, *labels, 0.1), (rows, cols)


def nt_xent(rows: int, cols: None):
    labels, itself = torch.arange(rows) % (rows // 2), torch.arange(rows)
    return lambda z: ops.info_nce(z, None, labels, None, 0.1, itself), (rows,)


def queue(rows: int, cols: int):
    negatives = torch.zeros(cols, 256, dtype=torch.bfloat16)
    return lambda x, own: ops.info_nce(x, negatives, None, None, 0.1, own=own), (rows, rows)


CASES = {
    "one way": (one_way, 32768, 32768),
    "one way, few columns": (one_way, 32768, 2048),
    "one way, N=16384": (one_way, 16384, 16384),
    "one way, N=8192": (one_way, 8192, 8192),
    "NT-Xent": (nt_xent, 32768, None),
    "NT-Xent, N=8192": (nt_xent, 8192, None),
    "queue": (queue, 1024, 65536),
}


def leaves_of(sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(n, 256, dtype=torch.bfloat16, requires_grad=True) for n in sizes]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_extra_memory_keeps_the_promise(launches, case):
    """At the peak, beyond inputs, answers and returned gradients."""
    make, rows, cols = case
    loss, sizes = make(rows, cols)
    leaves = leaves_of(sizes)
    grad = torch.full((rows,), 1 / rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        answer = loss(*leaves)
        gradients = torch.autograd.grad(answer, leaves, grad)
    assert launches
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    returned = sum(x.numel() * x.element_size() for x in (answer, *gradients))
    assert peak >= returned, "the profiler saw no memory"
    assert peak - returned <= MOST_BYTES


class Calls(TorchDispatchMode):
    """Counts the calls of torch that do work on a GPU: not those that make views or empty tensors. Our own operators
    are looked into.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ssl_ib":
            with self:
                return torch._library.custom_ops.OPDEFS[f"ssl_ib::{function._opname}"]._init_fn(*args, **(kwargs or {}))
        name = function._opname
        idle = function.is_view or name in ("detach", "alias", "_unsafe_view", "promote_types")
        if not idle and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_few_calls_lie_beside_the_kernels(launches, case):
    make, rows, cols = case
    rows, cols = rows // 128, cols and cols // 128
    loss, sizes = make(rows, cols)
    leaves = leaves_of(sizes)
    grad = torch.full((rows,), 1 / rows)
    with Calls() as calls:
        torch.autograd.grad(loss(*leaves), leaves, grad)
    assert 0 < len(launches) <= MOST_LAUNCHES and 0 < len(calls.names) <= MOST_CALLS, (launches, calls.names)

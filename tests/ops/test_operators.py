"""The ops as torch operators: registration, compilation, autocast, and which backend they choose."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_ib import UserError, ops
from ssl_ib.ops import backend, crossover, gather_operators, mixture_operators, products, softmax_operators


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return draw(*shape, seed=seed).requires_grad_()


KEEP = torch.tensor([[0, 3], [2, 1]])
LABELS = torch.arange(6) // 2
OPERATORS = {
    "token_gather": (gather_operators.token_gather, lambda: (leaf(2, 4, 3), KEEP)),
    "token_scatter": (gather_operators.token_scatter, lambda: (leaf(2, 3, 4), KEEP, leaf(4), 4, leaf(5, 4), 1)),
    "token_scatter_bare": (gather_operators.token_scatter, lambda: (leaf(2, 2, 4), KEEP, draw(4), 4, None, 0)),
    "patch_embed_gather": (
        gather_operators.patch_embed_gather,
        lambda: (leaf(2, 3, 4, 4), KEEP, leaf(5, 3, 2, 2), leaf(5), leaf(4, 5), leaf(1, 5)),
    ),
    "patch_embed_gather_bare": (
        gather_operators.patch_embed_gather,
        lambda: (draw(2, 3, 4, 4), KEEP, leaf(5, 3, 2, 2), None, draw(4, 5), None),
    ),
    "masked_patch_mse": (
        gather_operators.masked_patch_mse,
        lambda: (leaf(4, 4, 12), draw(2, 3, 4, 4), draw(4, 4) > 0, True),
    ),
    "lse_symmetric": (
        softmax_operators.lse,
        lambda: (leaf(6, 3), None, 0.5, torch.arange(6), LABELS, None, False, False),
    ),
    "lse": (softmax_operators.lse, lambda: (leaf(6, 3), leaf(5, 3), 0.5, None, LABELS, LABELS[:5], True, True)),
    "lse_bare": (softmax_operators.lse, lambda: (leaf(6, 3), leaf(5, 3), 0.5, None, None, None, False, True)),
    "posterior": (mixture_operators.posterior, lambda: (leaf(6, 3), leaf(5, 3), 0.5, draw(5), False, True)),
    "crops": (
        mixture_operators.crops,
        lambda: (leaf(6, 3), leaf(4, 3), leaf(5, 3), 0.5, 0.2, draw(5), False, True, True),
    ),
    "crops_teacher_constant": (
        mixture_operators.crops,
        lambda: (leaf(6, 3), draw(4, 3), leaf(5, 3), 0.5, 0.2, None, True, False, True),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator, arguments = OPERATORS[name]
    torch.library.opcheck(operator, (*arguments(), "chunked"))


def test_opcheck_of_the_operators_without_a_backend():
    torch.library.opcheck(softmax_operators.own_logits, (leaf(6, 3), leaf(6, 3), 0.5))
    rows, lse = draw(6, 3), draw(6)
    strip = (
        rows[:2],
        rows,
        *(lse[:2], lse[:2], lse[:2], lse, lse, lse),
        0.5,
        torch.arange(2),
        torch.arange(6),
        LABELS[:2],
        LABELS,
        False,
        0,
        "chunked",
    )
    torch.library.opcheck(softmax_operators.lse_strip_backward, strip)


def everything(images, keep, weight, tokens):
    """Every op once: a scalar. images [B, 3, 4, 4], keep [B, 2], weight [12, 3, 2, 2], tokens [B, 5, 12]."""
    embedded = ops.patch_embed_gather(images, keep, weight, weight.sum((1, 2, 3)), tokens[0, :4])
    full = ops.token_scatter(ops.token_gather(embedded, keep[:, :1] % 2), keep[:, :1], tokens[0, 4], 4, tokens[0, :4])
    masked, unmasked = ops.masked_patch_mse(full, images, images[:, 0, 0] > 0)
    z = F.normalize(tokens.flatten(0, 1), dim=1)
    everyone = torch.arange(len(z))
    nce = ops.info_nce(z, None, everyone // 2, None, 0.5, everyone)
    one_way = ops.info_nce(z, z.flip(0), everyone // 2, everyone // 3, 0.5, own=z.roll(1, 0))
    cross_entropy, entropy = ops.gmm_assign(z, z.flip(0), z[:5], 0.3, 0.2)
    return masked + unmasked + nce.mean() + one_way.mean() + cross_entropy.mean() + entropy.mean()


@pytest.mark.parametrize("name", ["reference", "chunked", "auto"])
def test_one_compiled_graph_for_any_batch(name):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with ops.use_backend(name), ops.record() as ran:
        compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
        for batch in (2, 3, 5):
            leaves = [leaf(batch, 3, 4, 4), leaf(12, 3, 2, 2, seed=1), leaf(batch, 5, 12, seed=2)]
            keep = draw(batch, 4).argsort(dim=1)[:, :2]
            mine, expected = (
                torch.autograd.grad(f(leaves[0], keep, *leaves[1:]), leaves) for f in (compiled, everything)
            )
            for a, b in zip(mine, expected, strict=True):
                torch.testing.assert_close(a, b)
        # The second batch size made the graph general.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    if name != "reference":
        assert {"lse", "lse_backward", "posterior_backward", "token_scatter_backward"} <= {f for f, _ in ran}


def test_autocast_embeds_patches_in_its_dtype_and_rounds_no_logits():
    images, weight, bias, pos = draw(2, 3, 4, 4), draw(5, 3, 2, 2), draw(5), draw(4, 5)
    rows, c = F.normalize(draw(6, 16), dim=1), F.normalize(draw(9, 16, seed=1), dim=1)
    for name in ("reference", "chunked"):
        with ops.use_backend(name):
            exact = ops.info_nce(rows, None, LABELS, None, 0.04), ops.gmm_lse(rows, c, 0.04)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                embedded = ops.patch_embed_gather(images, KEEP, weight, bias, pos)
                rounded = ops.info_nce(rows, None, LABELS, None, 0.04), ops.gmm_lse(rows, c, 0.04)
                mean = ops.gmm_posterior(rows, c, 0.04)[0]
        assert embedded.dtype == torch.bfloat16 and mean.dtype == torch.float32
        for a, b in zip(exact, rounded, strict=True):
            assert torch.equal(a, b)
    with ops.use_backend("reference"):
        plain = ops.patch_embed_gather(images.double(), KEEP, weight.double(), bias.double(), pos.double())
    assert_close("embedding", embedded, embedded.float() * 0 + plain.float(), plain, torch.bfloat16)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_under_autocast_gpu_kernels_are_given_rounded_vectors(monkeypatch, name):
    """As a matrix product would be; nothing else is rounded, and float64 is left alone."""
    monkeypatch.setattr(products, "choose", lambda *_: name)
    rows, cols = draw(3, 4), draw(5, 4, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, a, b = products.operands("info_nce", rows, cols)
        _, exact, _ = products.operands("info_nce", rows.double(), None)
    assert torch.equal(a, rows.bfloat16()) and torch.equal(b, cols.bfloat16()) and exact.dtype == torch.float64
    assert products.operands("info_nce", rows, cols)[1] is rows
    mixed = products.operands("info_nce", rows.half(), cols)
    assert mixed[1].dtype == mixed[2].dtype == torch.float32


def test_the_choice_of_a_backend(monkeypatch):
    def runs() -> str:
        with ops.record() as ran:
            ops.token_gather(draw(1, 2, 3), torch.tensor([[1]]))
        return next(iter(ran))[1]

    monkeypatch.setattr(backend, "_preferred", "auto")
    monkeypatch.setitem(crossover.CPU, "token_gather", 0)
    assert runs() == "chunked"
    monkeypatch.setitem(crossover.CPU, "token_gather", 4)
    assert runs() == "reference"
    with ops.use_backend("chunked"):
        assert runs() == "chunked" == ops.wanted()
        with ops.use_backend("auto"):
            assert runs() == "reference"
        assert runs() == "chunked"
    monkeypatch.setattr(backend, "_preferred", "chunked")
    assert runs() == "chunked"


def test_auto_says_once_what_it_chose(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_preferred", "auto")
    monkeypatch.setattr(backend, "_announced", set())
    monkeypatch.setitem(crossover.CPU, "token_gather", 0)
    with caplog.at_level("INFO", logger="ssl_ib"):
        for _ in range(3):
            ops.token_gather(draw(1, 2, 3), torch.tensor([[1]]))
    assert caplog.messages == ["ops: token_gather runs on chunked"]


def test_auto_passes_over_what_cannot_run_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_preferred", "auto")
    monkeypatch.setattr(backend, "_announced", set())
    monkeypatch.setattr(crossover, "order", lambda op, device, work: ("cuda", "triton", "chunked"))
    monkeypatch.setattr(backend, "why_not", lambda name, *_: None if name == "chunked" else f"no {name} here")
    with caplog.at_level("INFO", logger="ssl_ib"), ops.record() as ran:
        ops.gmm_lse(draw(2, 3), draw(2, 3), 0.5)
    assert ran == {("lse", "chunked")}
    assert caplog.messages == ["ops: gmm_lse runs on chunked (cuda: no cuda here; triton: no triton here)"]


def test_a_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, reason in (
        ("triton", "it runs on a GPU, and the tensors are on the cpu"),
        ("cuda", "the tensors are on"),
    ):
        with ops.use_backend(name), pytest.raises(UserError, match=f"info_nce: the backend '{name}' .*{reason}"):
            ops.info_nce(draw(4, 3), None, LABELS[:4], None, 0.5)
    assert "not float64" in ops.why_not("triton", "cuda", torch.float64)
    assert ops.why_not("chunked", "cpu", torch.float64) is None


def test_unknown_backends_are_refused():
    with pytest.raises(UserError, match="unknown backend.*'warp'.*choices: auto, chunked"):
        ops.use_backend("warp")
    command = [sys.executable, "-c", "import ssl_ib.ops"]
    answer = subprocess.run(command, env=os.environ | {"SSL_IB_OPS": "refrence"}, capture_output=True, text=True)
    assert answer.returncode != 0 and "did you mean 'reference'" in answer.stderr


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_indices_out_of_range_are_named(name):
    with ops.use_backend(name), pytest.raises(UserError, match=r"keep in \[0, 4\), got numbers from 0 to 4"):
        ops.token_gather(draw(1, 4, 3), torch.tensor([[0, 4]]))


def pretend(monkeypatch, token_gather):
    """Makes a function of this name every backend's, on any device."""
    monkeypatch.setattr(backend, "why_not", lambda *_: None)
    monkeypatch.setattr(backend, "library", lambda *_: SimpleNamespace(token_gather=token_gather))


@pytest.mark.parametrize("name", ["chunked", "triton", "cuda"])
def test_tensors_on_two_devices_are_refused_whatever_the_backend(monkeypatch, name):
    def token_gather(x, keep):
        raise AssertionError("it was called")

    pretend(monkeypatch, token_gather)
    run = backend.function("token_gather", "token_gather", name, draw(1, 2, 3))
    with pytest.raises(UserError, match="token_gather: expected tensors on one device, got them on cpu, meta"):
        run(draw(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(("device", "chosen"), [("cpu", "bf16"), ("cpu", "none"), ("cuda", "tf32"), ("cuda", "none")])
def test_products_within_a_backend_are_exact_and_the_users_choice_stays(monkeypatch, device, chosen):
    products = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    seen = []

    def token_gather(x):
        seen.append(products.fp32_precision)
        raise RuntimeError("and if it fails")

    pretend(monkeypatch, token_gather)
    before = products.fp32_precision
    try:
        products.fp32_precision = chosen
        with FakeTensorMode(), pytest.raises(RuntimeError, match="and if it fails"):
            x = torch.empty(1, 2, 3, device=device)
            backend.function("token_gather", "token_gather", "chunked", x)(x)
        assert seen == ["none" if chosen == "none" else "ieee"] and products.fp32_precision == chosen
    finally:
        products.fp32_precision = before


def test_under_cuda_what_csrc_has_no_kernel_for_runs_in_triton_and_the_log_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_announced", set())
    monkeypatch.setattr(backend, "why_not", lambda *_: None)
    with caplog.at_level("INFO", logger="ssl_ib"), ops.use_backend("cuda"):
        chosen = {op: [backend.choose(op, draw(2), 1) for _ in range(2)] for op in ("masked_patch_mse", "token_gather")}
    assert chosen == {"masked_patch_mse": ["triton"] * 2, "token_gather": ["cuda"] * 2}
    assert caplog.messages == ["ops: masked_patch_mse runs on triton (cuda has no such function)"]
    monkeypatch.setattr(backend, "why_not", lambda *_: "no GPU")
    refused = r"'cuda' was asked for and cannot run: no GPU \(cuda has no such function, so triton would run\)"
    with ops.use_backend("cuda"), pytest.raises(UserError, match=refused):
        backend.choose("patch_embed_gather", draw(2), 1)

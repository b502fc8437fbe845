"""The benchmark command: every shape's contenders agree, the figures are counted right, mistakes are told."""

import json
import subprocess
import sys

import pytest
import torch

from ssl_ib import ops
from ssl_ib.bench import baselines, measure, report
from ssl_ib.bench.cases import cases
from ssl_ib.cli.bench import OPS, main

CPU = torch.device("cpu")


def answers(case, call, backend, dtype=torch.float64):
    inputs = measure._inputs(case, CPU, dtype, 0)
    with ops.use_backend(backend):
        outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = measure._upstream(outputs, CPU)
    return [*outputs, *measure._gradients(outputs, inputs[: case.leaves], upstream)]


@pytest.mark.parametrize("case", cases("quick"), ids=lambda case: f"{case.op}_{case.shape.split()[0]}")
def test_contenders_give_one_answer(case):
    expected = answers(case, case.call, "reference")
    for name, call in {"chunked": case.call, **case.others}.items():
        try:
            found = answers(case, call, "chunked")
        except baselines.Unsupported:
            continue
        for a, b in zip(found, expected, strict=True):
            # lightly answers with the mean, whose gradient is that of the others' means.
            torch.testing.assert_close(a, b if a.shape == b.shape else b.mean(), msg=lambda m, n=name: f"{n}: {m}")


def test_views_have_figures_without_gradients(capsys):
    assert main(["augment", "--quick", "--rounds", "2", "--baselines"]) == 0
    printed = capsys.readouterr().out
    assert "auto takes reference" in printed and "chunked " not in printed


def test_every_size_has_every_op():
    for size in ("quick", "cpu", "cuda"):
        assert {case.op for case in cases(size)} == set(OPS)
    assert {case.op for case in cases("goals")} <= set(OPS)


def test_a_run_prints_and_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(["gmm_lse", "token_scatter", "--quick", "--rounds", "2", "--baselines", "mae", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "ceilings measured here" in printed and "auto takes" in printed
    written = json.loads(out.read_text())
    found = {(row["op"], row["contender"]) for row in written["rows"]}
    assert found == {("gmm_lse", name) for name in ("reference", "chunked")} | {
        ("token_scatter", name) for name in ("reference", "chunked", "mae")
    }
    for row in written["rows"]:
        assert row["failure"] is None and row["repeats"] and row["error"] < 1e-5 and row["gradient_error"] < 1e-5
        assert row["total_ms"] > 0 and 0 < row["of_ceiling"]
    assert written["machine"]["torch"] == torch.__version__


#: In a process of its own, because what else a process does counts; on one thread, because libraries of matrix products
#: keep buffers for each. The least of three, because pages of libraries that the system took back count again.
MEMORY = """
import torch
from ssl_ib.bench import measure
from ssl_ib.bench.cases import cases
torch.set_num_threads(1)
case = next(case for case in cases("cpu") if case.shape.startswith("NT-Xent N=2048"))
for name in ("reference", "chunked"):
    contender = measure.Contender(name, case.call, name, torch.float32, False)
    print(min(measure.measure_memory(case, contender, torch.device("cpu")) for _ in range(3)))
"""


def test_extra_memory_is_what_a_contender_holds_beyond_what_it_returns():
    answer = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    reference, chunked = map(int, answer.stdout.split())
    logits = 2048 * 2048 * 4
    assert 2 * logits < reference < 8 * logits
    # Two tiles, and some vectors of the rows' size.
    assert chunked < 1.5 * logits + 8 * 2048 * 128 * 4


def test_what_does_not_fit_is_a_result(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    case = next(case for case in cases("quick") if case.op == "gmm_lse")
    contenders = [
        measure.Contender("reference", case.call, "reference", torch.float32, True),
        measure.Contender("chunked", case.call, "chunked", torch.float32, False),
    ]
    reference, chunked = measure.measure(case, contenders, CPU, 2)
    assert reference.failure == "out of memory (needs 0 GiB)" and not reference.forward
    assert chunked.failure is None and len(chunked.total) == 2
    rates = {"copy": 1e9, "float32": 1e9}
    table = report.rows(
        case, [reference, chunked], rates, dict.fromkeys(("reference", "chunked"), "float32"), "chunked"
    )
    assert (
        any("out of memory" in line for line in report.lines(table)) and report.verdict(table) == "auto takes chunked"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info_nse"], "unknown op 'info_nse'; did you mean 'info_nce'"),
        (["--baselines", "lightley"], "unknown baseline 'lightley'; did you mean 'lightly'"),
        (["--rounds", "0"], "--rounds: expected a number above 0"),
        (["--shapes", "N=7"], "no shape of these ops contains 'N=7'"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda"),
        (["--goals", "--device", "cpu"], "--goals: these shapes are for a GPU"),
        (["--json", "nowhere/x.json"], "--json: nowhere is no folder"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err

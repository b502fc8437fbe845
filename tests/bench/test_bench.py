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
        assert row["total_ms"] > 0 and 0 < row["of_ceiling"] and row["host_ms"] > 0 and row["alone"]
    assert "host ms" in printed
    assert written["machine"]["torch"] == torch.__version__


class FakeCuda:
    """A GPU that takes 5 ms for everything, and waits as long as it is told to: a clock cycle is a microsecond."""

    def __init__(self, monkeypatch, host: float):
        self.now, self.free, self.calls, self.host = 0.0, 0.0, [], host
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure.torch, "cuda", self)

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = max(gpu.free, gpu.now)

            def query(self):
                return gpu.now >= self.at

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        return Event()

    def synchronize(self):
        self.now = max(self.now, self.free)

    def _sleep(self, cycles):
        self.calls.append("wait")
        self.free = max(self.free, self.now) + cycles * 1e-6

    def work(self):
        """What is timed: the host takes its time, then the GPU has 5 ms to do."""
        self.calls.append("work")
        self.now += self.host
        self.free = max(self.free, self.now) + 5e-3
        return "answer"


def timer_on(gpu: FakeCuda) -> measure._Timer:
    timer = measure._Timer(CPU)
    timer.cuda, timer.scratch = True, torch.zeros(3)
    timer.scratch = type("Scratch", (), {"sum": lambda self: gpu.calls.append("read")})()
    return timer


def test_a_sample_on_a_gpu_holds_no_time_of_the_hosts(monkeypatch):
    gpu = FakeCuda(monkeypatch, host=1.0)
    answer, sample = timer_on(gpu)(gpu.work)
    assert answer == "answer" and sample.seconds == pytest.approx(5e-3) and sample.host == pytest.approx(1.0)
    assert sample.alone
    # Caches are filled by reading; nothing is written between that and the sample.
    assert gpu.calls == ["read", "wait", "work"]


def test_a_sample_that_the_host_held_up_is_made_again_behind_a_longer_wait(monkeypatch):
    gpu = FakeCuda(monkeypatch, host=20.0)
    timer = timer_on(gpu)
    _, sample = timer(gpu.work)
    assert gpu.calls.count("work") == 3 and sample.alone and sample.seconds == pytest.approx(5e-3)
    assert timer.cycles == 16 * measure.SHORTEST_WAIT
    # What waits for the GPU never gets ahead of it.
    gpu = FakeCuda(monkeypatch, host=1.0)

    def waits():
        gpu.synchronize()
        return gpu.work()

    assert not timer_on(gpu)(waits, tries=2)[1].alone and gpu.calls.count("work") == 2


def test_the_posteriors_goal_is_for_four_products():
    """Two of the forward and two of the backward: none through the entropy, and none to the rows."""
    case = next(case for case in cases("quick") if case.op == "gmm_posterior")
    inputs = measure._inputs(case, CPU, torch.float32, 0)
    with ops.use_backend("chunked"), torch.profiler.profile() as profile:
        (answer,) = case.call(*inputs)[None]
        torch.autograd.grad(answer.sum(), inputs[: case.leaves])
    products = [e for e in profile.events() if e.name in ("aten::mm", "aten::addmm_")]
    tiles = len([e for e in products if e.name == "aten::mm"]) / 2
    assert len(products) == 4 * tiles and case.flops == 4 * 2 * case.work * inputs[1].shape[1]


def test_inf_cl_is_refused_where_it_cannot_run():
    with pytest.raises(baselines.Unsupported, match="runs on a GPU"):
        baselines.inf_cl(torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(64), 0.1)


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

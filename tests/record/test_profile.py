"""`--profile`: where a step's time goes, without changing the step; and how many operations a step is."""

import gzip
import json

import pytest
import torch
from harness import STEPS, rows, train

from ssl_ib import flops
from ssl_ib.flops import FlopCount
from ssl_ib.record.profile import PHASES, WARM_UP


def table(text: str) -> dict[str, list[float]]:
    """The milliseconds and shares of a table of phases."""
    lines = [line.split() for line in text.split("\n\n")[0].splitlines()[1:]]
    return {words[0]: [float(word.rstrip("%")) for word in words[1:3] if word[0].isdigit()] for words in lines[:9]}


def test_the_phases_of_a_step(tmp_path, capsys):
    assert train(tmp_path / "seen", "epochs=1", "--profile", "4") == 0
    said = capsys.readouterr().out
    assert train(tmp_path / "alone", "epochs=1") == 0
    assert [row["loss"] for row in rows(tmp_path / "seen") if "loss" in row] == [
        row["loss"] for row in rows(tmp_path / "alone") if "loss" in row
    ]
    folder = tmp_path / "seen" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps.txt", "trace.json.gz"]
    text = (folder / "steps.txt").read_text()
    assert text in said and "(4 steps)" in text and "TFLOP/s" in text
    found = table(text)
    assert list(found) == [*PHASES, "other", "step"]
    # Every millisecond belongs to one phase; each is rounded to a hundredth.
    assert sum(times[0] for name, times in found.items() if name != "step") == pytest.approx(found["step"][0], abs=0.05)
    assert found["forward"][0] > 0 and found["backward"][0] > 0
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("ssl_ib: forward") == 4 and "aten::mm" in names


def test_fewer_steps_than_asked(tmp_path, capsys):
    assert train(tmp_path / "few", "epochs=1", "--profile", "100") == 0
    assert f"({STEPS - WARM_UP} steps)" in (tmp_path / "few" / "profile" / "steps.txt").read_text()
    capsys.readouterr()
    assert train(tmp_path / "few", "epochs=1", "--resume", "--profile") == 0
    assert "there is nothing to show" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--profile", "0"], ["--profile", "--dry-run"]])
def test_refusals(tmp_path, capsys, arguments):
    assert train(tmp_path / "run", *arguments) == 2
    assert "--profile takes" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_operations_of_a_network_by_hand():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x, first, second = torch.randn(5, 8), 2 * 5 * 8 * 16, 2 * 5 * 16 * 4
    with FlopCount() as count:
        net(x)
    # The input needs no gradient, the weights and what lies between do.
    assert count.total == 2 * first + 3 * second
    with FlopCount() as count, torch.no_grad():
        net(x)
    assert count.total == first + second
    net[0].requires_grad_(False)
    with FlopCount() as count:
        net(x)
    assert count.total == first + 2 * second


def test_operations_equal_those_of_a_real_backward():
    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, stride=2))
    x = torch.randn(2, 3, 8, 8)
    with FlopCount() as count:
        conv(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as truth:
        conv(x).sum().backward()
    assert count.total == truth.get_total_flops()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA TITAN Xp", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak(torch.device("cuda"), "bf16") == expected
    assert flops.peak(torch.device("cuda"), "fp32") is None and flops.peak(torch.device("cpu"), "bf16") is None

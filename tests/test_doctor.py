"""`ssl-ib-doctor`: what it finds here, and that what would be in the way is found."""

import errno
import os
import resource
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ssl_ib import doctor
from ssl_ib.cli.doctor import main
from ssl_ib.doctor import examine


def findings(folder: Path) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in examine(folder)}


def test_this_machine(tmp_path, capsys):
    code = main([str(tmp_path / "not" / "yet")])
    said = capsys.readouterr().out
    assert code == int("!!" in said.split("marked")[0]) and not (tmp_path / "not").exists()
    assert torch.__version__ in said and f"{tmp_path} can be written to" in said and not list(tmp_path.iterdir())
    assert "ok  processes" in said and "gloo" in said


Usage = namedtuple("Usage", "total used free")


def lock_refused(code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    return flock


@pytest.mark.parametrize(
    ("what", "target", "value"),
    [
        ("shared memory", "shutil.disk_usage", lambda path: Usage(1 << 26, 0, 1 << 26)),
        ("disk", "shutil.disk_usage", lambda path: Usage(1 << 40, 0, 1 << 30)),
        ("open files", "resource.getrlimit", lambda which: (1024, 1 << 20)),
        ("memory", "ssl_ib.doctor.free_memory", lambda: 1e9),
        ("locks", "fcntl.flock", lock_refused(errno.ENOLCK)),
        ("folder", "fcntl.flock", lock_refused(errno.EACCES)),
        ("CPU cores", "torch.get_num_threads", lambda: 0),
    ],
)
def test_what_is_in_the_way(tmp_path, monkeypatch, capsys, what, target, value):
    monkeypatch.setattr(target, value)
    found = findings(tmp_path)[what]
    assert found.status == "problem" and found.advice and found.lines().startswith("!!")
    assert main([str(tmp_path)]) == 1 and "in the way, marked !!" in capsys.readouterr().out


def test_limits_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert findings(tmp_path)["open files"].found == "any number"


def test_gpus(tmp_path, monkeypatch):
    properties = namedtuple("Properties", "name total_memory major minor")("NVIDIA H200", 150_000_000_000, 9, 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    # Here every operation on it fails, as on a GPU for which torch was not built.
    found = findings(tmp_path)["GPU 0"]
    assert found.status == "problem" and found.found.startswith("NVIDIA H200 (sm_90): ")
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(1))
    assert findings(tmp_path)["GPU 0"].found == "NVIDIA H200 (sm_90), 150 GB, 989 TFLOP/s in bf16"


def test_a_driver_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name, path=None: "/usr/bin/smi" if "smi" in name else None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in findings(tmp_path)["GPU"].found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "sees no GPU" in findings(tmp_path)["GPU"].found

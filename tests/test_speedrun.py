"""tools/gpu_speedrun.sh: trains for a while, says how far it is, and goes on when it is called again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools.speedrun_table import table

ROOT = Path(__file__).resolve().parents[1]


def test_time_is_that_of_the_steps(tmp_path):
    rows = [
        {"step": 0, "epoch": 0.0, "knn/top1": 0.25},
        {"step": 60, "epoch": 0.5, "images_per_s": 128.0},
        {"step": 120, "epoch": 1.0, "images_per_s": 64.0},
        {"step": 120, "epoch": 1.0, "knn/top1": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "config.yaml").write_text("batch_size: 128\nepochs: 4\n")
    lines = [line.split() for line in table(tmp_path).splitlines()]
    assert lines[1] == ["0", "0.0", "0.2500"]
    # 60 s for the first half, 120 for the second.
    assert lines[2] == ["1", "3.0", "0.5000", "96"]
    assert lines[3][-2:] == ["12", "minutes"] and "projection," in lines[3]
    (tmp_path / "config.yaml").write_text("batch_size: 128\nepochs: 1\n")
    assert "projection" not in table(tmp_path)


@pytest.mark.slow  # Three imports of torch a call: half a minute.
def test_a_run_in_two_calls(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 8)):
        for number in range(count):
            folder = tmp_path / "images" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def call(seconds: int) -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / "tools" / "gpu_speedrun.sh"), "run", "images", "batch_size=8", "epochs=60"]
        command += ["eval.every_epochs=60", "log_every=1", "model.backbone_args={stem: cifar, channels: [8, 8, 8, 8]}"]
        given = environment | {"SPEEDRUN_SECONDS": str(seconds)}
        return subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True)

    first = call(14)
    assert first.returncode == 75 and "projection" in first.stdout, first
    last = call(300)
    assert last.returncode == 0 and last.stdout.splitlines()[-1].split()[0] == "60", last

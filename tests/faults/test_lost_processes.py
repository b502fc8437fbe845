"""Several processes of one run: what happens to one of them ends all of them, and is said by one."""

import json
import shutil
import signal
import socket

import pytest
from faults.processes import SLOW
from harness import assert_same_run, checkpoint
from PIL import Image


@pytest.fixture
def begin_two(begin):
    """Starts a run in two processes, as torchrun would."""

    def start(out, *arguments, **more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        words = (*arguments, "parallel=ddp", "device=cpu", "batch_size=64")
        return [begin(out, *words, RANK=str(rank), WORLD_SIZE="2", **address, **more) for rank in range(2)]

    return start


def test_nan_in_one_process_is_said_once(tmp_path, begin_two):
    broken = ("criterion=broken", "criterion.inner=info_nce", "criterion.rank=1")
    runs = begin_two(tmp_path / "run", *broken)
    assert [run.code() for run in runs] == [2, 2]
    said = "".join(run.said() for run in runs)
    assert said.count("no longer finite at step 3: root") == 1 and "; in process 1 alone. The batch's" in said
    assert "Traceback" not in said
    assert len((tmp_path / "run" / "bad_batch.txt").read_text().splitlines()) == 64


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_in_a_line(tmp_path, begin_two, killed):
    runs = begin_two(tmp_path / "run", *SLOW, pause=0.05)
    runs[0].reach(3)
    runs[killed].send(signal.SIGKILL)
    other = 1 - killed
    assert [runs[killed].code(), runs[other].code()] == [-signal.SIGKILL, 2]
    said = runs[other].said()
    assert said.count(f"another process has ended, and process {other} cannot go on without it (") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_processes_continue_bit_for_bit(tmp_path, begin_two):
    """With prototypes, which know whether anybody has written to them."""
    small = ["model.backbone_args={patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}", "criterion.K=32"]
    small += ["epochs=1", "optim.warmup_epochs=1", "eval.linear.epochs=5", "workers=0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs = begin_two(whole, *small, recipe="svib_digits")
    assert [run.code() for run in runs] == [0, 0], runs[0].said()
    runs = begin_two(parts, *small, "checkpoint.every_steps=1", recipe="svib_digits")
    runs[0].reach(3)
    runs[0].send(signal.SIGTERM)
    assert [run.code() for run in runs] == [143, 143], runs[0].said()
    runs = begin_two(parts, *small, "--resume", recipe="svib_digits")
    assert [run.code() for run in runs] == [0, 0], runs[0].said()
    assert_same_run(whole, parts)


def test_a_process_without_images_ends_all_saved(tmp_path, begin_two):
    """They go while it trains: the process that finds that first ends both."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(1000):
        Image.new("RGB", (16, 16), (number % 256, 0, 0)).save(images / f"{number:03}.png")
    source = f"source={{name: folder, path: {images}, memory_gb: 1e-9}}"
    out, rarely = tmp_path / "run", ("eval.every_epochs=2", "checkpoint.every_epochs=2")
    runs = begin_two(out, *SLOW[:1], source, "workers=0", *rarely, pause=0.2)
    runs[0].reach(2)
    shutil.rmtree(images)
    assert [run.code() for run in runs] == [2, 2]
    said = "".join(run.said() for run in runs)
    assert said.count("source.max_unreadable: ") == 1 and "Traceback" not in said
    step = checkpoint(out)["step"]
    assert f"Saved at step {step}; continue with --resume" in said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == step >= 2

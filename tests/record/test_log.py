"""The record of a run survives a kill, a resumption and numbers that JSON does not know."""

import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_ib import UserError
from ssl_ib.record.log import RunLog


def row(step: int, **more) -> dict:
    return {"step": step, "epoch": step // 2, "loss": 1 / (step + 1), **more}


def scalars(folder, key):
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(key)]


def test_rows_come_back(tmp_path):
    log = RunLog(tmp_path)
    rows = [row(i, note="x", best=True, missing=None) for i in range(3)]
    for each in rows:
        log.write(each)
    # Readable by others while the run goes on.
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows
    assert log.rows() == rows
    log.close()
    assert log.rows() == rows
    assert scalars(tmp_path, "loss") == [(i, pytest.approx(1 / (i + 1))) for i in range(3)]


def test_only_numbers_go_to_tensorboard(tmp_path):
    log = RunLog(tmp_path)
    log.write(row(0, note="x", best=True, missing=None, lr=0.1, count=3))
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["count", "loss", "lr"]


@pytest.mark.parametrize("on_disk", [True, False])
def test_tensors_and_non_finite_numbers(tmp_path, on_disk):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    log = RunLog(tmp_path if on_disk else None)
    log.write(row(0, a=math.nan, b=math.inf, c=torch.tensor(-math.inf), d=torch.tensor(2.0)))
    if on_disk:
        json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (back,) = log.rows()
    assert math.isnan(back["a"])
    assert (back["b"], back["c"], back["d"]) == (math.inf, -math.inf, 2.0)


@pytest.mark.parametrize("on_disk", [True, False])
def test_truncate(tmp_path, on_disk):
    log = RunLog(tmp_path if on_disk else None)
    for i in range(6):
        log.write(row(i))
    log.truncate(3)
    assert log.rows() == [row(i) for i in range(4)]
    log.write(row(4, resumed=1.0))
    assert log.rows() == [row(i) for i in range(4)] + [row(4, resumed=1.0)]
    log.truncate(-1)
    assert log.rows() == []


def test_a_resumed_run_continues_exactly(tmp_path):
    first = RunLog(tmp_path)
    for i in range(6):
        first.write(row(i))
    # TensorBoard reads its files in the order of their names, which begin with the second of their making. A process
    # that resumes starts later than that, and so must the second file here.
    made = int(time.time())
    while int(time.time()) == made:
        time.sleep(0.05)
    # Killed: nothing is closed, and the last line is cut short.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epo')

    second = RunLog(tmp_path)
    second.truncate(3)
    for i in range(4, 8):
        second.write(row(i, loss=100.0 + i))
    second.close()
    assert second.rows() == [row(i) for i in range(4)] + [row(i, loss=100.0 + i) for i in range(4, 8)]
    expected = [(i, pytest.approx(1 / (i + 1))) for i in range(4)] + [(i, 100.0 + i) for i in range(4, 8)]
    assert scalars(tmp_path, "loss") == expected


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_torn_line_does_not_run_into_the_next(tmp_path, cut):
    log = RunLog(tmp_path)
    log.write(row(0))
    log.write(row(1))
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    log = RunLog(tmp_path)
    log.write(row(2))
    log.close()
    # Without the newline alone the line is whole, and is kept.
    assert log.rows() == [row(0), *([row(1)] if cut == 1 else []), row(2)]


def test_a_broken_line_in_the_middle_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "epoch": 0}\nnonsense\n{"step": 1, "epoch": 0}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2: expected a JSON object, got b'nonsense'"):
        RunLog(tmp_path)


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    log.write(row(0))
    log.rows()[0]["loss"] = 5
    assert log.rows() == [row(0)]
    log.close()
    assert list(tmp_path.iterdir()) == []


# --- copies -----------------------------------------------------------------------------------------------------------


def test_no_copies(tmp_path):
    log = RunLog(tmp_path, loggers=())
    log.write(row(0))
    log.truncate(0)
    log.close()
    assert log.rows() == [row(0)] and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Wandb:
    """A server that keeps the rows of its runs by their id, as wandb's does: it takes no row of an earlier step."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        self.rows: dict[str, dict[int, dict]] = {}
        self.asked: list[dict] = []

    def init(self, id, **more):
        kept = self.rows.setdefault(id, {})
        self.asked.append({"id": id, **more})
        run = SimpleNamespace(step=max(kept) + 1 if kept else 0, finish=lambda: None)

        def log(numbers, step):
            assert step >= run.step, "wandb ignores such a row, and warns"
            run.step = step
            kept[step] = kept.get(step, {}) | numbers

        run.log = log
        return run


def test_wandb_has_each_row_once(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)
    out = tmp_path / "some_run"
    first = RunLog(out, ["wandb"], {"seed": 3})
    for i in range(6):
        first.write(row(i, note="x"))
    first.write({"step": 5, "epoch": 2, "knn/top1": 0.5})
    # Killed, and resumed at step 3.
    second = RunLog(out, ["wandb"], {"seed": 3})
    second.truncate(3)
    for i in range(4, 8):
        second.write(row(i))
    second.close()
    ((run, kept),) = wandb.rows.items()
    assert (out / "wandb" / "run_id.txt").read_text() == run
    expected = {i: {"epoch": i // 2, "loss": 1 / (i + 1)} for i in range(8)}
    expected[5] |= {"knn/top1": 0.5}
    assert kept == expected
    asked = wandb.asked[1]
    assert asked["resume"] == "allow" and asked["config"] == {"seed": 3} and asked["dir"] == str(out)
    assert (asked["project"], asked["name"]) == ("ssl_ib", "some_run")
    # Another folder is another run, and what the user says in wandb's own way counts.
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    RunLog(tmp_path / "other", ["wandb"]).close()
    assert len(wandb.rows) == 2 and wandb.asked[2]["project"] == "mine"


def test_wandb_refuses(tmp_path, monkeypatch):
    def refuse(**_):
        raise Wandb.Error("No API key configured.")

    wandb = Wandb()
    wandb.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match="logger: wandb refuses the run: No API key configured. WANDB_MODE=offline"):
        RunLog(tmp_path, ["wandb"])


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (range(3), range(2, 5)):
        log = RunLog(tmp_path, ["tensorboard", "wandb"], {"model": {"name": "x", "size": [1, None]}})
        log.truncate(steps[0] - 1)
        for i in steps:
            log.write(row(i, bad=math.nan))
        log.close()
    kept = (tmp_path / "wandb" / "run_id.txt").read_text()
    parts = list((tmp_path / "wandb").glob(f"offline-run-*-{kept}/run-{kept}.wandb"))
    assert parts and all(path.stat().st_size > 200 for path in parts)

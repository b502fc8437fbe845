"""The record of a run: `metrics.jsonl`, one JSON object a line, which is the truth, and copies of it for TensorBoard
and Weights & Biases.

JSON has no non-finite numbers, so they are written as the strings "NaN", "Infinity" and "-Infinity" and read back as
the numbers they were.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config.outside import json_object
from ..errors import UserError
from .files import naming, replace

_logger = logging.getLogger(__name__)

#: What tells of a thread that failed, but for TensorBoard's.
_excepthook = threading.excepthook

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunLog:
    """Appends rows of numbers to a run's folder and reads them back.

    folder:  where `metrics.jsonl` and the copies live, made where missing; rows already there are kept. None keeps the
        rows in memory and writes nothing.
    loggers: who gets a copy of the numbers: "tensorboard", "wandb".
    config:  the run's configuration as plain data, for wandb. Raises UserError where wandb refuses the run.
    """

    def __init__(
        self,
        folder: Path | str | None,
        loggers: Iterable[str] = ("tensorboard",),
        config: dict[str, Any] | None = None,
    ):
        self._memory: list[dict[str, Any]] = []
        self._path = None
        #: How many rows there are.
        self.count = 0
        if folder is None:
            return
        self._path = Path(folder) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            # A run that was killed may have left half a line, which must not run into the next one.
            self._rewrite(rows := self.rows())
            self.count = len(rows)
        self._file = self._path.open("a", encoding="utf-8")
        makers = {"tensorboard": _TensorBoard, "wandb": lambda folder: _Wandb(folder, config or {})}
        self._copies = [makers[name](self._path.parent) for name in dict.fromkeys(loggers)]

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row: `step` and `epoch`, and any further numbers (0-d tensors too), strings, booleans or None."""
        assert {"step", "epoch"} <= row.keys(), f"a row needs step and epoch, got {sorted(row)}"
        row = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
        self.count += 1
        if self._path is None:
            self._memory.append(row)
            return
        with naming(self._path):
            self._file.write(_line(row))
            self._file.flush()
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        step = numbers.pop("step")
        with naming(self._path.parent):
            for copy in self._copies:
                copy.write(step, numbers)

    def rows(self) -> list[dict[str, Any]]:
        """Every row so far, oldest first, without a last line cut short. Raises UserError for any other broken line."""
        return [dict(row) for row in self._memory] if self._path is None else read_rows(self._path)

    def sync(self) -> None:
        """Has the rows on the disk, so that no checkpoint outlives those before it, whatever happens to the machine."""
        if self._path is not None:
            with suppress(OSError):  # The checkpoint that comes next says what the disk refuses.
                os.fsync(self._file.fileno())

    def truncate(self, step: int, expected: int = 0) -> None:
        """Forgets every row of a later step than `step`, so that a run resumed there continues exactly.

        expected: how many rows there were when it was saved; that some of them are missing is said.
        """
        kept = [row for row in self.rows() if row["step"] <= step]
        self.count = len(kept)
        if len(kept) < expected:
            last = kept[-1]["step"] if kept else 0
            _logger.warning(
                "%s has lost %d of the %d rows that it had at step %d, where the run goes on (its last one now is of "
                "step %d): its curves have a gap, the training has none",
                self._path or "the record",
                expected - len(kept),
                expected,
                step,
                last,
            )
        if self._path is None:
            self._memory = kept
            return
        self._file.close()
        self._rewrite(kept)
        self._file = self._path.open("a", encoding="utf-8")
        for copy in self._copies:
            copy.truncate(step)

    def close(self) -> None:
        """Closes the files; the rows can still be read."""
        if self._path is not None:
            self._file.close()
            for copy in self._copies:
                copy.close()

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        replace(self._path, "".join(map(_line, rows)))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, oldest first, without a last line cut short.

    Raises UserError for any other line that is no object with a step and an epoch.
    """
    lines, rows = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            row = with_numbers(json_object(line))
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}") from None
        if not all(isinstance(row.get(key), int | float) for key in ("step", "epoch")):
            raise UserError(f"{path}, line {number}: expected numbers step and epoch, got {line[:80]!r}")
        rows.append(row)
    return rows


def with_numbers(data: dict[str, Any]) -> dict[str, Any]:
    """What JSON has, and the mappings in it, with the strings that stand for numbers that are not finite as these."""
    return {
        key: with_numbers(value)
        if isinstance(value, dict)
        else NON_FINITE.get(value, value)
        if isinstance(value, str)
        else value
        for key, value in data.items()
    }


def _line(row: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if not isinstance(value, float) or math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

    return json.dumps({key: plain(value) for key, value in row.items()}, allow_nan=False) + "\n"


def _said_by_the_run(failed: threading.ExceptHookArgs) -> None:
    """What TensorBoard's thread fails of, it raises again where the run writes: a full disk, a folder that is gone."""
    if type(failed.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        _excepthook(failed)


class _TensorBoard:
    """A copy of the rows in `tensorboard/`."""

    def __init__(self, folder: Path):
        # Only here, because a dry run can do without waiting for TensorBoard.
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _said_by_the_run
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            if key != "epoch":
                self._board.add_scalar(key, value, step)
        # Another thread writes the events: a kill before it did would leave a hole that resuming does not fill.
        self._board.flush()

    def truncate(self, step: int) -> None:
        self._board.close()
        self._board = type(self._board)(self._board.log_dir, purge_step=step + 1)

    def close(self) -> None:
        self._board.close()


class _Wandb:
    """A copy of the rows at Weights & Biases, or in `wandb/` where WANDB_MODE=offline. Its settings come from the
    environment; the project is `ssl_ib` and the name the folder's where that says nothing.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        import wandb

        # Kept with the run, so that it goes on as the same one after it was resumed.
        kept = folder / "wandb" / "run_id.txt"
        if not kept.is_file():
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                id=kept.read_text(),
                resume="allow",
                dir=str(folder),
                project=os.environ.get("WANDB_PROJECT", "ssl_ib"),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                config=config,
                allow_val_change=True,
            )
        except wandb.Error as error:
            raise UserError(
                f"logger: wandb refuses the run: {error} WANDB_MODE=offline needs no account and no network"
            ) from error

    def write(self, step: int, numbers: dict[str, float]) -> None:
        # wandb can take nothing back, and a resumed run repeats its rows bit for bit: those it has are not sent again.
        if step >= self._run.step:
            self._run.log(numbers, step=step)

    def truncate(self, step: int) -> None:
        """Leaves all as it is: see `write`."""

    def close(self) -> None:
        self._run.finish()

"""The record of a run: `metrics.jsonl`, one JSON object a line, which is the truth, and its copy for TensorBoard.

JSON has no non-finite numbers, so they are written as the strings "NaN", "Infinity" and "-Infinity" and read back as
the numbers they were.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import replace

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunLog:
    """Appends rows of numbers to a run's folder and reads them back.

    folder: where `metrics.jsonl` and `tensorboard/` live, made where missing; rows already there are kept. None keeps
        the rows in memory and writes nothing (a dry run).
    """

    def __init__(self, folder: Path | str | None):
        self._memory: list[dict[str, Any]] = []
        self._path = None
        if folder is None:
            return
        self._path = Path(folder) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            # A run that was killed may have left half a line, which must not run into the next one.
            self._rewrite(self.rows())
        self._file = self._path.open("a", encoding="utf-8")
        # Only here, because a dry run can do without waiting for TensorBoard.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._path.parent / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row: `step` and `epoch`, and any further numbers (0-d tensors too), strings, booleans or None."""
        assert {"step", "epoch"} <= row.keys(), f"a row needs step and epoch, got {sorted(row)}"
        row = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
        if self._path is None:
            self._memory.append(row)
            return
        self._file.write(_line(row))
        self._file.flush()
        for key, value in row.items():
            if key not in ("step", "epoch") and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(key, value, row["step"])
        # Another thread writes the events: a kill before it did would leave a hole that resuming does not fill.
        self._board.flush()

    def rows(self) -> list[dict[str, Any]]:
        """Every row so far, oldest first, without a last line cut short. Raises UserError for any other broken line."""
        if self._path is None:
            return [dict(row) for row in self._memory]
        lines = self._path.read_bytes().splitlines()
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                if number == len(lines):
                    break
                raise UserError(f"{self._path}, line {number}: expected a JSON object, got {line[:80]!r}") from None
            rows.append({k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()})
        return rows

    def truncate(self, step: int) -> None:
        """Forgets every row of a later step than `step`, so that a run resumed there continues exactly."""
        kept = [row for row in self.rows() if row["step"] <= step]
        if self._path is None:
            self._memory = kept
            return
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._rewrite(kept)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(self._board.log_dir, purge_step=step + 1)

    def close(self) -> None:
        """Closes the files; the rows can still be read."""
        if self._path is not None:
            self._file.close()
            self._board.close()

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        replace(self._path, "".join(map(_line, rows)))


def _line(row: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if not isinstance(value, float) or math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

    return json.dumps({key: plain(value) for key, value in row.items()}, allow_nan=False) + "\n"

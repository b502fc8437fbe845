"""Where an instrument's files go, and its numbers as a table of text."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..record.files import replace


def folder_of(out: Path | None, runs: Sequence[Path]) -> Path:
    """The folder that is asked for, else `info` in the run's; it need not exist yet.

    Raises UserError where several runs leave it open, and where nothing can be written there.
    """
    if out is None and len(runs) > 1:
        raise UserError("say where the figure of several runs goes, with --out")
    found = runs[0] / "info" if out is None else out
    if found.exists() and not found.is_dir():
        raise UserError(f"--out: expected a folder, and {found} is a file")
    there = next(path for path in (found.absolute(), *found.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"--out: {there} cannot be written to")
    return found


def make(folder: Path) -> None:
    """Makes a folder. Raises UserError where the machine refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {folder}: {error.strerror}") from None


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows as CSV, numbers with six digits; what a row has no number for is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"{row[c]:.6g}" if isinstance(row[c], float) else row[c] for c in columns])
    replace(path, text.getvalue())

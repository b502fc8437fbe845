"""Writes the page of runs, or of a sweep, to a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..record.files import replace
from ..record.folder import names_of
from .page import Page
from .reading import read_run
from .render import MARK, render
from .sweeps import is_sweep, read_sweep

_logger = logging.getLogger(__name__)

REPORT = "report.html"


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the page of these folders, each a run's or a sweep's. Raises UserError where one is neither."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; expected the folder of a run or of a sweep")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("expected each run once")
    sweeps = [folder for folder in folders if is_sweep(folder)]
    if sweeps and len(folders) > 1:
        raise UserError(f"{sweeps[0]} is a sweep: give one sweep alone, or runs")
    if sweeps:
        sweep = read_sweep(folders[0])
        page = Page([run.run for run in sweep.runs if run.run is not None], sweep, out)
        title = f"Sweep {folders[0].resolve().name}"
    else:
        runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
        page = Page(runs, None, out)
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    replace(out, render(page, title))


def report_of_run(out: Path) -> None:
    """Writes a run's page into its folder, at the run's end. What goes wrong is said in a line, and the run is done all
    the same."""
    try:
        write_report([out], out / REPORT)
    except Exception as error:
        _logger.warning(
            "the run is done, but its page could not be written: %s: %s",
            type(error).__name__,
            " ".join(str(error).split()),
        )


def check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where a page may not be written to a file: it is a folder's name, or a file of something else's
    that `overwrite` does not give up."""
    if out.is_dir():
        raise UserError(f"--out: expected a file such as report.html, and {out} is a folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out: there is no folder {out.absolute().parent}")
    if out.is_file() and not overwrite:
        with out.open("rb") as file:
            if MARK not in file.read(1000):
                raise UserError(
                    f"{out} is no page of ssl-ib-report: choose another --out, or replace it with --overwrite"
                )

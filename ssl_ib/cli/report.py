"""`ssl-ib-report`: one page that shows runs, or a sweep, in a file that opens without a network.

Exit codes: 0 done, 2 a mistake of the user's (one message on stderr), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import __version__
from ..errors import UserError
from .exits import end_at_interrupts, exit_code, heed_interrupts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-report",
        description="Write one HTML page that shows a run, compares several, or shows a sweep: what was trained, on "
        "what, loss by term, kNN, health, information, pictures, evaluations and cost. It opens without a network. A "
        "finished run has its page already, RUN/report.html; this renews it, after an evaluation say.",
        epilog="examples: ssl-ib-report runs/mrcl_digits | ssl-ib-report runs/a runs/b --out a_and_b.html | "
        "ssl-ib-report sweeps/mrcl_digits",
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, finished or not, or of a sweep")
    p.add_argument("--out", type=Path, metavar="FILE", help="the page (default, of one folder: RUN/report.html)")
    p.add_argument("--overwrite", action="store_true", help="replace FILE also where it is something else than a page")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if arguments is None:
        end_at_interrupts("ssl-ib-report")
    options = parser().parse_args(arguments)
    return exit_code("ssl-ib-report", lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    if options.out is None and len(options.runs) > 1:
        raise UserError("say where the page of several runs goes, with --out, such as --out report.html")
    from ..report.write import REPORT, check_out, write_report

    heed_interrupts()
    out = options.runs[0] / REPORT if options.out is None else options.out
    # The folder of the default may be missing itself, which is for the reader to say.
    if options.out is not None or options.runs[0].is_dir():
        check_out(out, options.overwrite)
    write_report(options.runs, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

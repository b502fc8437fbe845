"""`ssl-ib-doctor`: what this machine can run, and what to do about what it cannot. `--help` shows the usage.

Exit codes: 0 nothing is in the way, 1 something is (marked !!), 2 a mistake of the user's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import __version__
from .exits import end_at_interrupts, exit_code, heed_interrupts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-doctor",
        description="Say what this machine can run: GPUs, processes, kernels, memory, shared memory, disk, locks.",
        epilog="ok: fine; --: something optional is not there; !!: a run would fail or be slow for it.",
    )
    p.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="where runs would go (default: runs)"
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if arguments is None:
        end_at_interrupts("ssl-ib-doctor")
    options = parser().parse_args(arguments)
    return exit_code("ssl-ib-doctor", lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    from ..config.outside import user_path
    from ..doctor import examine

    heed_interrupts()
    problems = 0
    for finding in examine(user_path(options.folder, "DIR")):
        print(finding.lines(), flush=True)
        problems += finding.status == "problem"
    print("nothing is in the way" if not problems else f"{problems} in the way, marked !!")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())

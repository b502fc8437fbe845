"""`ssl-ib-info`: the information that encoders keep and drop, and how far each estimate of it is to be trusted.

Exit codes: 0 done, 2 a mistake of the user's (one message on stderr), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from .. import __version__, instruments
from .exits import end_at_interrupts, exit_code, heed_interrupts


def parser() -> argparse.ArgumentParser:
    """The command line: a sub-command for each instrument."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-info",
        description="The information that encoders keep and drop, in nats. Every number says whether it is a bound or "
        "an estimate, and how large it can become.",
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = p.add_subparsers(metavar="COMMAND", required=True)
    for name in instruments.COMMANDS:
        module = import_module(f"{instruments.__name__}.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(command)
        command.set_defaults(run=module.run)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if arguments is None:
        end_at_interrupts("ssl-ib-info")
    options = parser().parse_args(arguments)

    def run() -> int:
        heed_interrupts()
        return options.run(options)

    return exit_code("ssl-ib-info", run, "interrupted")


if __name__ == "__main__":
    sys.exit(main())

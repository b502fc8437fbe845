"""`ssl-ib-eval`: what an encoder is worth, by one protocol. `--help` shows the usage.

Exit codes: 0 done, 2 a mistake of the user's (one message on stderr), 130 stopped by Ctrl-C; what was finished is kept.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
from pathlib import Path

from .. import __version__
from ..errors import UserError
from .exits import end_at_interrupts, exit_code, heed_interrupts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-eval",
        description="Evaluate an encoder by PROTOCOL: of a run, of a checkpoint of one, or timm's NAME. Images and "
        "preprocessing are the run's, unless source=... says otherwise; KEY=VALUE sets the protocol's settings. Called "
        "again, it computes what is missing.",
        epilog="examples: ssl-ib-eval knn runs/mrcl_digits k=[1,20] | ssl-ib-eval linear runs/mrcl_digits form=mae "
        "lr=[0.03,0.1,0.3] | ssl-ib-eval knn timm:resnet18 source=folder source.path=FOLDER --out evals/resnet18",
    )
    p.add_argument("protocol", nargs="?", metavar="PROTOCOL", help="a protocol's name: --list shows them")
    p.add_argument("encoder", nargs="?", metavar="RUN|CHECKPOINT|timm:NAME", help="what is evaluated")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as in k=[10,20] source.path=FOLDER")
    p.add_argument("--out", type=Path, metavar="DIR", help="where evals.jsonl and pictures go (default: the run)")
    p.add_argument("--dry-run", action="store_true", help="check all on a few images, write nothing")
    p.add_argument("--overwrite", action="store_true", help="compute again what was finished with these settings")
    p.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE_OR_PATH", help="import your own parts first"
    )
    p.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--list", action="store_true", help="the protocols, a line each")
    p.add_argument("--describe", metavar="PROTOCOL", help="a protocol's settings, their defaults and meaning")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    # Deterministic matrix products on CUDA need this before the first of them (cuBLAS, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if arguments is None:
        end_at_interrupts("ssl-ib-eval")
    options = parser().parse_intermixed_args(arguments)
    return exit_code("ssl-ib-eval", lambda: _main(options), "interrupted; the same command continues")


def _main(options: argparse.Namespace) -> int:
    if not (options.list or options.describe):
        for given, what in ((options.protocol, "PROTOCOL (--list shows them)"), (options.encoder, "RUN or timm:NAME")):
            if given is None or "=" in given:
                raise UserError(f"expected PROTOCOL and RUN|CHECKPOINT|timm:NAME first; which {what}?")
    from ..config.plugins import load_plugins
    from ..config.settings import described
    from ..evals.protocol import PROTOCOLS, settings_of

    load_plugins(options.plugin)
    if options.list:
        width = max(map(len, PROTOCOLS.names()))
        for name in PROTOCOLS.names():
            print(f"{name:<{width}}  {(inspect.getdoc(PROTOCOLS[name]) or '').partition('.')[0]}")
        return 0
    if options.describe:
        section = settings_of(options.describe)
        doc = inspect.getdoc(PROTOCOLS[options.describe])
        print(f"protocol {options.describe}: {doc}\n{described(section)}", end="")
        return 0
    from .. import distributed
    from ..evals.evaluate import RESULTS, evaluate, table

    heed_interrupts()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ssl_ib").setLevel(logging.INFO)
    device = [f"device={options.device}"] if options.device else []
    try:
        lines = evaluate(
            options.protocol,
            options.encoder,
            *device,
            *options.overrides,
            out=options.out,
            dry=options.dry_run,
            overwrite=options.overwrite,
        )
        main = distributed.is_main()
    finally:
        distributed.shutdown()
    if not main:
        return 0
    print(table(lines, settings_of(options.protocol).varied.values()))
    if options.dry_run:
        print(f"dry run of {options.protocol} passed: the numbers mean nothing, and nothing was written")
    else:
        print(f"{len(lines)} results in {(options.out or _folder(options.encoder)) / RESULTS}")
    return 0


def _folder(encoder: str) -> Path:
    from ..record.shards import is_checkpoint

    path = Path(encoder)
    return path if path.is_dir() and not is_checkpoint(path) else path.parent.parent


if __name__ == "__main__":
    sys.exit(main())

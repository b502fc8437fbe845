"""`ssl-ib-export`: a run's encoder in the layouts of other libraries, and published encoders in ours.

Exit codes: 0 done, 2 a mistake of the user's (one message on stderr).
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from .. import __version__
from ..errors import UserError
from ..export import FORMATS, LAYOUTS
from .exits import end_at_interrupts, exit_code, heed_interrupts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-export",
        description="Write a run's encoder for another library, with its preprocessing and a model card; or read a "
        "published checkpoint into a folder that --init, ssl-ib-eval and ssl-ib-embed take.",
        epilog="examples: ssl-ib-export runs/simclr_cifar10 --to timm | ssl-ib-export --from dino "
        "dino_deitsmall16_pretrain.pth --out dino_vits16",
    )
    p.add_argument("source", metavar="RUN", help="a run's folder, a checkpoint, or timm:NAME; with --from, a file")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", action="append", choices=FORMATS, help="the format that is written")
    way.add_argument("--from", dest="layout", choices=LAYOUTS, help="the layout of a published checkpoint")
    p.add_argument("--out", type=Path, metavar="DIR", help="the folder (default: RUN/export/FORMAT)")
    p.add_argument("--name", metavar="ENCODER", help="which encoder of a run that has several")
    p.add_argument("--pretrained", action="store_true", help="of timm:NAME, load timm's weights, which downloads them")
    p.add_argument("--overwrite", action="store_true", help="replace an export that is in the folder")
    p.add_argument("--dry-run", action="store_true", help="load and check, and write nothing")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if arguments is None:
        end_at_interrupts("ssl-ib-export")
    options = parser().parse_args(arguments)
    return exit_code("ssl-ib-export", lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    if options.layout:
        if options.out is None:
            raise UserError("--from: say where to write with --out")
        if options.name or options.pretrained:
            raise UserError("--name and --pretrained are for --to")
    from ..export.run import export, from_published

    heed_interrupts()
    # The exporter of ONNX reports its stages, and torch what it deprecates: nothing that a user could act upon.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch")
    if options.layout:
        lines = from_published(options.layout, options.source, options.out, options.overwrite, options.dry_run)
    else:
        if len(options.to) > 1:
            raise UserError(f"--to: expected one format, got {', '.join(options.to)}: a command writes one")
        _, lines = export(
            options.source,
            options.to[0],
            options.out,
            name=options.name,
            pretrained_weights=options.pretrained,
            overwrite=options.overwrite,
            dry=options.dry_run,
        )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

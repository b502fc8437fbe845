"""`ssl-ib-embed`: the features of a folder of images, as a file. `--help` shows the usage.

Exit codes: 0 done, 2 a mistake of the user's (one message on stderr), 130 stopped by Ctrl-C; called again, it goes on.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from .. import __version__
from ..errors import UserError
from .exits import end_at_interrupts, exit_code, heed_interrupts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-embed",
        description="Write the features of all images below a folder to a file, in the order of their names. Called "
        "again after it was stopped, it goes on. Processes that torchrun starts share the images.",
        epilog="examples: ssl-ib-embed runs/simclr_cifar10 photos --out photos.npy | ssl-ib-embed "
        "timm:vit_small_patch16_224 photos --pretrained --tokens patches --out photos.safetensors",
    )
    p.add_argument("source", metavar="ENCODER", help="a run's folder, a checkpoint, or timm:NAME")
    p.add_argument("folder", type=Path, metavar="FOLDER", help="of images, at any depth")
    p.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".npy or .safetensors with FILE.csv, or .parquet"
    )
    p.add_argument(
        "--tokens",
        choices=("cls", "mean", "patches"),
        help="class token, mean of the patches, or all patches (default: what the run evaluated)",
    )
    p.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    p.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--bf16", action="store_true", help="compute in bfloat16; features are float32 all the same")
    p.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of the images, that may be left out because they cannot be read, and one in any case (default: 0.01)",
    )
    p.add_argument("--name", metavar="NAME", help="which encoder of a run that has several")
    p.add_argument("--pretrained", action="store_true", help="of timm:NAME, load timm's weights, which downloads them")
    p.add_argument("--overwrite", action="store_true", help="replace the file, and begin anew")
    p.add_argument("--dry-run", action="store_true", help="load, encode one image, say what would come, write nothing")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if arguments is None:
        end_at_interrupts("ssl-ib-embed")
    options = parser().parse_args(arguments)
    return exit_code("ssl-ib-embed", lambda: _main(options), "interrupted; the same command goes on from here")


def _main(options: argparse.Namespace) -> int:
    if options.batch_size < 1:
        raise UserError(f"--batch-size: expected a number above 0, got {options.batch_size}")
    if not 0 <= options.max_unreadable <= 1:
        raise UserError(f"--max-unreadable: expected a share from 0 to 1, got {options.max_unreadable}")
    from .. import distributed
    from ..device import choose_device
    from ..embed.features import embed_to_file, preview
    from ..embed.files import check_out
    from ..pretrained import load

    heed_interrupts()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ssl_ib").setLevel(logging.INFO)
    check_out(options.out, options.overwrite)
    device = choose_device(options.device)
    distributed.initialise(device)
    try:
        with distributed.together():
            backbone = load(options.source, name=options.name, device=str(device), pretrained=options.pretrained)
            if options.dry_run:
                lines = preview(backbone, options.folder, options.out, options.tokens, options.bf16)
        if options.dry_run:
            print("\n".join(lines if distributed.is_main() else ()))
            return 0
        found = embed_to_file(
            backbone,
            options.folder,
            options.out,
            tokens=options.tokens,
            batch_size=options.batch_size,
            bf16=options.bf16,
            max_unreadable=options.max_unreadable,
            overwrite=options.overwrite,
        )
    finally:
        distributed.shutdown()
    if found is not None:
        print("\n".join(found.lines(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

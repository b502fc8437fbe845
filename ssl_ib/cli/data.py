"""`ssl-ib-data`: image sets made ready for fast training, and looked at. `--help` shows the usage.

Exit codes: 0 done, 2 a mistake of the user's (one message on stderr) or a set that is damaged, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigError, UserError
from .exits import end_at_interrupts, exit_code, heed_interrupts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-data",
        description="Make image sets ready for fast training.",
        epilog="examples: ssl-ib-data pack photos packed max_side=256 | ssl-ib-data check packed | "
        "ssl-ib-train simclr_folder source=packed source.path=packed",
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    pack = commands.add_parser(
        "pack",
        help="decode a folder or an archive once, into a set that is mapped into memory",
        description="Decode the images of a folder or an archive once and write their pixels, labels, names and "
        "checksums to a folder, which source=packed reads: training then decodes nothing any more. A picture of 256 x "
        "192 pixels takes 147 kB.",
    )
    pack.add_argument("source", type=Path, metavar="PATH", help="a folder of images, or a tar or zip archive")
    pack.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist")
    pack.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="the source's arguments, as in max_side=256 labels=folders (ssl-ib-train --describe source:folder)",
    )
    pack.add_argument("--overwrite", action="store_true", help="replace a packed set in OUT")
    check = commands.add_parser(
        "check",
        help="compare the pixels of a packed set with their checksums",
        description="Read a packed set and compare the pixels of each image with its checksum.",
    )
    check.add_argument("folder", type=Path, metavar="FOLDER", help="that `pack` has written")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if arguments is None:
        end_at_interrupts("ssl-ib-data")
    options = parser().parse_args(arguments)
    return exit_code("ssl-ib-data", lambda: {"pack": _pack, "check": _check}[options.command](options))


def _pack(options: argparse.Namespace) -> int:
    from ..data.packing import check_out, pack
    from ..evals.progress import track

    check_out(options.out, options.overwrite)
    source = _source(options.source, options.overrides)
    heed_interrupts()
    index = pack(source, options.out, options.overwrite, track)
    held_out = len(index.labels) - index.train
    print(
        f"{options.out}: {index.train:,} training images and {held_out:,} held out, {_sizes(index.sizes)}, "
        f"{int(index.ends[-1]) / 1e9:.2f} GB, {len(index.classes)} classes\n"
        f"train with: ssl-ib-train RECIPE source=packed source.path={options.out}"
    )
    return 0


def _source(path: Path, overrides: list[str]) -> Any:
    """The source of a folder or an archive, with its arguments."""
    from ..config.config import parse_overrides
    from ..config.registry import build_part, check_part

    problems: list[str] = []
    given = dict(parse_overrides([text.removeprefix("source.") for text in overrides], problems))
    name = "folder" if path.is_dir() else "archive"
    spec = check_part("source", {"name": name, "path": str(path), **given}, "source", problems)
    if problems:
        raise ConfigError(problems)
    return build_part("source", spec).part


def _sizes(sizes: Any) -> str:
    (low_height, low_width), (height, width) = sizes.amin(dim=0).tolist(), sizes.amax(dim=0).tolist()
    low, high = f"{low_height} x {low_width}", f"{height} x {width}"
    return f"{high} pixels" if low == high else f"{low} to {high} pixels"


def _check(options: argparse.Namespace) -> int:
    from ..data.packed_files import damaged, read_index
    from ..evals.progress import track

    heed_interrupts()
    index = read_index(options.folder, "FOLDER")
    wrong = damaged(options.folder, index, track)
    if wrong:
        first = ", ".join(str(number) if index.names is None else index.names[number] for number in wrong[:3])
        raise UserError(
            f"{options.folder}: {len(wrong):,} of {len(index.labels):,} images are not those that were packed: {first}"
            f"{', ...' * (len(wrong) > 3)}; pack the images anew"
        )
    print(f"{options.folder}: {len(index.labels):,} images, all as they were packed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

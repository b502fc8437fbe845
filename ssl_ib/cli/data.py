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
        "ssl-ib-train simclr_folder source=packed source.path=packed | ssl-ib-data shard photos shards",
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
    shard = commands.add_parser(
        "shard",
        help="write the images of a folder or an archive to tar files, as webdataset reads them",
        description="Write the image files of a folder or an archive, as they are, to tar files of some hundred MB "
        "with an index of their labels, names, held-out images and checksums, which source=webdataset reads: a million "
        "images are some hundred files.",
    )
    shard.add_argument("source", type=Path, metavar="PATH", help="a folder of images, or a tar or zip archive")
    shard.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist")
    shard.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the source's arguments, as for pack")
    shard.add_argument("--size", type=_positive, default=256.0, metavar="MB", help="bytes of a shard, in 1e6 (256)")
    shard.add_argument("--images", type=_positive, default=1e9, metavar="N", help="images of a shard, at most")
    shard.add_argument("--overwrite", action="store_true", help="replace shards in OUT")
    check = commands.add_parser(
        "check",
        help="compare a packed set or shards with their checksums",
        description="Read a packed set, or shards, and compare each image, or each shard, with its checksum.",
    )
    check.add_argument("folder", type=Path, metavar="FOLDER", help="that `pack` or `shard` has written")
    return p


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise ValueError(text)
    return number


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    if arguments is None:
        end_at_interrupts("ssl-ib-data")
    options = parser().parse_args(arguments)
    return exit_code("ssl-ib-data", lambda: {"pack": _pack, "shard": _shard, "check": _check}[options.command](options))


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


def _shard(options: argparse.Namespace) -> int:
    from ..data.shard_writer import check_out, write_shards
    from ..evals.progress import track

    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise UserError("ssl-ib-data shard needs the package webdataset: pip install 'ssl-ib[stream]'") from None
    check_out(options.out, options.overwrite)
    source = _source(options.source, options.overrides)
    heed_interrupts()
    index = write_shards(source, options.out, options.size * 1e6, int(options.images), options.overwrite, track)
    held_out, size = len(index.labels) - index.train, sum(shard.bytes for shard in index.shards)
    print(
        f"{options.out}: {index.train:,} training images and {held_out:,} held out in {len(index.shards):,} shards, "
        f"{size / 1e9:.2f} GB, {len(index.classes)} classes\n"
        f"train with: ssl-ib-train RECIPE source=webdataset source.path={options.out}"
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
    from ..data.packed_files import PIXELS, damaged, read_index
    from ..evals.progress import track

    heed_interrupts()
    if (options.folder / "train").is_dir() and not (options.folder / PIXELS).exists():
        return _check_shards(options.folder)
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


def _check_shards(folder: Path) -> int:
    from ..data.shard_writer import damaged
    from ..data.shards import INDEX, read_index
    from ..evals.progress import track

    if not (folder / INDEX).is_file():
        raise UserError(f"FOLDER: expected a packed set or shards with {INDEX}, found none in {folder}")
    index = read_index(folder / INDEX, "FOLDER")
    if wrong := damaged(folder, index, track):
        raise UserError(
            f"{folder}: {len(wrong):,} of {len(index.shards):,} shards are not those that were written: "
            f"{'; '.join(wrong[:3])}{'; ...' * (len(wrong) > 3)}; write the shards anew"
        )
    print(f"{folder}: {len(index.labels):,} images in {len(index.shards):,} shards, all as they were written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

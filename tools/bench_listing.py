"""Times the list of a folder of many small files: made, used again, and from there to labels and splits.

python tools/bench_listing.py [--files 200000] [--folders 1000] [--folder DIR]

The files are written below DIR (default: a temporary folder) and removed afterwards.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from ssl_ib.data.listing import SETTLED, list_images
from ssl_ib.data.sources.folder import Folder


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--files", type=int, default=200_000)
    p.add_argument("--folders", type=int, default=1000)
    p.add_argument("--folder", default=None)
    options = p.parse_args()
    top = Path(tempfile.mkdtemp(dir=options.folder))
    os.environ["XDG_CACHE_HOME"] = str(top / "cache")
    try:
        root = top / "images"
        for number in range(options.files):
            path = root / "train" / f"{number % options.folders:04}" / f"{number:07}.jpg"
            if number < options.folders:
                path.parent.mkdir(parents=True)
            path.write_bytes(b"some hundred bytes" * 10)
        time.sleep(1.5 * SETTLED / 1e9)
        print(f"{options.files:,} files in {options.folders:,} folders; load {os.getloadavg()[0]:.1f}")
        print(f"made and kept: {seconds(lambda: list_images(root)):.2f} s")
        again = [seconds(lambda: list_images(root)) for _ in range(7)]
        print(f"used again: {statistics.median(again):.2f} s (median of 7, {min(again):.2f} to {max(again):.2f})")
        source = [seconds(lambda: Folder(str(root)).files()) for _ in range(5)]
        print(f"source=folder up to labels and splits, with the list used again: {statistics.median(source):.2f} s")
        (index,) = (top / "cache").rglob("*.safetensors")
        print(f"the list takes {index.stat().st_size / 1e6:.1f} MB")
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    main()

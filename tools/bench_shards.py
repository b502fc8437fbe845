"""Times reading images from shards: this package's loader against webdataset's own loop, with the same decoding.

python tools/bench_shards.py SHARDS [--rounds 7] [--batch 64] [--workers 0 2]

SHARDS: a folder that `ssl-ib-data shard` has written, of images of one size. Each measurement is an epoch of its
training images, in turns. Both decode with `ssl_ib.data.decode.decode`, stack batches and shuffle, webdataset with a
buffer of 1,000. With workers=0 this package decodes in threads, and webdataset in one.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import webdataset

from ssl_ib.data.decode import decode
from ssl_ib.data.loader import Loader
from ssl_ib.data.sources.webdataset import WebDataset


def decoded(sample: dict) -> tuple[torch.Tensor, int]:
    (image,) = (data for key, data in sample.items() if key in ("jpg", "jpeg", "png"))
    return decode(image, 512), int(sample.get("cls", -1))


def stacked(samples: list) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def theirs(shards: list[str], batch: int, workers: int):
    # Half of an epoch's shards a worker: webdataset divides them.
    images = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(1000).map(decoded)
    batches = images.batched(batch, collation_fn=stacked, partial=False)
    return webdataset.WebLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def seconds(batches) -> tuple[float, int]:
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch.images if hasattr(batch, "images") else batch[0])
    return time.perf_counter() - began, count


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("shards", type=Path)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    options = p.parse_args()
    names = sorted(map(str, (options.shards / "train").glob("*.tar")))
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {len(names)} shards")
    for workers in options.workers:
        ours = {
            "whole set shuffled": Loader(
                WebDataset(str(options.shards), memory_gb=1e-9).train(), options.batch, 0, workers
            ),
            "buffer of 1,000": Loader(
                WebDataset(str(options.shards), memory_gb=1e-9, buffer=1000).train(), options.batch, 0, workers
            ),
        }
        other = theirs(names, options.batch, workers)
        rates: dict[str, list[float]] = {"webdataset": [], **{name: [] for name in ours}}
        for turn in range(options.rounds + 1):
            for name in rates:
                batches = other if name == "webdataset" else ours[name].epoch(turn)
                took, count = seconds(batches)
                if turn:  # The first starts the workers.
                    rates[name].append(count / took)
        base = rates["webdataset"]
        for name, found in rates.items():
            ratio = statistics.median(mine / its for mine, its in zip(found, base, strict=True))
            print(
                f"workers={workers} {name:20} {statistics.median(found):7.0f} images/s "
                f"({min(found):.0f} to {max(found):.0f}), {ratio:.2f} of webdataset's in the same round"
            )


if __name__ == "__main__":
    main()

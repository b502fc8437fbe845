"""Time of two parts of the evaluations: features of a folder, and a sweep of a linear probe's learning rates.

    python tools/bench_evals.py embed FOLDER [--model vit_tiny_patch16_224] [--batch 64] [--rounds 5] [--threads 2]
    python tools/bench_evals.py rates [--rows 10000] [--width 384] [--classes 10] [--epochs 10] [--rounds 5]

`embed` writes the features of all images below FOLDER as `ssl-ib-embed` does, in turns with timm's own inference: its
dataset, loader, transform and model, as its inference.py puts them together, with as many worker processes as there are
threads. `rates` trains the probe of the form `mae` on features that are there, with one learning rate and with twelve.
Medians of the rounds and of their ratios are printed, of the clock and of the processor's time where that is complete.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config

import ssl_ib
from ssl_ib import random
from ssl_ib.embed.features import embed_to_file
from ssl_ib.evals.heads import Heads, Training


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="WHAT")
    embed = commands.add_parser("embed")
    embed.set_defaults(run=_embed)
    embed.add_argument("folder", type=Path)
    embed.add_argument("--model", default="vit_tiny_patch16_224")
    embed.add_argument("--batch", type=int, default=64)
    rates = commands.add_parser("rates")
    rates.set_defaults(run=_rates)
    for name, value in {"rows": 10000, "width": 384, "classes": 10, "epochs": 10}.items():
        rates.add_argument(f"--{name}", type=int, default=value)
    for command in (embed, rates):
        command.add_argument("--rounds", type=int, default=5)
        command.add_argument("--threads", type=int, default=2)
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    options.run(options)


def _embed(options: argparse.Namespace) -> None:
    ours = ssl_ib.load(f"timm:{options.model}")
    # One model, so that the work is the same.
    how = resolve_model_data_config(ours.model)

    def by_timm() -> int:
        loader = create_loader(
            create_dataset("", root=str(options.folder)),
            batch_size=options.batch,
            use_prefetcher=False,
            num_workers=options.threads,
            device=torch.device("cpu"),
            **{key: how[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")},
        )
        with torch.inference_mode():
            return sum(len(ours.model(images)) for images, _ in loader)

    with tempfile.TemporaryDirectory() as place:

        def by_us() -> int:
            written = embed_to_file(
                ours, options.folder, Path(place) / "features.npy", batch_size=options.batch, overwrite=True
            )
            return written.shape[0]

        assert by_us() == by_timm(), "the two do not encode the same images"
        _compare({"ssl-ib-embed": by_us, f"timm {timm.__version__}": by_timm}, options.rounds, processor=False)


def _rates(options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(options.rows, options.width, generator=generator)
    labels = torch.randint(options.classes, (options.rows,), generator=generator)
    training = Training(optimiser="lars", epochs=options.epochs, warmup_epochs=1, batch_norm=True)

    def sweep(count: int) -> Callable[[], None]:
        def run() -> None:
            rates = [0.1 * 2.0**power for power in range(count)]
            heads = Heads(options.width, options.classes, rates, training, 0, torch.device("cpu"))
            steps = max(options.rows // 1024, 1)

            for epoch in range(options.epochs):
                order = random.shuffled(0, epoch, options.rows)
                for number, rows in enumerate(order.tensor_split(steps)):
                    heads.step(features[rows], labels[rows], epoch + number / steps)

        return run

    _compare({"12 rates": sweep(12), "one rate": sweep(1)}, options.rounds)


def _compare(contenders: dict[str, Callable[[], object]], rounds: int, processor: bool = True) -> None:
    """Prints the medians of each, and how long the first takes over the second."""
    clock: dict[str, list[float]] = {name: [] for name in contenders}
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            began, busy = time.perf_counter(), time.process_time()
            call()
            clock[name].append(time.perf_counter() - began)
            spent[name].append(time.process_time() - busy)
    for kind, times in {"clock": clock, "processor": spent}.items():
        if kind == "clock" or processor:
            first, second = times.values()
            ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
            each = ", ".join(f"{name} {statistics.median(found):.3f} s" for name, found in times.items())
            print(f"{kind:<10} {each}; the first takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()

"""What the gradient ledger costs a run: the processor's time of a ledger's batch beside that of a training step.

    python tools/bench_ledger.py RECIPE [KEY=VALUE ...] [--steps 8] [--images N]

Steps and batches are taken in turns in one process, on one thread; medians. The share is that of all ledgers of a run
(one before training and one an evaluation, each of as many batches as `ssl_ib.evals.ledger` takes) in the time of its
steps, at the recipe's epochs and evaluation interval. `--images` is the number of training images that this is reckoned
for, where the recipe runs on fewer here (`source.limit=`); other evaluations make the true share smaller.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from ssl_ib.config.config import resolve
from ssl_ib.evals import ledger
from ssl_ib.run import build_run
from ssl_ib.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(build_run(resolve(options.recipe, [*options.overrides, "eval.ledger=true"], []), False), None)
    config, images = trainer.config, options.images or len(trainer.images)
    a_epoch = images // config.batch_size
    batches = ledger.num_batches(a_epoch * config.eval.every_epochs)
    # One batch, timed, stands for each of them.
    ledger.num_batches = lambda steps: 1
    samples = itertools.chain.from_iterable(map(trainer.loader.epoch, itertools.count()))
    times = []
    for sample in itertools.islice(samples, options.steps + 1):
        start = time.process_time()
        trainer.train_step(sample)
        middle = time.process_time()
        trainer.online.ledger(trainer.progress())
        times.append((middle - start, time.process_time() - middle))
    # The first of each finds memory and picks its algorithms.
    step, read = (statistics.median(column) for column in zip(*times[1:], strict=True))
    ledgers = 1 + config.epochs // config.eval.every_epochs
    share = batches * ledgers * read / (a_epoch * config.epochs * step)
    ratios = [r / s for s, r in times[1:]]
    print(
        f"{options.recipe}: step {step:.3f} s, batch of a ledger {read:.3f} s ({read / step:.2f} steps, "
        f"{min(ratios):.2f} to {max(ratios):.2f}); {ledgers} ledgers of {batches}, {a_epoch * config.epochs:,} steps: "
        f"{share:.2%}"
    )


if __name__ == "__main__":
    main()

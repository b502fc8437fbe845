"""How many bytes a step sends between processes, counted, and what that would mean on more GPUs, modelled.

    python tools/wire.py simclr_vit_base_imagenet mae_vit_base_imagenet dino_vit_small_imagenet svib_vit_small_imagenet

Two processes take steps of each recipe on digits, with a few images each, and every call of torch.distributed is
counted with the bytes that it is given; twice, with twice as many images, which tells what grows with the batch.
Gradients are those of the trained parameters, in float32, as DDP sends them. From there on it is a model:

- a ring sends, of x bytes in each of R processes, 2 (R-1)/R x for an all-reduce, (R-1) x for an all-gather,
  (R-1)/R x for an all-to-all, x for a broadcast;
- each GPU keeps the recipe's batch divided by `--published` GPUs, and sends at `--gigabytes` a second;
- computing takes the counted operations at `--tflops`, and gradients travel while the backward's second half computes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

#: What each kind of call sends, in parts of the bytes it is given, with R processes.
SENT = {
    "all_reduce": lambda r: 2 * (r - 1) / r,
    "all_gather_into_tensor": lambda r: r - 1,
    "all_to_all_single": lambda r: (r - 1) / r,
    "broadcast": lambda r: 1.0,
}
#: Bytes of a call's tensor that grow with the number of processes, since it holds something for each of them.
FOR_EACH = {"all_to_all_single"}
FEW = 4
PROCESSES = 2
STEPS = 2


def count(recipe: str, batch: int) -> dict:
    """In one of the processes: bytes given to each kind of call in a step, trained parameters and operations."""
    import torch
    import torch.distributed as dist

    from ssl_ib import distributed
    from ssl_ib.config.config import resolve
    from ssl_ib.run import build_run, parameter_counts
    from ssl_ib.trainer import Trainer

    torch.set_num_threads(1)
    distributed.initialise("cpu")
    size = resolve(recipe, []).batch_size
    overrides = [f"batch_size={PROCESSES * batch}", "parallel=ddp", "precision=fp32", "accumulate=1", "compile=false"]
    config = resolve(recipe, [*overrides, "source=digits", "source.size=32", "workers=0", "logger=[]"])
    trainer = Trainer(build_run(config), None)
    sent: Counter[str] = Counter()
    for name in SENT:
        function = getattr(dist, name)

        def counted(*tensors, _function=function, _name=name, **keywords):
            given = tensors[0] if _name in ("all_reduce", "broadcast") else tensors[1]
            sent[_name] += given.nbytes
            return _function(*tensors, **keywords)

        setattr(dist, name, counted)
    samples = trainer.loader.epoch(0)
    for _ in range(STEPS):
        sent.clear()
        trainer.train_step(next(samples))
    return {
        "sent": dict(sent),
        "trained": parameter_counts(trainer.run)["trained"],
        "operations": trainer.flops / batch,
        "batch": size,
    }


def counted(recipe: str, batch: int) -> dict:
    """What `count` finds in the first of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--count", str(batch), recipe]
    variables = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(PROCESSES):
        environment = os.environ | variables | {"RANK": str(rank)}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"wire.py: {recipe} failed")
    return json.loads(answers[0].splitlines()[-1])


def model(recipe: str, options: argparse.Namespace) -> str:
    """The lines of a recipe: bytes a step by the number of GPUs, and the share of a step that they would take."""
    few, more = counted(recipe, FEW), counted(recipe, 2 * FEW)
    kinds = sorted({*few["sent"], *more["sent"]})
    # A part that does not depend on the batch, and one in proportion to it.
    grows = {kind: (more["sent"].get(kind, 0) - few["sent"].get(kind, 0)) / FEW for kind in kinds}
    fixed = {kind: few["sent"].get(kind, 0) - FEW * grows[kind] for kind in kinds}
    batch, gradient = few["batch"] / options.published, 4.0 * few["trained"]
    compute = batch * few["operations"] / (1e12 * options.tflops)
    names = ", ".join(f"{kind} {fixed[kind]:.0f} + {grows[kind]:.0f} an image" for kind in kinds) or "nothing"
    lines = [
        f"{recipe}: {few['trained'] / 1e6:.1f} M trained parameters, {batch:g} images a GPU; counted: {names} bytes"
    ]
    for gpus in options.gpus:
        rows = sum(
            SENT[kind](gpus) * (fixed[kind] + batch * grows[kind]) * (gpus / PROCESSES if kind in FOR_EACH else 1)
            for kind in kinds
        )
        gradients = SENT["all_reduce"](gpus) * gradient
        waiting = rows / options.gigabytes / 1e9 + max(gradients / options.gigabytes / 1e9 - compute / 3, 0.0)
        lines.append(
            f"| {recipe} | {gpus} | {gradients / 1e6:.0f} | {rows / 1e6:.1f} | {1e3 * compute:.0f} | "
            f"{1e3 * waiting:.1f} | {compute / (compute + waiting):.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipes", nargs="+", metavar="RECIPE")
    p.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], metavar="R")
    p.add_argument("--published", type=int, default=32, help="GPUs that the recipe's batch is spread over")
    p.add_argument("--gigabytes", type=float, default=40.0, help="that a GPU sends a second (400 Gb/s a GPU: 50)")
    p.add_argument("--tflops", type=float, default=300.0, help="that a GPU computes a second")
    p.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.count:
        print(json.dumps(count(options.recipes[0], options.count)), flush=True)
        return
    print("| recipe | GPUs | gradients, MB | rows, MB | computing, ms | waiting, ms | efficiency |")
    for recipe in options.recipes:
        print(model(recipe, options), flush=True)


if __name__ == "__main__":
    main()

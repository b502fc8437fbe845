"""Counts the bytes that a step sends between GPUs, and models from them how fast 8 to 512 GPUs would be.

    python tools/wire.py simclr_vit_base_imagenet mae_vit_base_imagenet svib_vit_small_imagenet

Counted: one process takes steps of the recipe as it is, but on a few images of noise, once with DDP and once with
FSDP. Every call of torch.distributed is counted with the bytes it is given. A stand-in for a second process answers
each call as if that one had the same tensors. Steps with twice as many images tell what grows with the batch. All else
is a model:

- a ring sends, of x bytes in each of R processes, 2 (R-1)/R x for an all-reduce, (R-1) x for an all-gather, (R-1)/R x
  for a reduce-scatter or an all-to-all, and x for a broadcast;
- in a machine of `--machine` GPUs each sends at `--inside` GB/s, and between machines at `--between`, by a network card
  of its own. Over several machines as many rings as a machine has GPUs share the work, as NCCL lays them, so that every
  card is in use: the slower of `--inside` and all cards of a machine together counts. Rows of an all-to-all, and the
  gradients of hybrid shards between machines, go through each GPU's card alone. What a message takes whatever its size
  is left out;
- computing takes the operations that were counted, at `--tflops`;
- DDP sends gradients during the later half of the backward pass, which is a third of the computing; FSDP sends weights
  and gradients during all of it; rows of a loss that compares images of all GPUs are sent while nothing is computed;
- reading and augmenting images never makes a GPU wait.

"as published" gives each GPU the recipe's batch divided by `--published`, whatever the number of GPUs; "one batch"
divides the recipe's batch by their number.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ssl_ib import register_source, sharding  # noqa: E402
from ssl_ib.config.config import resolve  # noqa: E402
from ssl_ib.data.sources.base import ImageSet, Source  # noqa: E402
from ssl_ib.run import build_run, parameter_counts  # noqa: E402
from ssl_ib.trainer import Trainer  # noqa: E402
from ssl_ib.types import Sample  # noqa: E402

#: Processes of the step that is counted, and images of each.
PROCESSES, FEW = 2, 2
#: What each kind of call sends, in parts of the bytes that a process gives it, with R processes.
SENT = {
    "all-reduce": lambda r: 2 * (r - 1) / r,
    "all-gather": lambda r: r - 1,
    "reduce-scatter": lambda r: (r - 1) / r,
    "all-to-all": lambda r: (r - 1) / r,
    "broadcast": lambda r: 1.0,
}
#: torch's names of them.
KINDS = {
    "allreduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
}


class Noise(ImageSet):
    """As many images as ImageNet has, all of them noise."""

    in_memory = True

    def gather(self, index: torch.Tensor) -> Sample:
        images = torch.randint(256, (len(index), 3, 256, 256), dtype=torch.uint8)
        return self.sample(images, torch.full((len(index), 2), 256), index)


@register_source("noise")
class NoiseSource(Source):
    """Images of noise."""

    def __init__(self):
        self._images = Noise(torch.full((1_281_167,), -1), [])

    def train(self) -> ImageSet:
        return self._images


class Counted(TorchDispatchMode):
    """Counts the bytes given to each kind of call, and answers as if the other processes had the same tensors."""

    def __init__(self):
        super().__init__()
        self.given: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            kind = KINDS.get(name)
            if kind in ("all-reduce", "broadcast"):
                self.given[kind] += sum(tensor.nbytes for tensor in args[0])
            elif name == "allgather_":
                (answers,), (given,) = args[:2]
                self.given[kind] += given.nbytes
                for answer in answers:
                    answer.copy_(given)
            elif kind is not None:
                answer, given = args[:2]
                self.given[kind] += given.nbytes
                repeated = given.reshape(-1).repeat(-(-answer.numel() // given.numel()))
                answer.copy_(repeated[: answer.numel()].view_as(answer))
            elif name != "barrier":
                sys.exit(f"wire.py: a step calls {name}, of which the bytes are not known")
        return function(*args, **(kwargs or {}))


def count(recipe: str, parallel: str, images: int) -> tuple[Counter[str], Trainer]:
    """Bytes that a process gives to each kind of call in a step with so many images of its own, and the trainer."""
    few = [f"batch_size={PROCESSES * images}", "accumulate=1", f"parallel={parallel}", "compile=false", "device=cpu"]
    config = resolve(recipe, [*few, "source=noise", "workers=0", "logger=[]"])
    with Counted() as counted:
        trainer = Trainer(build_run(config), None, mesh=sharding.mesh(parallel, torch.device("cpu")))
        if parallel == "ddp":
            # What the sum over the processes sends is known from the parameters.
            trainer.step_module.register_comm_hook(None, noop_hook)
        samples = trainer.loader.epoch(0)
        for _ in range(3):  # The first two do what later ones do not, such as DDP's agreement on an order.
            counted.given.clear()
            trainer.train_step(next(samples))
        return Counter(counted.given), trainer


class Step:
    """What is known of a recipe's step; bytes are those that a process gives."""

    def __init__(self, recipe: str):
        self.batch = resolve(recipe, []).batch_size
        few, trainer = count(recipe, "ddp", FEW)
        more, _ = count(recipe, "ddp", 2 * FEW)
        sharded, _ = count(recipe, "fsdp", FEW)
        # What the batch has no influence on, and what grows with it.
        self.grows = {kind: (more[kind] - few[kind]) / FEW for kind in SENT}
        self.fixed = {kind: few[kind] - FEW * self.grows[kind] for kind in SENT}
        self.trained = parameter_counts(trainer.run)["trained"]
        self.operations = trainer.flops / FEW
        #: The weights, whole, as often as they come together; and the gradients that are summed to shards.
        self.weights = PROCESSES * (sharded["all-gather"] - few["all-gather"])
        self.gradients = sharded["reduce-scatter"] - few["reduce-scatter"]

    def rows(self, gpus: int, images: float) -> tuple[float, float]:
        """Bytes that a GPU sends of rows, besides weights and gradients: in rings, and to every other GPU."""
        sent = {kind: SENT[kind](gpus) * (self.fixed[kind] + images * self.grows[kind]) for kind in SENT}
        # It is given the rows of every process.
        to_each = sent.pop("all-to-all") * gpus / PROCESSES
        return sum(sent.values()), to_each

    def parameters(self, parallel: str, gpus: int, machine: int) -> tuple[float, float]:
        """Bytes that a GPU sends of weights and gradients: in rings of all (hybrid: of a machine), and beyond these."""
        if parallel == "ddp":
            return SENT["all-reduce"](gpus) * 4.0 * self.trained, 0.0
        inside = gpus if parallel == "fsdp" else min(gpus, machine)
        shards = SENT["reduce-scatter"](inside) * (self.weights + self.gradients)
        return shards, SENT["all-reduce"](gpus // inside) * self.gradients / inside

    def share(self, parallel: str, gpus: int, images: float, options: argparse.Namespace) -> float:
        """The share of a step in which GPUs compute, in the model."""
        inside, card = 1e9 * options.inside, 1e9 * options.between
        one_machine = gpus <= options.machine
        rings = inside if one_machine else min(inside, options.machine * card)
        compute = images * self.operations / (1e12 * options.tflops)
        near, far = self.parameters(parallel, gpus, options.machine)
        hidden = compute / 3 if parallel == "ddp" else compute
        waiting = max(near / (inside if parallel == "hybrid" else rings) + far / card - hidden, 0.0)
        near, far = self.rows(gpus, images)
        waiting += near / rings + far / (inside if one_machine else card)
        return compute / (compute + waiting)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipes", nargs="+", metavar="RECIPE")
    p.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], metavar="R")
    p.add_argument("--machine", type=int, default=8, help="GPUs of a machine")
    p.add_argument("--published", type=int, default=32, help="GPUs that the recipe's batch is spread over")
    p.add_argument("--inside", type=float, default=300.0, help="GB/s that a GPU sends inside a machine")
    p.add_argument("--between", type=float, default=40.0, help="GB/s that a GPU sends between machines (400 Gb/s: 50)")
    p.add_argument("--tflops", type=float, default=300.0, help="that a GPU computes a second")
    options = p.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=PROCESSES, store=FakeStore())
    steps = {}
    for recipe in options.recipes:
        print(f"{recipe} ...", file=sys.stderr, flush=True)
        steps[recipe] = Step(recipe)
    most, counts = options.gpus[-1], ", ".join(map(str, options.gpus))
    print(
        f"Sent by a GPU in a step, in MB; weights and gradients on {most} GPUs, rows on {counts} GPUs as published:\n"
    )
    print("| recipe | trained parameters, M | DDP | FSDP | hybrid: in a machine, between machines | rows |")
    print("|---|---|---|---|---|---|")
    for recipe, step in steps.items():
        images = step.batch / options.published
        sent = {name: step.parameters(name, most, options.machine) for name in ("ddp", "fsdp", "hybrid")}
        cells = [f"{sent['ddp'][0] / 1e6:.0f}", f"{sent['fsdp'][0] / 1e6:.0f}"]
        cells.append(", ".join(f"{each / 1e6:.0f}" for each in sent["hybrid"]))
        cells.append(", ".join(f"{sum(step.rows(gpus, images)) / 1e6:.1f}" for gpus in options.gpus))
        print(f"| `{recipe}` | {step.trained / 1e6:.1f} | {' | '.join(cells)} |")
    print(f"\nShare of a step in which GPUs compute, on {counts} GPUs:\n")
    print("| recipe | images a GPU as published | parallel | as published | one batch |\n|---|---|---|---|---|")
    for recipe, step in steps.items():
        images = step.batch / options.published
        for parallel in ("ddp", "fsdp", "hybrid"):
            found = [[], []]
            for gpus in options.gpus:
                found[0].append(f"{step.share(parallel, gpus, images, options):.2f}")
                one = gpus <= step.batch
                found[1].append(f"{step.share(parallel, gpus, step.batch / gpus, options):.2f}" if one else "-")
            print(f"| `{recipe}` | {images:g} | `{parallel}` | {' | '.join(map(', '.join, found))} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Training speed and memory of our recipes, side by side with lightly's SimCLR, interleaved in one process.

    python tools/bench_train.py simclr_cifar10 source.path=cifar10.tar.xz --lightly
    python tools/bench_train.py simclr_cifar10 source.path=cifar10.tar.xz source.limit=2000 --lightly \
        --also "mrcl_simclr_cifar10 masker.ratio=0.5 criterion.w_masked=0 criterion.w_unmasked=0"

Every contender takes one step a round, in turn, so that a busy machine disturbs all alike; medians over the rounds are
printed, and ratios to the first. Peak memory is that of a process of its own that takes three steps. Overrides before
`--also` go to every recipe. lightly gets the same timm encoder, head sizes, batch, images, precision, compile setting,
optimiser and threads, twice: with its own transforms (in the main process, where ours are drawn as well), and on our
views, which leaves encoder, head, loss and optimiser to compare.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ssl_ib.config import resolve  # noqa: E402
from ssl_ib.run import build_run  # noqa: E402
from ssl_ib.trainer import Trainer  # noqa: E402

PHASES = ("data", "views", "forward", "backward", "optimiser")


class Clock:
    """Seconds spent in named phases since the last `take`."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, its time counted under `name`."""

        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, float]:
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


class Ours:
    """One of our recipes, stepped by the trainer itself."""

    def __init__(self, arguments: list[str]):
        config = resolve(arguments[0], arguments[1:])
        self.name, self.run = config.recipe, build_run(config)
        self.trainer = Trainer(self.run, None)
        self.clock = Clock(self.run.device)
        self.batch_size = self.run.batch_size
        self.run.task.prepare = self.clock.timed("views", self.run.task.prepare)
        module = self.trainer.step_module
        module.forward = self.clock.timed("forward", module.forward)
        self.trainer.optimizer.step = self.clock.timed("optimiser", self.trainer.optimizer.step)
        self.batches = self._batches()

    def _batches(self):
        epoch = 0
        while True:
            yield from self.trainer.loader.epoch(epoch)
            epoch += 1

    def step(self) -> dict[str, float]:
        start = self.clock.now()
        with self.clock.phase("data"):
            sample = next(self.batches).to(self.run.device)
        backward = torch.Tensor.backward
        torch.Tensor.backward = self.clock.timed("backward", backward)
        try:
            self.trainer.train_step(sample)
        finally:
            torch.Tensor.backward = backward
        return {"total": self.clock.now() - start, **self.clock.take()}


class Lightly:
    """lightly's SimCLR on the encoder, images and settings of one of our recipes."""

    def __init__(self, ours: Ours, own_transforms: bool):
        import timm
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform

        self.name = "lightly, its transforms" if own_transforms else "lightly, our views"
        self.ours, self.own, self.batch_size = ours, own_transforms, ours.batch_size
        config, device = ours.run.config, ours.run.device
        head = config.model
        name, arguments = ours.run.model.export()
        encoder = timm.create_model(name, **arguments)
        projector = SimCLRProjectionHead(
            encoder.num_features, head["projector_hidden"], head["projector_dim"], num_layers=head["projector_layers"]
        )
        self.model = torch.nn.Sequential(encoder, projector).to(device)
        if config.compile:
            self.model.compile()
        self.loss = NTXentLoss(temperature=config.criterion["temperature"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.clock, self.device = Clock(device), device
        self.transform = SimCLRTransform(input_size=ours.run.views.shapes[0][-1], gaussian_blur=0.0)
        self.amp = config.precision == "bf16"

    def _own_views(self, sample) -> list[torch.Tensor]:
        from torchvision.transforms.functional import to_pil_image

        views = [self.transform(to_pil_image(image)) for image in sample.images.cpu()]
        return [torch.stack([view[v] for view in views]).to(self.device) for v in range(2)]

    def step(self) -> dict[str, float]:
        clock, ours = self.clock, self.ours
        start = clock.now()
        with clock.phase("data"):
            sample = next(ours.batches).to(self.device)
        with clock.phase("views"):
            views = self._own_views(sample) if self.own else self._our_views(sample)
        with clock.phase("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.loss(*[self.model(view) for view in views])
        self.optimizer.zero_grad()
        with clock.phase("backward"):
            loss.backward()
        with clock.phase("optimiser"):
            self.optimizer.step()
        loss.item()
        return {"total": clock.now() - start, **clock.take()}

    def _our_views(self, sample) -> list[torch.Tensor]:
        batch = self.ours.run.task.prepare(sample, self.ours.trainer.progress())
        self.ours.clock.take()
        return batch.views


def contenders(options: argparse.Namespace) -> list:
    """The first recipe, lightly on it, and the others."""
    first = Ours([options.recipe, *options.overrides])
    found = [first]
    if options.lightly:
        found += [Lightly(first, own_transforms=True), Lightly(first, own_transforms=False)]
    for text in options.also:
        recipe, *extra = shlex.split(text)
        found.append(Ours([recipe, *options.overrides, *extra]))
        found[-1].name = text
    return found


def peak_memory(number: int) -> float:
    """MB that contender `number` needs beyond what is there before its first step, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", str(number)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(contender, device: torch.device) -> float:
    """MB of peak memory over three steps, beyond what was there before them (Linux, or CUDA's own count)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(3):
            contender.step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # Resets the process's peak to what it holds now: what loading the data took does not count.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(3):
        contender.step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    """A memory figure of this process in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**10


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipe")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    p.add_argument("--also", action="append", default=[], metavar='"RECIPE KEY=VALUE ..."')
    p.add_argument("--lightly", action="store_true")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--json", type=Path)
    p.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = p.parse_intermixed_args()

    found = contenders(options)
    device = found[0].run.device
    if options.memory_of is not None:
        print(measure_memory(found[options.memory_of], device))
        return
    for contender in found:
        contender.step()
        contender.step()
    rows = [[contender.step() for contender in found] for _ in range(options.rounds)]
    table = []
    for number, contender in enumerate(found):
        steps = [row[number] for row in rows]
        total = statistics.median(step["total"] for step in steps)
        shares = {name: statistics.median(step.get(name, 0.0) / step["total"] for step in steps) for name in PHASES}
        ratio = statistics.median(row[0]["total"] / row[number]["total"] for row in rows)
        table.append(
            {
                "contender": contender.name,
                "images_per_s": contender.batch_size / total,
                "speed_ratio": ratio,
                **shares,
                "memory_mb": peak_memory(number),
            }
        )
    config = found[0].run.config
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {config.precision}, "
        f"compile {config.compile}, batch {config.batch_size}, {options.rounds} interleaved rounds"
    )
    print(f"{'images/s':>9} {'ratio':>6} " + " ".join(f"{name:>9}" for name in PHASES) + f" {'peak MB':>8}  contender")
    for row in table:
        shares = " ".join(f"{row[name]:>9.1%}" for name in PHASES)
        speed = f"{row['images_per_s']:>9.1f} {row['speed_ratio']:>6.2f}"
        print(f"{speed} {shares} {row['memory_mb']:>8.0f}  {row['contender']}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The loop that every method shares: batch, loss, one backward, one step, hooks, log, evaluate, checkpoint.

It knows parts only by their contracts (part.py) and never by name. Everything a step depends on is either in the
checkpoint or a pure function of (seed, epoch, image), so a resumed run repeats the losses of one that never stopped.
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, distributed, optim
from .data.loader import Loader, ordered
from .errors import UserError
from .evals.online import Online
from .log import RunLog
from .part import Context, Step, detached, parts
from .run import DRY_IMAGES, Run
from .types import Batch, Loss, Progress, Sample

DRY_STEPS = 2


class Stopped(Exception):
    """The run was asked to stop by a signal, and saved itself first."""

    def __init__(self, signum: int, saved: Path | None):
        self.signum, self.saved = signum, saved
        super().__init__(signal.Signals(signum).name)


class Trainer:
    """Trains a run and leaves its folder `out` (None: a dry run, which writes nothing)."""

    def __init__(self, run: Run, out: Path | None):
        config = run.config
        self.run, self.config, self.out, self.dry = run, config, out, out is None
        self.main = distributed.is_main()
        self.images = run.source.train().to(run.device)
        self.loader = Loader(
            self.images, run.batch_size, config.seed, config.workers, distributed.rank(), distributed.world_size()
        )
        self.total_steps = config.epochs * self.loader.steps_per_epoch
        self.scale = optim.linear_scale(config.optim, run.samples_per_step)
        self.optimizer = optim.build_optimizer(config.optim, (run.task, run.model, run.criterion))
        self.parts = parts(run.task, run.model, run.criterion)
        self.state = nn.ModuleDict({"task": run.task, "model": run.model, "criterion": run.criterion})
        if config.compile:
            run.model.compile()
        self.step_module = self._wrapped(Step(run.model, run.criterion))
        limit = DRY_IMAGES if self.dry else None
        self.online = Online(run, limit)
        if out is not None and self.main:
            # Before anything else of the run is there: it is what tells a run's folder from any other.
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.yaml").write_text(config.yaml(), encoding="utf-8")
        self.log = RunLog(out if self.main else None)
        self.step = 0
        self.results: dict[str, float] = {}
        self.seconds = 0.0
        self.stop_signal: int | None = None
        # Views and masks have their own counters; this one is for what a model draws itself (dropout, drop path).
        torch.manual_seed(config.seed + distributed.rank())

    def _wrapped(self, module: nn.Module) -> nn.Module:
        if self.config.parallel != "ddp" or distributed.world_size() == 1:
            return module
        devices = [self.run.device.index] if self.run.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    # Where the run stands

    @property
    def epoch(self) -> int:
        return self.step // self.loader.steps_per_epoch

    def progress(self) -> Progress:
        """The run's position, as parts see it."""
        return Progress(self.step, self.epoch, self.total_steps, self.config.epochs, self.config.seed)

    def context(self) -> Context:
        """What hooks may use."""
        return Context(self.progress(), self.collect, lambda p: self.optimizer.state.pop(p, None))

    # The loop

    def fit(self) -> dict[str, float]:
        """Trains to the end and returns the final metrics. Raises Stopped after a signal, UserError on a bad loss."""
        if self.dry:
            self.total_steps = min(self.total_steps, DRY_STEPS)
        with self._signals():
            if self.step == 0 and not self.dry:
                self._evaluate("untrained")
                self.save()
            first = self.step
            bar = tqdm(total=self.total_steps, initial=first, unit="step", disable=not self.main, dynamic_ncols=True)
            with bar:
                while self.step < self.total_steps:
                    self._epoch(bar)
            self._evaluate("trained", final=True)
            self.save()
        return self.results

    def _epoch(self, bar: tqdm) -> None:
        """Trains from where the run stands to the end of the epoch."""
        epoch, start = divmod(self.step, self.loader.steps_per_epoch)
        if start == 0:
            self._hook("on_epoch_start")
        began = time.perf_counter()
        for sample in self.loader.epoch(epoch, start):
            fetched = time.perf_counter()
            self._set_schedules()
            row = self.train_step(sample.to(self.run.device))
            now = time.perf_counter()
            self._report(bar, row, seconds=now - began, waiting=fetched - began)
            self.seconds += now - began
            last = self.step % self.loader.steps_per_epoch == 0 or self.step == self.total_steps
            if not last:
                every = self.config.checkpoint.every_steps
                if every and self.step % every == 0:
                    self.save()
                self._stop_if_asked()
            if self.step == self.total_steps:
                break
            began = time.perf_counter()
        self._hook("on_epoch_end")
        done = epoch + 1
        if done % self.config.eval.every_epochs == 0 and self.step < self.total_steps:
            self._evaluate()
        keep = self.config.checkpoint.keep
        kept = f"epoch_{done:05d}.pt" if keep and done % keep == 0 else None
        if done % self.config.checkpoint.every_epochs == 0 or kept or self.stop_signal:
            self.save(kept)
        self._stop_if_asked()

    def train_step(self, sample: Sample) -> dict[str, float]:
        """One optimiser step on one batch, in `accumulate` micro-batches. Returns the row to log."""
        run, count = self.run, self.config.accumulate
        micro = len(sample) // count
        self.state.train()
        self.optimizer.zero_grad(set_to_none=True)
        progress, row = self.progress(), {}
        for i in range(count):
            batch = run.task.prepare(sample[i * micro : (i + 1) * micro], progress)
            with self._sync(last=i == count - 1):
                with self.online.autocast():
                    outputs, loss = self.step_module(batch, progress)
                self._check_finite(loss, sample)
                (loss.total / count).backward()
            for key, value in _scalars(loss).items():
                row[key] = row.get(key, 0.0) + value / count
            self._hook("after_forward", detached(outputs), batch, detached(loss.terms))
        self._hook("before_step")
        norm = optim.clip_gradients(self.optimizer, self.config.optim.clip, self.config.optim.clip_mode)
        self.optimizer.step()
        self.step += 1
        self._hook("after_step")
        return {**row, "lr": self.lr, "gradient_norm": norm.item()}

    @contextmanager
    def _sync(self, last: bool):
        """Gradients cross ranks once a step, with the last micro-batch."""
        if last or not isinstance(self.step_module, nn.parallel.DistributedDataParallel):
            yield
        else:
            with self.step_module.no_sync():
                yield

    def _hook(self, name: str, *arguments: Any) -> None:
        context = self.context()
        with torch.no_grad():
            for part in self.parts:
                getattr(part, name)(*arguments, context)

    def _set_schedules(self) -> None:
        """Gives every scheduled number, the learning rate and the weight decay their value for the coming step."""
        epoch = self.step / self.loader.steps_per_epoch
        for owner, attribute, schedule in self.run.schedules:
            setattr(owner, attribute, schedule.at(epoch, self.config.epochs))
        self.lr = optim.set_rates(self.optimizer, self.config.optim, self.scale, epoch, self.config.epochs)

    # Watching

    def _report(self, bar: tqdm, row: dict[str, float], seconds: float, waiting: float) -> None:
        rate = self.run.batch_size * distributed.world_size() / seconds
        bar.update()
        bar.set_postfix_str(f"loss {row['loss']:.4f}, {rate:.0f} images/s, {waiting / seconds:.0%} waiting for data")
        if self.step % self.config.log_every == 0 or self.step == self.total_steps:
            self._write({**row, "images_per_s": rate, "data_share": waiting / seconds})

    def _write(self, row: dict[str, float]) -> None:
        self.log.write({"step": self.step, "epoch": self.step / self.loader.steps_per_epoch, **row})

    def _evaluate(self, name: str | None = None, final: bool = False) -> None:
        """kNN and health now; `name` keeps the kNN result among the run's final ones."""
        metrics = self.online.evaluate(self.progress(), final) if self.main else {}
        distributed.barrier()
        if name is not None:
            self.results |= {f"{name}/{key}": value for key, value in metrics.items()}
        if name == "untrained" and self.main:
            self.results |= self.online.raw_pixels()
        if metrics:
            self._write(metrics)
            tqdm.write(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def collect(self, name: str, n: int) -> Tensor:
        """The model's output `name` (its first view's) for n plain training images, unmasked: [n, ...]."""
        found = []
        with torch.no_grad(), self.online.evaluating():
            for sample in ordered(self.images, self.config.eval.batch_size, n):
                sample = sample.to(self.run.device)
                plain = self.run.views.center(sample.images, sample.extra.get("size"))
                views = [plain] * len(self.run.views.shapes)
                outputs = self.run.model(Batch(views, [None] * len(views), sample.index, sample.label))
                found.append(outputs[name][0])
        return torch.cat(found)[:n]

    # Trouble

    def _check_finite(self, loss: Loss, sample: Sample) -> None:
        """Stops a run whose loss is lost, before the bad gradient reaches the weights."""
        if torch.isfinite(loss.total):
            return
        bad = [name for name, term in loss.terms.items() if not torch.isfinite(term).all()] or ["total"]
        values = ", ".join(f"{name}={term.item():.4g}" for name, term in loss.terms.items())
        message = f"the loss is no longer finite at step {self.step}: {', '.join(bad)} ({values})"
        message += f"; learning rate {self.lr:.3g}"
        if self.out is not None:
            indices = self.out / "bad_batch.txt"
            rank = distributed.rank()
            indices = indices if rank == 0 else indices.with_name(f"bad_batch_rank{rank}.txt")
            indices.write_text("\n".join(str(i) for i in sample.index.tolist()) + "\n")
            # The forward may already have put bad values into running statistics; then the older checkpoint is best.
            clean = all(torch.isfinite(t).all() for t in self.state.state_dict().values() if t.is_floating_point())
            saved = self.save() if clean else self.out / "checkpoints" / "last.pt"
            message += f". The batch's image numbers are in {indices}, the last good checkpoint is {saved}"
        raise UserError(message)

    @contextmanager
    def _signals(self):
        """SIGTERM and Ctrl-C end the run after the current step, once it is saved; a second one ends it at once."""

        def ask(signum: int, frame: Any) -> None:
            if self.stop_signal:
                raise KeyboardInterrupt
            self.stop_signal = signum

        former = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)

    def _stop_if_asked(self) -> None:
        if self.stop_signal:
            raise Stopped(self.stop_signal, self.save())

    # Saving

    def record_bad_images(self) -> None:
        """Names the images that could not be read in `bad_images.txt`."""
        bad = sorted({name for images in (self.images, self.run.source.val()) if images for name in images.bad})
        if bad:
            (self.out / "bad_images.txt").write_text("\n".join(bad) + "\n")
            print(f"{len(bad)} images could not be read and are left out: {self.out / 'bad_images.txt'}")

    def save(self, keep_as: str | None = None) -> Path | None:
        """Writes the checkpoint (from the main process; nothing in a dry run)."""
        if self.out is None or not self.main:
            return None
        state = {
            "step": self.step,
            "parts": self.state.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.run.device.type == "cuda" else [],
            "results": self.results,
            "seconds": self.seconds,
            "config": self.config.plain(),
        }
        return checkpoint.save(state, self.out / "checkpoints", keep_as)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        self.state.load_state_dict(state["parts"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.step, self.results, self.seconds = state["step"], state["results"], state["seconds"]
        self.log.truncate(self.step)


def _scalars(loss: Loss) -> dict[str, float]:
    """A loss as metrics: the total, each term, and each weighted term."""
    terms = {name: term.item() for name, term in loss.terms.items()}
    return {
        "loss": loss.total.item(),
        **{f"loss/{name}": value for name, value in terms.items()},
        **{f"weighted/{name}": terms[name] * weight for name, weight in loss.weights.items()},
    }

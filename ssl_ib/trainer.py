"""The loop that every method shares: batch, loss, one backward, one step, hooks, log, evaluate, checkpoint.

It knows parts only by their contracts (part.py) and never by name. Everything a step depends on is either in the
checkpoint or a pure function of (seed, step, image), so a resumed run repeats the losses of one that never stopped.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import contract, distributed, heartbeat, optim, random
from .data.loader import Loader, ordered
from .data.transfer import on_device
from .errors import EndedElsewhere, UserError
from .evals.online import Online
from .flops import peak
from .graphs import Graphs
from .part import Context, Step, detached, parts
from .record import checkpoint, ledger, shards
from .record.backbone import in_checkpoint
from .record.lock import Lock
from .record.log import RunLog
from .record.profile import Profile
from .record.signals import Stopped, StopRequest
from .record.terminal import Terminal, say
from .run import DRY_IMAGES, FIRST, Run
from .sharding import Sharded
from .types import Loss, Progress, Sample

DRY_STEPS = 2
#: Rows that a short run logs at least, whatever `log_every` says: a curve needs some.
MIN_ROWS = 20
#: Keeps what models draw apart from the views and masks, whose keys are folded from the same seed.
_DRAWS = -1


class Trainer:
    """Trains a run; its record and checkpoints go to the folder `out` (None: nothing is written), held by `lock`.

    Building one decodes the images that are held in memory and writes nothing. Raises UserError where they are too few
    or too many of them cannot be read.

    example: a loss of the run before it is trained, which tells its terms.
    flops:   floating-point operations that model and loss need for a step of this process.
    profile: watches where the time of a step goes, where it is given before `fit`.
    results: evaluations that the run is judged by: `untrained` (`initial` where it starts from given weights),
        `raw_pixels`, `trained` and `chance`, each metrics by name.
    """

    def __init__(self, run: Run, out: Path | None, lock: Lock | None = None, mesh: DeviceMesh | None = None):
        config = run.config
        self.run, self.config, self.out, self.lock, self.dry = run, config, out, lock, run.dry
        self.main = distributed.is_main()
        self.began = time.perf_counter()
        self.scale = optim.linear_scale(config.optim, run.samples_per_step)
        self.optimizer = optim.build_optimizer(config.optim, (run.task, run.model, run.criterion))
        self.images = run.source.train().to(run.device)
        # Also to have what is wrong with the held-out images said before anything is written.
        held_out = run.source.val()
        if config.eval.ledger and (held_out is None or not len(held_out)):
            raise UserError(
                "eval.ledger=true reads gradients on held-out images, and none are held out: hold some out "
                "(source.val_fraction), or use eval.ledger=false"
            )
        run.views.measure(run.source)
        self.loader = Loader(
            self.images,
            run.batch_size,
            config.seed,
            config.workers,
            distributed.rank(),
            distributed.world_size(),
            config.worker_timeout,
        )
        self.total_steps = config.epochs * self.loader.steps_per_epoch
        self.last_step = min(self.total_steps, DRY_STEPS) if self.dry else self.total_steps
        self.log_every = min(config.log_every, max(self.total_steps // MIN_ROWS, 1))
        self.parts = parts(run.task, run.model, run.criterion)
        self.state = nn.ModuleDict({"task": run.task, "model": run.model, "criterion": run.criterion})
        self.online = Online(run, DRY_IMAGES if self.dry else None)
        self._key = random.fold(random.fold(torch.tensor(config.seed), distributed.rank()), _DRAWS)
        self.step = self.epoch = 0
        self.lr = 0.0
        self.example, flops = self._check()
        self.flops = flops * config.accumulate
        self._peak = peak(run.device, config.precision)
        self.sharded = self._sharded(mesh) if mesh is not None else None
        self.graphs = Graphs(run.model) if config.compile == "graphs" else None
        if config.compile is True and self.sharded is None:
            run.model.compile()
        self.results: dict[str, dict[str, float]] = {}
        self.first = run.first_evaluation
        self.stop = StopRequest()
        self.profile: Profile | None = None

    def _check(self) -> tuple[Loss, float]:
        """Asks each part once, so that what one of them answers wrongly is said before anything is written."""
        run, size = self.run, self.run.batch_size // self.config.accumulate
        sample = next(ordered(self.images, size, size)).to(run.device)
        few, num_global = sample[:2], getattr(run.views, "num_global", None)
        plain = run.views.center(few)
        with self.online.evaluating(), distributed.alone():
            return contract.check_step(run.task, run.model, run.criterion, sample, plain, self.progress(), num_global)

    def _sharded(self, mesh: DeviceMesh) -> Sharded:
        """Model and criterion in shards, and the optimiser over these."""
        step, run = Step(self.run.model, self.run.criterion), self.run
        if not run.model.own_batch_norm:
            step = distributed.with_common_batch_norm(step, run.device)
        sharded = Sharded(step, mesh, self.config.precision == "bf16", self.config.compile)
        self.optimizer = optim.build_optimizer(self.config.optim, (run.task, run.model, run.criterion))
        return sharded

    @cached_property
    def step_module(self) -> nn.Module | Sharded:
        """Model and criterion in one; DDP is made with the first step, when no process can fail alone any more."""
        if self.sharded is not None:
            return self.sharded
        module = Step(self.run.model, self.run.criterion)
        if self.config.parallel != "ddp" or distributed.world_size() == 1:
            return module
        if not self.run.model.own_batch_norm:
            module = distributed.with_common_batch_norm(module, self.run.device)
        devices = [self.run.device.index] if self.run.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Its successor in later versions of torch still copies the main process's buffers, once.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return nn.parallel.DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    @cached_property
    def log(self) -> RunLog:
        """The run's record, opened when it is first needed."""
        return RunLog(self.out if self.main else None, self.config.logger, self.config.plain())

    @property
    def seconds(self) -> float:
        """How long the run has taken, in all its sittings together."""
        return time.perf_counter() - self.began

    @property
    def bad_images(self) -> set[str]:
        """Names of the images that could not be read so far, training and held-out ones, by any process.

        All processes have to ask at once.
        """
        sets = (self.images, self.run.source.val())
        return distributed.union({name for images in sets if images is not None for name in images.bad})

    def record(self) -> dict[str, Any]:
        """What `results.json` says: the results, and how long (`seconds`) and how far (`step`) the run went."""
        return {**self.results, "seconds": self.seconds, "step": self.step}

    def progress(self) -> Progress:
        """The run's position, as parts see it. The epoch is the one being trained, in its last hooks too."""
        return Progress(self.step, self.epoch, self.total_steps, self.config.epochs, self.config.seed)

    def context(self) -> Context:
        """What hooks may use."""
        return Context(self.progress(), self._collect, lambda p: self.optimizer.state.pop(p, None))

    def _collect(self, *arguments: Any) -> Tensor:
        with self.sharded.in_step() if self.sharded is not None else nullcontext():
            return self.online.collect(*arguments)

    def gathered(self) -> AbstractContextManager[None]:
        """Where all processes enter it at once, each has all weights, and may run the model alone."""
        return self.sharded.gathered() if self.sharded is not None else nullcontext()

    # The loop

    def fit(self) -> dict[str, dict[str, float]]:
        """Trains to the end and returns the results. Raises Stopped after a signal, UserError on a bad loss."""
        with self.stop, closing(self._terminal()) as terminal, closing(self.loader):
            if self.first not in self.results and not self.dry:
                self._evaluate(self.first)
                self.save()
            with self.profile or nullcontext():
                while self.step < self.last_step:
                    self._epoch(terminal)
            if "trained" not in self.results:
                self._evaluate("trained")
                self.save()
            self.settle()
        return self.results

    def _epoch(self, terminal: Terminal) -> None:
        """Trains from where the run stands to the end of the epoch."""
        self.epoch, start = divmod(self.step, self.loader.steps_per_epoch)
        with closing(on_device(self.loader.epoch(self.epoch, start), self.run.device)) as batches:
            sample, waiting, _ = self._next(batches)
            if start == 0:
                self._seed()
                self._set_schedules()
                self._hook("on_epoch_start")
            while sample is not None:
                began = time.perf_counter()
                row = self.train_step(sample)
                seconds = waiting + time.perf_counter() - began
                terminal.update(self.step, self.epoch + 1, row["loss"], seconds, waiting)
                if self.profile is not None:
                    self.profile.step()
                logged = self.step % self.log_every == 0 or self.step == self.last_step
                row |= self._speeds(terminal.images, seconds, waiting)
                sample, waiting, asked = self._next(batches, row if logged else None)
                if self.step == self.last_step:
                    break
                if self.step % self.loader.steps_per_epoch:
                    self._checkpoint(self._due(), asked)
        # A checkpoint of the epoch's last step holds what these have done.
        self._hook("on_epoch_end")
        done, checkpoints = self.epoch + 1, self.config.checkpoint
        if done % self.config.eval.every_epochs == 0 and self.step < self.last_step:
            self._evaluate()
        kept = f"epoch_{done:05d}.pt" if checkpoints.keep and done % checkpoints.keep == 0 else None
        due = done % checkpoints.every_epochs == 0 or self.step == self.last_step or self._due()
        self._checkpoint(due or kept is not None, distributed.largest(self.stop.signum), kept)

    def _next(self, batches: Iterator[Sample], row: dict[str, float] | None = None) -> tuple[Sample | None, float, int]:
        """Writes the row of the step before, and gets the next batch of the epoch, None after its last one.

        With it come the seconds that it took, and the signal by which any process was asked to stop, or 0. Where a
        process can do either no more, all of them save and end.
        """
        began = time.perf_counter()
        try:
            with distributed.together(self.stop.signum) as largest:
                if row is not None:
                    self._write(row)
                heartbeat.at(self.step, "the wait for images")
                with self._phase("data"):
                    sample = next(batches, None)
                waiting = time.perf_counter() - began
            return sample, waiting, largest.value
        except Exception as error:
            # Between two steps the state is whole, but for what the epoch's end still has to do after its last one.
            if row is not None and self.step % self.loader.steps_per_epoch == 0:
                raise
            self.save()
            self.settle()
            if isinstance(error, UserError) and not isinstance(error, EndedElsewhere) and self.out is not None:
                raise UserError(f"{error}. Saved at step {self.step}; continue with --resume") from error
            raise

    def train_step(self, sample: Sample) -> dict[str, float]:
        """One optimiser step on one batch, in `accumulate` micro-batches. Returns the row to log.

        Its numbers are means over micro-batches and processes. Raises UserError where loss or gradient is not finite.
        """
        run, count = self.run, self.config.accumulate
        size = len(sample) // count
        self._seed()
        self._set_schedules()
        self.state.train()
        self.optimizer.zero_grad(set_to_none=True)
        if self.graphs is not None:
            self.graphs.begin_step()
        progress, sums = self.progress(), {}
        for i in range(count):
            with self._phase("views"):
                batch = run.task.prepare(sample[i * size : (i + 1) * size], progress)
            with self._sync(last=i == count - 1):
                with self._phase("forward"), self.online.autocast():
                    outputs, loss = self.step_module(batch, progress)
                with self._phase("backward"):
                    (loss.total / count).backward()
            for key, value in _scalars(loss, run.device).items():
                sums[key] = sums.get(key, 0.0) + value / count
            self._hook("after_forward", detached(outputs), batch, detached(loss.terms))
        self._hook("before_step")
        with self._phase("optimiser"):
            sums["gradient_norm"] = optim.clip_gradients(
                self.optimizer, self.config.optim.clip, self.config.optim.clip_mode
            ).double()
        # The step's only wait for the device. One bad process makes the mean bad, so all of them stop together.
        with self._phase("waiting"):
            means = distributed.all_reduce_mean(torch.stack(list(sums.values()))).tolist()
        row = {**dict(zip(sums, means, strict=True)), "lr": self.lr}
        self._check_finite(row, sample, sums["loss"])
        with self._phase("optimiser"):
            self.optimizer.step()
        self.step += 1
        self._hook("after_step")
        return row

    @contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        """Gradients cross processes once a step, with the last micro-batch."""
        if last or not isinstance(self.step_module, nn.parallel.DistributedDataParallel):
            yield
        else:
            with self.step_module.no_sync():
                yield

    def _hook(self, name: str, *arguments: Any) -> None:
        context = self.context()
        with torch.no_grad(), self._phase("hooks"):
            for part in self.parts:
                getattr(part, name)(*arguments, context)

    def _phase(self, name: str) -> AbstractContextManager[None]:
        """What a step is doing, for the profile and for other processes that wait."""
        heartbeat.at(self.step, name)
        return nullcontext() if self.profile is None else self.profile.phase(name)

    def _seed(self) -> None:
        """Makes what a model or a hook draws for itself (dropout, drop path) a function of the step and the process.

        So neither an evaluation nor a stop can move it, and no generator's state needs saving.
        """
        torch.manual_seed(int(random.fold(self._key, self.step)))

    def _set_schedules(self) -> None:
        """Gives every scheduled number, the learning rate and the weight decay their value for the coming step."""
        epoch = self.step / self.loader.steps_per_epoch
        for owner, attribute, schedule in self.run.schedules:
            setattr(owner, attribute, schedule.at(epoch, self.config.epochs))
        self.lr = optim.set_rates(self.optimizer, self.config.optim, self.scale, epoch, self.config.epochs)

    # Watching

    def _terminal(self) -> Terminal:
        images = self.run.batch_size * distributed.world_size()
        return Terminal(self.step, self.last_step, self.config.epochs, images, self.main)

    def _speeds(self, images: int, seconds: float, waiting: float) -> dict[str, float]:
        """How fast a step was; `mfu` is the share of the device's products that the model used, where that is known."""
        used = {} if self._peak is None else {"mfu": self.flops / seconds / self._peak}
        return {"images_per_s": images / seconds, "data_share": waiting / seconds, **used}

    def _write(self, row: dict[str, float]) -> None:
        """Adds a row to the record; to be called inside `distributed.together`, as it may fail in one process."""
        self._check_folder()
        self.log.write({"step": self.step, "epoch": self.step / self.loader.steps_per_epoch, **row})

    def _evaluate(self, name: str | None = None) -> None:
        """kNN and health now, by all processes; `name` keeps them among the run's results."""
        self._set_schedules()
        heartbeat.at(self.step, "the evaluation")
        with self.gathered(), distributed.together():
            metrics = self.online.evaluate(self.progress(), name == "trained", name is not None)
            if name is not None:
                self.results[name] = metrics
            if name == self.first:
                self.results["raw_pixels"] = self.online.raw_pixels()
            if name == "trained":
                self.results["chance"] = self.online.chance()
            self._write(metrics)
        if self.main:
            hidden = ("held_out/", "information/", "ledger/")
            shown = {k: v for k, v in metrics.items() if not k.startswith(hidden) or k == "held_out/loss"}
            say(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in shown.items()))
            if asked := ledger.summary(metrics):
                say(f"the encoder's gradient: {asked}")

    # Trouble

    def _check_finite(self, row: dict[str, float], sample: Sample, loss: Tensor) -> None:
        """Stops a run that is lost before the bad gradient reaches the weights; `loss` is this process's own.

        The main process says it. Nothing is saved: the step is half done, and the last checkpoint leads to it again,
        bit for bit.
        """
        lost = [name for name in ("loss", "gradient_norm") if not math.isfinite(row[name])]
        if not lost:
            return
        terms = {key.removeprefix("loss/"): value for key, value in row.items() if key.startswith("loss/")}
        bad = [name for name, value in terms.items() if not math.isfinite(value)] or lost
        values = ", ".join(f"{name}={value:.4g}" for name, value in terms.items())
        message = f"the {'loss' if 'loss' in lost else 'gradient'} is no longer finite at step {self.step}: "
        message += f"{', '.join(bad)} ({values}); learning rate {self.lr:.3g}"
        index = distributed.gather(sample.index).tolist()
        finite = distributed.gather(loss.isfinite().long()[None]).tolist()
        if 0 < sum(finite) < len(finite):
            message += f"; in process {', '.join(str(number) for number, ok in enumerate(finite) if not ok)} alone"
        with distributed.together():
            if not self.main:
                return
            if self.out is not None:
                path = self.out / "bad_batch.txt"
                path.write_text("".join(f"{i}\n" for i in index))
                message += f". The batch's image numbers are in {path}"
                message += f", the last good checkpoint is {checkpoint.last(self.out / 'checkpoints')}"
            raise UserError(message)

    # Saving

    def _due(self) -> bool:
        every = self.config.checkpoint.every_steps
        return every is not None and self.step % every == 0

    def _checkpoint(self, due: bool, asked: int, keep_as: str | None = None) -> None:
        """Saves where that is due, or where a process was asked to stop; then all of them stop at this step.

        asked: the signal by which any process was asked to, the same in all of them; 0 where none was.
        """
        saved = self.save(keep_as) if due or asked else None
        if asked:
            self.settle()
            raise Stopped(asked, saved, self.step)

    def _check_folder(self) -> None:
        """Ends the run where its folder was deleted or renamed."""
        if self.lock is not None:
            self.lock.check()

    def save(self, keep_as: str | None = None) -> Path | None:
        """Writes the checkpoint (nothing without a folder), and says where. All processes come here at once.

        Of a sharded run all processes write, and go on meanwhile: `settle` waits for them.
        """
        if self.out is None:
            return None
        heartbeat.at(self.step, "the save")
        with distributed.together():
            state = self._state() if self.main or self.sharded is not None else None
            if self.sharded is None:
                return checkpoint.save(state, self.out / "checkpoints", keep_as) if self.main else None
        return self._writer.save(state, self.out / "checkpoints", keep_as)

    def settle(self) -> None:
        """Waits for a checkpoint that is being written. Raises UserError where that has failed."""
        if self.sharded is not None and self.out is not None:
            self._writer.wait()

    @cached_property
    def _writer(self) -> shards.Writer:
        return shards.Writer()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds. Raises UserError where that is no longer finite."""
        state = {
            "step": self.step,
            "images": len(self.images),
            "fingerprint": self._fingerprint,
            "parts": self.state.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "results": self.results,
            "seconds": self.seconds,
            "config": self.config.plain(),
            "backbones": self._backbones,
            "rows": self.log.count,
        }
        # A save stops the step for this: each tensor is read once.
        parameters = {name for name, _ in self.state.named_parameters()}
        if spoiled := _some([*self._infinite(), *checkpoint.not_numbers(state, but=parameters)]):
            last = checkpoint.last(self.out / "checkpoints")
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint"
            raise UserError(
                f"the run's state is no longer finite at step {self.step}: {spoiled}; learning rate {self.lr:.3g}. "
                f"Nothing was saved; {good}"
            )
        self.log.sync()
        self._check_folder()
        return state

    @torch.no_grad()
    def _infinite(self) -> list[str]:
        """The parameters that are not finite; of a sharded one this process knows its own rows."""
        own = {name: distributed.local(parameter) for name, parameter in self.state.named_parameters()}
        return [name for name, rows in own.items() if not checkpoint.extremes(rows).isfinite().all()]

    @cached_property
    def _fingerprint(self) -> dict[str, int]:
        """What tells the training images from others, by which a resumed run sees that they are the same."""
        return self.images.fingerprint()

    @cached_property
    def _backbones(self) -> dict[str, dict[str, Any]]:
        """What is needed to rebuild the encoders from a checkpoint alone."""
        return in_checkpoint(self.run)

    def restore(self, state: dict[str, Any], accept_changed_images: bool = False) -> None:
        """Continues from a checkpoint. Raises UserError where it was saved on other images or other parts.

        accept_changed_images: say which of their names, sizes and labels are others, and go on; their number has to be
        the same in any case.
        """
        held_out, unlabelled = self.run.source.val(), bool((self.images.labels < 0).all())
        # An earlier version's name for it stays.
        self.first = next(name for name in FIRST if name in state["results"])
        first = state["results"][self.first]
        advice = f"in {self.out}/config.yaml, and resume with {self.out} as the recipe"
        # Other images may be held out where the same folders are no classes any more; one class alone changes nothing.
        if unlabelled and first.get("knn/top1", 1.0) < 1.0:
            raise UserError(
                f"--resume: the run began with labels, and now there are none: set source.labels to folders {advice}"
            )
        if unlabelled and held_out is not None and "held_out/loss" not in first:
            raise UserError(
                f"--resume: the run began without held-out images, and now there are {len(held_out)}: set "
                f"source.val_fraction to 0 {advice}"
            )
        if state["images"] != len(self.images):
            raise UserError(
                f"--resume: the run was trained on {state['images']} images, and now there are {len(self.images)}"
            )
        # An earlier version knew the labels alone.
        former = state.get("fingerprint") or ({"labels": state["labels"]} if "labels" in state else {})
        now = self._fingerprint
        if changed := [what for what, value in former.items() if now.get(what, value) != value]:
            others = f"the training images have other {' and '.join(sorted(changed))}, or another order, than before"
            if not accept_changed_images:
                raise UserError(
                    f"--resume: {others}: the run would go on with other data. Put back what was there, or accept it "
                    "with --accept-changed-images"
                )
            if self.main:
                say(f"resumed, as was asked, though {others}")
        try:
            state = self.sharded.placed(state, self.state, self.optimizer) if self.sharded else shards.whole(state)
            self.state.load_state_dict(state["parts"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch raises anything where a key is missing or a value of another type.
            raise UserError(
                f"--resume: the checkpoint fits the parts no more; has their code changed? {error}"
            ) from None
        # Whether it holds NaN was seen when it was chosen.
        if spoiled := _some(self._infinite()):
            raise UserError(f"--resume: the checkpoint is not finite: {spoiled}")
        self.step, self.results = state["step"], state["results"]
        self.began -= state["seconds"]
        self.log.truncate(self.step, state.get("rows", 0) if self.main else 0)


def _some(names: list[str]) -> str:
    """The first three of the names, each once, and how many more there are; "" for none."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _scalars(loss: Loss, device: torch.device) -> dict[str, Tensor]:
    """A loss as metrics: the total, each term, and each weighted term; float64 on `device`."""
    terms = {name: term.detach().to(device, torch.float64) for name, term in loss.terms.items()}
    return {
        "loss": loss.total.detach().double(),
        **{f"loss/{name}": value for name, value in terms.items()},
        **{f"weighted/{name}": terms[name] * weight for name, weight in loss.weights.items()},
    }

"""The project as a library: `train` resolves a recipe, trains it in this process and returns the finished run."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__, distributed, ops, pretrained, sharding
from .config.config import Config, configure, differences
from .data.sources.layout import label_lines
from .device import choose_device
from .errors import UserError
from .flops import peak
from .heartbeat import Heartbeat, at
from .initialise import initialise
from .pretrained import Backbone
from .record import artifacts, folder
from .record.about import peak_memory, write_about
from .record.profile import Profile
from .record.signals import Stopped
from .record.terminal import say
from .report.write import report_of_run
from .run import build_run
from .trainer import Trainer

_logger = logging.getLogger(__name__)
#: Keys that may be others on another machine.
OF_MACHINES = ("device", "workers", "worker_timeout", "process_timeout")
#: Type checkers do not know its switch.
_deterministic: Any = torch.utils.deterministic


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    results:   what `results.json` holds: the evaluations `untrained` (`initial` where the run started from given
               weights), `raw_pixels`, `trained` and `chance`, each metrics by name, then `seconds` and `step`.
    metrics:   the rows of `metrics.jsonl`, oldest first.
    backbones: the trained encoders, on the CPU, as `ssl_ib.load` gives them, by name; most models have one or none.
    out:       the run's folder, or None where nothing was written.
    """

    results: dict[str, Any]
    metrics: list[dict[str, Any]]
    backbones: dict[str, Backbone]
    out: Path | None

    @property
    def backbone(self) -> Backbone | None:
        """The trained encoder; None where the model exports none, or several, which `backbones` has."""
        return next(iter(self.backbones.values())) if len(self.backbones) == 1 else None


def train(
    recipe: str | Path,
    *overrides: str,
    out: str | Path | None = None,
    plugins: str | Iterable[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    auto_resume: bool = False,
    accept_changed_images: bool = False,
) -> TrainedRun:
    """Trains a recipe in this process, as `ssl-ib-train` does, and returns the finished run.

    recipe:    a shipped name, a path, or a run's folder.
    overrides: texts `KEY=VALUE`, as on the command line: "epochs=5", "masker=block", "device=cpu".
    out:       the run's folder, with all that the command leaves in it. None: nothing is written to the disk, and the
               finished run is in memory alone.
    plugins:   files, package folders or modules that register parts. Parts that the calling code has registered itself
               are there already; but only plugins are remembered by the folder, for `resume` and the command.
    resume:    continue the run in `out` from its last checkpoint.
    overwrite: remove what an earlier run left in `out`.
    auto_resume: continue the run in `out`, or start it where there is none.
    accept_changed_images: continue it though names, sizes or labels of the training images are others than before.

    Raises UserError, and ConfigError with all that is wrong in a configuration, before anything is written. On Ctrl-C
    or SIGTERM the run saves itself first (where it has a folder), and then the caller's own handler gets the signal:
    as a rule, Ctrl-C ends in KeyboardInterrupt. Outside the main thread signals are left alone.

    The same recipe, overrides and seed give the same numbers, however often it is called. torch's random state, its
    switches for deterministic algorithms and the choice of `ssl_ib.ops` are put back at the end. One thing stays: on a
    GPU, CUBLAS_WORKSPACE_CONFIG is set in the environment where it was not.
    """
    out = None if out is None else Path(out)
    asked = {"resume": resume, "overwrite": overwrite, "auto_resume": auto_resume}
    wanted = [name for name, given in asked.items() if given]
    if len(wanted) > 1:
        raise UserError(f"{' and '.join(wanted)} exclude each other: give one of them")
    if accept_changed_images and not (resume or auto_resume):
        raise UserError("accept_changed_images is for resume, which compares the images with those of before")
    if out is None and wanted:
        raise UserError(f"{wanted[0]} is about a run's folder: give out as well")
    for text in overrides:
        if not isinstance(text, str):
            raise UserError(f"expected overrides as texts KEY=VALUE, such as 'optim.lr=1e-3', got {text!r}")
    plugins = [plugins] if isinstance(plugins, str) else plugins
    # A warning is shown also where the caller has set up no logging.
    config = configure(str(recipe), overrides, plugins, say=_logger.warning)
    with _callers_state():
        try:
            trainer, _ = pretrain(
                config, out, started=_say_labels, accept_changed_images=accept_changed_images, **asked
            )
            return TrainedRun(trainer.record(), trainer.log.rows(), pretrained.of_run(trainer.run), out)
        except Stopped as stop:
            stopped = stop
        finally:
            distributed.shutdown()
    saved = f"; saved {stopped.saved}, continue with resume=True" if stopped.saved else ""
    _logger.warning("stopped by %s%s", stopped, saved)
    signal.raise_signal(stopped.signum)
    raise stopped  # The caller's handler has let it pass, but there is no finished run to return.


def _say_labels(trainer: Trainer) -> None:
    if trainer.run.start:
        say(f"init: {trainer.run.start}")
    notes = getattr(trainer.run.source, "notes", ())
    say("labels: " + "; ".join(label_lines(trainer.images, notes)))


@contextmanager
def _callers_state() -> Iterator[None]:
    """Puts back, at the end, what a run changes of the process."""
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _deterministic.fill_uninitialized_memory
    # The seed reaches every GPU that is in use.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), ops.use_backend("auto"):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
            _deterministic.fill_uninitialized_memory = filled


def _check_alike(config: Config) -> None:
    """Raises UserError where a process has another configuration than the main one, or other code, and says what."""
    code = hashlib.sha256()
    files = [*Path(__file__).parent.rglob("*.py"), *(Path(name) for name in config.plugins if Path(name).is_file())]
    for file in sorted(files):
        code.update(file.read_bytes())
    mine = {key: value for key, value in config.plain().items() if key not in OF_MACHINES}
    mine["code of ssl_ib and plugins"] = f"{__version__}, {code.hexdigest()[:12]}"
    mine["torch"] = torch.__version__
    mains = distributed.from_main(mine)
    with distributed.together():
        if changed := differences(mains, mine):
            raise UserError(
                f"process {distributed.rank()} does not run what process 0 runs, and they share one run: "
                f"{'; '.join(changed)}. Start all of them with the same command, in the same version"
            )


def pretrain(
    config: Config,
    out: Path | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    auto_resume: bool = False,
    dry: bool = False,
    accept_changed_images: bool = False,
    profile: int | None = None,
    started: Callable[[Trainer], None] | None = None,
) -> tuple[Trainer, list[str]]:
    """Trains a resolved configuration to its end, for `train` and for the command.

    out:     the run's folder; None: nothing is written.
    accept_changed_images: resume though names, sizes or labels of the training images are others than before.
    dry:     cut down to two small steps and one evaluation.
    profile: watch so many steps, and write where their time goes into the folder.
    started: called in the main process when all was found right and the folder is the run's, before the first step.

    Returns the trainer and the closing lines, which only the main process of a run with a folder has. Raises UserError
    before anything is written, and Stopped when a signal has ended the run. Joins the processes that torchrun started;
    leaving them (`distributed.shutdown`) is for the caller.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and config.parallel == "none":
        raise UserError("several processes were started; say how they share the work: parallel=ddp, fsdp or hybrid")
    device = choose_device(config.device)
    if device.type == "cuda" and config.deterministic:
        # Deterministic matrix products need this before the first of them (cuBLAS, "Results reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        _deterministic.fill_uninitialized_memory = False
    distributed.initialise(device, config.process_timeout)
    _check_alike(config)
    mesh = sharding.mesh(config.parallel, device)
    # The folder stays locked as long as `held`.
    with ExitStack() as held:
        held.enter_context(Heartbeat(config.process_timeout, out))
        # Every process finds its arguments right and looks at the folder before one of them changes it.
        with distributed.together():
            lock = held.enter_context(folder.lock(out)) if out and distributed.is_main() else None
            if out and auto_resume:
                resume = folder.has_run(out)
            state = folder.examine(out, config, resume, overwrite) if out else None
            run = build_run(config, dry, resumed=state is not None)
            if state is None:
                # A run that is resumed has all its weights from the checkpoint.
                run.start = initialise(run) or ""
            trainer = Trainer(run, out, lock, mesh)
        main = distributed.is_main()
        with distributed.together():
            if out and state is None and main:
                folder.claim(out, config)
            if state is not None:
                trainer.restore(state, accept_changed_images)
        with closing(trainer.log):
            if main and started is not None:
                started(trainer)
            bad = trainer.bad_images
            if main and out:
                artifacts.write_environment(out, device)
                write_about(out, trainer.run, trainer.example)
                artifacts.record_bad_images(out, bad)
            if profile is not None and main and out:
                most = peak(device, config.precision)
                trainer.profile = Profile(profile, trainer.run.batch_size, trainer.flops, most, device, out / "profile")
            trainer.fit()
            at(trainer.step, "the record")
            bad = trainer.bad_images
            if lock is not None:
                lock.check()
            results = trainer.record()
            with trainer.gathered():
                if main and out:
                    artifacts.record_bad_images(out, bad)
                    write_about(out, trainer.run, trainer.example, peak_memory(device))
                    artifacts.draw(out, trainer.run, trainer.log.rows(), results, trainer.online.evaluating)
            lines = artifacts.finish(out, trainer.run, results) if out else []
            if main and out:
                report_of_run(out)
            return trainer, lines

"""One frozen, typed configuration a run: shipped defaults < recipe (and its `base`) < command line.

Every problem is reported at once. What is resolved here is printed, saved as `config.yaml`, and enough to repeat the
run: `ssl-ib-train runs/x/config.yaml --out elsewhere`.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Interval
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ..errors import ConfigError
from .hints import Count, NonNegative, Positive, PositiveInt, show
from .outside import DEEPEST, NotYaml, YamlDumper, parse_yaml, short, user_path
from .plugins import load_plugins, remembered
from .recipe import PARTS, Dropped, find_recipe, merge, named, read_recipe, without_dropped
from .registry import REGISTRIES, check_part, is_schedule, part_keys, problems_of
from .schedule import Schedule

_logger = logging.getLogger(__name__)


def _number(value: Any) -> Any:
    if is_schedule(value):
        problems: list[str] = []
        schedule = Schedule.parse(value, "schedule", problems)
        if schedule is None:
            raise ValueError("a valid schedule: " + "; ".join(problems))
        if min(schedule.start, schedule.end) < 0:
            raise ValueError("a schedule of numbers of at least 0")
        return schedule.spec()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("a number of at least 0, or a schedule {from: .., to: .., shape: ..}")
    return float(value)


#: A number of at least 0 or a schedule of it, as plain data.
Number = Annotated[Any, PlainValidator(_number), "float >= 0, or a schedule {from: .., to: .., shape: ..}"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OptimConfig(Section):
    """The optimiser, by timm's name (its `sgd` is Nesterov's; `momentum` is the plain one).

    lr is used as it stands, or with `linear_scaling` as the base rate of lr x batch_size x samples_per_image / 256.
    It warms up linearly from `start_lr` and then follows `shape`: cosine goes down to `min_lr`, step multiplies by
    `gamma` at each of the epochs `milestones`, constant stays. The cosine begins where the warm-up ends; with
    cosine_from=start it begins with the run, and the warm-up climbs to where the cosine is by then. `start_lr` and
    `min_lr` are rates as they stand. A schedule in place of lr replaces both warm-up and shape.
    weight_decay never acts on biases and other 1-D parameters, whose rate is multiplied by `bias_lr_scale`.
    clip bounds the gradient's norm, over the whole model and over the whole criterion, or over each parameter. args go
    to the optimiser as they are.
    """

    name: str = "adamw"
    lr: Number = 1e-3
    linear_scaling: bool = False
    weight_decay: Number = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.9
    warmup_epochs: NonNegative = 0.0
    start_lr: NonNegative = 0.0
    min_lr: NonNegative = 0.0
    shape: Literal["cosine", "step", "constant"] = "cosine"
    cosine_from: Literal["warmup", "start"] = "warmup"
    milestones: tuple[NonNegative, ...] = Field((), validate_default=True)
    gamma: Positive = 0.1
    bias_lr_scale: Positive = 1.0
    clip: Positive | None = None
    clip_mode: Literal["part", "param"] = "part"
    args: dict[str, Any] = {}

    @field_validator("milestones")
    @classmethod
    def _belong_to_steps(cls, milestones: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if (info.data.get("shape") == "step") != bool(milestones):
            raise ValueError("the epochs at which shape=step lowers the rate, and none with another shape")
        return milestones

    @field_validator("cosine_from")
    @classmethod
    def _belongs_to_cosines(cls, cosine_from: str, info: ValidationInfo) -> str:
        if cosine_from == "start" and info.data.get("shape") != "cosine":
            raise ValueError("warmup, as there is no cosine with another shape")
        return cosine_from


class CheckpointConfig(Section):
    """When `checkpoints/last.pt` is written; every `keep`-th epoch's is kept beside it (0: none)."""

    every_epochs: PositiveInt = 1
    every_steps: PositiveInt | None = None
    keep: Count = 0


class LinearConfig(Section):
    """The linear probe on cached features at the end; `lr_scale=linear` multiplies the rate by batch_size / 256."""

    enabled: bool = True
    epochs: PositiveInt = 100
    lr: Positive = 0.2
    batch_size: PositiveInt = 1024
    lr_scale: Literal["raw", "linear"] = "raw"
    weight_decay: NonNegative = 0.0


PartSpec = Annotated[dict[str, Any], BeforeValidator(named), "a name, or {name: ..., KEY: VALUE}"]


class EvalConfig(Section):
    """The online evaluation: weighted kNN and representation health, on at most so many images of each split.

    source: another source whose images are scored with their labels, in place of the run's own, which health and the
    held-out loss are taken of in any case. ledger: also what each term of the loss asks of the encoder, by its gradient
    on held-out images.
    """

    every_epochs: PositiveInt = 10
    batch_size: PositiveInt = 256
    train_images: PositiveInt | None = 20000
    val_images: PositiveInt | None = None
    knn_k: PositiveInt = 20
    knn_temperature: Positive = 0.07
    linear: LinearConfig = LinearConfig()
    ledger: bool = False
    source: PartSpec | None = None


class OpsConfig(Section):
    """How the ops are computed: auto, reference, chunked, triton or cuda. `auto` says once what it chose."""

    backend: str = "auto"


class Config(Section):
    """A whole run. The six parts are `{name: ..., key: value}`, completed with their constructors' defaults.

    recipe names the run's folder. init names the weights that the encoder starts from: the folder of a run, a
    checkpoint of one, a file of weights under timm's names, or timm:NAME for timm's own, which are downloaded; heads
    are dropped and positions resampled. batch_size counts the images of an optimiser step over all processes;
    `accumulate` cuts it into so many forward passes of each. device is auto, cpu, cuda or cuda:N. workers decode
    streamed images, and one that gives nothing for `worker_timeout` seconds ends the run; log_every counts the steps
    from one row of `metrics.jsonl` to the next (a short run logs 20 rows at least), and logger says who gets a copy of
    the rows. compile has torch.compile make the model's kernels; graphs also records them in CUDA graphs, which a GPU
    replays without waiting for the host. deterministic takes, on CUDA, slower operations that give the same numbers
    every time. parallel is for processes that torchrun starts: with ddp each has all weights, with fsdp they share
    them, with hybrid those of a machine do (docs/scale.md); one for which the others have waited `process_timeout`
    seconds is named and ends the run. plugins are imported before the parts are looked up.
    """

    recipe: str
    task: PartSpec = {"name": "views"}
    model: PartSpec
    criterion: PartSpec
    masker: PartSpec = {"name": "none"}
    source: PartSpec = {"name": "digits"}
    views: PartSpec
    init: str | None = None
    epochs: PositiveInt = 100
    batch_size: PositiveInt = 256
    accumulate: PositiveInt = 1
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool | Literal["graphs"] = False
    deterministic: bool = True
    workers: Annotated[int, Interval(ge=0, le=1024)] = 2
    worker_timeout: Positive = 600.0
    process_timeout: Positive = 600.0
    log_every: PositiveInt = 1
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    ops: OpsConfig = OpsConfig()
    parallel: Literal["none", "ddp", "fsdp", "hybrid"] = "none"
    plugins: tuple[str, ...] = ()

    @field_validator("logger", mode="before")
    @classmethod
    def _is_a_list(cls, logger: Any) -> Any:
        if not isinstance(logger, list | tuple):
            raise ValueError("a list of tensorboard and wandb, such as [tensorboard] or []")
        return tuple(logger)

    @field_validator("compile", mode="before")
    @classmethod
    def _is_one_of_three(cls, compile: Any) -> Any:
        if not isinstance(compile, bool) and compile != "graphs":
            raise ValueError("true, false or graphs")
        return compile

    @field_validator("recipe")
    @classmethod
    def _names_a_folder(cls, recipe: str) -> str:
        path = user_path(recipe, "recipe")
        if not recipe.strip() or path.is_absolute() or ".." in path.parts:
            raise ValueError("a name for the run's folder below runs/")
        return recipe

    def plain(self) -> dict[str, Any]:
        """The configuration as plain data, fit for YAML."""
        return json.loads(self.model_dump_json())

    def yaml(self) -> str:
        """The configuration as it is printed and saved."""
        return yaml.dump(self.plain(), Dumper=YamlDumper, sort_keys=False, width=100)


def _path(key: str) -> list[str]:
    """A dotted key's steps; a part's `.name` means the part."""
    path = key.split(".")
    return path[:-1] if _in_part(path[:-1]) and path[-1] == "name" else path


def _in_part(path: list[str]) -> bool:
    """Whether the steps lead into a part: one of the six, or the source of the evaluation."""
    return path[:1] != [] and (path[0] in PARTS or path[:2] == ["eval", "source"])


def _laid_over(data: dict[str, Any], overrides: Iterable[tuple[str, Any]], problems: list[str]) -> dict[str, Any]:
    """A recipe's data with the overrides laid over it, one after the other."""
    data = dict(data)
    for key, value in overrides:
        _apply(data, key, value, problems)
    return data


def _apply(data: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    """Sets a dotted key in nested mappings."""
    path = _path(key)
    place = data
    for depth, step in enumerate(path[:-1]):
        below = place.get(step)
        below = {} if below is None else named(below) if _in_part(path[: depth + 1]) else below
        if not isinstance(below, dict):
            problems.append(f"{key}: {'.'.join(path[: depth + 1])} is {below!r}, which has no keys")
            return
        place[step] = dict(below)
        place = place[step]
    place[path[-1]] = merge(place.get(path[-1]), value, "source" if path == ["eval", "source"] else path[0])


def parse_overrides(overrides: Iterable[str], problems: list[str]) -> list[tuple[str, Any]]:
    """The keys and values of `KEY=VALUE` texts, the shallow keys first; appends what is wrong to `problems`."""
    parsed = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key):
            problems.append(f"expected KEY=VALUE, such as optim.lr=1e-3, got {short(text)}")
            continue
        if key.count(".") >= DEEPEST:
            problems.append(f"{short(key)}: a key of more than {DEEPEST} steps")
            continue
        try:
            parsed.append((key, parse_yaml(value)))
        except NotYaml as error:
            problems.append(f"{key}: expected a YAML value, got {short(value)}: {error.problem}")
    # A part is swapped before its keys are set, whatever the order on the command line.
    return sorted(parsed, key=lambda pair: len(_path(pair[0])))


def configure(
    recipe: str,
    overrides: Iterable[str] = (),
    plugins: Iterable[str] = (),
    say: Callable[[str], None] = _logger.info,
) -> Config:
    """The configuration of a run, after the plugins that the recipe remembers and the given ones were loaded.

    recipe: as `find_recipe` takes it; overrides: `KEY=VALUE` texts; plugins: as `load_plugins` takes them; say: called
    with a line for each plugin of the recipe's own, before it is imported, and for each value whose change dropped
    other arguments. Raises what `load_plugins` and `resolve` raise.
    """
    plugins = list(plugins)
    names = list(dict.fromkeys([*remembered(read_recipe(find_recipe(recipe))), *plugins]))
    return resolve(recipe, overrides, load_plugins(names, short(str(recipe)), plugins, say), say)


def resolve(
    recipe: str,
    overrides: Iterable[str] = (),
    plugins: Iterable[str] = (),
    say: Callable[[str], None] = _logger.info,
) -> Config:
    """The configuration of a run.

    recipe: as `find_recipe` takes it; overrides: `KEY=VALUE` texts; plugins: those loaded, the recipe's own among them,
    to be remembered; say: called with a line for each value whose change dropped other arguments.
    Raises ConfigError with every problem, or UserError where the recipe cannot be read.
    """
    path = find_recipe(recipe)
    dropped: list[Dropped] = []
    data = read_recipe(path, dropped=dropped)
    data.setdefault("recipe", path.stem)
    data |= {"plugins": list(plugins)} if plugins else {}
    problems: list[str] = []
    # What a recipe leaves to the defaults can be overridden key by key like anything else.
    defaults = {name: f.default for name, f in Config.model_fields.items() if name in PARTS and not f.is_required()}
    data = {**defaults, **data}
    parsed = parse_overrides(overrides, problems)
    data = _laid_over(without_dropped(data, _laid_over(data, parsed, []), dropped), parsed, problems)

    elsewhere = section_keys() + [key for kind in PARTS for key in part_keys(kind, data.get(kind), kind)]
    checked = dict(data)
    for kind in PARTS:
        if data.get(kind) is not None:
            checked[kind] = check_part(kind, data[kind], kind, problems, elsewhere)
    scored = data.get("eval")
    if isinstance(scored, dict) and scored.get("source") is not None:
        found = check_part("source", scored["source"], "eval.source", problems, elsewhere)
        checked["eval"] = {**scored, "source": found}
    try:
        config = Config.model_validate_json(json.dumps(checked, default=str))
    except ValidationError as error:
        problems += problems_of(error, "", _keys, elsewhere=elsewhere)
    if problems:
        raise ConfigError(problems)
    for line in filter(None, (one.line(config.plain()) for one in dropped)):
        say(line)
    return config


def _section(place: Iterable[str]) -> type[Section]:
    """A section, given the keys that lead to it."""
    section = Config
    for key in place:
        section = section.model_fields[key].annotation
    return section


def _keys(place: tuple[str, ...]) -> Iterable[str]:
    return _section(place).model_fields


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def section_keys(place: tuple[str, ...] = ()) -> list[str]:
    """The dotted keys of a section and of those in it, the shallow ones first (default: of the whole configuration)."""
    fields = _section(place).model_fields
    below = [key for name, f in fields.items() if _is_section(f.annotation) for key in section_keys((*place, name))]
    return [".".join((*place, name)) for name in fields] + below


def describe_key(key: str) -> str:
    """What `--describe KEY` prints of a dotted key that is no part, or of "config", which stands for all keys."""
    place = [] if key == "config" else key.split(".")
    hint = _section(place[:-1]).model_fields[place[-1]].annotation if place else Config
    if _is_section(hint):
        lines = [key, *(f"  {name}: {describe_field(hint, name, place)}" for name in hint.model_fields)]
    else:
        hint = _section(place[:-1])
        lines = [f"{key}: {describe_field(hint, place[-1])}"]
    return "\n".join([*lines, "", inspect.getdoc(hint), ""])


def describe_field(section: type[Section], name: str, place: Iterable[str] = ()) -> str:
    """Type and default of a section's key; place: the keys that lead to the section."""
    field = section.model_fields[name]
    if _is_section(field.annotation):
        return f"a section: --describe {'.'.join((*place, name))}"
    hint = show(typing.get_type_hints(section, include_extras=True)[name])
    return f"{hint}, {'required' if field.is_required() else f'default {field.default!r}'}"


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two plain configurations differ, as `key: old -> new`."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


assert set(PARTS) == set(REGISTRIES)

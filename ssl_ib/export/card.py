"""The model card of an exported encoder: what it is, how it is used, what it saw, and how well it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..config.outside import YamlDumper
from ..config.recipe import PARTS, read_recipe
from ..evals.results import FINGERPRINTS, Results, fingerprint_of_weights
from ..pretrained import Backbone
from ..record.results import read_results

#: What is shown of a line of evals.jsonl.
_COLUMNS = ("metric", "value", "spread", "chance")
#: The evaluations of a run itself, by their names in results.json.
_EVALUATIONS = {
    "chance": "chance",
    "raw_pixels": "raw pixels",
    "untrained": "untrained encoder",
    "initial": "encoder at the start",
    "trained": "this encoder",
}
#: What every card says, and no other README.
_SIGNED = "Exported by ssl_ib"


def is_export(folder: Path) -> bool:
    """Whether a folder has a model card of ours."""
    readme = folder / "README.md"
    return readme.is_file() and _SIGNED in readme.read_text(encoding="utf-8", errors="replace")


def card(
    backbone: Backbone, title: str, usage: str, run: Path | None, library: str | None, step: int | None = None
) -> str:
    """A README.md in the form that model hubs read.

    title:   of the encoder.
    usage:   lines of Python.
    run:     the folder of the run that it comes from; None where it comes from elsewhere.
    library: the hub's name of the library that loads it, if there is one.
    step:    how long the run had trained when the encoder was saved; None: to its end.
    """
    head = {"library_name": library} if library else {}
    head |= {"pipeline_tag": "image-feature-extraction", "tags": ["self-supervised", "ssl_ib"]}
    found = backbone.description
    sections = [
        f"---\n{yaml.dump(head, sort_keys=False).strip()}\n---",
        f"# {title}",
        f"An image encoder without a classifier: timm's `{found['model']}`, "
        f"{sum(p.numel() for p in backbone.model.parameters()):,} parameters, features of "
        f"{backbone.model.num_features} dimensions. {_SIGNED} {found['ssl_ib']}.",
        f"## Use\n\n```python\n{usage.strip()}\n```",
        f"## Preprocessing\n\n{_preprocessing(found)}",
        f"## Data and recipe\n\n{_origin(found, run)}",
        f"## Evaluations\n\n{_evaluations(backbone, run, step)}",
        "## Licence\n\nNone is stated here, neither for the weights nor for the data that they were trained on. "
        "Whoever passes this folder on has to find out both, and write them here.",
    ]
    return "\n\n".join(sections) + "\n"


def _preprocessing(found: dict[str, Any]) -> str:
    how = found["preprocessing"]
    if how is None:
        return "The views of its run prepare images in a way of their own: see the run's configuration."
    before = (
        f"Larger images are shrunk until their longer side has {how['max_side']} pixels. " if how["max_side"] else ""
    )
    resized = round(how["size"] / how["crop_ratio"])
    mean, std = (", ".join(f"{value:.4g}" for value in found[key]) for key in ("mean", "std"))
    return (
        f"{before}The shorter side is resized to {resized} pixels ({how['interpolation']}), {how['size']} x "
        f"{how['size']} pixels are cut from the centre (crop ratio {how['crop_ratio']:g}), and pixels in [0, 1] are "
        f"normalised with the mean ({mean}) and the standard deviation ({std})."
    )


def _origin(found: dict[str, Any], run: Path | None) -> str:
    if "origin" in found:
        origin = found["origin"]
        dropped = ", ".join(origin["dropped"]) or "nothing"
        return (
            f"Read from the published checkpoint `{origin['file']}` in the layout of {origin['layout']}; dropped: "
            f"{dropped}. What it was trained on is not in that file."
        )
    if run is None:
        return "Not known: the encoder was not exported from the folder of a run."
    config = read_recipe(run / "config.yaml")
    parts = {kind: _without_paths(config[kind]) for kind in PARTS if config.get(kind)}
    settings = {key: config[key] for key in ("epochs", "batch_size", "seed", "precision", "optim") if key in config}
    settings |= {"init": _without_paths(config["init"])} if config.get("init") else {}
    data = parts.pop("source")
    return (
        f"Data, without labels:\n\n```yaml\n{_yaml({'source': data})}```\n\nRecipe `{config['recipe']}`:\n\n"
        f"```yaml\n{_yaml(parts | settings)}```"
    )


def _without_paths(value: Any) -> Any:
    """The same with the last part of each absolute path alone: where files lie on one machine is nobody's business."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=YamlDumper, sort_keys=False)


def _evaluations(backbone: Backbone, run: Path | None, step: int | None) -> str:
    """Those of the run itself, where they are of this step, and those of these very weights in `evals.jsonl`."""
    sections = []
    content = read_results(run) if run is not None and (run / "results.json").is_file() else None
    if content is not None and step in (None, content["step"]):
        names = [name for name in _EVALUATIONS if content.get(name)]
        metrics = [
            key for key in content.get("trained", {}) if not key.startswith(("held_out/", "information/", "ledger/"))
        ]
        rows = [["metric", *(_EVALUATIONS[name] for name in names)]]
        rows += [[metric, *(_number(content[name].get(metric)) for name in names)] for metric in metrics]
        sections.append(f"On the run's own images, after {content['step']:,} steps:\n\n{_table(rows)}")
    if run is not None:
        weights = fingerprint_of_weights(backbone.model)
        lines = [line for line in Results(run / "evals.jsonl").lines if line["weights"] == weights]
        if lines:
            rows = [["protocol", "settings", *_COLUMNS]]
            rows += [
                [line["protocol"], _telling(line, lines), *(_number(line.get(key)) for key in _COLUMNS)]
                for line in lines
            ]
            sections.append(f"By ssl-ib-eval:\n\n{_table(rows)}")
    return "\n\n".join(sections) or "None."


def _telling(line: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """The settings of a result in which the results of its protocol differ."""
    others = [other["settings"] for other in lines if other["protocol"] == line["protocol"]]
    telling = {
        key: value
        for key, value in line["settings"].items()
        if key not in FINGERPRINTS and any(other.get(key) != value for other in others)
    }
    return ", ".join(f"{key}={value}" for key, value in _without_paths(telling).items())


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])

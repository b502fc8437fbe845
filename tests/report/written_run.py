"""Folders as runs and sweeps leave them, written without training, with something for every panel."""

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from ssl_ib.sweep.points import folder_name

#: A name from outside that must show as text.
EVIL = "<script>alert('x')</script>&"
TERMS = {
    "reconstruction": 1.0,
    "info_nce": 0.5,
    EVIL: 0.1,
    "dead_prototypes": None,
    "mi_nats": None,
    "mi_ceiling": None,
}


def write_run(folder: Path, steps: int = 40, seed: int = 0, finished: bool = True, **config) -> Path:
    """A run of `steps` logged steps in 4 epochs."""
    random = np.random.default_rng(seed)
    (folder / "info").mkdir(parents=True)
    given = {
        "recipe": EVIL,
        "model": {"name": "siamese", "backbone": "vit", "backbone_args": {"depth": 1}},
        "criterion": {"name": "info_nce", "temperature": 0.2},
        "source": {"name": "folder", "path": f"/data/{EVIL}"},
        "epochs": 4,
        "batch_size": 8,
        "seed": seed,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(given | config))
    (folder / "environment.json").write_text(json.dumps({"command": ["train", EVIL], "device": "cpu", "git": None}))
    about = {
        "images": {"train": 20, "held_out": 10},
        "classes": [EVIL, "cat"],
        "class_counts": {"train": [12, 8], "held_out": [5, 5]},
        "notes": ["from folders"],
        "parameters": {"all": 100, "trained": 90},
        "terms": TERMS,
        "nats": {"mi_nats": {"kind": "lower bound", "of": "what the two views share", "ceiling": "mi_ceiling"}},
        "start": "",
        "memory_of": "process",
        "peak_memory": 2**30,
    }
    (folder / "about.json").write_text(json.dumps(about))
    rows = [{"step": 0, "epoch": 0.0, **evaluation(0, random)}]
    for step in range(1, steps + 1):
        row = {"step": step, "epoch": 4 * step / steps, "loss": 5 / step + random.random()}
        row |= {f"loss/{term}": random.random() for term in TERMS}
        row |= {f"weighted/{term}": random.random() for term, weight in TERMS.items() if weight}
        rows.append(row | {"lr": 1e-3, "gradient_norm": 1.0, "images_per_s": 100.0, "data_share": 0.01})
    rows.append({"step": steps, "epoch": 4.0, **evaluation(1, random), "linear/top1": 0.7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        results = {"untrained": rows[0], "raw_pixels": {"knn/top1": 0.5}, "trained": rows[-1]}
        results |= {"chance": {"knn/top1": 0.5, "images": 10}, "seconds": 90.0, "step": steps}
        (folder / "results.json").write_text(json.dumps(results))
    table(folder / "info" / "probe.csv", probe())
    table(folder / "info" / "plane.csv", plane())
    result = {"protocol": "knn", "step": steps, "metric": "top1", "value": 0.8, "spread": 0.1, "spread_of": "10 images"}
    lines = [{**result, "settings": {"k": k, "source": {"path": EVIL}}, "chance": 0.5} for k in (1, 20)]
    (folder / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("reconstructions", "attention", "occupancy", "knn_confusion", "mine"):
        picture(folder / "figures" / f"{name}.png")
    return folder


def evaluation(done: int, random: np.random.Generator) -> dict[str, float]:
    found = {"knn/top1": 0.6 + 0.2 * done, "health/rankme": 3.0 + done, "held_out/loss": 4.0 - done}
    found |= {f"held_out/{term}": random.random() for term in TERMS}
    found |= {"information/labels": 0.3, "information/labels_error": 0.1, "information/labels_ceiling": 0.69}
    found |= {"ledger/norm": 1.0, "ledger/images": 10, "ledger/cosine/reconstruction/info_nce": -0.5}
    for term in ("reconstruction", "info_nce"):
        found |= {f"ledger/{term}/{end}": 0.5 for end in ("share", "norm", "depth_1", "depth_2")}
    return found


def probe() -> list[dict]:
    row = {"run": "a", "kind": "lower bound", "error": 0.05, "ceiling": 1.1, "levels": 3}
    return [
        {**row, "state": state, "factor": factor, "nats": nats}
        for state, values in (("untrained", (0.9, 0.1)), ("last", (0.3, 0.1)))
        for factor, nats in zip(("hue", EVIL), values, strict=True)
    ]


def plane() -> list[dict]:
    row = {"run": "a", "sigma": 0.1, "error": 0.01, "images": 10, "draws": 3, "remark": ""}
    return [
        {**row, "state": state, "step": step, "epoch": step, "quantity": quantity, "kind": "estimate", "value": value}
        | {"ceiling": 2.3}
        for state, step, values in (("untrained", 0, (1.5, 0.2)), ("last", 4, (1.0, 0.6)))
        for quantity, value in zip(("I(X;Z)", "I(Z;Y)"), values, strict=True)
    ]


def table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def picture(path: Path, width: int = 40, height: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)


def write_sweep(folder: Path, axes: dict[str, list[str]], seeds: tuple[int, ...] = (0, 1)) -> Path:
    """A sweep over one axis or the product of several, whose last run has failed before its first step."""
    folder.mkdir()
    rows = []
    for labels in product(*axes.values()):
        for seed in seeds:
            write_run(folder / folder_name(list(axes), labels) / f"seed_{seed}", seed=seed)
            numbers = {"knn/top1": 0.5 + 0.01 * len(rows), "held_out/mi_nats": 1.0, "seconds": 60.0}
            rows.append({**dict(zip(axes, labels, strict=True)), "seed": seed, "status": "done", **numbers})
    rows.append({**rows[-1], "seed": 9, "status": "failed", "knn/top1": "", "held_out/mi_nats": "", "seconds": ""})
    table(folder / "results.csv", rows)
    (folder / "sweep.yaml").write_text(
        yaml.safe_dump({"recipe": EVIL, "overrides": {}, "command": f"ssl-ib-sweep {EVIL}"})
    )
    return folder

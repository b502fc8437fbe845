"""Sweeps as `ssl-ib-sweep` leaves them, with numbers of the tests' own."""

import csv
import json
from pathlib import Path

import yaml

from ssl_ib.sweep.points import folder_name

CONFIG = {
    "model": {"name": "siamese", "head_dim": 8},
    "criterion": {"name": "info_nce", "temperature": 0.2},
    "source": {"name": "digits"},
    "batch_size": 64,
    "eval": {"source": None, "train_images": None, "val_images": None},
}


def write(out: Path, axes, runs) -> Path:
    """runs: (labels, seed, numbers of the trained encoder or None for one that waits, changes of CONFIG)."""
    out.mkdir(parents=True)
    (out / "sweep.yaml").write_text("recipe: tiny\noverrides: {}\ncommand: none\n")
    names = list(dict.fromkeys(name for _, _, numbers, _ in runs for name in numbers or ()))
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*axes, "seed", "status", *names])
        for labels, seed, numbers, _ in runs:
            status = "waiting" if numbers is None else "done"
            writer.writerow([*labels, seed, status, *((numbers or {}).get(name, "") for name in names)])
    for labels, seed, numbers, changes in runs:
        if numbers is None:
            continue
        folder = out / folder_name(axes, labels) / f"seed_{seed}"
        folder.mkdir(parents=True)
        chance = {"knn/top1": 0.1, "images": 2000}
        results = {"untrained": {}, "raw_pixels": {}, "trained": numbers, "chance": chance, "seconds": 60.0, "step": 4}
        (folder / "results.json").write_text(json.dumps(results))
        settings = dict(zip(axes, labels, strict=True))
        (folder / "config.yaml").write_text(yaml.dump(CONFIG | {"views": settings, "seed": seed} | changes))
    return out


def curve(out: Path, points, axis="views.scale", seeds=(0, 1, 2), spread=0.001, **changes) -> Path:
    """points: (label, I_NCE, kNN) of the mean over seeds, whose numbers go up by `spread` from below it to above."""
    runs = []
    for seed in seeds:
        for label, mi, knn in points:
            off = spread * (seed - (len(seeds) - 1) / 2)
            numbers = {"held_out/mi_nats": mi + off, "held_out/mi_ceiling": 4.8520302639, "knn/top1": knn + off}
            runs.append(((label,), seed, numbers | {"held_out/loss": 4.85 - mi, "health/rankme": 5.0}, changes))
    return write(out, [axis], runs)

"""Accuracy against training time of a run's folder, and how long the rest of it would take.

    python tools/speedrun_table.py runs/simclr_resnet18_cifar10

Time is that of the steps, from the logged rates; evaluations, checkpoints and starts are not in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

import yaml


def table(folder: Path) -> str:
    """The table of a run that has logged some steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    batch, epochs = config["batch_size"], config["epochs"]
    lines, seconds, step, rates = [f"{'epoch':>6} {'minutes':>8} {'kNN':>7} {'images/s':>9}"], 0.0, 0, []
    for row in rows:
        if "images_per_s" in row:
            seconds += (row["step"] - step) * batch / row["images_per_s"]
            step = row["step"]
            rates.append(row["images_per_s"])
        if "knn/top1" in row:
            rate = f"{median(rates):>9.0f}" if rates else ""
            lines.append(f"{row['epoch']:>6.0f} {seconds / 60:>8.1f} {row['knn/top1']:>7.4f} {rate}".rstrip())
    done = rows[-1]["epoch"]
    if rates and done < epochs:
        whole = seconds / done * epochs / 60
        so_far = f"{done:.2f} of {epochs} epochs after {seconds / 60:.1f} minutes"
        lines.append(f"{so_far}; a projection, not a measurement, for all of them: {whole:.0f} minutes")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit(f"{__doc__}\nspeedrun_table.py: expected the folder of a run")
    print(table(Path(sys.argv[1])))

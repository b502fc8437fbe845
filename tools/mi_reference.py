"""Writes what benchmark-mi publishes of some of its tasks to tests/info/benchmark_mi.json, which our tests read.

benchmark-mi needs jax, so that it runs in an environment of its own, without this package:

    python -m venv bmi && bmi/bin/pip install benchmark-mi "jax==0.4.30" "jaxlib==0.4.30" "numpy<2"
    bmi/bin/python tools/mi_reference.py

For each task it writes the true mutual information in nats, and what tells its distribution from others: the median of
|x| and |y| in their first and last coordinates, and Spearman's correlation of x_1 with y_1 and of |x_1| with |y_1|, all
of 20,000 samples.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import bmi
import numpy as np
from scipy.stats import spearmanr

TASKS = [
    "1v1-normal-0.75",
    "multinormal-dense-5-5-0.5",
    "multinormal-sparse-5-5-2-2.0",
    "half_cube-multinormal-sparse-3-3-2-2.0",
    "spiral-multinormal-sparse-3-3-2-2.0",
    "student-identity-3-3-2",
    "asinh-student-identity-3-3-2",
]
SAMPLES = 20_000
FILE = Path(__file__).resolve().parents[1] / "tests" / "info" / "benchmark_mi.json"


def main() -> None:
    tasks = {}
    for name in TASKS:
        task = bmi.benchmark.BENCHMARK_TASKS[name]
        x, y = (np.asarray(side, dtype=np.float64) for side in task.sample(SAMPLES, seed=0))
        medians = [float(np.median(np.abs(side[:, place]))) for side in (x, y) for place in (0, -1)]
        ranks = [float(spearmanr(f(x[:, 0]), f(y[:, 0])).statistic) for f in (np.asarray, np.abs)]
        tasks[name] = {
            "dim_x": task.dim_x,
            "dim_y": task.dim_y,
            "nats": round(float(task.mutual_information), 6),
            "medians": [round(value, 3) for value in medians],
            "spearman": [round(value, 3) for value in ranks],
        }
    versions = {name: version(name) for name in ("benchmark-mi", "jax", "numpy", "scipy")}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(task)}" for name, task in tasks.items())
    head = f'"versions": {json.dumps(versions)},\n "samples": {SAMPLES}'
    FILE.write_text(f'{{{head},\n "tasks": {{\n{lines}\n }}}}\n')
    print(f"wrote {FILE.name}: {len(tasks)} tasks")


if __name__ == "__main__":
    main()

"""Times and scores our estimators of mutual information against torch-mist's, on the same samples.

torch-mist needs numpy below 2, so that it runs in an environment of its own, in a second process:

    python -m venv mist && mist/bin/pip install torch_mist torch "numpy<2" "pandas<3"
    python tools/bench_mi.py --peer mist/bin/python --dim 4 --samples 2048 --mi 2

Both get the same pairs in the same parts: 60 % to train on, 20 % to stop by, 20 % to read on, read all at once.
torch-mist trains with its own defaults (Adam, learning rate 5e-4, batches of 128, at most 5,000 steps, its early
stopping) and networks of the same two hidden layers of 128. The error is the root mean square over seeds against the
truth; that of CLUB, which is no estimate of it but bounds it, is against CLUB's own value for the true conditional
Gaussian, where that is known. Seconds are those of the processor, for one training and reading.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

#: Our names and theirs. (Its factory for CLUB does not offer the sampled form.)
PEERS = {"i_nce": "infonce", "nwj": "nwj", "mine": "mine", "smile": "smile", "club": "club"}
SHARES = (0.6, 0.2)


def peer(file: Path) -> None:
    """Runs in torch-mist's environment: reads samples, and prints a line of JSON for each estimator."""
    from torch_mist import estimate_mi

    samples = np.load(file)
    x, y = torch.from_numpy(samples["x"]), torch.from_numpy(samples["y"])
    cuts = np.cumsum([round(share * len(x)) for share in SHARES]).tolist()
    train, valid, test = (dict(x=a, y=b) for a, b in zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True))
    for name in sys.argv[3:]:
        torch.manual_seed(0)
        start = time.process_time()
        nats = estimate_mi(
            data=train,
            valid_data=valid,
            test_data=test,
            estimator=PEERS[name],
            hidden_dims=[128, 128],
            evaluation_batch_size=len(test["x"]),
            verbose=False,
            logger=False,
        )
        nats = nats[0] if isinstance(nats, tuple) else nats
        print("RESULT", json.dumps([name, float(nats), time.process_time() - start]), flush=True)


def ours(x: torch.Tensor, y: torch.Tensor, names: list[str]) -> list[tuple[str, float, float]]:
    from ssl_ib.info.estimators import ESTIMATORS

    results = []
    for name in names:
        start = time.process_time()
        nats = ESTIMATORS[name](x, y).nats
        results.append((name, nats, time.process_time() - start))
    return results


def theirs(python: str, file: Path, names: list[str]) -> list[tuple[str, float, float]]:
    command = [python, __file__, "--as-peer", str(file), *names]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"bench_mi: torch-mist failed:\n{done.stderr}")
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def reference(task: str, name: str, dim: int, nats: float) -> float:
    """What the estimator is to read: the truth, or CLUB's value for Gaussians; NaN where that is unknown."""
    if name != "club":
        return nats
    pairs = {"gaussian": dim, "sparse": min(dim, 2)}.get(task)
    # rho^2 / (1 - rho^2) a pair of coordinates, with rho^2 = 1 - exp(-2 nats / pairs).
    return math.nan if pairs is None else pairs * math.expm1(2 * nats / pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="the python of torch-mist's environment")
    parser.add_argument("--dim", type=int, nargs="+", default=[4])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--mi", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--estimators", nargs="+", default=list(PEERS), choices=list(PEERS))
    options = parser.parse_args()
    from ssl_ib.info.known import KNOWN
    from ssl_ib.info.learning import _parts

    print(f"{options.samples:,} samples, {options.mi:g} nats, {options.seeds} seeds; ours and torch-mist's")
    columns = "mean | error | spread | seconds"
    print(f"| dim | pairs | estimator | to read | ours: {columns} | torch-mist: {columns} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for dim in options.dim:
        for task, draw in KNOWN.items():
            found: dict[tuple[str, int], list[tuple[float, float]]] = {}
            for seed in range(options.seeds):
                # In the order into which `learn` will bring them with seed 0, so that both train and read on the same.
                order = torch.cat(_parts(options.samples, SHARES, torch.Generator().manual_seed(0)))
                x, y = draw(options.samples, dim, options.mi, seed)
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "samples.npz"
                    np.savez(file, x=x[order].numpy(), y=y[order].numpy())
                    both = ours(x, y, options.estimators), theirs(options.peer, file, options.estimators)
                for side, results in enumerate(both):
                    for name, nats, seconds in results:
                        found.setdefault((name, side), []).append((nats, seconds))
            for name in options.estimators:
                target = reference(task, name, dim, options.mi)
                cells = []
                for side in (0, 1):
                    nats, seconds = map(np.array, zip(*found[name, side], strict=True))
                    error = math.sqrt(((nats - target) ** 2).mean())
                    shown = f"{error:.2f}" if math.isfinite(error) else "unknown"
                    cells.append(f"{nats.mean():.2f} | {shown} | {nats.std(ddof=1):.2f} | {np.median(seconds):.1f}")
                to_read = f"{target:.2f}" if math.isfinite(target) else "unknown"
                print(f"| {dim} | {task} | {name} | {to_read} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-peer"]:
        peer(Path(sys.argv[2]))
    else:
        main()

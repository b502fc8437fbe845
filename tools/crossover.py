"""From which size on "chunked" beats "reference" on this machine's CPU: the figures of ssl_ib/ops/crossover.py.

    python tools/crossover.py [KERNEL ...]

Sizes double; both take turns, forward and backward together, medians of the rounds. The figure is the smallest size
from which "chunked" is the faster one at every larger size measured.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ssl_ib.bench import cases, report  # noqa: E402
from ssl_ib.bench.measure import Contender, measure  # noqa: E402

CPU = torch.device("cpu")
BATCHES = [2**n for n in range(0, 10)]
SIZES = {
    "token_gather": [cases.token_gather(batch, 64, 16, 192) for batch in BATCHES],
    "token_scatter": [cases.token_scatter(batch, 64, 16, 192) for batch in BATCHES],
    "patch_embed_gather": [cases.patch_embed_gather(batch, 32, 4, 16, 192) for batch in BATCHES],
    "masked_patch_mse": [cases.masked_patch_mse(batch, 1, 32, 4) for batch in BATCHES],
    "lse": [cases.nt_xent(2**n, 128, 0.1) for n in range(4, 12)],
    "posterior": [cases.gmm_posterior(32, 2**n, 128, 0.04) for n in range(5, 15)],
}


def main() -> None:
    print(" | ".join(f"{key} {value}" for key, value in report.machine(CPU).items()))
    for kernel in sys.argv[1:] or SIZES:
        crossover = None
        for case in SIZES[kernel]:
            contenders = [Contender(name, case.call, name, torch.float32, False) for name in ("reference", "chunked")]
            reference, chunked = measure(case, contenders, CPU, rounds=15)
            ratio = statistics.median(a / b for a, b in zip(reference.total, chunked.total, strict=True))
            crossover = None if ratio < 1 else crossover or case.work
            times = (statistics.median(r.total) * 1e3 for r in (reference, chunked))
            print(
                f"{kernel:<20}{case.shape:<36}{case.work:>10}" + "".join(f"{t:>10.3f} ms" for t in times),
                f"{ratio:.2f}",
            )
        print(f"{kernel}: {crossover}", flush=True)


if __name__ == "__main__":
    main()

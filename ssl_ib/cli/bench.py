"""`ssl-ib-bench`: time, memory and error of the ops, beside other ways to do the same. `--help` shows the usage.

Exit codes: 0 done, 1 a contender broke (the others are measured), 2 a mistake of the user's (one message on stderr).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import UserError, nearest

OPS = (
    "token_gather",
    "token_scatter",
    "patch_embed_gather",
    "masked_patch_mse",
    "info_nce",
    "gmm_lse",
    "gmm_posterior",
    "gmm_assign",
    "augment",
)
BASELINES = ("compiled", "lightly", "mae", "embed_all", "cross_entropy", "inf_cl", "cut_cross_entropy", "liger")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="ssl-ib-bench",
        description="Measure ops on every backend this machine can run, beside other ways to do the same, interleaved "
        "in one process. ratio: how many times faster than the first row (medians of the rounds' ratios).",
        epilog=f"ops: {' '.join(OPS)} | baselines: {' '.join(BASELINES)}",
    )
    p.add_argument("ops", nargs="*", metavar="OP", help="all, if none is named")
    p.add_argument("--quick", action="store_true", help="small shapes, few rounds: seconds")
    p.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--baselines", nargs="*", metavar="NAME", help="which others (none, if none is named; default: all)")
    p.add_argument("--rounds", type=int, metavar="N", help="samples (default: 50 on a GPU, 7 on a CPU, 5 with --quick)")
    p.add_argument("--goals", action="store_true", help="on a GPU: only the shapes that goals are stated for")
    p.add_argument("--shapes", metavar="TEXT", help="only the shapes whose line contains this")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return p


def _chosen(names: list[str] | None, known: tuple[str, ...], what: str) -> list[str]:
    if names is None:
        return list(known)
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what} {name!r}{nearest(name, known)}")
    return names


def _contenders(case, device, baselines: list[str]) -> list:
    import torch

    from .. import ops
    from ..bench.measure import Contender
    from ..ops.crossover import INSTEAD

    fast = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = [Contender("reference", case.call, "reference", torch.float32, True)]
    if fast != torch.float32:
        found.append(Contender("reference bf16", case.call, "reference", fast, True))
    for name in ("chunked", "triton", "cuda"):
        if ops.why_not(name, device.type) is None and (case.op, name) not in INSTEAD:
            found.append(Contender(name, case.call, name, fast, False))
    if "compiled" in baselines:
        mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
        # Which images a view's operations change differs from draw to draw, and so do sizes within.
        compiled = torch.compile(case.call, dynamic=None if case.op == "augment" else False, mode=mode)
        found.append(Contender("compiled reference", compiled, "reference", fast, True))
    found += [Contender(n, call, "reference", fast, True) for n, call in case.others.items() if n in baselines]
    return found


def _run(options: argparse.Namespace) -> int:
    names = _chosen(options.ops or None, OPS, "op")
    others = _chosen(options.baselines, BASELINES, "baseline")
    if options.rounds is not None and options.rounds < 1:
        raise UserError(f"--rounds: expected a number above 0, got {options.rounds}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise UserError(f"--json: {options.json.parent} is no folder")
    import torch

    from .. import ops
    from ..bench import measure, report
    from ..bench.cases import cases
    from ..device import choose_device
    from ..ops.backend import automatic
    from ..record.files import replace

    device = choose_device(options.device)
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 1000
    size = "quick" if options.quick else device.type
    if options.goals:
        if device.type != "cuda" or options.quick:
            raise UserError("--goals: these shapes are for a GPU, without --quick")
        size = "goals"
    rounds = options.rounds or (5 if options.quick else 50 if device.type == "cuda" else 7)
    selected = [c for c in cases(size) if c.op in names and (options.shapes or "") in c.shape]
    if not selected:
        raise UserError(f"--shapes: no shape of these ops contains {options.shapes!r}")
    facts, rates = report.machine(device), measure.ceilings(device)
    print(" | ".join(f"{key} {value}" for key, value in facts.items()), f"| {rounds} interleaved rounds")
    gemms = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items() if name != "copy")
    print(f"ceilings measured here: copy {rates['copy'] / 1e9:.3g} GB/s, products {gemms}")
    for name in ("triton", "cuda") if device.type == "cuda" else ():
        if (reason := ops.why_not(name, device.type)) is not None:
            print(f"{name} is left out: {reason}")
    records, broken = [], False
    for case in selected:
        contenders = _contenders(case, device, others)
        results = measure.measure(case, contenders, device, rounds)
        for contender, result in zip(contenders, results, strict=True):
            if result.failure is None:
                with measure.failing_alone(result):
                    result.memory = measure.measure_memory(case, contender, device)
            broken = broken or result.broken
        dtypes = {c.name: str(c.dtype).removeprefix("torch.") for c in contenders}
        picked, _ = automatic(case.op, device.type, contenders[-1].dtype, case.work)
        table = report.rows(case, results, rates, dtypes, picked)
        print("\n".join([*report.lines(table), report.verdict(table)]), flush=True)
        records += table
        if options.json is not None:
            figures = {"machine": facts, "ceilings": rates, "rounds": rounds, "rows": records}
            # At once, so that whoever stops the benchmark keeps the figures so far.
            replace(options.json, json.dumps(figures, indent=2) + "\n")
    return 1 if broken else 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    try:
        return _run(parser().parse_args(arguments))
    except UserError as error:
        print(f"ssl-ib-bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

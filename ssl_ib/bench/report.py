"""The table of a benchmark, and what the machine was."""

from __future__ import annotations

import platform
import statistics
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..ops import BACKENDS
from .cases import Case
from .measure import Result

HEADER = (
    f"{'contender':<22}{'forward':>10}{'backward':>10}{'total ms':>10}{'p20':>9}{'p80':>9}{'host ms':>9}{'ratio':>7}"
    f"{'TFLOP/s':>9}{'GB/s':>8}{'ceiling':>9}{'extra MB':>10}{'error':>10}{'grad err':>10}  repeats"
)


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads and clocks."""
    facts = {"date": date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,driver_version"
        try:
            command = ["nvidia-smi", query, "--format=csv,noheader"]
            facts["clocks"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            facts["clocks"] = "unknown"
    else:
        facts |= {"device": _processor(), "threads": torch.get_num_threads()}
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def rows(
    case: Case, results: list[Result], rates: dict[str, float], dtypes: dict[str, str], picked: str
) -> list[dict[str, Any]]:
    """One flat record a contender, in SI units but for milliseconds; ratios are to the first that ran.

    rates: the machine's ceilings; dtypes: what each contender was fed; picked: the backend that `auto` takes.
    """
    first = next((r for r in results if r.failure is None), None)
    table = []
    for r in results:
        row = {"op": case.op, "shape": case.shape, "contender": r.name, "failure": r.failure, "auto": picked}
        if r.failure is None:
            seconds = statistics.median(r.total)
            low, *_, high = statistics.quantiles(r.total, n=5) if len(r.total) > 1 else (seconds, seconds)
            best = max(case.flops / rates[dtypes[r.name]], case.moved / rates["copy"])
            row |= {
                "forward_ms": statistics.median(r.forward) * 1e3,
                "backward_ms": statistics.median(r.backward) * 1e3,
                "total_ms": seconds * 1e3,
                "p20_ms": low * 1e3,
                "p80_ms": high * 1e3,
                "host_ms": statistics.median(r.host) * 1e3,
                "alone": r.alone,
                "ratio": statistics.median(a / b for a, b in zip(first.total, r.total, strict=True)),
                "tflops": case.flops / seconds / 1e12,
                "gbytes": case.moved / seconds / 1e9,
                "of_ceiling": best / seconds,
                "extra_mb": None if r.memory is None else r.memory / 1e6,
                "error": r.error,
                "gradient_error": r.gradient_error,
                "repeats": r.repeats,
                "compile_s": r.compile_seconds,
            }
        table.append(row)
    return table


def lines(table: list[dict[str, Any]]) -> list[str]:
    """The records of one case as text."""
    text = [f"\n{table[0]['op']}  {table[0]['shape']}", HEADER]
    for row in table:
        if row["failure"] is not None:
            text.append(f"{row['contender']:<22}{row['failure']}")
            continue
        memory = "-" if row["extra_mb"] is None else f"{row['extra_mb']:.1f}"
        compiled = f"  compiled in {row['compile_s']:.0f} s" if row["compile_s"] else ""
        compiled += "" if row["alone"] else "  (waits for the GPU: times hold the host's)"
        text.append(
            f"{row['contender']:<22}{row['forward_ms']:>10.3f}{row['backward_ms']:>10.3f}{row['total_ms']:>10.3f}"
            f"{row['p20_ms']:>9.3f}{row['p80_ms']:>9.3f}{row['host_ms']:>9.3f}{row['ratio']:>7.2f}{row['tflops']:>9.3f}"
            f"{row['gbytes']:>8.1f}"
            f"{row['of_ceiling']:>9.1%}{memory:>10}{row['error']:>10.1e}{row['gradient_error']:>10.1e}"
            f"  {'yes' if row['repeats'] else 'no'}{compiled}"
        )
    return text


def verdict(table: list[dict[str, Any]]) -> str:
    """Which backend `auto` takes for this op and size, and which one was the fastest."""
    ran = {row["contender"]: row["total_ms"] for row in table if row["failure"] is None}
    backends = {name: ran[name] for name in BACKENDS if name in ran}
    picked = table[0]["auto"]
    if picked not in backends:
        return f"auto takes {picked}"
    fastest = min(backends, key=backends.get)
    if picked == fastest:
        return f"auto takes {picked}"
    return f"auto takes {picked}, {backends[picked] / backends[fastest]:.2f} times the time of {fastest}"

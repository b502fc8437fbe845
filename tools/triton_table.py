"""Compiles every variant of the Triton kernels ahead of time, without a GPU, and writes what each one takes.

    python tools/triton_table.py                writes kernels/resources.md (minutes: some seconds a variant)
    python tools/triton_table.py lse            compiles one module's anew, and leaves the lines of the others
    python tools/triton_table.py lse --print    prints one module's

Registers a thread, bytes spilled, shared memory of a block, and whether Hopper's wgmma is in the code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

MODULES = ("token_gather", "token_scatter", "patch_embed_gather", "masked_patch_mse", "lse", "posterior", "augment")
CAPABILITIES = (80, 90, 100)
#: Bytes of shared memory that a block may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TABLE = ROOT / "kernels" / "resources.md"
HEADER = "| kernel | sm | registers | spilled bytes | shared bytes | wgmma |"


@dataclass(frozen=True)
class Usage:
    """What one variant takes on one architecture."""

    name: str
    capability: int
    registers: int
    spilled: int
    shared: int
    wgmma: bool

    def line(self) -> str:
        wgmma = "yes" if self.wgmma else "no"
        return f"| {self.name} | {self.capability} | {self.registers} | {self.spilled} | {self.shared} | {wgmma} |"


def compiled(module: str, number: int, capability: int) -> Usage:
    """Compiles variant `number` of a module for a compute capability (90 for 9.0)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert "TRITON_INTERPRET" not in os.environ, "the interpreter compiles nothing"
    variant = importlib.import_module(f"ssl_ib_kernels.{module}").variants(capability)[number]
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    kernel = triton.compile(
        ASTSource(variant.kernel, signature, variant.constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    registers, spilled = _registers(kernel.asm["cubin"], Path(triton.__file__).parent)
    wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
    return Usage(variant.name, capability, registers, spilled, kernel.metadata.shared, wgmma)


def _registers(cubin: bytes, triton: Path) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack and local memory, where spilled ones go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton / "backends" / "nvidia" / "bin" / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text, re.DOTALL).groups())
    return registers, stack + local


def tasks(modules: tuple[str, ...] = MODULES) -> list[tuple[str, int, int]]:
    """(module, number of its variant, compute capability) of everything there is to compile, each variant once."""
    found: dict[tuple[str, int], tuple[str, int, int]] = {}
    for module in modules:
        for capability in CAPABILITIES:
            for i, variant in enumerate(importlib.import_module(f"ssl_ib_kernels.{module}").variants(capability)):
                found.setdefault((variant.name, capability), (module, i, capability))
    return list(found.values())


def committed() -> tuple[str, dict[tuple[str, int], str]]:
    """The version of Triton that the table was made with, and its lines by (name, capability)."""
    text = TABLE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.match(r"\| .* \| \d+ \| \d+ \| \d+ \| \d+ \| ", line)]
    keys = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines]
    return re.search(r"Triton ([\w.]+)", text)[1], {(n, int(c)): x for (n, c), x in zip(keys, lines, strict=True)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("modules", nargs="*", default=MODULES)
    p.add_argument("--print", action="store_true", help="write no file")
    p.add_argument("--only", default="", metavar="TEXT", help="variants whose name contains this (with --print)")
    options = p.parse_args()
    import triton

    work = tasks(tuple(options.modules))
    if options.only:
        listed = {(m, c): importlib.import_module(f"ssl_ib_kernels.{m}").variants(c) for m, _, c in work}
        work = [(m, i, c) for m, i, c in work if options.only in listed[m, c][i].name]
    found = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for task, usage in zip(work, pool.map(compiled, *zip(*work, strict=True)), strict=True):
            found[task] = usage.line()
            print(found[task], flush=True)
    if not options.print:
        version, known = committed()
        every = tasks()
        if version != triton.__version__ and len(found) < len(every):
            sys.exit(f"the table was made by Triton {version}: compile all modules with {triton.__version__}")
        names = {(m, c): importlib.import_module(f"ssl_ib_kernels.{m}").variants(c) for m, _, c in every}
        lines = [found[m, i, c] if (m, i, c) in found else known[names[m, c][i].name, c] for m, i, c in every]
        head = f"""# What the Triton kernels take

Every variant that a launch would compile at usual shapes, compiled ahead of time by Triton {triton.__version__} on
{date.today().isoformat()} (`python tools/triton_table.py`); nothing may spill.
80 is an A100, 90 an H100 or H200, 100 a B200.

{HEADER}
|---|---|---|---|---|---|
"""
        TABLE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

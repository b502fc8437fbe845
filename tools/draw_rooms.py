"""Draws which rooms of `ssl_ib` import which, from the imports themselves, as a Mermaid graph for docs/architecture.md.

    python tools/draw_rooms.py            # prints the graph
    python tools/draw_rooms.py --write    # puts it into docs/architecture.md

An arrow points from a room to one that it imports. Arrows that follow from others are left out: where a imports b and b
imports c, the one from a to c. A room is a top-level module or package of `ssl_ib`.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "```mermaid\n", "```\n"


def imports() -> dict[str, set[str]]:
    """Which modules of the package each module imports anywhere in it, also lazily and for type checkers alone.

    Names are without `ssl_ib.`; the package itself is left out: it shows names of every room and needs none of them.
    Raises ValueError for an import of the package by its name, which is to be relative.
    """
    package = ROOT / "ssl_ib"
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    files = {name.removesuffix("__init__").removesuffix("."): path for name, path in files.items()}
    del files[""]
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        inside = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = inside[: len(inside) + 1 - node.level] + (node.module or "").split(".")
                base = ".".join(filter(None, base))
                for alias in node.names:
                    target = f"{base}.{alias.name}".lstrip(".")
                    found[name].add(target if target in files else base)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                if any(n.split(".")[0] == "ssl_ib" for n in names):
                    raise ValueError(f"{path}: imports within are relative")
        found[name] -= {"", name}
    return found


def rooms() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {}
    for name, targets in imports().items():
        room = name.split(".")[0]
        found.setdefault(room, set()).update(target.split(".")[0] for target in targets)
    return {room: targets - {room} for room, targets in found.items()}


def mermaid() -> str:
    """The graph, highest rooms first."""
    found = rooms()
    reached: dict[str, set[str]] = {}
    while waiting := [room for room in found if room not in reached and found[room] <= set(reached)]:
        for room in waiting:
            reached[room] = found[room].union(*(reached[target] for target in found[room]))
    lines = ["flowchart TD"]
    for room in reversed(reached):
        for target in sorted(found[room]):
            if not any(target in reached[other] for other in found[room] - {target}):
                lines.append(f"    {room} --> {target}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into docs/architecture.md")
    if not parser.parse_args().write:
        print(mermaid(), end="")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + mermaid() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()

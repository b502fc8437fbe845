"""The information plane, where `ssl-ib-info plane` was called for a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..blocks import Panel, Table, number
from ..page import Page


@dataclass(frozen=True)
class Path:
    """A run's way through a plane: (x, y, name of the state), and the number of its colour."""

    name: str
    points: list[tuple[float, float, str]]
    color: int


@dataclass
class Plane:
    """Ways through the plane at one width of the noise, within [0, most_x] and [low, most_y], in nats."""

    title: str
    paths: list[Path]
    most_x: float
    most_y: float
    low: float
    text: str = ""
    kind: str = "plane"


def build(page: Page) -> Panel | None:
    runs = [run for run in page.runs if any(row.get("quantity") == "I(X;Z)" for row in run.plane)]
    if not runs:
        return None
    planes: dict[float, list[Path]] = {}
    most = {"I(X;Z)": 0.0, "I(Z;Y)": 0.0}
    low, table = 0.0, []
    for run in runs:
        found: dict[float, dict[str, dict[str, float]]] = {}
        for row in run.plane:
            quantity, value = row["quantity"], _float(row["value"])
            error = _float(row["error"])
            said = number(value) + (f" ± {number(error)}" if math.isfinite(error) else "")
            ceiling = _float(row["ceiling"])
            table.append(
                [run.name, row["epoch"], row["sigma"], quantity, row["kind"], said, number(ceiling), row["remark"]]
            )
            if quantity in most:
                state = f"epoch {row['epoch']}" if row["step"] != "0" else row["state"]
                found.setdefault(_float(row["sigma"]), {}).setdefault(state, {})[quantity] = value
                most[quantity] = max(most[quantity], ceiling, value)
                low = min(low, value if quantity == "I(Z;Y)" else 0)
        for sigma, states in found.items():
            points = [
                (at["I(X;Z)"], at["I(Z;Y)"], state)
                for state, at in states.items()
                if len(at) == 2 and all(map(math.isfinite, at.values()))
            ]
            if points:
                planes.setdefault(sigma, []).append(Path(run.name, points, page.color(run)))
    blocks = [
        Plane(f"Noise σ = {sigma:g}", paths, most["I(X;Z)"], most["I(Z;Y)"], low) for sigma, paths in planes.items()
    ]
    head = ["run", "epoch", "σ", "quantity", "kind", "nats", "ceiling", "remark"]
    text = (
        "Across is what the features keep of the image, I(X;Z), an estimate; up is what they say of the class, I(Z;Y), "
        "a lower bound. The axes end at the ceilings. The way begins at the ring and ends at the disc. Up and to the "
        "left is what the bottleneck asks for: much of the class, and little else. I(X;Z) is finite only with noise on "
        "the features, so compare within one width σ of it."
    )
    return Panel(
        "Information plane", text, [*blocks, Table(head, table, title="All numbers of the plane", folded=True)]
    )


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

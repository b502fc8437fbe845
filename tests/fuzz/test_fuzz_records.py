"""What a run and a sweep leave, damaged: read by all that continues, shows or compares them."""

import io
import json
import shutil
from functools import cache, partial
from pathlib import Path

import torch
import yaml
from fuzz.cases import WRONG, damage, empty_folder, fuzzed, holds, hows, mutate, mutations
from harness import TINY, finished
from hypothesis import strategies as st
from PIL import Image

from ssl_ib.cli import embed, export, info, report, sweep, train
from ssl_ib.cli import eval as evaluation
from ssl_ib.config.config import configure
from ssl_ib.export import LAYOUTS
from ssl_ib.sweep import points

values = st.sampled_from(WRONG) | st.integers() | st.floats() | st.text(max_size=20)
#: Tensors of other sizes, types and contents, and what is none.
tensors = st.sampled_from(
    [torch.zeros(3), torch.zeros(()), torch.tensor(float("nan")), torch.full((2, 2), float("inf")), torch.empty(0)]
    + [torch.zeros(3, dtype=torch.int64), torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.complex64)]
    + [torch.zeros(2, 2).to_sparse(), torch.zeros(1, device="meta"), torch.zeros(1).expand(10**6, 10**6), b"bytes"]
)

#: How the files of a run, or the one that is damaged alone, are read.
OF_A_RUN = {
    "resume": (train.main, ["run", "--resume", "--out", "run"]),
    "report": (report.main, ["run", "--out", "page.html"]),
    "init": (train.main, [TINY, "--init", "run", "--dry-run"]),
    "eval": (evaluation.main, ["knn", "run", "--dry-run"]),
    "export": (export.main, ["run", "--to", "safetensors", "--out", "exported"]),
    "embed": (embed.main, ["run", "images", "--out", "found.npy", "--dry-run"]),
}
READERS = {
    "last.pt": ("resume", "eval"),
    "backbone.safetensors": ("init", "eval", "embed", "export"),
    "backbone.json": ("init", "eval", "embed", "export"),
    "config.yaml": ("resume", "report", "eval"),
    "metrics.jsonl": ("resume", "report"),
    "results.json": ("report", "export"),
    "about.json": ("report", "export"),
    "environment.json": ("report", "export"),
    "evals.jsonl": ("report", "eval", "export"),
    "info/plane.csv": ("report",),
    "info/probe.csv": ("report",),
}


@cache
def files() -> dict[str, bytes]:
    """The files of a finished run."""
    out = finished()
    found = {name: (out / name).read_bytes() for name in READERS if (out / name).is_file()}
    found["last.pt"] = (out / "checkpoints" / "last.pt").read_bytes()
    found["info/plane.csv"] = b"epoch,layer,i_xz,i_zy\n0,0,1.5,0.5\n1,0,2.5,0.6\n"
    found["info/probe.csv"] = b"layer,name,value\n0,label,0.5\n1,label,0.75\n"
    with empty_folder() as folder:
        shutil.copytree(out, folder / "run")
        assert evaluation.main(["knn", str(folder / "run")]) == 0
        found["evals.jsonl"] = (folder / "run" / "evals.jsonl").read_bytes()
    return found


def changed(name: str, data: bytes, changes: list[tuple], how) -> bytes:
    """A file with other values in its places, or with other bytes."""
    if how.random() < 0.5 or name.endswith((".csv", ".safetensors")):
        return damage(data, how)
    alone = changes[0][3] if how.random() < 0.1 else None
    if name.endswith(".json"):
        return json.dumps(alone or mutate(json.loads(data), changes), default=str).encode()
    if name.endswith(".yaml"):
        return yaml.safe_dump(mutate(yaml.safe_load(data), changes)).encode()
    lines = data.splitlines()
    place = how.randrange(len(lines))
    lines[place] = json.dumps(alone or mutate(json.loads(lines[place]), changes), default=str).encode()
    return b"\n".join(lines) + b"\n" * how.randrange(2)


def lay(folder: Path, name: str, data: bytes) -> None:
    """The run's folder in `folder`, with one file as it was made."""
    for other, content in (files() | {name: data}).items():
        path = folder / "run" / ("checkpoints/last.pt" if other == "last.pt" else other)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read(target: str, reader: str, folder: Path) -> None:
    (folder / "images").mkdir()
    Image.new("RGB", (9, 7)).save(folder / "images" / "a.png")
    main, arguments = OF_A_RUN[reader]
    holds(target, main, *arguments, folder=folder)


@fuzzed(
    25,
    name=st.sampled_from([n for n in READERS if n not in ("last.pt", "backbone.safetensors")]),
    changes=mutations(values),
    how=hows,
)
def test_a_run(name, changes, how):
    with empty_folder() as folder:
        lay(folder, name, changed(name, files()[name], changes, how))
        read("runs", how.choice(READERS[name]), folder)


@fuzzed(22, changes=mutations(values | tensors), how=hows)
def test_checkpoints(changes, how):
    name = how.choice(("last.pt", "last.pt", "backbone.safetensors"))
    if name == "last.pt" and how.random() < 0.5:
        file = io.BytesIO()
        state = torch.load(io.BytesIO(files()[name]), weights_only=True)
        torch.save(mutate(state, changes), file, _use_new_zipfile_serialization=how.random() < 0.7)
        data = file.getvalue()
    else:
        data = damage(files()[name], how)
    with empty_folder() as folder:
        lay(folder, name, data)
        read("checkpoints", how.choice(READERS[name]), folder)


@fuzzed(8, how=hows, layout=st.sampled_from(LAYOUTS))
def test_weights_alone(how, layout):
    with empty_folder() as folder:
        (folder / "file.pt").write_bytes(damage(files()["last.pt"], how))
        (folder / "file.safetensors").write_bytes(damage(files()["backbone.safetensors"], how))
        file = how.choice(("file.pt", "file.safetensors"))
        if how.random() < 0.5:
            holds("checkpoints", train.main, TINY, "--init", file, "--dry-run", folder=folder)
        else:
            holds("checkpoints", export.main, file, "--from", layout, "--out", "exported", "--dry-run", folder=folder)


#: A sweep of two points.
VARY = ["--vary", "optim.lr=1e-3,2e-3", "--seeds", "0,1"]
OF_A_SWEEP = (
    (sweep.main, [TINY, *VARY, "--out", "sweep"]),
    (sweep.main, [TINY, *VARY, "--out", "sweep", "--choose-by", "health/rankme"]),
    (report.main, ["sweep", "--out", "page.html"]),
    (info.main, ["rank", "sweep"]),
    (info.main, ["rank", "sweep/results.csv"]),
)


@cache
def sweep_files() -> dict[str, bytes]:
    """The files of a finished sweep."""
    problems: list[str] = []
    axes = points.parse_axes([VARY[1]], [], [], problems)
    runs = points.grid(TINY, [], axes, [0, 1], partial(configure))
    found = {"sweep.yaml": b"recipe: tiny\noverrides: {}\ncommand: ssl-ib-sweep tiny\n"}
    for number, run in enumerate(runs):
        place = f"{run.folder}/"
        results = json.loads(files()["results.json"])
        results["trained"] = {key: value + 0.01 * number for key, value in results["trained"].items()}
        found[place + "config.yaml"] = run.config.yaml().encode()
        found[place + "metrics.jsonl"] = files()["metrics.jsonl"]
        found[place + "results.json"] = json.dumps(results).encode()
    return found


@cache
def table() -> bytes:
    """What the sweep makes of them."""
    with empty_folder() as folder:
        lay_sweep(folder, sweep_files())
        assert holds("sweeps", *([OF_A_SWEEP[0][0]] + OF_A_SWEEP[0][1]), folder=folder) == 0
        return (folder / "sweep" / "results.csv").read_bytes()


def lay_sweep(folder: Path, found: dict[str, bytes]) -> None:
    for name, data in found.items():
        (folder / "sweep" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "sweep" / name).write_bytes(data)


@fuzzed(12, changes=mutations(values), how=hows, reader=st.sampled_from(OF_A_SWEEP))
def test_a_sweep(changes, how, reader):
    with empty_folder() as folder:
        found = sweep_files() | {"results.csv": table()}
        name = how.choice([*found, "results.csv", "results.csv", "sweep.yaml", "sweep.yaml"])
        lay_sweep(folder, found | {name: changed(name, found[name], changes, how)})
        main, arguments = reader
        holds("sweeps", main, *arguments, folder=folder)


words = st.lists(
    st.sampled_from(
        "optim.lr masker.ratio seed epochs = == : , + [ ] { } ' \" 1 0.5 1e-3 null a é \\".split() + [" ", "\n"]
    ),
    max_size=8,
)
words = words.map("".join) | st.text(max_size=12)


@fuzzed(
    18,
    given=st.lists(
        st.tuples(st.sampled_from(["--vary", "--case", "--seeds", "--metric", "--choose-by"]), words),
        min_size=1,
        max_size=3,
    ),
)
def test_the_words_of_a_sweep(given):
    said = [f"{option}={word}".replace("\0", "").encode("utf-8", "replace").decode() for option, word in given]
    with empty_folder() as folder:
        holds("sweeps", sweep.main, TINY, *said, "--dry-run", folder=folder)

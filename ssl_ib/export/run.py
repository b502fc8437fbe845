"""Exporting: an encoder is loaded, written, loaded back by the format's own library, and compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from .. import pretrained
from ..errors import UserError, nearest
from ..evals.subject import origin
from ..models import official
from ..pretrained import TIMM, Backbone
from ..record import shards
from ..record.backbone import describe
from .card import card, is_export
from .formats import FORMATS, Format, missing

#: By how much a feature may change, as a share of the largest one: libraries add up in other orders.
TOLERANCE = 1e-4


def export(
    source: str,
    to: str,
    out: Path | str | None = None,
    *,
    name: str | None = None,
    pretrained_weights: bool = False,
    overwrite: bool = False,
    dry: bool = False,
) -> tuple[Path, list[str]]:
    """Writes an encoder in a format, and checks that the format's own library gives the same features.

    source: as `ssl_ib.load` takes it; `name`, and `pretrained_weights` as its `pretrained`, too.
    to:     one of FORMATS.
    out:    the folder; None: `export/FORMAT` in the run's own folder.
    dry:    write nothing, but find out whether it can be done as far as that is known before.

    Returns the folder, and what is to be said in lines. Raises UserError where the encoder cannot be loaded or does not
    fit the format, where something is in the way, or where features come out different.
    """
    if to not in FORMATS:
        raise UserError(f"--to: unknown format {to!r}{nearest(to, FORMATS)}")
    form, run = FORMATS[to], _run_folder(source)
    lacking = missing(form.needs)
    if lacking:
        raise UserError(f"--to {to} needs {' and '.join(lacking)}: pip install 'ssl-ib[export]'")
    if out is None and run is None:
        raise UserError(f"{source} is not in the folder of a run: say where to write with --out")
    out = Path(out) if out is not None else run / "export" / (to if name is None else f"{to}-{name}")
    _check_free(out, overwrite)
    backbone = pretrained.load(source, name=name, pretrained=pretrained_weights)
    if backbone.description is None or (backbone.description["preprocessing"] is None and to != "safetensors"):
        raise UserError(
            f"--to {to}: the images of {source} are not just resized and cropped, which is all that this format can "
            "say: use --to safetensors"
        )
    if dry:
        return out, [f"dry run: {source} would be written to {out} as {to}; nothing is written"]
    title = source.removeprefix(TIMM) if source.startswith(TIMM) else (run or Path(source)).name
    # A checkpoint may be an earlier encoder than the one that the run's results are of.
    step = None if Path(source).is_dir() and not shards.is_checkpoint(Path(source)) else origin(source).step
    line = _written(backbone, to, form, out, title if name is None else f"{title}, {name}", run, step)
    return out, [f"{source} -> {out}: {', '.join(sorted(path.name for path in out.iterdir()))}", line]


def _run_folder(source: str) -> Path | None:
    """The folder of the run that `source` is, or is a checkpoint of."""
    path = Path(source)
    folder = path if path.is_dir() and not shards.is_checkpoint(path) else path.parent.parent
    return folder if not source.startswith(TIMM) and (folder / "config.yaml").is_file() else None


def _check_free(out: Path, overwrite: bool) -> None:
    if out.name in ("", ".."):
        raise UserError(f"--out: expected a folder with a name of its own, got {out}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; an export needs a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"--out: {out} is not empty: replace it with --overwrite, or choose another folder")
        if not is_export(out) or any(path.is_dir() for path in out.iterdir()):
            raise UserError(f"--out: {out} holds no export, so --overwrite leaves it alone: choose another folder")


def _written(
    backbone: Backbone, to: str, form: Format, out: Path, title: str, run: Path | None, step: int | None = None
) -> str:
    """Writes everything beside `out` first, so that `out` is never half an export. Returns what the check found."""
    fresh = out.with_name(f"{out.name}.tmp") / out.name
    shutil.rmtree(fresh.parent, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        form.write(backbone, fresh)
        line = _checked(backbone, to, form, fresh)
        library = {"timm": "timm", "hf": "transformers"}.get(to)
        text = card(backbone, title, form.usage(fresh), run, library, step)
        (fresh / "README.md").write_text(text, encoding="utf-8")
        if out.is_dir():
            shutil.rmtree(out)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh.parent, ignore_errors=True)
    return line


@torch.no_grad()
def _checked(backbone: Backbone, to: str, form: Format, folder: Path) -> str:
    """Loads the files back and compares features of random images. Raises UserError where they differ."""
    lacking = missing(form.reload_needs)
    if lacking:
        return f"not checked, because {' and '.join(lacking)} is not installed: pip install 'ssl-ib[export]'"
    images = _random_images(backbone.description)
    expected, found = backbone(images), form.reload(folder)(images)
    if found.shape != expected.shape:
        raise UserError(f"--to {to}: features come out as {list(found.shape)} in place of {list(expected.shape)}")
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise UserError(
            f"--to {to}: the features come out different, by up to {difference:.2g} where the largest is "
            f"{largest:.2g}: this encoder does not fit the format"
        )
    return f"checked: loaded back, features differ by {difference:.1g} at most (the largest is {largest:.2g})"


def _random_images(description: dict[str, Any]) -> torch.Tensor:
    """Two images of the size that the encoder sees."""
    arguments, how = description["arguments"], description["preprocessing"]
    size = how["size"] if how is not None else arguments.get("img_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(2, arguments.get("in_chans", 3), height, width, generator=torch.Generator().manual_seed(0))


def from_published(
    layout: str, file: Path | str, out: Path | str, overwrite: bool = False, dry: bool = False
) -> list[str]:
    """Writes the encoder of a published checkpoint to a folder that `ssl_ib.load` and `init` take.

    layout: one of LAYOUTS. Returns what is to be said in lines. Raises UserError where the file cannot be read or is in
    another layout, or where something is in the way.
    """
    out = Path(out)
    _check_free(out, overwrite)
    found = official.convert(layout, file)
    description = describe(found.name, found.arguments, (found.mean, found.std), found.preprocessing)
    description["origin"] = {"layout": layout, "file": Path(file).name, "dropped": found.dropped}
    lines = [f"{found.name}, {sum(p.numel() for p in found.module.parameters()):,} parameters"]
    lines += [f"dropped: {', '.join(found.dropped) or 'nothing'}"]
    if dry:
        return [*lines, f"dry run: nothing is written to {out}"]
    backbone = Backbone(found.module, None, description=description)
    title, form = f"{layout}, {Path(file).name}", FORMATS["safetensors"]
    lines += [_written(backbone, "safetensors", form, out, title, None)]
    return [f"{file} -> {out}", *lines, f"use it as ssl_ib.load({str(out)!r}), or start a run with --init {out}"]

"""Turns panels into one HTML file that carries all it needs: style, scripts, data and pictures."""

from __future__ import annotations

import base64
import hashlib
import io
from functools import cache
from pathlib import Path
from types import ModuleType

import jinja2
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..data.decode import open_image
from .blocks import Note, Panel, number
from .page import Page
from .panels import modules

HERE = Path(__file__).parent
#: What tells a page of ours from any other file, in its first bytes.
MARK = b'<meta name="generator" content="ssl-ib-report'
#: Of pictures: the widest, in pixels; the bytes up to which one is taken as it is; and those of a page's together.
WIDEST, SMALL, MOST_BYTES = 1400, 120_000, 2_500_000
#: Colours that curves are told apart by; more curves are dashed.
COLORS = 8


def render(page: Page, title: str) -> str:
    """The page as HTML, with the panels that have something to show."""
    panels = [(name, panel) for name, module in modules() if (panel := _built(name, module, page)) is not None]
    album = Album()
    scripts = [Markup(_read("vendor/uPlot.iife.min.js")), Markup(_read("static/report.js"))]
    return (
        _templates()
        .get_template("page.html")
        .render(
            title=title,
            panels=panels,
            album=album,
            version=__version__,
            styles=[Markup(_read("vendor/uPlot.min.css")), Markup(_read("static/report.css"))],
            scripts=scripts,
            # Nothing but these two scripts runs, whatever a name from outside may hold, and nothing is fetched.
            hashes=[_hash(script) for script in scripts],
        )
    )


def _built(name: str, module: ModuleType, page: Page) -> Panel | None:
    """A panel. What it cannot read costs the page this panel alone, and its place says so."""
    try:
        return module.build(page)
    except Exception as error:
        return Panel(name.capitalize(), "", [Note(f"This panel could not be made: {type(error).__name__}: {error}")])


class Album:
    """The pictures of a page as data, until there are too many bytes of them; counts those that are left out."""

    def __init__(self) -> None:
        self.bytes = 0

    def data(self, path: Path) -> tuple[str, int, int] | None:
        """A picture as data URI, and its width and height; None where it cannot be read or the page is full."""
        try:
            kind, content, size = _small(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        if self.bytes + len(content) > MOST_BYTES:
            return None
        self.bytes += len(content)
        return Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode()}"), *size


def _small(path: Path) -> tuple[str, bytes, tuple[int, int]]:
    """A picture's format, bytes and size: as it is where it is small, otherwise narrower and in WebP."""
    content = path.read_bytes()
    with open_image(io.BytesIO(content)) as image:
        size = image.size
        if image.format == "PNG" and len(content) <= SMALL and size[0] <= WIDEST:
            image.verify()
            return "png", content, size
        shown = image.convert("RGB")
    if shown.width > WIDEST:
        shown = shown.resize((WIDEST, round(shown.height * WIDEST / shown.width)), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    shown.save(written, "WEBP", quality=85, method=2)
    return "webp", written.getvalue(), shown.size


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8").strip()


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    templates.filters["number"] = number
    templates.globals["colors"] = COLORS
    return templates

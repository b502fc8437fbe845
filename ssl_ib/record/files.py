"""Writing a file at once: whoever reads it sees the old content or the new, and a kill leaves either."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, content: bytes | str) -> None:
    """Gives a file its content, text in UTF-8."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)

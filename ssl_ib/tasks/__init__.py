"""The built-in tasks, one a file."""

from . import views  # noqa: F401

"""The built-in tasks, one a file."""

from . import labelled_pair, views  # noqa: F401

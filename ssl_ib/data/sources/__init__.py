"""Where images come from: one registered source a file."""

from . import archive, digits, folder  # noqa: F401

"""Where images come from: one registered source a file."""

from . import archive, digits, folder, moving_mnist, packed  # noqa: F401

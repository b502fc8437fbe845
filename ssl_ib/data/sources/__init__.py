"""Where images come from: one registered source a file."""

from . import archive, digits, folder, hf, moving_mnist, packed, webdataset  # noqa: F401

"""The order of the guides, and what their list says of its pictures."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from sphinx.application import Sphinx

__all__ = ["Order", "setup"]

THUMBNAIL = re.compile(r"(:alt:)(\n\n  :doc:`/guides/(\w+)`)")


class Order:
    """Give the place of a script in the gallery; one that has none is an error.

    Args:
        folder: where the scripts are.
    """

    names: ClassVar = [
        "denoise.py",
        "insert.py",
        "layers_torch.py",
        "layers_keras.py",
        "layers_jax.py",
        "port_checkpoint.py",
        "attention.py",
        "train.py",
        "large_input.py",
        "cut_video.py",
        "cut_picture.py",
        "plain_jax.py",
        "mixed_precision.py",
        "export.py",
    ]

    def __init__(self, folder: str) -> None:
        """Take what sphinx-gallery gives."""

    def __call__(self, name: str) -> int:
        """Return the place of a script."""
        return self.names.index(name)


def name_pictures(_: Sphinx, page: str, content: list[str]) -> None:
    """Give the pictures in the list of the guides the alternative texts that sphinx-gallery leaves out."""
    if page == "guides/index":
        content[0] = THUMBNAIL.sub(r"\1 A picture of the guide \3\2", content[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("source-read", name_pictures)
    return {"parallel_read_safe": True}

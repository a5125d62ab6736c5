"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place and move it there, so that at no time there is half a file.

    Args:
        path: the file; one that is there is replaced.
        content: all of it.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(f"{folder}/note", b"whole")
        ...     Path(folder, "note").read_bytes()
        b'whole'
    """
    # Through a link, to the file that it names: a rename would put a file in the place of the link.
    place = Path(os.path.realpath(path))
    temporary = place.parent / f".nonlocal-{secrets.token_hex(8)}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)

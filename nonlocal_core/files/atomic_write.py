"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from pathlib import Path

from nonlocal_core.files.regular import check_path

__all__ = ["replace_file"]

_STALE = 24 * 60 * 60
"""After how many seconds a file that a killed process left is taken away."""


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place and move it there, so that at no time there is half a file.

    Args:
        path: the file; one that is there is replaced, and keeps its permissions.
        content: all of it.

    Raises:
        TypeError: if `path` is no path.
        ValueError: if it is no name that the system can hold.
        OSError: if the file cannot be written, or something else than a file has that name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(f"{folder}/note", b"whole")
        ...     Path(folder, "note").read_bytes()
        b'whole'
    """
    # Through a link, to the file that it names: a rename would put a file in the place of the link.
    place = Path(os.path.realpath(check_path(path)))
    mode = place.stat().st_mode if place.exists() else None
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FileExistsError(errno.EEXIST, "Not a regular file", str(place))
    temporary = place.parent / f".nonlocal-{secrets.token_hex(8)}.tmp"
    first = 0o666 if mode is None else 0o600  # at no time may someone read it who may not read the old one
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, first)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
    _remove_stale(place.parent)


def _remove_stale(folder: Path) -> None:
    """Take away what processes that were killed while they wrote have left in a folder."""
    for left in folder.glob(".nonlocal-*.tmp"):
        with contextlib.suppress(OSError):  # another process may be faster
            if time.time() - left.lstat().st_mtime > _STALE:
                left.unlink()

"""Files by name: those of the system that are regular, and names that it can hold."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Any, BinaryIO

from nonlocal_core.errors import fail_type, fail_value

__all__ = ["check_path", "open_file", "read_exactly", "read_file"]


def check_path(path: Any) -> str:
    """Return the name of a file as text, if the system can hold such a name."""
    place = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(place, str):
        raise fail_type("path", "be a string or a path", path)
    try:
        with contextlib.suppress(OSError):
            os.lstat(place)
    except ValueError:
        raise fail_value("path", "be a name that the system can hold", repr(place)) from None
    return place


def open_file(path: Any) -> BinaryIO:
    """Open a regular file, and nothing that never ends or waits for another program.

    Raises:
        TypeError: if `path` is no path.
        ValueError: if it names a pipe or a device.
        OSError: if the file cannot be opened.
    """
    place = check_path(path)
    # A pipe that no one writes to would otherwise not open.
    file = open(place, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise fail_value("path", "name a regular file", repr(place))
    return file


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Return the next `size` bytes of a file, or fewer where it ends."""
    try:
        return file.read(size)
    except MemoryError:
        raise fail_value("path", "name a file that fits into memory", f"{file.name!r} of {size} bytes") from None


def read_file(path: Any) -> bytes:
    """Return the content of a regular file, as long as it was when it was opened; raises what `open_file` raises.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     read_file(file.name)
        b''
    """
    with open_file(path) as file:
        return read_exactly(file, os.fstat(file.fileno()).st_size)

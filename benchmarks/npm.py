"""Files of packages of npm, each of which is known by its hash."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

__all__ = ["archive", "content"]


def archive(package: str, digest: str) -> bytes:
    """Return the archive of a package, which must be the one that is known.

    Args:
        package: its name and version, such as "jquery@3.3.1".
        digest: the SHA-256 of its archive.

    Raises:
        RuntimeError: if npm is missing or fails, or the archive is another one.
    """
    npm = shutil.which("npm")
    if npm is None:
        message = f"npm must be there, which fetches {package}: it comes with Node.js."
        raise RuntimeError(message)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [npm, "pack", "--silent", package], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            message = f"npm cannot fetch {package}: {done.stderr.strip()}"
            raise RuntimeError(message)
        found = Path(folder, done.stdout.strip()).read_bytes()
    if hashlib.sha256(found).hexdigest() != digest:
        message = f"the SHA-256 of {package} must be {digest}. Got {hashlib.sha256(found).hexdigest()}."
        raise RuntimeError(message)
    return found


def content(packed: bytes, member: str) -> bytes:
    """Return one file of an archive."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        file = files.extractfile(f"package/{member}")
        return file.read() if file is not None else b""

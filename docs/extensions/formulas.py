"""Formulas that are drawn at build time, from files of this site alone; a broken one fails the build."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinxcontrib import katex

from npm import archive, content

__all__ = ["setup"]

DIGESTS = {"0.16.22": "e9e0d167db3175481cbadaff38e8d90b130f6a3ddb451a47e43c577fd511f365"}
"""The SHA-256 of the archive of npm for the version that draws."""

PATIENCE = 120.0
"""The seconds that the server of formulas may take to start, or to draw one."""

FOLDER = Path(__file__).parents[1] / "_static" / "katex"

OTHER_FONTS = re.compile(r",url\([^)]*\) format\(\"(?:woff|truetype)\"\)")
"""The formats that a browser takes where it does not know the first one."""


def fetch(_: Sphinx, __: Config) -> None:
    """Put the style sheet and the fonts into the static files, unless they are there."""
    sheet = FOLDER / "katex.min.css"
    if sheet.is_file():
        return
    packed = archive(f"katex@{katex.katex_version}", DIGESTS[katex.katex_version])
    text = OTHER_FONTS.sub("", content(packed, "dist/katex.min.css").decode())
    (FOLDER / "fonts").mkdir(parents=True, exist_ok=True)
    for name in re.findall(r"url\((fonts/[^)]*)\)", text):
        (FOLDER / name).write_bytes(content(packed, f"dist/{name}"))
    sheet.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    katex.KATEX_DEFAULT_OPTIONS["throwOnError"] = True
    # The file of a socket is there before anyone listens to it, and on a busy machine the first call comes in between;
    # a port is asked again. Such a machine also needs more than five seconds.
    katex.KaTeXServer.start_server_process = katex.KaTeXServer.start_network_socket
    katex.STARTUP_TIMEOUT = katex.RENDER_TIMEOUT = PATIENCE
    app.connect("config-inited", fetch)
    return {"parallel_read_safe": True}

"""Put the scripts of asv's pages beside them, so that they can be looked at without a network."""

from __future__ import annotations

import re
from pathlib import Path

from npm import archive, content

__all__ = ["make_local"]

PACKAGES = {
    "blueimp-md5@2.19.0": "0fff5798c7733b21f3e4c0de69ccba12af266e0f01c3e3a41051c0e49a655512",
    "bootstrap@3.1.1": "23b27da4dd80b8fbe8972ac4be87037627e007ad5dd1edb27435844f0a4646a0",
    "flot-orderbars@1.0.0": "e5523ee7cca778f194b34fc31afb6dda40bf1557e6669fda4730c29f53e87101",
    "jquery@3.3.1": "2c7c70a1e796c1568ff05d45a8cb2da2a0fc6e37426c65e4eef6ee55e217933e",
    "jquery.flot@0.8.3": "4db38df8d092a4355741441aa9a3a3b09558e308d6dc3d929e2f103bbfd8475b",
    "stupid-table-plugin@1.1.3": "1186089584b7c2f7fec9ad4232e9aa1adbfea273eaa233b713beb8c2c916b4ac",
}
"""The packages of npm that hold the scripts, with the SHA-256 of their archives."""

FILES = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("jquery.flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("jquery.flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("jquery.flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("jquery.flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}
"""From the name of a file in a link of the page to a package and its file."""

LINK = re.compile(
    r'(src|href)="https://[^"]*/([^"/]+\.(?:js|css))"(?: (?:integrity|crossorigin|referrerpolicy)="[^"]*")*'
)


def make_local(folder: Path) -> None:
    """Copy what the page in `folder` links to into it, and change its links.

    Raises:
        RuntimeError: if npm is missing or fails, an archive is not the expected one, or a link is unknown.
    """
    page = folder / "index.html"
    text = page.read_text(encoding="utf-8")
    unknown = {name for _, name in LINK.findall(text)} - FILES.keys()
    if unknown:
        message = f"the page of asv must link to known files alone. Got {', '.join(sorted(unknown))}."
        raise RuntimeError(message)
    archives = {package: archive(package, digest) for package, digest in PACKAGES.items()}
    (folder / "vendor").mkdir(exist_ok=True)
    for name, (package, member) in FILES.items():
        (folder / "vendor" / name).write_bytes(content(archives[package], member))
    page.write_text(LINK.sub(r'\1="vendor/\2"', text), encoding="utf-8")

"""Print the page of the documentation: `python -m peers > docs/peers.md`."""

from __future__ import annotations

import sys

from peers.report import page

sys.stdout.write(page())

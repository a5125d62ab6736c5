"""The tests of the peers are collected where all their packages are installed, which `make peers` does."""

import importlib.util
import sys
from pathlib import Path

CONFORMANCE = Path(__file__).parents[2]
sys.path.append(str(CONFORMANCE))

PACKAGES = ("fastreid", "mmcv", "pytorchvideo", "slowfast", "timm", "torch")
MISSING = [package for package in PACKAGES if importlib.util.find_spec(package) is None]

collect_ignore = ["test_peers.py", "test_live_checkpoints.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter):
    """Say that they were not collected."""
    if MISSING:
        terminalreporter.line(f"peers: not tested, {', '.join(MISSING)} not installed; `make peers` installs them")

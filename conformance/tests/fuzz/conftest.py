"""Settings of the fuzz tests."""

import sys
from pathlib import Path

# The modules here are no package: those that the tests share are found by their bare names.
sys.path.insert(0, str(Path(__file__).parent))

"""Settings of the tests of the suite itself."""

import sys
from pathlib import Path

import pytest
import torch

# The modules here are no package: those that the tests share are found by their bare names.
sys.path.insert(0, str(Path(__file__).parent))

# A third party's project, whose tests run in an environment of their own.
collect_ignore = ["toy"]

REJECTION = "rejection of a fault"


@pytest.fixture(autouse=True)
def _one_thread():
    """Compute in one thread: arrays this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def record_rejection(request):
    """Return a function that keeps a line for the table."""
    return lambda line: request.node.user_properties.append((REJECTION, line))


def pytest_terminal_summary(terminalreporter, config):
    """With `-s`, print every fault and what the checks say of it."""
    if config.getoption("capture") != "no":
        return
    kept = (pair for report in terminalreporter.stats.get("passed", []) for pair in report.user_properties)
    lines = [line for name, line in kept if name == REJECTION]
    if lines:
        terminalreporter.section("faults, and the checks that reject them")
        terminalreporter.write_line("\n".join(lines))

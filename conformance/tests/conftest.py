"""Settings of the whole test run."""

import gc
import os

import hypothesis
import pytest

# Before TensorFlow: in a build for GPUs PyTorch's compiler ends the process when it is loaded after it.
import torch._dynamo  # noqa: F401

# PyTorch's compiler need not ask g++ for each kind of vectors whether it can build them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

IN_CI = bool(os.environ.get("CI"))

hypothesis.settings.register_profile("suite", deadline=None, derandomize=IN_CI)
hypothesis.settings.load_profile("suite")


def pytest_collection_finish():
    """Let the garbage collector leave alone what is there to stay: three frameworks take it a second and more a run."""
    gc.collect()
    gc.freeze()


def _skipped(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    found = reporter.stats.get("skipped", []) if reporter else []
    return [one for one in found if "needs a GPU" not in str(one.longrepr)]  # which no runner of ours has


def pytest_sessionfinish(session):
    """Fail a run of continuous integration in which something was skipped."""
    if IN_CI and session.exitstatus == pytest.ExitCode.OK and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """Say why such a run failed."""
    if IN_CI and (skipped := _skipped(config)):
        terminalreporter.section("skipped where CI is set", red=True)
        terminalreporter.line(f"{len(skipped)} skipped: continuous integration must run everything.")

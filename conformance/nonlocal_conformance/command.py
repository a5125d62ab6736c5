"""`nonlocal conformance`: run the checks on one backend."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nonlocal_conformance import loader, suite
from nonlocal_core.commands.usage import UsageError

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the program."""
    parser = subparsers.add_parser(
        "conformance",
        help="run the conformance suite on a backend",
        description="Run every check of the conformance suite that applies to a backend.",
        epilog="What follows -- goes to pytest, for example: nonlocal conformance torch -- -x -k gradients",
    )
    parser.add_argument("backend", help="the name of an installed backend, such as numpy, or module:Driver")
    parser.add_argument("--device", default="cpu", help="where it computes: cpu (default), cuda, ...")
    parser.add_argument("--expected-failures", metavar="FILE", help="a file of lines `check  # reason` that must fail")
    parser.set_defaults(run=run, passed_on=[])


def run(args: argparse.Namespace) -> int:
    """Run the suite and return the exit status of pytest."""
    try:
        import pytest
    except ImportError:
        message = 'the suite needs pytest. Install it with `pip install "nonlocal-core[test]"`.'
        raise UsageError(message) from None
    sys.path.insert(0, str(Path.cwd()))  # a driver may be a file of the folder in which one stands
    try:
        loader.load(args.backend, args.device)
    except (ImportError, ValueError) as error:
        raise UsageError(str(error)) from error
    # The settings of the suite's own folder, not those of the folder in which the program runs.
    settings = Path(suite.__file__).with_name("pytest.ini")
    options = ["-c", str(settings), "-p", "nonlocal_conformance.plugin", "-p", "no:cacheprovider", "--pyargs"]
    options += ["nonlocal_conformance.suite.test_conformance", "--backend", args.backend, "--device", args.device]
    if args.expected_failures:
        options += ["--expected-failures", args.expected_failures]
    return int(pytest.main([*options, *args.passed_on]))

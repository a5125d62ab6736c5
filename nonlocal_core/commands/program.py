"""The command line program `nonlocal`; its commands are the entry points of "nonlocal_core.commands"."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

from nonlocal_core import __version__
from nonlocal_core.commands.usage import UsageError

__all__ = ["GROUP", "main"]

GROUP = "nonlocal_core.commands"
"""The entry-point group; an entry names a function `add_parser(subparsers)`.

It adds its parser and calls `parser.set_defaults(run=...)` with a function from the parsed arguments to the
exit status; with a default for `passed_on` it finds there, as a list, what follows "--". It is called whichever
command is run, so its module must be light to import.
"""

_USAGE = 2
_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser that takes options by their full names alone and leaves the report of errors to `main`."""

    def __init__(self, **options: Any) -> None:
        """Take the options of `argparse.ArgumentParser`."""
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise the error of a wrong command line."""
        text = f"{message} (`{self.prog} --help` shows what there is)"
        raise UsageError(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 2 for an error of the user, which is one line on the standard error stream.

    Raises:
        SystemExit: with status 0 after `--help` and `--version`.
    """
    parser = Parser(prog="nonlocal", description="The non-local block: one specification, several frameworks.")
    parser.add_argument("--version", action="version", version=f"nonlocal {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, entry in sorted({entry.name: entry for entry in entry_points(group=GROUP)}.items()):
        _add(name, entry, subparsers)
    words = sys.argv[1:] if argv is None else list(argv)
    # Split here: argparse takes what follows -- for the command only where no option stands before it.
    end = words.index("--") if "--" in words else len(words)
    try:
        args = parser.parse_args(words[:end])
        if hasattr(args, "passed_on"):
            args.passed_on = words[end + 1 :]
        elif end < len(words):
            parser.error("this command takes nothing after --")
        return int(args.run(args))
    except UsageError as error:
        sys.stderr.write(f"nonlocal: error: {error}\n")
        return _USAGE
    except KeyboardInterrupt:
        sys.stderr.write("nonlocal: interrupted\n")
        return _INTERRUPTED


def _add(name: str, entry: EntryPoint, subparsers: Any) -> None:
    """Add one command; one that cannot be loaded says so when it is run, and spoils no other."""
    try:
        entry.load()(subparsers)
    except (ImportError, AttributeError) as error:
        reason = f"the command {name!r} cannot be loaded: {error}"

        def run(_: argparse.Namespace) -> int:
            raise UsageError(reason)

        subparsers.add_parser(name, help=f"({reason})", description=reason).set_defaults(run=run)

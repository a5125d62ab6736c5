"""The command line program `nonlocal`; its commands are the entry points of "nonlocal_core.commands"."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import shutil
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
_UNWRITTEN = 74
_INTERRUPTED = 130
_CLOSED = 141
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Parser(argparse.ArgumentParser):
    """A parser that takes options by their full names alone and leaves the report of errors to `main`."""

    def __init__(self, **options: Any) -> None:
        """Take the options of `argparse.ArgumentParser`."""
        super().__init__(allow_abbrev=False, **options)

    def format_help(self) -> str:
        """Return the help, in which no line of the usage is wider than the terminal for its indent alone."""
        usage, blank, rest = super().format_help().partition("\n\n")
        first, *others = usage.splitlines()
        others = [line.strip() for line in others]
        room = shutil.get_terminal_size().columns - max(map(len, others), default=0)
        indent = " " * max(2, min(room, len("usage: ") + len(self.prog) + 1))
        return "\n".join([first, *(indent + line for line in others)]) + blank + rest

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write a message; argparse keeps silent where that fails."""
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Raise the error of a wrong command line."""
        text = f"{message} (`{self.prog} --help` shows what there is)"
        raise UsageError(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 2 for an error of the user and 74 for output that cannot be written, each of which is one line
        on the standard error stream.

    Raises:
        SystemExit: with status 0 after `--help` and `--version`.
    """
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            sys.stdout.flush()  # where it fails at the end of the process, nobody notices
    except UsageError as error:
        sys.stderr.write(f"nonlocal: error: {error}\n")
        return _USAGE
    except KeyboardInterrupt:
        sys.stderr.write("nonlocal: interrupted\n")
        return _INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno not in _FULL:
            raise
        with contextlib.suppress(OSError):  # what is still in the buffer would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return _CLOSED
        sys.stderr.write(f"nonlocal: error: the output cannot be written: {error.strerror}.\n")
        return _UNWRITTEN


def _run(words: list[str]) -> int:
    """Find the command that the words name, and run it."""
    parser = Parser(prog="nonlocal", description="The non-local block: one specification, several frameworks.")
    parser.add_argument("--version", action="version", version=f"nonlocal {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, entry in sorted({entry.name: entry for entry in entry_points(group=GROUP)}.items()):
        _add(name, entry, subparsers)
    # Split here: argparse takes what follows -- for the command only where no option stands before it.
    end = words.index("--") if "--" in words else len(words)
    args, unknown = parser.parse_known_args(words[:end])
    passes_on, rest = hasattr(args, "passed_on"), words[end + 1 :]
    if unknown:
        known = [word for word in words[:end] if word not in unknown]
        moved = shlex.join(["nonlocal", *known, "--", *unknown, *rest])
        hint = f"; what this command passes on follows --: {moved}" if passes_on else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if passes_on:
        args.passed_on = rest
    elif end < len(words):
        parser.error("this command takes nothing after --")
    return int(args.run(args))


def _add(name: str, entry: EntryPoint, subparsers: Any) -> None:
    """Add one command; one that cannot be loaded says so when it is run, and spoils no other."""
    try:
        entry.load()(subparsers)
    except (ImportError, AttributeError) as error:
        reason = f"the command {name!r} cannot be loaded: {error}"

        def run(_: argparse.Namespace) -> int:
            raise UsageError(reason)

        subparsers.add_parser(name, help=f"({reason})", description=reason).set_defaults(run=run)

"""The command `nonlocal bench`: show what the benchmarks measured."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from nonlocal_bench.results import MALFORMED, Run, load
from nonlocal_core.commands.usage import UsageError, fitted, need
from nonlocal_core.errors import shortened
from nonlocal_core.files.atomic_write import replace_file

__all__ = ["add_parser"]

_WIDTH = 160
"""The width of the tables where there is no terminal."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the program."""
    parser = subparsers.add_parser(
        "bench",
        help="show what the benchmarks measured, as tables and a picture",
        description="Show what `make bench` measured: time and memory of every form, of the matrix, and of other "
        "implementations, as tables and as a picture of both against the number of positions.",
    )
    text = "the folder in which the results are (default: %(default)s)"
    parser.add_argument("--results", type=Path, metavar="DIR", default=Path("benchmarks/results"), help=text)
    parser.add_argument("--machine", metavar="NAME", help="results of this machine (default: the newest of any)")
    parser.add_argument("--commit", metavar="HASH", help="results of this commit (default: the newest of any)")
    text = "the curves of one call or of a training step (default: %(default)s)"
    parser.add_argument("--step", choices=("forward", "training"), default="training", help=text)
    text = "a geometry of the table; may be repeated (default: all that were measured)"
    parser.add_argument("--geometry", action="append", metavar="NAME", help=text)
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    text = "the picture to write (default: %(default)s)"
    parser.add_argument("--output", type=Path, metavar="FILE", default=Path("bench.png"), help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UsageError: for a wrong option, results that are missing, or a package that is not installed.
    """
    need("bench", "matplotlib", "rich")
    if args.output.suffix.lower() != ".png":
        message = f"argument --output: must end in .png. Got {str(args.output)!r}."
        raise UsageError(message)
    try:
        found = load(args.results, args.machine, args.commit)
        return show(args, found)
    except (ValueError, *MALFORMED) as error:
        got = error if isinstance(error, ValueError) else f"results that cannot be shown: {shortened(repr(error))}"
        message = f"argument --results: must be a folder of results, which `make bench` writes. Got {got}."
        raise UsageError(message) from error


def show(args: argparse.Namespace, found: Run) -> int:
    """Print the tables and draw the picture."""
    from rich.console import Console

    from nonlocal_bench.picture import draw
    from nonlocal_bench.tables import blocks, growth

    known = list(dict.fromkeys(one.params["geometry"] for one in found.measurements if "geometry" in one.params))
    geometries = known if args.geometry is None else args.geometry
    wrong = [name for name in geometries if name not in known]
    if wrong:
        message = f"argument --geometry: must be one of {', '.join(known)}. Got {wrong[0]!r}."
        raise UsageError(message)
    out = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)

    def show(table: Any) -> None:
        out.print(table if args.markdown else fitted(table, out))

    out.print(introduction(found), soft_wrap=True)
    if geometries:
        show(blocks(found, geometries, markdown=args.markdown))
    if any(one.params["step"] == args.step for one in found.of("scaling.Scaling.time_positions")):
        show(growth(found, args.step, markdown=args.markdown))
        try:
            replace_file(args.output, draw(found, args.step))
        except OSError as error:
            message = f"argument --output: cannot write {str(args.output)!r}: {error.strerror}."
            raise UsageError(message) from error
        out.print(f"Wrote {args.output}", soft_wrap=True)
    return 0


def introduction(found: Run) -> str:
    """Return what was measured, where and with what, in words."""
    machine = found.machine
    day = time.strftime("%Y-%m-%d", time.gmtime(found.date))
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return (
        f"Commit {found.commit[:8]} of {day} on {machine['machine']}: {machine['num_cpu']} cores of {machine['cpu']}, "
        f"{int(machine['ram']) / 2**30:.0f} GiB, Python {machine['python']}\n"
        f"{versions}\n"
        "Batch 1; memory beside what is held before the call; in brackets the ratio to torch."
    )

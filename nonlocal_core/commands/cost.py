"""The command `nonlocal cost`: what a block costs by each method, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from nonlocal_core.commands.usage import UsageError, fitted, need, option
from nonlocal_core.costs.model import DIMENSIONS, DTYPES, Cost, cost
from nonlocal_core.geometry import SPACES
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.options import PAIRWISE, SpecOptions
from nonlocal_core.spec.presets import PRESETS

__all__ = ["add_parser"]

NOTE = (
    "FLOPs: 2 for each multiply-add of the products. Bytes moved: each step reads its operands and writes its "
    "results once. Peak memory: beside the input, the parameters and the output{}."
)

RECEIVED = " Received: the gradients of the parameters are left out."

_WHOLE = 100
"""The least number of which no decimals are shown."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the program."""
    parser = subparsers.add_parser(
        "cost",
        help="count the parameters, FLOPs, bytes and memory of a block",
        description="Count what a block costs by each method that computes it: parameters, floating-point operations, "
        "bytes moved and peak extra memory. Nothing is computed, so any size will do.",
        # An option of the spec that is not given is left to the preset, or to the spec.
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    rule = "be 3, 4 or 5 positive sizes, such as 8x4x14x14x1024"
    shape = option(_sizes, lambda sizes: len(sizes) in DIMENSIONS and min(sizes) > 0, rule)
    count = option(int, lambda value: value > 0, "be a positive int")
    rule = "be 'none', a positive int, or one for each axis, such as 1x2x2"
    window = option(_window, lambda _: True, rule)

    add("--shape", type=shape, required=True, metavar="BxS1x..xC", help="the input, such as 8x4x14x14x1024")
    add("--preset", type=_one_of(PRESETS), metavar="NAME", default=None, help=f"a public block: {', '.join(PRESETS)}")
    add("--pairwise", type=_one_of(PAIRWISE), metavar="FORM", help=f"the form: {', '.join(PAIRWISE)}")
    add("--inner-channels", type=count, metavar="N", help="the channels of theta, phi and g")
    add("--subsample", type=window, metavar="WINDOW", help="the pooling of the keys: none, 2, or 1x2x2")
    add("--subsample-at", type=_one_of(("projection", "input")), metavar="WHERE", help="projection or input")
    add("--axes", type=_one_of(SPACES), metavar="AXES", help=f"what interacts: {', '.join(SPACES)}")
    add("--group-size", type=count, metavar="FRAMES", help="the frames in one group")
    add("--norm", type=_norm, metavar="NORM", help="none, batch or affine")
    text = f"{', '.join(DTYPES)} (default: float32)"
    add("--dtype", type=_one_of(DTYPES), metavar="DTYPE", default="float32", help=text)
    add("--training", action="store_true", default=False, help="count a training step, forward and backward")
    text = "count one of so many devices, which cut the positions along the first spatial axis"
    add("--devices", type=count, metavar="P", default=1, help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        UsageError: if the shape and the options do not fit each other, or a package is not installed.
    """
    need("demo", "rich")
    from rich.console import Console

    try:
        spec = spec_of(args)
        found = cost(spec, args.shape, args.dtype, args.training, devices=args.devices)
    except ValueError as error:
        raise UsageError(str(error)) from error
    console = Console(markup=False, highlight=False)
    console.print(introduction(args, spec, found), soft_wrap=True)
    console.print(fitted(table_of(found, cut=args.devices > 1), console))
    note = NOTE.format(", and their gradients" if args.training else "")
    console.print(note + (RECEIVED if args.devices > 1 else ""))
    return 0


def spec_of(args: argparse.Namespace) -> NonLocalSpec:
    """Return the spec that the options describe."""
    options = {name: value for name, value in vars(args).items() if name in SpecOptions.__annotations__}
    channels = args.shape[-1]
    if args.preset is None:
        return NonLocalSpec(channels=channels, **options)
    return NonLocalSpec.preset(args.preset, channels=channels, rank=len(args.shape) - 2, **options)


def introduction(args: argparse.Namespace, spec: NonLocalSpec, found: Cost) -> str:
    """Return what is counted, in words, and the number of parameters."""
    name = "the non-local block" if args.preset is None else f"the block {args.preset!r}"
    step = "a training step" if args.training else "forward"
    devices = f", each of {args.devices} devices" if args.devices > 1 else ""
    return (
        f"{name}, {spec.pairwise}, {spec.channels} channels, {spec.inner_channels} inside, "
        f"on {' x '.join(map(str, args.shape))}, {args.dtype}, {step}{devices}\n"
        f"{found.parameters:,} parameters"
    )


def table_of(found: Cost, *, cut: bool = False) -> Any:
    """Return the table of the methods, for a console of rich."""
    from rich.table import Table

    table = Table()
    table.add_column("Method")
    titles = ("GFLOP", "MiB moved", "MiB peak", "MiB received")
    for title in titles[: 3 + cut]:
        table.add_column(title, justify="right")
    for name, method in found.methods.items():
        sizes = method.bytes_moved, method.peak_memory, method.bytes_received
        table.add_row(name, _shown(method.flops / 1e9), *(_shown(size / 2**20) for size in sizes[: 2 + cut]))
    return table


def _shown(value: float) -> str:
    """Return a number with three digits, or as a whole number where it is large."""
    return f"{value:,.0f}" if value >= _WHOLE else f"{value:#.3g}"


def _one_of(values: Collection[str]) -> Any:
    """Return the type of an option that takes one of some words."""
    return option(str, lambda value: value in values, f"be one of {', '.join(map(repr, values))}")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def _window(text: str) -> int | tuple[int, ...] | None:
    """Read a pooling window."""
    if text == "none":
        return None
    sizes = _sizes(text)
    return sizes if "x" in text else sizes[0]


def _norm(text: str) -> str | None:
    """Read a norm."""
    value: str = _one_of(("none", "batch", "affine"))(text)
    return None if value == "none" else value

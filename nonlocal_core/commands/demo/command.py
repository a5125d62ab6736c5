"""The command `nonlocal demo`: denoise a photograph by the non-local operation in every installed backend."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nonlocal_core.commands.demo.comparison import NOTE as COMPARISON_NOTE
from nonlocal_core.commands.demo.comparison import best_window, whole_picture
from nonlocal_core.commands.demo.denoise import default_strength, estimate_noise, operands, pixel_weights, psnr
from nonlocal_core.commands.demo.measurement import NOTE, REFERENCE, SAMPLE, Row, measured, table_of
from nonlocal_core.commands.demo.picture import PIXELS, Panel, built_in, draw, read, strong_edge
from nonlocal_core.commands.usage import UsageError, fitted, need, option
from nonlocal_core.files.atomic_write import replace_file

__all__ = ["add_parser"]

Array = np.ndarray[Any, Any]

_BLOCK_ALONE = "has the block alone, without its operation."

_NOISE, _PATCH = 1e9, 32
"""The most that is taken for the noise, and what no side of a patch reaches."""

_QUANTUM = 1 / 255
"""The step of a photograph's values: no noise is taken to be below it."""


def add_parser(subparsers: Any, backends: Any) -> None:
    """Add the command to the program.

    Args:
        subparsers: the commands.
        backends: what has `load(name, device)`, a driver, and `available(device)`, all of them and what is missing.
    """
    parser = subparsers.add_parser(
        "demo",
        help="denoise a photograph in every installed backend",
        description="Denoise a photograph by non-local means, which is the non-local operation on patches, "
        "in every installed backend and over all pairs of pixels; compare the backends and draw the result.",
    )
    add = partial(_add, parser)
    count = option(int, lambda value: value > 0, "be a positive int")
    index = option(int, lambda value: value >= 0, "be an int, 0 or above")
    odd = option(int, lambda value: 0 < value < _PATCH and value % 2 == 1, f"be an odd int from 1 to {_PATCH - 1}")
    rule = f"be 0 or a number from {1 / _NOISE:g} to {_NOISE:g}"
    noise = option(float, lambda value: value == 0 or 1 / _NOISE <= value <= _NOISE, rule)
    strength = option(float, lambda value: 0 < value < math.inf, "be a positive, finite number")
    reach = option(float, lambda value: value > 0, "be a positive number or inf")

    text = "a PNG or JPEG file (default: a photograph that scikit-image ships)"
    add("image", text, nargs="?", type=Path, metavar="FILE")
    text = "the side of the picture; of a file, the longer side at most"
    add("--size", text, type=count, metavar="PIXELS", default=192)
    text = "how many pixels a file has at most; one with more is not decoded"
    add("--most-pixels", text, type=count, metavar="N", default=PIXELS)
    text = "the noise that is added to values of 0 to 1; 0 takes a picture that has noise"
    add("--noise", text, type=noise, metavar="SIGMA", default=0.1)
    add("--seed", "the seed of that noise", type=index, metavar="N", default=0)
    text = (
        "the distance of two patches that brings a weight to 1/e (default: 1.4 x noise x patch, in colour x "
        "the root of 3; with --noise 0 by an estimate of the noise)"
    )
    add("--strength", text, type=strength, metavar="H")
    text = "the distance of two pixels that brings a weight to 1/e, or inf"
    add("--reach", text, type=reach, metavar="S", default=4.0)
    add("--patch", "the side of a patch", type=odd, metavar="PIXELS", default=5)
    text = "an installed backend or module:Driver; may be repeated (default: all that are installed)"
    add("--backend", text, action="append", metavar="NAME")
    add("--device", "where the frameworks compute", default="cpu")
    text = "the pixel whose weights are drawn (default: one on a strong edge)"
    add("--pixel", text, type=index, nargs=2, metavar=("ROW", "COLUMN"))
    add("--output", "the picture to write", type=Path, metavar="FILE", default=Path("demo.png"))
    text = "measure scikit-image's non-local means too; at the default size this takes minutes"
    add("--compare", text, action="store_true")
    parser.set_defaults(run=partial(run, backends=backends))


def _add(parser: argparse.ArgumentParser, name: str, text: str, **options: Any) -> None:
    """Add an argument whose help ends with its default, if it has one."""
    shown = " (default: %(default)s)" if options.get("default") is not None else ""
    parser.add_argument(name, help=text + shown, **options)


def run(args: argparse.Namespace, backends: Any) -> int:
    """Run the command; the picture is written when all is done.

    Raises:
        UsageError: for a wrong option, file or backend, or a package that is not installed.
    """
    need("demo", "matplotlib", "PIL", "rich", "skimage")
    from rich.console import Console

    # Extras are named in square brackets, which are no markup.
    out, err = (Console(markup=False, highlight=False, stderr=stderr) for stderr in (False, True))
    check_output(args.output)
    clean = photograph_of(args)
    check_choices(args, clean)
    whole, frameworks, missing = backends_of(backends, args.backend, args.device)

    noisy = clean + np.random.default_rng(args.seed).normal(scale=args.noise, size=clean.shape)
    noise = args.noise if args.noise > 0 else max(estimate_noise(noisy), _QUANTUM)
    strength = args.strength
    if strength is None:
        strength = default_strength(noise, args.patch, clean.shape[-1])
    try:
        arrays = operands(noisy, strength=strength, patch=args.patch, reach=args.reach)
    except ValueError as error:
        _, name, words = str(error).split("`", 2)
        message = f"argument --{name}:{words}"
        raise UsageError(message) from error
    out.print(introduction(args, clean, noisy, noise, strength), soft_wrap=True)

    results = measured(backends.load(REFERENCE), frameworks, arrays, whole=whole, console=err)
    denoised = results[0][0].reshape(clean.shape)
    rows = [row for _, row in results]
    if args.noise > 0:
        rows = [dataclasses.replace(row, psnr=psnr(clean, y.reshape(clean.shape))) for y, row in results]
    notes = [NOTE.format("" if whole else f" at {min(SAMPLE, noisy[..., 0].size):,} pixels")]
    if args.compare:
        rows += compared(clean, noisy, args, err)
        notes.append(COMPARISON_NOTE)
    out.print(fitted(table_of(rows), out))
    out.print("\n".join(notes + [f"Not measured: {reason}" for reason in missing.values()]))
    write_picture(args, clean, noisy, denoised, arrays)
    out.print(f"Wrote {args.output}", soft_wrap=True)
    return 0


def check_output(path: Path) -> None:
    """Check, before anything is computed, that the picture can be written."""
    try:
        is_folder, has_folder = path.is_dir(), path.parent.is_dir() and os.access(path.parent, os.W_OK)
    except OSError as error:
        raise output_error(path, error) from error
    if path.suffix.lower() != ".png":
        rule = "end in .png"
    elif is_folder:
        rule = "be a file, not a folder"
    elif not has_folder:
        rule = "be in a folder that exists and can be written"
    else:
        return
    message = f"argument --output: must {rule}. Got {str(path)!r}."
    raise UsageError(message)


def output_error(path: Path, error: OSError) -> UsageError:
    """Return the error for a picture that the system cannot write."""
    return UsageError(f"argument --output: cannot write {str(path)!r}: {error.strerror}.")


def photograph_of(args: argparse.Namespace) -> Array:
    """Return the photograph, `(H, W, C)` in 0..1."""
    try:
        return built_in(args.size) if args.image is None else read(args.image, args.size, args.most_pixels)
    except ValueError as error:
        message = f"argument {'--size' if args.image is None else 'FILE'}: {error}"
        raise UsageError(message) from error


def check_choices(args: argparse.Namespace, clean: Array) -> None:
    """Check the options that depend on the photograph or on each other."""
    height, width, _ = clean.shape
    if args.pixel is not None and not (args.pixel[0] < height and args.pixel[1] < width):
        message = f"argument --pixel: must be one of the {height} x {width} pixels, from 0. Got {args.pixel}."
        raise UsageError(message)
    if args.compare and args.noise == 0:
        message = "argument --compare: must come with --noise above 0, for it judges by the clean picture."
        raise UsageError(message)


def backends_of(backends: Any, names: Sequence[str] | None, device: str) -> tuple[bool, list[Any], dict[str, str]]:
    """Return whether the whole reference is asked for, the drivers of the frameworks, and what is missing."""
    if names is None:
        drivers, missing = backends.available(device)
        missing.pop(REFERENCE, None)
        frameworks = [driver for driver in drivers if driver.name != REFERENCE and "op" in driver.capabilities]
        lacking = [driver.name for driver in drivers if "op" not in driver.capabilities]
        missing |= {name: f"backend {name!r} {_BLOCK_ALONE}" for name in lacking}
        if device != "cpu" and not frameworks:
            reasons = " ".join(missing.values())
            message = f"argument --device: no installed framework computes on {device!r}. {reasons}"
            raise UsageError(message)
        return True, frameworks, missing
    named = [framework_of(backends, name, device) for name in dict.fromkeys(names) if name != REFERENCE]
    return REFERENCE in names, named, {}


def framework_of(backends: Any, name: str, device: str) -> Any:
    """Return the driver of a framework that is asked for by its name."""
    try:
        driver = backends.load(name, device)
    except (ImportError, ValueError) as error:
        message = f"argument --backend {name}: {error}"
        raise UsageError(message) from error
    if "op" not in driver.capabilities:
        message = f"argument --backend {name}: {_BLOCK_ALONE}"
        raise UsageError(message)
    return driver


def introduction(args: argparse.Namespace, clean: Array, noisy: Array, noise: float, strength: float) -> str:
    """Return what is about to be computed, in words."""
    height, width, channels = clean.shape
    name = "built-in photograph (scikit-image's camera)" if args.image is None else args.image
    colour = "in colour" if channels > 1 else "grey"
    added = f"noise {noise:g} added: {psnr(clean, noisy):.2f} dB"
    found = added if args.noise > 0 else f"as it is, noise estimated at {noise:.3g}"
    pairs = (height * width) ** 2
    return (
        f"{name}, {height} x {width} pixels, {colour}, {found}\n"
        f"every pixel with every other, {pairs:,} pairs: patches of {args.patch} x {args.patch}, "
        f"h = {strength:.3g}, s = {args.reach:g} pixels"
    )


def compared(clean: Array, noisy: Array, args: argparse.Namespace, console: Any) -> list[Row]:
    """Return the rows of scikit-image."""
    with console.status("scikit-image, several windows"):
        best = best_window(clean, noisy, args.noise, args.patch)
    with console.status("scikit-image, the whole picture as the window: at the default size this takes minutes"):
        return [best, whole_picture(clean, noisy, args.noise, args.patch)]


def write_picture(
    args: argparse.Namespace, clean: Array, noisy: Array, denoised: Array, arrays: tuple[Array, Array, Array]
) -> None:
    """Draw the picture and write it."""
    height, width, _ = clean.shape
    row, column = strong_edge(denoised) if args.pixel is None else args.pixel
    weights = pixel_weights(arrays[0], arrays[1], row * width + column).reshape(height, width)
    if args.noise > 0:
        panels = [
            Panel("photograph", clean),
            Panel(f"with noise: {psnr(clean, noisy):.1f} dB", noisy),
            Panel(f"denoised: {psnr(clean, denoised):.1f} dB", denoised),
        ]
    else:
        removed = Panel("what is removed, on grey", noisy - denoised + 0.5)
        panels = [Panel("photograph", clean), removed, Panel("denoised", denoised)]
    content = draw(panels, weights, (row, column), args.reach)
    try:
        replace_file(args.output, content)
    except OSError as error:
        raise output_error(args.output, error) from error

"""The picture of `nonlocal bench`: time and memory against the number of positions, a column for each form."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from nonlocal_bench.results import Measurement, Run
from nonlocal_bench.tables import MATRIX, label, shown_bytes, shown_seconds
from nonlocal_core.spec.options import PAIRWISE

__all__ = ["draw"]

_ROWS = {
    "scaling.Scaling.time_positions": ("time", shown_seconds, 10),
    "scaling.Scaling.track_memory": ("extra memory", shown_bytes, 2),
}

_COLOURS = {"torch": "C0", "tensorflow": "C1", "tensorflow_xla": "C5", "jax": "C2"}
_OTHERS = {"mmcv": ("C3", "s"), "pytorchvideo": ("C4", "^"), "slowfast": ("C6", "v"), "timm": ("C8", "D")}
_STEPS = {"forward": "one call of the block", "training": "one training step"}
_MARGIN = 1.3
_EDGE = 0.95
"""Where the marks of what failed stand, as a share of the height."""


def draw(run: Run, step: str) -> bytes:
    """Draw the curves.

    Args:
        run: the results.
        step: "forward" or "training".

    Returns:
        The content of a PNG file.
    """
    from matplotlib.figure import Figure

    found = {name: [one for one in run.of(name) if one.params["step"] == step] for name in _ROWS}
    drawn = {one.params["pairwise"] for measurements in found.values() for one in measurements}
    forms = [form for form in PAIRWISE if form in drawn]
    figure = Figure(figsize=(3.1 * len(forms) + 0.6, 6.2), dpi=150, layout="constrained")
    axes = figure.subplots(len(_ROWS), len(forms), squeeze=False, sharex=True, sharey="row")
    positions = [one.params["positions"] for measurements in found.values() for one in measurements]
    lines: dict[str, Any] = {}
    for row, (name, (title, shown, base)) in zip(axes, _ROWS.items(), strict=True):
        for axis, form in zip(row, forms, strict=True):
            lines |= _curves(axis, [one for one in found[name] if one.params["pairwise"] == form])
            axis.set_xscale("log", base=2)
            axis.set_xlim(min(positions) / _MARGIN, max(positions) * _MARGIN)
            axis.set_yscale("log", base=base)
            axis.grid(alpha=0.3)
            axis.yaxis.set_major_formatter(lambda value, _, shown=shown: shown(value))
            axis.yaxis.set_minor_formatter("")
        row[0].set_ylabel(title)
    for axis, form in zip(axes[0], forms, strict=True):
        axis.set_title(form.replace("_", " "))
    for axis in axes[-1]:
        axis.set_xlabel("positions N")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")  # noqa: PLR2004
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    device = found["scaling.Scaling.time_positions"][0].params["device"]
    title = f"{_STEPS[step]}, 64 channels, float32, {_machine(run, device)}, {run.commit[:8]}"
    figure.suptitle(title, fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _machine(run: Run, device: str) -> str:
    return f"{run.machine['num_cpu']} CPU cores" if device == "cpu" else run.machine["machine"]


def _curves(axis: Any, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Draw a line for each implementation and return the lines by their labels."""
    lines = {}
    for backend in dict.fromkeys(one.params["backend"] for one in measurements):
        curve = (one for one in measurements if one.params["backend"] == backend)
        own = sorted(curve, key=lambda one: one.params["positions"])
        points = [(one.params["positions"], one.value) for one in own if one.value]
        failed = [one.params["positions"] for one in own if one.value is None and one.note is not None]
        colour, marker, style = _look(backend)
        if points:
            look = {"color": colour, "marker": marker, "markersize": 4}
            (lines[label(backend, "auto")],) = axis.plot(*zip(*points, strict=True), style, **look)
        if failed:
            heights = [_EDGE] * len(failed)
            axis.plot(failed, heights, "x", color=colour, transform=axis.get_xaxis_transform())
            (lines["out of memory or time"],) = axis.plot([], [], "x", color="black")
    return lines


def _look(backend: str) -> tuple[str, str, str]:
    """Return the colour, the marker and the style of a line."""
    if backend in _OTHERS:
        return *_OTHERS[backend], ":"
    matrix = backend.endswith(MATRIX)
    return _COLOURS.get(backend.removesuffix(MATRIX), "C7"), "" if matrix else "o", "--" if matrix else "-"

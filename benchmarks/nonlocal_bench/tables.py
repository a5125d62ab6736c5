"""The tables of `nonlocal bench`, for a console of rich."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from nonlocal_bench.results import Measurement, Run

__all__ = ["blocks", "growth", "label", "shown_bytes", "shown_seconds"]

OURS = ("torch", "tensorflow", "tensorflow_xla", "jax")
"""The backends of this project; the plain matrix form and other implementations are backends of their own."""

MATRIX = "_matrix"
"""How the name of a framework ends when it stands for the plain matrix form."""

FIRST = ("torch", "auto")
"""To what the others are compared."""

_KEYS = ("pairwise", "geometry", "device", "dtype")

_LEAST = 4096
"""From how many positions on a curve counts for its slope."""

_TEN, _THOUSAND = 10, 1000

_WORDS = ("form", "geometry", "implementation")


def blocks(run: Run, geometries: Collection[str], *, markdown: bool) -> Any:
    """Return the table of time, memory, error and share of the blocks.

    Args:
        run: the results.
        geometries: the names of those that are shown.
        markdown: whether the table is drawn as Markdown.
    """
    columns: dict[str, tuple[str, Callable[[float], str], bool]] = {
        "forward": ("forward.Forward.time_forward", shown_seconds, True),
        "memory": ("forward.Forward.track_memory", shown_bytes, True),
        "training step": ("training.Training.time_step", shown_seconds, True),
        "its memory": ("training.Training.track_memory", shown_bytes, True),
        "error": ("quality.Quality.track_error", "{:.1f} eps".format, False),
        "of a product": ("quality.Quality.track_cost", lambda times: f"{1 / times:.0%}", False),
    }
    by_column = {title: _by_case(run.of(name)) for title, (name, _, _) in columns.items()}
    cases = list(dict.fromkeys(case for found in by_column.values() for case in found))
    titles = [title for title, found in by_column.items() if found]
    table = _table(["form", "geometry", "implementation", *titles], markdown=markdown)
    for place in dict.fromkeys(case[:4] for case in cases if case[1] in geometries):
        ways = sorted((case[4:] for case in cases if case[:4] == place), key=_rank)
        for way in ways:
            cells = []
            for title in titles:
                _, shown, compared = columns[title]
                found = by_column[title]
                cells.append(_cell(found.get(place + way), found.get(place + FIRST) if compared else None, shown))
            head = (place[0], " ".join([place[1], *(word for word in place[2:] if word not in {"cpu", "float32"})]))
            table.add_row(*(head if way == ways[0] or markdown else ("", "")), label(*way), *cells)
        table.add_section()
    return table


def growth(run: Run, step: str, *, markdown: bool) -> Any:
    """Return the table of the powers of N with which time and memory grow.

    Args:
        run: the results.
        step: "forward" or "training".
        markdown: whether the table is drawn as Markdown.
    """
    table = _table(["form", "implementation", "time", "memory", "largest N"], markdown=markdown)
    times, bytes_held = (run.of(f"scaling.Scaling.{name}") for name in ("time_positions", "track_memory"))
    fitted = [_fitted(run, name) if step == "training" else {} for name in ("track_time", "track_memory")]
    for form in dict.fromkeys([*(one.params["pairwise"] for one in times), *(key[0] for key in fitted[0])]):
        own = [[one for one in found if _is_of(one, form, step)] for found in (times, bytes_held)]
        for way in sorted({_way(one) for one in own[0]}, key=_rank):
            curves = [[one for one in found if _way(one) == way] for found in own]
            largest = max((one.params["positions"] for one in curves[0] if one.value), default=0)
            table.add_row(form, label(*way), *map(_power, curves), f"{largest:,}" if largest else "-")
        for key in sorted((key for key in fitted[0] if key[0] == form), key=lambda key: OURS.index(key[1])):
            powers = [found.get(key) for found in fitted]
            cells = [f"N^{power:.2f}" if power else "-" for power in powers]
            table.add_row(form, f"{key[1]}, memory kept", *cells, f"{key[2]:,}")
        table.add_section()
    return table


def label(backend: str, method: str) -> str:
    """Return the name of an implementation in tables and pictures."""
    name = backend.replace(MATRIX, ", matrix")
    return name if method == "auto" else f"{name}, {method}"


def shown_seconds(seconds: float) -> str:
    """Return a time in a unit that suits it."""
    return _shown(seconds, {"s": 1.0, "ms": 1e-3, "µs": 1e-6})


def shown_bytes(size: float) -> str:
    """Return a size in a unit that suits it."""
    return _shown(size, {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10})


def _shown(value: float, units: Mapping[str, float]) -> str:
    """Return a number in the largest unit of which it is at least one, or in the last."""
    unit, factor = next((pair for pair in units.items() if value >= pair[1]), list(units.items())[-1])
    number = value / factor
    return f"{number:.3g} {unit}" if number < _THOUSAND else f"{number:.0f} {unit}"


def _by_case(measurements: Iterable[Measurement]) -> dict[tuple[str, ...], Measurement]:
    return {tuple(one.params[key] for key in _KEYS) + _way(one): one for one in measurements}


def _way(one: Measurement) -> tuple[str, str]:
    return one.params["backend"], one.params.get("method", "auto")


def _rank(way: tuple[str, ...]) -> tuple[int, int, str]:
    """Return by what implementations are ordered: ours, ours by a method that is named, the matrix, others."""
    backend, method = way
    if backend in OURS:
        return int(method != "auto"), OURS.index(backend), method
    return 2 if backend.endswith(MATRIX) else 3, 0, backend


def _fitted(run: Run, name: str) -> dict[tuple[str, str, int], float | None]:
    """Return the powers that were fitted where they were measured, by form, backend and the most positions."""
    keys = ("pairwise", "backend", "positions")
    return {tuple(one.params[key] for key in keys): one.value for one in run.of(f"scaling.Slope.{name}")}


def _is_of(one: Measurement, form: str, step: str) -> bool:
    return bool(one.params["pairwise"] == form and one.params["step"] == step)


def _cell(one: Measurement | None, first: Measurement | None, shown: Callable[[float], str]) -> str:
    if one is None:
        return "-"
    if one.value is None:
        return (one.note or "failed").partition(":")[0]
    if first is None or first.value is None or first is one or not first.value:
        return shown(one.value)
    ratio = one.value / first.value
    return f"{shown(one.value)} ({ratio:{'.2g' if ratio < _TEN else '.0f'}}x)"


def _power(curve: Iterable[Measurement]) -> str:
    points = {one.params["positions"]: one.value for one in curve if one.value and one.params["positions"] >= _LEAST}
    if len(points) < 2:  # noqa: PLR2004 - a line
        return "-"
    power = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0]
    return f"N^{power:.2f}"


def _table(titles: Iterable[str], *, markdown: bool) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.MARKDOWN if markdown else box.ROUNDED)
    for title in titles:
        table.add_column(title, justify="left" if title in _WORDS else "right", no_wrap=True)
    return table

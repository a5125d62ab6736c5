"""Keep results small: without the parameters of which nothing was measured.

asv writes a list with an entry for every combination of parameters, most of which are never measured, and finds what it
looks for by the values that stand beside the list.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["compact", "narrowed", "whole"]

Axes = list[list[str]]


def compact(columns: Sequence[Any]) -> list[Any]:
    """Return the results of one benchmark without the values of parameters with which nothing was measured.

    Args:
        columns: what asv writes: the results, the parameters, then texts, numbers and other lists of that length.
    """
    values, axes = columns[:2]
    combinations = list(itertools.product(*axes))
    results = [None] * len(combinations) if values is None else values
    tried = [case for case, value in zip(combinations, results, strict=True) if not _is_untried(value)]
    kept = [[value for value in axis if any(case[i] == value for case in tried)] for i, axis in enumerate(axes)]
    return whole(columns, kept)


def whole(columns: Sequence[Any], axes: Axes) -> list[Any]:
    """Return the results of one benchmark for these parameters.

    Args:
        columns: what asv writes.
        axes: the values of each parameter; a combination that the results lack was not measured.
    """
    old = list(itertools.product(*columns[1]))
    new = list(itertools.product(*axes))

    def moved(column: Any, missing: Any) -> list[Any]:
        found = dict(zip(old, column, strict=True))
        return [found.get(case, missing) for case in new]

    results = [None] * len(old) if columns[0] is None else columns[0]
    rest = [moved(column, None) if isinstance(column, list) else column for column in columns[2:]]
    return [moved(results, math.nan), axes, *rest]


def narrowed(about: Mapping[str, Any], found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what asv knows of the benchmarks, without those of which there are no results, and values that none has.

    The pages of asv open with the first values of each parameter, and are empty if nothing was measured with them.

    Args:
        about: what is in benchmarks.json.
        found: the results of each file, by the names of the benchmarks.
    """
    axes: dict[str, list[set[str]]] = {}
    for results in found:
        for name, columns in results.items():
            known = axes.setdefault(name, [set() for _ in columns[1]])
            for values, more in zip(known, columns[1], strict=True):
                values.update(more)
    kept = {name: one for name, one in about.items() if name in axes}
    for name, one in kept.items():
        params = [
            [value for value in axis if value in known] for axis, known in zip(one["params"], axes[name], strict=True)
        ]
        kept[name] = {**one, "params": params}
    return {**kept, "version": about["version"]}


def _is_untried(value: Any) -> bool:
    return value is not None and math.isnan(value)

"""The table of what `gpu.py` measured, as Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from measuring.case import OURS
from nonlocal_bench.tables import shown_bytes, shown_seconds

__all__ = ["table_of"]

TITLES = ("part", "what", "this library", "the best other", "times", "memory", "its memory", "of a product")

Result = Mapping[str, Any]


def table_of(results: Iterable[Result]) -> str:
    """Return the table: a row for each case of this library, and for whatever else there is.

    Args:
        results: `what` each is of, and its `seconds`, `bytes` and `flops`, or the `counts` of a suite, or the `times`
            of each way, or a `note` that says why there are none.
    """
    lines = [TITLES, *((*row, *[""] * (len(TITLES) - len(row))) for row in _rows(list(results)))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "".join(
        f"| {' | '.join(f'{cell:{width}}' for cell, width in zip(line, widths, strict=True))} |\n" for line in lines
    )


def _rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    peaks: dict[tuple[str, str], float] = {}
    others: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for one in results:
        what = one["what"]
        if what.get("step") == "product" and "seconds" in one:
            peaks[what["part"], what["dtype"]] = one["flops"] / one["seconds"]
        elif "mode" in what and what["by"] not in OURS:
            others[_group(what)].append(one)
    for one in results:
        what = one["what"]
        head = what["part"], " ".join(word for name, word in what.items() if name != "part" and word)
        if "counts" in one:
            yield *head, _verdict(one)
        elif "times" in one:
            yield *head, *_ways(one["times"])
        elif what.get("step") == "product":
            yield *head, f"{one['flops'] / one['seconds'] / 1e12:.3g} TFLOP/s" if "seconds" in one else one["note"]
        elif "mode" not in what:
            details = ", ".join([_seconds(one), *(one[name] for name in ("psnr", "difference") if name in one)])
            yield *head, details, "", "", _bytes(one)
        elif what["by"] in OURS:
            yield *head, *_block(one, others[_group(what)], peaks.get((what["part"], what["dtype"]), 0.0))


def _group(what: Mapping[str, str]) -> tuple[str, ...]:
    """Return what two implementations must share to be compared."""
    by = what["by"].removesuffix("_plain")
    return *(what[name] for name in ("part", "place", "form", "dtype", "step", "mode")), by if by in OURS else "torch"


def _block(one: Result, others: Sequence[Result], peak: float) -> tuple[str, ...]:
    measured = [other for other in others if "seconds" in other]
    best = min(measured, key=lambda other: other["seconds"], default=None)
    times = f"{best['seconds'] / one['seconds']:.2f}" if best is not None and "seconds" in one else ""
    share = f"{one['flops'] / one['seconds'] / peak:.0%}" if peak and "seconds" in one else ""
    rivals = others if best is None else [best]
    rival = "; ".join(f"{_seconds(other)} {other['what']['by']}" for other in rivals)
    return _seconds(one), rival, times, _bytes(one), "" if best is None else _bytes(best), share


def _ways(times: Mapping[str, float | str]) -> tuple[str, ...]:
    """Return the cells of a row: what "auto" takes, and what each way that is named does."""
    numbers = {way: found for way, found in times.items() if isinstance(found, float)}
    auto = numbers.pop("auto", None)
    reasons = [f"{way}: {found}" for way, found in times.items() if isinstance(found, str)]
    named = [f"{shown_seconds(numbers[way])} {way}" for way in sorted(numbers, key=lambda way: numbers[way])]
    ratio = f"{min(numbers.values()) / auto:.2f}" if auto and numbers else ""
    return shown_seconds(auto) if auto else "failed", ", ".join(named + reasons), ratio


def _verdict(one: Result) -> str:
    counts = ", ".join(f"{count:,} {word.lower()}" for word, count in sorted(one["counts"].items(), reverse=True))
    checks = Counter(name.split("-")[1] for name in one["failed"])
    failed = [f"{check} {count}" for check, count in checks.items()]
    return "; ".join([counts, *failed, *([one["note"]] if "note" in one else [])])


def _seconds(one: Result) -> str:
    return shown_seconds(one["seconds"]) if "seconds" in one else one["note"]


def _bytes(one: Result) -> str:
    return shown_bytes(one["bytes"]) if "bytes" in one else ""

"""Cases that another implementation can express: its preset, in every form, with the options that it leaves free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nonlocal_conformance import Case
from nonlocal_conformance.case import CHANNELS
from nonlocal_conformance.cases import SPATIAL
from nonlocal_core.spec.options import PAIRWISE
from nonlocal_core.spec.presets import PRESETS, preset_options

__all__ = ["preset_cases"]


def preset_cases(
    preset: str, rank: int, *, inner_channels: int, windows: Mapping[str, Any], **free: Any
) -> tuple[Case, ...]:
    """Return cases of every pairwise form, also of those that the implementation lacks.

    Args:
        preset: the preset of the implementation.
        rank: the number of spatial axes.
        inner_channels: C' of all cases but `_default`, which has the implementation's own.
        windows: from the ending of the name of a case to the pooling window.
        free: options of batch normalisation that the implementation leaves free, with the values to take.
    """
    plain, batch = {"norm": None if None in PRESETS[preset].norms else "batch"}, {"norm": "batch"}
    rest = {"inner_channels": inner_channels, "subsample": None}
    cases = []
    for form in PAIRWISE:
        options = {
            "default": {},
            f"{rank}d": {**rest, **plain},
            **{name: {**rest, **plain, "subsample": window} for name, window in windows.items()},
            "batch_norm": {**rest, **batch, **free},
            "training": {**rest, **batch, **free},
        }
        cases += [
            Case(f"{form}_{name}", _options(preset, form, rank, chosen), SPATIAL[rank], training=name == "training")
            for name, chosen in options.items()
        ]
        if windows:
            ties = {**rest, **plain, "subsample": next(iter(windows.values()))}
            cases.append(Case(f"{form}_ties", _options(preset, form, rank, ties), SPATIAL[rank], ties=True))
    return tuple(cases)


def _options(preset: str, form: str, rank: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a spec; for a form that the implementation lacks, those of its first form."""
    if form in PRESETS[preset].forms:
        return preset_options(preset, channels=CHANNELS, rank=rank, overrides={"pairwise": form, **chosen})
    return {**preset_options(preset, channels=CHANNELS, rank=rank, overrides=chosen), "pairwise": form, "bias": True}

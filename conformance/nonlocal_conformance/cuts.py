"""The cases in which an input is cut over several devices: every form, and wherever a cut may lie."""

from __future__ import annotations

from typing import Any

from nonlocal_conformance.case import Case

__all__ = ["CUTS"]

BATCH: dict[str, Any] = {"norm": "batch"}
AT_INPUT = {"subsample": 2, "subsample_at": "input"}

KINDS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, int], str | None]] = {
    "positions": (BATCH, (8, 3), (1, 4), None),
    "masked": (BATCH, (4, 6), (2, 2), "some"),
    "uneven": (BATCH, (11,), (1, 4), "some"),
    "pooled": ({**BATCH, "subsample": 2}, (8, 5), (1, 4), "some"),
    "pooled_input": (AT_INPUT, (5, 8), (2, 2), None),
    "remainder": ({**AT_INPUT, "norm": "affine"}, (11,), (1, 2), "some"),
    "within_space": ({**BATCH, "axes": "space"}, (3, 8, 2), (2, 4), "some"),
    "between_frames": ({**BATCH, **AT_INPUT, "axes": "space"}, (4, 5, 3), (1, 4), None),
    "within_time": ({**BATCH, "axes": "time", "subsample": (2, 1, 1)}, (8, 2, 3), (1, 2), "some"),
    "between_groups": ({**BATCH, "group_size": 2, "subsample": (1, 2, 1)}, (8, 4, 2), (1, 4), "some"),
    "within_groups": ({"group_size": 4}, (8, 4, 2), (2, 2), None),
    "samples": ({**BATCH, "subsample": 2}, (5, 4), (0, 2), "some"),
}
"""Options, spatial sizes, the axis of the input that is cut and over how many devices, and the mask."""

SEEDS = {
    "concatenation_cut_masked": 2,
    "concatenation_cut_pooled": 3,
    "concatenation_cut_positions": 1,
    "concatenation_cut_samples": 1,
    "concatenation_cut_uneven": 2,
    "embedded_gaussian_cut_masked": 4,
    "embedded_gaussian_cut_pooled_input": 3,
    "embedded_gaussian_cut_remainder": 1,
    "embedded_gaussian_cut_uneven": 9,
    "gaussian_cut_masked": 1,
    "gaussian_cut_uneven": 2,
}
"""Where the data of seed 0 happen to cancel, or leave the ReLU nothing."""


def _cuts() -> list[Case]:
    forms = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
    return [
        Case(
            name := f"{form}_cut_{kind}",
            {"pairwise": form, "residual": False, "zero_init": False, **options},
            spatial,
            batch=4 if cut[0] == 0 else 2,
            mask=mask,
            training="batch" in options.values(),
            narrow=False,
            seed=SEEDS.get(name, 0),
            cut=cut,
        )
        for form in forms
        for kind, (options, spatial, cut, mask) in KINDS.items()
    ]


CUTS = {case.name: case for case in _cuts()}

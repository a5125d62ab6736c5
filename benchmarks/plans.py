"""What is measured in a quick run and in a full one: combinations of the parameters of the benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from measuring.case import DEVICES, DTYPES, FORMS, GEOMETRIES, MATRIX, METHODS, OURS, PEERS
from suite.imports import Import
from suite.scaling import POSITIONS

__all__ = ["PLANS", "Plan"]

Plan = dict[str, list[tuple[object, ...]]]
"""From the name of a class of benchmarks to combinations of its parameters; impossible ones may be among them."""

_EMBEDDED, _DOT, _CONCATENATION = ("embedded_gaussian",), ("dot_product",), ("concatenation",)
_SOFTMAX = ("gaussian", "embedded_gaussian")

_THREE = ("torch", "tensorflow", "jax")
_TORCH = ("torch", "torch_matrix")
_FAST = ("mmcv", "pytorchvideo", "timm")

_FIGURES = ("image-28", "image-112", "wide-28", "wide-14")
_REAL = tuple(name for name in GEOMETRIES if name not in _FIGURES)

_LARGEST = {"cpu": 2**15, "cuda": POSITIONS[-1]}
"""The most positions at which a softmax is measured, by device: its time is quadratic."""

_BEYOND = {"cpu": 2**16, "cuda": POSITIONS[-1]}
"""The same for a matrix: a size that no longer fits into most memories is among them, to show that."""


def _block(
    backends: Iterable[str], forms: Iterable[str], geometries: Iterable[str], methods: Iterable[str] = ("auto",)
) -> Iterator[tuple[object, ...]]:
    """Yield parameters of `Forward`, `Training` and `Quality`."""
    yield from itertools.product(backends, DEVICES, forms, methods, geometries, DTYPES)


def _scaling(
    backends: Iterable[str], forms: Iterable[str], step: str, positions: Iterable[int]
) -> Iterator[tuple[object, ...]]:
    """Yield parameters of `Scaling`."""
    for backend, device, form, size in itertools.product(backends, DEVICES, forms, positions):
        if size <= (_largest(device, form) if backend in OURS else _BEYOND[device]):
            yield backend, device, form, step, size


def _slope(backends: Iterable[str], forms: Iterable[str]) -> Iterator[tuple[object, ...]]:
    """Yield parameters of `Slope`."""
    for backend, device, form in itertools.product(backends, DEVICES, forms):
        yield backend, device, form, _largest(device, form)


def _largest(device: str, form: str) -> int:
    """Return the most positions at which a form is measured."""
    return _LARGEST[device] if form in _SOFTMAX else POSITIONS[-1]


def quick() -> Plan:
    """Return what takes some minutes: small blocks, the figures of this machine, and the start of the curves."""
    return {
        "imports.Import": [("nonlocal_core",), ("nonlocal_torch",)],
        "forward.Forward": list(
            _block((*_THREE, "torch_matrix", *_FAST), (*_EMBEDDED, *_DOT, *_CONCATENATION), ("image-28",))
        ),
        "training.Training": [
            *_block((*_TORCH, "mmcv", "timm"), _EMBEDDED, ("image-112",)),
            *_block((*_TORCH, "mmcv"), _DOT, ("image-112",)),
            *_block(("torch", "mmcv", "pytorchvideo"), _EMBEDDED, ("wide-28", "wide-14")),
        ],
        "scaling.Scaling": [
            *_scaling(("torch",), FORMS, "training", POSITIONS[:4]),
            *_scaling(("torch_matrix",), FORMS, "training", POSITIONS[:3]),
            *_scaling(("mmcv",), FORMS, "training", POSITIONS[1:3]),
        ],
        "scaling.Slope": list(_slope(("torch",), (*_DOT, *_CONCATENATION))),
        "quality.Quality": list(_block(("torch",), FORMS, ("image-28",))),
    }


def full() -> Plan:
    """Return everything."""
    blocks = [
        *_block((*OURS, *MATRIX, *PEERS), FORMS, _FIGURES),
        *_block((*_THREE, "torch_matrix", *_FAST), FORMS, _REAL),
        *_block(_THREE, FORMS, ("image-28", "wide-14", "res4-8x8"), METHODS[1:]),
    ]
    forward = {*_FIGURES, "res4-8x8", "dense-128"}
    return {
        "imports.Import": [(package,) for package in Import.params],
        "forward.Forward": [params for params in blocks if params[4] in forward],
        "training.Training": blocks,
        "rows.Rows": list(itertools.product(_THREE, DEVICES, FORMS, ("wide-14", "res4-8x8", "dense-128"))),
        "scaling.Scaling": [
            *_scaling((*_THREE, *MATRIX, *_FAST), FORMS, "training", POSITIONS),
            *_scaling((*_TORCH, "mmcv"), _CONCATENATION, "forward", POSITIONS),
        ],
        "scaling.Slope": list(_slope(OURS, FORMS)),
        "quality.Quality": list(
            _block((*_THREE, "torch_matrix"), FORMS, ("image-28", "wide-14", "res4-8x8", "dense-128"))
        ),
    }


PLANS = {"quick": quick, "full": full}
"""The plans, by name."""

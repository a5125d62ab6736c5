"""Checks of what the operation and the block are given, once for every backend: names, shapes and words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nonlocal_core.arguments import (
    check_array,
    check_bool,
    check_boolean,
    check_floating,
    check_sizes,
    dtype_name,
    known_sizes,
)
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.planning import check_method
from nonlocal_core.spec.block import NonLocalSpec, check_spec
from nonlocal_core.spec.form import Form
from nonlocal_core.spec.options import check_pairwise, is_softmax, normal_scale
from nonlocal_core.spec.parameters import check_params

__all__ = ["check_arrays", "check_block", "check_kind", "check_op", "check_scores", "check_spec", "check_statistics"]


def check_op(
    theta: Any,
    phi: Any,
    g: Any,
    pairwise: str | Callable[[Any, Any], Any] = "embedded_gaussian",
    scale: float | None = None,
    concat_weight: Any = None,
    concat_bias: Any = None,
    normalize: str | None = None,
    key_mask: Any = None,
    method: str = "auto",
) -> Form:
    """Check the arrays and options of `nonlocal_op`, by shape and dtype alone; return the form.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if an option or a shape has a wrong value.
    """
    check_pairwise(pairwise, normalize)
    check_method(method, pairwise)
    factor = normal_scale(scale, named=())
    for name, array in (("theta", theta), ("phi", phi), ("g", g)):
        check_array(name, array)
        check_floating(name, dtype_name(array))
        if len(array.shape) != 3:  # noqa: PLR2004 - batch, positions, channels
            raise fail_value(name, "have 3 axes: batch, positions, channels", f"shape {tuple(array.shape)}")
    batch, _, inner = theta.shape
    check_sizes("phi", phi.shape, (batch, None, inner))
    check_sizes("g", g.shape, (batch, phi.shape[1], None))
    if isinstance(phi.shape[1], int) and phi.shape[1] < 1:
        raise fail_value("phi", "have at least one key", f"shape {tuple(phi.shape)}")
    for name, array in (("key_mask", key_mask), ("concat_weight", concat_weight), ("concat_bias", concat_bias)):
        if array is not None:
            check_array(name, array)
    if key_mask is not None:
        check_boolean("key_mask", dtype_name(key_mask))
        check_sizes("key_mask", key_mask.shape, phi.shape[:2])
    _check_concat(pairwise, inner, concat_weight, concat_bias)
    return Form(
        pairwise, is_softmax(pairwise, normalize), 1.0 if factor is None else float(factor), concat_weight, concat_bias
    )


def _check_concat(pairwise: Any, inner: int | None, concat_weight: Any, concat_bias: Any) -> None:
    """Check that the concatenation form has its weight, and no other has."""
    if pairwise == "concatenation":
        if concat_weight is None:
            raise fail_value("concat_weight", "be given for the concatenation form", None)
        shapes = {"concat_weight": (None if inner is None else 2 * inner,), "concat_bias": ()}
        for name, array in (("concat_weight", concat_weight), ("concat_bias", concat_bias)):
            if array is not None:
                check_floating(name, dtype_name(array))
                check_sizes(name, array.shape, shapes[name])
    elif concat_weight is not None or concat_bias is not None:
        name = "concat_bias" if concat_weight is None else "concat_weight"
        raise fail_value(name, "be None unless `pairwise` is 'concatenation'", "an array")


def check_kind(kind: type, **arrays: Any) -> None:
    """Check that all arrays but None are of the one kind that a framework computes with."""
    for name, array in arrays.items():
        if array is not None and not isinstance(array, kind):
            raise fail_type(name, f"be a {kind.__module__}.{kind.__qualname__}", array)


def check_scores(scores: Any, theta: Any, phi: Any) -> Any:
    """Return what a `pairwise` function gave for `theta` and `phi`, if it is one score for each pair."""
    name = "pairwise(theta, phi)"
    check_array(name, scores)
    check_floating(name, dtype_name(scores))
    check_sizes(name, known_sizes(scores.shape), known_sizes((*theta.shape[:2], phi.shape[1])))
    return scores


def check_arrays(spec: NonLocalSpec, shape: Iterable[Any], x: Any, key_mask: Any, *, training: bool) -> None:
    """Check the input of a block and its key mask, by shape and dtype alone.

    Args:
        spec: the block.
        shape: the shape of `x` in the order `(B, S1..Sk, C)`.
        x: the input, in any layout.
        key_mask: `(B, S1..Sk)`, or None.
        training: whether batch normalisation takes its statistics from this input.

    Raises:
        TypeError: if the input is not floating point or the mask is not boolean.
        ValueError: if a shape does not fit the spec.
    """
    if key_mask is not None:
        check_array("key_mask", key_mask)
    spec.check_input(
        known_sizes(shape),
        dtype=dtype_name(x),
        mask_shape=None if key_mask is None else known_sizes(key_mask.shape),
        mask_dtype="bool" if key_mask is None else dtype_name(key_mask),
        training=training,
    )


def check_block(
    x: Any, params: Mapping[str, Any], spec: NonLocalSpec, key_mask: Any, training: bool, method: str = "auto"
) -> None:
    """Check the arguments of a block."""
    check_array("x", x)
    check_spec(spec)
    check_method(method, spec.pairwise)
    check_arrays(spec, x.shape, x, key_mask, training=training)
    check_params(params, spec)


def check_statistics(spec: NonLocalSpec, unbiased: bool) -> None:
    """Check that a block has running statistics, and the kind of its variance."""
    check_spec(spec)
    check_bool("unbiased", unbiased)
    if spec.norm != "batch":
        message = f"`spec` must have norm 'batch' to have statistics. Got norm {spec.norm!r}."
        raise ValueError(message)

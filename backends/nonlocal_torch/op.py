"""The non-local operation on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nonlocal_core.planning import plan_call
from nonlocal_core.spec.calls import check_kind, check_op
from nonlocal_core.spec.form import Form
from nonlocal_torch.context import device_kind, full_precision, is_exported, is_recorded, takes_halves
from nonlocal_torch.methods.pairwise import pairwise as by_matrix
from nonlocal_torch.methods.reassociated import reassociated
from nonlocal_torch.methods.sorted import sorted_keys
from nonlocal_torch.methods.streamed import streamed

__all__ = ["aggregate", "nonlocal_op"]

_METHODS = {"pairwise": by_matrix, "reassociated": reassociated, "sorted": sorted_keys}
"""The methods that take operands of at least float32, "reassociated" of half precision too; "streamed" has its own."""


def nonlocal_op(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    pairwise: str | Callable[[Tensor, Tensor], Tensor] = "embedded_gaussian",
    scale: float | None = None,
    concat_weight: Tensor | None = None,
    concat_bias: Tensor | None = None,
    normalize: str | None = None,
    key_mask: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """Compute the non-local operation, y_i = sum_j w_ij g_j (equation 1 of the paper).

    Scores, weights and sums are at least float32, whatever the dtype of the operands. Second derivatives are right by
    every method; forward mode is promised for "pairwise" alone. Inside a transform of `torch.func` "streamed" holds
    the matrix of weights.

    Args:
        theta: queries `(B, N, C')`.
        phi: keys `(B, M, C')`.
        g: values `(B, M, D)`.
        pairwise: "gaussian", "embedded_gaussian", "dot_product", "concatenation", or a function
            `f(theta, phi) -> scores (B, N, M)` of each pair alone.
        scale: a finite, non-zero float that multiplies the scores; None is 1.
        concat_weight: w_f `(2C',)`, the half for theta first; for the concatenation form.
        concat_bias: b_f `()`; for the concatenation form, optional.
        normalize: "softmax" or "count" for a function, None for the named forms.
        key_mask: `(B, M)`, True where a key takes part. A query without any key gives 0.
        method: "auto", "pairwise" (the N x M matrix of weights), or the method without it that serves the form:
            "streamed", "reassociated" or "sorted".

    Returns:
        y `(B, N, D)` in the dtype of `theta`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if shapes or options do not fit each other.

    Example:
        >>> import torch
        >>> theta, phi, g = torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.arange(3.0).reshape(1, 3, 1)
        >>> nonlocal_op(theta, phi, g)[0, :, 0]
        tensor([1., 1.])
    """
    form = check_op(theta, phi, g, pairwise, scale, concat_weight, concat_bias, normalize, key_mask, method)
    operands = {"theta": theta, "phi": phi, "g": g, "key_mask": key_mask}
    check_kind(Tensor, **operands, concat_weight=concat_weight, concat_bias=concat_bias)
    return aggregate(theta, phi, g, form, key_mask, method)


def aggregate(theta: Tensor, phi: Tensor, g: Tensor, form: Form, key_mask: Tensor | None, method: str) -> Tensor:
    """Compute the operation on checked arguments."""
    if key_mask is not None:
        phi, g = (a.masked_fill(~key_mask[..., None], 0) for a in (phi, g))
    plan = plan_call(
        theta,
        g,
        form.pairwise,
        method,
        backend="torch",
        device=device_kind(theta),
        gradients=is_recorded(theta, phi, g),
        is_exported=is_exported(),
    )
    method, is_narrow = plan.method, takes_halves(theta)
    is_softmax = form.is_named and form.softmax
    with full_precision(theta.device.type):
        if method == "streamed":
            return streamed(theta, phi, g, key_mask, form.scale, plan.rows)
        if method == "pairwise" and is_softmax and is_narrow:
            return streamed(theta, phi, g, key_mask, form.scale, theta.shape[1], keeps_weights=True)
        keeps_dtype = method == "reassociated" and is_narrow
        dtype = theta.dtype if keeps_dtype else torch.promote_types(theta.dtype, torch.float32)
        y = _METHODS[method](theta.to(dtype), phi.to(dtype), g.to(dtype), form, key_mask)
        return y.to(theta.dtype)

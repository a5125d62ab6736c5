"""The non-local operation on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nonlocal_core.arguments import Size, dtype_name
from nonlocal_core.planning import Plan, keys_first, plan
from nonlocal_core.spec.calls import check_op
from nonlocal_core.spec.form import Form
from nonlocal_torch.sorted import sorted_sums
from nonlocal_torch.streamed import streamed
from nonlocal_torch.weights import concat_halves, full_precision, is_recorded, pairwise_weights

__all__ = ["nonlocal_op"]


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
    return aggregate(theta, phi, g, form, key_mask, method)


def aggregate(theta: Tensor, phi: Tensor, g: Tensor, form: Form, key_mask: Tensor | None, method: str) -> Tensor:
    """Compute the operation on checked arguments."""
    if key_mask is not None:
        phi, g = (a.masked_fill(~key_mask[..., None], 0) for a in (phi, g))
    chosen = _plan(theta, phi, g, form, method)
    dtype = torch.promote_types(theta.dtype, torch.float32)
    with full_precision(theta.device.type):
        if chosen.method == "streamed":
            return streamed(theta, phi, g, key_mask, form.scale, chosen.rows)
        wide = theta.to(dtype), phi.to(dtype), g.to(dtype)
        return _WIDE[chosen.method](*wide, form, key_mask).to(theta.dtype)


def _plan(theta: Tensor, phi: Tensor, g: Tensor, form: Form, method: str) -> Plan:
    """Return how the operation is computed for these sizes."""
    batch, queries, keys = _known(theta.shape[0], theta.shape[1], phi.shape[1])
    return plan(
        method,
        form.pairwise,
        backend="torch",
        device="cpu" if theta.device.type == "cpu" else "gpu",
        dtype=dtype_name(theta),
        batch=batch,
        queries=queries,
        keys=keys,
        inner=max(theta.shape[-1], g.shape[-1]),
        gradients=is_recorded(theta, phi, g),
    )


def _known(*sizes: int) -> tuple[Size, ...]:
    """Return sizes with None for what is symbolic, and for all in an export, where a comparison would bind them."""
    exported = torch.compiler.is_exporting()
    return tuple(size if isinstance(size, int) and not exported else None for size in sizes)


def _pairwise(theta: Tensor, phi: Tensor, g: Tensor, form: Form, key_mask: Tensor | None) -> Tensor:
    return pairwise_weights(theta, phi, form, None if key_mask is None else key_mask[:, None, :]) @ g


def _reassociated(theta: Tensor, phi: Tensor, g: Tensor, form: Form, key_mask: Tensor | None) -> Tensor:
    """Return theta (phi^T g) / M, by the cheaper order of the products; the array between them takes the factors."""
    count = _count(phi, key_mask)
    if keys_first(*_known(theta.shape[1], phi.shape[1]), phi.shape[2], g.shape[2]):
        return theta @ (form.scale * (phi.mT @ g) / count)
    return (form.scale * (theta @ phi.mT) / count) @ g


def _sorted(theta: Tensor, phi: Tensor, g: Tensor, form: Form, key_mask: Tensor | None) -> Tensor:
    """Return the sums of the concatenation form over the sorted keys."""
    a, b = concat_halves(theta, phi, form)
    return sorted_sums(a, b, g, key_mask) * (form.scale / _count(phi, key_mask))


def _count(phi: Tensor, key_mask: Tensor | None) -> Tensor | int:
    """Return the number of valid keys, at least 1."""
    return phi.shape[1] if key_mask is None else key_mask.sum(dim=1).clamp(min=1)[:, None, None].to(phi.dtype)


_WIDE = {"pairwise": _pairwise, "reassociated": _reassociated, "sorted": _sorted}
"""The methods that take operands of at least float32."""

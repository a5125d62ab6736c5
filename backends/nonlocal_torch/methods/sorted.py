"""The method "sorted": the concatenation form by prefix sums over the sorted keys.

With a_i = w_theta . theta_i + b_f and b_j = w_phi . phi_j the score ReLU(a_i + b_j) is zero unless b_j > -a_i. With the
keys in descending order of b, those that count are the first k_i: sum_j s_ij g_j = a_i G[k_i] + H[k_i], with the prefix
sums G of g_j and H of b_j g_j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nonlocal_core.spec.form import Form
from nonlocal_torch.context import is_exported, is_recorded, is_traced, is_transformed
from nonlocal_torch.methods.pairwise import concat_summands, count_keys

__all__ = ["running_sums", "sorted_keys"]


class Ranks(NamedTuple):
    """For each i, the j with a_i + b_j > 0 are the first `counts[i]` of `order`.

    Args:
        order: the j in descending order of b, `(B, M)`.
        counts: `(B, N)`.
    """

    order: Tensor
    counts: Tensor


def sorted_keys(theta: Tensor, phi: Tensor, g: Tensor, form: Form, key_mask: Tensor | None) -> Tensor:
    """Return y (B, N, D) without the matrix of weights; the operands are in at least float32."""
    a, b = concat_summands(theta, phi, form)
    return _sorted_sums(a, b, g, key_mask, form.scale / count_keys(phi, key_mask))


def _sorted_sums(a: Tensor, b: Tensor, g: Tensor, valid: Tensor | None, scale: Any) -> Tensor:
    """Return scale sum_j ReLU(a_i + b_j) g_j: `(B, N, 1), (B, M, 1), (B, M, D)` -> `(B, N, D)`; invalid g are 0."""
    forth, back = _ranks(a.detach()[..., 0], b.detach()[..., 0], valid)
    # Moved by the middle b the scores stay, and less is lost to rounding where a and b are large and opposite.
    middle = forth.order.gather(1, _middle(b, valid))
    centre = b.detach().gather(1, middle[..., None])
    a, b = scale * (a + centre), scale * (b - centre)
    b = b if valid is None else b.masked_fill(~valid[..., None], 0)
    # An export keeps no gradient but that of its operations, and before PyTorch 2.10 it failed at a function.
    if is_recorded(a, b, g) and not (is_transformed() or is_exported() or is_traced()):
        return _with_gradient(a, b, g, *forth, *back)[0]
    return _sums(a, b, g, *forth)[0]


def _middle(b: Tensor, valid: Tensor | None) -> Tensor:
    """Return the rank of the middle valid key (B, 1)."""
    if valid is None:
        return torch.full_like(b[:, :1, 0], b.shape[1] // 2, dtype=torch.int64)
    return valid.sum(dim=1, keepdim=True) // 2  # without a valid key, that of some other


def _ranks(a: Tensor, b: Tensor, valid: Tensor | None) -> tuple[Ranks, Ranks]:
    """Return the ranks for a (B, N) and b (B, M), and for the two exchanged, by one sort of both together."""
    queries, keys = a.shape[1], b.shape[1]
    level = -b if valid is None else (-b).masked_fill(~valid, torch.inf)
    merged = _order(torch.cat([a, level], dim=1))
    numbers = torch.arange(queries + keys, device=a.device).expand_as(merged)
    place = torch.empty_like(merged).scatter(1, merged, numbers)
    keys_before = (merged >= queries).cumsum(dim=1, dtype=torch.int64).gather(1, place)  # a key counts itself
    queries_before = place + 1 - keys_before  # a query counts itself
    key_rank, query_rank = keys_before[:, queries:] - 1, queries - queries_before[:, :queries]
    order = torch.empty_like(key_rank).scatter(1, key_rank, numbers[:, :keys])
    query_order = torch.empty_like(query_rank).scatter(1, query_rank, numbers[:, :queries])
    return Ranks(order, keys_before[:, :queries]), Ranks(query_order, queries - queries_before[:, queries:])


def _order(a: Tensor) -> Tensor:
    """Return the indices that sort the rows of `a`; equal numbers stay in their order."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort: at a tie the score is 0 whatever the order
        return a.sort(dim=1).indices
    # At a tie the gradient of the score is 0 too: the query comes first, and the key does not count.
    return torch.sort(a, dim=1, stable=True).indices


class _Sums(torch.autograd.Function):
    """`_sums`, whose gradient is made of the same sums with a and b exchanged: no additions to scattered places."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor, *ranks: Tensor) -> tuple[Tensor, Tensor]:
        sums, plain = _sums(a, b, g, *ranks[:2])
        ctx.save_for_backward(a, b, g, plain, *ranks)
        ctx.set_materialize_grads(False)
        return sums, plain

    @staticmethod
    def backward(ctx: Any, dsums: Tensor | None, dplain: Tensor | None) -> tuple[Tensor | None, ...]:
        a, b, g, plain, *ranks = ctx.saved_tensors
        if plain.shape[1] == 0:  # without a query there is no row to look up
            return (*map(torch.zeros_like, (a, b, g)), None, None, None, None)
        da = db = dg = None
        if dsums is not None:
            dg, active = _with_gradient(b, a, dsums, *ranks[2:], *ranks[:2])
            da, db = ((one * other).sum(dim=-1, keepdim=True) for one, other in ((plain, dsums), (g, active)))
        if dplain is not None:  # in a second derivative
            active = _with_gradient(b, a, dplain, *ranks[2:], *ranks[:2])[1]
            dg = active if dg is None else dg + active
        return da, db, dg, None, None, None, None


_with_gradient: Callable[..., tuple[Tensor, Tensor]] = _Sums.apply


def _sums(a: Tensor, b: Tensor, g: Tensor, order: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each i the sum of (a_i + b_j) g_j, and that of g_j, over the first `counts[i]` of an order.

    `(B, N, 1), (B, M, 1), (B, M, D)` -> `(B, N, D)` twice. Prefix sums in chunks, as one long sum is slow.
    """
    chunk = 32 if g.device.type == "cpu" else 128
    # Two chunks at least, and `unfold`: to an export a single one, or the size of a reshaped axis, is a condition.
    chunks = order.shape[1] // chunk + 2
    order = functional.pad(order, (1, chunks * chunk - order.shape[1] - 1))
    order = order.reshape(-1, chunks, chunk) if is_traced() else order.unfold(1, chunk, chunk)
    factors, rows = _rows(order, b, g)  # (B, chunks, chunk, 1) and (B, chunks, chunk, D)
    rows[:, 0, 0] = 0  # row k becomes the sum of the first k
    (sums,) = _rows(counts, _prefix_sums(torch.cat([rows, factors * rows], dim=-1)))
    plain, weighted = sums.chunk(2, dim=-1)
    return torch.addcmul(weighted, a, plain), plain


def _prefix_sums(rows: Tensor) -> Tensor:
    """Return the running sums of rows in chunks, `(B, chunks, chunk, D)` -> `(B, chunks * chunk, D)`."""
    inside = running_sums(rows, by_product=rows.device.type == "cpu")
    inside += functional.pad(inside[:, :, -1], (0, 0, 1, -1)).cumsum(dim=1)[:, :, None]
    return inside.flatten(1, 2)


def running_sums(rows: Tensor, *, by_product: bool) -> Tensor:
    """Return the running sum along the last axis but one; a GPU may be told to round what enters a product."""
    if not by_product:
        return rows.cumsum(dim=-2)
    numbers = torch.arange(rows.shape[-2], device=rows.device)
    return (numbers[:, None] >= numbers).to(rows.dtype) @ rows  # `tril` would wake the other threads for it


def _rows(index: Tensor, *arrays: Tensor) -> Iterator[Tensor]:
    """Yield `a[b, index[b]]` for every b, `(B, N, D), (B, ..)` -> `(B, .., D)`: the fastest of the ways to do so."""
    samples, length = arrays[0].shape[:2]
    first = torch.arange(samples, device=index.device) * length
    index = index + first.reshape(-1, *[1] * (index.dim() - 1))
    return (functional.embedding(index, a.flatten(0, 1)) for a in arrays)

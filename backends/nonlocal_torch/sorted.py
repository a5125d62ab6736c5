"""The concatenation form without the matrix of weights: prefix sums over the sorted keys.

With a_i = w_theta . theta_i + b_f and b_j = w_phi . phi_j the score ReLU(a_i + b_j) is zero unless b_j > -a_i. With the
keys in descending order of b, those that count are the first k_i: sum_j s_ij g_j = a_i G[k_i] + H[k_i], with the prefix
sums G of g_j and H of b_j g_j.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nonlocal_torch.weights import is_recorded, is_transformed

__all__ = ["active_sums", "running_sums", "sorted_sums"]


class Ranks(NamedTuple):
    """For each i, the j with a_i + b_j > 0 are the first `counts[i]` of `order`.

    Args:
        order: the j in descending order of b, `(B, M)`.
        counts: `(B, N)`.
    """

    order: Tensor
    counts: Tensor


def sorted_sums(a: Tensor, b: Tensor, g: Tensor, valid: Tensor | None) -> Tensor:
    """Return sum_j ReLU(a_i + b_j) g_j: `(B, N, 1), (B, M, 1), (B, M, D)` -> `(B, N, D)`; invalid g are 0."""
    forth, back = _ranks(a.detach()[..., 0], b.detach()[..., 0], valid)
    # Moved by the middle b the scores stay, and less is lost to rounding where a and b are large and opposite.
    middle = forth.order.gather(1, _middle(b, valid))
    centre = b.detach().gather(1, middle[..., None])
    a, b = a + centre, b - centre
    b = b if valid is None else b.masked_fill(~valid[..., None], 0)
    plain, weighted = active_sums(torch.cat([g, b * g], dim=-1), forth, back).chunk(2, dim=-1)
    return torch.addcmul(weighted, a, plain)


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
    keys_before = (merged >= queries).cumsum(dim=1).gather(1, place)  # a key counts itself
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


def active_sums(values: Tensor, forth: Ranks, back: Ranks) -> Tensor:
    """Return for each i the sum of values_j over the j with a_i + b_j > 0: `(B, M, D)` -> `(B, N, D)`.

    It is linear in `values`, and its transpose is the same sum with a and b exchanged: with `forth` and `back`.
    """
    if is_recorded(values) and not is_transformed():
        sums: Tensor = _ActiveSums.apply(values, *forth, *back)
        return sums
    return _prefix_sums(values, *forth)


class _ActiveSums(torch.autograd.Function):
    """`active_sums`, whose gradient is of its own kind: no additions to scattered places."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, order: Tensor, counts: Tensor, back_order: Tensor, back_counts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(order, counts, back_order, back_counts)
        return _prefix_sums(values, order, counts)

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor | None, ...]:
        order, counts, back_order, back_counts = ctx.saved_tensors
        if dsums.shape[1] == 0:  # without a query there is no row to look up
            return dsums.new_zeros(order.shape[0], order.shape[1], dsums.shape[2]), None, None, None, None
        return active_sums(dsums, Ranks(back_order, back_counts), Ranks(order, counts)), None, None, None, None


def _prefix_sums(values: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """Return the sum of the first `counts[i]` values in an order, in blocks: one long running sum is slow."""
    on_cpu = values.device.type == "cpu"
    block = 32 if on_cpu else 128
    # Two blocks at least, and `unfold`: to an export a single one, or the size of a reshaped axis, is a condition.
    blocks = order.shape[1] // block + 2
    order = functional.pad(order, (1, blocks * block - order.shape[1] - 1))
    rows = _rows(values, order.unfold(1, block, block))  # (B, blocks, block, D)
    rows[:, 0, 0] = 0  # row k becomes the sum of the first k
    inside = running_sums(rows, by_product=on_cpu)
    sums = inside + functional.pad(inside[:, :, -1], (0, 0, 1, -1)).cumsum(dim=1)[:, :, None]
    return _rows(sums.flatten(1, 2), counts)


def running_sums(rows: Tensor, *, by_product: bool) -> Tensor:
    """Return the running sum along the last axis but one; a GPU may be told to round what enters a product."""
    if not by_product:
        return rows.cumsum(dim=-2)
    size = rows.shape[-2]
    return torch.ones(size, size, dtype=rows.dtype, device=rows.device).tril() @ rows


def _rows(a: Tensor, index: Tensor) -> Tensor:
    """Return `a[b, index[b]]` for every b, `(B, N, D), (B, ..)` -> `(B, .., D)`: the fastest of the ways to do so."""
    first = torch.arange(a.shape[0], device=a.device) * a.shape[1]
    return functional.embedding(index + first.reshape(-1, *[1] * (index.dim() - 1)), a.flatten(0, 1))

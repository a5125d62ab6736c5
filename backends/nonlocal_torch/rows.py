"""The weights of some queries, as rows over all keys of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nonlocal_core.arguments import check_positions
from nonlocal_core.geometry import Sets
from nonlocal_core.spec.form import Form
from nonlocal_torch.context import full_precision, widened
from nonlocal_torch.embed import cut, embed, masks_of, pool, uncut
from nonlocal_torch.layers import Layers, project
from nonlocal_torch.methods.pairwise import pairwise_weights

__all__ = ["weight_rows"]


def weight_rows(
    x: Tensor,
    key_mask: Tensor | None,
    lost: Tensor | None,
    layers: Layers,
    form: Form,
    sets: Sets,
    subsample_at: str,
    positions: Sequence[int] | Tensor | None,
) -> Tensor:
    """Return the weights w_ij of some queries (B, Q, M) in at least float32, 0 where a key is not in their set.

    The rows of queries that are lost are NaN.
    """
    pairs: Tensor | None
    chosen, numbers = None, _set_numbers(sets, x.device)
    if positions is not None:
        indices = positions.tolist() if isinstance(positions, Tensor) else positions
        chosen = torch.as_tensor(check_positions(indices, math.prod(x.shape[2:])), device=x.device)
    if form.is_named:
        theta, phi, pairs = _embed_rows(x, key_mask, layers, sets, subsample_at, chosen, numbers)
    else:  # a function gets what it gets in the forward pass: all queries and keys of a set
        theta, phi, _, valid = embed(x, key_mask, layers._replace(g=None), sets, subsample_at)
        phi, pairs = (phi, None) if valid is None else (phi.masked_fill(~valid[..., None], 0), valid[:, None])
    with full_precision(x.device.type):
        rows = pairwise_weights(widened(theta), widened(phi), form, pairs)
    if not form.is_named:
        rows = _spread(rows, sets, numbers)
        rows = rows if chosen is None else rows[:, chosen]
    if lost is None:
        return rows
    lost = lost.flatten(1)
    return rows.masked_fill((lost if chosen is None else lost[:, chosen])[..., None], torch.nan)


def _embed_rows(
    x: Tensor,
    key_mask: Tensor | None,
    layers: Layers,
    sets: Sets,
    subsample_at: str,
    chosen: Tensor | None,
    numbers: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return theta (B, Q, C') of some queries, phi (B, M, C') of the whole grid, and the pairs (B or 1, Q, M) in a set.

    A pair with a masked key is in none.
    """
    flat, (queries, keys) = x.flatten(2).transpose(1, 2), numbers
    if layers.theta is None:
        flat = flat.contiguous()
    mask, valid = (None, None) if key_mask is None else masks_of(key_mask, sets)
    if subsample_at == "projection":
        (phi,) = pool(cut(project(flat, [layers.phi]), sets), sets, mask, valid)
    else:
        (phi,) = project(pool(cut([flat], sets), sets, mask, valid)[0], [layers.phi])
    if chosen is not None:
        flat, queries = flat[:, chosen], queries[chosen]
    pairs = (queries[:, None] == keys)[None]
    if valid is not None:
        pairs = pairs & uncut(valid[..., None], sets).transpose(1, 2)
        phi = phi.masked_fill(~valid[..., None], 0)
    (theta,) = project(flat, [layers.theta])
    return theta, uncut(phi, sets), pairs


def _spread(weights: Tensor, sets: Sets, numbers: tuple[Tensor, Tensor]) -> Tensor:
    """Return the weights of each set `(B', N', M')` as rows over the keys of all sets `(B, N, M)`."""
    rows, (queries, keys) = uncut(weights, sets), numbers
    columns = keys.argsort(stable=True).reshape(sets.count, sets.keys)[queries]
    return rows.new_zeros(*rows.shape[:2], keys.shape[0]).scatter(2, columns.expand_as(rows), rows)


def _set_numbers(sets: Sets, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the number of the set of each query (N,) and of each key (M,), in row-major order."""
    numbers = torch.arange(sets.count, device=device)[:, None, None]
    queries, keys = (uncut(numbers.expand(-1, size, 1), sets)[0, :, 0] for size in (sets.queries, sets.keys))
    return queries, keys

"""The method "streamed": the softmax forms by fused attention, or by chunks of queries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nonlocal_torch.context import (
    device_kind,
    full_precision,
    is_exported,
    is_recorded,
    is_transformed,
    takes_halves,
    widened,
)
from nonlocal_torch.methods import halves
from nonlocal_torch.methods.pairwise import softmax

__all__ = ["streamed"]

MOST_PARTS = 8
"""Into how many parts queries are cut at most."""

SECOND_ROWS = 128
"""How many queries a chunk holds in a derivative of the fused attention's gradient."""


def streamed(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    valid: Tensor | None,
    scale: float,
    rows: int | None,
    *,
    keeps_weights: bool = False,
) -> Tensor:
    """Return y (B, N, D) in the dtype of theta.

    Args:
        theta: queries `(B, N, C')`.
        phi: keys `(B, M, C')`, 0 where `valid` is False.
        g: values `(B, M, D)`, likewise.
        valid: `(B, M)`, or None.
        scale: the factor on the scores.
        rows: how many queries a chunk holds; None: PyTorch's fused attention.
        keeps_weights: whether the weights of half-precision operands are kept for the gradient, in one chunk.
    """
    phi, g = phi.to(theta.dtype), g.to(theta.dtype)
    if is_transformed():
        # The fused kernels have no rule for vmap and no second derivative, and a function is differentiated as one.
        return _attend(theta, phi, g, valid, scale, theta.shape[1] if rows is None else rows)
    is_compiled = torch.compiler.is_compiling()
    if is_exported() or (is_compiled and rows is None):  # of other sizes it has other chunks
        return fused_attention(theta, phi, g, valid, scale)
    if phi.shape[1] == 1 and not is_compiled:
        rows = theta.shape[1]  # of one key the weight is 1: formulas give gradients of exactly 0, the kernel nearly 0
    if not is_recorded(theta, phi, g):
        return _attend(theta, phi, g, valid, scale, rows)
    if rows is None:
        return _fused_with_gradient(theta, phi, g, valid, scale)
    return _chunks_with_gradient(theta, phi, g, valid, scale, rows, keeps_weights)


def fused_attention(theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Compute the softmax forms by the framework's fused attention."""
    width, queries, parts = max(theta.shape[-1], g.shape[-1]), theta.shape[1], _parts(theta)
    if device_kind(theta) == "gpu":
        width += -width % _unit(theta)
    mask = empty = None
    if valid is not None:  # a sample without any key is computed with every key, of which the values are 0
        empty = ~valid.any(dim=1, keepdim=True)
        mask = (valid | empty).contiguous()[:, None, None, :]
    # On a CPU the kernel's sums over many keys lose digits of what the values have in common: it is added afterwards.
    common = g.detach().mean(dim=1, keepdim=True) if _is_centred(g) else None
    query, key, value = (_head(a, width) for a in (theta, phi, g if common is None else g - common))
    if parts > 1:  # each as a head of its own, with the same keys and values
        query = functional.pad(query, (0, 0, 0, -queries % parts))
        query = torch.unflatten(query, 2, (parts, -1)).squeeze(1)
        key, value = (a.expand(-1, parts, -1, -1) for a in (key, value))
    # The kernel takes its maximum before the scale, so a sign goes into the queries, exactly.
    y = functional.scaled_dot_product_attention(
        query if scale > 0 else -query,
        key,
        value,
        attn_mask=mask,
        scale=abs(scale),
    )
    y = y.flatten(1, 2)[:, :queries, : g.shape[-1]]
    y = y if common is None else y + common
    return y if empty is None else y.masked_fill(empty[..., None], 0)


def _is_centred(g: Tensor) -> bool:
    return g.device.type == "cpu" and g.dtype in {torch.float32, torch.float64}


def _unit(a: Tensor) -> int:
    """Return how many numbers are the 16 bytes of which the kernels of a GPU want multiples in widths and rows."""
    return 16 // a.element_size()


def _head(a: Tensor, width: int) -> Tensor:
    """Return (B, 1, N, width): the kernels want equal widths and rows without gaps; columns of 0 add nothing."""
    if a.shape[-1] < width:
        a = functional.pad(a, (0, width - a.shape[-1]))
    if a.stride(-1) != 1:
        a = a.contiguous()
    elif _is_askew(a):
        a = a.clone(memory_format=torch.contiguous_format)
    return a.unsqueeze(1)


def _is_askew(a: Tensor) -> bool:
    """Return whether a GPU would take the matrix, silently, for where rows start; a compiler lays out what it makes."""
    if device_kind(a) == "cpu" or torch.compiler.is_compiling():
        return False
    return any(step % _unit(a) for step in (a.storage_offset(), *a.stride()[:-1]))


def _attend(theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float, rows: int | None) -> Tensor:
    """Return y as autograd records it itself: by fused attention, or chunk by chunk."""
    if rows is None:
        return fused_attention(theta, phi, g, valid, scale)
    if takes_halves(theta):
        chunks = [halves.sums(halves.weights_of(one, phi, valid, scale), g) for one in torch.split(theta, rows, dim=1)]
    else:
        wide, values = widened(phi), widened(g)
        chunks = [_weights(one, wide, valid, scale) @ values for one in torch.split(theta, rows, dim=1)]
    return torch.cat(chunks, dim=1).to(theta.dtype)


class _Chunks(torch.autograd.Function):
    """A chunk of queries at a time, with a gradient that makes the weights anew or finds them where they were kept."""

    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,
        phi: Tensor,
        g: Tensor,
        valid: Tensor | None,
        scale: float,
        rows: int,
        keeps_weights: bool,
    ) -> Tensor:
        ctx.scale, ctx.rows = scale, rows
        weights = halves.weights_of(theta, phi, valid, scale) if keeps_weights else None
        ctx.save_for_backward(theta, phi, g, valid, weights)
        return _attend(theta, phi, g, valid, scale, rows) if weights is None else halves.sums(weights, g)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        theta, phi, g, valid, weights = ctx.saved_tensors
        with full_precision(dy.device.type):
            if weights is None or _is_twice():
                found = _gradients(theta, phi, g, valid, ctx.scale, dy, ctx.rows)
            else:
                found = halves.gradients(theta, phi, g, valid, ctx.scale, dy, weights)
        return (*(a.to(theta.dtype) for a in found), None, None, None, None)


_chunks_with_gradient: Callable[..., Tensor] = _Chunks.apply


class _Fused(torch.autograd.Function):
    """Fused attention with a gradient that can be differentiated again.

    The kernels' gradient cannot: it serves where no derivative of it is asked for, from the graph that the forward
    pass made. Else formulas give it, a chunk of queries at a time.
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        y, ctx.graph = _fused_graph(theta, phi, g, valid, scale)
        # Kept like all else, where a checkpoint finds them: it would run a third time for a graph that keeps them.
        ctx.save_for_backward(theta, phi, g, valid, *ctx.graph.tensors)
        ctx.graph.tensors.clear()
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        theta, phi, g, valid, *kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        gradients: Iterator[Tensor]
        if torch.is_grad_enabled():
            with full_precision(dy.device.type):
                every = _gradients(theta, phi, g, valid, ctx.scale, dy, SECOND_ROWS)
            gradients = itertools.compress(every, needed)
        else:
            y, inputs, tensors = ctx.graph
            tensors.extend(kept)
            gradients = iter(torch.autograd.grad(y, inputs, dy, retain_graph=True))
            tensors.clear()
        return (*(next(gradients) if need else None for need in needed), None, None)


class _Graph(NamedTuple):
    """The graph from the operands that require a gradient to y; what it needs of them it finds in `tensors`."""

    y: GradientEdge
    inputs: list[GradientEdge]
    tensors: list[Tensor]


def _fused_graph(theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, _Graph]:
    """Return y, and the graph to it with the tensors that it needs."""
    tensors: list[Tensor] = []

    def keep(a: Tensor) -> int:
        tensors.append(a)
        return len(tensors) - 1

    with torch.enable_grad(), saved_tensors_hooks(keep, tensors.__getitem__):
        # Views have edges of their own, even of one tensor, and an edge keeps no tensor alive.
        theta, phi, g = (a.view_as(a) for a in (theta, phi, g))
        y = fused_attention(theta, phi, g, valid, scale)
        inputs = [get_gradient_edge(a) for a in (theta, phi, g) if a.requires_grad]
        return y.detach(), _Graph(get_gradient_edge(y), inputs, tensors)


_fused_with_gradient: Callable[..., Tensor] = _Fused.apply


def _parts(theta: Tensor) -> int:
    """Return into how many parts to cut the queries: on a CPU the kernel shares out too few chunks of them itself."""
    if torch.compiler.is_compiling() or theta.device.type != "cpu":
        return 1
    # Its gradient has one thread for each part, with gradients of phi and g of its own, which are then added.
    return min(-(-torch.get_num_threads() // max(theta.shape[0], 1)), MOST_PARTS)


def _is_twice() -> bool:
    """Return whether a gradient is made for a derivative of it, as a compiler never does."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _gradients(
    theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float, dy: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of theta, phi and g, a chunk of queries at a time."""
    wide = torch.promote_types(theta.dtype, torch.float32)
    of_chunk: Callable[..., tuple[Tensor, Tensor, Tensor]] = _chunk_gradients
    if takes_halves(theta) and not _is_twice():
        of_chunk, keys, values = halves.gradients, phi, g
    else:
        keys, values = phi.to(wide), g.to(wide)
    if _is_twice():  # each chunk is made anew as well
        of_chunk = partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)
    dtheta, dphi, dg = [], torch.zeros_like(phi, dtype=wide), torch.zeros_like(g, dtype=wide)
    for queries, part in zip(torch.split(theta, rows, dim=1), torch.split(dy, rows, dim=1), strict=True):
        found = of_chunk(queries, keys, values, valid, scale, part)
        dtheta.append(found[0].to(theta.dtype))
        dphi, dg = dphi + found[1], dg + found[2]
    return torch.cat(dtheta, dim=1), dphi.to(phi.dtype), dg.to(g.dtype)


def _chunk_gradients(
    theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weights, dy = _weights(theta, phi, valid, scale), widened(dy)
    dweights = weights * (dy @ g.transpose(1, 2))
    dscores = dweights - weights * dweights.sum(dim=-1, keepdim=True)
    return scale * (dscores @ phi), dscores.transpose(1, 2) @ (scale * widened(theta)), weights.transpose(1, 2) @ dy


def _weights(theta: Tensor, phi: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Return the weights of a chunk of queries; phi is in at least float32."""
    return softmax((scale * widened(theta)) @ phi.transpose(1, 2), None if valid is None else valid[:, None, :])

"""The method "streamed": the softmax forms by fused attention, or by chunks of queries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nonlocal_torch.context import is_recorded, is_transformed, widened
from nonlocal_torch.methods.pairwise import softmax

__all__ = ["streamed"]

MOST_PARTS = 8
"""Into how many parts queries are cut at most."""

SECOND_ROWS = 128
"""How many queries a chunk holds in a derivative of the fused attention's gradient."""


def streamed(theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float, rows: int | None) -> Tensor:
    """Return y (B, N, D) in the dtype of theta.

    Args:
        theta: queries `(B, N, C')`.
        phi: keys `(B, M, C')`, 0 where `valid` is False.
        g: values `(B, M, D)`, likewise.
        valid: `(B, M)`, or None.
        scale: the factor on the scores.
        rows: how many queries a chunk holds; None: PyTorch's fused attention.
    """
    phi, g = phi.to(theta.dtype), g.to(theta.dtype)
    if is_transformed():
        # The fused kernels have no rule for vmap and no second derivative, and a function is differentiated as one.
        return _attend(theta, phi, g, valid, scale, theta.shape[1] if rows is None else rows)
    if torch.compiler.is_compiling():
        return fused_attention(theta, phi, g, valid, scale)
    if phi.shape[1] == 1:
        rows = theta.shape[1]  # of one key the weight is 1: formulas give gradients of exactly 0, the kernel nearly 0
    if is_recorded(theta, phi, g):
        return _with_gradient(theta, phi, g, valid, scale, rows)
    return _attend(theta, phi, g, valid, scale, rows)


def fused_attention(theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Compute the softmax forms by the framework's fused attention."""
    width, queries, parts = max(theta.shape[-1], g.shape[-1]), theta.shape[1], _parts(theta)
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
        attn_mask=None if valid is None else valid[:, None, None, :],
        scale=abs(scale),
    )
    y = y.flatten(1, 2)[:, :queries, : g.shape[-1]]
    y = y if common is None else y + common
    return y if valid is None else y.masked_fill(~valid.any(dim=1)[:, None, None], 0)


def _is_centred(g: Tensor) -> bool:
    return g.device.type == "cpu" and g.dtype in {torch.float32, torch.float64}


def _head(a: Tensor, width: int) -> Tensor:
    """Return (B, 1, N, width): the kernels want equal widths and rows without gaps; columns of 0 add nothing."""
    if a.shape[-1] < width:
        a = functional.pad(a, (0, width - a.shape[-1]))
    return (a if a.stride(-1) == 1 else a.contiguous()).unsqueeze(1)


def _attend(theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float, rows: int | None) -> Tensor:
    """Return y as autograd records it itself: by fused attention, or chunk by chunk."""
    if rows is None:
        return fused_attention(theta, phi, g, valid, scale)
    wide, values = widened(phi), widened(g)
    chunks = [_weights(chunk, wide, valid, scale) @ values for chunk in torch.split(theta, rows, dim=1)]
    return torch.cat(chunks, dim=1).to(theta.dtype)


class _Streamed(torch.autograd.Function):
    """The operation with a gradient that needs no matrix of weights and can be differentiated again.

    The fused kernels' gradient cannot: it serves where no derivative of it is asked for, from the graph that the
    forward pass made. Else formulas give it, a chunk of queries at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float, rows: int | None
    ) -> Tensor:
        ctx.scale, ctx.rows, kept = scale, rows, list[Tensor]()
        if rows is None:
            y, ctx.graph = _fused_graph(theta, phi, g, valid, scale)
            # Kept like all else, where a checkpoint finds them: it would run a third time for a graph that keeps them.
            kept.extend(ctx.graph.tensors)
            ctx.graph.tensors.clear()
        else:
            y = _attend(theta, phi, g, valid, scale, rows)
        ctx.save_for_backward(theta, phi, g, valid, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        theta, phi, g, valid, *kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        gradients: Iterator[Tensor]
        if ctx.rows is not None or torch.is_grad_enabled():
            rows = SECOND_ROWS if ctx.rows is None else ctx.rows
            every = _gradients(theta, phi, g, valid, ctx.scale, dy, rows)
            gradients = itertools.compress(every, needed)
        else:
            y, inputs, tensors = ctx.graph
            tensors.extend(kept)
            gradients = iter(torch.autograd.grad(y, inputs, dy, retain_graph=True))
            tensors.clear()
        return (*(next(gradients) if need else None for need in needed), None, None, None)


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


_with_gradient: Callable[..., Tensor] = _Streamed.apply


def _parts(theta: Tensor) -> int:
    """Return into how many parts to cut the queries: on a CPU the kernel shares out too few chunks of them itself."""
    if torch.compiler.is_compiling() or theta.device.type != "cpu":
        return 1
    # Its gradient has one thread for each part, with gradients of phi and g of its own, which are then added.
    return min(-(-torch.get_num_threads() // max(theta.shape[0], 1)), MOST_PARTS)


def _gradients(
    theta: Tensor, phi: Tensor, g: Tensor, valid: Tensor | None, scale: float, dy: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of theta, phi and g, a chunk of queries at a time."""
    wide, values = widened(phi), widened(g)
    dtheta, dphi, dg = [], torch.zeros_like(wide), torch.zeros_like(values)
    for queries, part in zip(torch.split(theta, rows, dim=1), torch.split(dy, rows, dim=1), strict=True):
        arguments = queries, wide, values, valid, scale, part
        if torch.is_grad_enabled():  # for a derivative of the gradient, which makes each chunk anew as well
            found = checkpoint(_chunk_gradients, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            found = _chunk_gradients(*arguments)
        dtheta.append(found[0])
        dphi, dg = dphi + found[1], dg + found[2]
    return torch.cat(dtheta, dim=1).to(theta.dtype), dphi.to(phi.dtype), dg.to(g.dtype)


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

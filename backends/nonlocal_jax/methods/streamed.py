"""A softmax over keys for a chunk of queries at a time: the matrix of weights never exists as a whole."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.arguments import known_sizes
from nonlocal_core.spec.form import Form
from nonlocal_jax.methods.pairwise import pairwise

__all__ = ["streamed"]


def streamed(theta: Array, phi: Array, g: Array, form: Form, valid: Array | None, rows: int) -> Array:
    """Return y (B, N, D), a chunk of at most B `rows` queries at a time: of several sets, or of a part of one."""
    batch, queries = known_sizes(theta.shape[:2])
    sets, abreast = None, 1
    if batch and queries:
        # As many sets at a time as there may be devices with a part of the batch each: none of them then waits.
        abreast = math.gcd(batch, jax.device_count())
        batch //= abreast
        sets = max(1, batch * rows // queries)
        rows = -(-queries // -(-queries // (batch * rows)))  # the last chunk is nearly as long as the others

    def of_set(arrays: tuple[Array, Array, Array, Array | None]) -> Array:
        theta, phi, g, valid = jax.tree.map(lambda a: a[None], arrays)
        size = theta.shape[1]
        chunks = -(-size // rows) if isinstance(size, int) else size // rows + 1  # surely one, for any symbolic size
        cut = jnp.pad(theta[0], ((0, chunks * rows - size), (0, 0))).reshape(chunks, 1, rows, theta.shape[2])
        # A checkpoint keeps the weights of the chunks out of the gradient, the other out of second derivatives.
        y = lax.map(jax.checkpoint(jax.checkpoint(lambda chunk: pairwise(chunk, phi, g, form, valid))), cut)
        return y.reshape(chunks * rows, g.shape[2])[:size]

    def of_sets(arrays: tuple[Array, Array, Array, Array | None]) -> Array:
        return lax.map(of_set, arrays, batch_size=sets)

    arrays = (theta, phi, g, valid)
    if abreast == 1:
        return of_sets(arrays)
    y = jax.vmap(of_sets)(jax.tree.map(lambda a: a.reshape(abreast, -1, *a.shape[1:]), arrays))
    return y.reshape(-1, *y.shape[2:])

"""The concatenation form in the order of its keys, without the matrix of weights.

The score is ReLU(a_i + b_j), and a key counts for a query only if b_j > -a_i. With the keys in descending order of b,
those that count are the first k_i, so sum_j s_ij g_j = a_i G[k_i] + H[k_i] with the prefix sums G of g_j and H of
b_j g_j. The derivatives are those of a gather, a product and a sum: of every order, in either mode.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.spec.form import Form
from nonlocal_jax.arrays import product, wide_dtype
from nonlocal_jax.methods.pairwise import summands

__all__ = ["running_sums", "sorted_", "triangular_sums"]

CHUNK = 128
"""The largest number of keys in a chunk: a prefix sum takes that many steps, in all chunks at once."""


def sorted_(theta: Array, phi: Array, g: Array, form: Form, valid: Array | None) -> Array:
    """Return y (B, N, D) from prefix sums over the sorted keys."""
    dtype = wide_dtype(theta, phi)
    if not isinstance(phi.shape[1], int):
        # A gather needs at least one key, which a symbolic number of them does not promise: one that is not valid.
        valid = jnp.ones(phi.shape[:2], bool) if valid is None else valid
        phi, g, valid = (jnp.pad(array, ((0, 0), (0, 1), (0, 0))[: array.ndim]) for array in (phi, g, valid))
    a, b = summands(theta, phi, form, dtype)
    rising = -b if valid is None else jnp.where(valid, -b, jnp.inf)
    places = lax.broadcasted_iota(jnp.int32, b.shape, 1)
    rising, order = lax.sort((lax.stop_gradient(rising), places), dimension=1, num_keys=1, is_stable=False)

    # Moved by the median of the valid b the scores stay as they are, and large opposite offsets cancel here.
    count = jnp.sum(jnp.ones(b.shape, bool) if valid is None else valid, axis=1, keepdims=True, dtype=jnp.int32)
    middle = jnp.where(count > 0, jnp.take_along_axis(rising, count // 2, axis=1, mode="promise_in_bounds"), 0)
    a, b, rising = a - middle, b + middle, rising - middle
    active = _counts(rising, lax.stop_gradient(a))

    keys = b.shape[1]
    chunks = keys // CHUNK + 1
    steps = keys // chunks + 1 if isinstance(keys, int) else CHUNK  # with room for the sum of all keys
    order = jnp.pad(order, ((0, 0), (0, chunks * steps - keys)))
    order = jnp.moveaxis(order.reshape(-1, chunks, steps), 2, 0)
    b, g = (_rows(array, order[..., None], 0, 1) for array in (b[..., None], g))
    g = g.astype(dtype)
    places = jnp.stack((active % steps, active // steps), axis=-1)
    plain, weighted = (_rows(_prefix_sums(values), places, 1, 0) for values in (g, b * g))
    return form.scale * (a[..., None] * plain + weighted) / jnp.maximum(count, 1)[..., None].astype(dtype)


def _counts(rising: Array, a: Array) -> Array:
    """Return how many of the sorted numbers (B, M) lie below each a, (B, N), by bisection."""
    size = rising.shape[1]
    bits = size.bit_length() if isinstance(size, int) else 31  # `searchsorted` needs a known size

    def add_bit(step: Array, count: Array) -> Array:
        more = count + lax.shift_left(jnp.int32(1), jnp.int32(bits - 1) - step)
        last = jnp.take_along_axis(rising, jnp.minimum(more, size) - 1, axis=1, mode="promise_in_bounds")
        return jnp.where((more <= size) & (last < a), more, count)

    return lax.fori_loop(jnp.int32(0), bits, add_bit, jnp.zeros_like(a, jnp.int32))


def _rows(array: Array, places: Array, samples: int, same: int) -> Array:
    """Return the rows of an array at places in all but its last axis and that of the samples, which places have too."""
    # An index that counts the samples would hide from a batch on several devices that each needs its own alone.
    axes = tuple(axis for axis in range(array.ndim - 1) if axis != samples)
    numbers = lax.GatherDimensionNumbers((places.ndim - 1,), axes, axes, (samples,), (same,))
    sizes = (1,) * (array.ndim - 1) + array.shape[-1:]
    return lax.gather(array, places, numbers, sizes, mode="promise_in_bounds")


def _prefix_sums(values: Array) -> Array:
    """Return for each place of `(steps, B, chunks, D)` the sum of what comes before it, in this chunk or another."""
    inside, totals = lax.platform_dependent(values, cpu=running_sums, default=triangular_sums)
    return inside + (jnp.cumsum(totals, axis=1) - totals)[None]


def running_sums(values: Array) -> tuple[Array, Array]:
    """Return for each step the sum of those before it, and the sum of all."""
    totals, inside = lax.scan(lambda sums, step: (sums + step, sums), jnp.zeros_like(values[0]), values)
    return inside, totals


def triangular_sums(values: Array) -> tuple[Array, Array]:
    """Return the same by one product: an accelerator takes longer to start a step than to make it."""
    earlier = jnp.tri(values.shape[0], k=-1, dtype=values.dtype)
    inside = product("ij,j...->i...", earlier, values, values.dtype)
    return inside, inside[-1] + values[-1]

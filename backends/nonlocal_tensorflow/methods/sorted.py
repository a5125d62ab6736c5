"""The concatenation form from prefix sums over sorted keys.

With a_i = w_theta . theta_i + b_f and b_j = w_phi . phi_j the score ReLU(a_i + b_j) is zero unless b_j > -a_i. In
falling order of b the keys that count for query i are the first k_i, so that the sum of s_ij g_j over j is
a_i G[k_i] + H[k_i], with the prefix sums G of g_j and H of b_j g_j.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from nonlocal_core.spec.form import Form
from nonlocal_tensorflow.arrays import device, sizes
from nonlocal_tensorflow.methods.pairwise import key_count, summands

__all__ = ["sorted_sums"]

Ranks = tuple[tf.Tensor, tf.Tensor]


def sorted_sums(theta: tf.Tensor, phi: tf.Tensor, g: tf.Tensor, form: Form, key_mask: tf.Tensor | None) -> tf.Tensor:
    """Return y (B, N, D) by way of prefix sums; invalid keys and values are 0."""
    a, b = summands(theta, phi, form)
    last = b if key_mask is None else tf.where(key_mask, b, tf.constant(b.dtype.min, b.dtype))
    of_queries, of_keys = _ranks(tf.stop_gradient(a), tf.stop_gradient(last))
    # The median of the valid b goes from the keys to the queries: large opposite offsets would cancel badly.
    valid = tf.ones_like(b, tf.int32) if key_mask is None else tf.cast(key_mask, tf.int32)
    middle = tf.gather(of_queries[0], tf.reduce_sum(valid, axis=1, keepdims=True) // 2, batch_dims=1)
    centre = tf.stop_gradient(tf.gather(b, middle, batch_dims=1))
    a, b = a + centre, b - centre
    plain, weighted = _active_sums(of_queries, of_keys, g, tf.expand_dims(b, -1) * g)
    sums = form.scale * (tf.expand_dims(a, -1) * plain + weighted)
    return sums / key_count(phi, None if key_mask is None else tf.expand_dims(key_mask, 1))


def _active_sums(of_queries: Ranks, of_keys: Ranks, *values: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Return for each query i the sums of values_j over the keys j with a_i + b_j > 0: `(B, M, D)` -> `(B, N, D)`.

    They are linear in the values, and the gradient is the same sum with queries and keys exchanged.
    """

    @tf.custom_gradient
    def run(*values: tf.Tensor) -> Any:
        order, count = of_queries
        # Tapes that are open would record the steps beside the gradient that they have.
        prefixes = (_prefix_sums(tf.gather(tf.stop_gradient(a), order, batch_dims=1)) for a in values)
        sums = tuple(tf.gather(prefix, count, batch_dims=1) for prefix in prefixes)
        return sums, lambda *gradients: _active_sums(of_keys, of_queries, *gradients)

    return run(*values)


def _ranks(a: tf.Tensor, b: tf.Tensor) -> tuple[Ranks, Ranks]:
    """Return the keys in falling order of b, with how many of them have b_j > -a_i for each query; and the reverse."""
    queries, keys = sizes(a)[1], sizes(b)[1]
    merged = tf.concat([-a, b], axis=1)
    # No order is defined for NaN. As the largest, that of a key reaches every query, that of a query no other.
    merged = tf.where(tf.math.is_nan(merged), tf.constant(merged.dtype.max, merged.dtype), merged)
    order = tf.argsort(merged, axis=1, direction="DESCENDING", stable=True)
    is_key = order >= queries
    keys_passed = tf.cumsum(tf.cast(is_key, tf.int32), axis=1)
    queries_passed = tf.range(1, queries + keys + 1) - keys_passed
    parted = _scattered(order, tf.where(is_key, queries + keys_passed, queries_passed) - 1)
    active = _scattered(tf.where(is_key, queries - queries_passed, keys_passed), order)
    rising = tf.reverse(parted[:, :queries], [1])
    return (parted[:, queries:] - queries, active[:, :queries]), (rising, active[:, queries:])


def _scattered(values: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Return each row of `values` with its entries at `places`, a permutation."""
    batch, length = sizes(values)
    flat = places + length * tf.expand_dims(tf.range(batch), 1)
    scattered = tf.scatter_nd(tf.reshape(flat, [-1, 1]), tf.reshape(values, [-1]), [batch * length])
    return tf.reshape(scattered, [batch, length])


def _prefix_sums(values: tf.Tensor) -> tf.Tensor:
    """Return the sums of the first 0, 1, .. M values, `(B, M, D)` -> `(B, M + 1 or more, D)`.

    In blocks, each a product with a triangle, they are several times faster than one long sum, and more exact.
    """
    batch, keys, width = sizes(values)
    rows = min(_ROWS, keys + 1) if isinstance(keys, int) else _ROWS
    count = keys // rows + 1
    padded = tf.pad(values, [[0, 0], [1, count * rows - keys - 1], [0, 0]])
    blocks = tf.reshape(padded, [batch, count, rows, width])
    if device() == "gpu":  # where the digits of a product are those of TF32, unless the user says otherwise
        inside = tf.cumsum(blocks, axis=2)
    else:
        inside = tf.matmul(tf.linalg.band_part(tf.ones([rows, rows], values.dtype), -1, 0), blocks)
    before = tf.cumsum(inside[:, :, -1:], axis=1, exclusive=True)
    return tf.reshape(inside + before, [batch, count * rows, width])


_ROWS = 64
"""How many values one block sums."""

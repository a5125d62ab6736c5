"""Positions cut over the replicas of a distribution strategy, which share keys, products and statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.planning import sends_products
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.cuts import check_pieces, inner_axis
from nonlocal_core.spec.form import Form
from nonlocal_tensorflow.arrays import flat, masked, sizes, wide
from nonlocal_tensorflow.methods.pairwise import summands
from nonlocal_tensorflow.op import aggregate

__all__ = ["Spread", "check_cut", "replicas", "total"]


def replicas() -> int:
    """Return how many replicas compute this together: 1 outside of `strategy.run`."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def total(a: Any) -> Any:
    """Return the sum over all replicas of a tensor, or of each tensor of a list."""
    return a if replicas() == 1 else tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, a)


def _of_all(number: int) -> list[int]:
    """Return from each replica a number that is known when a function is traced; other hosts have what this one has."""
    found = tf.distribute.get_replica_context().merge_call(
        lambda strategy, number: strategy.experimental_local_results(number), args=(number,)
    )
    return list(found) * (replicas() // len(found))  # one alone where all are the same


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where the keys of a set are.

    Args:
        axis: the axis of the set that the replicas cut.
        key_sizes: the sizes of the pooled keys on this replica.
    """

    axis: int
    key_sizes: tuple[Any, ...]

    def aggregate(
        self,
        theta: tf.Tensor,
        phi: tf.Tensor,
        g: tf.Tensor,
        form: Form,
        valid: tf.Tensor | None,
        method: str,
        *,
        gradients: bool,
    ) -> tf.Tensor:
        """Compute the operation for the queries of this replica and the keys of all."""
        dtype, inner, width, keys = theta.dtype, phi.shape[2], g.shape[2], phi.shape[1]
        theta, phi, g = (tf.cast(a, wide(dtype)) for a in (theta, phi, g))  # no bfloat16 is gathered
        is_linear = form.pairwise == "dot_product" and method != "pairwise"
        if is_linear and (keys is None or sends_products(sum(_of_all(keys)), inner, width)):
            return tf.cast(_by_products(theta, phi, g, form, valid), dtype)
        if form.pairwise == "concatenation":  # of a key one number is asked
            theta, phi = (tf.expand_dims(a, -1) for a in summands(theta, phi, form))
            form = dataclasses.replace(form, concat_weight=tf.ones(2, theta.dtype), concat_bias=None)
        own = [phi, g] if valid is None else [phi, g, tf.cast(tf.expand_dims(valid, -1), phi.dtype)]
        phi, g, *shown = tf.split(self._gather(tf.concat(own, -1)), [a.shape[-1] for a in own], -1)
        valid = None if valid is None else shown[0][..., 0] > 0
        return tf.cast(aggregate(theta, phi, g, form, valid, method, gradients=gradients), dtype)

    def _gather(self, a: tf.Tensor) -> tf.Tensor:
        """Return what all replicas hold of the keys of a set, in row-major order: `(B', M here, C)` -> `(B', M, C)`."""
        grid = tf.reshape(a, [sizes(a)[0], *self.key_sizes, a.shape[-1]])
        return flat(tf.distribute.get_replica_context().all_gather(grid, axis=1 + self.axis))


def _by_products(theta: tf.Tensor, phi: tf.Tensor, g: tf.Tensor, form: Form, valid: tf.Tensor | None) -> tf.Tensor:
    """Return theta (phi^T g) / M, of which the C' x D sums over keys, and their number, are all that is sent."""
    if valid is not None:
        phi, g = masked(phi, valid), masked(g, valid)
    counted = tf.ones_like(phi[..., 0]) if valid is None else tf.cast(valid, phi.dtype)
    count = tf.reduce_sum(counted, axis=1)[:, tf.newaxis, tf.newaxis]
    products, count = total([tf.matmul(phi, g, transpose_a=True), count])
    return theta @ (form.scale * products / tf.maximum(count, 1))


def check_cut(spec: NonLocalSpec, axis: int, shape: Sequence[Any], norm: Any) -> int | None:
    """Check how the replicas cut positions.

    Args:
        spec: the block.
        axis: the spatial axis along which they do.
        shape: that of the part of this replica, `(B, S1..Sk, C)`, None where a size is unknown.
        norm: the norm of the block.

    Returns:
        Which axis of a set they cut; None if they leave every set whole.

    Raises:
        TypeError: if the statistics of the norm are not those of all replicas.
        ValueError: if the axis is out of range, or a window or a group would be on two replicas.
    """
    spec.check_input([None if number == axis + 1 else size for number, size in enumerate(shape)])
    rank = len(shape) - 2
    if axis >= rank:
        raise fail_value("sharded_axis", f"be one of the {rank} spatial axes of `x`", axis)
    if replicas() == 1:
        return None
    if norm is not None and not getattr(norm, "synchronized", False):
        raise fail_type("norm", "be the block's own, whose statistics are those of all devices, for a cut input", norm)
    if shape[axis + 1] is not None:
        check_pieces(spec, rank, axis, _of_all(shape[axis + 1]))
    return inner_axis(spec, rank, axis)

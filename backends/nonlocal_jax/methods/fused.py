"""The softmax over keys by the attention that cuDNN has for half precision on GPUs of NVIDIA.

It has no second derivative, takes no batch of calls, and its arrays may be cut along samples alone. So the first
derivative is its own and all others are those of the chunks of queries, batches become samples, and on several devices
positions are brought together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from nonlocal_core.arguments import known_sizes
from nonlocal_core.spec.form import Form
from nonlocal_jax.arrays import has_tensor_cores
from nonlocal_jax.methods.streamed import streamed

__all__ = ["fused", "serves"]

PLATFORM = "cuda"
KERNEL: Callable[..., Any] = partial(jax.nn.dot_product_attention, implementation="cudnn")

_Cut: Any = PartitionSpec  # which has no types
_Partitioned: Any = custom_partitioning  # nor has this


def serves(theta: Array, phi: Array, g: Array) -> bool:
    """Return whether there is a kernel for these operands here."""
    sizes = known_sizes((*theta.shape, *g.shape))
    if not (all(sizes) and theta.dtype == phi.dtype == g.dtype and has_tensor_cores()):
        return False

    def both(*given: Array) -> tuple[Array, ...]:
        y, pull = jax.vjp(partial(_attention, 1.0), *given)
        return pull(_alike(y, theta)[0])

    try:  # JAX knows what its cuDNN takes on this GPU; older versions lose types of what is mapped
        jax.eval_shape(both, *_alike(theta, phi, g))
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def fused(theta: Array, phi: Array, g: Array, form: Form, valid: Array | None, rows: int) -> Array:
    """Return y (B, N, D) in the dtype of `theta`: by chunks of `rows` queries where there is no such GPU after all."""

    def by_chunks(theta: Array, phi: Array, g: Array, valid: Array | None) -> Array:
        return streamed(theta, phi, g, form, valid, rows).astype(theta.dtype)

    attention = partial(_attention, form.scale)
    attend = jax.custom_vjp(_of_samples(_value(attention), by_chunks))
    slopes = jax.custom_vjp(_of_samples(_pullback(attention), _pullback(by_chunks)))
    second = _pullback(_pullback(by_chunks))
    attend.defvjp(lambda *given: (attend(*given), given), lambda given, dy: (*slopes(dy, *given), None))
    slopes.defvjp(lambda *given: (slopes(*given), given), lambda given, changes: (*second(changes, *given), None))
    return attend(*_alike(theta, phi, g), valid)


def _attention(scale: float, theta: Array, phi: Array, g: Array, valid: Array | None = None) -> Array:
    """Return y by the kernel, which wants even numbers of positions, and one width for all that 8 divides."""
    keys, width = g.shape[1:]
    lengths = None if keys % 2 == 0 else jnp.full(g.shape[0], keys, jnp.int32)
    if valid is not None:  # it takes the first keys of a sample; where none is valid, one whose value is 0
        order = jnp.argsort(~valid, axis=1, stable=True)[..., None]
        phi, g = (jnp.take_along_axis(a, order, axis=1, mode="promise_in_bounds") for a in (phi, g))
        lengths = jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.int32), 1)
    theta = theta if scale > 0 else -theta  # it looks for the largest score before it scales
    padded = -(-max(theta.shape[2], width) // 8) * 8
    query, key, value = (
        jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, padded - a.shape[2])))[:, :, None] for a in (theta, phi, g)
    )
    y = KERNEL(query, key, value, scale=abs(scale), key_value_seq_lengths=lengths)
    return y[:, : theta.shape[1], 0, :width]


def _vjp(function: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
    """Return the value and the pullback of a function whose last argument has no gradient."""
    *given, valid = arrays
    return jax.vjp(lambda *given: function(*given, valid), *given)


def _value(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function computed as its gradients compute it: of two equal calls the compiler makes one."""
    return lambda *arrays: _vjp(function, arrays)[0]


def _pullback(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the gradients as a function of that of the result, and of the arguments."""
    return lambda change, *arrays: _vjp(function, arrays)[1](change)


def _of_samples(by_kernel: Callable[..., Any], by_chunks: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays that all have a sample for each of the others', for which a batch is more samples."""

    def on_gpu(*arrays: Any) -> Any:
        results = _whole(by_kernel(*_whole(arrays)))
        return jax.tree.map(lambda a: _alike(a, arrays[0])[0], results)

    @jax.custom_batching.custom_vmap
    def function(*arrays: Any) -> Any:
        return lax.platform_dependent(*arrays, default=by_chunks, **{PLATFORM: on_gpu})

    @function.def_vmap
    def over_batch(size: int, batched: Any, *arrays: Any) -> Any:
        def merged(a: Array, is_batched: bool) -> Array:
            a = a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        results = function(*jax.tree.map(merged, arrays, tuple(batched)))
        return jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), results), jax.tree.map(lambda _: True, results)

    return function


def _whole(arrays: Any) -> Any:
    """Return arrays that several devices may divide by samples alone, and all alike."""
    leaves, tree = jax.tree.flatten(arrays)

    def cuts(mesh: Any, found: Any, _: Any = None) -> tuple[NamedSharding, ...]:
        return (NamedSharding(mesh, _Cut(*found[0].sharding.spec[:1])),) * len(leaves)

    def axes(side: str) -> str:
        return ", ".join(
            f"b {' '.join(f'{side}{i}_{axis}' for axis in range(1, a.ndim))}" for i, a in enumerate(leaves)
        )

    same = _Partitioned(lambda *leaves: leaves)
    same.def_partition(
        lambda mesh, found, _: (mesh, lambda *leaves: leaves, cuts(mesh, found), cuts(mesh, found)),
        cuts,
        sharding_rule=f"{axes('x')} -> {axes('y')}",
    )
    return jax.tree.unflatten(tree, same(*leaves))


def _alike(*arrays: Array) -> tuple[Array, ...]:
    """Return the same arrays, typed as different on the devices of a map where one of them is."""
    one = jnp.stack([a.ravel()[0] for a in arrays]).sum() == 0
    return tuple(jnp.where(one, a, a) for a in arrays)

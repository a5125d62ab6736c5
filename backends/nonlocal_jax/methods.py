"""The ways to sum over keys, y_i = sum_j w_ij g_j; the one by sorted keys is in `nonlocal_jax.sorted`.

In all of them phi and g are 0 where `valid` (B, M) is False, and the sums are at least float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.arguments import known_sizes
from nonlocal_core.planning import keys_first
from nonlocal_core.spec.form import Form

__all__ = ["halves", "pairwise", "pairwise_weights", "product", "reassociated", "streamed"]


def pairwise(theta: Array, phi: Array, g: Array, form: Form, valid: Array | None) -> Array:
    """Return y (B, N, D) by the matrix of weights."""
    weights, total = _weights(theta, phi, form, None if valid is None else valid[:, None, :])
    return product("bnm,bmd->bnd", _narrowed(weights, theta, g), g, weights.dtype) / total


def streamed(theta: Array, phi: Array, g: Array, form: Form, valid: Array | None, rows: int) -> Array:
    """Return y (B, N, D), a block of at most B `rows` queries at a time: of several sets, or of a part of one."""
    batch, queries = known_sizes(theta.shape[:2])
    sets = None
    if batch and queries:
        sets = max(1, batch * rows // queries)
        rows = -(-queries // -(-queries // (batch * rows)))  # the last block is nearly as long as the others

    def of_set(arrays: tuple[Array | None, ...]) -> Array:
        theta, phi, g, valid = jax.tree.map(lambda a: a[None], arrays)
        size = theta.shape[1]
        blocks = -(-size // rows) if isinstance(size, int) else size // rows + 1  # surely one, for any symbolic size
        cut = jnp.pad(theta[0], ((0, blocks * rows - size), (0, 0))).reshape(blocks, 1, rows, theta.shape[2])
        # A checkpoint keeps the weights of the blocks out of the gradient, the other out of second derivatives.
        y = lax.map(jax.checkpoint(jax.checkpoint(lambda block: pairwise(block, phi, g, form, valid))), cut)
        return y.reshape(blocks * rows, g.shape[2])[:size]

    return lax.map(of_set, (theta, phi, g, valid), batch_size=sets)


def reassociated(theta: Array, phi: Array, g: Array, form: Form, valid: Array | None) -> Array:
    """Return y (B, N, D) of the dot product, by the cheaper order of the two products."""
    if not keys_first(*known_sizes((theta.shape[1], *phi.shape[1:], g.shape[2]))):
        return pairwise(theta, phi, g, form, valid)
    dtype = jnp.result_type(theta, phi, jnp.float32)
    count = _count_of(phi, None if valid is None else valid[:, None, :], dtype)
    means = form.scale * product("bmc,bmd->bcd", phi, g, dtype) / count
    return product("bnc,bcd->bnd", theta, _narrowed(means, theta, g), dtype)


def pairwise_weights(theta: Array, phi: Array, form: Form, valid: Array) -> Array:
    """Return the weights w_ij (B, N, M), at least in float32; `valid` is (B or 1, N or 1, M)."""
    weights, total = _weights(theta, phi, form, valid)
    return jnp.where(valid, weights / total, 0)


def halves(theta: Array, phi: Array, form: Form, dtype: Any) -> tuple[Array, Array]:
    """Return a (B, N) and b (B, M), the parts that queries and keys have in the scores of the concatenation."""
    weight, half = jnp.asarray(form.concat_weight, theta.dtype), theta.shape[-1]
    a = product("bnc,c->bn", theta, weight[:half], dtype)
    b = product("bmc,c->bm", phi, weight[half:], dtype)
    return a if form.concat_bias is None else a + jnp.asarray(form.concat_bias, dtype), b


def product(equation: str, a: Array, b: Array, dtype: Any) -> Array:
    """Return a product of arrays, summed up and returned in `dtype`."""
    # By default GPUs and TPUs round float32 operands to fewer bits; whoever wants that has a setting for it.
    precision = None if jax.config.jax_default_matmul_precision else lax.Precision.HIGHEST
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=dtype)


def _weights(theta: Array, phi: Array, form: Form, valid: Array | None) -> tuple[Array, Array]:
    """Return weights (B, N, M) and what they are still to be divided by; `valid` is (B or 1, N or 1, M)."""
    dtype = jnp.result_type(theta, phi, jnp.float32)
    scores = _scores(theta, phi, form, dtype)
    if not form.softmax:
        return scores if valid is None else jnp.where(valid, scores, 0), _count_of(phi, valid, dtype)
    if valid is not None:
        # A row without any key would be NaN: it is computed with every key, all of whose values are 0.
        scores = jnp.where(valid | ~jnp.any(valid, axis=-1, keepdims=True), scores, -jnp.inf)
    weights = _exponentials(scores)
    return weights, lax.stop_gradient(jnp.sum(weights, axis=-1, keepdims=True))


@jax.custom_jvp
def _exponentials(scores: Array) -> Array:
    """Return the exponentials of scores, times what makes the largest of a row 1."""
    largest = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)  # which a symbolic number of keys needs
    return jnp.exp(scores - largest)


@_exponentials.defjvp
def _exponentials_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Give the exponentials the derivative that they have when their sum divides them, which then has none."""
    weights, (change,) = _exponentials(*primals), tangents
    total = lax.stop_gradient(jnp.sum(weights, axis=-1, keepdims=True))
    return weights, weights * (change - jnp.sum(weights * change, axis=-1, keepdims=True) / total)


def _count_of(phi: Array, valid: Array | None, dtype: Any) -> Array:
    """Return the number of valid keys, at least 1; `valid` is (B or 1, N or 1, M)."""
    count = phi.shape[1] if valid is None else jnp.sum(valid, axis=-1, keepdims=True)
    return jnp.maximum(count, 1).astype(dtype)


def _scores(theta: Array, phi: Array, form: Form, dtype: Any) -> Array:
    """Return the scaled scores (B, N, M)."""
    if not isinstance(form.pairwise, str):
        return form.scale * form.pairwise(theta.astype(dtype), phi.astype(dtype))
    if form.pairwise == "concatenation":
        a, b = halves(theta, phi, form, dtype)
        return form.scale * jax.nn.relu(a[:, :, None] + b[:, None, :])
    theta, after = _scaled(theta, form, dtype)
    return after * product("bnc,bmc->bnm", theta, phi, dtype)


def _scaled(theta: Array, form: Form, dtype: Any) -> tuple[Array, float]:
    """Return theta times the scale, and what is left of the scale for the product."""
    # A scaled theta may leave the range of a half-precision operand; its scores are wide and may be scaled instead.
    return (form.scale * theta, 1.0) if theta.dtype == dtype else (theta, form.scale)


def _narrowed(factors: Array, theta: Array, g: Array) -> Array:
    """Return weights or sums as an operand of the next product."""
    # They fit the range of bfloat16, which is that of float32; otherwise the other operand is widened to meet them.
    return factors.astype(g.dtype) if theta.dtype == g.dtype == jnp.bfloat16 else factors

"""What is measured in JAX: compiled functions, called when they are compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nonlocal_core import NonLocalSpec
from nonlocal_jax import NonLocalBlock, attention, nonlocal_block

from .arrays import input_of, params_of, positions_of
from .case import PLAIN, Case
from .plain import plain

__all__ = ["forward", "peak", "product", "rows", "spec_of", "to_numpy", "training"]


def forward(case: Case) -> Callable[[], Any]:
    """Return the call of a block in evaluation."""

    def block(params: Any, x: Any) -> Any:
        return nonlocal_block(x, params, case.spec, method=case.asked, dtype=_precision(case))

    function = partial(_plain, case) if case.backend in PLAIN else block
    return _compiled(case, function, params_of(case.spec), input_of(case.shape))


def training(case: Case) -> Callable[[], Any]:
    """Return a training step: the gradients for dz, that of z, and the running statistics after it."""
    block = NonLocalBlock.from_spec(case.spec, rngs=nnx.Rngs(0), method=case.asked, dtype=_precision(case))
    block.import_params(params_of(case.spec))
    graph, *states = nnx.split(block, nnx.Param, nnx.BatchStat)
    params, statistics = states

    def step(params: Any, x: Any, dz: Any, statistics: Any) -> Any:
        def output(params: Any, x: Any) -> Any:
            made = nnx.merge(graph, params, statistics, copy=True)
            return made(x), nnx.state(made, nnx.BatchStat)

        z, gradients_for, after = jax.vjp(output, params, x, has_aux=True)
        return gradients_for(dz.astype(z.dtype)), after

    if case.backend in PLAIN:

        def plain_step(params: Any, x: Any, dz: Any) -> Any:
            z, gradients_for = jax.vjp(partial(_plain, case), params, x)
            return gradients_for(dz.astype(z.dtype))

        return _compiled(case, plain_step, params_of(case.spec), input_of(case.shape), input_of(case.shape, seed=2))
    return _compiled(case, step, params, input_of(case.shape), input_of(case.shape, seed=2), statistics)


def rows(case: Case) -> Callable[[], Any]:
    """Return the call for some rows of the weights."""
    positions = positions_of(case.positions)

    def weights(params: Any, x: Any) -> Any:
        return attention(x, params, case.spec, positions, dtype=_precision(case))

    return _compiled(case, weights, params_of(case.spec), input_of(case.shape))


def product(case: Case, size: int) -> Callable[[], Any]:
    """Return the product of two square matrices, for comparison."""
    return _compiled(case, lambda matrix: matrix @ matrix, jnp.ones((size, size), case.dtype))


def peak(_: Case, call: partial[Any]) -> int | None:
    """Return the memory that a compiled function takes for its results and on the way to them, if XLA tells it."""
    analysis = call.args[0].memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def to_numpy(z: Any) -> np.ndarray[Any, Any]:
    """Return an output as an array, channels last."""
    return np.asarray(z, np.float32)


def spec_of(case: Case) -> NonLocalSpec:
    """Return what the block computes."""
    return case.spec


def _plain(case: Case, params: Any, x: Any) -> Any:
    def norm(r: Any, mean: Any, variance: Any, scale: Any, shift: Any) -> Any:
        r = r.astype(x.dtype)
        if case.training:
            mean, variance = r.mean((0, 1)), r.var((0, 1))
        return (r - mean) * (scale * (variance + case.spec.norm_epsilon) ** -0.5) + shift

    def narrow(operand: Any) -> Any:
        return operand.astype(case.dtype)

    ops = SimpleNamespace(
        einsum=lambda equation, *operands: jnp.einsum(equation, *map(narrow, operands)),
        linear=lambda x, weight, bias: narrow(x) @ narrow(weight).T + narrow(bias),
        softmax=jax.nn.softmax,
        relu=jax.nn.relu,
        norm=norm,
    )
    flat = x.reshape(len(x), -1, x.shape[-1])
    return x + plain(flat, params, case.spec, ops).reshape(x.shape)


def _compiled(case: Case, function: Callable[..., Any], *arrays: Any) -> partial[Any]:
    """Return the call of a function that is compiled here and now."""
    given = jax.device_put(arrays, jax.devices(case.device)[0])
    return partial(_run, jax.jit(function).lower(*given).compile(), given)


def _run(compiled: Any, given: Any) -> Any:
    return jax.block_until_ready(compiled(*given))  # type: ignore[no-untyped-call]


def _precision(case: Case) -> Any:
    return None if case.dtype == "float32" else jnp.dtype(case.dtype)

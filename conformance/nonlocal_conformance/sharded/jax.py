"""Blocks of JAX on an input that is cut over several virtual devices, which a process has from its start."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from nonlocal_conformance.driver import Array, Everything, Mask, Params, Spec
from nonlocal_conformance.processes import Processes
from nonlocal_core.spec.parameters import STATISTICS
from nonlocal_jax import nonlocal_block, updated_statistics

__all__ = [
    "differentiable",
    "jit",
    "memory",
    "process",
    "quick_options",
    "received",
    "second_derivatives",
    "sharded",
    "traffic",
]

_STARTED: list[Processes] = []
_DEVICES = 4
_NAME = "devices"
_Cut: Any = PartitionSpec  # which has no types


@functools.cache
def quick_options() -> dict[str, Any] | None:
    """Return options with which XLA compiles small programs several times faster, None where it lacks them."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    try:
        jax.jit(lambda a: a, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return None
    return options


def jit(function: Callable[..., Any]) -> Any:
    """Return a function that JAX compiles quickly."""
    return jax.jit(function, compiler_options=quick_options())


def process() -> Processes:
    """Return the process that has the devices, the same on every call unless it had to be ended."""
    if not _STARTED or _STARTED[-1].is_closed:
        _STARTED.append(Processes(1, __name__))
        _STARTED[-1](_start)
    return _STARTED[-1]


def _start(_: int) -> None:
    settings: Any = jax.config  # whose methods have no types
    settings.update("jax_platforms", "cpu")
    settings.update("jax_num_cpu_devices", _DEVICES)


def sharded(_: int, spec: Spec, params: Params, x: Array, dz: Array, key_mask: Mask, **options: Any) -> Everything:
    """Return what a block gives on a cut input; the arguments are those of a driver, here and below."""
    block = _cut(spec, **options)

    def work(x: Any, params: Any, dz: Any, key_mask: Any) -> Any:
        z, back, moved = jax.vjp(lambda x, params: block(x, params, key_mask), x, params, has_aux=True)
        return z, moved, *back(dz)

    with jax.enable_x64(x.dtype == np.float64):
        z, moved, dx, dparams = jax.tree.map(np.array, jit(work)(x, params, dz, key_mask))
    return z, {name: params[name] for name in STATISTICS if name in params} | moved, dx, differentiable(dparams)


def second_derivatives(
    _: int,
    spec: Spec,
    params: Params,
    x: Array,
    dz: Array,
    vx: Array,
    vparams: Params,
    key_mask: Mask,
    **options: Any,
) -> tuple[Array, Params]:
    """Return the gradients of <gradients, v>, reverse over reverse."""
    block = _cut(spec, **options)

    def slope(x: Any, params: Any, dz: Any, vx: Any, vparams: Any, key_mask: Any) -> Any:
        dx, dparams = jax.vjp(lambda x, params: block(x, params, key_mask)[0], x, params)[1](dz)
        return jnp.vdot(dx, vx) + sum(jnp.vdot(dparams[name], v) for name, v in vparams.items())

    with jax.enable_x64(x.dtype == np.float64):
        found = jit(jax.grad(slope, argnums=(0, 1)))(x, params, dz, vx, vparams, key_mask)
        dx, dparams = jax.tree.map(np.array, found)
    return dx, differentiable(dparams)


def traffic(
    _: int, spec: Spec, params: Params, x: Array, key_mask: Mask, *, axis: int, devices: int
) -> tuple[float, float]:
    """Return how many numbers a device receives in a compiled program, forward and backward."""

    def forth(x: Any, params: Any, key_mask: Any) -> Any:
        return block(x, params, key_mask)[0]

    def both(x: Any, params: Any, key_mask: Any) -> Any:
        z, back = jax.vjp(lambda x, params: forth(x, params, key_mask), x, params)
        return z, back(z)

    # Each device has parameters of its own, so that their gradients stay shares, which no one adds up.
    block = _cut(spec, axis=axis, devices=devices, own=True)
    own = {name: np.broadcast_to(a, (devices, *a.shape)) for name, a in params.items()}
    forward, total = (
        received(jit(work).lower(x, own, key_mask).compile().as_text(), devices) for work in (forth, both)
    )
    return forward, total - forward


def memory(_: int, spec: Spec, params: Params, x: Array, dz: Array, *, axis: int, devices: int) -> int:
    """Return the bytes that a compiled program takes on each device, its results among them."""
    block = _cut(spec, axis=axis, devices=devices)

    def work(x: Any, params: Any, dz: Any) -> Any:
        z, back = jax.vjp(lambda x, params: block(x, params, None)[0], x, params)
        return z, back(dz)

    sharding = jax.sharding.NamedSharding(_mesh(devices), _place(axis))
    cut = [jax.device_put(a, sharding) for a in (x, dz)]
    found: Any = jit(work).lower(cut[0], params, cut[1]).compile().memory_analysis()
    return int(found.temp_size_in_bytes + found.output_size_in_bytes)


def _cut(
    spec: Spec, *, axis: int, devices: int, training: bool = False, method: str = "auto", own: bool = False
) -> Callable[..., Any]:
    """Return a block on whole arrays that cuts them: z, and the running statistics that move.

    `own` takes and gives for each parameter one of each device.
    """
    names: Any = {"method": method, "axis_name": _NAME, "sharded_axis": axis - 1 if axis else None}

    def part(x: Any, params: Any, key_mask: Any) -> Any:
        params = {name: a[0] for name, a in params.items()} if own else params
        z, moved = nonlocal_block(x, params, spec, key_mask, training, **names), {}
        if training and spec.norm == "batch":
            moved = updated_statistics(x, params, spec, key_mask, **names)
        return z, moved

    def whole(x: Any, params: Any, key_mask: Any) -> Any:
        cuts = (_place(axis), _place(0) if own else _Cut(), _place(axis))
        return jax.shard_map(part, mesh=_mesh(devices), in_specs=cuts, out_specs=(_place(axis), _Cut()))(
            x, params, key_mask
        )

    return whole


def _mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), (_NAME,))


def _place(axis: int) -> PartitionSpec:
    return _Cut(*[None] * axis, _NAME)


def differentiable(dparams: Params) -> Params:
    """Return gradients without those of the running statistics, which have none."""
    return {name: d for name, d in dparams.items() if name not in STATISTICS}


def received(text: str, devices: int) -> float:
    """Return how many elements a device receives in a compiled program."""
    share = (devices - 1) / devices
    factors = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": devices * share}
    found = re.findall(r"= (.*?) ((?:all|collective|reduce-scatter|ragged)[a-z-]*)\(", text)
    return sum(factors[name] * _elements(shapes) for shapes, name in found)


def _elements(shapes: str) -> int:
    """Return how many elements arrays have, from their types in a program, such as `(f32[2,3]{1,0}, f32[])`."""
    return sum(math.prod(map(int, filter(None, sizes.split(",")))) for sizes in re.findall(r"\w\[([\d,]*)\]", shapes))

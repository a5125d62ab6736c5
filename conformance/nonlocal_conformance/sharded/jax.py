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
from nonlocal_conformance.registry import Unsupported
from nonlocal_core.spec.parameters import STATISTICS
from nonlocal_jax import nonlocal_block, updated_statistics

__all__ = [
    "differentiable",
    "everything",
    "jit",
    "process",
    "quick_options",
    "received",
    "sharded",
    "sharded_hvp",
    "sharded_memory",
    "traffic",
]

_DEVICES = 4
_NAME = "devices"
_Cut: Any = PartitionSpec  # which has no types


def sharded(
    spec: Spec,
    params: Params,
    x: Array,
    dz: Array,
    key_mask: Mask = None,
    *,
    axis: int,
    devices: int,
    training: bool = False,
    method: str = "auto",
) -> Everything:
    """Return z, the running statistics, and the gradients of x and of the parameters, of a cut input; all whole.

    Args:
        spec: the block.
        params: its parameters.
        x: `(B, S1..Sk, C)`.
        dz: the gradient of z.
        key_mask: `(B, S1..Sk)`, or None.
        axis: which axis of `x` the devices cut, 0 for the batch.
        devices: how many.
        training: whether batch normalisation takes its statistics from `x`.
        method: how the operation is computed.

    Raises:
        ValueError: if the block refuses the cut.
    """
    options = {"axis": axis, "devices": devices, "training": training, "method": method}
    return _do(everything, spec, params, x, dz, key_mask, **options)


def sharded_hvp(
    spec: Spec,
    params: Params,
    x: Array,
    dz: Array,
    vx: Array,
    vparams: Params,
    key_mask: Mask = None,
    *,
    axis: int,
    devices: int,
    training: bool = False,
    method: str = "auto",
) -> tuple[Array, Params]:
    """Return the gradients of <gradients, v>, reverse over reverse, of a cut input."""
    options = {"axis": axis, "devices": devices, "training": training, "method": method}
    return _do(_second, spec, params, x, dz, vx, vparams, key_mask, **options)


def traffic(
    spec: Spec, params: Params, x: Array, key_mask: Mask = None, *, axis: int, devices: int
) -> tuple[float, float]:
    """Return how many elements a device receives, forward and backward, without what adds up parameters' gradients."""
    return _do(_traffic, spec, params, x, key_mask, axis=axis, devices=devices)


def sharded_memory(spec: Spec, params: Params, x: Array, dz: Array, *, axis: int, devices: int) -> int:
    """Return the peak bytes that a device needs, forward and backward, beside its parameters, `x` and `dz`."""
    return _do(_memory, spec, params, x, dz, axis=axis, devices=devices)


@functools.cache
def quick_options() -> dict[str, Any] | None:
    """Return options with which XLA compiles small programs several times faster, None where it lacks them."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda a: a, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return None
    return options


def jit(function: Callable[..., Any]) -> Any:
    """Return a function that JAX compiles quickly."""
    return jax.jit(function, compiler_options=quick_options())


@functools.cache
def process() -> Processes:
    """Return the process that has the devices."""
    one = Processes(1, __name__)
    one(_start)
    return one


def _do(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what a function gives in the process, which is started anew where it had to be ended."""
    if process().is_closed:
        process.cache_clear()
    return process()(work, *arguments, **options)[0]


def _start(_: int) -> None:
    settings: Any = jax.config  # whose methods have no types
    settings.update("jax_platforms", "cpu")
    settings.update("jax_num_cpu_devices", _DEVICES)


def everything(_: int, spec: Spec, params: Params, x: Array, dz: Array, key_mask: Mask, **options: Any) -> Everything:
    """Do in the process what `sharded` says."""
    block = _cut(spec, **options)

    def work(x: Any, params: Any, dz: Any, key_mask: Any) -> Any:
        z, back, moved = jax.vjp(lambda x, params: block(x, params, key_mask), x, params, has_aux=True)
        return z, moved, *back(dz)

    with jax.enable_x64(x.dtype == np.float64):
        z, moved, dx, dparams = jax.tree.map(np.array, jit(work)(x, params, dz, key_mask))
    return z, {name: params[name] for name in STATISTICS if name in params} | moved, dx, differentiable(dparams)


def _second(
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
    block = _cut(spec, **options)

    def slope(x: Any, params: Any, dz: Any, vx: Any, vparams: Any, key_mask: Any) -> Any:
        dx, dparams = jax.vjp(lambda x, params: block(x, params, key_mask)[0], x, params)[1](dz)
        return jnp.vdot(dx, vx) + sum(jnp.vdot(dparams[name], v) for name, v in vparams.items())

    with jax.enable_x64(x.dtype == np.float64):
        found = jit(jax.grad(slope, argnums=(0, 1)))(x, params, dz, vx, vparams, key_mask)
        dx, dparams = jax.tree.map(np.array, found)
    return dx, differentiable(dparams)


def _traffic(
    _: int, spec: Spec, params: Params, x: Array, key_mask: Mask, *, axis: int, devices: int
) -> tuple[float, float]:
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


def _memory(_: int, spec: Spec, params: Params, x: Array, dz: Array, *, axis: int, devices: int) -> int:
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
        if x.shape[axis] % devices:
            message = f"a map cuts into equal pieces, not {x.shape[axis]} into {devices}"
            raise Unsupported(message)
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

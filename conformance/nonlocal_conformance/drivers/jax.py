"""The driver of the JAX adapter."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nonlocal_conformance.capabilities import BACKENDS, DEVICES
from nonlocal_conformance.driver import Array, Everything, Mask, Network, Params, Session, Spec, dtype_of
from nonlocal_conformance.memory import peak_resident
from nonlocal_conformance.networks.jax import JaxNetwork
from nonlocal_conformance.sharded import jax as cut
from nonlocal_core.planning import METHODS
from nonlocal_core.spec.parameters import STATISTICS
from nonlocal_jax import NonLocalBlock, nonlocal_block, nonlocal_op

__all__ = ["JaxDriver"]

T = TypeVar("T")
Options = tuple[tuple[str, Any], ...]

_KEPT = 300
"""How many calls keep what they compiled: each maps memory, and Linux allows a process 65,530 maps."""

_AMPERE = 8.0
"""From which compute capability on a GPU of NVIDIA multiplies in TF32."""


class JaxDriver:
    """`nonlocal_jax` on one device, every call compiled: op by op, hundreds of cases would take far longer."""

    name = "jax"
    version = jax.__version__
    dtypes = ("float64", "float32")
    methods = METHODS
    mixed_dtypes: tuple[str, ...] = ("bfloat16", "float16")
    capabilities = BACKENDS["jax"]
    unbiased = False

    def __init__(self, device: str = "cpu") -> None:
        """Take the device, which must be there."""
        try:
            self._device = jax.devices(device)[0]
        except RuntimeError as error:
            message = f"`device` must be one that JAX finds on this machine. Got {device!r}."
            raise ValueError(message) from error
        self.device, self._calls = device, 0
        self._plans: list[Any] | None = None
        self._options = cut.quick_options() if self._device.platform == "cpu" else None
        if self._device.platform != "cpu":  # several devices are virtual ones
            self.capabilities = self.capabilities - DEVICES
            if float(getattr(self._device, "compute_capability", None) or 0) >= _AMPERE:
                self.mixed_dtypes = (*self.mixed_dtypes, "tensorfloat32")
        # Nobody reads where in the code a compiled operation came from, and finding it takes a tenth of a run.
        jax.config.update("jax_traceback_in_locations_limit", 0)  # type: ignore[no-untyped-call]
        self._call = self._jit(_call, "graph")
        self._session_vjp = self._jit(_session_vjp, "graph")
        self._vjp = self._jit(_vjp, "spec", "training", "method")
        self._hvp = self._jit(_hvp, "spec", "training", "method")
        self._step = self._jit(_step, "graph")
        self._op = self._jit(_op, "options")
        self._op_vjp = self._jit(_op_vjp, "options")

    def block(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> tuple[Array, Params]:
        """Return the output of a block and its running statistics after the call."""
        return self.session(spec, params, method=method).call(x, key_mask, training=training)

    def steps(
        self, spec: Spec, params: Params, inputs: Sequence[Array], *, training: bool = False
    ) -> list[tuple[Array, Params]]:
        """Call one block on each input in turn."""
        session = self.session(spec, params)
        return [session.call(x, training=training) for x in inputs]

    def vjp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> tuple[Array, Params]:
        """Return the gradients of the input and of the parameters."""
        with self._scope(x, key_mask, *params.values()):
            return _gradients(self._vjp(x, params, dz, key_mask, spec=spec, training=training, method=method))

    def session(self, spec: Spec, params: Params, *, method: str = "auto") -> Session:
        """Return a block."""
        with self._scope(*params.values()):
            return _Session(_block(spec, params, method=method), self._scope, self._run, self._session_vjp)

    def hvp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        vx: Array,
        vparams: Params,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> tuple[Array, Params]:
        """Return the gradients of <gradients, v>, reverse over reverse."""
        with self._scope(x, key_mask):
            return _gradients(
                self._hvp(x, params, dz, vx, vparams, key_mask, spec=spec, training=training, method=method)
            )

    def train(
        self, spec: Spec, params: Params, x: Array, target: Array, key_mask: Mask = None, *, steps: int, rate: float
    ) -> tuple[list[float], Params]:
        """Return the losses, mean squares of z - target, and the parameters of plain SGD in training mode."""
        with self._scope(x, key_mask):
            block = _block(spec, params, training=True)
            graph, state = nnx.split((block, nnx.Optimizer(block, optax.sgd(rate), wrt=nnx.Param)))
            losses = []
            for _ in range(steps):
                loss, state = self._step(state, x, target, key_mask, graph=graph)
                losses.append(float(loss))
            return losses, nnx.merge(graph, state)[0].export_params()

    def op(self, theta: Array, phi: Array, g: Array, **options: Any) -> Array:
        """Return the operation alone."""
        arrays, static = _divided({"theta": theta, "phi": phi, "g": g, **options})
        with self._scope(*arrays.values()):
            return np.array(self._op(arrays, options=static))

    def op_vjp(self, theta: Array, phi: Array, g: Array, dy: Array, **options: Any) -> Params:
        """Return the gradients of the operation alone."""
        arrays, static = _divided({"theta": theta, "phi": phi, "g": g, **options})
        key_mask = arrays.pop("key_mask", None)
        with self._scope(*arrays.values()):
            return {name: np.array(d) for name, d in self._op_vjp(arrays, key_mask, dy, options=static).items()}

    def attention(self, spec: Spec, params: Params, x: Array, positions: Any = None, key_mask: Mask = None) -> Array:
        """Return rows of the weights."""
        return self._rows(spec, params, x, positions, key_mask)

    def mixed_attention(self, spec: Spec, params: Params, x: Array, dtype: str, key_mask: Mask = None) -> Array:
        """Return rows of the weights of a block with another compute dtype."""
        with _mixed(dtype) as options:
            return self._rows(spec, params, x, None, key_mask, **options)

    def _rows(self, spec: Spec, params: Params, x: Array, positions: Any, key_mask: Mask, **options: Any) -> Array:
        with self._scope(x, key_mask, *params.values()):
            return self._rows_of(_block(spec, params, **options), x, positions, key_mask)

    def _rows_of(self, block: NonLocalBlock, x: Array, positions: Any, key_mask: Mask) -> Array:
        graph, state = nnx.split(block)
        rows = self._jit(lambda state, *args: nnx.merge(graph, state).attention(args[0], positions, args[1]))
        return np.array(rows(state, x, key_mask))

    def export(self, spec: Spec, params: Params) -> Params:
        """Take parameters in and give them out again."""
        with self._scope(*params.values()):
            return _block(spec, params).export_params()

    def create(self, **options: Any) -> Spec:
        """Return the spec of a block with these options."""
        return NonLocalBlock(**options, rngs=nnx.Rngs(0)).spec

    def rebuilt(self, spec: Spec) -> Spec:
        """Return the spec of a block that was taken apart into graph and state, and put together."""
        block = nnx.eval_shape(lambda: NonLocalBlock.from_spec(spec, rngs=nnx.Rngs(0)))
        return nnx.merge(*nnx.split(block)).spec

    def initial(self, spec: Spec, seed: int = 0) -> Params:
        """Return the parameters of a new block."""
        with self._scope():
            return NonLocalBlock.from_spec(spec, rngs=nnx.Rngs(seed)).export_params()

    def compiled(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> Array:
        """Return the output of the pure function, compiled as JAX does by default."""
        with self._scope(x, key_mask):
            call = jax.jit(nonlocal_block, static_argnames=("spec", "training", "method"))
            return np.array(call(x, params, spec, key_mask, training, method=method))

    def compiled_vjp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> Everything:
        """Return the output and the gradients of a block, compiled together as JAX does by default."""
        with self._scope(*params.values()):
            block = _block(spec, params, method=method)
        compiled = jax.jit(_session_vjp, static_argnames="graph")
        session = _Session(block, self._scope, self._run, compiled)
        return session.gradients(x, dz, key_mask, training=training)

    def mixed_vjp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        dtype: str,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> Everything:
        """Return the output and the gradients of a block with another compute dtype."""
        with _mixed(dtype) as options:
            with self._scope(*params.values()):
                block = _block(spec, params, method=method, **options)
            session = _Session(block, self._scope, self._run, self._session_vjp)
            return session.gradients(x, dz, key_mask, training=training)

    def mixed(
        self, spec: Spec, params: Params, x: Array, dtype: str, key_mask: Mask = None, *, method: str = "auto"
    ) -> Array:
        """Return the output of a block with another compute dtype."""
        with _mixed(dtype) as options, self._scope(x, key_mask):
            return self._run(_block(spec, params, method=method, **options), x, key_mask)

    def replaced(
        self, spec: Spec, params: Params, x: Array, dz: Array, layer: str, key_mask: Mask = None
    ) -> tuple[Array, tuple[Array, Params], Array, Callable[[], Params]]:
        """Return what a block with a doubled layer gives."""
        with self._scope(x, key_mask):
            block = _block(spec, params)
            old = getattr(block, layer)
            sizes = old.in_features, old.out_features
            doubled = nnx.eval_shape(lambda: _Doubled(*sizes, use_bias=old.use_bias, rngs=nnx.Rngs(0)))
            doubled.kernel, doubled.bias = old.kernel, old.bias
            setattr(block, layer, doubled)
            graph, *states = nnx.split(block, nnx.Param, ...)
            z, (dparams, dx), _ = self._session_vjp(*states, x, dz, key_mask, graph=graph)
            rows = self._rows_of(block, x, None, key_mask)
            return np.array(z), _gradients((dx, _named(dparams))), rows, block.export_params

    def sharded(
        self,
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
        """Return what the pure function gives inside `jax.shard_map`, in a process with virtual devices."""
        options: dict[str, Any] = {"axis": axis, "devices": devices, "training": training, "method": method}
        return cut.process()(cut.sharded, spec, params, x, dz, key_mask, **options)[0]

    def sharded_hvp(
        self,
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
        """Return the gradients of <gradients, v> inside `jax.shard_map`."""
        options: dict[str, Any] = {"axis": axis, "devices": devices, "training": training, "method": method}
        return cut.process()(cut.second_derivatives, spec, params, x, dz, vx, vparams, key_mask, **options)[0]

    def traffic(
        self, spec: Spec, params: Params, x: Array, key_mask: Mask = None, *, axis: int, devices: int
    ) -> tuple[float, float]:
        """Return how many numbers a device receives."""
        return cut.process()(cut.traffic, spec, params, x, key_mask, axis=axis, devices=devices)[0]

    def sharded_memory(self, spec: Spec, params: Params, x: Array, dz: Array, *, axis: int, devices: int) -> int:
        """Return the bytes that a device needs."""
        return cut.process()(cut.memory, spec, params, x, dz, axis=axis, devices=devices)[0]

    def network(self, layers: Params, shape: tuple[int, ...]) -> Network:  # noqa: ARG002 - the layers take any
        """Return a network of linear layers."""
        return JaxNetwork(layers, self._scope)

    def peak_memory(self, call: Callable[[], T]) -> tuple[T, int | None]:
        """Return the result of a call and its peak extra memory in bytes."""
        return peak_resident(call) if self._device.platform == "cpu" else self.planned_memory(call)

    def planned_memory(self, call: Callable[[], T]) -> tuple[T, int | None]:
        """Return the same as the compiler planned it: no device tells the peak of a span of time."""
        plans: list[Any] = []
        self._plans = plans
        try:
            return call(), max((plan.temp_size_in_bytes + plan.output_size_in_bytes for plan in plans), default=None)
        finally:
            self._plans = None

    def _run(self, block: NonLocalBlock, x: Array, key_mask: Mask = None) -> Array:
        """Call a block, which afterwards has the statistics that the call left."""
        graph, state = nnx.split(block)
        z, state = self._call(state, x, key_mask, graph=graph)
        nnx.update(block, state)
        return np.array(z)

    def _jit(self, function: Callable[..., Any], *static: str) -> Callable[..., Any]:
        compiled = jax.jit(function, static_argnames=static, compiler_options=self._options)

        def call(*args: Any, **options: Any) -> Any:
            if self._plans is not None:
                self._plans.append(compiled.lower(*args, **options).compile().memory_analysis())
            return compiled(*args, **options)

        return call

    @contextlib.contextmanager
    def _scope(self, *arrays: Any) -> Iterator[None]:
        """Compute on the device, in 64 bits if an array has them."""
        wide = any(getattr(a, "dtype", np.dtype(bool)).itemsize == 8 for a in arrays)  # noqa: PLR2004 - bytes
        with jax.default_device(self._device), jax.enable_x64(wide):
            yield
        self._calls += 1
        if self._calls % _KEPT == 0:
            jax.clear_caches()  # type: ignore[no-untyped-call]


class _Session:
    """A block."""

    def __init__(self, block: NonLocalBlock, *functions: Callable[..., Any]) -> None:
        self._block, self._functions = block, functions
        self._in_scope, self._run, self._differentiate = functions
        self._frozen: Collection[str] = ()

    def call(self, x: Array, key_mask: Mask = None, *, training: bool = False) -> tuple[Array, Params]:
        """Return z and the running statistics."""
        with self._scope(x):
            self._block.set_attributes(use_running_average=not training)
            return self._run(self._block, x, key_mask), _statistics(self._block)

    def gradients(self, x: Array, dz: Array, key_mask: Mask = None, *, training: bool = False) -> Everything:
        """Return the gradients of the input and of the parameters that are not frozen."""
        with self._scope(x):
            self._block.set_attributes(use_running_average=not training)
            graph, *states = nnx.split(self._block, self._is_wanted, ...)
            z, (dwanted, dx), state = self._differentiate(*states, x, dz, key_mask, graph=graph)
            nnx.update(self._block, state)
            return np.array(z), _statistics(self._block), *_gradients((dx, _named(dwanted)))

    def load(self, params: Params) -> None:
        """Take parameters in."""
        with self._scope():
            self._block.import_params(params)

    def params(self) -> Params:
        """Give the parameters out."""
        return self._block.export_params()

    def freeze(self, names: Collection[str]) -> None:
        """Leave these parameters out of what is differentiated."""
        self._frozen = names

    def copies(self) -> dict[str, Session]:
        """Return what nnx, copy and pickle make of the block."""
        with self._scope():
            pickled = pickle.loads(pickle.dumps(self._block))  # noqa: S301 - our own bytes
            found = {"clone": nnx.clone(self._block), "deepcopy": copy.deepcopy(self._block), "pickle": pickled}
        return {name: _Session(block, *self._functions) for name, block in found.items()}

    def _is_wanted(self, path: Any, value: Any) -> bool:
        return isinstance(value, nnx.Param) and _name(path) not in self._frozen

    def _scope(self, *arrays: Array) -> contextlib.AbstractContextManager[None]:
        """Compute on the device, in 64 bits if the input or a parameter has them."""
        return self._in_scope(*arrays, *jax.tree.leaves(nnx.state(self._block)))


def _call(state: Any, x: Any, key_mask: Any, *, graph: Any) -> tuple[jax.Array, Any]:
    block = nnx.merge(graph, state)
    return block(x, key_mask), nnx.state(block)


class _Doubled(nnx.Linear):
    """A linear layer that gives twice as much."""

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Return 2 (W a + b)."""
        return 2 * super().__call__(inputs, *args, **options)


def _session_vjp(wanted: Any, rest: Any, x: Any, dz: Any, key_mask: Any, *, graph: Any) -> Any:
    def function(wanted: Any, x: Any) -> tuple[jax.Array, Any]:
        block = nnx.merge(graph, wanted, jax.tree.map(lambda a: a, rest))  # its own variables, which it may move
        return block(x, key_mask), nnx.state(block)

    z, back, state = jax.vjp(function, wanted, x, has_aux=True)
    return z, back(dz), state


def _vjp(x: Any, params: Any, dz: Any, key_mask: Any, *, spec: Spec, training: bool, method: str) -> Any:
    def function(x: Any, params: Any) -> jax.Array:
        return nonlocal_block(x, params, spec, key_mask, training, method=method)

    return jax.vjp(function, x, params)[1](dz)


def _hvp(
    x: Any,
    params: Any,
    dz: Any,
    vx: Any,
    vparams: Any,
    key_mask: Any,
    *,
    spec: Spec,
    training: bool,
    method: str,
) -> Any:
    def slope(x: Any, params: Any) -> jax.Array:
        dx, dparams = _vjp(x, params, dz, key_mask, spec=spec, training=training, method=method)
        return jnp.vdot(dx, vx) + sum(jnp.vdot(dparams[name], v) for name, v in vparams.items())

    return jax.grad(slope, argnums=(0, 1))(x, params)


def _step(state: Any, x: Any, target: Any, key_mask: Any, *, graph: Any) -> tuple[jax.Array, Any]:
    block, optimizer = nnx.merge(graph, state)

    def loss_of(block: NonLocalBlock) -> jax.Array:
        return jnp.mean(optax.squared_error(block(x, key_mask), target))

    loss, gradients = nnx.value_and_grad(loss_of)(block)
    optimizer.update(block, gradients)
    return loss, nnx.state((block, optimizer))


def _op(arrays: Any, *, options: Options) -> jax.Array:
    return nonlocal_op(**arrays, **dict(options))


def _op_vjp(arrays: Params, key_mask: Any, dy: Any, *, options: Options) -> Any:
    return jax.vjp(lambda arrays: _op({**arrays, "key_mask": key_mask}, options=options), arrays)[1](dy)[0]


def _block(spec: Spec, params: Params, *, training: bool = False, **options: Any) -> NonLocalBlock:
    """Return a block with these parameters, in their dtype."""
    block = nnx.clone(_new_block(spec, np.dtype(dtype_of(params)), tuple(options.items())))
    block.import_params(params)
    block.set_attributes(use_running_average=not training)
    return block


@functools.lru_cache(maxsize=32)
def _new_block(spec: Spec, param_dtype: Any, options: Options) -> NonLocalBlock:
    """Return a block of zeros to copy: JAX would compile what draws its parameters, op by op."""
    shapes = nnx.eval_shape(
        lambda: NonLocalBlock.from_spec(spec, rngs=nnx.Rngs(0), param_dtype=param_dtype, **dict(options))
    )
    graph, state = nnx.split(shapes)
    return nnx.merge(graph, jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype)), state))


@contextlib.contextmanager
def _mixed(dtype: str) -> Iterator[dict[str, Any]]:
    """Let products have operands in `dtype`, by the options of a block that are given."""
    if dtype != "tensorfloat32":
        yield {"dtype": jnp.dtype(dtype)}
        return
    with jax.default_matmul_precision(dtype):
        yield {}


def _divided(arguments: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """Return the arrays among arguments, and the others in a form that can be static."""
    arrays = {name: a for name, a in arguments.items() if isinstance(a, np.ndarray | list)}
    return arrays, tuple((name, a) for name, a in arguments.items() if name not in arrays)


def _gradients(gradients: tuple[Any, dict[str, Any]]) -> tuple[Array, Params]:
    dx, dparams = gradients
    return np.array(dx), {name: np.array(d) for name, d in dparams.items() if name not in STATISTICS}


def _name(path: Any) -> str:
    """Return the canonical name of what stands at a place of a block."""
    return ".".join(map(str, path)).replace("kernel", "weight")


def _named(gradients: Any) -> Params:
    """Return gradients of a block under their canonical names; kernels are transposed weights."""
    return {_name(path): np.array(d[...]).T for path, d in nnx.to_flat_state(gradients)}


def _statistics(block: NonLocalBlock) -> Params:
    if block.spec.norm != "batch":
        return {}
    return {name: np.array(block.norm[name.partition(".")[2]][...]) for name in STATISTICS}

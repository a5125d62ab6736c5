"""The driver of the PyTorch adapter."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional

from nonlocal_conformance.capabilities import BACKENDS, DEVICES
from nonlocal_conformance.driver import Array, Everything, Mask, Network, Params, Session, Spec, dtype_of
from nonlocal_conformance.memory import peak_resident
from nonlocal_conformance.networks.torch import TorchNetwork
from nonlocal_core.planning import METHODS
from nonlocal_core.spec.parameters import STATISTICS, param_shapes
from nonlocal_torch import NonLocalBlock, nonlocal_op

__all__ = ["TorchDriver"]

T = TypeVar("T")


class TorchDriver:
    """`nonlocal_torch` on one device."""

    name = "torch"
    version = torch.__version__
    dtypes = ("float64", "float32")
    methods = METHODS
    mixed_dtypes: tuple[str, ...] = ("bfloat16", "float16")
    capabilities = BACKENDS["torch"]
    unbiased = True

    def __init__(self, device: str = "cpu") -> None:
        """Take the device, which must be there."""
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            message = f"`device` must be one that PyTorch finds on this machine. Got {device!r}."
            raise ValueError(message) from error
        self.device = device
        # Inductor needs a C++ compiler on a CPU; without one the graph is traced and run as it is.
        self.compiler = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
        self.notes = f"compiled by {self.compiler}"
        if torch.device(device).type == "cuda":
            self.notes += f", float32 products of precision {torch.get_float32_matmul_precision()!r}"
            if torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0):
                self.mixed_dtypes = (*self.mixed_dtypes, "tensorfloat32")
        if not distributed.is_available() or torch.device(device).type != "cpu":
            self.capabilities = self.capabilities - DEVICES

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
        return self.session(spec, params, method=method).gradients(x, dz, key_mask, training=training)[2:]

    def session(self, spec: Spec, params: Params, *, method: str = "auto") -> Session:
        """Return a block."""
        return _Session(self._block(spec, params, method=method), self._input, self._mask)

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
        block = self._block(spec, params, training=training, method=method)
        given = self._input(x).requires_grad_()
        names, tensors = zip(*block.named_parameters(), strict=True)
        every = (given, *tensors)
        z = block(given, self._mask(key_mask))
        first = torch.autograd.grad(z, every, self._input(dz), create_graph=True)
        directions = (
            self._input(vx),
            *(self._tensor(vparams[n]).reshape(p.shape) for n, p in zip(names, tensors, strict=True)),
        )
        product = torch.stack([(d * v).sum() for d, v in zip(first, directions, strict=True)]).sum()
        second = torch.autograd.grad(product, every, allow_unused=True, materialize_grads=True)
        return _output(second[0]), _gradients(block, dict(zip(names, second[1:], strict=True)))

    def train(
        self, spec: Spec, params: Params, x: Array, target: Array, key_mask: Mask = None, *, steps: int, rate: float
    ) -> tuple[list[float], Params]:
        """Return the losses, mean squares of z - target, and the parameters of plain SGD in training mode."""
        block = self._block(spec, params, training=True)
        optimizer, losses = torch.optim.SGD(block.parameters(), lr=rate), []
        for _ in range(steps):
            loss = functional.mse_loss(block(self._input(x), self._mask(key_mask)), self._input(target))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses, block.export_params()

    def op(self, theta: Array, phi: Array, g: Array, **options: Any) -> Array:
        """Return the operation alone."""
        arrays: dict[str, Any] = {"theta": self._tensor(theta), "phi": self._tensor(phi), "g": self._tensor(g)}
        return _numpy(nonlocal_op(**arrays, **self._options(options)))

    def op_vjp(self, theta: Array, phi: Array, g: Array, dy: Array, **options: Any) -> Params:
        """Return the gradients of the operation alone."""
        tensors = {"theta": theta, "phi": phi, "g": g}
        tensors |= {name: options.pop(name) for name in ("concat_weight", "concat_bias") if name in options}
        leaves: dict[str, Any] = {name: self._tensor(a).requires_grad_() for name, a in tensors.items()}
        torch.autograd.backward(nonlocal_op(**leaves, **self._options(options)), self._tensor(dy))
        return {name: _numpy(leaf.grad) for name, leaf in leaves.items()}

    def attention(self, spec: Spec, params: Params, x: Array, positions: Any = None, key_mask: Mask = None) -> Array:
        """Return rows of the weights."""
        block = self._block(spec, params)
        return _numpy(block.attention(self._input(x), positions, self._mask(key_mask)))

    def export(self, spec: Spec, params: Params) -> Params:
        """Take parameters in and give them out again."""
        return self._block(spec, params).export_params()

    def create(self, **options: Any) -> Spec:
        """Return the spec of a block with these options."""
        return NonLocalBlock(**options).spec

    def rebuilt(self, spec: Spec) -> Spec:
        """Return the spec of a block that was pickled."""
        block: NonLocalBlock = pickle.loads(pickle.dumps(NonLocalBlock.from_spec(spec)))  # noqa: S301 - our own bytes
        return block.spec

    def initial(self, spec: Spec, seed: int = 0) -> Params:
        """Return the parameters of a new block."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return NonLocalBlock.from_spec(spec, device=self.device).export_params()

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
        """Return the output of a block compiled as one graph."""
        torch.compiler.reset()
        block = torch.compile(
            self._block(spec, params, training=training, method=method),
            fullgraph=True,
            backend=self.compiler,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own imports
            return _output(block(self._input(x), self._mask(key_mask)).detach())

    def mixed(
        self, spec: Spec, params: Params, x: Array, dtype: str, key_mask: Mask = None, *, method: str = "auto"
    ) -> Array:
        """Return the output under autocast."""
        block = self._block(spec, params, method=method)
        with torch.no_grad(), self._mixed(dtype):
            return _output(block(self._input(x), self._mask(key_mask)))

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
        """Return the output and the gradients of a block of which both graphs are traced whole.

        On a CPU they are run as they are: Inductor would take half a minute for each.
        """
        torch.compiler.reset()
        block = self._block(spec, params, method=method)
        on_cpu = torch.device(self.device).type == "cpu"
        block.compile(fullgraph=True, backend="aot_eager" if on_cpu else self.compiler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own imports
            return _Session(block, self._input, self._mask).gradients(x, dz, key_mask, training=training)

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
        """Return the output and the gradients of a call under autocast."""
        session = self.session(spec, params, method=method)
        with self._mixed(dtype):
            return session.gradients(x, dz, key_mask, training=training)

    def mixed_attention(self, spec: Spec, params: Params, x: Array, dtype: str, key_mask: Mask = None) -> Array:
        """Return rows of the weights under autocast."""
        with self._mixed(dtype):
            return self.attention(spec, params, x, None, key_mask)

    def layouts(
        self, spec: Spec, params: Params, x: Array, dz: Array, key_mask: Mask = None
    ) -> dict[str, tuple[Array, Array, bool]]:
        """Return the output and dx for each memory layout of the input or the mask, and whether z has that of x."""
        block, mask = self._block(spec, params), self._mask(key_mask)
        plain = self._input(x)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
        layouts = {
            "contiguous": plain,
            "channels last": self._tensor(x).movedim(-1, 1),  # the memory of the array
            "transposed": plain.mT.contiguous().mT,
            "sliced": torch.stack([plain, plain], dim=-1)[..., 0],
        }
        calls = {f"{name} input": (tensor, mask) for name, tensor in layouts.items()}
        if mask is not None:
            calls["input with a transposed mask"] = plain, mask.mT.contiguous().mT
            calls["input with a sliced mask"] = plain, torch.stack([mask, ~mask], dim=-1)[..., 0]
        results = {}
        for name, (tensor, valid) in calls.items():
            given = tensor.detach().requires_grad_()
            z = block(given, valid)
            (dx,) = torch.autograd.grad(z, given, self._input(dz))
            wanted = last if name == "channels last input" else torch.contiguous_format
            is_regular = tensor.is_contiguous(memory_format=wanted)
            kept = not is_regular or z.is_contiguous(memory_format=wanted)
            results[name] = _output(z), _output(dx), kept
        return results

    def replaced(
        self, spec: Spec, params: Params, x: Array, dz: Array, layer: str, key_mask: Mask = None
    ) -> tuple[Array, tuple[Array, Params], Array, Callable[[], Params]]:
        """Return what a block with a doubled layer gives."""
        block = self._block(spec, params)
        old: Any = block.get_submodule(layer)
        doubled = _Doubled(old.in_features, old.out_features, old.bias is not None, self.device, old.weight.dtype)
        doubled.load_state_dict(old.state_dict())
        setattr(block, layer, doubled)
        z, _, dx, dparams = _Session(block, self._input, self._mask).gradients(x, dz, key_mask)
        rows = block.attention(self._input(x), None, self._mask(key_mask))
        return z, (dx, dparams), _numpy(rows), block.export_params

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
        """Return what a block gives on a DTensor, in processes of one thread on the CPU."""
        from nonlocal_conformance.sharded import torch as cut

        arguments = (spec, params, x, dz, key_mask)
        return cut.processes(devices)(cut.sharded, (devices,), (axis,), *arguments, training=training, method=method)[0]

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
        """Return the gradients of <gradients, v> on a DTensor."""
        from nonlocal_conformance.sharded import torch as cut

        arguments = (spec, params, x, dz, vx, vparams, key_mask)
        return cut.processes(devices)(
            cut.second_derivatives, (devices,), (axis,), *arguments, training=training, method=method
        )[0]

    def traffic(
        self, spec: Spec, params: Params, x: Array, key_mask: Mask = None, *, axis: int, devices: int
    ) -> tuple[float, float]:
        """Return how many numbers a process receives, the most that one does."""
        from nonlocal_conformance.sharded import torch as cut

        found = cut.processes(devices)(cut.traffic, (devices,), (axis,), spec, params, x, key_mask)
        return max(forth for (forth, _), _ in found), max(back for _, (back, _) in found)

    def sharded_memory(self, spec: Spec, params: Params, x: Array, dz: Array, *, axis: int, devices: int) -> int:
        """Return the peak bytes of a process, the most that one takes."""
        from nonlocal_conformance.sharded import torch as cut

        return max(cut.processes(devices)(cut.memory, (devices,), (axis,), spec, params, x, dz))

    def network(self, layers: Params, shape: tuple[int, ...]) -> Network:  # noqa: ARG002 - the layers take any
        """Return a network of linear layers."""
        return TorchNetwork({name: self._tensor(weight) for name, weight in layers.items()}, self._input)

    def peak_memory(self, call: Callable[[], T]) -> tuple[T, int | None]:
        """Return the result of a call and its peak extra memory in bytes."""
        if torch.device(self.device).type != "cuda":
            return peak_resident(call)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        torch.cuda.synchronize(self.device)
        return result, torch.cuda.max_memory_allocated(self.device) - before

    def _block(self, spec: Spec, params: Params, *, training: bool = False, method: str = "auto") -> NonLocalBlock:
        dtype = getattr(torch, dtype_of(params))
        block = NonLocalBlock.from_spec(spec, method=method, device=self.device, dtype=dtype)
        block.import_params(params)
        return block.train(training)

    @contextmanager
    def _mixed(self, dtype: str) -> Iterator[None]:
        """Let products have operands in `dtype`."""
        if dtype != "tensorfloat32":
            with torch.autocast(torch.device(self.device).type, getattr(torch, dtype)):
                yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _tensor(self, a: Array) -> torch.Tensor:
        """Return a tensor, which on a CPU shares the memory of the array."""
        if np.dtype(a.dtype).name == "bfloat16":
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(a).to(self.device)

    def _input(self, a: Array) -> torch.Tensor:
        """Return an input with channels first, contiguous as PyTorch's usually are."""
        return self._tensor(a).movedim(-1, 1).contiguous() if a.ndim > 1 else self._tensor(a)

    def _mask(self, key_mask: Mask) -> torch.Tensor | None:
        return None if key_mask is None else self._tensor(key_mask)

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {name: self._tensor(a) if isinstance(a, np.ndarray) else a for name, a in options.items()}


class _Session:
    """A block."""

    def __init__(self, block: NonLocalBlock, to_input: Callable[..., Any], to_mask: Callable[..., Any]) -> None:
        self._block, self._input, self._mask = block, to_input, to_mask

    def call(self, x: Array, key_mask: Mask = None, *, training: bool = False) -> tuple[Array, Params]:
        """Return z and the running statistics."""
        self._block.train(training)
        with torch.no_grad():
            z = self._block(self._input(x), self._mask(key_mask))
        return _output(z), _statistics(self._block)

    def gradients(self, x: Array, dz: Array, key_mask: Mask = None, *, training: bool = False) -> Everything:
        """Return the gradients of the input and of the parameters that have one."""
        block, given = self._block.train(training), self._input(x).requires_grad_()
        leaves = {name: p for name, p in block.named_parameters() if p.requires_grad}
        z = block(given, self._mask(key_mask))
        dx, *found = torch.autograd.grad(z, (given, *leaves.values()), self._input(dz), allow_unused=True)
        return _output(z), _statistics(block), _output(dx), _gradients(block, dict(zip(leaves, found, strict=True)))

    def load(self, params: Params) -> None:
        """Take parameters in."""
        self._block.import_params(params)

    def params(self) -> Params:
        """Give the parameters out."""
        return self._block.export_params()

    def freeze(self, names: Collection[str]) -> None:
        """Let parameters require no gradient."""
        for name, parameter in self._block.named_parameters():
            parameter.requires_grad_(name not in names)

    def copies(self) -> dict[str, Session]:
        """Return what copy and pickle make of the block."""
        pickled: NonLocalBlock = pickle.loads(pickle.dumps(self._block))  # noqa: S301 - our own bytes
        found = {"deepcopy": copy.deepcopy(self._block), "pickle": pickled}
        return {name: _Session(block, self._input, self._mask) for name, block in found.items()}


class _Doubled(nn.Linear):
    """A linear layer that gives twice as much."""

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Return 2 (W a + b)."""
        return 2 * super().forward(a)


def _output(z: torch.Tensor | None) -> Array:
    return np.moveaxis(_numpy(z), 1, -1)


def _numpy(a: torch.Tensor | None) -> Array:
    """Return a tensor as an array; a gradient that never came is an array of nothing, which no check accepts."""
    if a is None:
        return np.array(None)
    a = a.detach().cpu()
    if a.dtype == torch.bfloat16:
        import ml_dtypes

        return a.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return a.numpy()


def _gradients(block: NonLocalBlock, gradients: Mapping[str, torch.Tensor | None]) -> Params:
    """Return gradients of the parameters of a block as arrays in their canonical shapes."""
    shapes, found = param_shapes(block.spec), {name: _numpy(gradient) for name, gradient in gradients.items()}
    return {name: a.reshape(shapes[name]) if a.dtype != object else a for name, a in found.items()}


def _statistics(block: NonLocalBlock) -> Params:
    params = block.export_params()
    return {name: params[name] for name in STATISTICS if name in params}

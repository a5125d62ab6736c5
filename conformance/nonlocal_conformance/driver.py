"""What the suite asks of an implementation: a driver, a class whose methods take and return NumPy arrays.

Arrays are channels last, `(B, S1..Sk, C)`, and parameters have their canonical names (`nonlocal_core.param_shapes`).
Every driver has what `Driver` has. It has what another protocol has if it names the capability, which is that of the
method. It raises `nonlocal_conformance.registry.Unsupported` for a spec that its implementation cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol, TypeVar

import numpy as np

from nonlocal_core import AttentionMap, NonLocalSpec
from nonlocal_core.networks.insertion import Insertion

__all__ = [
    "Array",
    "Attention",
    "Compiled",
    "CompiledGradients",
    "Create",
    "Driver",
    "Everything",
    "Export",
    "Gradients",
    "Initial",
    "Layouts",
    "Mask",
    "Memory",
    "Mixed",
    "MixedAttention",
    "MixedGradients",
    "Network",
    "Networks",
    "Operation",
    "OperationGradients",
    "Params",
    "Rebuilt",
    "Replaced",
    "SecondDerivatives",
    "Session",
    "Sessions",
    "Sharded",
    "ShardedMemory",
    "ShardedSecondDerivatives",
    "Spec",
    "Steps",
    "Traffic",
    "Training",
    "dtype_of",
]

Array = np.ndarray[Any, Any]
Mask = Array | None
Params = dict[str, Array]
Spec = NonLocalSpec
# z, the running statistics after the call, and the gradients of the input and of the parameters
Everything = tuple[Array, Params, Array, Params]
T = TypeVar("T")


def dtype_of(params: Params) -> str:
    """Return the name of the dtype of parameters, float32 where NumPy has none such as theirs."""
    return next((a.dtype.name for a in params.values() if np.issubdtype(a.dtype, np.floating)), "float32")


class Driver(Protocol):
    """An implementation on one device; the constructor takes `device="cpu"`.

    The constructor raises `ImportError` where the framework is missing and `ValueError` for a device that is not there.
    A driver whose implementation can express few of the suite's cases has an attribute `cases` with a tuple of its own;
    every check then chooses among those. One with `is_reference = True` is the reference itself, on which the checks
    that would compare it with itself do not run. An attribute `notes` says what else a reader of the report has to know
    of how it runs.
    """

    name: str
    """For the report; and so are `version` and `device`."""
    version: str
    device: str
    dtypes: Sequence[str]
    """In which it computes, `("float64", "float32")` or one of them; half precision is the capability "mixed"."""
    methods: Sequence[str]
    """The values of `method` that it knows."""
    capabilities: AbstractSet[str]
    """Which of `nonlocal_conformance.capabilities.CAPABILITIES` it has."""
    unbiased: bool
    """Whether its running variance is the unbiased one."""

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
        """Return z, and `norm.mean` and `norm.variance` after the call, or nothing without batch norm."""


class Gradients(Protocol):
    """The capability "vjp"."""

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
        """Return the gradients of the input and of every parameter but the running statistics, from that of z."""


class SecondDerivatives(Protocol):
    """The capability "hvp"."""

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
        """Return the gradients of the inner product of what `vjp` gives with `vx` and `vparams`."""


class Operation(Protocol):
    """The capability "op"."""

    def op(self, theta: Array, phi: Array, g: Array, **options: Any) -> Array:
        """Return y; the options are those of `nonlocal_core.nonlocal_op`."""


class OperationGradients(Protocol):
    """The capability "op_vjp"."""

    def op_vjp(self, theta: Array, phi: Array, g: Array, dy: Array, **options: Any) -> Params:
        """Return the gradients of the arrays, as `nonlocal_core.nonlocal_op_vjp` names them."""


class Attention(Protocol):
    """The capability "attention"."""

    def attention(self, spec: Spec, params: Params, x: Array, positions: Any = None, key_mask: Mask = None) -> Array:
        """Return rows of the weights, `(B, Q, M)`."""


class Export(Protocol):
    """The capability "export"."""

    def export(self, spec: Spec, params: Params) -> Params:
        """Return parameters after a block has taken them in and given them out."""


class Create(Protocol):
    """The capability "create"."""

    def create(self, **options: Any) -> Spec:
        """Return the spec of a block that users make with these options."""


class Rebuilt(Protocol):
    """The capability "rebuilt"."""

    def rebuilt(self, spec: Spec) -> Spec:
        """Return the spec of a block made anew from its own description: a config, a pickle."""


class Initial(Protocol):
    """The capability "initial"."""

    def initial(self, spec: Spec, seed: int = 0) -> Params:
        """Return the parameters of a new block, drawn from the seed."""


class Training(Protocol):
    """The capability "train"."""

    def train(
        self, spec: Spec, params: Params, x: Array, target: Array, key_mask: Mask = None, *, steps: int, rate: float
    ) -> tuple[list[float], Params]:
        """Return the losses, mean squares of z - target, and the parameters of plain SGD in training mode."""


class Steps(Protocol):
    """The capability "steps"."""

    def steps(
        self, spec: Spec, params: Params, inputs: Sequence[Array], *, training: bool = False
    ) -> list[tuple[Array, Params]]:
        """Return what `block` returns for each input in turn, from one block."""


class Session(Protocol):
    """One live block of the driver's framework, in the dtype of its parameters."""

    def call(self, x: Array, key_mask: Mask = None, *, training: bool = False) -> tuple[Array, Params]:
        """Return what `block` returns, without gradients."""

    def gradients(self, x: Array, dz: Array, key_mask: Mask = None, *, training: bool = False) -> Everything:
        """Return what `call` and `vjp` return, from one call and less the frozen parameters."""

    def load(self, params: Params) -> None:
        """Take parameters in, or raise an error if they do not fit."""

    def params(self) -> Params:
        """Return the parameters and statistics, as the framework gives them out."""

    def freeze(self, names: Collection[str]) -> None:
        """Ask for no gradient of these parameters from now on."""

    def copies(self) -> dict[str, Session]:
        """Return a copy by each way that the framework has, under its name."""


class Sessions(Protocol):
    """The capability "session"."""

    def session(self, spec: Spec, params: Params, *, method: str = "auto") -> Session:
        """Return a new block that has taken the parameters in."""


class Compiled(Protocol):
    """The capability "compiled"."""

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
        """Return z of the block as its framework compiles it."""


class CompiledGradients(Protocol):
    """The capability "compiled_vjp"."""

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
        """Return what `block` and `vjp` return, of a block as its framework compiles it for training."""


class MixedGradients(Protocol):
    """The capability "mixed_vjp"; `mixed_dtypes` are as of "mixed"."""

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
        """Return what `block` and `vjp` return, with float32 parameters and operands in `dtype`."""


class MixedAttention(Protocol):
    """The capability "mixed_attention"; `mixed_dtypes` are as of "mixed"."""

    def mixed_attention(self, spec: Spec, params: Params, x: Array, dtype: str, key_mask: Mask = None) -> Array:
        """Return all rows of the weights, with float32 parameters and operands in `dtype`."""


class Mixed(Protocol):
    """The capability "mixed"."""

    mixed_dtypes: Sequence[str]
    """`("bfloat16", "float16")`, or one of them. With the capability "casts" inputs have these dtypes too, and z and
    the gradient of x that of x; arrays in bfloat16 are those of the package `ml_dtypes`. On a device that has it also
    "tensorfloat32": operands are float32, of which products take 11 significant bits. What `dtypes` are tested for is
    then to be full float32."""

    def mixed(
        self, spec: Spec, params: Params, x: Array, dtype: str, key_mask: Mask = None, *, method: str = "auto"
    ) -> Array:
        """Return z with float32 parameters and operands in `dtype`."""


class Layouts(Protocol):
    """The capability "layouts"."""

    def layouts(
        self, spec: Spec, params: Params, x: Array, dz: Array, key_mask: Mask = None
    ) -> dict[str, tuple[Array, Array, bool]]:
        """Return z and dx for each memory layout of the input or the mask, by its name, and whether z has that of x."""


class Network(Protocol):
    """A network of the driver's framework, into which it puts blocks; what it calls places and blocks is its own."""

    def run(self, x: Array, *, training: bool = False) -> Array:
        """Return its output."""

    def state(self) -> Params:
        """Return copies of all its parameters and statistics, each under a name that it keeps."""

    def insert(self, after: Any, x: Array, **options: Any) -> list[Insertion]:
        """Put blocks after the layers of these names; `x` is an input, options are those of the spec and `method`."""

    def remove(self) -> None:
        """Take all blocks out."""

    def load(self, block: str, params: Params) -> None:
        """Let a block take parameters in."""

    def check_identity(self) -> None:
        """Check that every block is the identity."""

    def attention_of(self, x: Array, block: str | None = None, positions: Any = None) -> AttentionMap:
        """Return rows of the weights of a block, named by itself or by its place, in a run on `x`."""


class Networks(Protocol):
    """The capability "network"."""

    def network(self, layers: Params, shape: tuple[int, ...]) -> Network:
        """Return a network of linear layers without bias under these names, one after the other, for an input shape.

        A layer multiplies each position by its matrix `(out, in)`, whose dtype is that of the network.
        """


class Replaced(Protocol):
    """The capability "replaced"."""

    def replaced(
        self, spec: Spec, params: Params, x: Array, dz: Array, layer: str, key_mask: Mask = None
    ) -> tuple[Array, tuple[Array, Params], Array, Callable[[], Params]]:
        """Return what a block gives of which theta, phi, g or out is a layer of the framework that gives twice as much.

        Its parameters are those of the layer before; it doubles the result, as a subclass does, a wrapper, a hook.

        Returns:
            z in evaluation; the gradients as of `vjp`; all rows of the weights; and a function that exports the
            parameters, or raises `TypeError` or `ValueError` in words that name the layer.
        """


class Sharded(Protocol):
    """The capability "sharded".

    Arrays are whole, as of any other method; the driver cuts them, and brings the pieces together again. One
    whose framework has unequal pieces also names the capability "uneven".
    """

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
        """Return what `block` and `vjp` return, of an input that so many devices cut along an axis, 0 for the batch."""


class ShardedSecondDerivatives(Protocol):
    """The capability "sharded_hvp"."""

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
        """Return what `hvp` returns, of a cut input."""


class Traffic(Protocol):
    """The capability "traffic"."""

    def traffic(
        self, spec: Spec, params: Params, x: Array, key_mask: Mask = None, *, axis: int, devices: int
    ) -> tuple[float, float]:
        """Return how many numbers one device receives in training, forward and backward.

        Of an array of n numbers that P devices gather it receives n (P - 1) / P, of one that they sum twice that, of
        one whose sum they scatter n (P - 1) / P. Sums of the gradients of the parameters do not count.
        """


class ShardedMemory(Protocol):
    """The capability "sharded_memory"."""

    def sharded_memory(self, spec: Spec, params: Params, x: Array, dz: Array, *, axis: int, devices: int) -> int:
        """Return the peak bytes of one device beside what it is given, forward and backward; there may be one alone."""


class Memory(Protocol):
    """The capability "peak_memory"."""

    def peak_memory(self, call: Callable[[], T]) -> tuple[T, int | None]:
        """Return the result of a call and its peak extra memory in bytes, None where that cannot be seen."""
